"""Statistics over runs: paired differences with confidence intervals, and rivals at equal reward.

results: {run: the numbers of its parts}. A run is a NamedTuple (base, method, reward, seed); its `cell` is all of that
but the seed. Runs are compared in pairs: same cell and seed, so same prompts and noise. A "reader" is a function that
takes the numbers of a run and returns one of them.
"""
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from guards import RIVALS

METRICS = {  # metric: (label, digits)
    "reward": ("reward, fraction of the gain", 3),
    "other reward": ("other reward, fraction of the gain", 3),
    "judge/overall": ("judged good", 3),
    "judge/oversaturation": ("judged oversaturated", 3),
    "judge/over-sharpening": ("judged over-sharpened", 3),
    "judge/unnatural lighting": ("judged unnaturally lit", 3),
    "judge/artifacts": ("judged to have artifacts", 3),
    "P(real)": ("detector's P(real)", 3),
    "FD": ("Fréchet distance", 2),
    "saturation": ("saturation", 3),
    "sharpness": ("sharpness", 4),
}
NORMS = {  # the norm ratio over a sampling trajectory, in one number
    "overall": lambda norms: norms["overall"],
    "highest": lambda norms: max(norms["mean"]),  # the highest step
    "lowest": lambda norms: min(norms["mean"]),
    "excess": lambda norms: max(1.0, *norms["mean"]),  # a short norm in one run offsets no excess in another
}


def read_json(path: Path) -> dict:
    """A JSON file; {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# ---------------------------------------------------------------- choosing runs and numbers

def grouped(results: dict[tuple, dict], by: str) -> dict[str, dict[tuple, dict]]:
    """Split runs by their cell, corner or method: {name: {run: numbers}}."""
    groups = {}
    for run, r in results.items():
        groups.setdefault(getattr(run, by), {})[run] = r
    return groups


def having(results: dict[tuple, dict], start: str) -> dict[tuple, dict]:
    """The runs that have a part whose name starts so."""
    return {run: r for run, r in results.items() if any(part.startswith(start) for part in r)}


def part_of(r: dict, part: str) -> dict:
    """A part of a run; "few/4" is its part "few" at 4 steps."""
    for key in part.split("/"):
        r = r[key]
    return r


def mean_of(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Reads the mean of a metric over a model's pictures."""
    return lambda r: part_of(r, part)["means"][who][metric]


def scaled(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Like `mean_of`, but a reward is given as a fraction of the gain: 0 is the base, 1 the unguarded model. Rewards
    differ in their units."""
    if "reward" not in metric:
        return mean_of(part, who, metric)

    def fraction(r: dict) -> float:
        base, unguarded = (mean_of("main", name, metric)(r) for name in ("base", "unguarded"))
        return (mean_of(part, who, metric)(r) - base) / (unguarded - base or math.nan)
    return fraction


def preference(part: str, pair: str) -> Callable[[dict], float]:
    """Reads how often the judge prefers A, of a pair "A vs B", less one half. A tie counts one half."""
    a, b = pair.split(" vs ")

    def read(r: dict) -> float:
        verdicts = part_of(r, part)["verdicts"]
        win, tie, loss = verdicts[pair][:3] if pair in verdicts else verdicts[f"{b} vs {a}"][2::-1]
        return (win + tie / 2) / (win + tie + loss) - 0.5
    return read


def ratio(who: str, norm: str, part: str = "main") -> Callable[[dict], float]:
    """Reads a model's norm ratio less 1; `norm` is one of NORMS."""
    return lambda r: NORMS[norm](r[part]["ratio"][who]) - 1


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
    """The mean of a - b over cells, and half its 95 % interval ("half"; NaN if a cell has only one seed).

    Cells are fixed; seeds are the sample. The runs of a seed share their LoRA's start, prompts and noise in all cells,
    so their errors are correlated. Therefore each seed counts once: Student's t of the seeds' means over cells. It is
    computed as a cluster-robust variance, which also covers cells that lack a seed and otherwise gives the same."""
    means, differences = [], []  # of each cell
    deviations = {run.seed: 0.0 for run in results}  # how far each seed moves the mean
    for runs in grouped(results, "cell").values():
        values = np.array([(a(r), b(r)) for r in runs.values()])
        difference = values[:, 0] - values[:, 1]
        means.append(values.mean(0))
        differences.append(difference)
        for run, deviation in zip(runs, difference - difference.mean()):
            deviations[run.seed] += deviation / len(runs)
    half, cells, seeds = math.nan, len(means), len(deviations)
    if min(map(len, differences)) > 1:
        variance = sum((x / cells) ** 2 for x in deviations.values()) * seeds / (seeds - 1)
        half = quantile(seeds - 1) * math.sqrt(variance)
    mean_a, mean_b = np.mean(means, axis=0)
    return {
        "a": float(mean_a),
        "b": float(mean_b),
        "difference": float(mean_a - mean_b),
        "half": half,
        "cells": cells,
        "cells larger": sum(bool(d.mean() > 0) for d in differences),
        "runs": len(results),
        "runs larger": int(sum((d > 0).sum() for d in differences)),
    }


def verdict(d: dict, sign: int, at_most: float = 0.0) -> str:
    """Compare a claim with a difference's interval. The claim: the difference has this sign (1 or -1), or, with sign 0,
    it is `at_most` this much."""
    if math.isnan(d["half"]):
        return "one seed: no interval"
    low, high = d["difference"] - d["half"], d["difference"] + d["half"]
    if sign == 0:
        if low > at_most:
            return "**contradicted**"
        return "holds" if high <= at_most else "not resolved"
    if low <= 0 <= high:
        return "not resolved"
    return "holds" if (low > 0) == (sign > 0) else "**contradicted**"


# ---------------------------------------------------------------- claim 10: rivals at equal reward

def point_of(r: dict, part: str, who: str) -> dict:
    """A model's metrics in a part, how often the guarded picture is preferred to its own (less one half), and the
    highest step of its norm ratio."""
    return {**r[part]["means"][who], "preferred": preference(part, f"guarded vs {who}")(r),
            "highest": NORMS["highest"](r[part]["ratio"][who])}


def points_of(run: tuple, r: dict, rival: str) -> list[dict]:
    """A run's points, from the unguarded model to the rival's greatest strength: `point_of`, and the reward on training
    prompts. [] if a strength is missing or was measured with other weights or code than the unguarded model."""
    parts = [f"rival: {rival} {strength:g}" for strength in RIVALS[rival].strengths_of(run.method)]
    if not all(part in r for part in parts):
        return []
    hashes = [r[part].get("of", {}) for part in ("main", *parts)]
    if len({(of.get("weights"), of.get("code")) for of in hashes}) > 1:
        return []
    points = []
    for part, who in (("main", "unguarded"), *((part, "rival") for part in parts)):
        points.append({**point_of(r, part, who), "training reward": r[part]["training reward"][who]})
    return points


def crossing(rewards: np.ndarray, target: float) -> tuple[int, float] | None:
    """Where a curve of rewards falls below a target for the last time: (i, the fraction of the way from point i to the
    next). None if it ends above the target."""
    last = max((i for i, reward in enumerate(rewards) if reward >= target), default=0)
    if last == len(rewards) - 1:
        return None
    return last, max(0.0, (rewards[last] - target) / (rewards[last] - rewards[last + 1]))


def equal_reward(runs: dict[tuple, dict], rival: str, keep: float | None = 1.0) -> tuple[dict, float | None] | None:
    """A rival at the strength at which it keeps a fraction of the guard's gain in reward, in the runs of one cell.

    Returns ({run: metrics of "rival", "base", "unguarded" and "guarded"}, the strength); ({}, None) if even the
    greatest strength keeps more; None if not every strength was measured. `keep` None: the weakest strength.

    All seeds of the cell get the same strength, chosen on training prompts: there the seeds' mean reward keeps `keep`
    of the guarded or of the unguarded model's gain, whichever is less. Metrics are interpolated between two strengths.
    Few seeds make the choice uncertain. So each run's metrics are moved along the rival's curve as far as its reward is
    from its own target. This leaves their mean, and adds the choice's error to their spread (delta method)."""
    points = {run: points_of(run, r, rival) for run, r in runs.items()}
    points = {run: of_run for run, of_run in points.items() if of_run}
    if not points:
        return None
    first_run, first_points = next(iter(points.items()))
    strengths = RIVALS[rival].none, *RIVALS[rival].strengths_of(first_run.method)
    curves = {}  # {metric: (runs, strengths)}
    for metric in first_points[0]:
        curves[metric] = np.array([[point[metric] for point in of_run] for of_run in points.values()])
    if keep is None:
        strength, chosen = strengths[1], {metric: curve[:, 1] for metric, curve in curves.items()}
    else:
        measured = [runs[run]["main"]["training reward"] for run in points]
        base, unguarded, guarded = (np.array([r[who] for r in measured]) for who in ("base", "unguarded", "guarded"))
        targets = base + keep * (min(unguarded, guarded, key=np.mean) - base)  # (runs,)
        rewards = curves["training reward"]
        found = crossing(rewards.mean(0), targets.mean())
        if found is None:
            return {}, None
        i, fraction = found
        strength = strengths[i] + fraction * (strengths[i + 1] - strengths[i])
        reward_step = rewards[:, i + 1] - rewards[:, i]
        missed = (targets - (rewards[:, i] + fraction * reward_step)) / reward_step.mean()
        chosen = {}
        for metric, curve in curves.items():
            step = curve[:, i + 1] - curve[:, i]
            chosen[metric] = curve[:, i] + fraction * step + missed * step.mean()
    compared = {}
    for k, run in enumerate(points):
        means = runs[run]["main"]["means"]
        compared[run] = {who: means[who] for who in ("base", "unguarded", "guarded")}
        compared[run]["rival"] = {metric: float(values[k]) for metric, values in chosen.items()}
    return compared, strength


def mean_points(runs: dict[tuple, dict], rival: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A rival's curve, averaged over runs: rewards as fractions of the gain, and a metric. (strengths,) each."""
    points = [points_of(run, r, rival) for run, r in runs.items()]
    x = np.array([[p["reward"] for p in of_run] for of_run in points])  # (runs, strengths)
    y = np.array([[p[metric] for p in of_run] for of_run in points])
    means = [r["main"]["means"] for r in runs.values()]
    base, unguarded = (np.array([[m[who]["reward"]] for m in means]) for who in ("base", "unguarded"))
    return ((x - base) / (unguarded - base)).mean(0), y.mean(0)
