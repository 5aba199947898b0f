"""RESULTS.md, results.json and the figures, from the numbers that reproduce.py has gathered.

A run is a NamedTuple (base, method, reward, seed) whose `cell` is the run but for its seed; results[run] are its parts' numbers.
"Paired" is always by run: the same cell and seed, the same prompts and noise.
"""
import functools
import json
import math
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

from eval_judge import plt

LAM = 0.05  # the default that is put to the test
COLOUR = {"base": "gray", "unguarded": "#c44e30", "guarded": "#2c6fbb"}
METRICS = {"reward": ("reward, share of the gain", 3), "other reward": ("other reward, share of the gain", 3), "judge/overall": ("judged good", 3),
           "judge/oversaturation": ("judged oversaturated", 3), "judge/over-sharpening": ("judged over-sharpened", 3),
           "judge/unnatural lighting": ("judged unnaturally lit", 3), "judge/artifacts": ("judged to have artifacts", 3), "P(real)": ("detector's P(real)", 3),
           "FD": ("Fréchet distance", 2), "saturation": ("saturation", 3), "sharpness": ("sharpness", 4)}  # metric: label, digits


# ---------------------------------------------------------------- statistics

@functools.cache
def quantile(df: float) -> float:
    """Student's t, 97.5 %, by integrating its density."""
    x = np.linspace(0, 100, 1_000_001)
    density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi) * (1 + x**2 / df) ** (-(df + 1) / 2)
    return float(np.interp(0.475, np.cumsum((density[1:] + density[:-1]) / 2) * x[1], x[1:]))


def paired(results: dict[tuple, dict], a: Callable[[dict], float], b: Callable[[dict], float] = lambda r: 0.0) -> dict:
    """a - b, paired by run: the mean over cells and its 95 % interval. The cells are given, the seeds are the sample: the variance is
    that of the cells' means, its degrees of freedom are Satterthwaite's. No interval (NaN) with one seed."""
    cells = {run.cell: [] for run in results}
    for run, r in results.items():
        cells[run.cell].append((a(r), b(r)))
    cells = {cell: np.array(values) for cell, values in cells.items()}
    differences = [v[:, 0] - v[:, 1] for v in cells.values()]
    parts = [d.var(ddof=1) / len(d) if len(d) > 1 else math.nan for d in differences]
    half = math.nan
    if not math.isnan(sum(parts)):
        df = sum(parts) ** 2 / sum(p**2 / (len(d) - 1) for p, d in zip(parts, differences)) if sum(parts) else 1
        half = quantile(round(df, 1)) * math.sqrt(sum(parts)) / len(cells)
    mean_a, mean_b = np.mean([v.mean(0) for v in cells.values()], axis=0)
    return {"a": float(mean_a), "b": float(mean_b), "difference": float(mean_a - mean_b), "half": half, "cells": len(cells),
            "cells larger": sum(bool(d.mean() > 0) for d in differences), "runs": len(results), "runs larger": int(sum((d > 0).sum() for d in differences))}


def verdict(d: dict, claimed: int, at_least: float = 0.0) -> str:
    """What the interval of a difference says of the claim that it has this sign (+1, -1); or, with 0, that it does not exceed `at_least`."""
    if math.isnan(d["half"]):
        return "one seed: no interval"
    low, high = d["difference"] - d["half"], d["difference"] + d["half"]
    if claimed == 0:
        return "**contradicted**" if low > at_least else "holds" if high <= at_least else "not resolved"
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
    """Reads a mean; a reward as the share of what the unguarded model has gained over the base: rewards have units of their own."""
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


# ---------------------------------------------------------------- tables

def pm(d: dict, digits: int = 3) -> str:
    """A difference with its interval."""
    return f"{d['difference']:+.{digits}f}" + ("" if math.isnan(d["half"]) else f" ± {d['half']:.{digits}f}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


def checks(numbers: dict, rows: list[tuple[str, dict, str]]) -> str:
    """A table of what is claimed, what was measured and the verdict."""
    numbers["checks"] = {claim: {**d, "verdict": said} for claim, d, said in rows}
    return markdown(["the paper's claim", "measured", "cells above 0", "verdict"],
                    [[claim, pm(d, 3 if abs(d["difference"]) > 0.01 else 4), f"{d['cells larger']} of {d['cells']}", said] for claim, d, said in rows])


def levels(results: dict[tuple, dict], columns: dict[str, tuple[str, str]], a: str, b: str, numbers: dict) -> str:
    """A table of each metric's mean in each column, which is a part and a name in it, and of column a less column b."""
    rows = []
    for metric, (label, digits) in METRICS.items():
        d = numbers[f"{a} - {b}: {label}"] = paired(results, of(*columns[a], metric), of(*columns[b], metric))
        values = [paired(results, of(*place, metric))["a"] for place in columns.values()]
        rows.append([label, *(f"{x:.{digits}f}" for x in values), pm(d, digits), f"{d['cells larger']} of {d['cells']}"])
    return markdown(["metric", *columns, f"{a} - {b}", "cells above 0"], rows)


def cells_of(results: dict[tuple, dict]) -> dict[str, list[dict]]:
    """Each cell's runs."""
    return {cell: [r for run, r in results.items() if run.cell == cell] for cell in dict.fromkeys(run.cell for run in results)}


def mean(runs: list[dict], read: Callable[[dict], float]) -> float:
    """Over runs."""
    return float(np.mean([read(r) for r in runs]))


def each(runs: list[dict], read: Callable[[dict], float], digits: int = 3) -> str:
    """Each seed's."""
    return " ".join(f"{read(r):.{digits}f}" for r in runs)


def claim_1(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Inflation."""
    def change(metric: str) -> dict:
        """By RL."""
        return paired(results, raw("main", "unguarded", metric), raw("main", "base", metric))

    inflated = paired(results, ratio("unguarded", overall))
    shares = [ratio("unguarded", overall)(r) for r in results.values()]
    table = checks(numbers, [("the norm exceeds the reference's", inflated, verdict(inflated, 1)), *(
        (claim, d := change(metric), verdict(d, sign)) for claim, metric, sign in (
            ("colours oversaturate: judged so", "judge/oversaturation", 1), ("saturation", "saturation", 1), ("pictures over-sharpen: judged so", "judge/over-sharpening", 1),
            ("sharpness", "sharpness", 1), ("light is unnatural: judged so", "judge/unnatural lighting", 1), ("judged good", "judge/overall", -1),
            ("Fréchet distance", "FD", 1)))])
    numbers["cells"] = {cell: {"ratio": [1 + ratio("unguarded", overall)(r) for r in runs], "highest step": [1 + ratio("unguarded", highest)(r) for r in runs]}
                        for cell, runs in cells_of(results).items()}
    rows = [[cell, each(runs, lambda r: 1 + ratio("unguarded", overall)(r)), each(runs, lambda r: 1 + ratio("unguarded", highest)(r)), *(
        f"{mean(runs, raw('main', 'base', m)):.{k}f} → {mean(runs, raw('main', 'unguarded', m)):.{k}f}" for m, k in (
            ("reward", 2), ("saturation", 2), ("sharpness", 4), ("FD", 1), ("judge/overall", 2)))] for cell, runs in cells_of(results).items()]
    renders = next(iter(bases.values()))["colours"]["renders"]
    return (f"Unguarded less base; {sum(0.05 <= x <= 0.15 for x in shares)} of {len(shares)} runs lie within the paper's 5 to 15 %, "
            f"{sum(x > 0.15 for x in shares)} above.\n\n{table}\n\nBase → unguarded (renders: saturation {renders['saturation']:.2f}, sharpness "
            f"{renders['sharpness']:.4f}):\n\n" + markdown(["cell", "norm ratio, each seed", "its highest step", "reward", "saturation", "sharpness",
                                                          "Fréchet distance", "judged good"], rows) + "\n\n![norm ratios](ASSETS/inflation.png)")


def claim_2(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Renormalization at inference."""
    reward, good = (paired(results, of("renorm", "match", m), of("renorm", "unguarded", m)) for m in ("reward", "judge/overall"))
    liked, guard = (paired(results, rate("renorm", pair)) for pair in ("match vs unguarded", "guarded vs match"))
    same = sum(r["renorm"]["means"]["match"] == r["renorm"]["means"]["cap"] for r in results.values())
    return ("`--renorm match` on the unguarded model, less the same model without it.\n\n" + checks(numbers, [
        ("it does not raise the reward (share of the gain)", reward, verdict(reward, 0)), ("nor is the picture judged good more often", good, verdict(good, 0)),
        ("nor preferred (less one half)", liked, verdict(liked, 0)), ("the guarded model is preferred to it (less one half)", guard, verdict(guard, 1))])
        + "\n\n" + levels(results, {"base": ("main", "base"), "unguarded": ("renorm", "unguarded"), "match": ("renorm", "match"),
                                  "guarded": ("renorm", "guarded")}, "match", "unguarded", numbers)
        + f"\n\n`--renorm cap` gives the same numbers in {same} of {len(results)} runs: nearly every velocity there is too long.")


def claim_3(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Adjoint sensitivity."""
    rows, names = [], {"base": [(part.split()[1], b[part]) for b in bases.values() for part in b if part.startswith("adjoint")],
                       "unguarded": [(run.reward, r["adjoint"]) for run, r in results.items()]}
    for name, reward in product(names, dict.fromkeys(run.reward for run in results)):
        some = [a for of_reward, a in names[name] if of_reward == reward]
        for of_what in ("reward", "energy") if some else ():
            t = np.array([a[of_what]["t_statistic"] for a in some])
            beyond, limit = int((np.abs(t) > quantile(some[0]["units"] - 1)).sum()), quantile(some[0]["units"] - 1)
            row = numbers[f"{name}, {reward}, {of_what}"] = {
                "steps": t.size, "beyond": beyond, "limit": limit, "largest t": np.abs(t).max(1).tolist(), "mean t": t.mean(0).tolist(),
                "cosine": [a[of_what]["half_batch_cosine"] for a in some], "same sign": [float(np.mean(a[of_what]["same_sign"])) for a in some]}
            said = "**contradicted**" if beyond > t.size / 2 else "holds" if beyond <= 0.1 * t.size else "mixed"
            rows.append([f"{name} models ({len(some)})", {"reward": reward, "energy": f"energy (control for {reward})"}[of_what], f"{beyond} of {t.size}",
                         f"{np.median(row['largest t']):.1f}", f"{np.median(row['same sign']):.2f}", f"{np.median(row['cosine']):.2f}",
                         said if of_what == "reward" else "a signal, as it must" if beyond > t.size / 2 else "**the control fails**"])
    return (f"\\|t\\| > {limit:.2f}: by chance one step in twenty. Units are prompts; the halves of the cosine share no prompt; medians over models.\n\n"
            + markdown(["models", "dR/ds of", "steps beyond", "largest \\|t\\|", "same sign", "cosine of half batches", "no coherent signal?"], rows)
            + "\n\n![sensitivities](ASSETS/adjoint.png)")


def claim_4(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """The guarded norm."""
    less, whole, high = (paired(results, ratio("guarded", overall), ratio("unguarded", overall)), paired(results, ratio("guarded", overall)),
                         paired(results, ratio("guarded", highest)))
    above = [ratio("guarded", highest)(r) for r in results.values()]
    rows = [[cell, *(each(runs, lambda r, pick=pick: pick(r["main"]["ratio"]["guarded"])) for pick in (overall, highest, lambda n: min(n["mean"])))]
            for cell, runs in cells_of(results).items()]
    return ("Norm ratio less 1.\n\n" + checks(numbers, [("lower than unguarded", less, verdict(less, -1)), ("not above the reference, over the trajectory", whole, verdict(whole, 0)),
                                                      ("nor at any step (the highest)", high, verdict(high, 0))])
            + f"\n\nThe highest step is above the reference by more than 2 % in {sum(x > 0.02 for x in above)} of {len(above)} runs, by more than 5 % in "
              f"{sum(x > 0.05 for x in above)}.\n\n" + markdown(["cell", "norm ratio, each seed", "highest step", "lowest step"], rows))


def claim_5_and_6(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Reward, judge, detector."""
    def change(metric: str) -> dict:
        """By the guard."""
        return paired(results, of("main", "guarded", metric), of("main", "unguarded", metric))

    lost, liked = paired(results, of("main", "unguarded", "reward"), of("main", "guarded", "reward")), paired(results, rate("main", "guarded vs unguarded"))
    over_base = paired(results, rate("main", "guarded vs base"))
    table = checks(numbers, [("5: of the reward's gain, no more than 5 % is lost", lost, verdict(lost, 0, 0.05)),
                             ("6: the judge prefers the guarded picture (less one half)", liked, verdict(liked, 1)),
                             *((f"6: {claim}", d := change(m), verdict(d, sign)) for claim, m, sign in (
                                 ("judged good", "judge/overall", 1), ("judged oversaturated", "judge/oversaturation", -1),
                                 ("judged over-sharpened", "judge/over-sharpening", -1), ("judged unnaturally lit", "judge/unnatural lighting", -1),
                                 ("detector's P(real)", "P(real)", 1), ("Fréchet distance", "FD", -1))),
                             ("(no claim: the guarded picture is preferred to the base's)", over_base, "")])
    rows = []
    for cell, runs in cells_of(results).items():
        wins = np.sum([r["main"]["verdicts"]["unguarded vs guarded"] for r in runs], axis=0)
        numbers[cell] = {m: {who: [raw("main", who, m)(r) for r in runs] for who in ("base", "unguarded", "guarded")} for m in METRICS} | {
            "guarded preferred, tie, unguarded preferred": [int(x) for x in wins[[2, 1, 0]]]}
        rows.append([cell, *(f"{mean(runs, raw('main', 'unguarded', m)):.{k}f} → {mean(runs, raw('main', 'guarded', m)):.{k}f}" for m, k in (
            ("reward", 3), ("judge/overall", 2), ("judge/oversaturation", 2), ("P(real)", 2), ("FD", 1))), f"{wins[2]} / {wins[1]} / {wins[0]}"])
    return (table + "\n\n" + levels(results, {who: ("main", who) for who in ("base", "unguarded", "guarded")}, "guarded", "unguarded", numbers)
            + "\n\nUnguarded → guarded:\n\n" + markdown(["cell", "reward", "judged good", "judged oversaturated", "P(real)", "Fréchet distance",
                                                       "judge prefers: guarded / tie / unguarded"], rows) + "\n\n![paired differences](ASSETS/differences.png)")


def claim_7(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Few steps."""
    few = [steps for steps in next(iter(results.values()))["few"] if steps.isdigit()]
    parts = {"all": "main", **{steps: f"few/{steps}" for steps in few}}

    def gain(part: str, metric: str) -> Callable[[dict], float]:
        """Of the guard."""
        return lambda r: of(part, "guarded", metric)(r) - of(part, "unguarded", metric)(r)

    rows = []
    for steps, (metric, claim, sign) in product(few, (("judge/overall", "judged good", 1), ("FD", "Fréchet distance", -1))):
        d = paired(results, gain(parts[steps], metric), gain("main", metric))
        rows.append((f"{claim}: guarded - unguarded at {steps} steps, less that at all", d, verdict(d, sign)))
    for steps in few:
        d = paired(results, rate(parts[steps], "guarded vs unguarded"), rate("main", "guarded vs unguarded"))
        rows.append((f"preference for the guarded picture at {steps} steps, less that at all", d, verdict(d, 1)))
    table = checks(numbers, rows)
    rows = []
    for metric, (label, digits) in METRICS.items():
        cells = []
        for steps, part in parts.items():
            d = numbers[f"{label}, {steps} steps"] = paired(results, of(part, "guarded", metric), of(part, "unguarded", metric))
            base = paired(results, of(part, "base", metric))["a"]
            cells += [f"{base:.{digits}f}: {d['b']:.{digits}f} → {d['a']:.{digits}f}", pm(d, digits)]
        rows.append([label, *cells])
    for steps, part in parts.items():
        numbers[f"guarded preferred, {steps} steps"] = paired(results, rate(part, "guarded vs unguarded"))
    rows.append(["guarded preferred, less one half", *(x for steps in parts for x in ("", pm(numbers[f"guarded preferred, {steps} steps"])))])
    return table + "\n\nBase: unguarded → guarded, and the difference:\n\n" + markdown(
        ["metric", *(x for steps in parts for x in (f"{steps} steps", "difference"))], rows)


def claim_8(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Early stopping."""
    rows, tables, last = [], [], max(name for r in results.values() for name in r["early"]["found"] if name != "guarded")
    for how in ("early, equal reward", "early, best judged"):
        some = numbers[how] = {"epochs": [int(r["early"]["chosen"][how]) for r in results.values()]}
        liked, good, gain = (paired(results, rate("early", f"guarded vs {how}")), *(
            paired(results, of("early", "guarded", m), of("early", how, m)) for m in ("judge/overall", "reward")))
        rows += [(f"{how}: the guarded picture is preferred (less one half)", liked, verdict(liked, 1)), (f"{how}: judged good", good, verdict(good, 1)),
                 (f"{how}: reward (share of the gain)", gain, verdict(gain, 1))]
        epochs = ", ".join(f"{e} ({some['epochs'].count(e)} runs)" for e in sorted(set(some["epochs"])))
        tables.append(f"**{how}**, epochs: {epochs}.\n\n" + levels(results, {"early": ("early", how), "guarded": ("early", "guarded")}, "guarded", "early", some))
    missed, at_end = (sum(x) for x in zip(*((not r["early"]["reached"], r["early"]["chosen"]["early, equal reward"] == last) for r in results.values())))
    return ("Guarded, at the end of training, less the unguarded run's checkpoint, of the eight, that first has equal reward (not lower by more than one standard "
            f"error; the best one where none has: {missed} of {len(results)} runs), or that the judge calls good most often; both chosen on training prompts. The "
            f"first is the last checkpoint in {at_end} runs: there, stopping earlier costs reward, and the comparison is that of claim 6.\n\n"
            + checks(numbers, rows) + "\n\n" + "\n\n".join(tables) + "\n\n![reward against verdict](ASSETS/early.png)")


def guards(results: dict[tuple, dict]) -> dict[str, dict[tuple, dict]]:
    """{guard: {run: its ratio, its metrics and how often it is preferred to the default}}, lam's values first."""
    found = {"lam 0": {}, f"lam {LAM}": {}}
    for run, r in results.items():
        for name, part in ((name, part) for name, part in r.items() if name.startswith("guard: ")):
            for guard, who in (("lam 0", "unguarded"), (f"lam {LAM}", "guarded"), (name.removeprefix("guard: "), "variant")):
                found.setdefault(guard, {})[run] = {**part["means"][who], "ratio": part["ratio"][who]["overall"], "default": part["means"]["guarded"],
                                                    "preferred": 0.0 if who == "guarded" else rate(name, f"{who} vs guarded")(r)}
    by_lam = sorted((name for name in found if name.startswith("lam")), key=lambda name: float(name.split()[1]))
    return {name: found[name] for name in (*by_lam, *sorted(found.keys() - by_lam))} if all(found.values()) else {}


def corners(results: dict[tuple, dict]) -> dict[str, dict[str, dict[tuple, dict]]]:
    """The guards of each base and reward that have any."""
    found = {}
    for base, reward in dict.fromkeys((run.base, run.reward) for run in results):
        if some := guards({run: r for run, r in results.items() if (run.base, run.reward) == (base, reward)}):
            found[f"{base}, {reward}"] = some
    return found


def claim_9(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Other guards."""
    tables, methods = [], list(dict.fromkeys(run.method for run in results))
    for corner, found in corners(results).items():
        rows, known = [], numbers.setdefault(corner, {})
        for name, some in found.items():
            row = known[name] = {m: paired(some, lambda r, m=m: r[m], lambda r, m=m: r["default"][m]) for m in ("reward", "judge/overall", "FD", "saturation")}
            row["ratio"] = {method: [r["ratio"] for run, r in some.items() if run.method == method] for method in methods}
            row["preferred"] = paired(some, lambda r: r["preferred"])
            rows.append([name, *(f"{np.mean(x):.3f}" if x else "-" for x in row["ratio"].values()), *(
                f"{row[m]['a']:.{k}f} ({pm(row[m], k)})" if name != f"lam {LAM}" else f"**{row[m]['a']:.{k}f}**" for m, k in (
                    ("reward", 3), ("judge/overall", 3), ("FD", 2), ("saturation", 3))), pm(row["preferred"]) if name != f"lam {LAM}" else "", str(len(some))])
        tables.append(f"**{corner}**\n\n" + markdown(["guard", *(f"norm ratio, {m}" for m in methods), "reward", "judged good", "Fréchet distance", "saturation",
                                                    "preferred to the default, less one half", "runs"], rows))
    return (f"In brackets: less lam {LAM} with NormGuard's own hinge, the default. On training prompts, with noise that no training saw; the default was fixed before.\n\n"
            + "\n\n".join(tables) + "\n\n![guards](ASSETS/ablation.png)")


# ---------------------------------------------------------------- figures

def save(figure, path: Path):
    """PNG."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_inflation(results: dict[tuple, dict], path: Path):
    """Norm ratio and saturation over training, and the ratio over t at its end; a column a method, a line a run."""
    methods = list(dict.fromkeys(run.method for run in results))
    figure, axes = plt.subplots(3, len(methods), figsize=(4 * len(methods), 8), layout="constrained", squeeze=False, sharey="row")
    for column, method in zip(axes.T, methods):
        for (run, r), who in product(results.items(), ("unguarded", "guarded")):
            if run.method == method:
                style = {"color": COLOUR[who], "linestyle": "-" if run.base == "sd3" else ":", "linewidth": 0.9, "alpha": 0.7}
                epochs = [e["epoch"] for e in r["main"]["curves"][who]]
                for axis, key in zip(column, ("norm_ratio", "saturation")):
                    axis.plot(epochs, [e[key] for e in r["main"]["curves"][who]], **style)
                column[2].plot(r["main"]["ratio"][who]["t"], r["main"]["ratio"][who]["mean"], **style)
        column[0].set(title=method.upper(), xlabel="epoch")
        column[1].set(xlabel="epoch")
        column[2].set(xlabel="t (1 is noise), at the end of training", xlim=(1.02, -0.02))
        for axis in column:
            axis.grid(alpha=0.3)
        for axis in column[::2]:
            axis.axhline(1, color="black", linewidth=0.8)
    for axis, label in zip(axes[:, 0], ("norm ratio to the reference", "saturation", "norm ratio to the reference")):
        axis.set_ylabel(label)
    handles = [plt.Line2D([], [], color=COLOUR[who], label=who) for who in ("unguarded", "guarded")]
    handles += [plt.Line2D([], [], color="gray", linestyle=style, label=base) for base, style in (("sd3", "-"), ("flux", ":"))]
    axes[0, 0].legend(handles=handles, fontsize=8)
    save(figure, path)


def draw_differences(results: dict[tuple, dict], path: Path):
    """Guarded minus unguarded: a dot a run, a bar a cell's mean; the band is the mean's 95 % interval."""
    metrics, cells = ("reward", "judge/overall", "judge/oversaturation", "P(real)", "FD", "saturation"), cells_of(results)
    figure, axes = plt.subplots(1, len(metrics), figsize=(2.3 * len(metrics) + 1, 0.27 * len(cells) + 1), layout="constrained", sharey=True)
    for axis, metric in zip(axes, metrics):
        d = paired(results, of("main", "guarded", metric), of("main", "unguarded", metric))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvspan(d["difference"] - d["half"], d["difference"] + d["half"], color=COLOUR["guarded"], alpha=0.2, linewidth=0)
        for i, runs in enumerate(cells.values()):
            values = [of("main", "guarded", metric)(r) - of("main", "unguarded", metric)(r) for r in runs]
            axis.plot(values, [i] * len(values), "o", color=COLOUR["guarded"], markersize=3, alpha=0.7)
            axis.plot(np.mean(values), i, "|", color="black", markersize=9)
        axis.set_title(METRICS[metric][0], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set(yticks=range(len(cells)), yticklabels=list(cells))
    axes[0].invert_yaxis()
    save(figure, path)


def draw_early(results: dict[tuple, dict], path: Path):
    """Reward against the judge's P(good): the unguarded run's checkpoints, and the guarded model at the end; a line and a star a run."""
    cells = list(cells_of(results))
    wide = min(6, len(cells))
    high = -(-len(cells) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(2.5 * wide + 0.6, 2.5 * high), layout="constrained", squeeze=False, sharey=True)
    for axis, cell in zip(axes.flat, cells):
        for found in (r["early"]["found"] for run, r in results.items() if run.cell == cell):
            checkpoints = [found[name] for name in found if name != "guarded"]
            axis.plot([f["reward"] for f in checkpoints], [f["overall"] for f in checkpoints], "o-", color=COLOUR["unguarded"], markersize=2.5, linewidth=0.9,
                      label="unguarded, its checkpoints")
            axis.plot(found["guarded"]["reward"], found["guarded"]["overall"], "*", color=COLOUR["guarded"], markersize=9, label="guarded, at the end")
        axis.set_title(cell, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("reward", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("judged good", fontsize=8)
    axes[0, 0].legend(*(x[:2] for x in axes[0, 0].get_legend_handles_labels()), fontsize=7, loc="lower left")
    save(figure, path)


def draw_adjoint(results: dict[tuple, dict], bases: dict[str, dict], path: Path):
    """t statistic of the batch's mean sensitivity at each step: each reward's above, the control's below; mean and range over models."""
    found = {"base models": [(base, part.split()[1], a) for base, b in bases.items() for part, a in b.items() if part.startswith("adjoint")],
             "unguarded models": [(run.base, run.reward, r["adjoint"]) for run, r in results.items()]}
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharey="row", sharex=True)
    for column, (title, some) in zip(axes.T, found.items()):
        for axis, of_what in zip(column, ("reward", "energy")):
            axis.axhspan(-2.13, 2.13, color="gray", alpha=0.2, linewidth=0)
            for i, (base, reward) in enumerate(dict.fromkeys(key[:2] for key in some)):
                runs = [a for *key, a in some if key == [base, reward]]
                t = np.array([a[of_what]["t_statistic"] for a in runs])
                style = {"color": plt.cm.Dark2.colors[i], "linestyle": "-" if base == "sd3" else "--"}
                axis.plot(runs[0]["t"], t.mean(0), linewidth=1.2, label=f"{base}, {reward}", **style)
                axis.fill_between(runs[0]["t"], t.min(0), t.max(0), alpha=0.15, linewidth=0, color=style["color"])
            axis.grid(alpha=0.3)
        column[0].set_title(title)
        column[1].set(xlabel="t (1 is noise)", xlim=(1.02, -0.02))
    for axis, label in zip(axes[:, 0], ("the reward: t statistic", "energy (control): t statistic")):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_ablation(results: dict[tuple, dict], path: Path):
    """Norm ratio, reward and verdict over lam; other forms of the guard to the right. A dot a run, a line the mean."""
    found, methods = corners(results), list(dict.fromkeys(run.method for run in results))
    panels = (("norm ratio", "ratio"), ("reward", "reward"), ("judged good", "judge/overall"), ("Fréchet distance", "FD"))
    figure, axes = plt.subplots(len(found), len(panels), figsize=(4 * len(panels), 3.8 * len(found)), layout="constrained", squeeze=False)
    for row, (corner, by_guard) in zip(axes, found.items()):
        lams = sum(name.startswith("lam") for name in by_guard)
        for axis, (title, metric) in zip(row, panels):
            for i, method in enumerate(methods):
                values = [[r[metric] for run, r in some.items() if run.method == method] for some in by_guard.values()]
                places = [x + 0.15 * (i - 1) for x in range(len(values))]
                for x, y in zip(places, values):
                    axis.plot([x] * len(y), y, "o", color=plt.cm.Dark2.colors[i], markersize=3, alpha=0.6)
                axis.plot(places[:lams], [np.mean(y) if y else math.nan for y in values[:lams]], color=plt.cm.Dark2.colors[i], linewidth=1, label=method)
            axis.axvline(lams - 0.5, color="gray", linewidth=0.8)
            axis.set(title=f"{title} ({corner})", xticks=range(len(by_guard)))
            axis.set_xticklabels(by_guard, rotation=60, ha="right", fontsize=8)
            axis.grid(alpha=0.3)
        row[0].axhline(1, color="black", linewidth=0.8)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


# ---------------------------------------------------------------- the report

READING = {  # claim: what we make of the numbers that are committed
    "1": "As the paper says, but for over-sharpening, of which there is next to nothing: colours turn loud, edges only a little harder. These pictures "
         "have no fine texture that could be over-sharpened. Inflation is largest at the noisy steps. The exception is DPO on FLUX, whose norm peaks at 1.12 to 1.23 at "
         "epochs 20 to 30 and then comes down by itself, and its pictures with it.",
    "2": "The miniature contradicts the paper: rescaling makes good more than half of what the judge sees and a third of the distance, for 4 % of the reward's gain. We think that the "
         "damage here is mostly loud colours, and that in whitened latents of smooth pictures the velocity's norm is nearly their contrast: to shrink it "
         "while sampling is to turn the colours down. What is co-adapted into the weights remains, and training with the guard does better in "
         "reward, distance and to the judge.",
    "3": "The miniature contradicts the paper on one reward and in part on the other. `hps` likes bright and contrasty pictures, by how it was made "
         "(tiny/README.md), so it gains to first order from longer velocities, and more so before RL has spent that gain. `pickscore`, which is "
         "nearly blind to contrast, comes near to the paper's claim once the model is trained. In neither is the signal as strong as the control's.",
    "4": "Over the trajectory, not at each step: the guard acts on each sample's norm at a random t, so that it leaves up to 7 % at the noisy steps, where RL "
         "pushes hardest, and has pushed the norm under the reference elsewhere. Nothing pulls it back up. Single runs of DPO on FLUX, where the unguarded "
         "norm comes down by itself, sink furthest.",
    "5 and 6": "The reward is preserved, and the judge agrees with the paper clearly in all cells but DPO on FLUX, where the unguarded pictures are good in the end: there "
               "the guard has nothing to repair and costs distance. The detector contradicts: it takes loud pictures for real. It knows samples by their softness "
               "(tiny/README.md) and has never seen loud colours among them, so on them its word is worth little. Against the base "
               "the guarded pictures are about as good to the judge, and further from renders: backdrops turn greyer.",
    "7": "The miniature contradicts the paper: the gain shrinks. At 4 and 2 steps all pictures lose contrast (see the base's saturation), "
         "so that an inflated norm makes up for what is missing instead of adding to what is there.",
    "8": "At equal reward the guarded model looks far better. In most runs no checkpoint has its reward before the end, and in many none at all. "
         "The checkpoint that looks as good to the judge is an early one (epoch 15 or before in 32 of 36 runs), on average with less than half of the gain "
         "in reward; it is nearer to the renders, as the base is.",
    "9": "lam 0.05 stands at the knee for both bases: 0.005 hardly holds the norm and the judge sees it, 0.5 costs about a tenth of the reward's gain, 5 more than "
         "half. A squared hinge wants ten times the lam, as its slope says, and forgives ten times more. Relative or absolute is all one here, where the "
         "reference's norm hardly varies; with other latents or sizes only a relative one can keep its lam. Per token, squared and with a margin, the norm ends nearer to the reference's, "
         "and the pictures nearer to the renders (not resolved for squared on FLUX). The judge prefers squared and absolute by 5 to 8 points in both tables, and per token by 18 in one. "
         "No form is better for distance and judge in both, so that the default stays the norm that the paper speaks of; per token is what to try first.",
}


def read_json(path: Path) -> dict:
    """{} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_text(path: Path, text: str):
    """Under another name first: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def rounded(x):
    """Floats at five digits: what is kept in the repository is to be small. NaN becomes null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    return (float(f"{x:.5g}") if math.isfinite(x) else None) if isinstance(x, float) else x


def has(results: dict[tuple, dict], part: str) -> dict[tuple, dict]:
    """The runs that have it."""
    return {run: r for run, r in results.items() if part in r}


def write_report(results: dict[tuple, dict], bases: dict[str, dict], size, home: Path, assets: Path):
    """home/RESULTS.md and home/results.json of all numbers that there are, and the figures in `assets`."""
    done, numbers, text = has(results, "main"), {}, []
    committed = assets == Path("assets")
    sections = (  # claim, title, whose numbers, text
        ("1", "RL inflates the velocity norm by 5 to 15 %, and pictures suffer where the reward does not see it", done, claim_1),
        ("2", "Rescaling to the reference's norm at inference neither improves reward nor repairs quality", has(done, "renorm"), claim_2),
        ("3", "The velocity's magnitude carries no coherent first-order reward signal at the batch level", has(done, "adjoint"), claim_3),
        ("4", "NormGuard holds the norm", done, claim_4), ("5 and 6", "It preserves the reward; judge and detector prefer it", done, claim_5_and_6),
        ("7", "Its gain grows at few steps", has(done, "few"), claim_7), ("8", "It is not early stopping", has(done, "early"), claim_8),
        ("9", "Our own choices: the hinge's form, margin and lam", results if corners(results) else {}, claim_9))
    for claim, title, some, write in sections:
        body = write(some, bases, numbers.setdefault(claim, {})) if some else "Not measured yet."
        reading = [READING[claim]] if committed and some and claim in READING else []
        text.append(f"## {claim}. {title}\n\n    python tiny/reproduce.py --only {claim[0]}\n\n" + "\n\n".join([*reading, body]))
    head = f"""# The paper's claims on the miniature

Written by `python tiny/reproduce.py`; the numbers are in `{home}/results.json`, what they come from in `{home}/results/`. {len(done)} runs of
{len(cells_of(done))} cells (base, method, reward) were trained without and with the guard, `--lam 0` and `--lam {LAM}`, the scripts' defaults otherwise; every comparison is
paired by run. Held-out prompts, {size.n} pictures each, {size.steps} steps unless said otherwise, the same noise for all. **±** is half a 95 % interval of the mean over
cells (Student's t): the cells and the prompts are given, the seeds are the sample. A share of the gain is (x - base) / (unguarded - base). "Holds"
and "contradicted" are what the interval says; the judge, the detector and the pictures are the miniature's own."""
    home.mkdir(parents=True, exist_ok=True)
    assets.mkdir(parents=True, exist_ok=True)
    write_text(home / "RESULTS.md", "\n\n".join([head, *text]).replace("ASSETS", os.path.relpath(assets, home)) + "\n")
    write_text(home / "results.json", json.dumps(rounded(numbers), indent=1) + "\n")
    for part, draw, name in (("main", draw_inflation, "inflation"), ("main", draw_differences, "differences"), ("early", draw_early, "early")):
        if some := has(done, part):
            draw(some, assets / f"{name}.png")
    if some := has(done, "adjoint"):
        draw_adjoint(some, bases, assets / "adjoint.png")
    if corners(results):
        draw_ablation(results, assets / "ablation.png")
