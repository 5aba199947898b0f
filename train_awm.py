r"""AWM (Advantage Weighted Matching) + NormGuard for flow-matching models, on one GPU or several.

    python train_awm.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_awm.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 14 --timesteps 6 --group 24 --groups 24 --batch 16 --rollout-batch 16 \
        --lr 3e-4 --eval-n 32 --eval-steps 40 --eval-reward hpsv2.1 --epochs 100  # hours: docs/machines.md
    torchrun --nproc-per-node 8 train_awm.py ...                # the same on eight GPUs

AWM (arXiv 2509.25050, github.com/scxue/advantage_weighted_matching) is policy gradient with the flow-matching loss as
the log-likelihood. For a picture x0 of the policy, x_t = (1 - t) x0 + t eps:

    log p(x0; t, eps) = -t / a * (mean ||v_theta(x_t, t) - (eps - x0)||^2 + 1e-10)^a         a = 1/4, generalized Huber
    base_loss = max(-A r, -A clip(r, 1 - c, 1 + c)),   r = exp(log p - log p_old)                  c = 1, A in [-1, 1]
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                         guard: normguard.py

As in the official PickScore recipe:
- Pictures are drawn without guidance.
- The advantage A is the reward minus its group's mean, over the global std, clipped at +- 5 and divided by 5.
- t is stratified over the rollout's noise levels, except the last and least noisy tenth.
- There is one update an epoch, on policy. With more --updates, p_old is the policy before the first of them.

Unlike the official recipe:
- Euler steps instead of a second-order sampler; t is drawn per picture instead of per micro-batch; T5 reads 256 tokens,
  diffusers' default, instead of 128.
- A is divided by the std alone (officially by std + 1e-4), so that the reward's scale does not matter.
- There is no EMA of the weights without --ema, and no second KL to such an EMA.

To resume, run the same command again. README.md has the flags that matter.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch is imported: its idle threads soon free their core

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flow import draws, run
from flow.cli import InputError, one_line_errors, parse, progress
from flow.distributed import local_device, local_slice, mean_over_rows, sum_gradients
from flow.evaluate import evaluate, reward_stats, score
from flow.lora import add_lora, prepare_transformer, read_lora, swapped
from flow.pipeline import integrate, schedule, velocity
from normguard import norm_hinge, norm_ratio, oppose, reference

CLIP = 1.0  # c: the likelihood ratio is clipped to 1 +- c


@dataclass
class Args:
    # ---- method
    lam: float | Literal["auto"] = 0.05  # weight of the hinge; 0: plain AWM; auto: scale it to the loss's gradient
    margin: float = 0.0  # the hinge acts above this excess of the velocity norm over the reference's (0.02: 2 %)
    guard_guidance: float | None = None  # the guard compares velocities of this guidance scale (None: no guidance)
    kl: float = 1e-4  # weight of the velocity KL to the reference; 0 with --lam 0 saves the reference's forward pass
    power: float = 0.25  # a, the power of the generalized Huber loss
    adv_clip: float = 5.0  # advantages are clipped to +- this many standard deviations, then scaled to +- 1
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
    timesteps: int = 2  # noise levels per picture: one is drawn from each of this many parts of the schedule
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
    out: str | None = None  # the run's folder (None: runs/awm-MODEL-REWARD-lamLAM-sSEED)
    save_every: int = 5  # epochs between checkpoints
    wandb: str | None = None  # also log to this wandb project (pip install wandb)


def likelihood_ratio(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor, power: float = 0.25) -> Tensor:
    """r = p(x0; t, eps | v) / p(x0; t, eps | v_old), in fp32. v (with gradient), v_old, x0, noise (b, ...); t in [0, 1]
    (b,) -> (b,)."""
    def log_prob(v):  # log p(x0; t, eps | v), (b,)
        error = (v.float() - (noise.float() - x0.float())).square().flatten(1).mean(1)
        return -t.float() / power * (error + 1e-10) ** power

    return (log_prob(v) - log_prob(v_old.detach())).exp()


def awm_loss(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor, adv: Tensor, power: float = 0.25,
             clip: float = CLIP) -> Tensor:
    """AWM's clipped policy loss per sample, in fp32. v (with gradient), v_old, x0, noise (b, ...); t in [0, 1] and adv
    (b,) -> (b,).

    On policy, v_old is v.detach(): the ratio is 1, and the gradient is that of -adv log p."""
    ratio = likelihood_ratio(v, v_old, x0, noise, t, power)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))


@one_line_errors()
def main(args: Args, rival=None):
    """Train. rival(v, v_ref, pipe, batch) -> (b,): a guard to compare with in the hinge's place (tiny/reproduce.py)."""
    run.check_args(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    guided = args.guard_guidance  # None: the guard compares the conditional velocities, as the loss
    n, trained_steps = args.groups * args.group, int(0.9 * args.steps)  # pictures an epoch; steps to train at
    local = local_slice(n)  # the pictures of an epoch that this process draws and trains on
    if n % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > trained_steps:
        raise InputError(f"--timesteps {args.timesteps}: at most {trained_steps} with --steps {args.steps}, whose "
                         "last tenth is not trained")

    # ---- load; errors come before anything is written
    device = local_device()
    prompts, eval_prompts = draws.draw_prompts(args)  # rows: epochs * groups to train on, eval_n held-out ones
    out, saved = run.find_run("awm", args, device)  # saved: a checkpoint or None; a finished run exits here
    reward, eval_rewards, pipe = run.load_models(args, device, prompts, eval_prompts)
    sigmas = schedule(pipe, args.steps)  # the rollout's noise levels, (steps + 1,), from 1 down to 0

    # ---- LoRA and optimizer
    initial = read_lora(pipe, "--init-lora", args.init_lora) if args.init_lora else None
    params = add_lora(pipe.transformer, args.rank, args.seed, initial=initial)
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in params] if args.ema else None
    variances = [torch.zeros(len(reward.names), 1).double()] if args.normalize_rewards else None  # of scores, summed

    # ---- start or resume
    first_epoch, step, skipped, skipped_in_a_row = run.resume(
        out, saved, pipe.transformer, params, optimizer, variances=variances, ema=ema)
    run.open_run(out, "awm", args, pipe, saved, eval_prompts)
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

        # ---- reward and advantage
        scores = score(pipe, reward, x0, drawn[local])  # (parts of the reward, n), of all processes
        deviations = reward.deviations(scores, variances, epoch) if args.normalize_rewards else 1
        rewards = reward.weighted(scores / deviations)  # (n,)
        stats = reward_stats(reward, scores, rewards, args.group)
        adv = draws.group_advantages(rewards, args.group, args.adv_clip)  # (n,) in [-1, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` noise levels
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)  # (rows,)
        t = sigmas[draws.stratified_steps(n, args.timesteps, trained_steps, g).flatten()]  # (rows,); t is sigma
        updates = torch.arange(len(t)).split(len(t) // args.updates)  # the rows of each update

        # ---- for the updates after the first: v_old of each micro-batch, by its first row
        v_olds = {}
        for update in updates[1:]:
            for rows in draws.local_batches(update, picture, n, args.batch):
                batch = draws.training_batch(pipe, args.seed, epoch, rows, picture[rows], t[rows], x0, texts)
                with torch.no_grad():
                    v_olds[rows[0].item()] = velocity(pipe, batch["xt"], t[rows], batch["prompts"]).cpu()

        for u, update in enumerate(updates):
            # ---- loss and gradient
            logged = []  # one dict of row values per micro-batch
            for rows in draws.local_batches(update, picture, n, args.batch):
                batch = draws.training_batch(pipe, args.seed, epoch, rows, picture[rows], t[rows], x0, texts, adv=adv)
                given = pipe, batch["xt"], t[rows], batch["prompts"]
                v = velocity(*given)
                v_old = v.detach() if u == 0 else v_olds[rows[0].item()].to(device)  # the first update is on policy
                inputs = v_old, batch["x0"], batch["noise"], batch["t"]
                base_loss = awm_loss(v, *inputs, batch["adv"], args.power)
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
                policy_ratio = likelihood_ratio(v.detach(), *inputs, args.power).double()
                row_log |= {"loss": loss, "base_loss": base_loss, "guard": guard, "kl": kl,
                            "clip_share": (policy_ratio - 1).abs() > CLIP,
                            "policy_ratio": policy_ratio, "policy_ratio_square": policy_ratio.square()}
                logged.append({name: value.detach() for name, value in row_log.items()})
            means = mean_over_rows(logged, len(update))  # over all processes; adds norm_ratio_by_t
            square, mean = means.pop("policy_ratio_square"), means.pop("policy_ratio")
            means["ratio_std"] = max(0, square - mean ** 2) ** 0.5

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
            run.save_checkpoint(out, "awm", args, pipe, eval_prompts, params, optimizer, epoch=done, step=step,
                                skipped=skipped, skipped_in_a_row=skipped_in_a_row, variances=variances, ema=ema)
    run.finish_run(out, skipped)


if __name__ == "__main__":
    main(parse(Args, __doc__))
