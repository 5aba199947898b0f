"""The figures of RESULTS.md and of the README, from what reproduce.py measured."""
import math
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams |= {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3}  # a $ in a prompt is a $
import matplotlib.pyplot as plt
from guards import BOTH, RIVALS
from paired import grouped, having, over_guidance, scales_of
from report import GUARD, MODELS, guards_of, label

from flow.pictures import load_pictures, read_folder

COLOUR = {"base": "gray", "unguarded": "#c44e30", "guarded": "#2c6fbb", "guided": "#2a8c4a"}
GUARD_COLOURS = {"plain, lam ": COLOUR["guarded"], "guided, lam ": COLOUR["guided"], "KL ": "darkorange"}
RIVAL_COLOURS = "darkorange", "purple", "saddlebrown", "hotpink", "olive", "deepskyblue", "black"


def save(figure, path: Path, dpi: int = 110):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def panels(n: int, width: float, height: float) -> tuple[plt.Figure, np.ndarray]:
    """A figure of n panels of this size in inches, at most three in a row."""
    columns = min(3, n)
    rows = math.ceil(n / columns)
    size = columns * width, rows * height
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)


def draw_inflation(results: dict[tuple, dict], path: Path):
    """Norm ratio over training, at its end over t without guidance, and with it. A column a method, a line a run."""
    methods = grouped(results, "method")
    figure, axes = plt.subplots(3, len(methods), figsize=(4 * len(methods), 8), layout="constrained", squeeze=False,
                                sharey="row")
    for column, (method, runs) in zip(axes.T, methods.items()):
        for (run, r), who in product(runs.items(), MODELS[1:]):
            style = {"color": COLOUR[who], "linestyle": "-" if run.base == "sd3" else ":", "linewidth": 0.9,
                     "alpha": 0.7}
            curve = r["main"]["curves"].get(who, [])
            column[0].plot([e["epoch"] for e in curve], [e["norm_ratio"] for e in curve], **style)
            for axis, scale in zip(column[1:], BOTH):
                norms = r["main"][scale]["ratio"][who]
                axis.plot(norms["t"], norms["mean"], **style)
        column[0].set(title=method.upper(), xlabel="epoch of training; drawn without guidance")
        column[1].set(xlabel="t (1 is noise); drawn without guidance", xlim=(1.02, -0.02))
        column[2].set(xlabel=f"t (1 is noise); drawn with guidance {BOTH[1]}", xlim=(1.02, -0.02))
        for axis in column:
            axis.axhline(1, color="black", linewidth=0.8)
    for axis in axes[:, 0]:
        axis.set_ylabel("norm ratio to the reference")
    handles = [plt.Line2D([], [], color=COLOUR[who], label=label(who)) for who in MODELS[1:]]
    for base, linestyle in (("sd3", "-"), ("flux", ":")) if len(grouped(results, "base")) > 1 else ():
        handles.append(plt.Line2D([], [], color="gray", linestyle=linestyle, label=base))
    axes[0, 0].legend(handles=handles, fontsize=8)
    save(figure, path)


def draw_fronts(results: dict[tuple, dict], path: Path):
    """Reward against how often a picture is judged good, for each model at each guidance scale; the lowest scale has a
    large mark. Means over runs; a panel a cell."""
    cells = grouped(results, "cell")
    figure, axes = panels(len(cells), 4, 3.3)
    for axis, (title, runs) in zip(axes.flat, cells.items()):
        for who in MODELS:
            x, y = np.mean([over_guidance(r["main"], who) for r in runs.values()], axis=0)
            axis.plot(x, y, "o-", color=COLOUR[who], markersize=4, label=label(who))
            axis.plot(x[0], y[0], "s", color=COLOUR[who], markersize=8)
            scales = scales_of(next(iter(runs.values()))["main"]) if who == "base" else ()
            for scale, place in zip(scales, zip(x, y)):
                axis.annotate(scale, place, (-4, -11), textcoords="offset points", fontsize=7, color=COLOUR[who])
        axis.set(title=title, xlabel="reward")
    for axis in axes[:, 0]:
        axis.set_ylabel("judged good")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    save(figure, path)


def draw_early(results: dict[tuple, dict], path: Path):
    """Reward without guidance against the judge's P(good) with it: a line an unguarded run's checkpoints, a star the
    guarded models' end."""
    cells = grouped(results, "cell")
    figure, axes = panels(len(cells), 3.2, 2.6)
    line = {"color": COLOUR["unguarded"], "markersize": 2.5, "linewidth": 0.9, "label": "unguarded, its checkpoints"}
    for axis, (cell, runs) in zip(axes.flat, cells.items()):
        for found in (r["early"]["found"] for r in runs.values()):
            checkpoints = [found[name] for name in found if name not in GUARD]
            axis.plot([f["reward"] for f in checkpoints], [f[BOTH[1]] for f in checkpoints], "o-", **line)
            for who, name in GUARD.items():
                axis.plot(found[who]["reward"], found[who][BOTH[1]], "*", color=COLOUR[who], label=name, markersize=9)
        axis.set_title(cell, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("reward without guidance, training prompts", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"judged good, guidance {BOTH[1]}", fontsize=8)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))  # one of each name
    axes[0, 0].legend(handles.values(), handles, fontsize=7, loc="lower left")
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
    axes[0, 1].legend(fontsize=8)
    save(figure, path)


def draw_guards(results: dict[tuple, dict], path: Path):
    """Guards and KLs, on training prompts: reward without guidance against judged good with it. Lines join the weights
    of a kind. A panel a method, and one for all."""
    results = having(results, "guard: ")
    panels = {"all methods": results, **grouped(results, "method")}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 5), layout="constrained", squeeze=False)
    for axis, (title, runs) in zip(axes[0], panels.items()):
        points = {}
        for name, by_run in guards_of(runs).items():
            points[name] = [np.mean([p[k] for p in by_run.values()]) for k in ("reward, none", f"good, {BOTH[1]}")]
        for name, (x, y) in points.items():
            axis.plot(x, y, "o", color=COLOUR.get(name, "purple"), markersize=4)
            left = "KL" in name
            axis.annotate(name.replace("lam ", ""), (x, y), (-4 if left else 4, -8 if left else 2), fontsize=7,
                          ha="right" if left else "left", textcoords="offset points")
        for kind, colour in GUARD_COLOURS.items():
            weights = sorted((float(name.removeprefix(kind)), name) for name in points
                             if name.startswith(kind) and " and " not in name)
            line = np.array([points["unguarded"], *(points[name] for _, name in weights)])
            axis.plot(*line.T, "o-", color=colour, linewidth=1, markersize=4, markevery=slice(1, None))
        axis.set(title=title, xlabel="reward without guidance")
        axis.margins(x=0.25)  # for the names
    axes[0, 0].set_ylabel(f"judged good, guidance {BOTH[1]}")
    save(figure, path)


def draw_rivals(results: dict[tuple, dict], path: Path):
    """Fronts over guidance of the guards and of each rival at its weakest and strongest. A column a corner, a row the
    rivals of the conditional velocity, then those of the guided one. Means over methods and seeds."""
    corners = grouped(results, "corner")
    kinds = [[name for name in RIVALS if name.startswith("guided") == guided] for guided in (False, True)]
    kinds = [names for names in kinds if any(having(results, f"rival: {name}") for name in names)]
    size = (7 * len(corners), 4.5 * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(corners), figsize=size, layout="constrained", squeeze=False)
    for column, (corner, runs) in zip(axes.T, corners.items()):
        for axis, names in zip(column, kinds):
            for (name, colour), (end, style) in product(zip(names, RIVAL_COLOURS), ((0, ":"), (-1, "-"))):
                parts = {run: f"rival: {name} {RIVALS[name].strengths_of(run.method)[end]:g}" for run in runs}
                curves = [over_guidance(runs[run][part], "rival") for run, part in parts.items() if part in runs[run]]
                several = len(RIVALS[name].strengths) > 1
                if curves and (several or not end):
                    title = name + (", strongest" if end else ", weakest") * several
                    axis.plot(*np.mean(curves, axis=0), style, marker=".", color=colour, linewidth=1, label=title)
            for who in MODELS:
                x, y = np.mean([over_guidance(r["main"], who) for r in runs.values()], axis=0)
                axis.plot(x, y, "o-", color=COLOUR[who], linewidth=2, label=label(who))
            of = "guided velocity" if names[0].startswith("guided") else "velocity without guidance"
            axis.set(title=f"{corner}: rivals of the {of}", xlabel="reward", ylabel="judged good")
            axis.legend(fontsize=7)
    save(figure, path)


def draw_front(r: dict, folders: dict[str, Path], path: Path, columns: int = 5):
    """The README's picture: a row of pictures of each folder, drawn with guidance, with the same prompts and noise; and
    a run's norm ratio at each step of their sampling beside them. r: the run's numbers."""
    figure = plt.figure(figsize=(12, 1.47 * len(folders)))
    grid = figure.add_gridspec(len(folders), columns, left=0.05, right=0.65, bottom=0.01, top=0.99, wspace=0.03,
                               hspace=0.03)
    for i, (who, folder) in enumerate(folders.items()):
        files = [line["file"] for line in read_folder(str(folder))]
        pictures = load_pictures(files[::len(files) // columns][:columns])
        for j, picture in enumerate(pictures):
            axis = figure.add_subplot(grid[i, j], xticks=[], yticks=[])
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="lanczos")
            if j == 0:
                name = label(who).replace(" ", "\n")
                axis.set_ylabel(name, fontsize=14, color=COLOUR[who], fontweight="bold")
    axis = figure.add_axes((0.71, 0.15, 0.27, 0.71))
    axis.axhline(1, color="black", linewidth=1.5)
    for who in MODELS[1:]:
        norms = r["main"][BOTH[1]]["ratio"][who]
        axis.plot(norms["t"], norms["mean"], color=COLOUR[who], linewidth=4)
    axis.set(xlim=(1.02, -0.02))
    axis.set_title("‖v‖ / ‖v_ref‖, with guidance", fontsize=18)
    axis.set_xlabel("t (1 is noise)", fontsize=16)
    axis.tick_params(labelsize=14)
    save(figure, path, dpi=100)


def draw_all(results: dict[tuple, dict], bases: dict[str, dict], assets: Path):
    """Draw the figures of RESULTS.md for which there are numbers."""
    assets.mkdir(parents=True, exist_ok=True)
    done = having(results, "main")
    if done:
        draw_inflation(done, assets / "inflation.png")
        draw_fronts(done, assets / "fronts.png")
    if measured := having(done, "early"):
        draw_early(measured, assets / "early.png")
    if measured := having(done, "adjoint"):
        draw_adjoint(measured, bases, assets / "adjoint.png")
    if guards_of(done):
        draw_guards(done, assets / "guards.png")
    if measured := having(done, "rival: "):
        draw_rivals(measured, assets / "rivals.png")
