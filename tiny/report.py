"""Write RESULTS.md and results.json from the numbers that reproduce.py measured.

RESULTS.template.md holds the text. Each claim has a function here that returns what is filled in; its numbers for
results.json go to `numbers`.
"""
import json
import math
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from guards import GUARDS, LAM, RIVALS
from paired import (
    METRICS,
    NORMS,
    equal_reward,
    grouped,
    having,
    mean_of,
    paired,
    point_of,
    preference,
    quantile,
    ratio,
    scaled,
    verdict,
)
from reading import reading

from flow.cli import write_files

TEMPLATE = Path(__file__).with_name("RESULTS.template.md")

# ---------------------------------------------------------------- tables

def plus_minus(d: dict, digits: int = 3) -> str:
    """A difference and half its interval."""
    mean = round(d["difference"], digits) + 0.0  # no -0.000
    return f"{mean:+.{digits}f}" + ("" if math.isnan(d["half"]) else f" ± {d['half']:.{digits}f}")


def lines(rows: list[list[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return lines([header, ["---"] * len(header), *rows])


def checks(numbers: dict, claims: list[tuple]) -> str:
    """A table of claims, each with its number and verdict, which also go to numbers["checks"]. A claim is (text,
    difference, sign[, at_most]), as `verdict` takes them; without a verdict if its sign is None."""
    numbers["checks"], rows = {}, []
    for text, d, sign, *at_most in claims:
        found = "" if sign is None else verdict(d, sign, *at_most)
        numbers["checks"][text] = {**d, "verdict": found}
        digits = 3 if abs(d["difference"]) > 0.01 else 4
        rows.append([text, plus_minus(d, digits), f"{d['cells larger']} of {d['cells']}", found])
    return markdown(["the paper's claim", "measured", "cells above 0", "verdict"], rows)


def levels(results: dict[tuple, dict], columns: dict[str, tuple[str, str]], a: str, b: str, numbers: dict) -> str:
    """A table of each metric's mean in each column and of column a minus column b. A column is a part and a model."""
    rows = []
    for metric, (label, digits) in METRICS.items():
        d = numbers[f"{a} - {b}: {label}"] = change(results, columns[a], columns[b], metric)
        means = [f"{paired(results, scaled(*column, metric))['a']:.{digits}f}" for column in columns.values()]
        rows.append([label, *means, plus_minus(d, digits), f"{d['cells larger']} of {d['cells']}"])
    return markdown(["metric", *columns, f"{a} - {b}", "cells above 0"], rows)


def change(results: dict[tuple, dict], a: tuple[str, str], b: tuple[str, str], metric: str, read=scaled) -> dict:
    """A metric's difference between two models, each given as a part and a name."""
    return paired(results, read(*a, metric), read(*b, metric))


def each(runs: dict[tuple, dict], read: Callable[[dict], float], plus: float = 0.0) -> str:
    """A number of each run."""
    return " ".join(f"{plus + read(r):.3f}" for r in runs.values())


def arrows(runs: dict[tuple, dict], a: str, b: str, digits: dict[str, int]) -> list[str]:
    """Means over runs of several metrics, "model a → model b"."""
    cells = []
    for metric, k in digits.items():
        before, after = (np.mean([mean_of("main", who, metric)(r) for r in runs.values()]) for who in (a, b))
        cells.append(f"{before:.{k}f} → {after:.{k}f}")
    return cells


# ---------------------------------------------------------------- claims 1 to 8

def claim_1(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Inflation of the norm, and damage to pictures."""
    whole, highest = ratio("unguarded", "overall"), ratio("unguarded", "highest")
    claims = [("the norm exceeds the reference's", paired(results, whole), 1)]
    for text, metric, sign in (
        ("colours oversaturate: judged so", "judge/oversaturation", 1),
        ("saturation", "saturation", 1),
        ("pictures over-sharpen: judged so", "judge/over-sharpening", 1),
        ("sharpness", "sharpness", 1),
        ("light is unnatural: judged so", "judge/unnatural lighting", 1),
        ("judged good", "judge/overall", -1),
        ("Fréchet distance", "FD", 1),
    ):
        claims.append((text, change(results, ("main", "unguarded"), ("main", "base"), metric, mean_of), sign))
    table = checks(numbers, claims)
    numbers["cells"], rows = {}, []
    digits = {"reward": 2, "saturation": 2, "sharpness": 4, "FD": 1, "judge/overall": 2}
    for cell, runs in grouped(results, "cell").items():
        numbers["cells"][cell] = {"ratio": [1 + whole(r) for r in runs.values()],
                                  "highest step": [1 + highest(r) for r in runs.values()]}
        rows.append([cell, each(runs, whole, 1), each(runs, highest, 1), *arrows(runs, "base", "unguarded", digits)])
    excesses = [whole(r) for r in results.values()]
    within, above = sum(0.05 <= x <= 0.15 for x in excesses), sum(x > 0.15 for x in excesses)
    renders = next(iter(bases.values()))["colours"]["renders"]
    return {"within": within, "runs": len(excesses), "beyond": above, "checks": table, **renders,
            "rows": lines(rows)}


def claim_2(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Renormalization at inference."""
    match, unguarded = ("renorm", "match"), ("renorm", "unguarded")
    table = checks(numbers, [
        ("it does not raise the reward (fraction of the gain)", change(results, match, unguarded, "reward"), 0),
        ("nor is the picture judged good more often", change(results, match, unguarded, "judge/overall"), 0),
        ("nor preferred (less one half)", paired(results, preference("renorm", "match vs unguarded")), 0),
        ("the guarded model is preferred to it (less one half)",
         paired(results, preference("renorm", "guarded vs match")), 1),
    ])
    columns = {"base": ("main", "base"), "unguarded": unguarded, "match": match, "guarded": ("renorm", "guarded")}
    same = sum(r["renorm"]["means"]["match"] == r["renorm"]["means"]["cap"] for r in results.values())
    return {"checks": table, "table": levels(results, columns, "match", "unguarded", numbers), "same": same,
            "runs": len(results)}


def coherent(beyond: int, steps: int) -> str:
    """The verdict on "no coherent signal", from how many steps are beyond chance."""
    if beyond > steps / 2:
        return "**contradicted**"
    return "holds" if beyond <= 0.1 * steps else "mixed"


def claim_3(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Adjoint sensitivity."""
    adjoints = {"base": [], "unguarded": [(run.reward, r["adjoint"]) for run, r in results.items()]}
    for b in bases.values():
        adjoints["base"] += [(part.split()[1], b[part]) for part in b if part.startswith("adjoint")]
    limit, rows = quantile(next(iter(results.values()))["adjoint"]["units"] - 1), []
    for models, reward in product(adjoints, dict.fromkeys(run.reward for run in results)):
        found = [adjoint for of_reward, adjoint in adjoints[models] if of_reward == reward]
        for what in ("reward", "energy") if found else ():
            t = np.array([adjoint[what]["t_statistic"] for adjoint in found])  # (models, steps)
            beyond = int((np.abs(t) > limit).sum())
            row = numbers[f"{models}, {reward}, {what}"] = {
                "steps": t.size,
                "beyond": beyond,
                "limit": limit,
                "largest t": np.abs(t).max(1).tolist(),
                "mean t": t.mean(0).tolist(),
                "cosine": [adjoint[what]["half_batch_cosine"] for adjoint in found],
                "same sign": [float(np.mean(adjoint[what]["same_sign"])) for adjoint in found],
            }
            label, conclusion = reward, coherent(beyond, t.size)
            if what == "energy":
                label = f"energy (control for {reward})"
                conclusion = "a signal, as it must" if beyond > t.size / 2 else "**the control fails**"
            digits = {"largest t": 1, "same sign": 2, "cosine": 2}
            medians = [f"{np.median(row[name]):.{k}f}" for name, k in digits.items()]
            rows.append([f"{models} models ({len(found)})", label, f"{beyond} of {t.size}", *medians, conclusion])
    return {"limit": limit, "rows": lines(rows)}


def claim_4(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """The norm with the guard."""
    whole, highest = ratio("guarded", "overall"), ratio("guarded", "highest")
    auto_whole, auto_highest = ratio("auto", "overall", "auto"), ratio("auto", "highest", "auto")
    claims = [
        ("lower than unguarded", paired(results, whole, ratio("unguarded", "overall")), -1),
        ("not above the reference, over the trajectory", paired(results, whole), 0),
        ("nor at any step (the highest)", paired(results, highest), 0),
    ]
    with_auto = having(results, "auto")
    if with_auto:
        auto, guarded = ("auto", "auto"), ("auto", "guarded")
        claims += [
            ("with --lam auto: not by more than 1 % at any step (excess at the highest)",
             paired(with_auto, ratio("auto", "excess", "auto")), 0, 0.01),
            (f"with --lam auto: reward, less that with lam {LAM}",
             change(with_auto, auto, guarded, "reward", mean_of), 1),
            (f"with --lam auto: judged good, less that with lam {LAM}",
             change(with_auto, auto, guarded, "judge/overall", mean_of), 1),
        ]
    table, rows = checks(numbers, claims), []
    for cell, runs in grouped(results, "cell").items():
        autos = having(runs, "auto")
        rows.append([cell, each(runs, whole, 1), each(runs, highest, 1), each(runs, ratio("guarded", "lowest"), 1),
                     each(autos, auto_whole, 1), each(autos, auto_highest, 1)])

    def above(runs: dict[tuple, dict], read: Callable[[dict], float], limit: float) -> str:
        return f"{sum(read(r) > limit for r in runs.values())} of {len(runs)}"

    said = ""
    if with_auto:
        said = (f" With `--lam auto` by more than 1 % in {above(with_auto, auto_highest, 0.01)}, by more than 1.5 % in "
                f"{above(with_auto, auto_highest, 0.015)}.")
    return {"checks": table, "above_2": above(results, highest, 0.02), "above_5": above(results, highest, 0.05),
            "auto": said, "rows": lines(rows)}


def claim_5_and_6(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Reward, judge and detector."""
    columns = {who: ("main", who) for who in ("base", "unguarded", "guarded")}
    lost = change(results, columns["unguarded"], columns["guarded"], "reward")
    claims = [
        ("5: of the reward's gain, no more than 5 % is lost", lost, 0, 0.05),
        ("6: the judge prefers the guarded picture (less one half)",
         paired(results, preference("main", "guarded vs unguarded")), 1),
    ]
    for text, metric, sign in (
        ("6: judged good", "judge/overall", 1),
        ("6: judged oversaturated", "judge/oversaturation", -1),
        ("6: judged over-sharpened", "judge/over-sharpening", -1),
        ("6: judged unnaturally lit", "judge/unnatural lighting", -1),
        ("6: detector's P(real)", "P(real)", 1),
        ("6: Fréchet distance", "FD", -1),
    ):
        claims.append((text, change(results, columns["guarded"], columns["unguarded"], metric), sign))
    claims.append(("(no claim: the guarded picture is preferred to the base's)",
                   paired(results, preference("main", "guarded vs base")), None))
    table, rows = checks(numbers, claims), []
    digits = {"reward": 3, "judge/overall": 2, "judge/oversaturation": 2, "P(real)": 2, "FD": 1}
    for cell, runs in grouped(results, "cell").items():
        numbers[cell] = {}
        for metric in METRICS:
            numbers[cell][metric] = {who: [mean_of("main", who, metric)(r) for r in runs.values()] for who in columns}
        counts = [r["main"]["verdicts"]["unguarded vs guarded"] for r in runs.values()]
        loss, tie, win, _ = np.sum(counts, axis=0).tolist()
        numbers[cell]["guarded preferred, tie, unguarded preferred"] = [win, tie, loss]
        rows.append([cell, *arrows(runs, "unguarded", "guarded", digits), f"{win} / {tie} / {loss}"])
    return {"checks": table, "levels": levels(results, columns, "guarded", "unguarded", numbers),
            "rows": lines(rows)}


def claim_7(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Few steps."""
    few = [steps for steps in next(iter(results.values()))["few"] if steps.isdigit()]
    parts = {"all": "main", **{steps: f"few/{steps}" for steps in few}}
    liked = {steps: preference(part, "guarded vs unguarded") for steps, part in parts.items()}

    def gain(steps: str, metric: str) -> Callable[[dict], float]:
        return lambda r: scaled(parts[steps], "guarded", metric)(r) - scaled(parts[steps], "unguarded", metric)(r)

    claims = []
    for steps, (metric, sign) in product(few, {"judge/overall": 1, "FD": -1}.items()):
        text = f"{METRICS[metric][0]}: guarded - unguarded at {steps} steps, less that at all"
        claims.append((text, paired(results, gain(steps, metric), gain("all", metric)), sign))
    for steps in few:
        text = f"preference for the guarded picture at {steps} steps, less that at all"
        claims.append((text, paired(results, liked[steps], liked["all"]), 1))
        with_auto = {run: r for run, r in having(results, "auto").items() if "auto" in r["few"][steps]["means"]}
        if with_auto:
            at_few, at_all = (preference(part, "auto vs unguarded") for part in (f"few/{steps}", "auto"))
            text = f"preference for the picture of --lam auto at {steps} steps, less that at all"
            claims.append((text, paired(with_auto, at_few, at_all), 1))
    table, rows = checks(numbers, claims), []
    for metric, (label, digits) in METRICS.items():
        cells = []
        for steps, part in parts.items():
            d = numbers[f"{label}, {steps} steps"] = change(results, (part, "guarded"), (part, "unguarded"), metric)
            base = paired(results, scaled(part, "base", metric))["a"]
            means = f"{base:.{digits}f}: {d['b']:.{digits}f} → {d['a']:.{digits}f}"
            cells += [means, plus_minus(d, digits)]
        rows.append([label, *cells])
    row, header = ["guarded preferred, less one half"], ["metric"]
    for steps in parts:
        d = numbers[f"guarded preferred, {steps} steps"] = paired(results, liked[steps])
        row += ["", plus_minus(d)]
        header += [f"{steps} steps", "difference"]
    return {"checks": table, "table": markdown(header, [*rows, row])}


def claim_8(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Early stopping."""
    early, guarded = [r["early"] for r in results.values()], ("early", "guarded")
    claims, tables = [], []
    for how in ("early, equal reward", "early, best judged"):
        epochs = [int(e["chosen"][how]) for e in early]
        numbers[how] = {"epochs": epochs}
        claims += [
            (f"{how}: the guarded picture is preferred (less one half)",
             paired(results, preference("early", f"guarded vs {how}")), 1),
            (f"{how}: judged good", change(results, guarded, ("early", how), "judge/overall"), 1),
            (f"{how}: reward (fraction of the gain)", change(results, guarded, ("early", how), "reward"), 1),
        ]
        counts = ", ".join(f"{epoch} ({epochs.count(epoch)} runs)" for epoch in sorted(set(epochs)))
        table = levels(results, {"early": ("early", how), "guarded": guarded}, "guarded", "early", numbers[how])
        tables.append(f"**{how}**, epochs: {counts}.\n\n{table}")
    last = max(name for e in early for name in e["found"] if name != "guarded")
    at_end = sum(e["chosen"]["early, equal reward"] == last for e in early)
    missed = sum(not e["reached"] for e in early)
    return {"missed": missed, "runs": len(results), "at_end": at_end, "checks": checks(numbers, claims),
            "tables": "\n\n".join(tables)}


# ---------------------------------------------------------------- claim 9: other guards

def guards_by_corner(results: dict[tuple, dict]) -> dict[str, dict[str, dict[tuple, dict]]]:
    """{corner: {guard: {run: metrics, norm ratio, and how often it is preferred to the default}}}; lam's values first.
    """
    corners = {}
    for corner, runs in grouped(having(results, "guard: "), "corner").items():
        found = {}
        for run, r in runs.items():
            for name in (name for name in r if name.startswith("guard: ")):
                part = r[name]
                default = {**part["means"]["guarded"], "highest": NORMS["highest"](part["ratio"]["guarded"])}
                shown = {"lam 0": "unguarded", f"lam {LAM}": "guarded", name.removeprefix("guard: "): "variant"}
                for guard, who in shown.items():
                    found.setdefault(guard, {})[run] = {
                        **part["means"][who],
                        "ratio": part["ratio"][who]["overall"],
                        "highest": NORMS["highest"](part["ratio"][who]),
                        "default": default,
                        "preferred": 0.0 if who == "guarded" else preference(name, f"{who} vs guarded")(r),
                    }
        lams = sorted((name for name in found if name.startswith("lam")), key=lambda name: float(name.split()[1]))
        corners[corner] = {name: found[name] for name in dict.fromkeys((*lams, *GUARDS)) if name in found}
    return corners


def claim_9(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Other guards."""
    tables, methods = [], list(grouped(results, "method"))
    digits = {"highest": 3, "reward": 3, "judge/overall": 3, "FD": 2}
    header = ["guard", *(f"norm ratio, {m}" for m in methods), "highest step", "reward", "judged good",
              "Fréchet distance", "preferred to the default, less one half", "runs"]
    for corner, by_guard in guards_by_corner(results).items():
        rows, numbers[corner] = [], {}
        for name, runs in by_guard.items():
            row = {m: paired(runs, lambda r, m=m: r[m], lambda r, m=m: r["default"][m]) for m in digits}
            row["ratio"] = {m: [r["ratio"] for run, r in runs.items() if run.method == m] for m in methods}
            row["preferred"] = paired(runs, lambda r: r["preferred"])
            cells = [f"{np.mean(x):.3f}" if x else "-" for x in row["ratio"].values()]
            if name == f"lam {LAM}":
                cells += [f"**{row[m]['a']:.{k}f}**" for m, k in digits.items()] + [""]
            else:
                cells += [f"{row[m]['a']:.{k}f} ({plus_minus(row[m], k)})" for m, k in digits.items()]
                cells.append(plus_minus(row["preferred"]))
            numbers[corner][name] = row
            rows.append([name, *cells, str(len(runs))])
        tables.append(f"**{corner}**\n\n{markdown(header, rows)}")
    return {"tables": "\n\n".join(tables)}


# ---------------------------------------------------------------- claim 10: rivals

BESIDE = {"judge/overall": 3, "FD": 2, "saturation": 3}  # metrics in the table of rivals, and their digits
KEPT = {1.0: "at equal reward", 0.95: "with 5 % less"}  # the fraction of the guard's gain that a rival keeps
AUTO = "(--lam auto)"  # is listed with the rivals at their weakest
TOO_WEAK = "its strengths end before the reward falls"


def rivals_of(runs: dict[tuple, dict], keep: float | None) -> dict[str, dict]:
    """Each rival's numbers in a corner's runs, at the strength that keeps this fraction of the gain. With None, at its
    weakest, and those of --lam auto."""
    known = {}
    for rival in (rival for rival in RIVALS if keep is None or len(RIVALS[rival].strengths) > 1):
        strengths, compared = {}, {}
        for method, of_method in grouped(runs, "method").items():
            found = equal_reward(of_method, rival, keep)
            if found is not None:
                compared |= found[0]
                strengths[method] = found[1]
        if strengths:
            known[rival] = {"strengths": strengths, **(against_guard(compared) if compared else {"verdict": TOO_WEAK})}
    with_auto = having(runs, "auto")
    if keep is None and with_auto:
        compared = {run: {"rival": point_of(r, "auto", "auto"), **r["main"]["means"]} for run, r in with_auto.items()}
        known[AUTO] = {"strengths": {}, **against_guard(compared)}
        known[AUTO]["verdict"] = known[AUTO]["verdict"].replace("the rival", "auto")
    return known


def against_guard(compared: dict[tuple, dict]) -> dict:
    """A rival's numbers beside the guard's, from {run: metrics of "rival", "guarded", "unguarded" and "base"}."""
    def reward_change(m: dict) -> float:  # as a fraction of the gain
        return (m["rival"]["reward"] - m["guarded"]["reward"]) / (m["unguarded"]["reward"] - m["base"]["reward"])

    numbers = {
        "preferred": paired(compared, lambda m: m["rival"]["preferred"]),
        "reward": paired(compared, reward_change),
        "highest step": paired(compared, lambda m: m["rival"]["highest"])["a"],
    }
    for metric in BESIDE:
        numbers[metric] = paired(compared, lambda m, k=metric: m["rival"][k], lambda m, k=metric: m["guarded"][k])
    return {**numbers, "verdict": preferred_side(numbers["preferred"])}


def preferred_side(preferred: dict) -> str:
    """Whose pictures the judge prefers, from how often it prefers the guarded picture, less one half."""
    if math.isnan(preferred["half"]):
        return "one seed: no interval"
    if abs(preferred["difference"]) <= preferred["half"]:
        return "not resolved"
    return "the guard" if preferred["difference"] > 0 else "**the rival**"


def rival_row(rival: str, known: dict) -> list[str]:
    """A rival's row of the table."""
    strengths = []
    for method, strength in known["strengths"].items():
        text = "-" if strength is None else "none" if strength == RIVALS[rival].none else f"{strength:.2g}"
        strengths.append(f"{method} {text}")
    strengths = ", ".join(strengths)
    if known["verdict"] == TOO_WEAK:
        return [rival, strengths, *["-"] * (3 + len(BESIDE)), TOO_WEAK]
    metrics = [plus_minus(known[metric], digits) for metric, digits in BESIDE.items()]
    step = "-" if rival == "projected" else f"{known['highest step']:.3f}"  # its norms are from before the projection
    return [rival, strengths, plus_minus(known["preferred"]), plus_minus(known["reward"]), *metrics, step,
            known["verdict"]]


def claim_10(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """Rivals of the guard at equal reward, and where they may lose a little more."""
    header = ["rival", "its strength", "guarded preferred to it, less one half", "reward (fraction of the gain)",
              *(METRICS[metric][0] for metric in BESIDE), "highest step", "the judge prefers"]
    tables = []
    for corner, runs in grouped(results, "corner").items():
        for keep, how in (*KEPT.items(), (None, "at their weakest")):
            known = numbers[f"{corner}, {how}"] = rivals_of(runs, keep)
            rows = [rival_row(rival, row) for rival, row in known.items()]
            tables.append(f"**{corner}, {how}**\n\n{markdown(header, rows)}")
    return {"tables": "\n\n".join(tables)}


# ---------------------------------------------------------------- the report

CLAIMS = {  # the part that a claim's runs must have, and its function
    "1": ("main", claim_1),
    "2": ("renorm", claim_2),
    "3": ("adjoint", claim_3),
    "4": ("main", claim_4),
    "5 and 6": ("main", claim_5_and_6),
    "7": ("few", claim_7),
    "8": ("early", claim_8),
    "9": ("guard", claim_9),
    "10": ("rival", claim_10),
}


def summary(lines: list[str], numbers: dict) -> str:
    """The table of claims. A line of the template names a claim, what it says, and the check that shows it."""
    rows = []
    for claim, text, check in (line.strip("| ").split(" | ") for line in lines):
        if found := numbers.get(claim, {}).get("checks", {}).get(check):
            rows.append([claim, text, plus_minus(found), found["verdict"]])
    for name, row in numbers.get("3", {}).items():
        if name.startswith("unguarded") and name.endswith("reward"):
            line = f"‖v‖ carries no first-order signal of {name.split(', ')[1]} (steps beyond chance, trained models)"
            rows.append(["3", line, f"{row['beyond']} of {row['steps']}", coherent(row["beyond"], row["steps"])])
    for how in KEPT.values():
        known = [rivals for where, rivals in numbers.get("10", {}).items() if where.endswith(how)]
        verdicts = [row["verdict"] for rivals in known for row in rivals.values()]
        if verdicts:
            worse = verdicts.count("the guard")
            conclusion = "holds" if worse == len(verdicts) else "not resolved"
            if "**the rival**" in verdicts:
                conclusion = "**contradicted**"
            line = f"the judge prefers the guard to every rival {how}"
            rows.append(["10", line, f"to {worse} of {len(verdicts)}", conclusion])
    rows.sort(key=lambda row: int(row[0].split()[0]))
    return markdown(["claim", "what it says", "measured", "verdict"], rows)


def introduction(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> dict:
    """What is filled in before the claims."""
    parts = [part for numbers in (*results.values(), *bases.values()) for part in numbers.values()]
    commits = sorted({part.get("of", {}).get("commit") or "unknown" for part in parts})
    ahead = []
    for where, rivals in numbers.get("10", {}).items():
        if names := [rival for rival, row in rivals.items() if row["verdict"] == "**the rival**"]:
            ahead.append(f"{where}: {', '.join(names)}")
    ahead = f"**Rivals whose pictures the judge prefers to the guard's.** {'; '.join(ahead)}." if ahead else ""
    done = having(results, "main")
    return {"commits": ", ".join(commits), "rivals_ahead": ahead, "runs": len(done),
            "cells": len(grouped(done, "cell"))}


def write_report(results: dict[tuple, dict], bases: dict[str, dict], size, home: Path, assets: Path):
    """Write home/RESULTS.md and home/results.json."""
    top, *sections = TEMPLATE.read_text().split("\n## ")
    numbers, text = {}, []
    for section in sections:
        title, command, *paragraphs = section.strip().split("\n\n")
        text += [f"## {title}", command]
        claim = title.partition(".")[0]
        part, fill = CLAIMS[claim]
        measured = having(results if part == "guard" else having(results, "main"), part)
        if not measured:
            text.append("Not measured yet.")
            continue
        numbers[claim] = {}
        values = {"lam": LAM, **fill(measured, bases, numbers[claim])}
        for paragraph in paragraphs:
            if not paragraph.startswith("["):
                text.append(paragraph.format_map(values))
            elif assets == Path("assets"):  # what we made of the committed numbers
                text.append(reading(claim, paragraph, measured, numbers))
    values = {"home": home, "lam": LAM, "pictures": size.n, "steps": size.steps}
    values |= introduction(results, bases, numbers)
    start = []
    for paragraph in top.strip().split("\n\n"):
        is_table = paragraph.startswith("|")
        start.append(summary(paragraph.splitlines(), numbers) if is_table else paragraph.format_map(values))
    text = "\n\n".join(paragraph for paragraph in (*start, *text) if paragraph)
    write_text(home / "RESULTS.md", text.replace("ASSETS", os.path.relpath(assets, home)) + "\n")
    write_text(home / "results.json", json.dumps(rounded(numbers), indent=1) + "\n")


def write_text(path: Path, text: str):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: text})


def rounded(x):
    """Floats at five digits, to keep committed files small; NaN as null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x
