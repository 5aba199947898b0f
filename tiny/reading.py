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


def each(results: dict[tuple, dict], read: Callable[[dict], float]) -> np.ndarray:
    """A number of each run, (runs,)."""
    return np.array([read(r) for r in results.values()])


def cell_means(results: dict[tuple, dict], read: Callable[[dict], float]) -> np.ndarray:
    """A number's mean in each cell, (cells,)."""
    return np.array([each(runs, read).mean() for runs in grouped(results, "cell").values()])


def values_1(results: dict[tuple, dict], numbers: dict) -> dict:
    """Norms above the paper's range."""
    whole = ratio("unguarded", "overall")
    return {"above": (each(results, whole) > 0.15).sum(), "flux": (each(runs_of(results, "flux"), whole) > 0.15).sum()}


def values_2(results: dict[tuple, dict], numbers: dict) -> dict:
    """The fractions of RL's damage, and of its gain, that rescaling takes back."""
    def lost(label: str, of: float = 1.0) -> str:
        return percent(-numbers["2"][f"match - unguarded: {label}"]["difference"] / of)

    by_rl = {label: numbers["1"]["checks"][label]["difference"] for label in ("judged good", "Fréchet distance")}
    return {"reward": lost("reward, fraction of the gain"), "good": lost("judged good", by_rl["judged good"]),
            "distance": lost("Fréchet distance", by_rl["Fréchet distance"])}


def values_3(results: dict[tuple, dict], numbers: dict) -> dict:
    """Steps and models whose t statistic is beyond chance."""
    def t(words: str) -> np.ndarray:
        """(models, steps), the noisiest step first."""
        return np.array([r["adjoint"]["reward"]["t_statistic"] for r in runs_of(results, words).values()])

    limit, first = numbers["3"]["unguarded, hps, reward"]["limit"], t("")[:, 0]
    values = {"gain": f"{(first > 0).sum()} of {len(first)}", "clear": (first > limit).sum()}
    for corner in ("sd3 pickscore", "flux pickscore", "sd3 hps", "flux hps"):
        beyond = np.abs(t(corner)) > limit
        values[corner.replace(" ", "_")] = f"{beyond.sum()} of {beyond.size}"
    return values


def values_4(results: dict[tuple, dict], numbers: dict) -> dict:
    """The highest step with the guard, and what --lam auto costs."""
    highest, auto = ratio("guarded", "highest"), ratio("auto", "highest", "auto")
    guarded_reward, auto_reward = mean_of("auto", "guarded", "reward"), mean_of("auto", "auto", "reward")
    costs = each(results, guarded_reward) > each(results, auto_reward)
    return {
        "high": percent(each(results, highest).mean(), 1),
        "worst": percent(each(runs_of(results, "flux dpo hps"), highest)),
        "most": percent(each(results, auto).max(), 1),
        "costs": f"{costs.sum()} of {len(results)}",
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
        "base": percent(0.5 - base),
    }


def values_8(results: dict[tuple, dict], numbers: dict) -> dict:
    """Which checkpoints were chosen."""
    early = [r["early"] for r in results.values()]
    first, second, *_, before, last = sorted(name for name in early[0]["found"] if name != "guarded")
    equal = [e["chosen"]["early, equal reward"] for e in early]
    best = [e["chosen"]["early, best judged"] for e in early]
    gain = each(results, scaled("early", "early, best judged", "reward"))
    return {
        "missed": sum(not e["reached"] for e in early),
        "last": equal.count(last),
        "before": equal.count(before),
        "first": best.count(first),
        "second": best.count(second),
        "gain": percent(gain[[name in (first, second) for name in best]]),
    }


def values_9(results: dict[tuple, dict], numbers: dict) -> dict:
    """What other guards change, in means over a cell."""
    def lost(runs: dict[tuple, dict]) -> str:
        """The fraction of the gain in reward, on training prompts, that lam 0.5 loses against the default."""
        rewards = {run: r["main"]["training reward"] for run, r in runs.items()}
        gain = cell_means(rewards, lambda reward: reward["unguarded"] - reward["base"])
        strong, default = (mean_of("guard: lam 0.5", who, "reward") for who in ("variant", "guarded"))
        return percent(-cell_means(runs, lambda r: strong(r) - default(r)) / gain)

    def liked(runs: dict[tuple, dict], *names: str) -> str:
        """How often guards are preferred to the default."""
        rates = [cell_means(runs, preference(f"guard: {name}", "variant vs guarded")) for name in names]
        return percent(0.5 + np.concatenate(rates))

    forms = "squared, lam 0.5", "margin 0.02", "per token"
    sd3, flux = {**runs_of(results, "sd3 nft"), **runs_of(results, "sd3 awm")}, runs_of(results, "flux")
    steps = each(results, ratio("variant", "highest", "guard: lam 0.5"))
    return {
        "held": f"{(steps <= 0).sum()} of {len(steps)}",
        "sd3": lost(sd3),
        "flux": lost(flux),
        "liked": liked({**sd3, **flux}, "lam 0.5"),
        "below": percent(-cell_means(flux, ratio("guarded", "overall", "guard: lam 0.5")).min()),
        "forms_liked": liked(flux, *forms),
        "auto_liked": liked(flux, "auto"),
    }


def values_10(results: dict[tuple, dict], numbers: dict) -> dict:
    """The highest step with the rivals."""
    kept = [numbers["10"][f"{corner}, with 5 % less"] for corner in ("sd3, pickscore", "flux, hps")]
    kls = ("velocity KL", "EMA-KL", "GARDO", "CRD")
    return {"kls": percent(rivals[name]["highest step"] - 1 for rivals in kept for name in kls),
            "two_sided": percent(rivals["two-sided"]["highest step"] - 1 for rivals in kept)}


VALUES = {"1": values_1, "2": values_2, "3": values_3, "4": values_4, "5 and 6": values_5_and_6,
          "7": lambda results, numbers: {}, "8": values_8, "9": values_9, "10": values_10}
