"""What a run draws and ranks: its prompts, its noise, its moments, its advantages. All randomness comes from generators
that depend on nothing but the seed, what they are for, and a place in the run: a resumed run draws what an
uninterrupted one draws, several processes what one does, and no batch size changes it."""
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flow.cli import InputError
from flow.pipeline import draw_noise
from flow.prompts import read_prompts

PROMPTS, EPOCH, ROLLOUT, TRAINING = range(4)  # what a generator is for


def rng(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def noise_of(run, what: int, rows) -> Tensor:
    """Noise for these rows of the epoch's pictures (ROLLOUT) or of its training rows (TRAINING), (rows, ...) on the
    CPU; each has a generator of its own."""
    generators = [rng(run.args.seed, what, run.epoch, int(row)) for row in rows]
    return draw_noise(run.pipe, len(generators), generators)


def draw_prompts(args) -> tuple[list[str], list[str]]:
    """The run's prompts, epochs * groups of them, each pass over the file a shuffle of its own; and eval_n held-out
    ones."""
    prompts, held_out = read_prompts(args.prompts, "--prompts"), read_prompts(args.eval_prompts, "--eval-prompts")
    if args.groups > len(prompts):
        raise InputError(f"--groups {args.groups}: more than the {len(prompts)} prompts in {args.prompts}")
    n = args.epochs * args.groups
    passes = range(n // len(prompts) + 1)
    shuffles = [torch.randperm(len(prompts), generator=rng(args.seed, PROMPTS, i)) for i in passes]
    return [prompts[i] for i in torch.cat(shuffles)[:n]], [held_out[i % len(held_out)] for i in range(args.eval_n)]


def rounding(reward: Tensor) -> float:
    """Rewards (n,) that differ by no more than this are equal: a few units in the last place of fp32."""
    return 1e-6 * reward.abs().max().item()


def group_advantages(reward: Tensor, group: int, clip: float) -> Tensor:
    """Group mean, global std, clipped at +- clip and scaled to +- 1. reward (prompts * group,), groups contiguous ->
    (prompts * group,). Independent of the reward's scale; 0 where a picture's reward is its group's mean up to
    rounding."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    centred = torch.where(centred.abs() > rounding(reward), centred, 0)
    std = reward.std(correction=0)
    return (centred / std.clamp_min(torch.finfo(std.dtype).tiny)).clamp(-clip, clip) / clip


def zero_std_share(reward: Tensor, group: int) -> float:
    """Share of groups whose rewards are all equal, up to rounding: they teach nothing."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    return ((by_group.amax(1) - by_group.amin(1)) <= rounding(reward)).float().mean().item()


def stratified(n: int, strata: int, usable: int, g: torch.Generator) -> Tensor:
    """One of the schedule's first `usable` steps from each stratum, for each of n pictures: (n, strata) long."""
    bounds = torch.linspace(0, usable, strata + 1).long()
    return bounds[:-1] + (torch.rand(n, strata, generator=g) * (bounds[1:] - bounds[:-1])).long()


def random_steps(n: int, k: int, steps: int, g: torch.Generator) -> Tensor:
    """k of the schedule's steps, all different and each as likely, for each of n pictures: (n, k) long."""
    return torch.rand(n, steps, generator=g).argsort(1)[:, :k]


def local_batches(rows: Tensor, picture: Tensor, own: slice, batch: int) -> list[Tensor]:
    """Of an update's rows, those whose picture (one a row) is among this process's own, so many at once."""
    rows = rows[(picture[rows] >= own.start) & (picture[rows] < own.stop)]
    return list(rows.split(batch)) if len(rows) else []
