"""RESULTS.md, results.json and the figures, from the numbers that reproduce.py has gathered.

A run is a NamedTuple (base, method, reward, seed) whose `cell` is the run but for its seed; results[run] are its parts' numbers.
"Paired" is always by run: the same cell and seed, the same prompts and noise.
"""
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

from eval_judge import plt

LAM = 0.05  # the default that is put to the test

SHOWN = {"reward": "reward", "other reward": "other reward", "judge/overall": "judged good", "judge/oversaturation": "judged oversaturated",
         "judge/over-sharpening": "judged over-sharpened", "judge/unnatural lighting": "judged unnaturally lit", "judge/artifacts": "judged to have artifacts",
         "P(real)": "detector's P(real)", "FD": "Fréchet distance", "saturation": "saturation", "sharpness": "sharpness"}
COLOUR = {"base": "gray", "unguarded": "#c44e30", "guarded": "#2c6fbb"}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t (NaN for a single value)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    x = np.linspace(0, 100, 1_000_001)
    density = math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / math.sqrt((n - 1) * math.pi) * (1 + x**2 / (n - 1)) ** (-n / 2)
    quantile = np.interp(0.475, np.cumsum((density[1:] + density[:-1]) / 2) * x[1], x[1:])
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(n))


def paired(results: dict[tuple, dict], a: Callable[[dict], float], b: Callable[[dict], float]) -> dict:
    """a - b, paired by run: mean and 95 % interval over cells, each the mean of its seeds (over runs, if the cells are fewer than
    five), and in how many runs a is the larger one."""
    cells, runs = {}, [(run, a(r) - b(r)) for run, r in results.items()]
    for run, value in runs:
        cells.setdefault(run.cell, []).append(value)
    mean, half = interval([float(np.mean(v)) for v in cells.values()] if len(cells) >= 5 else [v for _, v in runs])
    return {"a": float(np.mean([a(r) for r in results.values()])), "b": float(np.mean([b(r) for r in results.values()])), "difference": mean,
            "half": half, "larger": sum(v > 0 for _, v in runs), "runs": len(runs), "cells": len(cells)}


def of(part: str, who: str, metric: str) -> Callable[[dict], float]:
    """Reads a mean."""
    return lambda r: r[part]["means"][who][metric]


def rate(part: str, pair: str) -> Callable[[dict], float]:
    """Reads how often the judge prefers the first one of a pair; a tie is half."""
    def read(r: dict) -> float:
        """In [0, 1]."""
        for name, flip in ((pair, 0), (" vs ".join(pair.split(" vs ")[::-1]), 2)):
            if name in r[part]["verdicts"]:
                counts = r[part]["verdicts"][name]
                return (counts[flip] + counts[1] / 2) / sum(counts[:3])
        raise KeyError(pair)
    return read


def pm(d: dict, digits: int = 3) -> str:
    """A difference with its interval."""
    return f"{d['difference']:+.{digits}f} ± {d['half']:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


def compare(results: dict[tuple, dict], part_a: str, a: str, part_b: str, b: str, numbers: dict, metrics=tuple(SHOWN)) -> list[list[str]]:
    """Rows of a table: each metric of b, of a, a - b; the numbers go to `numbers` too."""
    rows = []
    for metric in metrics:
        d = numbers[f"{a} - {b}, {SHOWN[metric]}"] = paired(results, of(part_a, a, metric), of(part_b, b, metric))
        rows.append([SHOWN[metric], f"{d['b']:.3f}", f"{d['a']:.3f}", pm(d), f"{d['larger']} of {d['runs']}"])
    return rows


def has(results: dict[tuple, dict], *parts: str) -> dict[tuple, dict]:
    """The runs that have these parts."""
    return {run: r for run, r in results.items() if all(p in r for p in parts)}


def verdict(d: dict, claimed: int) -> str:
    """What an interval says of a claim about a difference's sign (+1 or -1)."""
    if not abs(d["difference"]) > d["half"]:
        return "not resolved"
    return "holds" if np.sign(d["difference"]) == claimed else "**contradicted**"


def cells_of(results: dict[tuple, dict]) -> dict[str, list[dict]]:
    """Each cell's runs."""
    return {cell: [r for run, r in results.items() if run.cell == cell] for cell in dict.fromkeys(run.cell for run in results)}


def claim_1(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Inflation."""
    rows = []
    for cell, runs in cells_of(results).items():
        ratios = [r["main"]["ratio"]["unguarded"]["overall"] for r in runs]
        worst = np.mean([max(r["main"]["ratio"]["unguarded"]["mean"]) for r in runs])
        gain = [r["main"]["curves"]["unguarded"][-1]["reward"] - r["main"]["curves"]["unguarded"][0]["reward"] for r in runs]
        means = {m: [np.mean([of("main", who, m)(r) for r in runs]) for who in ("base", "unguarded")] for m in ("saturation", "sharpness", "FD", "judge/overall")}
        numbers[cell] = {"ratio": ratios, "worst step": float(worst), "reward gain": gain, **{m: [float(x) for x in v] for m, v in means.items()}}
        rows.append([cell, " ".join(f"{x:.3f}" for x in ratios), f"{worst:.3f}", f"{np.mean(gain):+.2f}", *(
            f"{a:.{d}f} → {b:.{d}f}" for (a, b), d in zip(means.values(), (2, 3, 1, 2)))])
    renders = "; ".join(f"{base}: saturation {b['colours']['base']['saturation']:.2f}, sharpness {b['colours']['base']['sharpness']:.3f}" for base, b in bases.items())
    inflated = paired(results, lambda r: r["main"]["ratio"]["unguarded"]["overall"], lambda r: 1.0)
    numbers["ratio - 1"] = inflated
    some = next(iter(bases.values()))["colours"]["renders"]
    return (f"The unguarded norm ratio less 1, over the whole trajectory: {pm(inflated)}, above 0 in {inflated['larger']} of {inflated['runs']} runs: "
            f"{verdict(inflated, 1)}.\n\n" + markdown(["cell", "norm ratio, each seed", "worst step", "reward gained", "saturation, base → unguarded",
                                                     "sharpness", "Fréchet distance", "judged good"], rows)
            + f"\n\nRenders: saturation {some['saturation']:.2f}, sharpness {some['sharpness']:.3f}; {renders}.\n\n![norm ratios](../assets/inflation.png)")


def claim_2(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Renormalization at inference."""
    text = []
    for how in ("match", "cap"):
        rows = compare(results, "renorm", how, "renorm", "unguarded", numbers)
        wins = numbers[f"{how}, preferred to unguarded"] = paired(results, rate("renorm", f"{how} vs unguarded"), lambda r: 0.5)
        text.append(markdown(["metric", "unguarded", f"--renorm {how}", f"{how} - unguarded", f"{how} larger, runs"], rows)
                    + f"\n\nThe judge prefers `{how}` to the same model without it in {wins['a']:.1%} of pairs (a tie is half; {pm(wins)} from one half).")
    return "\n\n".join(text)


def claim_3(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Adjoint sensitivity."""
    rows, shown = [], [(f"{base} {part.split()[1]}", [b[part]]) for base, b in bases.items() for part in b if part.startswith("adjoint")]
    shown += [(f"{cell}, unguarded", [r["adjoint"] for r in runs]) for cell, runs in cells_of(results).items()]
    for name, runs in shown:
        row = numbers[name] = {of_what: {"t": [max(map(abs, r[of_what]["t_statistic"])) for r in runs], "cosine": [r[of_what]["half_batch_cosine"] for r in runs],
                                         "same sign": [float(np.mean(r[of_what]["same_sign"])) for r in runs]} for of_what in ("reward", "energy")}
        rows.append([name, *(" ".join(f"{x:.{d}f}" for x in row[of_what][k]) for of_what in ("reward", "energy")
                             for k, d in (("t", 1), ("same sign", 2), ("cosine", 2)))])
    return markdown(["model", "reward: largest \\|t\\|", "same sign", "cosine", "energy (control): largest \\|t\\|", "same sign", "cosine"], rows) + (
        "\n\n![sensitivities](../assets/adjoint.png)")


def claim_4(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """The guarded norm."""
    rows = []
    for cell, runs in cells_of(results).items():
        ratios, worst = [r["main"]["ratio"]["guarded"]["overall"] for r in runs], [max(r["main"]["ratio"]["guarded"]["mean"]) for r in runs]
        low = [min(r["main"]["ratio"]["guarded"]["mean"]) for r in runs]
        numbers[cell] = {"ratio": ratios, "highest step": worst, "lowest step": low}
        rows.append([cell, *(" ".join(f"{x:.3f}" for x in values) for values in (ratios, worst, low))])
    above = [x for n in numbers.values() for x in n["highest step"]]
    return (f"At its highest step the guarded norm is above the reference's by more than 2 % in {sum(x > 1.02 for x in above)} of {len(above)} runs, by more than "
            f"5 % in {sum(x > 1.05 for x in above)}.\n\n" + markdown(["cell", "norm ratio, each seed", "highest step", "lowest step"], rows))


def claim_5_and_6(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Reward, judge, detector."""
    rows = []
    for cell, runs in cells_of(results).items():
        wins = np.sum([r["main"]["verdicts"]["unguarded vs guarded"] for r in runs], axis=0)
        numbers[cell] = {SHOWN[m]: [[of("main", who, m)(r) for r in runs] for who in ("unguarded", "guarded")] for m in SHOWN} | {
            "guarded preferred, tie, unguarded preferred": [int(x) for x in wins[[2, 1, 0]]]}
        rows.append([cell, *(f"{np.mean(numbers[cell][SHOWN[m]][0]):.{d}f} → {np.mean(numbers[cell][SHOWN[m]][1]):.{d}f}" for m, d in (
            ("reward", 3), ("judge/overall", 2), ("judge/oversaturation", 2), ("P(real)", 2), ("FD", 1))), f"{wins[2]} / {wins[1]} / {wins[0]}"])
    pooled = numbers["all"] = {}
    table = compare(results, "main", "guarded", "main", "unguarded", pooled)
    pooled["guarded preferred"] = wins = paired(results, rate("main", "guarded vs unguarded"), lambda r: 0.5)
    rewards, good, real = (pooled[f"guarded - unguarded, {SHOWN[m]}"] for m in ("reward", "judge/overall", "P(real)"))
    return (f"Reward, guarded minus unguarded: {pm(rewards)}. The judge prefers the guarded picture in {wins['a']:.1%} of pairs (a tie is half): "
            f"{verdict(wins, 1)}; calls it good: {pm(good)}: {verdict(good, 1)}. The detector's P(real): {pm(real)}: {verdict(real, 1)}.\n\n"
            + markdown(["metric", "unguarded", "guarded", "guarded - unguarded", "guarded larger, runs"], table) + "\n\nBy cell, unguarded → guarded:\n\n"
            + markdown(["cell", "reward", "judged good", "judged oversaturated", "P(real)", "Fréchet distance", "judge: guarded / tie / unguarded"], rows)
            + "\n\n![paired differences](../assets/differences.png)")


def claim_7(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Few steps."""
    rows, few = [], [steps for steps in next(iter(results.values()))["few"] if steps.isdigit()]
    for metric in ("reward", "judge/overall", "judge/oversaturation", "P(real)", "FD", "saturation", "sharpness"):
        def gain(steps: str, metric=metric) -> Callable[[dict], float]:
            """Guarded minus unguarded."""
            return lambda r: of("main", "guarded", metric)({"main": r["few"][steps]}) - of("main", "unguarded", metric)({"main": r["few"][steps]})

        def full(r: dict, metric=metric) -> float:
            """At all steps."""
            return of("main", "guarded", metric)(r) - of("main", "unguarded", metric)(r)

        numbers[SHOWN[metric]] = {"full": paired(results, full, lambda r: 0.0)} | {
            s: paired(results, gain(s), lambda r: 0.0) for s in few} | {f"{s} - full": paired(results, gain(s), full) for s in few}
        rows.append([SHOWN[metric], *(pm(d) for d in numbers[SHOWN[metric]].values())])
    wins = {"full": paired(results, rate("main", "guarded vs unguarded"), lambda r: 0.5)} | {
        s: paired(results, lambda r, s=s: rate("main", "guarded vs unguarded")({"main": r["few"][s]}), lambda r: 0.5) for s in few}
    wins |= {f"{s} - full": paired(results, lambda r, s=s: rate("main", "guarded vs unguarded")({"main": r["few"][s]}), rate("main", "guarded vs unguarded"))
             for s in few}
    numbers["guarded preferred, less one half"] = wins
    rows.append(["judge prefers the guarded one, less one half", *(pm(d) for d in wins.values())])
    return markdown(["guarded - unguarded", "all 28 steps", *(f"{s} steps" for s in few), *(f"{s} steps - all" for s in few)], rows)


def claim_8(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Early stopping."""
    text = []
    for how in ("early, equal reward", "early, best judged"):
        some = numbers[how] = {"epochs": [int(r["early"]["chosen"][how]) for r in results.values()]}
        table = compare(results, "early", "guarded", "early", how, some)
        some["guarded preferred"] = wins = paired(results, rate("early", f"guarded vs {how}"), lambda r: 0.5)
        epochs = {e: some["epochs"].count(e) for e in sorted(set(some["epochs"]))}
        text.append(f"**{how}**; epochs chosen: {', '.join(f'{e} ({n} runs)' for e, n in epochs.items())}. The judge prefers the guarded picture in "
                    f"{wins['a']:.1%} of pairs ({pm(wins)} from one half): {verdict(wins, 1)}.\n\n"
                    + markdown(["metric", how, "guarded", "guarded - early", "guarded larger, runs"], table))
    return "\n\n".join(text) + "\n\n![reward against verdict](../assets/early.png)"


def guards(results: dict[tuple, dict]) -> dict[str, tuple[dict[tuple, dict], str, str]]:
    """The guards that there are numbers of: their runs, and the part and the name in it that hold them."""
    variants = dict.fromkeys(part for r in results.values() for part in r if part.startswith("guard: "))
    places = {"unguarded": ("main", "unguarded"), "guarded": ("main", "guarded"), **{part.removeprefix("guard: "): (part, "variant") for part in variants}}
    ablated = {run: r for run, r in results.items() if variants.keys() & r.keys()}
    return {name: (has(ablated, part), part, who) for name, (part, who) in places.items()} if ablated else {}


def ratio(part: str, who: str) -> Callable[[dict], float]:
    """Reads the norm ratio over the whole trajectory."""
    return lambda r: (r[part]["ratio"] if who == "variant" else r[part]["ratio"][who])["overall"]


def claim_9(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Other guards."""
    rows, methods = [], list(dict.fromkeys(run.method for run in results))
    for name, (some, part, who) in guards(results).items():
        by_method = {m: [ratio(part, who)(r) for run, r in some.items() if run.method == m] for m in methods}
        row = numbers[name] = {"ratio": by_method, **{SHOWN[m]: paired(some, of(part, who, m), of("main", "guarded", m))
                                                      for m in ("reward", "judge/overall", "FD", "saturation")}}
        cells = [f"{d['a']:.{k}f}" + (f" ({pm(d, k)})" if name != "guarded" else "") for (what, d), k in zip(row.items(), (0, 3, 3, 2, 3)) if what != "ratio"]
        if name != "guarded":
            row["preferred to the default"] = paired(some, rate(part, f"{who} vs guarded"), lambda r: 0.5)
            cells.append(pm(row["preferred to the default"]))
        rows.append([{"unguarded": "lam 0", "guarded": f"lam {LAM}, the default"}.get(name, name),
                     *(f"{np.mean(x):.3f}" if x else "-" for x in by_method.values()), *cells, *([""] if name == "guarded" else []), str(len(some))])
    return markdown(["guard", *(f"norm ratio, {m}" for m in methods), "reward (minus the default's)", "judged good", "Fréchet distance", "saturation",
                     "judge prefers it to the default, less one half", "runs"], rows) + "\n\n![guards](../assets/ablation.png)"


# ---------------------------------------------------------------- figures

def save(figure, path: Path):
    """PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Guarded minus unguarded: a dot a run, a bar a cell's mean; the band is the 95 % interval over cells."""
    metrics = ("reward", "judge/overall", "judge/oversaturation", "P(real)", "FD", "saturation")
    cells = cells_of(results)
    figure, axes = plt.subplots(1, len(metrics), figsize=(2.3 * len(metrics) + 1, 0.27 * len(cells) + 1), layout="constrained", sharey=True)
    for axis, metric in zip(axes, metrics):
        d = paired(results, of("main", "guarded", metric), of("main", "unguarded", metric))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvspan(d["difference"] - d["half"], d["difference"] + d["half"], color=COLOUR["guarded"], alpha=0.2, linewidth=0)
        for i, runs in enumerate(cells.values()):
            values = [of("main", "guarded", metric)(r) - of("main", "unguarded", metric)(r) for r in runs]
            axis.plot(values, [i] * len(values), "o", color=COLOUR["guarded"], markersize=3, alpha=0.7)
            axis.plot(np.mean(values), i, "|", color="black", markersize=9)
        axis.set_title(SHOWN[metric], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set(yticks=range(len(cells)), yticklabels=list(cells))
    axes[0].invert_yaxis()
    save(figure, path)


def draw_early(results: dict[tuple, dict], path: Path):
    """Reward against the judge's P(good): the unguarded run's checkpoints, and the guarded model at the end; a line and a star a run."""
    cells = list(cells_of(results))
    wide = min(6, len(cells))
    figure, axes = plt.subplots(-(-len(cells) // wide), wide, figsize=(2.5 * wide + 0.6, 2.5 * -(-len(cells) // wide)), layout="constrained", squeeze=False, sharey=True)
    for axis, cell in zip(axes.flat, cells):
        for found in (r["early"]["found"] for run, r in results.items() if run.cell == cell):
            path_of = [found[name] for name in found if name != "guarded"]
            axis.plot([f["reward"] for f in path_of], [f["overall"] for f in path_of], "o-", color=COLOUR["unguarded"], markersize=2.5, linewidth=0.9,
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
    """t statistic of the batch's mean sensitivity at each step: each reward's, and the control's."""
    found = {"base": [(part.split()[1], a) for b in bases.values() for part, a in b.items() if part.startswith("adjoint")],
             "unguarded": [(run.reward, r["adjoint"]) for run, r in results.items()]}
    style = {"energy": ("gray", "the picture's energy (control)"), "hps": (plt.cm.Dark2.colors[3], "hps"), "pickscore": (COLOUR["guarded"], "pickscore")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
    for axis, (name, some) in zip(axes, found.items()):
        axis.axhspan(-1.96, 1.96, color="gray", alpha=0.2, linewidth=0)
        for reward, a in some:
            for of_what, (colour, label) in (("energy", style["energy"]), ("reward", style[reward])):
                axis.plot(a["t"], a[of_what]["t_statistic"], color=colour, linewidth=0.9, alpha=0.7, label=label)
        axis.set(title=f"{name} models", xlabel="t (1 is noise)", xlim=(1.02, -0.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("t statistic of the batch's mean dR/ds")
    by_label = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))  # each once
    axes[0].legend(by_label.values(), by_label.keys(), fontsize=8)
    save(figure, path)


def draw_ablation(results: dict[tuple, dict], path: Path):
    """Norm ratio, reward and verdict over lam; other forms of the guard to the right."""
    found, methods = guards(results), list(dict.fromkeys(run.method for run in results))
    by_lam = sorted((0.0 if n == "unguarded" else LAM if n == "guarded" else float(n.split()[1]), n) for n in found if n in COLOUR or n.startswith("lam"))
    names = [n for _, n in by_lam] + [n for n in found if n not in {n for _, n in by_lam}]
    labels = [f"{lam:g}" for lam, _ in by_lam] + names[len(by_lam):]
    panels = (("norm ratio", None), ("reward", "reward"), ("judged good", "judge/overall"), ("Fréchet distance", "FD"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.8), layout="constrained")
    for axis, (title, metric) in zip(axes, panels):
        for i, method in enumerate(methods):
            values = [[(of(part, who, metric) if metric else ratio(part, who))(r) for run, r in some.items() if run.method == method]
                      for some, part, who in (found[n] for n in names)]
            for x, y in enumerate(values):
                axis.plot([x + 0.15 * (i - 1)] * len(y), y, "o", color=plt.cm.Dark2.colors[i], markersize=3, alpha=0.6)
            axis.plot([x + 0.15 * (i - 1) for x in range(len(by_lam))], [np.mean(y) for y in values[:len(by_lam)]], color=plt.cm.Dark2.colors[i],
                      linewidth=1, label=method)
        axis.axvline(len(by_lam) - 0.5, color="gray", linewidth=0.8)
        axis.set(title=title, xticks=range(len(names)))
        axis.set_xticklabels(labels, rotation=60, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xlabel("lam, then other guards", fontsize=8)
    axes[0].legend(fontsize=8)
    save(figure, path)


READING = {}  # claim: what we make of the committed numbers


def read_json(path: Path) -> dict:
    """{} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_text(path: Path, text: str):
    """Under another name first: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def rounded(x):
    """Floats at five digits: what is kept in the repository is to be small."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, (list, tuple)) else float(f"{x:.5g}") if isinstance(x, float) else x


def write_report(results: dict[tuple, dict], bases: dict[str, dict], home: Path, assets: Path, about: str):
    """home/RESULTS.md and home/results.json of all numbers that there are, and the figures in `assets`. `about`: what they are."""
    done, numbers, text = has(results, "main"), {}, []
    renormed, adjoined, few, early = (has(done, part) for part in ("renorm", "adjoint", "few", "early"))
    sections = (  # claim, title, whose numbers, text
        ("1", "RL inflates the norm, and pictures suffer", done, claim_1), ("2", "Renormalization at inference does not repair them", renormed, claim_2),
        ("3", "A step's velocity scale carries no coherent first-order reward signal", adjoined, claim_3), ("4", "NormGuard holds the norm", done, claim_4),
        ("5 and 6", "NormGuard preserves the reward; judge and detector prefer it", done, claim_5_and_6), ("7", "The gain grows at few steps", few, claim_7),
        ("8", "It is not early stopping", early, claim_8), ("9", "Our own choices", done if guards(done) else {}, claim_9))
    for claim, title, some, write in sections:
        body = write(some, bases, numbers.setdefault(claim, {})) if some else "Not measured yet."
        text.append(f"## {claim}. {title}\n\n    python tiny/reproduce.py --only {claim[0]}\n\n" + "\n\n".join(filter(None, (READING.get(claim), body))))
    write_text(home / "RESULTS.md", f"# The paper's claims on the miniature\n\n{about}\n\n" + "\n\n".join(text) + "\n")
    write_text(home / "results.json", json.dumps(rounded(numbers), indent=1) + "\n")
    draw_inflation(done, assets / "inflation.png")
    draw_differences(done, assets / "differences.png")
    if adjoined:
        draw_adjoint(adjoined, bases, assets / "adjoint.png")
    if early:
        draw_early(early, assets / "early.png")
    if guards(done):
        draw_ablation(done, assets / "ablation.png")
