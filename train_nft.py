r"""DiffusionNFT (negative-aware fine-tuning) + NormGuard for flow-matching text-to-image models, on one GPU.

    python train_nft.py --lam 0.05                              # the miniature world, a minute on two cores
    python train_nft.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE --eval-prompts FILE \
        --size 512 --steps 10 --timesteps 9 --group 24 --groups 48 --batch 4 --lr 3e-4 --kl 2e-5 --max-grad-norm 0.2

DiffusionNFT (arXiv 2509.16117, github.com/NVlabs/DiffusionNFT) is supervised learning on the policy's own pictures, good and
bad. A picture x0 of the old policy is good with probability r; with x_t = (1 - t) x0 + t eps and x0(v) = x_t - t v,

    v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
    L(v) = mean ||x0(v) - x0||^2 / stopgrad(mean |x0(v) - x0|)                             r = 1/2 + A / 2, A in [-1, 1]
    base_loss = (r L(v+) + (1 - r) L(v-)) / beta
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                       guard: normguard.py

As in the official PickScore recipe: the old policy is an EMA of the trained LoRA, and it is the old policy that draws the
pictures, without guidance; group mean and global std for A, clipped at adv_clip and scaled to 1; one update an epoch, at
moments t of the rollout's schedule. Not as there: those are one from each of --timesteps strata (there a random nine of ten), Euler
instead of a second-order sampler, diffusers' T5 length of 256 instead of 128, a bf16 VAE on a GPU (there fp32), no second EMA
for evaluation, lora/ holds the trained LoRA, and no factor 5 on base_loss, by which lam weighs as in the other methods: Adam does
not see it, but kl and max_grad_norm do, and are a fifth of the official ones in the command above.

To resume, run the same command again.
"""
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from eval_judge import fail, grid, load_reward, parse
from normguard import norm_hinge, norm_ratio, reference
from sample import (add_lora, check_numbers, clipped_step, decode, draw_noise, draw_prompts, encode_prompts, evaluate, group_advantages, integrate,
                    latent_shape, load_checkpoint, load_pipeline, log_line, max_tokens, open_run, rng, save_checkpoint, schedule, stack,
                    stratified, velocity)


@dataclass
class Args:
    lam: float = 0.05
    """weight of NormGuard's hinge; 0 is plain DiffusionNFT"""
    margin: float = 0.0
    """relative excess of the velocity norm that the hinge lets pass"""
    model: str = "tiny/sd3"
    """diffusers folder or hub id"""
    reward: str = "tiny/pickscore"
    """pickscore, hpsv2.1, clipscore, a CLIPModel folder or hub id, file.py:function, or a sum of such: A:0.5,B:0.5"""
    prompts: str = "tiny/prompts.txt"
    """text file, one training prompt a line"""
    eval_prompts: str = "tiny/eval_prompts.txt"
    """text file of held-out prompts"""
    out: str | None = None
    """the run's folder (default: runs/nft-MODEL-REWARD-lamLAM-sSEED)"""
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
    """Euler steps of a rollout and of an evaluation"""
    timesteps: int = 2
    """moments t a picture is trained at, one from each of so many strata of the schedule"""
    updates: int = 1
    """optimizer steps an epoch, each on its share of the pictures"""
    batch: int = 64
    """pictures at once in a forward pass; what is left of a step is accumulated"""
    nft_beta: float = 1.0
    """beta: how far v+ and v- lie from the old policy"""
    old_start: int = 0
    """optimizer steps for which the old policy is the current one"""
    old_rate: float = 0.001
    """the old policy's EMA decay then grows by this at each step"""
    old_decay: float = 0.5
    """up to this"""
    adv_clip: float = 5.0
    """advantages are clipped to +- this many standard deviations, then scaled to +- 1"""
    kl: float = 1e-4
    """weight of the velocity KL to the reference; 0 with --lam 0 saves the reference's forward pass"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    size: int | None = None
    """pixels a side (default: the model's own)"""
    eval_n: int = 64
    """held-out pictures an evaluation"""
    eval_every: int = 10
    """epochs between evaluations; 0 is never"""
    save_every: int = 5
    """epochs between checkpoints"""
    checkpointing: bool | None = None
    """gradient checkpointing (default: on a GPU)"""
    compile: bool = False
    """torch.compile the transformer"""


def nft_loss(v: Tensor, v_old: Tensor, x0: Tensor, xt: Tensor, t: Tensor, r: Tensor, beta: float = 1.0) -> Tensor:
    """DiffusionNFT's loss per sample, in fp32. v (with gradient), v_old, x0, xt (b, ...); t and r in [0, 1] (b,) -> (b,)."""
    v, v_old, x0, xt, t, r = (a.float() for a in (v, v_old.detach(), x0, xt, t, r))

    def matching(v):
        """L(v): (b, ...) -> (b,)."""
        error = (xt - t.view(-1, *[1] * (xt.ndim - 1)) * v - x0).flatten(1)  # in x0-space
        return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)

    good = matching((1 - beta) * v_old + beta * v)
    bad = matching((1 + beta) * v_old - beta * v)
    return (r * good + (1 - r) * bad) / beta


def old_decay(step: int, start: int, rate: float, most: float) -> float:
    """Decay of the old policy's EMA after `step` optimizer steps: 0 (it is the current policy) up to `start`, then rising to `most`."""
    return min(rate * max(step - start, 0), most)


@contextmanager
def old_policy(model: torch.nn.Module):
    """Inside, the model is the old policy."""
    model.set_adapter("old")
    try:
        yield
    finally:
        model.set_adapter("default")


def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check_numbers(args)
    n = args.groups * args.group  # pictures an epoch
    if not (args.old_start >= 0 and args.old_rate >= 0 and 0 <= args.old_decay < 1):
        fail(f"--old-start {args.old_start} --old-rate {args.old_rate} --old-decay {args.old_decay}: none below 0, and the decay below 1")
    if n % args.updates:
        fail(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > args.steps:
        fail(f"--timesteps {args.timesteps}: more than --steps {args.steps}")
    used, eval_prompts = draw_prompts(args)

    # ---- model, reward, run folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, reward_fn = load_pipeline(args.model, device), load_reward(args.reward, device)
    model, shape = pipe.transformer, latent_shape(pipe, args.size)
    sigmas = schedule(pipe, args.steps, shape)
    reward_fn(decode(pipe, torch.zeros(2, *shape)), used[:1] * 2)  # does it work? before anything is written
    out, state = open_run(args, "nft", max_sequence_length=max_tokens(pipe))
    params, old_params = add_lora(model, args.rank, args.seed), add_lora(model, args.rank, args.seed, "old")  # one seed: they are equal
    model.set_adapter("default")
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    step, first, skipped, bad = 0, 0, 0, 0  # bad: non-finite steps in a row
    if state:
        load_checkpoint(state, pipe, opt)
        for p, saved in zip(old_params, state["old"]):
            p.data.copy_(saved)
        step, first, skipped, bad = state["step"], state["epoch"], state["skipped"], state["bad"]
        print(f"{out}: resumed at epoch {first}")
    if args.checkpointing or (args.checkpointing is None and device.type == "cuda"):
        model.enable_gradient_checkpointing()
    if args.compile:
        model.compile()

    # ---- prompts, encoded once
    text = encode_prompts(pipe, used[first * args.groups:] + eval_prompts)
    eval_noise = draw_noise(list(range(args.eval_n)), shape)  # the same for every run and seed

    def look(epoch: int):
        """Evaluate on the held-out prompts; keep the pictures and the numbers."""
        numbers, pictures = evaluate(pipe, reward_fn, text, eval_prompts, eval_noise, sigmas, args.batch)
        grid(pictures, 8).save(out / "samples" / f"{epoch:05d}.png")
        log_line(out, {"step": step, "epoch": epoch, **numbers})

    if first == 0 and args.eval_every:
        look(0)
    decay = old_decay(step, args.old_start, args.old_rate, args.old_decay)  # of the EMA's last update
    bar = tqdm(range(first, args.epochs), desc="train", initial=first, total=args.epochs)
    for epoch in bar:
        start, g = time.time(), rng(args.seed, 1, epoch)

        # ---- rollout: `group` pictures of each prompt from the old policy
        batch_prompts = [p for p in used[epoch * args.groups:(epoch + 1) * args.groups] for _ in range(args.group)]
        with old_policy(model):
            x0, _ = integrate(pipe, torch.randn(n, *shape, generator=g), text, batch_prompts, sigmas, batch=args.batch, desc="rollout")

        # ---- reward and the probability of being good
        reward = reward_fn(decode(pipe, x0), batch_prompts)
        r = 0.5 + 0.5 * group_advantages(reward, args.group, args.adv_clip)  # (n,) in [0, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` moments
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)
        t = sigmas[stratified(n, args.timesteps, args.steps, g).flatten()]  # (rows,)
        noise = torch.randn(len(t), *shape, generator=g)  # (rows, c, h, w)
        row_prompts = [batch_prompts[i] for i in picture]
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- updates
        for u, update in enumerate(updates):
            sums = torch.zeros(6)
            for b in update.split(args.batch):
                x0_b, r_b, noise_b, t_b = (a.to(device) for a in (x0[picture[b]], r[picture[b]], noise[b], t[b]))
                xt_b = torch.lerp(x0_b, noise_b, t_b.view(-1, 1, 1, 1))  # (1 - t) x0 + t eps
                text_b = stack(text, [row_prompts[i] for i in b], device)
                v = velocity(model, xt_b, t_b, text_b)
                if u == 0 and decay == 0:
                    v_old = v.detach()  # the old policy is still the current one
                else:
                    with torch.no_grad(), old_policy(model):
                        v_old = velocity(model, xt_b, t_b, text_b)
                base_loss = nft_loss(v, v_old, x0_b, xt_b, t_b, r_b, args.nft_beta)
                guard = kl = ratio = torch.zeros_like(base_loss)
                if args.lam > 0 or args.kl > 0:
                    with reference(model):
                        v_ref = velocity(model, xt_b, t_b, text_b)
                    guard = norm_hinge(v, v_ref, args.margin)
                    kl = (v - v_ref).square().flatten(1).mean(1)
                    ratio = norm_ratio(v.detach(), v_ref)
                loss = base_loss + args.lam * guard + args.kl * kl
                (loss.sum() / len(update)).backward()
                active = (ratio > 1 + args.margin).float()
                sums += torch.stack([x.detach().sum() for x in (loss, base_loss, guard, kl, ratio, active)]).cpu()
            loss, base_loss, guard, kl, ratio, active = (sums / len(update)).tolist()
            grad_norm, finite = clipped_step(opt, loss, args.max_grad_norm)
            bad, skipped, step = (0, skipped, step + 1) if finite else (bad + 1, skipped + 1, step + 1)
            known = args.lam > 0 or args.kl > 0  # otherwise only the evaluation measures the norm
            line = {"step": step, "epoch": epoch, "reward": reward.mean().item(), "reward_std": reward.std().item(), "loss": loss,
                    "base_loss": base_loss, "guard": guard, "kl": kl, "norm_ratio": ratio if known else None,
                    "active": active if known else None, "grad_norm": grad_norm, "skipped": skipped,
                    "img_per_s": n * (u + 1) / args.updates / (time.time() - start)}
            if device.type == "cuda":
                line["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
            log_line(out, line)
            if bad == 10:
                fail(f"{out}: ten steps in a row had a non-finite loss or gradient and were not taken. Try a lower --lr in another --out")
        bar.set_postfix(reward=f"{line['reward']:.3f}", norm_ratio=f"{ratio:.3f}" if known else "-")

        # ---- the old policy follows
        decay = old_decay(step, args.old_start, args.old_rate, args.old_decay)
        with torch.no_grad():
            for p, q in zip(params, old_params):
                q.copy_(decay * q + (1 - decay) * p)

        # ---- look and save
        done = epoch + 1
        if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
            look(done)
        if done % args.save_every == 0 or done == args.epochs:
            save_checkpoint(out, pipe, opt, epoch=done, step=step, skipped=skipped, bad=bad, old=[p.detach().clone() for p in old_params])
    print(f"done: {out}/ holds lora/, samples/, curves.png and metrics.jsonl")


if __name__ == "__main__":
    main(parse(Args, __doc__))
