"""Statistics over runs: paired differences with confidence intervals, models over guidance, rivals at equal reward.

results: {run: the numbers of its parts}. A run is a NamedTuple (base, method, reward, seed); its `cell` is all of that
but the seed. Runs are compared in pairs: same cell and seed, so same prompts and noise. A "reader" is a function that
takes the numbers of a run and returns one of them. A part is named like "main/none" or "few/4/3": guidance comes last.
"""
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from guards import BOTH, RIVALS

METRICS = {  # metric: (label, digits)
    "reward": ("reward", 3),
    "other reward": ("other reward", 3),
    "judge/overall": ("judged good", 3),
    "judge/oversaturation": ("judged oversaturated", 3),
    "judge/over-sharpening": ("judged over-sharpened", 3),
    "judge/unnatural lighting": ("judged unnaturally lit", 3),
    "judge/artifacts": ("judged to have artifacts", 3),
    "P(real)": ("detector's P(real)", 3),
    "FD": ("Fréchet distance", 2),
    "saturation": ("saturation", 3),
    "colourfulness": ("colourfulness", 1),
    "clipped": ("clipped values", 4),
    "gradient energy": ("gradient energy", 2),
    "Laplacian energy": ("Laplacian energy", 2),
}
NORMS = {  # the norm ratio over a sampling trajectory, in one number
    "overall": lambda norms: norms["overall"],
    "highest": lambda norms: max(norms["mean"]),  # the highest step
    "excess": lambda norms: max(1.0, *norms["mean"]),  # a short norm in one run offsets no excess in another
}


def read_json(path: Path) -> dict:
    """A JSON file; {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# ---------------------------------------------------------------- choosing runs and numbers

def grouped(results: dict[tuple, dict], by: str) -> dict[str, dict[tuple, dict]]:
    """Split runs by their cell, corner, method or seed: {name: {run: numbers}}."""
    groups = {}
    for run, r in results.items():
        groups.setdefault(getattr(run, by), {})[run] = r
    return groups


def having(results: dict[tuple, dict], start: str) -> dict[tuple, dict]:
    """The runs that have a part whose name starts so."""
    return {run: r for run, r in results.items() if any(part.startswith(start) for part in r)}


def with_common_seeds(results: dict[tuple, dict]) -> dict[tuple, dict]:
    """The runs whose seed every cell has. Means over cells are of these."""
    seeds = [{run.seed for run in runs} for runs in grouped(results, "cell").values()]
    return {run: r for run, r in results.items() if all(run.seed in of_cell for of_cell in seeds)}


def part_of(r: dict, part: str) -> dict:
    """A part of a run: "main/none" is its part "main" without guidance."""
    return functools.reduce(dict.__getitem__, part.split("/"), r)


def mean_of(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Reads the mean of a metric over a model's pictures."""
    return lambda r: part_of(r, part)["means"][who][metric]


def gain_of(part: str, who: str) -> Callable[[dict], float]:
    """Reads (a model's reward - the base's without guidance) / (what the unguarded model gains without guidance),
    because rewards have different units."""
    def fraction(r: dict) -> float:
        base, unguarded = (mean_of("main/none", name, "reward")(r) for name in ("base", "unguarded"))
        return (mean_of(part, who, "reward")(r) - base) / (unguarded - base or math.nan)
    return fraction


def preference(part: str, pair: str) -> Callable[[dict], float]:
    """Reads how often the judge prefers A, of a pair "A vs B", less one half. A tie counts one half."""
    a, b = pair.split(" vs ")

    def read(r: dict) -> float:
        verdicts = part_of(r, part)["verdicts"]
        win, tie, loss = verdicts[pair][:3] if pair in verdicts else verdicts[f"{b} vs {a}"][2::-1]
        return (win + tie / 2) / (win + tie + loss) - 0.5
    return read


def ratio(who: str, norm: str, part: str) -> Callable[[dict], float]:
    """Reads a model's norm ratio less 1; `norm` is one of NORMS."""
    return lambda r: NORMS[norm](part_of(r, part)["ratio"][who]) - 1


# ---------------------------------------------------------------- a model over guidance

def scales_of(part: dict) -> list[str]:
    """The guidance scales of a part, from none to the highest."""
    return [scale for scale, numbers in part.items() if isinstance(numbers, dict) and "means" in numbers]


def over_guidance(part: dict, who: str) -> tuple[list[float], list[float]]:
    """A model's reward and how good it is judged, at each guidance scale."""
    means = [part[scale]["means"][who] for scale in scales_of(part)]
    return [m["reward"] for m in means], [m["judge/overall"] for m in means]


def good_at(target: float, rewards: list[float], good: list[float]) -> float:
    """How good a model is judged at the lowest guidance at which its reward reaches a target, interpolated between two
    scales; NaN if it never does."""
    reached = [i for i, reward in enumerate(rewards) if reward >= target]
    if not reached:
        return math.nan
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(target, rewards[around], good[around]))


def model_point(r: dict, part: str, who: str) -> dict[str, float]:
    """A model's numbers: its reward and how good it is judged at each guidance scale, over guidance, and where its
    reward reaches the base's with guidance ("good at equal reward"); and with guidance its norm ratio and how often a
    guard is preferred to it."""
    numbers, scale = {}, BOTH[1]
    for at in scales_of(r[part]):
        means = r[part][at]["means"][who]
        numbers |= {f"reward, {at}": means["reward"], f"good, {at}": means["judge/overall"]}
    if norms := r[part][scale]["ratio"].get(who):
        numbers |= {f"highest, {scale}": NORMS["highest"](norms), f"mean, {scale}": NORMS["overall"](norms)}
    for guard in ("guarded", "guided"):
        if guard != who:
            numbers[f"{guard} preferred, {scale}"] = preference(f"{part}/{scale}", f"{guard} vs {who}")(r)
    rewards, good = over_guidance(r[part], who)
    target = r[part][BOTH[1]]["means"]["base"]["reward"]
    numbers |= {"good at equal reward": good_at(target, rewards, good), "good over guidance": float(np.mean(good))}
    return numbers


# ---------------------------------------------------------------- differences and verdicts

@functools.cache
def quantile(df: float) -> float:
    """The 97.5 % quantile of Student's t, by integrating its density."""
    x = np.linspace(0, 100, 1_000_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * x[1]
    return float(np.interp(0.475, area, x[1:]))


def paired(results: dict[tuple, dict], a: Callable[[dict], float],
           b: Callable[[dict], float] = lambda r: 0.0) -> dict:
    """The mean of a - b over cells, and half its 95 % interval ("half"). NaN where a number is missing; with only one
    seed there is no interval.

    Cells are fixed; seeds are the sample. The runs of a seed share their LoRA's start, prompts and noise in all cells,
    so their errors are correlated. Therefore each seed counts once: Student's t of the seeds' means over cells. Only
    seeds that all cells have are used."""
    cells = grouped(with_common_seeds(results), "cell")
    values = [[(a(runs[run]), b(runs[run])) for run in sorted(runs)] for runs in cells.values()]
    values = np.array(values or [[(math.nan, math.nan)]])  # (cells, seeds, 2)
    seeds, differences = values.shape[1], values[..., 0] - values[..., 1]
    half = math.nan
    if seeds > 1:
        half = quantile(seeds - 1) * differences.mean(0).std(ddof=1) / math.sqrt(seeds)
    mean_a, mean_b = values.mean((0, 1))
    return {"a": float(mean_a), "b": float(mean_b), "difference": float(mean_a - mean_b), "half": float(half),
            "cells": len(cells), "seeds": seeds if cells else 0}


def verdict(d: dict, sign: int, at_most: float = 0.0) -> str:
    """Compare a claim with a difference's interval. The claim: the difference has this sign (1 or -1), or, with sign 0,
    it is `at_most` this much."""
    if math.isnan(d["half"]):
        return "no interval"  # one seed, or a number is missing
    low, high = d["difference"] - d["half"], d["difference"] + d["half"]
    if sign == 0:
        if low > at_most:
            return "**contradicted**"
        return "holds" if high <= at_most else "not resolved"
    if low <= 0 <= high:
        return "not resolved"
    return "holds" if (low > 0) == (sign > 0) else "**contradicted**"


# ---------------------------------------------------------------- claim 10: rivals at equal reward

def rival_parts(rival: str, method: str) -> list[str]:
    """The names of the parts that measure a rival with a method, from its weakest strength to its greatest."""
    return [f"rival: {rival} {strength:g}" for strength in RIVALS[rival].strengths_of(method)]


def same_models(r: dict, part: str) -> bool:
    """Was a part measured with the weights and code of the run's unguarded model?"""
    main, other = (r[name].get("of", {}) for name in ("main", part))
    return all(main.get(what) == other.get(what) for what in ("weights", "code"))


def points_of(run: tuple, r: dict, rival: str) -> list[dict]:
    """A run's points, from the unguarded model to the rival's greatest strength: `model_point`, and the reward on
    training prompts. [] if a strength is missing or was measured with other weights or code than the unguarded model.
    """
    parts = rival_parts(rival, run.method)
    if not all(part in r and same_models(r, part) for part in parts):
        return []
    models = ("main", "unguarded"), *((part, "rival") for part in parts)
    return [{**model_point(r, *of), "training reward": r[of[0]]["training reward"][of[1]]} for of in models]


def crossing(rewards: np.ndarray, target: float) -> tuple[int, float] | None:
    """Where a curve of rewards falls below a target for the last time: (i, the fraction of the way from point i to the
    next). None if it ends above the target."""
    last = max((i for i, reward in enumerate(rewards) if reward >= target), default=0)
    if last == len(rewards) - 1:
        return None
    return last, max(0.0, (rewards[last] - target) / (rewards[last] - rewards[last + 1]))


def at_reward(points: dict[tuple, list[dict]], key: str, targets: dict[tuple, float]) -> tuple | None:
    """For each run of one cell, the numbers at the strength where the cell's mean reward is the mean target: ({run:
    numbers}, i, the fraction of the way from strength i to the next). None if even the last has more reward.
    points: {run: numbers at each strength}; key: which number is the reward; targets: {run: reward}.

    All seeds of the cell get the same strength, by their mean reward. Numbers are interpolated between two strengths.
    Few seeds make the choice uncertain. So each run's numbers are moved along the curve as far as its reward is from
    its own target. This leaves their mean, and adds the choice's error to their spread (delta method)."""
    curves = {name: np.array([[point[name] for point in of_run] for of_run in points.values()])
              for name in next(iter(points.values()))[-1]}  # {number: (runs, strengths)}
    rewards, aims = curves[key], np.array([targets[run] for run in points])
    found = crossing(rewards.mean(0), aims.mean())
    if found is None:
        return None
    i, fraction = found
    reward_step = rewards[:, i + 1] - rewards[:, i]
    missed = (aims - (rewards[:, i] + fraction * reward_step)) / reward_step.mean()
    chosen = {}
    for name, curve in curves.items():
        step = curve[:, i + 1] - curve[:, i]
        chosen[name] = curve[:, i] + fraction * step + missed * step.mean()
    numbers = {run: {name: float(x[k]) for name, x in chosen.items()} for k, run in enumerate(points)}
    return numbers, i, fraction


def equal_reward(runs: dict[tuple, dict], rival: str, target: Callable[[tuple], tuple[str, str]],
                 keep: float = 1.0) -> tuple | None:
    """A rival at the strength at which it keeps a fraction of a target's gain in reward without guidance, in the runs
    of one cell. target(run) is a part and a model in it.

    Returns ({run: its numbers, as points_of gives them}, the strength); ({}, None) if even the greatest strength has
    more reward; None if not every strength was measured.

    The strength is chosen on training prompts. The aim is base + keep * gain, where the gain is the target's or the
    unguarded model's, whichever is less on average over seeds."""
    points = {run: points_of(run, r, rival) for run, r in runs.items()}
    points = {run: of_run for run, of_run in points.items() if of_run}
    if not points:
        return None
    strengths = RIVALS[rival].none, *RIVALS[rival].strengths_of(next(iter(points)).method)
    rewards = {run: runs[run]["main"]["training reward"] for run in points}
    aimed = {run: runs[run][part]["training reward"][who] for run, (part, who) in zip(points, map(target, points))}
    unguarded = {run: reward["unguarded"] for run, reward in rewards.items()}
    lesser = min(unguarded, aimed, key=lambda of_run: sum(of_run.values()))
    targets = {run: reward["base"] + keep * (lesser[run] - reward["base"]) for run, reward in rewards.items()}
    found = at_reward(points, "training reward", targets)
    if found is None:
        return {}, None
    compared, i, fraction = found
    return compared, strengths[i] + fraction * (strengths[i + 1] - strengths[i])
