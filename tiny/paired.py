"""Numbers of runs, compared by run: differences with their intervals, and rivals at equal reward.

A run is a NamedTuple (base, method, reward, seed) whose `cell` is the run but for its seed; results[run] are its parts'
numbers. "Paired" is always by run: the same cell and seed, the same prompts and noise.
"""
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from guards import RIVALS

METRICS = {  # metric: label, digits
    "reward": ("reward, share of the gain", 3),
    "other reward": ("other reward, share of the gain", 3),
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


@functools.cache
def quantile(df: float) -> float:
    """Student's t, 97.5 %, by integrating its density."""
    x = np.linspace(0, 100, 1_000_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * x[1]
    return float(np.interp(0.475, area, x[1:]))


def paired(results: dict[tuple, dict], a: Callable[[dict], float],
           b: Callable[[dict], float] = lambda r: 0.0) -> dict:
    """a - b, paired by run: the mean over cells and its 95 % interval. The cells are given, the seeds are the sample. A
    seed's runs start from the same LoRA, with the same prompts and noise, whatever their cell, so that they err
    together, and a seed counts once: Student's t of the seeds' means over cells (written as the cluster-robust
    variance, which is the same thing where each cell has each seed). No interval (NaN) if a cell has one seed."""
    cells = {run.cell: {} for run in results}
    for run, r in results.items():
        cells[run.cell][run.seed] = a(r), b(r)
    means, differences, off = [], [], {run.seed: 0.0 for run in results}  # off: by how much a seed moves the mean
    for by_seed in cells.values():
        values = np.array(list(by_seed.values()))
        means.append(values.mean(0))
        differences.append(values[:, 0] - values[:, 1])
        for seed, own in zip(by_seed, differences[-1] - differences[-1].mean()):
            off[seed] += own / len(by_seed) / len(cells)
    half, seeds = math.nan, len(off)
    if min(map(len, differences)) > 1:
        half = quantile(seeds - 1) * math.sqrt(seeds / (seeds - 1) * sum(x**2 for x in off.values()))
    mean_a, mean_b = np.mean(means, axis=0)
    return {
        "a": float(mean_a),
        "b": float(mean_b),
        "difference": float(mean_a - mean_b),
        "half": half,
        "cells": len(cells),
        "cells larger": sum(bool(d.mean() > 0) for d in differences),
        "runs": len(results),
        "runs larger": int(sum((d > 0).sum() for d in differences)),
    }


def verdict(d: dict, claimed: int, at_most: float = 0.0) -> str:
    """What the interval of a difference says of the claim that it has this sign (+1, -1); or, with 0, that it is
    `at_most` so much."""
    if math.isnan(d["half"]):
        return "one seed: no interval"
    low, high = d["difference"] - d["half"], d["difference"] + d["half"]
    if claimed == 0:
        if low > at_most:
            return "**contradicted**"
        return "holds" if high <= at_most else "not resolved"
    if low <= 0 <= high:
        return "not resolved"
    return "holds" if (low > 0) == (claimed > 0) else "**contradicted**"


def part_of(r: dict, part: str) -> dict:
    """A run's part, "few/4" being its part few at 4 steps."""
    return functools.reduce(lambda d, key: d[key], part.split("/"), r)


def raw(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Reads a mean."""
    return lambda r: part_of(r, part)["means"][who][metric]


def of(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Reads a mean; a reward as the share of what the unguarded model has gained over the base: rewards have units of
    their own."""
    if "reward" not in metric:
        return raw(part, who, metric)

    def share(r: dict) -> float:
        """0 is the base, 1 the unguarded model."""
        base, unguarded = (raw("main", name, metric)(r) for name in ("base", "unguarded"))
        return (raw(part, who, metric)(r) - base) / (unguarded - base or math.nan)
    return share


def rate(part: str, pair: str) -> Callable[[dict], float]:
    """Reads how often the judge prefers the first one of a pair, less one half; a tie is half."""
    first, second = pair.split(" vs ")

    def read(r: dict) -> float:
        """In [-1/2, 1/2]."""
        verdicts = part_of(r, part)["verdicts"]
        win, tie, loss, _ = verdicts[pair] if pair in verdicts else verdicts[f"{second} vs {first}"][2::-1] + [0]
        return (win + tie / 2) / (win + tie + loss) - 0.5
    return read


def ratio(who: str, pick: Callable[[dict], float], part: str = "main") -> Callable[[dict], float]:
    """Reads the norm ratio less 1: over the whole trajectory, or its highest or lowest step."""
    return lambda r: pick(r[part]["ratio"][who]) - 1


def overall(norms: dict) -> float:
    """Over the whole trajectory."""
    return norms["overall"]


def highest(norms: dict) -> float:
    """Of the steps' means."""
    return max(norms["mean"])


def excess(norms: dict) -> float:
    """1, or the highest step if that is above: a norm that is too short in one run makes good for no other's excess."""
    return max(1.0, highest(norms))


def lowest(norms: dict) -> float:
    """Of the steps' means."""
    return min(norms["mean"])


def cells_of(results: dict[tuple, dict]) -> dict[str, list[dict]]:
    """Each cell's runs."""
    cells = {run.cell: [] for run in results}
    for run, r in results.items():
        cells[run.cell].append(r)
    return cells


def corners_of(results: dict[tuple, dict]) -> dict[str, dict[tuple, dict]]:
    """The runs of each base and reward."""
    corners = {}
    for run, r in results.items():
        corners.setdefault(f"{run.base}, {run.reward}", {})[run] = r
    return corners


def has(results: dict[tuple, dict], part: str) -> dict[tuple, dict]:
    """The runs that have it."""
    return {run: r for run, r in results.items() if part in r}


def has_any(results: dict[tuple, dict], kind: str) -> dict[tuple, dict]:
    """The runs that have a part of this kind: a guard, a rival."""
    return {run: r for run, r in results.items() if any(part.startswith(kind) for part in r)}


def read_json(path: Path) -> dict:
    """{} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


# ---------------------------------------------------------------- claim 10: rivals at equal reward

def point_of(r: dict, part: str, who: str) -> dict:
    """What a part shows of a model: each metric, how often the guarded picture is preferred to its own, less one half,
    and the norm's highest step."""
    return {**r[part]["means"][who], "preferred": rate(part, f"guarded vs {who}")(r),
            "highest": highest(r[part]["ratio"][who])}


def points_of(run: tuple, r: dict, rival: str) -> list[dict]:
    """What a run, of numbers r, shows as a rival grows stronger, the unguarded model first: `point_of`, and the reward
    on training prompts. [] if a strength is missing, or was measured beside other weights or code than the unguarded
    model."""
    parts = [f"rival: {rival} {strength:g}" for strength in RIVALS[rival].of(run.method)]
    if not all(part in r for part in parts) or len({made_with(r[part]) for part in ("main", *parts)}) > 1:
        return []
    points = []
    for part, who in (("main", "unguarded"), *((part, "rival") for part in parts)):
        points.append({**point_of(r, part, who), "training reward": r[part]["training reward"][who]})
    return points


def made_with(part: dict) -> tuple:
    """The weights and code that a part's numbers come from."""
    return tuple(part.get("of", {}).get(what) for what in ("weights", "code"))


def at_reward(rewards: list[float], target: float) -> tuple[int, float, bool]:
    """Where a curve of rewards, from weak to strong, last passes below a target that its first point has: (i, share,
    True), a share of the way from point i to the next. Where it never does, its end: (i, 0, False)."""
    last = max(i for i, reward in enumerate(rewards) if i == 0 or reward >= target)
    if last == len(rewards) - 1:
        return last, 0.0, False
    return last, max(0.0, (rewards[last] - target) / (rewards[last] - rewards[last + 1])), True


def equal_reward(runs: dict[tuple, dict], rival: str, keep: float | None = 1.0) -> tuple[dict, float | None]:
    """The runs of one cell, with a rival as strong as it may be: its metrics ("rival") beside the guarded model's; and
    its strength, None where the strengths end before that. The strength is one for the cell, and chosen on training
    prompts: the mean reward over the cell's seeds keeps this share of the guarded or the unguarded model's gain,
    whichever is less. With None, it is the weakest that was measured, as it is.

    Chosen by so few seeds, a strength is uncertain itself. So each run's metrics are moved along the rival's curve by
    as much as its own reward misses its own target: their mean stays what it is, and their spread holds the choice's
    error too (the delta method)."""
    points = {run: found for run, r in runs.items() if (found := points_of(run, r, rival))}
    if not points:
        return {}, None
    curves = {key: np.array([[point[key] for point in found] for found in points.values()])
              for key in next(iter(points.values()))[0]}  # (runs, strengths) each
    strengths = (RIVALS[rival].none, *RIVALS[rival].of(next(iter(points)).method))
    at, strength = {key: curve[:, 1] for key, curve in curves.items()}, strengths[1]
    if keep is not None:
        own = [runs[run]["main"]["training reward"] for run in points]
        base, *reached = (np.array([reward[who] for reward in own]) for who in ("base", "unguarded", "guarded"))
        targets = base + keep * (min(reached, key=np.mean) - base)
        i, share, passed = at_reward(list(curves["training reward"].mean(0)), targets.mean())
        strength = strengths[i] + share * (strengths[i + 1] - strengths[i]) if passed else None
        if passed:
            step = {key: curve[:, i + 1] - curve[:, i] for key, curve in curves.items()}
            at = {key: curve[:, i] + share * step[key] for key, curve in curves.items()}
            missed = targets - at["training reward"]
            at = {key: x + missed * step[key].mean() / step["training reward"].mean() for key, x in at.items()}
    met = {}
    for k, run in enumerate(points):
        met[run] = {"rival": {key: float(x[k]) for key, x in at.items()},
                    **{who: runs[run]["main"]["means"][who] for who in ("base", "unguarded", "guarded")}}
    return met, strength


def mean_points(runs: dict[tuple, dict], rival: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A rival's curve, the mean over runs: rewards as shares of the gain, and a metric."""
    points = [points_of(run, r, rival) for run, r in runs.items()]
    x = np.array([[p["reward"] for p in of_run] for of_run in points])  # (runs, strengths)
    y = np.array([[p[metric] for p in of_run] for of_run in points])
    means = [r["main"]["means"] for r in runs.values()]
    base, unguarded = (np.array([[m[who]["reward"]] for m in means]) for who in ("base", "unguarded"))
    return ((x - base) / (unguarded - base)).mean(0), y.mean(0)
