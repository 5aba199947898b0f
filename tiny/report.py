"""Write RESULTS.md, TABLES.md and results.json from the numbers that reproduce.py measured.

RESULTS.template.md holds the text of RESULTS.md. Each claim has a function here. It returns the claim's checks, which
become one table with a column with guidance and one without, and more tables, which go to TABLES.md.
"""
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from guards import BOTH, GUARDS, LAM, RIVALS
from paired import (
    METRICS,
    equal_reward,
    gain_of,
    grouped,
    having,
    mean_of,
    model_point,
    paired,
    preference,
    quantile,
    ratio,
    rival_parts,
    same_models,
    scales_of,
    verdict,
    with_common_seeds,
)

from flow.cli import write_files

KEPT = {1.0: "all", 0.95: "95 %"}  # of a guard's gain without guidance, that a rival keeps
TEMPLATE = Path(__file__).with_name("RESULTS.template.md")
MODELS = "base", "unguarded", "guarded", "guided"
GUARD = {"guarded": "plain guard", "guided": "guided guard"}  # what they are called
SPOKEN = {"none": "without guidance", BOTH[1]: "with guidance"}

# ---------------------------------------------------------------- tables

def label(who: str) -> str:
    """What a model is called."""
    return GUARD.get(who, who)


def plus_minus(d: dict, digits: int | None = None) -> str:
    """A difference and half its interval."""
    if digits is None:
        digits = 3 if abs(d["difference"]) > 0.01 else 4
    mean = round(d["difference"], digits) + 0.0  # no -0.000
    return f"{mean:+.{digits}f}" + ("" if math.isnan(d["half"]) else f" ± {d['half']:.{digits}f}")


def rate(d: dict) -> str:
    """How often something is preferred, from how much more often than in half of the pairs."""
    return plus_minus({k: 100 * d[k] + 50 * (k == "difference") for k in d}, 0).removeprefix("+") + " %"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def checked(claims: list[tuple]) -> dict[str, dict]:
    """Claims with their verdicts. A claim is (its name, difference, sign[, at_most]), as `verdict` takes them. With
    sign None it gets no verdict. `shown` is how the number is written. A rate of preference is tested against one half.
    """
    checks = {}
    for name, d, sign, *at_most in claims:
        if math.isnan(d["difference"]):
            shown = "-"  # a number is missing
        elif "preferred" in name and "less that" not in name:
            shown = f"in {rate(d)} of pairs"
        elif "norm" in name or "lost" in name:
            shown = f"{plus_minus({k: 100 * d[k] for k in d}, 1)} %".lstrip("+" * ("lost" in name))
        else:
            shown = plus_minus(d)
        checks[name] = {**d, "verdict": "" if sign is None else verdict(d, sign, *at_most), "shown": shown}
    return checks


def verdicts(checks: dict[str, dict], name: str) -> str:
    """The verdict on a claim with and without guidance, in one if they agree."""
    found = {scale: checks[scale][name]["verdict"] for scale in reversed(BOTH) if name in checks[scale]}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{said} {SPOKEN[scale]}" for scale, said in found.items())


def numbers_of(checks: dict[str, dict], name: str) -> list[str]:
    """The columns of a claim's two numbers, the one with guidance first."""
    return [checks[scale][name]["shown"] if name in checks[scale] else "" for scale in reversed(BOTH)]


def check_table(checks: dict[str, dict]) -> str:
    """A table of a claim's checks. checks: {guidance scale: {name: what `checked` gives}}."""
    names = dict.fromkeys([name for of_scale in checks.values() for name in of_scale])
    rows = [[name, *numbers_of(checks, name), verdicts(checks, name)] for name in names]
    return markdown(["", "with guidance", "without", "verdict"], rows)


def level(results: dict[tuple, dict], part: str, who: str, metric: str) -> float:
    """A metric's mean of a model of a part."""
    return paired(results, mean_of(part, who, metric))["a"]


def change(results: dict[tuple, dict], part: str, a: str, b: str, metric: str) -> dict:
    """A metric's difference between two models of a part."""
    return paired(results, mean_of(part, a, metric), mean_of(part, b, metric))


def level_table(results: dict[tuple, dict], parts: dict[str, str], models: tuple[str, ...]) -> str:
    """A table of each metric's mean. A column is a part, given with its name in the header, and a model."""
    columns = [(name, part, who) for name, part in parts.items() for who in models]
    rows = []
    for metric, (title, digits) in METRICS.items():
        rows.append([title, *(f"{level(results, part, who, metric):.{digits}f}" for _, part, who in columns)])
    return markdown(["metric", *(f"{label(who)}, {name}" for name, _, who in columns)], rows)


def cell_table(results: dict[tuple, dict], columns: dict[str, Callable[[dict], float]], plus: float = 0.0) -> str:
    """A table of numbers of each run: a row a cell, a column a reader."""
    rows = []
    for cell, runs in grouped(results, "cell").items():
        rows.append([cell, *(" ".join(f"{plus + read(r):.3f}" for r in runs.values()) for read in columns.values())])
    return markdown(["cell", *columns], rows)


# ---------------------------------------------------------------- claims 1 to 8
# Each function takes a guidance scale of BOTH and returns checks.

def claim_1(results: dict[tuple, dict], scale: str) -> dict:
    """Inflation of the norm, and damage to pictures."""
    part = f"main/{scale}"
    claims = [("mean excess of the norm", paired(results, ratio("unguarded", "overall", part)), 1),
              ("excess of the norm at the worst step", paired(results, ratio("unguarded", "highest", part)), 1)]
    for name, metric, sign in (
        ("judged good", "judge/overall", -1),
        ("judged oversaturated", "judge/oversaturation", 1),
        ("judged over-sharpened", "judge/over-sharpening", 1),
        ("judged unnaturally lit", "judge/unnatural lighting", 1),
        ("Fréchet distance", "FD", 1),
    ):
        claims.append((name, change(results, part, "unguarded", "base", metric), sign))
    return checked(claims)


def claim_2(results: dict[tuple, dict], scale: str) -> dict:
    """Renormalization at inference."""
    part = f"renorm/{scale}"
    claims = [
        ("reward, in parts of the gain", paired(results, gain_of(part, "match"), gain_of(part, "unguarded")), 0),
        ("judged good", change(results, part, "match", "unguarded", "judge/overall"), 0),
        ("preferred to the picture that is not rescaled", paired(results, preference(part, "match vs unguarded")), 0),
    ]
    for who, guard in GUARD.items():
        preferred = paired(results, preference(part, f"{who} vs match"))
        claims.append((f"{guard}: preferred to the rescaled picture", preferred, 1))
    return checked(claims)


def claim_4(results: dict[tuple, dict], scale: str) -> dict:
    """The norm with the guards."""
    part, claims = f"main/{scale}", []
    for who, guard in GUARD.items():
        claims += [(f"{guard}: mean excess of the norm", paired(results, ratio(who, "overall", part)), 0),
                   (f"{guard}: excess of the norm at the worst step", paired(results, ratio(who, "highest", part)), 0)]
    if with_auto := having(results, "auto"):
        part = f"auto/{scale}"
        claims.append(("auto: excess of the norm at the worst step, at most 1 %",
                       paired(with_auto, ratio("auto", "excess", part)), 0, 0.01))
        if scale == BOTH[0]:
            claims.append(("auto: gain lost against the plain guard, at most 5 %",
                           paired(with_auto, gain_of(part, "guarded"), gain_of(part, "auto")), 0, 0.05))
    return checked(claims)


def claim_5_and_6(results: dict[tuple, dict], scale: str) -> dict:
    """Reward, judge and detector."""
    part, claims = f"main/{scale}", []
    for who, guard in GUARD.items():
        gained, kept = gain_of(part, "unguarded"), gain_of(part, who)
        if scale == BOTH[0]:
            claims.append((f"{guard}: gain lost, at most 5 %", paired(results, gained, kept), 0, 0.05))
        else:
            claims.append((f"{guard}: reward, in parts of the gain (no claim)", paired(results, kept, gained), None))
        claims += [
            (f"{guard}: preferred to unguarded",
             paired(results, preference(part, f"{who} vs unguarded")), 1),
            (f"{guard}: judged good", change(results, part, who, "unguarded", "judge/overall"), 1),
            (f"{guard}: Fréchet distance", change(results, part, who, "unguarded", "FD"), -1),
            (f"{guard}: the detector's P(real)", change(results, part, who, "unguarded", "P(real)"), 1),
            (f"{guard}: preferred to the base (no claim)",
             paired(results, preference(part, f"{who} vs base")), None),
        ]
    claims += [("unguarded: preferred to the base (no claim)",
                paired(results, preference(part, "unguarded vs base")), None),
               ("guided guard: preferred to the plain guard (no claim)",
                paired(results, preference(part, "guided vs guarded")), None)]
    scales = next(iter(results.values()))["main"]
    others = {"2": ("base", "2"), "1.5": ("guarded", "none")} if scale == BOTH[1] and "2" in scales else {}
    for guidance, (other, its) in others.items():  # people choose the guidance for each model
        name = f"guided guard at guidance {guidance} less {label(other)} at {its}"
        for what, read in (("judged good", partial(mean_of, metric="judge/overall")),
                           ("reward, in parts of the gain", gain_of)):
            d = paired(results, read(f"main/{guidance}", "guided"), read(f"main/{its}", other))
            claims.append((f"{name}: {what} (no claim)", d, None))
    return checked(claims)


def claim_7(results: dict[tuple, dict], scale: str) -> dict:
    """Few steps."""
    claims, all_steps = [], f"main/{scale}"
    for (who, guard), steps in product(GUARD.items(), next(iter(results.values()))["few"]):
        if steps.isdigit():
            pair, few = f"{who} vs unguarded", f"few/{steps}/{scale}"
            claims += [(f"{guard}: preferred to unguarded at {steps} steps, less that at all steps",
                        paired(results, preference(few, pair), preference(all_steps, pair)), 1),
                       (f"{guard}: preferred to the base at {steps} steps (no claim)",
                        paired(results, preference(few, f"{who} vs base")), None)]
    return checked(claims)


def claim_8(results: dict[tuple, dict], scale: str) -> dict:
    """Early stopping."""
    part, claims = f"early/{scale}", []
    for who, guard in GUARD.items():
        for how, name in ((f"equal to {who}", "of equal reward"), (f"best judged, {scale}", "best judged")):
            preferred = paired(results, preference(part, f"{who} vs early, {how}"))
            claims.append((f"{guard}: preferred to the checkpoint {name}", preferred, 1))
    return checked(claims)


# ---------------------------------------------------------------- tables of claims 1 to 8

def tables_1(results: dict[tuple, dict]) -> dict[str, str]:
    """Norms of each run, and means."""
    columns = {f"{label(who)}, {norm}, {scale}": ratio(who, norm, f"main/{scale}")
               for scale, who, norm in product(BOTH, MODELS[1:], ("overall", "highest"))}
    tables = {"Mean norm ratio, and at the worst step (highest), each seed": cell_table(results, columns, 1.0)}
    parts = {scale: f"main/{scale}" for scale in BOTH}
    tables["Means over cells, without guidance and with it"] = level_table(results, parts, MODELS)
    return tables


def untrained_table(results: dict[tuple, dict], bases: dict[str, dict]) -> str:
    """Measures that no model learned, as deviations from the renders' mean, in standard deviations of the renders; and
    the judge beside them."""
    rows, renders = [], next(iter(bases.values()))["renders"]
    columns = list(product(BOTH, MODELS))
    for metric, (title, digits) in METRICS.items():
        means = [level(results, f"main/{scale}", who, metric) for scale, who in columns]
        if metric in renders:
            mean, std = renders[metric]["mean"], renders[metric]["std"]
            rows.append([title, *(f"{(x - mean) / std:+.2f}" for x in means)])
        elif metric in ("judge/oversaturation", "judge/over-sharpening"):
            rows.append([title, *(f"{x:.{digits}f}" for x in means)])
    return markdown(["", *(f"{label(who)}, {scale}" for scale, who in columns)], rows)


def tables_2(results: dict[tuple, dict]) -> dict[str, str]:
    """Means with renormalization."""
    parts = {scale: f"renorm/{scale}" for scale in BOTH}
    return {"Means over cells": level_table(results, parts, ("unguarded", "match", "guarded", "guided"))}


def tables_5_and_6(results: dict[tuple, dict]) -> dict[str, str]:
    """Reward and judge of each run, and what FLUX's embedding is told."""
    tables = {}
    for metric, title in (("reward", "Reward"), ("judge/overall", "Judged good")):
        columns = {f"{label(who)}, {scale}": mean_of(f"main/{scale}", who, metric)
                   for scale, who in product(BOTH, MODELS)}
        tables[f"{title}, each seed"] = cell_table(results, columns)
    scales, rows = scales_of(next(iter(results.values()))["main"]), []
    for metric, who in product(("reward", "judge/overall"), MODELS):
        means = [level(results, f"main/{scale}", who, metric) for scale in scales]
        rows.append([f"{METRICS[metric][0]}, {label(who)}", *(f"{mean:.3f}" for mean in means)])
    tables["Over guidance"] = markdown(["", *scales], rows)
    if told := having(results, "told"):
        parts = {f"told {value}": f"told/{value}" for value in next(iter(told.values()))["told"] if value.isdigit()}
        tables["What the embedding of flux is told"] = level_table(told, {"told 3.5": "main/none", **parts}, MODELS)
    return tables


def tables_7(results: dict[tuple, dict]) -> dict[str, str]:
    """Quality at few steps."""
    few, rows = [steps for steps in next(iter(results.values()))["few"] if steps.isdigit()], []
    for scale, who in product(reversed(BOTH), MODELS):
        parts = [f"main/{scale}", *(f"few/{steps}/{scale}" for steps in few)]
        good = [level(results, part, who, "judge/overall") for part in parts]
        rows.append([f"{label(who)}, {scale}", *(f"{x:.3f}" for x in good)])
    return {"Judged good at few steps": markdown(["", "all steps", *(f"{steps} steps" for steps in few)], rows)}


def tables_8(results: dict[tuple, dict]) -> dict[str, str]:
    """The chosen checkpoints."""
    early, rows = [r["early"] for r in with_common_seeds(results).values()], []
    for how in early[0]["chosen"]:
        epochs = Counter(int(e["chosen"][how]) for e in early)
        gain = paired(results, gain_of(f"early/{BOTH[0]}", how))["a"]
        good = [level(results, f"early/{scale}", how, "judge/overall") for scale in BOTH]
        rows.append([how, ", ".join(f"{epoch} ({n} runs)" for epoch, n in sorted(epochs.items())),
                     *(f"{x:.2f}" for x in (gain, *good))])
    for who, guard in GUARD.items():
        missed = sum(not e["reached"][who] for e in early)
        rows.append([f"(none has the reward of the {guard}: {missed} of {len(early)} runs)", "", "", "", ""])
    header = ["checkpoint", "its epoch", "its part of the gain in reward", *(f"judged good, {scale}" for scale in BOTH)]
    return {"The chosen checkpoints": markdown(header, rows)}


# ---------------------------------------------------------------- claim 3

def coherent(beyond: int, steps: int) -> str:
    """The verdict on "no coherent signal", from how many steps are beyond chance."""
    if beyond > steps / 2:
        return "**contradicted**"
    return "holds" if beyond <= 0.1 * steps else "mixed"


def claim_3(results: dict[tuple, dict], bases: dict[str, dict]) -> dict:
    """Adjoint sensitivity: checks as those of other claims, without guidance only, with "medians" of a few numbers."""
    limit, found = quantile(next(iter(results.values()))["adjoint"]["units"] - 1), {}
    parts = {(run.base, f"adjoint {run.reward}") for run in results}
    models = {"base models": [bases[base][part] for base, part in sorted(parts) if part in bases.get(base, {})],
              "unguarded models": [r["adjoint"] for r in results.values()]}
    for (name, adjoints), what in product(models.items(), ("reward", "energy")):
        if adjoints:
            t = np.array([adjoint[what]["t_statistic"] for adjoint in adjoints])  # (models, steps)
            beyond = int((np.abs(t) > limit).sum())
            said = coherent(beyond, t.size)
            if what == "energy":
                said = "a signal, as it must" if beyond > t.size / 2 else "**the control fails**"
            medians = [np.median(np.abs(t).max(1)), np.median([np.mean(a[what]["same_sign"]) for a in adjoints]),
                       np.median([a[what]["half_batch_cosine"] for a in adjoints])]
            found[f"{name}, {what}"] = {"shown": f"{beyond} of {t.size}", "verdict": said, "medians": medians}
    return {BOTH[0]: found, BOTH[1]: {}}


def sensitivities(checks: dict[str, dict[str, dict]]) -> str:
    """The table of claim 3. checks: {corner: what `claim_3` gives}."""
    rows = []
    for corner, found in checks.items():
        for name, d in found[BOTH[0]].items():
            rows.append([corner, name, d["shown"], *(f"{x:.2f}" for x in d["medians"]), d["verdict"]])
    header = ["corner", "models, dR/ds of", "steps beyond", "largest \\|t\\|", "same sign", "cosine of half batches",
              "no signal?"]
    return markdown(header, rows)


# ---------------------------------------------------------------- claims 9 and 10: other guards, rivals

POINT = {  # a number of `model_point`: (header, digits)
    "reward, none": ("reward, no guidance", 3),
    "good, none": ("judged good, no guidance", 3),
    f"good, {BOTH[1]}": ("judged good, with guidance", 3),
    "good, 4.5": ("judged good, guidance 4.5", 3),
    "good at equal reward": ("judged good, matched reward", 3),
    "good over guidance": ("judged good, mean over guidance", 3),
    f"mean, {BOTH[1]}": ("mean norm ratio, with guidance", 3),
    f"highest, {BOTH[1]}": ("norm ratio at the worst step", 3),
    f"guarded preferred, {BOTH[1]}": ("plain guard preferred to it, with guidance", 3),
    f"guided preferred, {BOTH[1]}": ("guided guard preferred to it, with guidance", 3),
}
# the columns of claim 10 in RESULTS.md
SHORT = f"good, {BOTH[1]}", "good, 4.5", "good at equal reward", "good over guidance", f"highest, {BOTH[1]}"
Points = dict[tuple, dict[str, float]]  # {run: numbers of `model_point`}


def point_row(points: Points, against: Points | None = None) -> dict[str, dict]:
    """A row of means over cells, or of differences to another's numbers in the same runs, with intervals; and of how
    often the guards are preferred. `shown` is how a number is written: "-" if any run lacks it."""
    row = {}
    for number, (_, digits) in POINT.items():
        preferred = "preferred" in number
        less = against if against and not preferred else {run: {number: 0.0} for run in points}
        both = {run: (points[run].get(number, math.nan), less[run].get(number, math.nan)) for run in points}
        d = paired(both, lambda pair: pair[0], lambda pair: pair[1])
        shown = rate(d) if preferred else plus_minus(d, digits) if against else f"{d['a']:.{digits}f}"
        row[number] = {**d, "shown": "-" if math.isnan(d["difference"]) else shown}
    return {**row, "runs": {"shown": str(d["cells"] * d["seeds"])}}


def point_table(rows: dict[str, dict[str, dict]], columns: tuple[str, ...] = (*POINT, "runs")) -> str:
    """A table of these columns of the rows that `point_row` makes, by their names."""
    header = [POINT[column][0] if column in POINT else column for column in columns]
    lines = [[name, *(row[column]["shown"] for column in columns)] for name, row in rows.items()]
    return markdown(["", *header], lines)


def points_of_models(runs: dict[tuple, dict], models: dict[str, tuple[str, str]]) -> dict[str, Points]:
    """Numbers of models in the runs that have them. models: {name: (part, who in it)}."""
    points = {name: {run: model_point(r, part, who) for run, r in runs.items() if part in r}
              for name, (part, who) in models.items()}
    return {name: of_model for name, of_model in points.items() if of_model}


def guards_of(results: dict[tuple, dict]) -> dict[str, Points]:
    """Each guard's numbers on training prompts, of the guards that were measured in every run that has some."""
    runs = having(results, "guard: ")
    parts = [part for part in (f"guard: {name}" for name in GUARDS) if all(part in r for r in runs.values())]
    names = "base", "unguarded", f"plain, lam {LAM}", f"guided, lam {LAM}"
    models = {name: (part, who) for part in parts[:1] for name, who in zip(names, MODELS)}
    return points_of_models(runs, models | {part.removeprefix("guard: "): (part, "variant") for part in parts})


def claim_9(results: dict[tuple, dict], found: dict[str, Points], numbers: dict) -> tuple[str, dict[str, str]]:
    """Which velocity to guard, and how strongly: a table, and more of them. `found` is what `guards_of` gives."""
    rows, tables = {name: point_row(points) for name, points in found.items()}, {}
    for other in (f"guided, lam {LAM}", f"plain, lam {LAM}", "plain, lam 0.5"):
        if other in found:
            less = {name: point_row(points, found[other]) for name, points in found.items() if name != other}
            tables[f"Less {other} (but for how often a guard is preferred)"] = point_table(less)
            numbers |= {f"{name} less {other}": row for name, row in less.items()}
    numbers |= rows
    for by in ("method", "seed"):
        for of, runs in grouped(having(results, "guard: "), by).items():
            rows_of = {name: point_row(points) for name, points in guards_of(runs).items()}
            tables[f"{by} {of}"] = point_table(rows_of)
            if len(rows_of) > len(rows):  # the seed with the whole grid
                kept = [name for name in rows_of if name not in rows or name == f"guided, lam {LAM}"]
                numbers |= {f"{by} {of}, {name}": rows_of[name] for name in kept}
    return point_table(rows), tables


def target_of(name: str) -> Callable[[tuple], tuple[str, str]]:
    """A target for `equal_reward`: a guard, or a rival that has only one strength."""
    if name in GUARD:
        return lambda run: ("main", name)
    return lambda run: (rival_parts(name, run.method)[0], "rival")


def rivals_of(target: str, runs: dict[tuple, dict]) -> dict[str, dict]:
    """The rivals that keep a fraction of a target's gain without guidance, in the runs of a corner: {"rival, fraction":
    its `point_row` less the target, and "strengths", a text with each method's strength}."""
    rows, of = {}, target_of(target)
    several = [rival for rival in RIVALS if len(RIVALS[rival].strengths) > 1]
    for rival, (keep, how) in product(several, KEPT.items()):
        strengths, points = [], {}
        for method, of_method in grouped(runs, "method").items():
            found = equal_reward({run: r for run, r in of_method.items() if of(run)[0] in r}, rival, of, keep)
            if found is not None:
                points |= found[0]
                said = "none" if found[1] == RIVALS[rival].none else f"{found[1]:.2g}" if found[0] else "too weak"
                strengths.append(f"{method} {said}")
        if points:
            row = point_row(points, {run: model_point(runs[run], *of(run)) for run in points})
            rows[f"{rival}, {how}"] = {**row, "strengths": ", ".join(strengths)}
    return rows


def measured_strengths(runs: dict[tuple, dict]) -> dict[str, Points]:
    """Each rival's strengths, as measured in some runs: {"rival, strength 1": numbers of each method's weakest}."""
    points = {}
    for rival, (run, r) in product(RIVALS, runs.items()):
        for place, part in enumerate(rival_parts(rival, run.method), 1):
            if part in r and same_models(r, part):
                points.setdefault(f"{rival}, strength {place}", {})[run] = model_point(r, part, "rival")
    return points


def claim_10(results: dict[tuple, dict], numbers: dict) -> tuple[str, dict[str, str]]:
    """Rivals at equal reward without guidance, less the guard whose reward they have; and all strengths as they are."""
    equal, tables = [], {}
    for corner, runs in grouped(results, "corner").items():
        for target in (*GUARD, *(name for name in RIVALS if len(RIVALS[name].strengths) == 1)):
            if found := rivals_of(target, runs):
                title = f"{corner}, less the {label(target)}"
                rows = {f"{name} ({row['strengths']})": row for name, row in found.items()}
                numbers |= {f"{corner}, {name} of the {label(target)}'s gain": row for name, row in found.items()}
                tables[title] = point_table(rows)
                if target in GUARD:  # the other targets are in TABLES.md only
                    columns = *SHORT, f"{target} preferred, {BOTH[1]}", "runs"
                    equal.append(f"**{title}**\n\n{point_table(rows, columns)}")
        measured = measured_strengths(runs)
        for guard in GUARD:
            less = {run: model_point(r, "main", guard) for run, r in runs.items()}
            rows = {name: point_row(points, less) for name, points in measured.items()}
            tables[f"{corner}: measured strengths, weakest first, less the {label(guard)}"] = point_table(rows)
            numbers |= {f"{corner}, {name}, less the {label(guard)}": row for name, row in rows.items()}
        for method, of_method in grouped(runs, "method").items():
            models = {label(who): ("main", who) for who in MODELS}
            for part in (part for rival in RIVALS for part in rival_parts(rival, method)):
                models[part.removeprefix("rival: ")] = part, "rival"
            rows = {name: point_row(points) for name, points in points_of_models(of_method, models).items()}
            tables[f"{corner}, {method}: each strength, as it is"] = point_table(rows)
    return "\n\n".join(equal), tables


# ---------------------------------------------------------------- the report

CHECKS = {  # claim: (the part that its runs must have, its checks, its tables)
    "1": ("main", claim_1, tables_1),
    "2": ("renorm", claim_2, tables_2),
    "4": ("main", claim_4, None),
    "5 and 6": ("main", claim_5_and_6, tables_5_and_6),
    "7": ("few", claim_7, tables_7),
    "8": ("early", claim_8, tables_8),
}


def measured_claims(results: dict[tuple, dict], bases: dict[str, dict]) -> tuple[dict, dict, dict]:
    """All that is filled in: {claim: values for its section}, {claim: its tables by title}, and {claim: numbers}."""
    values, tables, numbers = {}, {}, {}
    done = having(results, "main")
    for claim, (part, check, more) in CHECKS.items():
        if runs := having(done, part):
            numbers[claim] = {scale: check(runs, scale) for scale in BOTH}
            values[claim] = {"about": len(runs), "checks": check_table(numbers[claim])}
            tables[claim] = {}
            for corner, of_corner in grouped(runs, "corner").items():
                numbers[f"{claim}, {corner}"] = {scale: check(of_corner, scale) for scale in BOTH}
                tables[claim][corner] = check_table(numbers[f"{claim}, {corner}"])
                for title, table in more(of_corner).items() if more else ():
                    tables[claim][f"{corner}. {title}"] = table
    if done:
        values["1"]["untrained"] = untrained_table(done, bases) if bases else ""
    if runs := having(done, "adjoint"):
        numbers["3"] = claim_3(runs, bases)
        by_corner = {corner: claim_3(of_corner, bases) for corner, of_corner in grouped(runs, "corner").items()}
        numbers |= {f"3, {corner}": found for corner, found in by_corner.items()}
        values["3"] = {"about": len(runs), "table": sensitivities(by_corner)}
    if guards := guards_of(done):
        table, tables["9"] = claim_9(done, guards, numbers.setdefault("9", {}))
        values["9"] = {"about": len(guards["base"]), "table": table}
    if runs := having(done, "rival: "):
        equal, tables["10"] = claim_10(runs, numbers.setdefault("10", {}))
        values["10"] = {"about": len(runs), "tables": equal}
    return values, tables, numbers


def summary(lines: list[str], numbers: dict) -> str:
    """The table of claims. A line of the template names a claim, what it says, and the check that shows it. The last
    column says in how many corners the verdict is the same."""
    rows = []
    for claim, text, name in (line.strip("| ").split(" | ") for line in lines):
        key = "5 and 6" if claim in ("5", "6") else claim
        corners = [found for other, found in numbers.items() if other.startswith(f"{key}, ")]
        said = [verdicts(found, name) for found in corners if any(name in of_scale for of_scale in found.values())]
        if said:
            overall = verdicts(numbers[key], name)
            same = f"{said.count(overall)} of {len(said)}"
            rows.append([claim, text, *numbers_of(numbers[key], name), overall, same])
    return markdown(["claim", "what it says", "with guidance", "without", "verdict", "same in"], rows)


def quoted(results: dict[tuple, dict], numbers: dict) -> dict:
    """The numbers that a comment may name: {levels[judged good, base, 3]}, a mean over cells with guidance 3, also of
    one corner or method ({levels[reward, base, 3, sd3, pickscore]}); and {found[5 and 6, 3, guided guard: preferred to
    unguarded]}, a claim's number, also of one corner ({found[5 and 6, flux, hps, 3, ...]})."""
    levels, found, done = {}, {}, having(results, "main")
    groups = {"": done, **grouped(done, "corner"), **grouped(done, "method"), **grouped(done, "cell")} if done else {}
    for of, runs in groups.items():
        units = len({run.reward for run in runs})  # rewards differ in theirs
        for scale, who, (metric, (title, digits)) in product(scales_of(next(iter(runs.values()))["main"]), MODELS,
                                                             METRICS.items()):
            if units == 1 or "reward" not in metric:
                mean = level(runs, f"main/{scale}", who, metric)
                levels[f"{title}, {who}, {scale}{of and f', {of}'}"] = f"{mean:.{min(digits, 2)}f}"
        for who in MODELS:
            points = {run: model_point(r, "main", who) for run, r in runs.items()}
            for number in ("good at equal reward", "good over guidance"):
                mean = paired(points, lambda p, k=number: p[k])["a"]
                if math.isfinite(mean):
                    levels[f"{number}, {who}{of and f', {of}'}"] = f"{mean:.2f}"
    for claim, scale in product(numbers, BOTH):
        for name, d in numbers[claim].get(scale, {}).items():
            found[f"{claim}, {scale}, {name}"] = d["shown"]
    for claim in ("9", "10"):
        for name, row in numbers.get(claim, {}).items():
            found |= {f"{claim}, {name}, {number}": row[number]["shown"] for number in POINT}
    return {"levels": levels, "found": {name: shown for name, shown in found.items() if shown != "-"}}


def comment(paragraph: str, values: dict) -> str:
    """A paragraph with its numbers filled in. One that begins with "[36 runs]" was written about that many runs; for
    another number, or if a number is missing, it is left out. The first paragraph of all, "[36, 9, 18 runs]", is also
    about those of claims 9 and 10."""
    about = re.match(r"\[([\d, ]+) runs\] ", paragraph)
    if not about:
        return paragraph.format_map(values)
    try:
        return paragraph[about.end():].format_map(values) if about[1] == str(values["about"]) else ""
    except KeyError:
        return ""


def write_report(results: dict[tuple, dict], bases: dict[str, dict], size, home: Path, assets: Path, comments: bool):
    """Write home/RESULTS.md, home/TABLES.md and home/results.json, with or without our comments on the numbers."""
    values, tables, numbers = measured_claims(results, bases)
    parts = [part for measured in (*results.values(), *bases.values()) for part in measured.values()]
    commits = sorted({part.get("of", {}).get("commit") or "unknown" for part in parts})
    done = having(results, "main")
    about = [str(len(done)), *(str(values.get(claim, {}).get("about")) for claim in ("9", "10"))]
    common = {"about": ", ".join(about), "home": home, "lam": LAM, "guidance": BOTH[1], "pictures": size.n,
              "steps": size.steps, "renders": size.renders, "commits": ", ".join(commits), "runs": len(done),
              "corners": "; ".join(f"{corner}: {len(runs)}" for corner, runs in grouped(done, "corner").items()),
              "hours": f"{sum(part.get('seconds', 0) for part in parts) / 3600:.0f}",
              "intervals": "INTERVALS", **quoted(results, numbers)}
    text = []
    for section in ("\n" + TEMPLATE.read_text()).split("\n## "):
        title, *paragraphs = section.strip().split("\n\n")
        claim = title.partition(".")[0]
        text.append(f"## {title}" if text else title)
        if claim[0].isdigit() and claim not in values:
            text.append("Not measured yet.")
            continue
        for paragraph in paragraphs:
            if paragraph.startswith("| "):
                text.append(summary(paragraph.splitlines(), numbers))
            elif comments or not paragraph.startswith("["):
                text.append(comment(paragraph, {**common, **values.get(claim, {})}))
    appendix = ["# Tables to RESULTS.md", "Written by `python tiny/reproduce.py`. \"none\" is without guidance."]
    for claim, by_title in tables.items():
        appendix += [f"## Claim {claim}"] * bool(by_title)
        appendix += [f"**{title}**\n\n{table}" for title, table in by_title.items()]
    text = "\n\n".join(filter(None, text)).replace("ASSETS", os.path.relpath(assets, home))
    cells = [line for line in text.partition("\n## ")[2].splitlines() if line.startswith("|")]
    text = text.replace("INTERVALS", str(sum(line.count(" ± ") for line in cells)))
    write_files({home / "RESULTS.md": text + "\n", home / "TABLES.md": "\n\n".join(appendix) + "\n",
                 home / "results.json": json.dumps(rounded(numbers), indent=1) + "\n"})


def rounded(x):
    """Floats at five digits, to keep committed files small; NaN as null."""
    short = json.JSONDecoder(parse_float=lambda text: float(f"{float(text):.5g}"), parse_constant=lambda _: None)
    return short.decode(json.dumps(x))
