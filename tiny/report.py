"""RESULTS.md and results.json, from the numbers that reproduce.py has gathered."""
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
    cells_of,
    corners_of,
    equal_reward,
    excess,
    has,
    has_any,
    highest,
    lowest,
    of,
    overall,
    paired,
    point_of,
    quantile,
    rate,
    ratio,
    raw,
    verdict,
)
from reading import reading

from flow.cli import write_files

# ---------------------------------------------------------------- tables

def pm(d: dict, digits: int = 3) -> str:
    """A difference with its interval."""
    mean = round(d["difference"], digits) + 0.0  # no -0.000
    return f"{mean:+.{digits}f}" + ("" if math.isnan(d["half"]) else f" ± {d['half']:.{digits}f}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


def checks(numbers: dict, rows: list[tuple[str, dict, str]]) -> str:
    """A table of what is claimed, what was measured and the verdict."""
    numbers["checks"] = {claim: {**d, "verdict": conclusion} for claim, d, conclusion in rows}
    cells = []
    for claim, d, conclusion in rows:
        digits = 3 if abs(d["difference"]) > 0.01 else 4
        cells.append([claim, pm(d, digits), f"{d['cells larger']} of {d['cells']}", conclusion])
    return markdown(["the paper's claim", "measured", "cells above 0", "verdict"], cells)


def check_each(change: Callable[[str], dict], claims: dict[str, tuple[str, int]]) -> list[tuple[str, dict, str]]:
    """Rows for `checks`: of each claim, what `change` measures of its metric, and the verdict on its sign."""
    rows = []
    for claim, (metric, sign) in claims.items():
        d = change(metric)
        rows.append((claim, d, verdict(d, sign)))
    return rows


def levels(results: dict[tuple, dict], columns: dict[str, tuple[str, str]], a: str, b: str, numbers: dict) -> str:
    """A table of each metric's mean in each column, which is a part and a name in it, and of column a less b."""
    rows = []
    for metric, (label, digits) in METRICS.items():
        d = paired(results, of(*columns[a], metric), of(*columns[b], metric))
        numbers[f"{a} - {b}: {label}"] = d
        values = [paired(results, of(*place, metric))["a"] for place in columns.values()]
        means = [f"{x:.{digits}f}" for x in values]
        rows.append([label, *means, pm(d, digits), f"{d['cells larger']} of {d['cells']}"])
    return markdown(["metric", *columns, f"{a} - {b}", "cells above 0"], rows)


def mean(runs: list[dict], read: Callable[[dict], float]) -> float:
    """Over runs."""
    return float(np.mean([read(r) for r in runs]))


def each(runs: list[dict], read: Callable[[dict], float], digits: int = 3) -> str:
    """Each seed's."""
    return " ".join(f"{read(r):.{digits}f}" for r in runs)


def arrows(runs: list[dict], before: str, after: str, digits: dict[str, int]) -> list[str]:
    """Of each metric, its mean before and after."""
    out = []
    for metric, k in digits.items():
        a, b = (mean(runs, raw("main", who, metric)) for who in (before, after))
        out.append(f"{a:.{k}f} → {b:.{k}f}")
    return out


def claim_1(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Inflation."""
    def change(metric: str) -> dict:
        """By RL."""
        return paired(results, raw("main", "unguarded", metric), raw("main", "base", metric))

    def norm(pick: Callable[[dict], float]) -> Callable[[dict], float]:
        """Reads the norm ratio."""
        return lambda r: 1 + ratio("unguarded", pick)(r)

    inflated = paired(results, ratio("unguarded", overall))
    shares = [ratio("unguarded", overall)(r) for r in results.values()]
    within, above = sum(0.05 <= x <= 0.15 for x in shares), sum(x > 0.15 for x in shares)
    table = checks(numbers, [
        ("the norm exceeds the reference's", inflated, verdict(inflated, 1)),
        *check_each(change, {
            "colours oversaturate: judged so": ("judge/oversaturation", 1),
            "saturation": ("saturation", 1),
            "pictures over-sharpen: judged so": ("judge/over-sharpening", 1),
            "sharpness": ("sharpness", 1),
            "light is unnatural: judged so": ("judge/unnatural lighting", 1),
            "judged good": ("judge/overall", -1),
            "Fréchet distance": ("FD", 1),
        }),
    ])
    numbers["cells"], rows = {}, []
    digits = {"reward": 2, "saturation": 2, "sharpness": 4, "FD": 1, "judge/overall": 2}
    for cell, runs in cells_of(results).items():
        whole, high = [norm(overall)(r) for r in runs], [norm(highest)(r) for r in runs]
        numbers["cells"][cell] = {"ratio": whole, "highest step": high}
        changes = arrows(runs, "base", "unguarded", digits)
        rows.append([cell, each(runs, norm(overall)), each(runs, norm(highest)), *changes])
    header = ["cell", "norm ratio, each seed", "its highest step", "reward", "saturation", "sharpness",
              "Fréchet distance", "judged good"]
    renders = next(iter(bases.values()))["colours"]["renders"]
    return (f"Unguarded less base; {within} of {len(shares)} runs lie within the paper's 5 to 15 %, {above} above.\n\n"
            f"{table}\n\nBase → unguarded (renders: saturation {renders['saturation']:.2f}, sharpness "
            f"{renders['sharpness']:.4f}):\n\n{markdown(header, rows)}\n\n![norm ratios](ASSETS/inflation.png)\n\n"
            "A line is a run; the upper two rows are the training's own evaluations, at 8 steps.")


def claim_2(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Renormalization at inference."""
    def change(metric: str) -> dict:
        """By rescaling."""
        return paired(results, of("renorm", "match", metric), of("renorm", "unguarded", metric))

    reward, good = change("reward"), change("judge/overall")
    liked = paired(results, rate("renorm", "match vs unguarded"))
    guard = paired(results, rate("renorm", "guarded vs match"))
    same = sum(r["renorm"]["means"]["match"] == r["renorm"]["means"]["cap"] for r in results.values())
    table = checks(numbers, [
        ("it does not raise the reward (share of the gain)", reward, verdict(reward, 0)),
        ("nor is the picture judged good more often", good, verdict(good, 0)),
        ("nor preferred (less one half)", liked, verdict(liked, 0)),
        ("the guarded model is preferred to it (less one half)", guard, verdict(guard, 1)),
    ])
    columns = {"base": ("main", "base"), **{name: ("renorm", name) for name in ("unguarded", "match", "guarded")}}
    return (f"`--renorm match` on the unguarded model, less the same model without it.\n\n{table}\n\n"
            f"{levels(results, columns, 'match', 'unguarded', numbers)}\n\n`--renorm cap` gives the same numbers in "
            f"{same} of {len(results)} runs: nearly every velocity there is too long.")


def coherent(beyond: int, steps: int) -> str:
    """What the steps beyond chance say of the claim that there is no coherent signal."""
    if beyond > steps / 2:
        return "**contradicted**"
    return "holds" if beyond <= 0.1 * steps else "mixed"


def claim_3(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Adjoint sensitivity."""
    adjoints = {
        "base": [(part.split()[1], b[part]) for b in bases.values() for part in b if part.startswith("adjoint")],
        "unguarded": [(run.reward, r["adjoint"]) for run, r in results.items()],
    }
    rows = []
    for name, reward in product(adjoints, dict.fromkeys(run.reward for run in results)):
        models = [a for of_reward, a in adjoints[name] if of_reward == reward]
        for of_what in ("reward", "energy") if models else ():
            found = [a[of_what] for a in models]
            t = np.array([f["t_statistic"] for f in found])
            limit = quantile(models[0]["units"] - 1)
            beyond = int((np.abs(t) > limit).sum())
            row = numbers[f"{name}, {reward}, {of_what}"] = {
                "steps": t.size,
                "beyond": beyond,
                "limit": limit,
                "largest t": np.abs(t).max(1).tolist(),
                "mean t": t.mean(0).tolist(),
                "cosine": [f["half_batch_cosine"] for f in found],
                "same sign": [float(np.mean(f["same_sign"])) for f in found],
            }
            control = "a signal, as it must" if beyond > t.size / 2 else "**the control fails**"
            rows.append([
                f"{name} models ({len(models)})",
                {"reward": reward, "energy": f"energy (control for {reward})"}[of_what],
                f"{beyond} of {t.size}",
                f"{np.median(row['largest t']):.1f}",
                f"{np.median(row['same sign']):.2f}",
                f"{np.median(row['cosine']):.2f}",
                coherent(beyond, t.size) if of_what == "reward" else control,
            ])
    header = ["models", "dR/ds of", "steps beyond", "largest \\|t\\|", "same sign", "cosine of half batches",
              "no coherent signal?"]
    return (f"\\|t\\| > {limit:.2f}: by chance one step in twenty. Units are prompts; the halves of the cosine share "
            "no prompt; medians over models. No coherent signal: up to a tenth of the steps; contradicted: above half."
            f"\n\n{markdown(header, rows)}\n\n![sensitivities](ASSETS/adjoint.png)\n\nLines are means over models, "
            f"bands their range; grey: \\|t\\| below {limit:.2f}.")


def claim_4(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """The guarded norm."""
    less = paired(results, ratio("guarded", overall), ratio("unguarded", overall))
    whole, high = paired(results, ratio("guarded", overall)), paired(results, ratio("guarded", highest))
    above = [ratio("guarded", highest)(r) for r in results.values()]
    claims = [
        ("lower than unguarded", less, verdict(less, -1)),
        ("not above the reference, over the trajectory", whole, verdict(whole, 0)),
        ("nor at any step (the highest)", high, verdict(high, 0)),
    ]
    if with_auto := has(results, "auto"):
        auto = paired(with_auto, ratio("auto", excess, "auto"))
        reward = paired(with_auto, raw("auto", "auto", "reward"), raw("auto", "guarded", "reward"))
        good = paired(with_auto, raw("auto", "auto", "judge/overall"), raw("auto", "guarded", "judge/overall"))
        claims += [
            ("with --lam auto: not by more than 1 % at any step (excess at the highest)", auto, verdict(auto, 0, 0.01)),
            (f"with --lam auto: reward, less that with lam {LAM}", reward, verdict(reward, 1)),
            (f"with --lam auto: judged good, less that with lam {LAM}", good, verdict(good, 1)),
        ]
    table = checks(numbers, claims)
    rows = []
    for cell, runs in cells_of(results).items():
        norms = [r["main"]["ratio"]["guarded"] for r in runs]
        autos = [r["auto"]["ratio"]["auto"] for r in runs if "auto" in r]
        rows.append([cell, each(norms, overall), each(norms, highest), each(norms, lowest), each(autos, overall),
                     each(autos, highest)])
    header = ["cell", "norm ratio, each seed", "highest step", "lowest step", "with auto", "highest step"]
    def beyond(by: float, excesses: list[float]) -> str:
        """How many runs."""
        return f"{sum(x > by for x in excesses)} of {len(excesses)}"

    said = ""
    if autos := [ratio("auto", highest, "auto")(r) for r in with_auto.values()]:
        said = (f" With `--lam auto` by more than 1 % in {beyond(0.01, autos)}, by more than 1.5 % in "
                f"{beyond(0.015, autos)}.")
    return (f"Norm ratio less 1.\n\n{table}\n\nThe highest step is above the reference by more than 2 % in "
            f"{beyond(0.02, above)} runs, by more than 5 % in {beyond(0.05, above)}.{said}\n\n{markdown(header, rows)}")


def claim_5_and_6(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Reward, judge, detector."""
    def change(metric: str) -> dict:
        """By the guard."""
        return paired(results, of("main", "guarded", metric), of("main", "unguarded", metric))

    lost = paired(results, of("main", "unguarded", "reward"), of("main", "guarded", "reward"))
    liked = paired(results, rate("main", "guarded vs unguarded"))
    over_base = paired(results, rate("main", "guarded vs base"))
    table = checks(numbers, [
        ("5: of the reward's gain, no more than 5 % is lost", lost, verdict(lost, 0, 0.05)),
        ("6: the judge prefers the guarded picture (less one half)", liked, verdict(liked, 1)),
        *check_each(change, {
            "6: judged good": ("judge/overall", 1),
            "6: judged oversaturated": ("judge/oversaturation", -1),
            "6: judged over-sharpened": ("judge/over-sharpening", -1),
            "6: judged unnaturally lit": ("judge/unnatural lighting", -1),
            "6: detector's P(real)": ("P(real)", 1),
            "6: Fréchet distance": ("FD", -1),
        }),
        ("(no claim: the guarded picture is preferred to the base's)", over_base, ""),
    ])
    rows, columns = [], {who: ("main", who) for who in ("base", "unguarded", "guarded")}
    digits = {"reward": 3, "judge/overall": 2, "judge/oversaturation": 2, "P(real)": 2, "FD": 1}
    for cell, runs in cells_of(results).items():
        loss, tie, win, _ = np.sum([r["main"]["verdicts"]["unguarded vs guarded"] for r in runs], axis=0)
        numbers[cell] = {m: {who: [raw("main", who, m)(r) for r in runs] for who in columns} for m in METRICS}
        numbers[cell]["guarded preferred, tie, unguarded preferred"] = [int(win), int(tie), int(loss)]
        rows.append([cell, *arrows(runs, "unguarded", "guarded", digits), f"{win} / {tie} / {loss}"])
    header = ["cell", "reward", "judged good", "judged oversaturated", "P(real)", "Fréchet distance",
              "judge prefers: guarded / tie / unguarded"]
    return (f"{table}\n\n{levels(results, columns, 'guarded', 'unguarded', numbers)}\n\nUnguarded → guarded:\n\n"
            f"{markdown(header, rows)}\n\n![paired differences](ASSETS/differences.png)\n\nGuarded less unguarded: "
            "a dot a run, a tick a cell's mean, the band the interval of the mean over cells.")


def claim_7(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Few steps."""
    few = [steps for steps in next(iter(results.values()))["few"] if steps.isdigit()]
    parts = {"all": "main", **{steps: f"few/{steps}" for steps in few}}

    def gain(part: str, metric: str) -> Callable[[dict], float]:
        """Of the guard."""
        return lambda r: of(part, "guarded", metric)(r) - of(part, "unguarded", metric)(r)

    rows, compared = [], (("judge/overall", "judged good", 1), ("FD", "Fréchet distance", -1))
    for steps, (metric, claim, sign) in product(few, compared):
        d = paired(results, gain(parts[steps], metric), gain("main", metric))
        rows.append((f"{claim}: guarded - unguarded at {steps} steps, less that at all", d, verdict(d, sign)))
    for steps in few:
        d = paired(results, rate(parts[steps], "guarded vs unguarded"), rate("main", "guarded vs unguarded"))
        rows.append((f"preference for the guarded picture at {steps} steps, less that at all", d, verdict(d, 1)))
        if with_auto := {run: r for run, r in has(results, "auto").items() if "auto" in r["few"][steps]["means"]}:
            liked, at_all = (rate(part, "auto vs unguarded") for part in (f"few/{steps}", "auto"))
            d = paired(with_auto, liked, at_all)
            claim = f"preference for the picture of --lam auto at {steps} steps, less that at all"
            rows.append((claim, d, verdict(d, 1)))
    table = checks(numbers, rows)
    rows = []
    for metric, (label, digits) in METRICS.items():
        cells = []
        for steps, part in parts.items():
            d = paired(results, of(part, "guarded", metric), of(part, "unguarded", metric))
            numbers[f"{label}, {steps} steps"] = d
            base = paired(results, of(part, "base", metric))["a"]
            cells += [f"{base:.{digits}f}: {d['b']:.{digits}f} → {d['a']:.{digits}f}", pm(d, digits)]
        rows.append([label, *cells])
    row, header = ["guarded preferred, less one half"], ["metric"]
    for steps, part in parts.items():
        d = numbers[f"guarded preferred, {steps} steps"] = paired(results, rate(part, "guarded vs unguarded"))
        row += ["", pm(d)]
        header += [f"{steps} steps", "difference"]
    return f"{table}\n\nBase: unguarded → guarded, and the difference:\n\n{markdown(header, [*rows, row])}"


def claim_8(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Early stopping."""
    early = [r["early"] for r in results.values()]
    last = max(name for e in early for name in e["found"] if name != "guarded")
    rows, tables = [], []
    for how in ("early, equal reward", "early, best judged"):
        epochs = [int(e["chosen"][how]) for e in early]
        known = numbers[how] = {"epochs": epochs}
        liked = paired(results, rate("early", f"guarded vs {how}"))
        good = paired(results, of("early", "guarded", "judge/overall"), of("early", how, "judge/overall"))
        gain = paired(results, of("early", "guarded", "reward"), of("early", how, "reward"))
        rows.append((f"{how}: the guarded picture is preferred (less one half)", liked, verdict(liked, 1)))
        rows.append((f"{how}: judged good", good, verdict(good, 1)))
        rows.append((f"{how}: reward (share of the gain)", gain, verdict(gain, 1)))
        counts = ", ".join(f"{epoch} ({epochs.count(epoch)} runs)" for epoch in sorted(set(epochs)))
        columns = {"early": ("early", how), "guarded": ("early", "guarded")}
        table = levels(results, columns, "guarded", "early", known)
        tables.append(f"**{how}**, epochs: {counts}.\n\n{table}")
    missed = sum(not e["reached"] for e in early)
    at_end = sum(e["chosen"]["early, equal reward"] == last for e in early)
    tables = "\n\n".join([checks(numbers, rows), *tables])
    return ("Guarded, at the end of training, less the unguarded run's checkpoint, of the eight, that first has equal "
            "reward (not lower by more than one standard error; the best one where none has: "
            f"{missed} of {len(results)} runs), or that the judge calls good most often; both chosen on training "
            f"prompts. The first is the last checkpoint in {at_end} runs: there, stopping earlier costs reward, and "
            f"the comparison is that of claim 6.\n\n{tables}\n\n![reward against verdict](ASSETS/early.png)")


def guards(results: dict[tuple, dict]) -> dict[str, dict[tuple, dict]]:
    """{guard: {run: its ratio, its metrics and how often it is preferred to the default}}, lam's values first."""
    found = {"lam 0": {}, f"lam {LAM}": {}}
    for run, r in results.items():
        for name in (name for name in r if name.startswith("guard: ")):
            part = r[name]
            shown = {"lam 0": "unguarded", f"lam {LAM}": "guarded", name.removeprefix("guard: "): "variant"}
            for guard, who in shown.items():
                found.setdefault(guard, {})[run] = {
                    **part["means"][who],
                    "ratio": part["ratio"][who]["overall"],
                    "highest": highest(part["ratio"][who]),
                    "default": {**part["means"]["guarded"], "highest": highest(part["ratio"]["guarded"])},
                    "preferred": 0.0 if who == "guarded" else rate(name, f"{who} vs guarded")(r),
                }
    if not all(found.values()):
        return {}
    by_lam = sorted((name for name in found if name.startswith("lam")), key=lambda name: float(name.split()[1]))
    others = [name for name in GUARDS if name in found and name not in by_lam]
    return {name: found[name] for name in (*by_lam, *others)}


def corners(results: dict[tuple, dict]) -> dict[str, dict[str, dict[tuple, dict]]]:
    """The guards of each base and reward that have any."""
    found = {corner: guards(runs) for corner, runs in corners_of(results).items()}
    return {corner: by_guard for corner, by_guard in found.items() if by_guard}


def claim_9(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """Other guards."""
    tables, methods = [], list(dict.fromkeys(run.method for run in results))
    digits = {"highest": 3, "reward": 3, "judge/overall": 3, "FD": 2}
    for corner, by_guard in corners(results).items():
        rows, known = [], numbers.setdefault(corner, {})
        for name, runs in by_guard.items():
            row = known[name] = {m: paired(runs, lambda r, m=m: r[m], lambda r, m=m: r["default"][m]) for m in digits}
            row["ratio"] = {m: [r["ratio"] for run, r in runs.items() if run.method == m] for m in methods}
            row["preferred"] = paired(runs, lambda r: r["preferred"])
            cells = [f"{np.mean(x):.3f}" if x else "-" for x in row["ratio"].values()]
            if name == f"lam {LAM}":
                cells += [f"**{row[m]['a']:.{k}f}**" for m, k in digits.items()] + [""]
            else:
                cells += [f"{row[m]['a']:.{k}f} ({pm(row[m], k)})" for m, k in digits.items()] + [pm(row["preferred"])]
            rows.append([name, *cells, str(len(runs))])
        header = ["guard", *(f"norm ratio, {m}" for m in methods), "highest step", "reward", "judged good",
                  "Fréchet distance", "preferred to the default, less one half", "runs"]
        tables.append(f"**{corner}**\n\n{markdown(header, rows)}")
    tables = "\n\n".join(tables)
    return (f"In brackets: less lam {LAM} with NormGuard's own hinge, the default. On training prompts, with noise "
            "that no training saw; the default was fixed before."
            f"\n\n{tables}\n\n![guards](ASSETS/ablation.png)")


BESIDE = {"judge/overall": 3, "FD": 2, "saturation": 3}  # metrics of a rival beside the guard's, and their digits
KEPT = {1.0: "at equal reward", 0.95: "with 5 % less"}  # what a rival keeps of the guard's gain in reward
AUTO = "(--lam auto)"  # no rival, but at a reward of its own too
TOO_WEAK = "its strengths end before the reward falls"


def against_guard(compared: dict[tuple, dict]) -> dict:
    """A rival's numbers beside the guard's, from the metrics of both in each run."""
    numbers = {
        "preferred": paired(compared, lambda m: m["rival"]["preferred"]),
        "reward": paired(compared, lost_gain),
        "highest step": paired(compared, lambda m: m["rival"]["highest"])["a"],
    }
    for metric in BESIDE:
        numbers[metric] = paired(compared, lambda m, k=metric: m["rival"][k], lambda m, k=metric: m["guarded"][k])
    return {**numbers, "verdict": preferred_side(numbers["preferred"])}


def auto_of(runs: dict[tuple, dict]) -> dict[tuple, dict]:
    """The metrics of --lam auto in each run, in a rival's place."""
    return {run: {"rival": point_of(r, "auto", "auto"), **r["main"]["means"]} for run, r in has(runs, "auto").items()}


def rivals_of(runs: dict[tuple, dict], keep: float | None) -> dict[str, dict]:
    """Of a corner's runs, each rival's numbers beside the guard's while it keeps this share of the gain; or (None) at
    its weakest, as it is, and those of --lam auto."""
    by_method, known = {}, {}
    for run, r in runs.items():
        by_method.setdefault(run.method, {})[run] = r
    for rival in (rival for rival in RIVALS if keep is None or len(RIVALS[rival].strengths) > 1):
        found = {method: equal_reward(of_method, rival, keep) for method, of_method in by_method.items()}
        strengths = {method: strength for method, (met, strength) in found.items() if met}
        passed = [method for method, strength in strengths.items() if strength is not None]
        compared = {run: m for method in passed for run, m in found[method][0].items()}
        if strengths:
            known[rival] = {"strengths": strengths, **(against_guard(compared) if passed else {"verdict": TOO_WEAK})}
    if keep is None and (compared := auto_of(runs)):
        known[AUTO] = {"strengths": {}, **against_guard(compared)}
        known[AUTO]["verdict"] = known[AUTO]["verdict"].replace("the rival", "auto")
    return known


def claim_10(results: dict[tuple, dict], bases: dict[str, dict], numbers: dict) -> str:
    """The guard's rivals at equal reward, and where they may lose a little more."""
    header = ["rival", "its strength", "guarded preferred to it, less one half", "reward (share of the gain)",
              *(METRICS[metric][0] for metric in BESIDE), "highest step", "the judge prefers"]
    tables = []
    for corner, runs in corners_of(results).items():
        for keep, how in (*KEPT.items(), (None, "at their weakest")):
            known = numbers[f"{corner}, {how}"] = rivals_of(runs, keep)
            rows = [rival_row(rival, row) for rival, row in known.items()]
            tables.append(f"**{corner}, {how}**\n\n{markdown(header, rows)}")
    tables = "\n\n".join(tables)
    return ("Each rival as strong as it may be while it keeps the gain in reward (the guarded model's or the unguarded "
            "one's, whichever is less), and while it keeps 95 % of it: between two strengths interpolated, never "
            "extrapolated; one strength for the seeds of a cell, chosen on training prompts (`none`: the unguarded "
            f"model itself). It, less the guarded model (lam {LAM}), on held-out ones; the intervals hold the choice's "
            "error too. Between two strengths reward bends, so that a straight line asks a rival to be a little weaker "
            "than it might, most from the unguarded model to the weakest strength. So these stand there too, as they "
            "are, at a reward of their own; beside them `--lam auto`, and what has but one strength: `projected`, and "
            "`clipping`, which clips every step (Adam divides it out again). EMA-KL, GARDO's, CRD's and the two-sided "
            "penalty come on top of a script's own `--kl`, which the velocity KL replaces. CRD's weights lie near 1 "
            "for rewards like these, so that it all but is the velocity KL."
            f"\n\n{tables}\n\n![rivals](ASSETS/rivals.png)")


def rival_row(rival: str, known: dict) -> list[str]:
    """A rival's row of the table."""
    strengths = ", ".join(f"{method} {strength_of(rival, x)}" for method, x in known["strengths"].items())
    if known["verdict"] == TOO_WEAK:
        return [rival, strengths, *["-"] * (3 + len(BESIDE)), known["verdict"]]
    beside = [pm(known[metric], digits) for metric, digits in BESIDE.items()]
    step = "-" if rival == "projected" else f"{known['highest step']:.3f}"  # that of the velocity before
    return [rival, strengths, pm(known["preferred"]), pm(known["reward"]), *beside, step, known["verdict"]]


def strength_of(rival: str, strength: float | None) -> str:
    """As the table gives it."""
    if strength is None:
        return "-"
    return "none" if strength == RIVALS[rival].none else f"{strength:.2g}"


def lost_gain(m: dict) -> float:
    """A rival's reward less the guarded model's, as a share of what the unguarded model gained."""
    return (m["rival"]["reward"] - m["guarded"]["reward"]) / (m["unguarded"]["reward"] - m["base"]["reward"])


def preferred_side(preferred: dict) -> str:
    """Whom the judge prefers, by the interval of how often it prefers the guarded picture, less one half."""
    if math.isnan(preferred["half"]):
        return "one seed: no interval"
    if abs(preferred["difference"]) <= preferred["half"]:
        return "not resolved"
    return "the guard" if preferred["difference"] > 0 else "**the rival**"


# ---------------------------------------------------------------- the report

def write_text(path: Path, text: str):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: text})


def rounded(x):
    """Floats at five digits: what is kept in the repository is to be small. NaN becomes null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


HEADLINES = {  # claim: {its line in the summary: the check that it is taken from}
    "1": {"RL inflates the velocity's norm": "the norm exceeds the reference's",
          "and pictures suffer (judged good)": "judged good"},
    "2": {"rescaling at inference repairs nothing (judged good)": "nor is the picture judged good more often"},
    "4": {"the guard holds the norm, over the trajectory": "not above the reference, over the trajectory",
          "at every step": "nor at any step (the highest)",
          "at every step within 1 %, with --lam auto (what is above, else 0)":
              "with --lam auto: not by more than 1 % at any step (excess at the highest)"},
    "5 and 6": {"it preserves the reward (share of the gain lost)": "5: of the reward's gain, no more than 5 % is lost",
                "the judge prefers its pictures (less one half)":
                    "6: the judge prefers the guarded picture (less one half)",
                "the detector takes them for more real": "6: detector's P(real)"},
    "7": {"its gain grows at few steps (preference at 4, less that at all)":
              "preference for the guarded picture at 4 steps, less that at all"},
    "8": {"it is not early stopping (preferred at equal reward, less one half)":
              "early, equal reward: the guarded picture is preferred (less one half)"},
}


def summary(numbers: dict) -> str:
    """A table of every claim, its number and the verdict."""
    rows = []
    for claim, lines in HEADLINES.items():
        found = numbers.get(claim, {}).get("checks", {})
        rows += [[claim, line, pm(found[check]), found[check]["verdict"]] for line, check in lines.items()
                 if check in found]
    for name, row in numbers.get("3", {}).items():
        if name.startswith("unguarded") and name.endswith("reward"):
            line = f"‖v‖ carries no first-order signal of {name.split(', ')[1]} (steps beyond chance, trained models)"
            rows.append(["3", line, f"{row['beyond']} of {row['steps']}", coherent(row["beyond"], row["steps"])])
    for how in KEPT.values():
        known = [rivals for where, rivals in numbers.get("10", {}).items() if where.endswith(how)]
        if verdicts := [row["verdict"] for rivals in known for row in rivals.values()]:
            worse = verdicts.count("the guard")
            said = "holds" if worse == len(verdicts) else "not resolved"
            rows.append(["10", f"the judge prefers the guard to every rival {how}",
                         f"to {worse} of {len(verdicts)}", "**contradicted**" if "**the rival**" in verdicts else said])
    rows.sort(key=lambda row: int(row[0].split()[0]))
    return markdown(["claim", "what it says", "measured", "verdict"], rows)


def write_report(results: dict[tuple, dict], bases: dict[str, dict], size, home: Path, assets: Path):
    """home/RESULTS.md and home/results.json of all numbers that there are."""
    done, numbers, text = has(results, "main"), {}, []
    committed = assets == Path("assets")
    sections = (  # claim, title, whose numbers, text
        ("1", "RL inflates the velocity norm by 5 to 15 %, and pictures suffer where the reward does not see it",
         done, claim_1),
        ("2", "Rescaling to the reference's norm at inference neither improves reward nor repairs quality",
         has(done, "renorm"), claim_2),
        ("3", "The velocity's magnitude carries no coherent first-order reward signal at the batch level",
         has(done, "adjoint"), claim_3),
        ("4", "NormGuard holds the norm", done, claim_4),
        ("5 and 6", "It preserves the reward; judge and detector prefer it", done, claim_5_and_6),
        ("7", "Its gain grows at few steps", has(done, "few"), claim_7),
        ("8", "It is not early stopping", has(done, "early"), claim_8),
        ("9", "Our own choices: the hinge's form, margin and lam", has_any(results, "guard"), claim_9),
        ("10", "It is neither a KL nor a shorter step: the guard's rivals at equal reward",
         has_any(done, "rival"), claim_10))
    for claim, title, measured, write in sections:
        paragraphs = [f"## {claim}. {title}", f"    python tiny/reproduce.py --only {claim.split()[0]}"]
        body = write(measured, bases, numbers.setdefault(claim, {})) if measured else "Not measured yet."
        if committed and (said := reading(claim, measured, numbers)):
            paragraphs.append(said)
        text += [*paragraphs, body]
    commits = sorted({part.get("of", {}).get("commit") or "unknown"
                      for numbers in (*results.values(), *bases.values()) for part in numbers.values()})
    first, won = [f"Measured at the commits {', '.join(commits)}, or on the way to them: each part names its own, and "
                  "keeps a hash of its code. `python tiny/reproduce.py` says how many parts are of other code than "
                  "today's."], []
    for where, rivals in numbers.get("10", {}).items():
        if names := [rival for rival, row in rivals.items() if row["verdict"] == "**the rival**"]:
            won.append(f"{where}: {', '.join(names)}")
    if won:
        first.append(f"**Rivals whose pictures the judge prefers to the guard's.** {'; '.join(won)}.")
    head = (
        f"Written by `python tiny/reproduce.py`; the numbers are in `{home}/results.json`, what they come from in "
        f"`{home}/results/`. {len(done)} runs of\n"
        f"{len(cells_of(done))} cells (base, method, reward) were trained without and with the guard, `--lam 0` and "
        f"`--lam {LAM}`, the scripts' defaults otherwise; every comparison is\n"
        f"paired by run. Held-out prompts, {size.n} pictures each, {size.steps} steps unless said otherwise, the same "
        "noise for all. **±** is half a 95 % interval of the mean over\n"
        "cells: the cells and the prompts are given, the seeds are the sample. The runs of a seed share the LoRA they "
        "start from, prompts and noise, so that a seed\n"
        "counts once: Student's t of the seeds' means. A share of the gain is (x - base) / (unguarded - base). "
        '"Holds" and "contradicted" are\n'
        "what the interval says; the judge, the detector and the pictures are the miniature's own.")
    pages = ["# The paper's claims on the miniature", *first, summary(numbers), head, *text]
    write_text(home / "RESULTS.md", "\n\n".join(pages).replace("ASSETS", os.path.relpath(assets, home)) + "\n")
    write_text(home / "results.json", json.dumps(rounded(numbers), indent=1) + "\n")
