"""A training run: its flags, seeds and folder; start and resume; a step's and an epoch's end; log, curves, checkpoint.

`start_run` gives a namespace `run` that the training scripts carry along: args, out, pipe, reward, prompts,
eval_prompts, sigmas, params, opt, state (what it was resumed from), and the counters step, epoch, skipped and bad
(non-finite steps in a row). """
import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from flow.checkpoint import find_run, open_folder, resume, save_checkpoint, unlock
from flow.cli import fail, json_text, read_prompts
from flow.lora import add_lora
from flow.pictures import middle_frames, save_grid
from flow.pipeline import decode, draw_noise, encode_prompts, integrate, load_pipeline, schedule
from flow.rewards import load_reward

# ---------------------------------------------------------------- flags, seeds, what is drawn

def check_numbers(args):
    """Refuse numbers that cannot work, naming the flag. A flag that a script does not have is passed over."""
    at_least = {"epochs groups rank updates batch timesteps save_every eval_n size frames": 1, "group steps": 2,
                "seed eval_every lam margin kl guidance": 0}
    for flags, low in at_least.items():
        for flag in flags.split():
            value = getattr(args, flag, None)
            if value is None or (flag, value) == ("lam", "auto"):
                continue
            if isinstance(value, str) or not low <= value < float("inf"):
                or_else = ", or auto" if flag == "lam" else ""
                fail(f"--{flag.replace('_', '-')} {value}: must be at least {low}{or_else}")
    for flag in ("model", "reward"):
        if not getattr(args, flag):
            fail(f"--{flag} '': give a folder or a hub id")
    if args.seed >= 2**63:
        fail(f"--seed {args.seed}: must be below 2^63")
    for flag in ("lr", "max_grad_norm", "adv_clip", "power", "clip", "nft_beta", "dpo_beta"):
        if not 0 < getattr(args, flag, 1) < float("inf"):
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")


def rng(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key: a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def draw_prompts(args) -> tuple[list[str], list[str]]:
    """The run's prompts, epochs * groups of them, each pass over the file a shuffle of its own; and eval_n held-out
    ones."""
    prompts, held_out = read_prompts(args.prompts, "--prompts"), read_prompts(args.eval_prompts, "--eval-prompts")
    if args.groups > len(prompts):
        fail(f"--groups {args.groups}: more than the {len(prompts)} prompts in {args.prompts}")
    n = args.epochs * args.groups
    shuffles = [torch.randperm(len(prompts), generator=rng(args.seed, 0, i)) for i in range(n // len(prompts) + 1)]
    return [prompts[i] for i in torch.cat(shuffles)[:n]], [held_out[i % len(held_out)] for i in range(args.eval_n)]


def group_advantages(reward: Tensor, group: int, clip: float) -> Tensor:
    """Group mean, global std, clipped at +- clip and scaled to +- 1. reward (prompts * group,), groups contiguous."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    return (centred / (reward.std(correction=0) + 1e-4)).clamp(-clip, clip) / clip


def stratified(n: int, strata: int, usable: int, g: torch.Generator) -> Tensor:
    """One of the schedule's first `usable` steps from each stratum, for each of n pictures: (n, strata) long."""
    bounds = torch.linspace(0, usable, strata + 1).long()
    return bounds[:-1] + (torch.rand(n, strata, generator=g) * (bounds[1:] - bounds[:-1])).long()


# ---------------------------------------------------------------- start

def start_run(name: str, args) -> SimpleNamespace:
    """Everything a training script starts from, in the order in which it can fail: flags, folder, reward, model,
    prompts. An interrupted run is where its checkpoint left it; a finished one says so and exits 0."""
    prompts, eval_prompts = draw_prompts(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, state = find_run(name, args)
    began = (out / "args.json").exists()
    reward = load_reward(args.reward, device)
    reward(torch.zeros(2, 3, 64, 64), prompts[:1] * 2)  # does it work?
    pipe = load_pipeline(args.model, device, args.size, args.frames)
    first = state["epoch"] if state else 0
    encode_prompts(pipe, prompts[first * args.groups:] + eval_prompts, args.guidance)
    model = pipe.transformer
    params = add_lora(model, args.rank, args.seed)
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    run = SimpleNamespace(name=name, args=args, out=out, began=began, pipe=pipe, reward=reward, prompts=prompts,
                          eval_prompts=eval_prompts, sigmas=schedule(pipe, args.steps), params=params, opt=opt,
                          state=state, step=0, epoch=first, skipped=0, bad=0)
    resume(run)
    open_folder(run)
    run.wandb = start_wandb(args, out)
    if args.checkpointing or (args.checkpointing is None and device.type == "cuda"):
        if model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(model)
    if first == 0 and args.eval_every:
        evaluate(run, 0)
    return run


# ---------------------------------------------------------------- a step, an epoch

def epochs(run):
    """The epochs that are left, on a bar: (epoch, its prompts with each `group` times, its generator)."""
    args = run.args
    run.bar = tqdm(range(run.epoch, args.epochs), desc="train", initial=run.epoch, total=args.epochs)
    for run.epoch in run.bar:
        run.start = time.time()
        prompts = run.prompts[run.epoch * args.groups:(run.epoch + 1) * args.groups]
        yield [p for p in prompts for _ in range(args.group)], rng(args.seed, 1, run.epoch)
    unlock()
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    said = [f"{run.skipped} steps skipped"] if run.skipped else []
    for name in ("reward", "norm_ratio"):
        values = [line[f"eval_{name}"] for line in lines if f"eval_{name}" in line]
        values = values or [line[name] for line in lines if line.get(name) is not None]
        said += [f"{name.replace('_', ' ')} {values[0]:.3f} -> {values[-1]:.3f}"] if values else []
    print(f"done: {', '.join(said)}; {run.out}/ holds lora/, samples/, curves.png and metrics.jsonl")


def tally(sums: dict, **values: Tensor):
    """Add each value's sum over a micro-batch (b,) to `sums`; nothing waits for the GPU."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().float().sum()


def finish_step(run, sums: dict, rows: int, reward: Tensor, share: float):
    """Clip the gradients and step, unless the loss or a gradient is not finite; log the means of `sums` over the step's
    rows and the rewards (n,) of its epoch, of which this share is trained on. Ten skipped steps in a row end the
    process."""
    means = dict(zip(sums, (torch.stack(list(sums.values())) / rows).tolist()))
    grad_norm = torch.nn.utils.clip_grad_norm_(run.params, run.args.max_grad_norm).item()
    finite = bool(np.isfinite([means["loss"], grad_norm]).all())
    if finite:
        run.opt.step()
    run.opt.zero_grad()
    run.step += 1
    run.skipped += not finite
    run.bad = 0 if finite else run.bad + 1
    if reward.std() == 0 and share == 1:
        tqdm.write(f"note: epoch {run.epoch}: the reward of all pictures is {reward[0]:g}; there is nothing to learn")
    line = {"step": run.step, "epoch": run.epoch, "reward": reward.mean().item(), "reward_std": reward.std().item()}
    for name in ("loss", "base_loss", "guard", "kl", "norm_ratio", "active"):  # the last two only with a reference
        line[name] = means.get(name)
    line |= {"grad_norm": grad_norm, "skipped": run.skipped,
             "img_per_s": share * len(reward) / (time.time() - run.start)}
    if torch.cuda.is_available():
        line["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    write_line(run, line)
    if run.bad == 10:
        fail(f"{run.out}: ten steps in a row had a non-finite loss or gradient and were not taken. Try a lower --lr in "
             "another --out")
    ratio = "-" if line["norm_ratio"] is None else f"{line['norm_ratio']:.3f}"
    skipped = {"skipped": run.skipped} if run.skipped else {}
    run.bar.set_postfix(reward=f"{line['reward']:.3f}", norm_ratio=ratio, **skipped)


def finish_epoch(run, **state):
    """Evaluate and save if it is time to; `state` is what a method keeps besides LoRA and optimizer."""
    args, done = run.args, run.epoch + 1
    if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
        evaluate(run, done)
    if done % args.save_every == 0 or done == args.epochs:
        save_checkpoint(run, done, **state)


def evaluate(run, epoch: int):
    """Held-out prompts, the same noise for every run and seed: eval_* numbers to the log, pictures to samples/."""
    args, pipe = run.args, run.pipe
    noise = draw_noise(pipe, args.eval_n, [torch.Generator().manual_seed(seed) for seed in range(args.eval_n)])
    x0, ratios = integrate(pipe, noise, run.eval_prompts, run.sigmas, guidance=args.guidance, compare=True,
                           batch=args.batch, desc="evaluate")
    pictures = decode(pipe, x0)
    reward = run.reward(pictures, run.eval_prompts)
    top, low = middle_frames(pictures).amax(1), middle_frames(pictures).amin(1)
    steps = ratios.mean(0)
    save_grid(run.out / "samples" / f"{epoch:05d}", pictures, 8, run.eval_prompts)
    if run.wandb:
        import wandb  # it is there
        grid = wandb.Image(str(run.out / "samples" / f"{epoch:05d}.png"))
        run.wandb.log({"samples": grid}, step=run.step)
    write_line(run, {
        "step": run.step, "epoch": epoch, "eval_reward": reward.mean().item(),
        "eval_reward_se": (reward.std() / len(reward) ** 0.5).item(), "eval_norm_ratio": steps.mean().item(),
        "eval_norm_ratio_max": steps.max().item(), "eval_norm_ratio_steps": steps.tolist(),
        "eval_saturation": ((top - low) / top.clamp_min(1e-3)).mean().item()})


def write_line(run, line: dict):
    """Append to metrics.jsonl, and to wandb if asked for."""
    with open(run.out / "metrics.jsonl", "a") as log:
        log.write(json_text(line) + "\n")
    if run.wandb:
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        run.wandb.log(numbers, step=line["step"])


def compile_blocks(model: torch.nn.Module):
    """torch.compile each of a transformer's blocks; the whole is called through hooks."""
    for blocks in model.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            block.compile()


def start_wandb(args, out: Path):
    """A wandb run that goes on when the training does, or None without --wandb."""
    if not args.wandb:
        return None
    try:
        import wandb  # no requirement, and slow to import
    except ImportError:
        fail("--wandb: needs a package that is not installed: pip install wandb")
    return wandb.init(project=args.wandb, name=out.name, id=out.name, resume="allow", config=asdict(args))
