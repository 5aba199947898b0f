"""Random draws of a run (prompts, noise, timesteps), micro-batches, and group advantages. Each draw has its own
generator, seeded by (seed, purpose, index). So results do not depend on batch size, on the number of processes, or on
resuming."""
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flow.cli import InputError
from flow.distributed import local_slice
from flow.pipeline import add_noise, draw_noise
from flow.prompts import read_split

PROMPTS, EPOCH, ROLLOUT, TRAINING = range(4)  # purposes of a generator


def rng(*key: int) -> torch.Generator:
    """A CPU generator seeded by its key alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def draw_prompts(args) -> tuple[list[dict], list[dict]]:
    """The rows of read_prompts that the run trains on, one per group (epochs * groups), and its eval_n held-out ones.
    Each pass over the file is shuffled anew."""
    prompts, held_out = read_split(args)
    if args.groups > len(prompts):
        raise InputError(f"--groups {args.groups}: more than the {len(prompts)} training prompts in {args.prompts}")
    n = args.epochs * args.groups
    passes = range(n // len(prompts) + 1)
    shuffles = [torch.randperm(len(prompts), generator=rng(args.seed, PROMPTS, i)) for i in passes]
    return [prompts[i] for i in torch.cat(shuffles)[:n]], [held_out[i % len(held_out)] for i in range(args.eval_n)]


def row_noise(pipe, seed: int, purpose: int, epoch: int, rows) -> Tensor:
    """Noise for these of an epoch's pictures (ROLLOUT) or training rows (TRAINING): (len(rows), ...) on the CPU. Each
    row has its own generator."""
    generators = [rng(seed, purpose, epoch, int(row)) for row in rows]
    return draw_noise(pipe, len(generators), generators)


def stratified_steps(n: int, strata: int, trained_steps: int, g: torch.Generator) -> Tensor:
    """Divide the schedule's first `trained_steps` steps into strata; for each of n pictures draw one step from each:
    (n, strata) long."""
    bounds = torch.linspace(0, trained_steps, strata + 1).long()
    return bounds[:-1] + (torch.rand(n, strata, generator=g) * (bounds[1:] - bounds[:-1])).long()


def local_batches(rows: Tensor, picture: Tensor, n: int, batch: int) -> list[Tensor]:
    """Split the rows of an update that belong to this process into micro-batches of `batch` rows. rows: indices of the
    update's rows. picture: the picture of each of the epoch's rows, 0 to n - 1."""
    local = local_slice(n)
    rows = rows[(picture[rows] >= local.start) & (picture[rows] < local.stop)]
    return list(rows.split(batch)) if len(rows) else []


def training_batch(pipe, seed: int, epoch: int, rows: Tensor, picture: Tensor, t: Tensor, x0: Tensor,
                   prompts: list[str], **values: Tensor) -> dict:
    """A micro-batch by name: picture (b,), prompts; on the device t (b,), x0, noise, xt (b, ...), and `values` (b,).

    picture, t (b,): each row's picture, 0 to n - 1, and noise level. rows: the rows' indices, which seed their noise;
    (b,), or (b/2,) for pairs of the same noise. x0: the latents of this process's pictures. prompts and values (n,): of
    all the epoch's pictures."""
    x0, t = x0[picture - local_slice(len(prompts)).start].to(pipe.device), t.to(pipe.device)
    noise = row_noise(pipe, seed, TRAINING, epoch, rows).to(pipe.device)
    noise = noise.repeat(len(picture) // len(rows), *[1] * (noise.ndim - 1))
    return {"picture": picture, "prompts": [prompts[i] for i in picture], "t": t, "x0": x0, "noise": noise,
            "xt": add_noise(x0, noise, t),
            **{name: value[picture].to(pipe.device) for name, value in values.items()}}


def rounding(reward: Tensor) -> float:
    """Rewards (n,) that differ by no more than this count as equal: a few units in the last place of fp32."""
    return 1e-6 * reward.abs().max().item()


def group_advantages(reward: Tensor, group: int, clip: float) -> Tensor:
    """Reward minus its group's mean, over the global std, clipped at +- clip and scaled to +- 1. reward
    (prompts * group,), groups contiguous -> (prompts * group,). It does not depend on the reward's scale. A reward that
    equals its group's mean up to rounding gives exactly 0."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    centred = torch.where(centred.abs() > rounding(reward), centred, 0)
    std = reward.std(correction=0)
    return (centred / std.clamp_min(torch.finfo(std.dtype).tiny)).clamp(-clip, clip) / clip


def zero_std_share(reward: Tensor, group: int) -> float:
    """Fraction of groups whose rewards are all equal, up to rounding. They teach nothing."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    return ((by_group.amax(1) - by_group.amin(1)) <= rounding(reward)).float().mean().item()
