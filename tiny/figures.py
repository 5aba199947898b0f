"""The figures of RESULTS.md and of the README, from what reproduce.py measured."""
import math
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams |= {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3}  # a $ in a prompt is a $
import matplotlib.pyplot as plt
from guards import LAM, RIVALS
from paired import METRICS, grouped, having, mean_points, paired, points_of, scaled
from report import guards_by_corner

from flow.pictures import load_pictures, read_folder

COLOUR = {"base": "gray", "unguarded": "#c44e30", "guarded": "#2c6fbb", "auto": "#17397a"}


def save(figure, path: Path, dpi: int = 110):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_inflation(results: dict[tuple, dict], path: Path):
    """Norm ratio and saturation over training, and norm ratio over t at its end. A column a method, a line a run."""
    methods = grouped(results, "method")
    figure, axes = plt.subplots(3, len(methods), figsize=(4 * len(methods), 8), layout="constrained", squeeze=False,
                                sharey="row")
    for column, (method, runs) in zip(axes.T, methods.items()):
        for (run, r), who in product(runs.items(), ("unguarded", "guarded")):
            style = {"color": COLOUR[who], "linestyle": "-" if run.base == "sd3" else ":", "linewidth": 0.9,
                     "alpha": 0.7}
            curve, norms = r["main"]["curves"][who], r["main"]["ratio"][who]
            for axis, key in zip(column, ("norm_ratio", "saturation")):
                axis.plot([e["epoch"] for e in curve], [e[key] for e in curve], **style)
            column[2].plot(norms["t"], norms["mean"], **style)
        column[0].set(title=method.upper(), xlabel="epoch")
        column[1].set(xlabel="epoch")
        column[2].set(xlabel="t (1 is noise), at the end of training", xlim=(1.02, -0.02))
        for axis in column[::2]:
            axis.axhline(1, color="black", linewidth=0.8)
    for axis, label in zip(axes[:, 0], ("norm ratio to the reference", "saturation", "norm ratio to the reference")):
        axis.set_ylabel(label)
    handles = [plt.Line2D([], [], color=COLOUR[who], label=who) for who in ("unguarded", "guarded")]
    for base, linestyle in (("sd3", "-"), ("flux", ":")):
        handles.append(plt.Line2D([], [], color="gray", linestyle=linestyle, label=base))
    axes[0, 0].legend(handles=handles, fontsize=8)
    save(figure, path)


def draw_differences(results: dict[tuple, dict], path: Path):
    """Guarded minus unguarded. A dot is a run, a tick is a cell's mean, the band is the mean's 95 % interval."""
    metrics = ("reward", "judge/overall", "judge/oversaturation", "P(real)", "FD", "saturation")
    cells = grouped(results, "cell")
    size = (2.3 * len(metrics) + 1, 0.27 * len(cells) + 1)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", sharey=True)
    for axis, metric in zip(axes, metrics):
        guarded, unguarded = scaled("main", "guarded", metric), scaled("main", "unguarded", metric)
        d = paired(results, guarded, unguarded)
        low, high = d["difference"] - d["half"], d["difference"] + d["half"]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvspan(low, high, color=COLOUR["guarded"], alpha=0.2, linewidth=0)
        for i, runs in enumerate(cells.values()):
            values = [guarded(r) - unguarded(r) for r in runs.values()]
            axis.plot(values, [i] * len(values), "o", color=COLOUR["guarded"], markersize=3, alpha=0.7)
            axis.plot(np.mean(values), i, "|", color="black", markersize=9)
        axis.set_title(METRICS[metric][0], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(visible=False, axis="y")
    axes[0].set(yticks=range(len(cells)), yticklabels=list(cells))
    axes[0].invert_yaxis()
    save(figure, path)


def draw_early(results: dict[tuple, dict], path: Path):
    """Reward against the judge's P(good): a line an unguarded run's checkpoints, a star the guarded model's end."""
    cells = grouped(results, "cell")
    wide = min(3, len(cells))
    high = math.ceil(len(cells) / wide)
    size = (3.2 * wide, 2.6 * high)
    figure, axes = plt.subplots(high, wide, figsize=size, layout="constrained", squeeze=False, sharey=True)
    line = {"color": COLOUR["unguarded"], "markersize": 2.5, "linewidth": 0.9, "label": "unguarded, its checkpoints"}
    star = {"color": COLOUR["guarded"], "markersize": 9, "label": "guarded, at the end"}
    for axis, (cell, runs) in zip(axes.flat, cells.items()):
        for found in (r["early"]["found"] for r in runs.values()):
            checkpoints = [found[name] for name in found if name != "guarded"]
            axis.plot([f["reward"] for f in checkpoints], [f["overall"] for f in checkpoints], "o-", **line)
            axis.plot(found["guarded"]["reward"], found["guarded"]["overall"], "*", **star)
        axis.set_title(cell, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("reward, training prompts", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("judged good", fontsize=8)
    axes[0, 0].legend(*(x[:2] for x in axes[0, 0].get_legend_handles_labels()), fontsize=7, loc="lower left")
    save(figure, path)


def draw_adjoint(results: dict[tuple, dict], bases: dict[str, dict], path: Path):
    """The sensitivities' t statistic at each step: rewards above, control below. Lines: means; bands: ranges."""
    of_bases, of_runs = {}, {}  # {(base, reward): [adjoint, ...]}
    for base, b in bases.items():
        for part in (part for part in b if part.startswith("adjoint")):
            of_bases[base, part.split()[1]] = [b[part]]
    for run, r in results.items():
        of_runs.setdefault((run.base, run.reward), []).append(r["adjoint"])
    colours = dict(zip(sorted({*of_bases, *of_runs}), plt.cm.Dark2.colors))
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharey="row", sharex=True)
    columns = {"base models": of_bases, "unguarded models": of_runs}
    for column, (title, adjoints) in zip(axes.T, columns.items()):
        for axis, what in zip(column, ("reward", "energy")):
            axis.axhspan(-2.13, 2.13, color="gray", alpha=0.2, linewidth=0)
            for (base, reward), models in sorted(adjoints.items()):
                t, at = np.array([a[what]["t_statistic"] for a in models]), models[0]["t"]
                colour, linestyle = colours[base, reward], "-" if base == "sd3" else "--"
                axis.plot(at, t.mean(0), color=colour, linestyle=linestyle, linewidth=1.2, label=f"{base}, {reward}")
                axis.fill_between(at, t.min(0), t.max(0), color=colour, alpha=0.15, linewidth=0)
        column[0].set_title(title)
        column[1].set(xlabel="t (1 is noise)", xlim=(1.02, -0.02))
    axes[0, 0].set_ylabel("the reward: t statistic")
    axes[1, 0].set_ylabel("energy (control): t statistic")
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_ablation(results: dict[tuple, dict], path: Path):
    """Metrics over lam, and of other guards to the right. A dot is a run, a line is a method's mean."""
    corners, methods = guards_by_corner(results), grouped(results, "method")
    panels = {"norm ratio": "ratio", "reward": "reward", "judged good": "judge/overall", "Fréchet distance": "FD"}
    size = (4 * len(panels), 3.8 * len(corners))
    figure, axes = plt.subplots(len(corners), len(panels), figsize=size, layout="constrained", squeeze=False)
    for row, (corner, by_guard) in zip(axes, corners.items()):
        lams = sum(name.startswith("lam") for name in by_guard)
        for axis, (title, metric) in zip(row, panels.items()):
            for i, method in enumerate(methods):
                colour = plt.cm.Dark2.colors[i]
                values = [[r[metric] for run, r in runs.items() if run.method == method] for runs in by_guard.values()]
                places = [x + 0.15 * (i - 1) for x in range(len(values))]
                for x, y in zip(places, values):
                    axis.plot([x] * len(y), y, "o", color=colour, markersize=3, alpha=0.6)
                means = [np.mean(y) if y else math.nan for y in values[:lams]]
                axis.plot(places[:lams], means, color=colour, linewidth=1, label=method)
            axis.axvline(lams - 0.5, color="gray", linewidth=0.8)
            axis.set(title=f"{title} ({corner})", xticks=range(len(by_guard)))
            axis.set_xticklabels(by_guard, rotation=60, ha="right", fontsize=8)
        row[0].axhline(1, color="black", linewidth=0.8)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_rivals(results: dict[tuple, dict], path: Path):
    """Quality against reward. A line is a rival, from the unguarded model to its greatest strength; large marks are the
    unguarded model and the guard. Means over methods and seeds."""
    corners = grouped(results, "corner")
    panels = {"judge/overall": "judged good", "FD": "Fréchet distance"}
    size = (5.5 * len(panels), 4.2 * len(corners))
    figure, axes = plt.subplots(len(corners), len(panels), figsize=size, layout="constrained", squeeze=False)
    for row, (corner, runs) in zip(axes, corners.items()):
        for axis, (metric, label) in zip(row, panels.items()):
            for i, rival in enumerate(RIVALS):
                whole = {run: r for run, r in runs.items() if points_of(run, r, rival)}
                if whole:
                    x, y = mean_points(whole, rival, metric)
                    axis.plot(x, y, "o-", color=plt.cm.tab10.colors[i], markersize=3, linewidth=1.2, label=rival)
            models = (("unguarded", "main", "X", "unguarded"), ("guarded", "main", "*", f"lam {LAM}"),
                      ("auto", "auto", "P", "--lam auto"))
            for who, part, marker, name in models:
                measured = having(runs, part).values()
                if measured:
                    x, y = (np.mean([scaled(part, who, m)(r) for r in measured]) for m in ("reward", metric))
                    axis.plot(x, y, marker, color=COLOUR[who], markersize=13, label=name, zorder=3)
            axis.set(title=corner, xlabel="reward, fraction of the gain", ylabel=label)
    axes[0, 0].legend(fontsize=7, markerscale=0.5)
    save(figure, path)


def draw_front(r: dict, folders: dict[str, Path], path: Path, columns: int = 5):
    """The README's picture: a row of pictures of each folder, with the same prompts and noise, and a run's norm ratio
    over training beside them. r: the run's numbers."""
    figure = plt.figure(figsize=(12, 4.4))
    grid = figure.add_gridspec(len(folders), columns, left=0.03, right=0.63, bottom=0.01, top=0.99, wspace=0.03,
                               hspace=0.03)
    for i, (who, folder) in enumerate(folders.items()):
        files = [line["file"] for line in read_folder(str(folder))]
        pictures = load_pictures(files[::len(files) // columns][:columns])
        for j, picture in enumerate(pictures):
            axis = figure.add_subplot(grid[i, j], xticks=[], yticks=[])
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="lanczos")
            if j == 0:
                axis.set_ylabel(who, fontsize=17, color=COLOUR[who], fontweight="bold")
    axis = figure.add_axes((0.71, 0.15, 0.28, 0.71))
    axis.axhline(1, color="black", linewidth=1.5)
    for who, offset, side in (("unguarded", 8, "bottom"), ("guarded", -8, "top")):
        curve = r["main"]["curves"][who]
        x, y = [e["epoch"] for e in curve], [e["norm_ratio"] for e in curve]
        axis.plot(x, y, color=COLOUR[who], linewidth=4)
        axis.annotate(who, (x[-1], y[-1]), (0, offset), textcoords="offset points", color=COLOUR[who], fontsize=19,
                      fontweight="bold", ha="right", va=side)
    axis.margins(y=0.2)
    axis.set_title("‖v‖ / ‖v_ref‖", fontsize=20)
    axis.set_xlabel("epochs of RL", fontsize=16)
    axis.tick_params(labelsize=14)
    save(figure, path, dpi=100)


def draw_all(results: dict[tuple, dict], bases: dict[str, dict], assets: Path):
    """Draw the figures of RESULTS.md for which there are numbers."""
    assets.mkdir(parents=True, exist_ok=True)
    done = having(results, "main")
    if done:
        draw_inflation(done, assets / "inflation.png")
        draw_differences(done, assets / "differences.png")
    if measured := having(done, "early"):
        draw_early(measured, assets / "early.png")
    if measured := having(done, "adjoint"):
        draw_adjoint(measured, bases, assets / "adjoint.png")
    if measured := having(results, "guard"):
        draw_ablation(measured, assets / "ablation.png")
    if measured := having(done, "rival"):
        draw_rivals(measured, assets / "rivals.png")
