"""A training run: start and resume; a step's and an epoch's end.

`start_run` gives a namespace `run` that the training scripts carry along: args, out, pipe, reward, prompts,
eval_prompts, sigmas, params, opt, ema (of the parameters, or None), state (what it was resumed from), and the counters
step, epoch, skipped and bad (non-finite steps in a row). """
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flow.checkpoint import find_run, open_folder, resume, save_checkpoint, unlock
from flow.cli import InputError, check_flags, progress
from flow.distributed import (
    PROCESSES,
    RANK,
    all_gather,
    barrier,
    local_device,
    local_slice,
    mark_peak,
    shutdown,
    sum_gradients,
    to_cpu,
)
from flow.draws import EPOCH, draw_prompts, rng, zero_std_share
from flow.evaluate import evaluate
from flow.log import check_wandb, digits, last_line, start_wandb, write_line
from flow.lora import add_lora, quantization
from flow.pipeline import encode_prompts, load_pipeline, schedule
from flow.prompts import warn_unsuitable
from flow.rewards import load_reward

# ---------------------------------------------------------------- start

def check_numbers(args):
    """Refuse numbers that cannot work, naming the flag. A flag that a script does not have is passed over."""
    at_least = {"epochs groups rank updates batch rollout_batch timesteps save_every eval_n eval_steps size frames": 1,
                "group steps": 2, "seed eval_every lam margin kl guidance": 0}
    check_flags(args, {flag: low for flags, low in at_least.items() for flag in flags.split()})
    if isinstance(args.lam, str) and args.lam != "auto":
        raise InputError(f"--lam {args.lam}: must be at least 0, or auto")
    if args.ema is not None and not 0 < args.ema < 1:
        raise InputError(f"--ema {args.ema}: must be above 0 and below 1")
    if args.groups % PROCESSES or args.eval_n < PROCESSES:
        raise InputError(f"--groups {args.groups} --eval-n {args.eval_n}: with {PROCESSES} processes, the first must "
                         "be a multiple of that and the second no less")
    if args.shard and (PROCESSES == 1 or args.updates > 1 or args.eval_n % PROCESSES or args.quantize != "none"):
        raise InputError("--shard: takes several processes (torchrun), --updates 1, an --eval-n that is a multiple "
                         "of their number, and no --quantize")
    if args.seed >= 2**63:
        raise InputError(f"--seed {args.seed}: must be below 2^63")
    for flag in ("lr", "max_grad_norm", "adv_clip", "power", "nft_beta", "dpo_beta"):
        if not 0 < getattr(args, flag, 1) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")


def start_run(name: str, args) -> SimpleNamespace:
    """Everything a training script starts from, in the order in which it can fail: flags, folder, reward, model,
    prompts. An interrupted run is where its checkpoint left it; a finished one says so and exits 0."""
    device = local_device()
    quantization(args.quantize)
    check_wandb(args)
    prompts, eval_prompts = draw_prompts(args)
    out, state = find_run(name, args, device)
    began = (out / "args.json").exists()
    reward = load_reward(args.reward, device)
    if early := args.size and not args.frames:
        try_reward(reward, (3, args.size, args.size), prompts)  # before minutes of loading
    pipe = load_pipeline(args.model, device, args.size, args.frames, args.quantize, args.shard)
    if not early:
        try_reward(reward, pipe.flow.picture, prompts)
    warn_unsuitable(pipe, prompts + eval_prompts, args.size)
    model = pipe.transformer
    params = add_lora(model, args.rank, args.seed)
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in params] if args.ema else None
    run = SimpleNamespace(name=name, args=args, out=out, began=began, pipe=pipe, reward=reward, prompts=prompts,
                          eval_prompts=eval_prompts, sigmas=schedule(pipe, args.steps), params=params, opt=opt, ema=ema,
                          state=state, step=0, epoch=state["epoch"] if state else 0, skipped=0, bad=0, peaks={},
                          parts={})
    resume(run)
    barrier(epoch=run.epoch, step=run.step)
    if RANK == 0:
        open_folder(run)
    barrier()
    run.wandb = start_wandb(run)
    own = own_prompts(run)
    mark_peak(run, "load")
    encode_prompts(pipe, own, args.guidance, out / "checkpoint" / "prompts")
    if args.shard and len({pipe.flow.shapes.get(prompt) for prompt in own}) > 1:  # the processes' calls would differ
        raise InputError(f"--shard: {type(pipe).__name__} encodes prompts to several lengths; it takes a model that "
                         "pads to one")
    mark_peak(run, "encode")
    if args.checkpointing or (args.checkpointing is None and device.type == "cuda"):
        if model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(model)
    if run.epoch == 0 and args.eval_every:
        evaluate(run, 0)
    return run


def try_reward(reward, picture: tuple[int, ...], prompts: list[str]):
    """End the process, naming --reward, if the reward fails on random pictures of this shape."""
    reward(torch.rand(2, *picture, generator=torch.Generator().manual_seed(0)), prompts[:1] * 2)
    to_cpu(reward)


def own_prompts(run) -> list[str]:
    """What this process draws pictures of: its share of the held-out prompts and of each epoch's."""
    epochs = torch.arange(len(run.prompts)).split(run.args.groups)
    own = [run.prompts[i] for epoch in epochs for i in epoch[local_slice(run.args.groups)]]
    return run.eval_prompts[local_slice(len(run.eval_prompts))] + own


# ---------------------------------------------------------------- a step, an epoch

def epochs(run):
    """The epochs that are left, on a bar: (its prompts with each `group` times, its generator)."""
    args = run.args
    run.bar = progress(range(run.epoch, args.epochs), desc="train", initial=run.epoch, total=args.epochs)
    for run.epoch in run.bar:
        run.start = time.time()
        prompts = run.prompts[run.epoch * args.groups:(run.epoch + 1) * args.groups]
        yield [p for p in prompts for _ in range(args.group)], rng(args.seed, EPOCH, run.epoch)
    unlock()
    if RANK == 0:
        last_line(run)
    shutdown()


# means over an update's rows: of every method (the last two only where there is a reference), and of one
LOGGED = ["loss", "base_loss", "guard", "kl", "norm_ratio", "active"]
OF_METHOD = {"nft": ["old_distance"], "awm": ["clip_share"], "dpo": ["accuracy", "margin"]}
BINS = 5  # equal parts of [0, 1], of the noise level t, in norm_ratio_by_t


def tally(sums: dict, **values: Tensor):
    """Add each value's sum over a micro-batch (b,) to `sums`; nothing waits for the GPU."""
    for name, value in values.items():
        value = value.detach()
        sums[name] = sums.get(name, 0) + (value if value.dtype == torch.float64 else value.float()).sum()


def tally_by_t(sums: dict, ratio: Tensor, t: Tensor):
    """Add norm ratios (b,) to `sums` by their noise level t (b,)."""
    place = (t * BINS).long().clamp_max(BINS - 1)
    for k in range(BINS):
        tally(sums, **{f"ratio_at_{k}": ratio * (place == k), f"rows_at_{k}": place == k})


def finish_step(run, sums: dict, rows: int, reward: Tensor, done: float):
    """Sum the gradients over the processes, clip them and step, unless the loss or a gradient is not finite; log the
    means of `sums` over the step's rows, of all processes, and of the rewards (n,) of its epoch, of which so great a
    share has been trained on. Ten skipped steps in a row end the process."""
    own = dict(zip(sums, torch.stack(list(sums.values())).tolist())) if sums else {}
    totals = all_gather(own)  # of each process
    names = dict.fromkeys(name for total in totals for name in total)
    means = {name: sum(total[name] for total in totals if name in total) / rows for name in names}
    sum_gradients(run.params)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.params, run.args.max_grad_norm).item()
    finite = bool(np.isfinite([means["loss"], grad_norm]).all())
    if finite:
        run.opt.step()
        decay = run.ema and min((2 + run.step) / (11 + run.step), run.args.ema)  # this is step run.step + 1
        for average, p in zip(run.ema or (), run.params):
            average.lerp_(p.detach(), 1 - decay)
    run.opt.zero_grad()
    run.step += 1
    run.skipped += not finite
    run.bad = 0 if finite else run.bad + 1
    flat = zero_std_share(reward, run.args.group)
    if flat == 1 and done == 1:
        tqdm.write(f"note: epoch {run.epoch}: all pictures of a prompt have the same reward ({reward[0]:g}, ...); "
                   "there is nothing to learn")
    line = {"step": run.step, "epoch": run.epoch, "reward": reward.mean().item(), "reward_std": reward.std().item()}
    for name, part in run.parts.items():
        line |= {f"reward/{name}": part.mean().item(), f"reward/{name}_std": part.std().item()}
    line |= {"zero_std_share": flat, **{name: means.get(name) for name in LOGGED}}
    line |= {name: means.get(name) for name in OF_METHOD[run.name]}
    if "policy_ratio" in means:
        line["ratio_std"] = max(0, means["policy_ratio_square"] - means["policy_ratio"] ** 2) ** 0.5
    by_t = [(means.get(f"ratio_at_{k}", 0), means.get(f"rows_at_{k}", 0)) for k in range(BINS)]
    line["norm_ratio_by_t"] = [ratio / count if count else None for ratio, count in by_t]
    line |= {"grad_norm": grad_norm, "skipped": run.skipped,
             "img_per_s": done * len(reward) / (time.time() - run.start)}
    mark_peak(run, "update")
    if run.peaks:
        line |= {"peak_gb": max(run.peaks.values()), **run.peaks}
    write_line(run, line)
    if run.bad == 10:
        raise InputError(f"{run.out}: ten steps in a row had a non-finite loss or gradient and were not taken. Try a "
                         "lower --lr in another --out")
    ratio = "-" if line["norm_ratio"] is None else f"{line['norm_ratio']:.3f}"
    skipped = {"skipped": run.skipped} if run.skipped else {}
    run.bar.set_postfix(reward=digits(line["reward"], line["reward_std"]), norm_ratio=ratio, **skipped)


def finish_epoch(run, **state):
    """Evaluate and save if it is time to; `state` is what a method keeps besides LoRA and optimizer."""
    args, done = run.args, run.epoch + 1
    if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
        evaluate(run, done)
    if RANK == 0 and (done % args.save_every == 0 or done == args.epochs):
        save_checkpoint(run, done, **state)


def compile_blocks(model: torch.nn.Module, backend: str = "inductor"):
    """torch.compile each of a transformer's blocks; the whole is called through hooks. A kind of block is compiled for
    the rollout, the update, the reference in either, and NFT's old policy: five times."""
    torch._dynamo.config.recompile_limit = 64  # of 8 by default, after which a block would stay uncompiled
    for blocks in model.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            block.compile(backend=backend)
