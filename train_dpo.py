r"""Online Flow-DPO + NormGuard for flow-matching models, on one GPU or several.

    python train_dpo.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_dpo.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 40 --timesteps 39 --group 24 --groups 8 --pairs 1 --batch 16 \
        --rollout-batch 16 --lr 3e-4 --guidance 4.5 --dpo-beta 100 --max-grad-norm 0.02 --eval-steps 40 --epochs 100
    torchrun --nproc-per-node 8 train_dpo.py ...                # the same on eight GPUs

Diffusion-DPO (arXiv 2311.12908) on velocities, as Flow-DPO (arXiv 2501.13918) and Flow-GRPO's train_sd3_dpo.py
(github.com/yifan123/flow_grpo): a prompt's best picture by reward, w, is preferred to its worst, l. Both get the same
noise eps and noise level t, x_t = (1 - t) x0 + t eps. With e(v) = mean ||v - (eps - x0)||^2,

    base_loss = -2 / beta * log sigmoid(-beta / 2 * [(e(v_w) - e(v_ref,w)) - (e(v_l) - e(v_ref,l))])
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2      guard: normguard.py, the mean over w and l

As in the official recipe, train_sd3_dpo.py:
- The reference is the base model.
- t is logit-normal in the scheduler's own 1000 training levels. These have its fixed shift, or none where the shift
  depends on the size of the picture.
- With --guidance (official: 4.5, default: none) rollouts are guided; the velocities in the loss are conditional.

Unlike the official recipe:
- The current policy draws the pictures (officially the reference, which train.ref_update_step may update).
- --pairs takes several pairs a prompt: best and worst, second best and second worst, ... A pair of equal reward has
  zero loss.
- The factor 2 / beta makes lam and kl weigh as in the other methods. Adam does not see it, but max_grad_norm does: the
  official 1 is 0.02 here.
- Euler steps; T5 reads 256 tokens, diffusers' default, instead of 128.
- There is no EMA of the weights without --ema (officially it is updated at every eighth step).
- With --lam auto, every eighth row is at one of the rollout's noise levels: logit-normal draws hardly ever come near
  the last level, and the guard acts only at noise levels that are trained.

To resume, run the same command again. README.md has the flags that matter.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch is imported: its idle threads soon free their core

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flow import draws, run
from flow.cli import InputError, one_line_errors, parse, progress
from flow.distributed import local_device, local_slice, mean_over_rows, sum_gradients
from flow.evaluate import evaluate, reward_stats, score
from flow.lora import add_lora, prepare_transformer, read_lora, swapped
from flow.pipeline import integrate, schedule, training_levels, velocity
from normguard import norm_hinge, norm_ratio, oppose, reference


@dataclass
class Args:
    # ---- method
    lam: float | Literal["auto"] = 0.05  # weight of the hinge; 0: plain DPO; auto: scale it to the loss's gradient
    margin: float = 0.0  # the hinge acts above this excess of the velocity norm over the reference's (0.02: 2 %)
    guard_guidance: float | None = None  # the guard compares velocities of this guidance scale (None: no guidance)
    kl: float = 0.0  # weight of an additional velocity KL to the reference
    dpo_beta: float = 10.0  # beta: the larger, the less a pair counts once its order is learnt (official: 100)
    # pairs a prompt: best and worst picture, second best and second worst, ... (None: 4, or half of --group)
    pairs: int | None = None
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm
    ema: float | None = None  # evaluate and save a moving average of the LoRA, whose decay rises to this
    lr: float = 1e-3  # AdamW's learning rate, constant
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
    updates: int = 1  # optimizer steps an epoch; each trains on 1/updates of the pairs
    timesteps: int = 2  # noise levels per pair, logit-normal over the scheduler's training levels
    eval_every: int = 10  # epochs between evaluations; 0: never
    eval_reward: tuple[str, ...] = ()  # rewards that only score evaluations: they show whether --reward is gamed
    eval_n: int = 64  # held-out pictures of an evaluation
    eval_steps: int | None = None  # Euler steps of an evaluation (None: --steps)
    # ---- machine
    batch: int = 64  # pictures in a forward pass of an update, at least a pair; gradients are accumulated
    rollout_batch: int | None = None  # pictures in a forward pass of a rollout or evaluation (None: --batch)
    quantize: str = "none"  # the frozen transformer: none, int8 (pip install torchao), nf4 (pip install bitsandbytes)
    shard: bool = False  # divide the frozen transformer among the processes, for one larger than a GPU
    checkpointing: bool | None = None  # gradient checkpointing (None: on a GPU)
    compile: bool = False  # torch.compile the transformer's blocks
    # ---- output
    out: str | None = None  # the run's folder (None: runs/dpo-MODEL-REWARD-lamLAM-sSEED)
    save_every: int = 5  # epochs between checkpoints
    wandb: str | None = None  # also log to this wandb project (pip install wandb)


def dpo_logit(v_w: Tensor, v_l: Tensor, v_ref_w: Tensor, v_ref_l: Tensor, target_w: Tensor, target_l: Tensor,
              beta: float = 100.0) -> Tensor:
    """How much more the model prefers w to l than its reference does, in fp32. All (b, ...) -> (b,). Gradient to v_w
    and v_l."""
    def error(v, target):  # e(v), (b,)
        return (v.float() - target.float()).square().flatten(1).mean(1)

    w = error(v_w, target_w) - error(v_ref_w.detach(), target_w)
    l = error(v_l, target_l) - error(v_ref_l.detach(), target_l)
    return -beta / 2 * (w - l)


def dpo_loss(v_w: Tensor, v_l: Tensor, v_ref_w: Tensor, v_ref_l: Tensor, target_w: Tensor, target_l: Tensor,
             beta: float = 100.0) -> Tensor:
    """Diffusion-DPO's loss per pair on velocities, in fp32; all (b, ...) -> (b,). Gradient to v_w and v_l."""
    return -F.logsigmoid(dpo_logit(v_w, v_l, v_ref_w, v_ref_l, target_w, target_l, beta))


def best_and_worst(reward: Tensor, group: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Indices of each prompt's i-th best and i-th worst picture, i < pairs. reward (prompts * group,) -> two of
    (prompts * pairs,)."""
    order = rearrange(reward, "(p k) -> p k", k=group).argsort(dim=1, descending=True, stable=True)
    order += torch.arange(0, len(reward), group)[:, None]
    return order[:, :pairs].flatten(), order.flip(1)[:, :pairs].flatten()


@one_line_errors()
def main(args: Args, rival=None):
    """Train. rival(v, v_ref, pipe, batch) -> (b,): a guard to compare with in the hinge's place (tiny/reproduce.py)."""
    run.check_args(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    guided = args.guard_guidance  # None: the guard compares the conditional velocities, as the loss
    pairs_each = min(4, args.group // 2) if args.pairs is None else args.pairs
    n, pairs = args.groups * args.group, args.groups * pairs_each  # pictures and pairs an epoch
    local = local_slice(n)  # the pictures of an epoch that this process draws and trains on
    if not 1 <= pairs_each <= args.group // 2:
        raise InputError(f"--pairs {pairs_each}: from 1 to {args.group // 2}, half of --group {args.group}")
    if pairs % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {pairs} pairs (--groups x --pairs)")

    # ---- load; errors come before anything is written
    device = local_device()
    prompts, eval_prompts = draws.draw_prompts(args)  # rows: epochs * groups to train on, eval_n held-out ones
    out, saved = run.find_run("dpo", args, device)  # saved: a checkpoint or None; a finished run exits here
    reward, eval_rewards, pipe = run.load_models(args, device, prompts, eval_prompts)
    sigmas = schedule(pipe, args.steps)  # the rollout's noise levels, (steps + 1,), from 1 down to 0
    levels = training_levels(pipe)  # the noise levels that are trained at

    # ---- LoRA and optimizer
    initial = read_lora(pipe, "--init-lora", args.init_lora) if args.init_lora else None
    params = add_lora(pipe.transformer, args.rank, args.seed, initial=initial)
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in params] if args.ema else None
    variances = [torch.zeros(len(reward.names), 1).double()] if args.normalize_rewards else None  # of scores, summed

    # ---- start or resume
    first_epoch, step, skipped, skipped_in_a_row = run.resume(
        out, saved, pipe.transformer, params, optimizer, variances=variances, ema=ema)
    run.open_run(out, "dpo", args, pipe, saved, eval_prompts)
    run.encode_local_prompts(out, args, pipe, prompts, eval_prompts)
    prepare_transformer(pipe, args)  # gradient checkpointing, torch.compile
    if first_epoch == 0 and args.eval_every:
        evaluate(out, args, pipe, reward, eval_rewards, eval_prompts, step=0, epoch=0)

    bar = progress(range(first_epoch, args.epochs), desc="train", initial=first_epoch, total=args.epochs)
    for epoch in bar:
        start, g = time.time(), draws.rng(args.seed, draws.EPOCH, epoch)
        drawn = [p for p in prompts[epoch * args.groups:(epoch + 1) * args.groups] for _ in range(args.group)]  # (n,)
        texts = [row["prompt"] for row in drawn]  # (n,)

        # ---- rollout: `group` pictures of each prompt from the policy as it stands
        noise = draws.row_noise(pipe, args.seed, draws.ROLLOUT, epoch, range(n)[local])
        x0, _ = integrate(pipe, noise, texts[local], sigmas, guidance=args.guidance,
                          batch=args.rollout_batch or args.batch, desc="rollout")

        # ---- reward and pairs
        scores = score(pipe, reward, x0, drawn[local])  # (parts of the reward, n), of all processes
        deviations = reward.deviations(scores, variances, epoch) if args.normalize_rewards else 1
        rewards = reward.weighted(scores / deviations)  # (n,)
        stats = reward_stats(reward, scores, rewards, args.group)
        w, l = best_and_worst(rewards, args.group, pairs_each)  # (pairs,) each: indices of winners and losers
        differ = (rewards[w] - rewards[l] > draws.rounding(rewards)).float()  # (pairs,)

        # ---- training rows (pair, t): each pair, in random order, at `timesteps` noise levels
        pair = torch.randperm(pairs, generator=g).repeat_interleave(args.timesteps)  # (rows,)
        t = levels[(len(levels) * torch.sigmoid(torch.randn(len(pair), generator=g))).long()]  # (rows,)
        if args.lam == "auto":  # the guard acts only at noise levels that are trained: add the rollout's own
            t[::8] = sigmas[torch.randint(args.steps, t[::8].shape, generator=g)]
        updates = torch.arange(len(t)).split(len(t) // args.updates)  # the rows of each update

        for u, update in enumerate(updates):
            # ---- loss and gradient
            logged = []  # one dict of row values per micro-batch
            for rows in draws.local_batches(update, w[pair], n, max(1, args.batch // 2)):
                both = torch.cat([w[pair[rows]], l[pair[rows]]])  # winners, then losers, of the same noise and t
                t_both, differ_b = t[rows].repeat(2), differ[pair[rows]].to(device)
                batch = draws.training_batch(pipe, args.seed, epoch, rows, both, t_both, x0, texts)
                given = pipe, batch["xt"], t_both, batch["prompts"]
                v = velocity(*given)
                vg = v if guided is None else velocity(*given, guided)  # the guard compares vg with vg_ref
                with reference(pipe.transformer):
                    v_ref = velocity(*given)
                    vg_ref = v_ref if guided is None else velocity(*given, guided)
                halves = *v.chunk(2), *v_ref.chunk(2), *(batch["noise"] - batch["x0"]).chunk(2)
                base_loss = 2 / args.dpo_beta * differ_b * dpo_loss(*halves, args.dpo_beta)
                kl = rearrange((v - v_ref).square().flatten(1).mean(1), "(two b) -> two b", two=2).mean(0)
                guard = norm_hinge(vg, vg_ref, args.margin)
                if rival is not None:
                    guard = rival(vg, vg_ref, pipe, {**batch, "scores": scores, "step": step, "epoch": epoch})
                guard = rearrange(guard, "(two b) -> two b", two=2).mean(0)
                ratio = rearrange(norm_ratio(vg.detach(), vg_ref), "(two b) -> two b", two=2)
                loss = base_loss + lam * guard + args.kl * kl
                if args.lam == "auto":
                    oppose(v, v_ref, args.margin)
                (loss.sum() / len(update)).backward()
                logit = dpo_logit(*halves, args.dpo_beta).detach()
                weight = differ_b * len(update) / differ[pair[update]].sum()  # for means over pairs that differ
                row_log = {"loss": loss, "base_loss": base_loss, "guard": guard, "kl": kl, "norm_ratio": ratio.mean(0),
                           "active": (ratio > 1 + args.margin).float().mean(0), "t": batch["t"][:len(rows)],
                           "accuracy": weight * (logit > 0), "margin": weight * logit}
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

        # ---- evaluation and checkpoint
        done = epoch + 1
        if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
            with swapped(params, ema):  # if ema is None, nothing is swapped
                evaluate(out, args, pipe, reward, eval_rewards, eval_prompts, step, done)
        if done % args.save_every == 0 or done == args.epochs:
            run.save_checkpoint(out, "dpo", args, pipe, eval_prompts, params, optimizer, epoch=done, step=step,
                                skipped=skipped, skipped_in_a_row=skipped_in_a_row, variances=variances, ema=ema)
    run.finish_run(out, skipped)


if __name__ == "__main__":
    main(parse(Args, __doc__))
