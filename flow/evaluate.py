"""What pictures are worth: the rewards of a rollout, and evaluations on held-out prompts."""
import numpy as np
import torch
from torch import Tensor

from flow.distributed import RANK, all_gather_tensor, gather_tensor, local_slice, mark_peak, to_cpu
from flow.log import log_picture, write_line
from flow.lora import swapped
from flow.pictures import middle_frames, save_grid, to_bytes
from flow.pipeline import decode, decode_size, draw_noise, integrate, schedule


def decoded(run, x0: Tensor, prompts: list[str]):
    """Latents (n, ...) as pictures and each part's rewards (parts, n), 16 megapixels at a time: (pictures, rewards)."""
    most = max(1, 16 * 3 * 2**20 // int(np.prod(run.pipe.flow.picture)))
    size = max(decode_size(run.pipe), most - most % decode_size(run.pipe))
    for i in torch.arange(len(x0)).split(size):
        pictures = decode(run.pipe, x0[i])
        yield pictures, run.reward.scores_of(pictures, [prompts[j] for j in i])
    to_cpu(run.reward)


def parts_of(run, scores: Tensor) -> dict[str, Tensor]:
    """A summed reward's parts (n,) by their names; none of a reward that is no sum. scores (parts, n)."""
    return dict(zip(run.reward.names, scores)) if len(scores) > 1 else {}


def score(run, x0: Tensor, prompts: list[str]) -> Tensor:
    """The rewards (n,) of all processes' pictures: each decodes and scores those of its own latents x0 (share, ...)."""
    mark_peak(run, "rollout")
    scores = all_gather_tensor(torch.cat([scores for _, scores in decoded(run, x0, prompts)], 1).T).T  # (parts, n)
    mark_peak(run, "reward")
    run.parts = parts_of(run, scores)
    return run.reward.weighted(scores)


def saturation(pictures: Tensor) -> Tensor:
    """HSV's, the mean over a picture's pixels (of a video, its middle frame's): (n, ...) in [0, 1] -> (n,)."""
    top, low = middle_frames(pictures).amax(1), middle_frames(pictures).amin(1)
    return ((top - low) / top.clamp_min(1e-3)).flatten(1).mean(1)


def evaluate(run, epoch: int):
    """Held-out prompts, the same noise for every run and seed: eval_* numbers to the log, pictures to samples/."""
    args, pipe, own = run.args, run.pipe, local_slice(run.args.eval_n)
    prompts = run.eval_prompts[own]
    noise = draw_noise(pipe, len(prompts), [torch.Generator().manual_seed(seed) for seed in range(args.eval_n)[own]])
    with swapped(run.params, run.ema):
        x0, ratios = integrate(pipe, noise, prompts, schedule(pipe, args.eval_steps or args.steps), desc="evaluate",
                               guidance=args.guidance, compare=True, batch=args.rollout_batch or args.batch)
    chunks = [(to_bytes(pictures), scores.T, saturation(pictures)) for pictures, scores in decoded(run, x0, prompts)]
    pictures, scores, colour = map(torch.cat, zip(*chunks))
    mark_peak(run, "evaluate")
    pictures, scores = gather_tensor(pictures), all_gather_tensor(scores).T
    colour, ratios = all_gather_tensor(colour), all_gather_tensor(ratios)
    if RANK > 0:
        return
    reward, steps = run.reward.weighted(scores), ratios.mean(0)
    parts = {f"eval_reward/{name}": part.mean().item() for name, part in parts_of(run, scores).items()}
    file = run.out / "samples" / f"{epoch:05d}.png"
    save_grid(file, pictures, 8, run.eval_prompts)
    log_picture(run, file)
    write_line(run, {
        "step": run.step, "epoch": epoch, "eval_guidance": args.guidance, "eval_reward": reward.mean().item(),
        "eval_reward_se": (reward.std() / len(reward) ** 0.5).item(), **parts, "eval_norm_ratio": steps.mean().item(),
        "eval_norm_ratio_max": steps.max().item(), "eval_norm_ratio_steps": steps.tolist(),
        "eval_saturation": colour.mean().item()})
