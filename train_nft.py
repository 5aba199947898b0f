r"""DiffusionNFT (negative-aware fine-tuning) + NormGuard for flow-matching models, on one GPU or several.

    python train_nft.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_nft.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 10 --timesteps 9 --group 24 --groups 48 --batch 16 --rollout-batch 16 \
        --lr 3e-4 --kl 2e-5 --max-grad-norm 0.2 --ema 0.9 --eval-steps 40 --epochs 100   # hours: docs/machines.md
    torchrun --nproc-per-node 8 train_nft.py ...                # the same on eight GPUs

DiffusionNFT (arXiv 2509.16117, github.com/NVlabs/DiffusionNFT) is supervised learning on the policy's own pictures,
good and bad. A picture x0 of the old policy is good with probability r. With x_t = (1 - t) x0 + t eps and
x0(v) = x_t - t v,

    v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
    L(v) = mean ||x0(v) - x0||^2 / stopgrad(mean |x0(v) - x0|)                             r = 1/2 + A / 2, A in [-1, 1]
    base_loss = (r L(v+) + (1 - r) L(v-)) / beta
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                       guard: normguard.py

As in the official PickScore recipe:
- The old policy is an EMA of the trained LoRA. It draws the pictures, without guidance.
- The advantage A is the reward minus its group's mean, over the global std, clipped at +- 5 and divided by 5.
- There is one update an epoch, at random noise levels of the rollout (in the command above at nine of ten).
- With --ema 0.9, a moving average of the LoRA is evaluated and kept in lora/.

Unlike the official recipe:
- Euler steps instead of a second-order sampler; T5 reads 256 tokens, diffusers' default, instead of 128.
- A is divided by the std alone (officially by std + 1e-4), so that the reward's scale does not matter.
- base_loss lacks the factor 5, so that one lam suits all methods. So kl and max_grad_norm above are a fifth, too.

To resume, run the same command again. README.md has the flags that matter.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch is imported: its idle threads soon free their core

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flow import draws, run
from flow.cli import InputError, one_line_errors, parse, progress
from flow.distributed import local_device, local_slice, mean_over_rows, sum_gradients
from flow.evaluate import evaluate, reward_stats, score
from flow.lora import add_lora, prepare_transformer, read_lora, set_adapter, swapped
from flow.pipeline import integrate, schedule, velocity
from normguard import norm_hinge, norm_ratio, oppose, reference


@dataclass
class Args:
    # ---- method
    lam: float | Literal["auto"] = 0.05  # weight of the hinge; 0: plain NFT; auto: scale it to the loss's gradient
    margin: float = 0.0  # the hinge acts above this excess of the velocity norm over the reference's (0.02: 2 %)
    guard_guidance: float | None = None  # the guard compares velocities of this guidance scale (None: no guidance)
    kl: float = 1e-4  # weight of the velocity KL to the reference; 0 with --lam 0 saves the reference's forward pass
    nft_beta: float = 1.0  # beta: how far v+ and v- lie from the old policy
    old_decay: tuple[int, float, float] = (0, 0.001, 0.5)  # EMA decay: 0 for START steps, then + RATE, up to MAX
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm
    ema: float | None = None  # evaluate and save a moving average of the LoRA, whose decay rises to this
    lr: float = 5e-4  # AdamW's learning rate, constant
    rank: int | None = None  # LoRA rank; alpha is twice that (None: 32, or that of --init-lora)
    init_lora: str | None = None  # LoRA to start from: a folder, .safetensors file or hub id; the reference is the base
    # ---- model, reward, prompts
    model: str = "tiny/sd3"  # any flow-matching text-to-image or text-to-video pipeline: a diffusers folder or hub id
    # pickscore, hpsv2.1, clipscore, aesthetic, ocr, a CLIPModel, file.py:function, vlm:MODEL[@URL], a sum A:0.5,B:0.5
    reward: str = "tiny/pickscore"
    normalize_rewards: bool = False  # divide each part of a sum by its running deviation, before the weights
    vlm_question: str | None = None  # what vlm: asks; {prompt}: the picture's prompt (None: does it show the prompt?)
    prompts: str = "tiny/prompts.txt"  # training prompts: .txt (one a line), .jsonl, .json, .csv, .tsv, .parquet
    eval_prompts: str | None = None  # held-out prompts (None: tiny's; of other --prompts the last tenth)
    # ---- sampling
    group: int = 16  # pictures of each prompt (a group)
    groups: int = 6  # groups of an epoch, one for each prompt
    steps: int = 8  # Euler steps of a rollout
    guidance: float | None = None  # scale of rollouts and evaluations, of training too if the model is told it
    size: int | str | None = None  # pixels a side, or WIDTHxHEIGHT like 768x512 (None: the model's own)
    frames: int | None = None  # frames of a video (None: the model's own)
    # ---- training
    seed: int = 0  # seed of the LoRA, the prompts and all noise
    epochs: int = 40  # rounds of rollouts and updates
    updates: int = 1  # optimizer steps an epoch; each trains on 1/updates of the pictures
    timesteps: int = 2  # noise levels per picture, drawn from the schedule's steps
    eval_every: int = 10  # epochs between evaluations; 0: never
    eval_reward: tuple[str, ...] = ()  # rewards that only score evaluations: they show whether --reward is gamed
    eval_n: int = 64  # held-out pictures of an evaluation
    eval_steps: int | None = None  # Euler steps of an evaluation (None: --steps)
    # ---- machine
    batch: int = 64  # pictures in a forward pass of an update; gradients are accumulated
    rollout_batch: int | None = None  # pictures in a forward pass of a rollout or evaluation (None: --batch)
    quantize: str = "none"  # the frozen transformer: none, int8 (pip install torchao), nf4 (pip install bitsandbytes)
    shard: bool = False  # divide the frozen transformer among the processes, for one larger than a GPU
    checkpointing: bool | None = None  # gradient checkpointing (None: on a GPU)
    compile: bool = False  # torch.compile the transformer's blocks
    # ---- output
    out: str | None = None  # the run's folder (None: runs/nft-MODEL-REWARD-lamLAM-sSEED)
    save_every: int = 5  # epochs between checkpoints
    wandb: str | None = None  # also log to this wandb project (pip install wandb)


def nft_loss(v: Tensor, v_old: Tensor, x0: Tensor, xt: Tensor, t: Tensor, r: Tensor, beta: float = 1.0) -> Tensor:
    """DiffusionNFT's loss per sample, in fp32. v (with gradient), v_old, x0, xt (b, ...), t, r in [0, 1] (b,): (b,)."""
    v, v_old, x0, xt, t, r = (a.float() for a in (v, v_old.detach(), x0, xt, t, r))

    def matching(v):  # L(v), (b,)
        error = (xt - t.view(-1, *[1] * (xt.ndim - 1)) * v - x0).flatten(1)  # in x0-space
        return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)

    good = matching((1 - beta) * v_old + beta * v)
    bad = matching((1 + beta) * v_old - beta * v)
    return (r * good + (1 - r) * bad) / beta


def old_decay(step: int, start: int, rate: float, most: float) -> float:
    """Decay of the old policy's EMA after `step` steps: 0 (the current policy) up to `start`, then rising to `most`."""
    return min(rate * max(step - start, 0), most)


@contextmanager
def old_policy(model: torch.nn.Module):
    """Inside, the model is the old policy."""
    set_adapter(model, "old")
    try:
        yield
    finally:
        set_adapter(model, "default")


@one_line_errors()
def main(args: Args, rival=None):
    """Train. rival(v, v_ref, pipe, batch) -> (b,): a guard to compare with in the hinge's place (tiny/reproduce.py)."""
    run.check_args(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    guided = args.guard_guidance  # None: the guard compares the conditional velocities, as the loss
    n = args.groups * args.group  # pictures an epoch
    local = local_slice(n)  # the pictures of an epoch that this process draws and trains on
    if n % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > args.steps:
        raise InputError(f"--timesteps {args.timesteps}: more than --steps {args.steps}")
    if min(args.old_decay) < 0 or not args.old_decay[2] < 1:
        raise InputError(f"--old-decay {' '.join(map(str, args.old_decay))}: none below 0, and the last below 1")

    # ---- load; errors come before anything is written
    device = local_device()
    prompts, eval_prompts = draws.draw_prompts(args)  # rows: epochs * groups to train on, eval_n held-out ones
    out, saved = run.find_run("nft", args, device)  # saved: a checkpoint or None; a finished run exits here
    reward, eval_rewards, pipe = run.load_models(args, device, prompts, eval_prompts)
    sigmas = schedule(pipe, args.steps)  # the rollout's noise levels, (steps + 1,), from 1 down to 0

    # ---- LoRA and optimizer
    initial = read_lora(pipe, "--init-lora", args.init_lora) if args.init_lora else None
    params = add_lora(pipe.transformer, args.rank, args.seed, initial=initial)
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in params] if args.ema else None
    variances = [torch.zeros(len(reward.names), 1).double()] if args.normalize_rewards else None  # of scores, summed
    old_params = add_lora(pipe.transformer, args.rank, args.seed, "old", initial)  # equal to params
    set_adapter(pipe.transformer, "default")

    # ---- start or resume
    first_epoch, step, skipped, skipped_in_a_row = run.resume(
        out, saved, pipe.transformer, params, optimizer, variances=variances, ema=ema, old=old_params)
    run.open_run(out, "nft", args, pipe, saved, eval_prompts)
    run.encode_local_prompts(out, args, pipe, prompts, eval_prompts)
    prepare_transformer(pipe, args)  # gradient checkpointing, torch.compile
    if first_epoch == 0 and args.eval_every:
        evaluate(out, args, pipe, reward, eval_rewards, eval_prompts, step=0, epoch=0)
    decay = old_decay(step, *args.old_decay)  # decay of the old policy's latest update

    bar = progress(range(first_epoch, args.epochs), desc="train", initial=first_epoch, total=args.epochs)
    for epoch in bar:
        start, g = time.time(), draws.rng(args.seed, draws.EPOCH, epoch)
        drawn = [p for p in prompts[epoch * args.groups:(epoch + 1) * args.groups] for _ in range(args.group)]  # (n,)
        texts = [row["prompt"] for row in drawn]  # (n,)

        # ---- rollout: `group` pictures of each prompt from the old policy
        noise = draws.row_noise(pipe, args.seed, draws.ROLLOUT, epoch, range(n)[local])
        with old_policy(pipe.transformer):
            x0, _ = integrate(pipe, noise, texts[local], sigmas, guidance=args.guidance,
                              batch=args.rollout_batch or args.batch, desc="rollout")

        # ---- reward and the probability of being good
        scores = score(pipe, reward, x0, drawn[local])  # (parts of the reward, n), of all processes
        deviations = reward.deviations(scores, variances, epoch) if args.normalize_rewards else 1
        rewards = reward.weighted(scores / deviations)  # (n,)
        stats = reward_stats(reward, scores, rewards, args.group)
        r = 0.5 + 0.5 * draws.group_advantages(rewards, args.group, clip=5)  # (n,) in [0, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` noise levels
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)  # (rows,)
        shuffled_steps = torch.rand(n, args.steps, generator=g).argsort(1)  # (n, steps): an order for each picture
        t = sigmas[shuffled_steps[:, :args.timesteps].flatten()]  # (rows,); t is sigma
        updates = torch.arange(len(t)).split(len(t) // args.updates)  # the rows of each update

        for u, update in enumerate(updates):
            # ---- loss and gradient
            logged = []  # one dict of row values per micro-batch
            for rows in draws.local_batches(update, picture, n, args.batch):
                batch = draws.training_batch(pipe, args.seed, epoch, rows, picture[rows], t[rows], x0, texts, r=r)
                given = pipe, batch["xt"], t[rows], batch["prompts"]
                v = velocity(*given)
                if u == 0 and decay == 0:
                    v_old = v.detach()  # the old policy is still the current one
                else:
                    with torch.no_grad(), old_policy(pipe.transformer):
                        v_old = velocity(*given)
                base_loss = nft_loss(v, v_old, batch["x0"], batch["xt"], batch["t"], batch["r"], args.nft_beta)
                guard = kl = torch.zeros_like(base_loss)
                row_log = {}
                if args.lam != 0 or args.kl > 0:
                    with reference(pipe.transformer):
                        v_ref = velocity(*given)
                        vg_ref = v_ref if guided is None else velocity(*given, guided)
                    vg = v if guided is None else velocity(*given, guided)  # the guard compares vg with vg_ref
                    guard = norm_hinge(vg, vg_ref, args.margin)
                    if rival is not None:
                        guard = rival(vg, vg_ref, pipe, {**batch, "scores": scores, "step": step, "epoch": epoch})
                    kl = (v - v_ref).square().flatten(1).mean(1)
                    ratio = norm_ratio(vg.detach(), vg_ref)
                    row_log |= {"norm_ratio": ratio, "active": ratio > 1 + args.margin, "t": batch["t"]}
                loss = base_loss + lam * guard + args.kl * kl
                if args.lam == "auto":
                    oppose(v, v_ref, args.margin)
                (loss.sum() / len(update)).backward()
                row_log |= {"loss": loss, "base_loss": base_loss, "guard": guard, "kl": kl,
                            "old_distance": (v.detach() - v_old).square().flatten(1).mean(1)}
                logged.append({name: value.detach() for name, value in row_log.items()})
            means = mean_over_rows(logged, len(update))  # over all processes; adds norm_ratio_by_t

            # ---- optimizer step, unless the loss or a gradient is not finite
            sum_gradients(params)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item()
            finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
            if finite:
                optimizer.step()
                for average, p in zip(ema or (), params):
                    average.lerp_(p.detach(), 1 - min((2 + step) / (11 + step), args.ema))
            optimizer.zero_grad()
            step += 1
            skipped += not finite
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            images = n * (u + 1) / args.updates  # pictures of this epoch trained on so far
            run.log_step(out, bar, {"step": step, "epoch": epoch, **stats, **means, "grad_norm": grad_norm,
                                    "skipped": skipped, "img_per_s": images / (time.time() - start)})
            if skipped_in_a_row == 10:
                raise InputError(f"{out}: ten steps in a row were not finite; try a lower --lr in another --out")

        # ---- the old policy follows
        decay = old_decay(step, *args.old_decay)
        with torch.no_grad():
            for p, q in zip(params, old_params):
                q.copy_(decay * q + (1 - decay) * p)

        # ---- evaluation and checkpoint
        done = epoch + 1
        if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
            with swapped(params, ema):  # if ema is None, nothing is swapped
                evaluate(out, args, pipe, reward, eval_rewards, eval_prompts, step, done)
        if done % args.save_every == 0 or done == args.epochs:
            run.save_checkpoint(out, "nft", args, pipe, eval_prompts, params, optimizer, epoch=done, step=step,
                                skipped=skipped, skipped_in_a_row=skipped_in_a_row, variances=variances, ema=ema,
                                old=[p.detach() for p in old_params])
    run.finish_run(out, skipped)


if __name__ == "__main__":
    main(parse(Args, __doc__))
