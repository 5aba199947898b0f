r"""AWM (Advantage Weighted Matching) + NormGuard for flow-matching text-to-image models, on one GPU.

    python train_awm.py --lam 0.05                              # the miniature world, two minutes on a CPU
    python train_awm.py --model stabilityai/stable-diffusion-3.5-medium --reward pickscore --prompts FILE --eval-prompts FILE \
        --size 512 --steps 14 --timesteps 6 --group 24 --groups 24 --batch 4 --lr 3e-4

AWM (arXiv 2509.25050, github.com/scxue/advantage_weighted_matching) is policy gradient with the flow-matching loss as the
log-likelihood. For a picture x0 of the policy, x_t = (1 - t) x0 + t eps:

    log p(x0; t, eps) = -t / a * (mean ||v_theta(x_t, t) - (eps - x0)||^2 + 1e-10)^a         a = 1/4, generalized Huber
    base_loss = max(-A r, -A clip(r, 1 - c, 1 + c)),   r = exp(log p - log p_old)            A in [-1, 1], by group
    loss = base_loss + lam * guard + kl * mean ||v_theta - v_ref||^2                         guard: normguard.py

As in the official PickScore recipe: pictures without guidance, group mean and global std for A, clipped at 5 and scaled to
1; moments t drawn stratified from the rollout's own schedule but its last tenth; one update an epoch, on policy (with more
--updates, the later ones keep the velocities from before the first). Not as there: Euler instead of a second-order sampler,
t drawn per picture instead of per micro-batch, diffusers' T5 length of 256 instead of 128, no EMA of the weights, and no
second KL to such an EMA.

To resume, run the same command again.
"""
import time
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from eval_judge import fail, grid, load_reward, parse, read_prompts
from normguard import norm_hinge, norm_ratio, reference
from sample import (add_lora, decode, draw_noise, encode_prompts, evaluate, integrate, latent_shape, load_checkpoint, load_pipeline,
                    log_line, max_tokens, open_run, rng, save_checkpoint, schedule, stack, velocity)


@dataclass
class Args:
    lam: float = 0.05
    """weight of NormGuard's hinge; 0 is plain AWM"""
    margin: float = 0.0
    """relative excess of the velocity norm that the hinge lets pass"""
    model: str = "tiny/sd3"
    """diffusers folder or hub id"""
    reward: str = "tiny/pickscore"
    """pickscore, a CLIPModel folder or hub id, or file.py:function"""
    prompts: str = "tiny/prompts.txt"
    """text file, one training prompt a line"""
    eval_prompts: str = "tiny/eval_prompts.txt"
    """text file of held-out prompts"""
    out: str | None = None
    """the run's folder (default: runs/awm-MODEL-REWARD-lamLAM-sSEED)"""
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
    power: float = 0.25
    """a of the generalized Huber"""
    clip: float = 1.0
    """c of the clipped ratio"""
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


def awm_loss(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor, adv: Tensor, power: float = 0.25, clip: float = 1.0) -> Tensor:
    """AWM's clipped policy loss per sample, in fp32. v (with gradient), v_old, x0, noise (b, ...); t in [0, 1] and adv (b,) -> (b,).

    On policy where v_old is v.detach(): the ratio is 1 and the gradient is that of -adv log p.
    """
    def log_prob(v):
        error = (v.float() - (noise.float() - x0.float())).square().flatten(1).mean(1)
        return -t.float() / power * (error + 1e-10) ** power

    ratio = (log_prob(v) - log_prob(v_old.detach())).exp()
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))


def advantages(reward: Tensor, group: int, clip: float) -> Tensor:
    """Group mean, global std, clipped at +- clip and scaled to +- 1. reward (prompts * group,), groups contiguous -> same shape."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    return (centred / (reward.std(correction=0) + 1e-4)).clamp(-clip, clip) / clip


def stratified(n: int, strata: int, steps: int, g: torch.Generator) -> Tensor:
    """One rollout step from each stratum for each of n pictures, (n, strata) long; the last tenth of the steps is left out."""
    bounds = torch.linspace(0, int(0.9 * steps), strata + 1).long()
    return bounds[:-1] + (torch.rand(n, strata, generator=g) * (bounds[1:] - bounds[:-1])).long()


def check(args: Args):
    """Refuse numbers that cannot work, naming the flag."""
    n = args.groups * args.group
    for flags, least in (("epochs groups rank updates batch timesteps save_every eval_n", 1), ("group steps", 2),
                         ("seed eval_every lam margin kl", 0), ("lr power clip adv_clip max_grad_norm", 1e-12)):
        for flag in flags.split():
            if not least <= getattr(args, flag) < float("inf"):
                fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {'at least ' + str(least) if least != 1e-12 else 'positive'}")
    if n % args.updates:
        fail(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > int(0.9 * args.steps):
        fail(f"--timesteps {args.timesteps}: more than the {int(0.9 * args.steps)} steps that --steps {args.steps} offers")


def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check(args)
    prompts, held_out = read_prompts(args.prompts, "--prompts"), read_prompts(args.eval_prompts, "--eval-prompts")
    if args.groups > len(prompts):
        fail(f"--groups {args.groups}: more than the {len(prompts)} prompts in {args.prompts}")

    # ---- model, reward, run folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, reward_fn = load_pipeline(args.model, device), load_reward(args.reward, device)
    model, shape, sigmas = pipe.transformer, latent_shape(pipe, args.size), schedule(pipe, args.steps)
    reward_fn(torch.full((2, 3, shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor), 0.5), prompts[:1] * 2)  # does it work?
    out, state = open_run(args, "awm", max_sequence_length=max_tokens(pipe))
    params = add_lora(model, args.rank, args.seed)
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    step, first, skipped = 0, 0, 0
    if state:
        load_checkpoint(state, pipe, opt)
        step, first, skipped = state["step"], state["epoch"], state["skipped"]
        print(f"{out}: resumed at epoch {first}")
    if args.checkpointing or (args.checkpointing is None and device.type == "cuda"):
        model.enable_gradient_checkpointing()
    if args.compile:
        model.compile()

    # ---- prompts: each pass over the file is a shuffle of its own; encoded once, before the loop
    passes = args.epochs * args.groups // len(prompts) + 1
    order = torch.cat([torch.randperm(len(prompts), generator=rng(args.seed, 0, i)) for i in range(passes)]).tolist()
    used = [prompts[i] for i in order[:args.epochs * args.groups]]
    eval_prompts = [held_out[i % len(held_out)] for i in range(args.eval_n)]
    eval_noise = draw_noise(list(range(args.eval_n)), shape)  # the same for every run and seed
    text = encode_prompts(pipe, used[first * args.groups:] + eval_prompts)

    def look(epoch: int):
        numbers, pictures = evaluate(pipe, reward_fn, text, eval_prompts, eval_noise, sigmas, args.batch)
        grid(pictures, 8).save(out / "samples" / f"{epoch:05d}.png")
        log_line(out, {"step": step, "epoch": epoch, **numbers})

    if first == 0 and args.eval_every:
        look(0)
    bad = 0  # non-finite steps in a row
    bar = tqdm(range(first, args.epochs), desc="train", initial=first, total=args.epochs)
    for epoch in bar:
        start, g = time.time(), rng(args.seed, 1, epoch)

        # ---- rollout: `group` pictures of each prompt from the policy as it stands
        batch_prompts = [p for p in used[epoch * args.groups:(epoch + 1) * args.groups] for _ in range(args.group)]
        n = len(batch_prompts)
        x0, _ = integrate(pipe, torch.randn(n, *shape, generator=g), text, batch_prompts, sigmas, batch=args.batch, desc="rollout")

        # ---- reward and advantage
        reward = reward_fn(decode(pipe, x0), batch_prompts)
        adv = advantages(reward, args.group, args.adv_clip)  # (n,) in [-1, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` moments
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)
        t = sigmas[stratified(n, args.timesteps, args.steps, g).flatten()]  # (rows,)
        noise = torch.randn(len(t), *shape, generator=g)  # (rows, c, h, w)
        x0, adv = x0[picture], adv[picture]
        xt = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))  # (1 - t) x0 + t eps
        row_prompts = [batch_prompts[i] for i in picture]
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- the policy's velocities before this epoch's first update, for the updates after it
        v_old = torch.zeros_like(x0)
        for b in [b for update in updates[1:] for b in update.split(args.batch)]:
            with torch.no_grad():
                v_old[b] = velocity(model, xt[b].to(device), t[b].to(device), stack(text, [row_prompts[i] for i in b], device)).cpu()

        # ---- updates
        for u, update in enumerate(updates):
            sums = torch.zeros(6)
            for b in update.split(args.batch):
                x0_b, noise_b, xt_b, t_b, adv_b, old = (a[b].to(device) for a in (x0, noise, xt, t, adv, v_old))
                text_b = stack(text, [row_prompts[i] for i in b], device)
                v = velocity(model, xt_b, t_b, text_b)
                if u == 0:
                    old = v.detach()  # on policy
                base_loss = awm_loss(v, old, x0_b, noise_b, t_b, adv_b, args.power, args.clip)
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
            grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item()
            if torch.isfinite(torch.tensor([loss, grad_norm])).all():
                opt.step()
                bad = 0
            else:
                bad, skipped = bad + 1, skipped + 1
            opt.zero_grad()
            step += 1
            known = args.lam > 0 or args.kl > 0  # otherwise only the evaluation measures the norm
            line = {"step": step, "epoch": epoch, "reward": reward.mean().item(), "reward_std": reward.std().item(), "loss": loss,
                    "base_loss": base_loss, "guard": guard, "kl": kl, "norm_ratio": ratio if known else None,
                    "active": active if known else None, "grad_norm": grad_norm, "skipped": skipped,
                    "img_per_s": n * (u + 1) / args.updates / (time.time() - start)}
            if device.type == "cuda":
                line["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
            log_line(out, line)
            if bad == 10:
                fail(f"{out}: ten steps in a row had a non-finite loss or gradient; checkpoint/ is as it was before them. Try a lower --lr in another --out")
        bar.set_postfix(reward=f"{line['reward']:.3f}", norm_ratio=f"{ratio:.3f}" if known else "-")

        # ---- look and save
        done = epoch + 1
        if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
            look(done)
        if done % args.save_every == 0 or done == args.epochs:
            save_checkpoint(out, pipe, opt, epoch=done, step=step, skipped=skipped)
    print(f"done: {out}/ holds lora/, samples/, curves.png and metrics.jsonl")


if __name__ == "__main__":
    main(parse(Args, __doc__))
