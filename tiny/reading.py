"""The numbers in our comments on the results.

Our comments are the paragraphs "[36 runs] ..." of RESULTS.template.md, with a name in braces for each number. They were
written about that many runs; for another number of runs, or if a part is missing, a comment is left out.
"""
import re
from collections.abc import Callable, Iterable

import numpy as np
from paired import grouped, mean_of, paired, preference, ratio, scaled


def reading(claim: str, paragraph: str, measured: dict[tuple, dict], numbers: dict) -> str:
    """A comment with its numbers filled in; "" if it is about other runs than those measured."""
    runs, text = re.fullmatch(r"\[(\d+) runs\] (.*)", paragraph).groups()
    if len(measured) != int(runs):
        return ""
    try:
        return text.format_map(VALUES[claim](measured, numbers))
    except (KeyError, ValueError):  # a part, a cell or a rival is missing
        return ""


def percent(values: float | Iterable[float], digits: int = 0) -> str:
    """Fractions in per cent: one, or the least and the greatest."""
    values = np.atleast_1d(list(values) if isinstance(values, Iterable) else values)
    low, high = (f"{round(100 * x, digits) + 0.0:.{digits}f}" for x in (values.min(), values.max()))  # no -0
    return low if low == high else f"{low} to {high}"


def runs_of(results: dict[tuple, dict], words: str) -> dict[tuple, dict]:
    """The runs whose cell has all these words."""
    return {run: r for run, r in results.items() if set(words.split()) <= set(run.cell.split())}


def runs_but(results: dict[tuple, dict], words: str) -> dict[tuple, dict]:
    """The other runs."""
    return {run: r for run, r in results.items() if run not in runs_of(results, words)}


def each(results: dict[tuple, dict], read: Callable[[dict], float]) -> np.ndarray:
    """A number of each run, (runs,)."""
    return np.array([read(r) for r in results.values()])


def cell_means(results: dict[tuple, dict], read: Callable[[dict], float]) -> np.ndarray:
    """A number's mean in each cell, (cells,)."""
    return np.array([each(runs, read).mean() for runs in grouped(results, "cell").values()])


def values_1(results: dict[tuple, dict], numbers: dict) -> dict:
    """Norms above the paper's range."""
    whole, flux = ratio("unguarded", "overall"), runs_of(results, "flux")
    return {
        "above": (each(results, whole) > 0.15).sum(),
        "flux": (each(flux, whole) > 0.15).sum(),
        "highest": percent(each(flux, ratio("unguarded", "highest")).max()),
    }


def values_2(results: dict[tuple, dict], numbers: dict) -> dict:
    """The fractions of RL's damage, and of its gain, that rescaling takes back."""
    lost = {label: -numbers["2"][f"match - unguarded: {label}"]["difference"]
            for label in ("judged good", "Fréchet distance", "reward, fraction of the gain")}
    by_rl = {label: numbers["1"]["checks"][label]["difference"] for label in ("judged good", "Fréchet distance")}
    return {
        "good": percent(lost["judged good"] / by_rl["judged good"]),
        "distance": percent(lost["Fréchet distance"] / by_rl["Fréchet distance"]),
        "reward": percent(lost["reward, fraction of the gain"]),
    }


def values_3(results: dict[tuple, dict], numbers: dict) -> dict:
    """t statistics of the unguarded models."""
    limit = numbers["3"]["unguarded, hps, reward"]["limit"]
    t = {run: np.array(r["adjoint"]["reward"]["t_statistic"]) for run, r in results.items()}  # the noisiest step first
    first = np.array([values[0] for values in t.values()])
    one_sign = {**runs_of(results, "sd3 hps"), **runs_of(results, "flux dpo hps")}
    same = np.array([values[1:] for run, values in t.items() if run in one_sign])
    rest = np.array([values[1:] for run, values in t.items() if run not in one_sign])
    values = {
        "gain": f"{(first > 0).sum()} of {len(first)}",
        "clear": (first > limit).sum(),
        "same": f"{same.min():.1f} to {same.max():.1f}",
        "rest": f"{rest.min():.1f} to {rest.max():.1f}",
    }
    for corner in ("sd3 pickscore", "flux pickscore", "sd3 hps", "flux hps"):
        beyond = np.abs([t[run] for run in runs_of(results, corner)]) > limit
        values[corner.replace(" ", "_")] = f"{beyond.sum()} of {beyond.size}"
    return values


def values_4(results: dict[tuple, dict], numbers: dict) -> dict:
    """The highest step with the guard, and what --lam auto costs."""
    highest, worst = ratio("guarded", "highest"), runs_of(results, "flux dpo hps")
    auto = each(results, ratio("auto", "highest", "auto"))

    def cost(r: dict) -> float:
        return mean_of("auto", "guarded", "reward")(r) - mean_of("auto", "auto", "reward")(r)

    return {
        "high": percent(each(results, highest).mean(), 1),
        "worst": percent(each(worst, highest)),
        "dpo": percent(each(runs_of(runs_but(results, "flux dpo hps"), "dpo"), highest).max()),
        "below": percent(-auto.mean(), 1),
        "most": percent(auto.max(), 1),
        "left": percent(each(worst, highest).mean() / each(worst, ratio("unguarded", "highest")).mean()),
        "costs": f"{(each(results, cost) > 0).sum()} of {len(results)}",
        "cost": f"{each(worst, cost).min():.3f} to {each(worst, cost).max():.3f}",
    }


def values_5_and_6(results: dict[tuple, dict], numbers: dict) -> dict:
    """The reward that is lost on sd3 and gained on flux."""
    unguarded, guarded = scaled("main", "unguarded", "reward"), scaled("main", "guarded", "reward")
    lost = paired(runs_of(results, "sd3"), unguarded, guarded)
    won = paired(runs_of(results, "flux"), guarded, unguarded)
    base = numbers["5 and 6"]["checks"]["(no claim: the guarded picture is preferred to the base's)"]["difference"]
    return {
        "sd3": f"{percent(lost['difference'], 1)} ± {percent(lost['half'], 1)}",
        "flux": f"{percent(won['difference'], 1)} ± {percent(won['half'], 1)}",
        "nft": percent(each(runs_of(results, "sd3 nft pickscore"), lambda r: unguarded(r) - guarded(r))),
        "dpo": percent(each(runs_of(results, "flux dpo"), lambda r: guarded(r) - unguarded(r)).max()),
        "base": percent(0.5 - base),
    }


def values_8(results: dict[tuple, dict], numbers: dict) -> dict:
    """Which checkpoints were chosen."""
    early = [r["early"] for r in results.values()]
    first, second, *_, before, last = sorted(name for name in early[0]["found"] if name != "guarded")
    equal = [e["chosen"]["early, equal reward"] for e in early]
    best = [e["chosen"]["early, best judged"] for e in early]
    gain = each(results, scaled("early", "early, best judged", "reward"))
    soon = np.array([name in (first, second) for name in best])
    return {
        "all": len(results),
        "missed": sum(not e["reached"] for e in early),
        "last": equal.count(last),
        "before": equal.count(before),
        "first": best.count(first),
        "second": best.count(second),
        "gain": percent(gain[soon]),
        "late": " and ".join(percent(x) for x in sorted(gain[~soon])),
    }


def values_9(results: dict[tuple, dict], numbers: dict) -> dict:
    """What other guards change, in means over a cell."""
    def lost(name: str, runs: dict[tuple, dict]) -> np.ndarray:
        """The fraction of the gain in reward, on training prompts, that a guard loses against the default."""
        rewards = {run: r["main"]["training reward"] for run, r in runs.items()}
        gain = cell_means(rewards, lambda reward: reward["unguarded"] - reward["base"])
        variant, default = (mean_of(f"guard: {name}", who, "reward") for who in ("variant", "guarded"))
        return -cell_means(runs, lambda r: variant(r) - default(r)) / gain

    def liked(runs: dict[tuple, dict], *names: str) -> str:
        """How often guards are preferred to the default."""
        rates = [cell_means(runs, preference(f"guard: {name}", "variant vs guarded")) for name in names]
        return percent(0.5 + np.concatenate(rates))

    def higher(name: str) -> float:
        """By how much a guard's highest step exceeds the default's, at most."""
        variant, default = (ratio(who, "highest", f"guard: {name}") for who in ("variant", "guarded"))
        return cell_means(results, lambda r: variant(r) - default(r)).max()

    forms = "squared, lam 0.5", "margin 0.02", "per token"
    sd3, flux = runs_of(results, "sd3"), runs_of(results, "flux")
    dpo = runs_of(sd3, "dpo")
    steps = each(results, ratio("variant", "highest", "guard: lam 0.5"))
    return {
        "held": f"{(steps <= 0).sum()} of {len(steps)}",
        "sd3": percent(lost("lam 0.5", runs_but(sd3, "dpo"))),
        "flux": percent(lost("lam 0.5", flux)),
        "liked": liked(runs_but(results, "sd3 dpo"), "lam 0.5"),
        "dpo": percent(lost("lam 0.5", dpo)),
        "dpo_liked": liked(dpo, "lam 0.5"),
        "higher": percent(max(map(higher, forms))),
        "lost": percent(max(lost(name, results).max() for name in forms)),
        "below": percent(-cell_means(flux, ratio("guarded", "overall", "guard: lam 0.5")).min()),
        "forms_liked": liked(flux, *forms),
        "auto_liked": liked(flux, "auto"),
    }


def values_10(results: dict[tuple, dict], numbers: dict) -> dict:
    """The rivals beside the guard."""
    found, kls = numbers["10"], ("velocity KL", "EMA-KL", "GARDO", "CRD")
    sd3, flux = found["sd3, pickscore, with 5 % less"], found["flux, hps, with 5 % less"]
    weak, three = found["flux, hps, at their weakest"], ("velocity KL", "two-sided", "EMA-KL")
    equal = found["sd3, pickscore, at equal reward"]
    return {
        "equal": percent(0.5 + equal[name]["preferred"]["difference"] for name in ("two-sided", "EMA-KL", "GARDO")),
        "sd3_lost": percent(-sd3[name]["reward"]["difference"] for name in (*kls, "two-sided")),
        "lost": percent((-weak[name]["reward"]["difference"] for name in three), 1),
        "errors": percent((weak[name]["reward"]["half"] for name in three), 1),
        "liked": percent(0.5 - weak[name]["preferred"]["difference"] for name in three),
        "gardo": percent(0.5 - weak["GARDO"]["preferred"]["difference"]),
        "kls": percent(row[name]["highest step"] - 1 for row in (sd3, flux) for name in kls),
        "two_sided": percent(row["two-sided"]["highest step"] - 1 for row in (sd3, flux)),
    }


VALUES = {"1": values_1, "2": values_2, "3": values_3, "4": values_4, "5 and 6": values_5_and_6,
          "7": lambda results, numbers: {}, "8": values_8, "9": values_9, "10": values_10}
