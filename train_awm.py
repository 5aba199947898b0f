r"""AWM (Advantage Weighted Matching) + NormGuard for flow-matching models, on one GPU or several.

    python train_awm.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_awm.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 14 --timesteps 6 --group 24 --groups 24 --batch 4 --rollout-batch 16 \
        --lr 3e-4 --eval-steps 40 --epochs 100                  # 8 hours of a GPU at 200 TFLOP/s, estimated
    torchrun --nproc-per-node 8 train_awm.py ...                # the same on eight GPUs

AWM (arXiv 2509.25050, github.com/scxue/advantage_weighted_matching) is policy gradient with the flow-matching loss as
the log-likelihood. For a picture x0 of the policy, x_t = (1 - t) x0 + t eps:

    log p(x0; t, eps) = -t / a * (mean ||v_theta(x_t, t) - (eps - x0)||^2 + 1e-10)^a         a = 1/4, generalized Huber
    base_loss = max(-A r, -A clip(r, 1 - c, 1 + c)),   r = exp(log p - log p_old)                  c = 1, A in [-1, 1]
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                         guard: normguard.py

As in the official PickScore recipe: pictures without guidance; A is the reward minus its group's mean, over the global
std, clipped at +- 5 and divided by 5; t is stratified over the rollout's own timesteps but the last tenth (the least
noise); one update an epoch, on policy
(with more --updates, the later ones keep the velocities from before the first). Not as there: Euler instead of a
second-order sampler; t drawn per picture instead of per micro-batch; diffusers' T5 length of 256 instead of 128; A is
divided by the deviation alone (there by the deviation + 1e-4), so that the reward's scale does not matter; no EMA of
the weights but with --ema, and no second KL to such an EMA.

To resume, run the same command again.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch: threads that wait soon leave a core to other processes

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flow.cli import InputError, one_line_errors, parse
from flow.distributed import local_slice
from flow.draws import ROLLOUT, TRAINING, group_advantages, local_batches, noise_of, stratified
from flow.evaluate import score
from flow.pipeline import add_noise, integrate, velocity
from flow.run import check_numbers, epochs, finish_epoch, finish_step, start_run, tally, tally_by_t
from normguard import norm_hinge, norm_ratio, oppose, reference

CLIP = 1.0  # c: the likelihood ratio is clipped to 1 +- c


@dataclass
class Args:
    lam: float | Literal["auto"] = 0.05
    """weight of NormGuard's hinge; 0 is plain AWM; auto: oppose the loss by a share of itself"""
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
    """the run's folder (None: runs/awm-MODEL-REWARD-lamLAM-sSEED)"""
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
    """moments t a picture is trained at, one from each of so many strata of the schedule"""
    updates: int = 1
    """optimizer steps an epoch, each on its share of the pictures"""
    batch: int = 64
    """pictures at once in a forward pass; what is left of a step is accumulated"""
    rollout_batch: int | None = None
    """pictures at once in rollouts and evaluations, which need less memory (None: --batch)"""
    power: float = 0.25
    """a of the generalized Huber"""
    adv_clip: float = 5.0
    """advantages are clipped to +- this many standard deviations, then scaled to +- 1"""
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


def likelihood_ratio(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor, power: float = 0.25) -> Tensor:
    """r = p(x0; t, eps) under v over that under v_old, in fp32. v (with gradient), v_old, x0, noise (b, ...); t in
    [0, 1] (b,) -> (b,)."""
    def log_prob(v):
        """log p(x0; t, eps) under the velocity v (b, ...), (b,)."""
        error = (v.float() - (noise.float() - x0.float())).square().flatten(1).mean(1)
        return -t.float() / power * (error + 1e-10) ** power

    return (log_prob(v) - log_prob(v_old.detach())).exp()


def awm_loss(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor, adv: Tensor, power: float = 0.25,
             clip: float = CLIP) -> Tensor:
    """AWM's clipped policy loss per sample, in fp32. v (with gradient), v_old, x0, noise (b, ...); t in [0, 1] and adv
    (b,) -> (b,).

    On policy where v_old is v.detach(): the ratio is 1 and the gradient is that of -adv log p.
    """
    ratio = likelihood_ratio(v, v_old, x0, noise, t, power)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))


@one_line_errors()
def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check_numbers(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    n, usable = args.groups * args.group, int(0.9 * args.steps)  # pictures an epoch; steps of the schedule that train
    if n % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > usable:
        raise InputError(f"--timesteps {args.timesteps}: more than the {usable} steps that --steps {args.steps} offers")
    run = start_run("awm", args)
    pipe, sigmas, own = run.pipe, run.sigmas, local_slice(n)  # own: this process's pictures of an epoch

    for prompts, g in epochs(run):
        # ---- rollout: `group` pictures of each prompt from the policy as it stands
        x0, _ = integrate(pipe, noise_of(run, ROLLOUT, range(n)[own]), prompts[own], sigmas, guidance=args.guidance,
                          batch=args.rollout_batch or args.batch, desc="rollout")

        # ---- reward and advantage
        reward = score(run, x0, prompts[own])  # (n,)
        adv = group_advantages(reward, args.group, args.adv_clip)  # (n,) in [-1, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` moments
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)
        t = sigmas[stratified(n, args.timesteps, usable, g).flatten()]  # (rows,)
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- the policy's velocities before this epoch's first update, for the updates after it
        v_old = torch.zeros(len(t) if args.updates > 1 else 0, *x0.shape[1:])
        for b in [b for update in updates[1:] for b in local_batches(update, picture, own, args.batch)]:
            xt_b = add_noise(x0[picture[b] - own.start], noise_of(run, TRAINING, b), t[b]).to(pipe.device)
            with torch.no_grad():
                v_old[b] = velocity(pipe, xt_b, t[b], [prompts[i] for i in picture[b]]).cpu()

        # ---- updates
        for u, update in enumerate(updates):
            sums = {}
            for b in local_batches(update, picture, own, args.batch):
                prompts_b = [prompts[i] for i in picture[b]]
                rows = x0[picture[b] - own.start], adv[picture[b]], noise_of(run, TRAINING, b), t[b]
                x0_b, adv_b, noise_b, t_b = (a.to(pipe.device) for a in rows)
                xt_b = add_noise(x0_b, noise_b, t_b)
                v = velocity(pipe, xt_b, t[b], prompts_b)
                old = v.detach() if u == 0 else v_old[b].to(pipe.device)  # on policy in the first update
                base_loss = awm_loss(v, old, x0_b, noise_b, t_b, adv_b, args.power)
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
                policy_ratio = likelihood_ratio(v.detach(), old, x0_b, noise_b, t_b, args.power).double()
                tally(sums, clip_share=(policy_ratio - 1).abs() > CLIP)
                tally(sums, policy_ratio=policy_ratio, policy_ratio_square=policy_ratio.square())
            finish_step(run, sums, len(update), reward, done=(u + 1) / args.updates)
        finish_epoch(run)


if __name__ == "__main__":
    main(parse(Args, __doc__))
