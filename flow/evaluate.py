"""What pictures are worth: the rewards of a rollout, and evaluations on held-out prompts."""
import torch
from torch import Tensor

from flow.log import log_picture, write_line
from flow.lora import swapped
from flow.pictures import middle_frames, save_grid
from flow.pipeline import decode, decode_size, draw_noise, integrate, schedule
from flow.processes import RANK, gather, share


def score(run, x0: Tensor, prompts: list[str]) -> Tensor:
    """The rewards (n,) of an epoch's pictures, of all processes: each decodes and scores its latents x0 (share, ...),
    16 megapixels at a time."""
    mark_peak(run, "rollout")
    chunks = torch.arange(len(x0)).split(16 * decode_size(run.pipe))
    reward = gather(torch.cat([run.reward(decode(run.pipe, x0[i]), [prompts[j] for j in i]) for i in chunks]))
    to_cpu(run.reward)
    mark_peak(run, "reward")
    return reward


def to_cpu(reward):
    """A reward's models make room on the GPU until they are asked again."""
    for model in reward.models:
        model.to("cpu")


def mark_peak(run, phase: str):
    """Note how many GiB of GPU memory a phase has taken at most, and count anew."""
    if torch.cuda.is_available():
        run.peaks[f"peak_gb_{phase}"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()


def evaluate(run, epoch: int):
    """Held-out prompts, the same noise for every run and seed: eval_* numbers to the log, pictures to samples/."""
    args, pipe, own = run.args, run.pipe, share(run.args.eval_n)
    prompts = run.eval_prompts[own]
    noise = draw_noise(pipe, len(prompts), [torch.Generator().manual_seed(seed) for seed in range(args.eval_n)[own]])
    with swapped(run.params, run.ema):
        x0, ratios = integrate(pipe, noise, prompts, schedule(pipe, args.eval_steps or args.steps), desc="evaluate",
                               guidance=args.guidance, compare=True, batch=args.rollout_batch or args.batch)
    pictures = decode(pipe, x0)
    reward = run.reward(pictures, prompts)
    to_cpu(run.reward)
    mark_peak(run, "evaluate")
    pictures, reward, ratios = gather(pictures), gather(reward), gather(ratios)
    if RANK > 0:
        return
    top, low = middle_frames(pictures).amax(1), middle_frames(pictures).amin(1)
    steps = ratios.mean(0)
    file = run.out / "samples" / f"{epoch:05d}.png"
    save_grid(file, pictures, 8, run.eval_prompts)
    log_picture(run, file)
    write_line(run, {
        "step": run.step, "epoch": epoch, "eval_reward": reward.mean().item(),
        "eval_reward_se": (reward.std() / len(reward) ** 0.5).item(), "eval_norm_ratio": steps.mean().item(),
        "eval_norm_ratio_max": steps.max().item(), "eval_norm_ratio_steps": steps.tolist(),
        "eval_saturation": ((top - low) / top.clamp_min(1e-3)).mean().item()})
