r"""Flow-DPO, online, + NormGuard for flow-matching models, on one GPU or several.

    python train_dpo.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_dpo.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE \
        --eval-prompts FILE --size 512 --steps 40 --timesteps 39 --group 24 --groups 8 --pairs 1 --batch 4 --lr 3e-4 \
        --guidance 4.5 --dpo-beta 100 --max-grad-norm 0.02 --rollout-batch 16 --eval-steps 40 --epochs 100  # 6 h
    torchrun --nproc-per-node 8 train_dpo.py ...                # the same on eight GPUs

Diffusion-DPO (arXiv 2311.12908) on velocities, as Flow-DPO (arXiv 2501.13918) and Flow-GRPO's train_sd3_dpo.py
(github.com/yifan123/flow_grpo): of a prompt's pictures the best by reward, w, is preferred to the worst, l. Both get
the same noise eps and moment t, x_t = (1 - t) x0 + t eps, and with e(v) = mean ||v - (eps - x0)||^2

    base_loss = -2 / beta * log sigmoid(-beta / 2 * [(e(v_w) - e(v_ref,w)) - (e(v_l) - e(v_ref,l))])
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2      guard: normguard.py, the mean over w and l

As there: the reference is the base model. t is logit-normal in the scheduler's own 1000 training levels, which have its
fixed shift, or none where the shift depends on the size of the picture. With --guidance (4.5 there, by default none
here) rollouts are guided, while the velocities in the loss are the conditional ones. Not as there: the pictures come
from the policy as it stands (there from the reference, which train.ref_update_step may update); several pairs a prompt,
by --pairs (i-th best against i-th worst); a pair of equal reward counts as zero loss; the factor 2 / beta, by which lam
and kl weigh as in the other methods (Adam does not see it, but max_grad_norm does: the official 1 is 0.02 here); Euler
steps; diffusers' T5 length of 256 instead of 128; no EMA of the weights but with --ema (there it is updated at every
eighth step). With --lam auto, every eighth row is at one of the rollout's own noise levels: the logit-normal all but
leaves out the last, and the guard acts only at noise levels that are trained.

To resume, run the same command again.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch: threads that wait soon leave a core to other processes

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flow.cli import InputError, one_line_errors, parse
from flow.distributed import local_slice
from flow.draws import ROLLOUT, TRAINING, local_batches, noise_of, rounding
from flow.evaluate import score
from flow.pipeline import add_noise, integrate, training_levels, velocity
from flow.run import check_numbers, epochs, finish_epoch, finish_step, start_run, tally, tally_by_t
from normguard import norm_hinge, norm_ratio, oppose, reference


@dataclass
class Args:
    lam: float | Literal["auto"] = 0.05
    """weight of NormGuard's hinge; 0 is plain DPO; auto: oppose the loss by a share of itself"""
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
    """the run's folder (None: runs/dpo-MODEL-REWARD-lamLAM-sSEED)"""
    seed: int = 0
    """seed of the LoRA, the prompts and all noise"""
    epochs: int = 40
    """rounds of rollouts and their updates"""
    lr: float = 1e-3
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
    pairs: int | None = None
    """pairs a prompt: the best against the worst picture, the second best against the second worst, ... (None: 4, or
    half of --group)"""
    timesteps: int = 2
    """moments t a pair is trained at, logit-normal in the schedule's noise levels"""
    updates: int = 1
    """optimizer steps an epoch, each on its share of the pairs"""
    batch: int = 64
    """pictures at once in a forward pass (at least a pair); what is left of a step is accumulated"""
    rollout_batch: int | None = None
    """pictures at once in rollouts and evaluations, which need less memory (None: --batch)"""
    dpo_beta: float = 10.0
    """beta: the larger, the sooner a pair that is told apart stops to pull (official: 100)"""
    kl: float = 0.0
    """weight of an additional velocity KL to the reference"""
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


def dpo_margin(v_w: Tensor, v_l: Tensor, v_ref_w: Tensor, v_ref_l: Tensor, target_w: Tensor, target_l: Tensor,
               beta: float = 100.0) -> Tensor:
    """By how much more the model prefers w to l than its reference does (the logit of Diffusion-DPO), in fp32; all
    (b, ...) -> (b,). Gradient to v_w and v_l."""
    def error(v, target):
        """e(v): mean squared error, (b, ...) -> (b,)."""
        return (v.float() - target.float()).square().flatten(1).mean(1)

    w = error(v_w, target_w) - error(v_ref_w.detach(), target_w)
    l = error(v_l, target_l) - error(v_ref_l.detach(), target_l)
    return -beta / 2 * (w - l)


def dpo_loss(v_w: Tensor, v_l: Tensor, v_ref_w: Tensor, v_ref_l: Tensor, target_w: Tensor, target_l: Tensor,
             beta: float = 100.0) -> Tensor:
    """Diffusion-DPO's loss per pair on velocities, in fp32; all (b, ...) -> (b,). Gradient to v_w and v_l."""
    return -F.logsigmoid(dpo_margin(v_w, v_l, v_ref_w, v_ref_l, target_w, target_l, beta))


def best_and_worst(reward: Tensor, group: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Indices of each prompt's i-th best and i-th worst picture, i < pairs. reward (prompts * group,) -> two of
    (prompts * pairs,)."""
    order = rearrange(reward, "(p k) -> p k", k=group).argsort(dim=1, descending=True, stable=True)
    order += torch.arange(0, len(reward), group)[:, None]
    return order[:, :pairs].flatten(), order.flip(1)[:, :pairs].flatten()


@one_line_errors()
def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check_numbers(args)
    lam = 0.0 if args.lam == "auto" else args.lam  # the hinge's weight
    each = min(4, args.group // 2) if args.pairs is None else args.pairs
    n, pairs = args.groups * args.group, args.groups * each  # pictures and pairs an epoch
    if not 1 <= each <= args.group // 2:
        raise InputError(f"--pairs {each}: from 1 to {args.group // 2}, half of --group {args.group}")
    if pairs % args.updates:
        raise InputError(f"--updates {args.updates}: must divide the epoch's {pairs} pairs (--groups x --pairs)")
    run = start_run("dpo", args)
    pipe, sigmas, own = run.pipe, run.sigmas, local_slice(n)  # own: this process's pictures of an epoch
    levels = training_levels(pipe)  # all noise levels that are trained at

    for prompts, g in epochs(run):
        # ---- rollout: `group` pictures of each prompt from the policy as it stands
        x0, _ = integrate(pipe, noise_of(run, ROLLOUT, range(n)[own]), prompts[own], sigmas, guidance=args.guidance,
                          batch=args.rollout_batch or args.batch, desc="rollout")

        # ---- reward and pairs
        reward = score(run, x0, prompts[own])  # (n,)
        w, l = best_and_worst(reward, args.group, each)  # (pairs,) each
        differ = (reward[w] - reward[l] > rounding(reward)).float()  # (pairs,)

        # ---- training rows (pair, t): each pair, in random order, at `timesteps` moments
        pair = torch.randperm(pairs, generator=g).repeat_interleave(args.timesteps)
        t = levels[(len(levels) * torch.sigmoid(torch.randn(len(pair), generator=g))).long()]  # (rows,)
        if args.lam == "auto":  # what is never trained at is not held either, such as sampling's last noise level
            t[::8] = sigmas[torch.randint(args.steps, t[::8].shape, generator=g)]
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- updates
        for u, update in enumerate(updates):
            sums, told_apart = {}, differ[pair[update]].sum()  # rows whose pair differs in reward
            for b in local_batches(update, w[pair], own, max(1, args.batch // 2)):
                prompts_b = [prompts[i] for i in w[pair[b]]] * 2
                x0_b = x0[torch.cat([w[pair[b]], l[pair[b]]]) - own.start].to(pipe.device)  # (w and l, ...)
                noise_b = torch.cat([noise_of(run, TRAINING, b)] * 2).to(pipe.device)
                t_b = t[b].repeat(2)
                xt_b = add_noise(x0_b, noise_b, t_b.to(pipe.device))
                v = velocity(pipe, xt_b, t_b, prompts_b)
                with reference(pipe.transformer):
                    v_ref = velocity(pipe, xt_b, t_b, prompts_b)
                pairs_b = [*v.chunk(2), *v_ref.chunk(2), *(noise_b - x0_b).chunk(2)]
                differ_b = differ[pair[b]].to(pipe.device)
                base_loss = dpo_loss(*pairs_b, args.dpo_beta)
                base_loss = 2 / args.dpo_beta * differ_b * base_loss
                guard = rearrange(norm_hinge(v, v_ref, args.margin), "(two b) -> two b", two=2).mean(0)
                kl = rearrange((v - v_ref).square().flatten(1).mean(1), "(two b) -> two b", two=2).mean(0)
                ratio = rearrange(norm_ratio(v.detach(), v_ref), "(two b) -> two b", two=2)
                loss = base_loss + lam * guard + args.kl * kl
                if args.lam == "auto":
                    oppose(v, v_ref, args.margin)
                (loss.sum() / len(update)).backward()
                tally(sums, loss=loss, base_loss=base_loss, guard=guard, kl=kl)
                tally(sums, norm_ratio=ratio.mean(0), active=(ratio > 1 + args.margin).float().mean(0))
                tally_by_t(sums, ratio.mean(0), t[b].to(pipe.device))
                if told_apart > 0:
                    margin = dpo_margin(*pairs_b, args.dpo_beta).detach()
                    weight = differ_b * len(update) / told_apart  # the mean over rows is that over what differs
                    tally(sums, accuracy=weight * (margin > 0), margin=weight * margin)
            finish_step(run, sums, len(update), reward, done=(u + 1) / args.updates)
        finish_epoch(run)


if __name__ == "__main__":
    main(parse(Args, __doc__))
