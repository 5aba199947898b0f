"""The figures of RESULTS.md and of the README, from what reproduce.py measured."""
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams |= {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3}  # a $ in a prompt is a $
import matplotlib.pyplot as plt
from guards import BOTH, RIVALS
from paired import grouped, having, over_guidance, rival_parts, scales_of
from report import GUARD, MODELS, guards_of, label

from flow.pictures import load_pictures, read_folder

COLOUR = {"base": "gray", "unguarded": "#c44e30", "guarded": "#2c6fbb", "guided": "#2a8c4a"}
GUARD_COLOURS = {"plain, lam ": COLOUR["guarded"], "guided, lam ": COLOUR["guided"], "KL ": "darkorange"}
ENDS = (0, ":", ", weakest"), (-1, "-", ", strongest")
RIVAL_COLOURS = "darkorange", "purple", "saddlebrown", "hotpink", "olive", "deepskyblue", "black"


def save(figure, path: Path, dpi: int = 110):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def panels(n: int, width: float, height: float) -> tuple[plt.Figure, np.ndarray]:
    """A figure of n panels of this size in inches, at most three in a row."""
    columns = min(3, n)
    rows = -(-n // columns)
    size = columns * width, rows * height
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)


def draw_inflation(results: dict[tuple, dict], path: Path):
    """Norm ratios over training, then over t without and with guidance. A column a method, a line a corner's mean."""
    methods, corners = grouped(results, "method"), grouped(results, "corner")
    lines = dict(zip(corners, ("-", "--", ":", "-.")))
    figure, axes = plt.subplots(3, len(methods), figsize=(4 * len(methods), 8), layout="constrained", squeeze=False,
                                sharey="row")
    for column, (method, of_method) in zip(axes.T, methods.items()):
        for (corner, runs), who in product(grouped(of_method, "corner").items(), MODELS[1:]):
            style = {"color": COLOUR[who], "linestyle": lines[corner], "linewidth": 1.3}
            curves = [r["main"]["curves"].get(who, []) for r in runs.values()]
            epochs = [e["epoch"] for e in curves[0]]
            column[0].plot(epochs, np.mean([[e["norm_ratio"] for e in curve] for curve in curves], axis=0), **style)
            for axis, scale in zip(column[1:], BOTH):
                norms = [r["main"][scale]["ratio"][who] for r in runs.values()]
                axis.plot(norms[0]["t"], np.mean([n["mean"] for n in norms], axis=0), **style)
        column[0].set(title=method.upper(), xlabel="epoch of training; drawn without guidance")
        column[1].set(xlabel="t (1 is noise); drawn without guidance", xlim=(1.02, -0.02))
        column[2].set(xlabel=f"t (1 is noise); drawn with guidance {BOTH[1]}", xlim=(1.02, -0.02))
        for axis in column:
            axis.axhline(1, color="black", linewidth=0.8)
    for axis in axes[:, 0]:
        axis.set_ylabel("norm ratio to the reference")
    handles = [plt.Line2D([], [], color=COLOUR[who], label=label(who)) for who in MODELS[1:]]
    handles += [plt.Line2D([], [], color="gray", linestyle=line, label=corner) for corner, line in lines.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    save(figure, path)


def front(axis: plt.Axes, parts: list[dict], who: str, style: str, **more):
    """A line over guidance: a model's mean reward and how good it is judged, in these parts of runs."""
    axis.plot(*np.mean([over_guidance(part, who) for part in parts], axis=0), style, **more)


def draw_fronts(results: dict[tuple, dict], path: Path):
    """Reward against judged good over guidance: a line a model, a square its lowest scale. Means over a cell's runs."""
    cells = grouped(results, "cell")
    figure, axes = panels(len(cells), 4, 3.3)
    for axis, (title, runs) in zip(axes.flat, cells.items()):
        parts = [r["main"] for r in runs.values()]
        for who in MODELS:
            front(axis, parts, who, "o-", color=COLOUR[who], markersize=4, label=label(who))
            x, y = axis.lines[-1].get_data()
            axis.plot(x[0], y[0], "s", color=COLOUR[who], markersize=8)
        for scale, place in zip(scales_of(parts[0]), zip(*axis.lines[0].get_data())):  # of the base
            axis.annotate(scale, place, (-4, -11), textcoords="offset points", fontsize=7, color=COLOUR["base"])
        axis.set(title=title, xlabel="reward")
    for axis in axes[:, 0]:
        axis.set_ylabel("judged good")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    save(figure, path)


def draw_early(results: dict[tuple, dict], path: Path):
    """Reward without guidance against P(good) with it: a line an unguarded run's checkpoints, a star a guard's end."""
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
    figure.supxlabel("reward without guidance, training prompts", fontsize=9)
    figure.supylabel(f"judged good, guidance {BOTH[1]}", fontsize=9)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))  # one of each name
    axes[0, 0].legend(handles.values(), handles, fontsize=7, loc="lower left")
    save(figure, path)


def draw_adjoint(results: dict[tuple, dict], bases: dict[str, dict], path: Path):
    """The sensitivities' t statistic at each step: rewards above, control below. Lines: means; bands: ranges."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharey="row", sharex=True)
    for (corner, runs), colour in zip(grouped(results, "corner").items(), plt.cm.Dark2.colors):
        run = next(iter(runs))
        base = bases.get(run.base, {}).get(f"adjoint {run.reward}")
        for column, models in zip(axes.T, ([base] if base else [], [r["adjoint"] for r in runs.values()])):
            for axis, what in zip(column, ("reward", "energy")) if models else ():
                t, at = np.array([a[what]["t_statistic"] for a in models]), models[0]["t"]
                axis.plot(at, t.mean(0), color=colour, linewidth=1.2, label=corner)
                axis.fill_between(at, t.min(0), t.max(0), color=colour, alpha=0.15, linewidth=0)
    for axis in axes.flat:
        axis.axhspan(-2.13, 2.13, color="gray", alpha=0.2, linewidth=0)
    for column, title in zip(axes.T, ("base models", "unguarded models")):
        column[0].set_title(title)
        column[1].set(xlabel="t (1 is noise)", xlim=(1.02, -0.02))
    axes[0, 0].set_ylabel("the reward: t statistic")
    axes[1, 0].set_ylabel("energy (control): t statistic")
    axes[0, 1].legend(fontsize=8)
    save(figure, path)


def draw_guards(results: dict[tuple, dict], path: Path):
    """Guards and KLs, on training prompts: reward without guidance against judged good with it. Lines join the weights
    of a kind; dotted: the base's quality. A panel a method, and one for all."""
    by_title = {"all methods": results, **grouped(results, "method")}
    figure, axes = plt.subplots(1, len(by_title), figsize=(4.2 * len(by_title), 5), layout="constrained", squeeze=False)
    for axis, (title, runs) in zip(axes[0], by_title.items()):
        points = {}
        for name, by_run in guards_of(runs).items():
            points[name] = [np.mean([p[k] for p in by_run.values()]) for k in ("reward, none", f"good, {BOTH[1]}")]
        axis.axhline(points.pop("base")[1], color=COLOUR["base"], linestyle=":")
        for name, (x, y) in points.items():
            axis.plot(x, y, "o", color=COLOUR.get(name, "purple"), markersize=4)
            left = "KL" in name
            above = left == ("guided" in name)  # so that names do not overlap
            axis.annotate(name.replace("lam ", ""), (x, y), (-4 if left else 4, 3 if above else -8), fontsize=7,
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
    kinds = {of: [name for name in RIVALS if ("guided" in name) == guided]
             for of, guided in (("velocity without guidance", False), ("guided velocity", True))}
    size = (7 * len(corners), 4.5 * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(corners), figsize=size, layout="constrained", squeeze=False)
    for column, (corner, runs) in zip(axes.T, corners.items()):
        for axis, (of, names) in zip(column, kinds.items()):
            for (name, colour), (end, style, which) in product(zip(names, RIVAL_COLOURS), ENDS):
                several = len(RIVALS[name].strengths) > 1
                parts = {run: rival_parts(name, run.method)[end] for run in runs}
                parts = [runs[run][part] for run, part in parts.items() if part in runs[run]]
                if parts and (several or end):
                    title = f"{name}{which * several} ({len(parts)} runs)"
                    front(axis, parts, "rival", style, marker=".", color=colour, linewidth=1, label=title)
            if not axis.lines:
                axis.set_axis_off()
                continue
            for who in MODELS[1:]:
                front(axis, [r["main"] for r in runs.values()], who, "o-", color=COLOUR[who], linewidth=2,
                      label=f"{label(who)} ({len(runs)} runs)")
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
                axis.set_ylabel(label(who).replace(" ", "\n"), fontsize=14, color=COLOUR[who], fontweight="bold")
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
    figures = {"inflation": ("main", draw_inflation), "fronts": ("main", draw_fronts), "early": ("early", draw_early),
               "adjoint": ("adjoint", partial(draw_adjoint, bases=bases)), "guards": ("guard: ", draw_guards),
               "rivals": ("rival: ", draw_rivals)}
    for name, (part, draw) in figures.items():
        if measured := having(having(results, "main"), part):
            draw(measured, path=assets / f"{name}.png")
