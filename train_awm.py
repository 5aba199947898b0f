r"""AWM (Advantage Weighted Matching) + NormGuard for flow-matching text-to-image models, on one GPU.

    python train_awm.py --lam 0.05                              # the miniature world, a minute on two cores
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
    """weight of NormGuard's hinge; 0 is plain AWM"""
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
        """log p(x0; t, eps) under the velocity v (b, ...), (b,)."""
        error = (v.float() - (noise.float() - x0.float())).square().flatten(1).mean(1)
        return -t.float() / power * (error + 1e-10) ** power

    ratio = (log_prob(v) - log_prob(v_old.detach())).exp()
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))


def main(args: Args):
    """Train: roll out, score, update; evaluate and save now and then."""
    check_numbers(args)
    n, usable = args.groups * args.group, int(0.9 * args.steps)  # pictures an epoch; steps of the schedule that train
    if n % args.updates:
        fail(f"--updates {args.updates}: must divide the epoch's {n} pictures (--groups x --group)")
    if args.timesteps > usable:
        fail(f"--timesteps {args.timesteps}: more than the {usable} steps that --steps {args.steps} offers")
    used, eval_prompts = draw_prompts(args)

    # ---- model, reward, run folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, reward_fn = load_pipeline(args.model, device), load_reward(args.reward, device)
    model, shape = pipe.transformer, latent_shape(pipe, args.size)
    sigmas = schedule(pipe, args.steps, shape)
    reward_fn(decode(pipe, torch.zeros(2, *shape)), used[:1] * 2)  # does it work? before anything is written
    out, state = open_run(args, "awm", max_sequence_length=max_tokens(pipe))
    params = add_lora(model, args.rank, args.seed)
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    step, first, skipped, bad = 0, 0, 0, 0  # bad: non-finite steps in a row
    if state:
        load_checkpoint(state, pipe, opt)
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
    bar = tqdm(range(first, args.epochs), desc="train", initial=first, total=args.epochs)
    for epoch in bar:
        start, g = time.time(), rng(args.seed, 1, epoch)

        # ---- rollout: `group` pictures of each prompt from the policy as it stands
        batch_prompts = [p for p in used[epoch * args.groups:(epoch + 1) * args.groups] for _ in range(args.group)]
        x0, _ = integrate(pipe, torch.randn(n, *shape, generator=g), text, batch_prompts, sigmas, batch=args.batch, desc="rollout")

        # ---- reward and advantage
        reward = reward_fn(decode(pipe, x0), batch_prompts)
        adv = group_advantages(reward, args.group, args.adv_clip)  # (n,) in [-1, 1]

        # ---- training rows (picture, t): each picture, in random order, at `timesteps` moments
        picture = torch.randperm(n, generator=g).repeat_interleave(args.timesteps)
        t = sigmas[stratified(n, args.timesteps, usable, g).flatten()]  # (rows,)
        noise = torch.randn(len(t), *shape, generator=g)  # (rows, c, h, w)
        row_prompts = [batch_prompts[i] for i in picture]
        updates = torch.arange(len(t)).split(len(t) // args.updates)

        # ---- the policy's velocities before this epoch's first update, for the updates after it
        v_old = torch.zeros_like(noise)
        for b in [b for update in updates[1:] for b in update.split(args.batch)]:
            xt_b = torch.lerp(x0[picture[b]], noise[b], t[b].view(-1, 1, 1, 1)).to(device)
            with torch.no_grad():
                v_old[b] = velocity(model, xt_b, t[b].to(device), stack(text, [row_prompts[i] for i in b], device)).cpu()

        # ---- updates
        for u, update in enumerate(updates):
            sums = torch.zeros(6)
            for b in update.split(args.batch):
                x0_b, adv_b, noise_b, t_b = (a.to(device) for a in (x0[picture[b]], adv[picture[b]], noise[b], t[b]))
                xt_b = torch.lerp(x0_b, noise_b, t_b.view(-1, 1, 1, 1))  # (1 - t) x0 + t eps
                text_b = stack(text, [row_prompts[i] for i in b], device)
                v = velocity(model, xt_b, t_b, text_b)
                old = v.detach() if u == 0 else v_old[b].to(device)  # on policy in the first update
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

        # ---- look and save
        done = epoch + 1
        if args.eval_every and (done % args.eval_every == 0 or done == args.epochs):
            look(done)
        if done % args.save_every == 0 or done == args.epochs:
            save_checkpoint(out, pipe, opt, epoch=done, step=step, skipped=skipped, bad=bad)
    print(f"done: {out}/ holds lora/, samples/, curves.png and metrics.jsonl")


if __name__ == "__main__":
    main(parse(Args, __doc__))
