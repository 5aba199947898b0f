r"""DiffusionNFT (negative-aware fine-tuning) + NormGuard for flow-matching models, on one GPU or several.

    python train_nft.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_nft.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 10 --timesteps 9 --group 24 --groups 48 --batch 4 --lr 3e-4 --kl 2e-5 \
        --max-grad-norm 0.2 --rollout-batch 16 --ema 0.9 --eval-steps 40 --epochs 100   # 23 hours, estimated
    torchrun --nproc-per-node 8 train_nft.py ...                # the same on eight GPUs

DiffusionNFT (arXiv 2509.16117, github.com/NVlabs/DiffusionNFT) is supervised learning on the policy's own pictures,
good and bad. A picture x0 of the old policy is good with probability r; with x_t = (1 - t) x0 + t eps and
x0(v) = x_t - t v,

    v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
    L(v) = mean ||x0(v) - x0||^2 / stopgrad(mean |x0(v) - x0|)                             r = 1/2 + A / 2, A in [-1, 1]
    base_loss = (r L(v+) + (1 - r) L(v-)) / beta
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                       guard: normguard.py

As in the official PickScore recipe: the old policy is an EMA of the trained LoRA, and it is the old policy that draws
the pictures, without guidance; group mean and global std for A, clipped at 5 and scaled to 1; one update an
epoch, at random moments t of the rollout's schedule (nine of ten in the command above); --ema 0.9 for what is evaluated
and kept in lora/. Not as there: Euler instead of a second-order sampler; diffusers' T5 length of 256 instead of 128;
A is divided by the deviation alone (there by the deviation + 1e-4), so that the reward's scale does not matter; no
factor 5 on base_loss, so that one lam fits all three methods (kl and max_grad_norm are therefore a fifth of the
official ones in the command above).

To resume, run the same command again.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch: threads that wait soon leave a core to other processes

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flow.cli import InputError, one_line_errors, parse
from flow.distributed import local_slice
from flow.draws import ROLLOUT, TRAINING, group_advantages, local_batches, noise_of, random_steps
from flow.evaluate import score
from flow.lora import add_lora, use_adapter
from flow.pipeline import add_noise, integrate, velocity
from flow.run import check_numbers, epochs, finish_epoch, finish_step, start_run, tally, tally_by_t
from normguard import norm_hinge, norm_ratio, oppose, reference

ADV_CLIP = 5.0  # advantages are clipped to +- this many standard deviations, then scaled to +- 1


@dataclass
class Args:
    lam: float | Literal["auto"] = 0.05
    """weight of NormGuard's hinge; 0 is plain DiffusionNFT; auto: oppose the loss by a share of itself"""
    margin: float = 0.0
    """relative excess of the velocity norm that the hinge lets pass"""
    model: str = "tiny/sd3"
    """any flow-matching text-to-image or text-to-video pipeline: a diffusers folder or hub id"""
    reward: str = "tiny/pickscore"
    """pickscore, hpsv2.1, clipscore, a CLIPModel folder or hub id, file.py:function, or a sum of such: A:0.5,B:0.5"""
    prompts: str = "tiny/prompts.txt"
    """text file, one training prompt a line"""
    eval_prompts: str = "tiny/eval_prompts.txt"
    """text file of held-out prompts"""
    out: str | None = None
    """the run's folder (None: runs/nft-MODEL-REWARD-lamLAM-sSEED)"""
    seed: int = 0
    """seed of the LoRA, the prompts and all noise"""
    epochs: int = 40
    """rounds of rollouts and their updates"""
    lr: float = 5e-4
    """AdamW's learning rate, constant"""
    rank: int = 32
    """LoRA rank; alpha is twice that"""
    group: int = 16
    """pictures a prompt"""
    groups: int = 6
    """prompts an epoch"""
    steps: int = 8
    """Euler steps of a rollout"""
    guidance: float | None = None
    """guidance scale of rollouts and evaluations (None: none), or what a guidance embedding is told (its own
    default)"""
    timesteps: int = 2
    """moments t a picture is trained at, drawn from the schedule's steps"""
    updates: int = 1
    """optimizer steps an epoch, each on its share of the pictures"""
    batch: int = 64
    """pictures at once in a forward pass; what is left of a step is accumulated"""
    rollout_batch: int | None = None
    """pictures at once in rollouts and evaluations, which need less memory (None: --batch)"""
    nft_beta: float = 1.0
    """beta: how far v+ and v- lie from the old policy"""
    old_decay: tuple[int, float, float] = (0, 0.001, 0.5)
    """the old policy's EMA decay: 0 for so many optimizer steps, then growing by this at each, up to this"""
    kl: float = 1e-4
    """weight of the velocity KL to the reference; 0 with --lam 0 saves the reference's forward pass"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    ema: float | None = None
    """evaluate, and keep in lora/, an average of the LoRA over the steps, whose decay is min((1 + s) / (10 + s), this)
    at step s (None: the LoRA itself)"""
    size: int | None = None
    """pixels a side (None: the model's own)"""
    frames: int | None = None
    """frames of a video, for a model that makes videos (None: the model's own)"""
    eval_n: int = 64
    """held-out pictures an evaluation"""
    eval_steps: int | None = None
    """Euler steps of an evaluation (None: --steps)"""
    eval_every: int = 10
    """epochs between evaluations; 0 is never"""
    save_every: int = 5
    """epochs between checkpoints"""
    quantize: str = "none"
    """the frozen transformer's weights: none, int8 (pip install torchao) or nf4 (pip install bitsandbytes)"""
    shard: bool = False
    """divide the frozen transformer among the processes (torchrun), for one that is larger than a GPU"""
    checkpointing: bool | None = None
    """gradient checkpointing (None: on a GPU)"""
    compile: bool = False
    """torch.compile the transformer's blocks"""
    wandb: str | None = None
    """also log to this wandb project (pip install wandb)"""


def nft_loss(v: Tensor, v_old: Tensor, x0: Tensor, xt: Tensor, t: Tensor, r: Tensor, beta: float = 1.0) -> Tensor:
    """DiffusionNFT's loss per sample, in fp32. v (with gradient), v_old, x0, xt (b, ...); t and r in [0, 1] (b,) ->
    (b,)."""
    v, v_old, x0, xt, t, r = (a.float() for a in (v, v_old.detach(), x0, xt, t, r))

    def matching(v):
        """L(v): (b, ...) -> (b,)."""
        error = (xt - t.view(-1, *[1] * (xt.ndim - 1)) * v - x0).flatten(1)  # in x0-space
        return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)

    good = matching((1 - beta) * v_old + beta * v)
    bad = matching((1 + beta) * v_old - beta * v)
    return (r * good + (1 - r) * bad) / beta


def old_decay(step: int, start: int, rate: float, most: float) -> float:
    """Decay of the old policy's EMA after `step` optimizer steps: 0 (it is the current policy) up to `start`, then
    rising to `most`."""
    return min(rate * max(step - start, 0), most)


@contextmanager
def old_policy(model: torch.nn.Module):
    """Inside, the model is the old policy."""
    use_adapter(model, "old")
    try:
        yield
    finally:
        use_adapter(model, "default")


@one_line_errors()
def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check_numbers(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    n = args.groups * args.group  # pictures an epoch
    if n % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > args.steps:
        raise InputError(f"--timesteps {args.timesteps}: more than --steps {args.steps}")
    if min(args.old_decay) < 0 or not args.old_decay[2] < 1:
        raise InputError(f"--old-decay {' '.join(map(str, args.old_decay))}: none below 0, and the last below 1")
    run = start_run("nft", args)
    pipe, sigmas, own = run.pipe, run.sigmas, local_slice(n)  # own: this process's pictures of an epoch
    old_params = add_lora(pipe.transformer, args.rank, args.seed, "old")  # of one seed: equal to the trained ones
    use_adapter(pipe.transformer, "default")
    for p, saved in zip(old_params, run.state["old"] if run.state else ()):
        p.data.copy_(saved)
    decay = old_decay(run.step, *args.old_decay)  # of the EMA's last update

    for prompts, g in epochs(run):
        # ---- rollout: `group` pictures of each prompt from the old policy
        with old_policy(pipe.transformer):
            x0, _ = integrate(pipe, noise_of(run, ROLLOUT, range(n)[own]), prompts[own], sigmas, guidance=args.guidance,
                              batch=args.rollout_batch or args.batch, desc="rollout")

        # ---- reward and the probability of being good
        reward = score(run, x0, prompts[own])  # (n,)
        r = 0.5 + 0.5 * group_advantages(reward, args.group, ADV_CLIP)  # (n,) in [0, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` moments
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)
        t = sigmas[random_steps(n, args.timesteps, args.steps, g).flatten()]  # (rows,)
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- updates
        for u, update in enumerate(updates):
            sums = {}
            for b in local_batches(update, picture, own, args.batch):
                prompts_b = [prompts[i] for i in picture[b]]
                rows = x0[picture[b] - own.start], r[picture[b]], noise_of(run, TRAINING, b), t[b]
                x0_b, r_b, noise_b, t_b = (a.to(pipe.device) for a in rows)
                xt_b = add_noise(x0_b, noise_b, t_b)
                v = velocity(pipe, xt_b, t[b], prompts_b)
                if u == 0 and decay == 0:
                    v_old = v.detach()  # the old policy is still the current one
                else:
                    with torch.no_grad(), old_policy(pipe.transformer):
                        v_old = velocity(pipe, xt_b, t[b], prompts_b)
                base_loss = nft_loss(v, v_old, x0_b, xt_b, t_b, r_b, args.nft_beta)
                guard = kl = torch.zeros_like(base_loss)
                if args.lam != 0 or args.kl > 0:
                    with reference(pipe.transformer):
                        v_ref = velocity(pipe, xt_b, t[b], prompts_b)
                    guard = norm_hinge(v, v_ref, args.margin)
                    kl = (v - v_ref).square().flatten(1).mean(1)
                    ratio = norm_ratio(v.detach(), v_ref)
                    tally(sums, norm_ratio=ratio, active=ratio > 1 + args.margin)
                    tally_by_t(sums, ratio, t_b)
                loss = base_loss + lam * guard + args.kl * kl
                if args.lam == "auto":
                    oppose(v, v_ref, args.margin)
                (loss.sum() / len(update)).backward()
                tally(sums, loss=loss, base_loss=base_loss, guard=guard, kl=kl)
                tally(sums, old_distance=(v.detach() - v_old).square().flatten(1).mean(1))
            finish_step(run, sums, len(update), reward, done=(u + 1) / args.updates)

        # ---- the old policy follows
        decay = old_decay(run.step, *args.old_decay)
        with torch.no_grad():
            for p, q in zip(run.params, old_params):
                q.copy_(decay * q + (1 - decay) * p)
        finish_epoch(run, old=[p.detach() for p in old_params])


if __name__ == "__main__":
    main(parse(Args, __doc__))
