"""What we made of the numbers: a text for each claim of RESULTS.md, whose numbers are filled in from what was measured.

A text was written of one number of runs. Of another number, or without a part that it speaks of, it is left out.
"""
from collections.abc import Callable, Iterable

import numpy as np
from paired import highest, of, overall, paired, rate, ratio, raw


def percent(values: float | Iterable[float], digits: int = 0) -> str:
    """Shares as per cent: one, or the least and the most."""
    ends = np.atleast_1d(list(values) if isinstance(values, Iterable) else values)
    low, high = (f"{round(100 * x, digits) + 0.0:.{digits}f}" for x in (ends.min(), ends.max()))  # no -0
    return low if low == high else f"{low} to {high}"


def some(results: dict[tuple, dict], cell: str) -> dict[tuple, dict]:
    """The runs whose cell has these words."""
    return {run: r for run, r in results.items() if {*cell.split()} <= {*run.cell.split()}}


def others(results: dict[tuple, dict], cell: str) -> dict[tuple, dict]:
    """The rest."""
    return {run: r for run, r in results.items() if run not in some(results, cell)}


def each(results: dict[tuple, dict], read: Callable[[dict], float]) -> np.ndarray:
    """A number of each run."""
    return np.array([read(r) for r in results.values()])


def of_cells(results: dict[tuple, dict], read: Callable[[dict], float]) -> list[float]:
    """A number's mean in each cell."""
    return [each(some(results, cell), read).mean() for cell in dict.fromkeys(run.cell for run in results)]


def values_1(results: dict[tuple, dict], numbers: dict) -> dict:
    """Inflation."""
    far = {base: each(some(results, base), ratio("unguarded", overall)) > 0.15 for base in ("sd3", "flux")}
    return {"above": sum(map(sum, far.values())), "flux": sum(far["flux"]),
            "highest": percent(each(some(results, "flux"), ratio("unguarded", highest)).max())}


def values_2(results: dict[tuple, dict], numbers: dict) -> dict:
    """What of RL's damage, and of its gain, rescaling takes back."""
    def share(label: str) -> str:
        """Of what RL has changed."""
        return percent(-numbers["2"][f"match - unguarded: {label}"]["difference"]
                       / numbers["1"]["checks"][label]["difference"])

    lost = -numbers["2"]["match - unguarded: reward, share of the gain"]["difference"]
    return {"good": share("judged good"), "distance": share("Fréchet distance"), "reward": percent(lost)}


def values_3(results: dict[tuple, dict], numbers: dict) -> dict:
    """t statistics of the unguarded models."""
    def t(runs: dict[tuple, dict]) -> np.ndarray:
        """(runs, steps), the noisiest first."""
        return np.array([r["adjoint"]["reward"]["t_statistic"] for r in runs.values()])

    def beyond(cell: str) -> str:
        """Steps beyond chance."""
        found = np.abs(t(some(results, cell))) > limit
        return f"{found.sum()} of {found.size}"

    limit, first = numbers["3"]["unguarded, hps, reward"]["limit"], t(results)[:, 0]
    one_sign = {**some(results, "sd3 hps"), **some(results, "flux dpo hps")}
    same, rest = (t({run: r for run, r in results.items() if (run in one_sign) is known})[:, 1:]
                  for known in (True, False))
    return {"sd3_pickscore": beyond("sd3 pickscore"), "flux_pickscore": beyond("flux pickscore"),
            "sd3_hps": beyond("sd3 hps"), "flux_hps": beyond("flux hps"),
            "gain": f"{(first > 0).sum()} of {len(first)}", "clear": (first > limit).sum(),
            "same": f"{same.min():.1f} to {same.max():.1f}", "rest": f"{rest.min():.1f} to {rest.max():.1f}"}


def values_4(results: dict[tuple, dict], numbers: dict) -> dict:
    """The highest step that the guard leaves, and what --lam auto costs."""
    high, worst = ratio("guarded", highest), some(results, "flux dpo hps")
    auto = each(results, ratio("auto", highest, "auto"))
    cost = raw("auto", "guarded", "reward"), raw("auto", "auto", "reward")
    costs = [cost[0](r) - cost[1](r) for r in results.values()]
    worst_costs = [cost[0](r) - cost[1](r) for r in worst.values()]
    left = each(worst, high).mean() / each(worst, ratio("unguarded", highest)).mean()
    return {"high": percent(each(results, high).mean(), 1), "worst": percent(each(worst, high)),
            "dpo": percent(each(some(others(results, "flux dpo hps"), "dpo"), high).max()),
            "below": percent(-auto.mean(), 1), "most": percent(auto.max(), 1), "left": percent(left),
            "costs": f"{sum(x > 0 for x in costs)} of {len(costs)}",
            "cost": f"{min(worst_costs):.3f} to {max(worst_costs):.3f}"}


def values_5_and_6(results: dict[tuple, dict], numbers: dict) -> dict:
    """The reward that is lost on sd3 and gained on flux."""
    unguarded, guarded = of("main", "unguarded", "reward"), of("main", "guarded", "reward")
    lost = paired(some(results, "sd3"), unguarded, guarded)
    won = paired(some(results, "flux"), guarded, unguarded)
    base = numbers["5 and 6"]["checks"]["(no claim: the guarded picture is preferred to the base's)"]["difference"]
    return {"sd3": f"{percent(lost['difference'], 1)} ± {percent(lost['half'], 1)}",
            "flux": f"{percent(won['difference'], 1)} ± {percent(won['half'], 1)}",
            "nft": percent(each(some(results, "sd3 nft pickscore"), lambda r: unguarded(r) - guarded(r))),
            "dpo": percent(each(some(results, "flux dpo"), lambda r: guarded(r) - unguarded(r)).max()),
            "base": percent(0.5 - base)}


def values_8(results: dict[tuple, dict], numbers: dict) -> dict:
    """Which checkpoints were chosen."""
    first, second, *_, before, last = sorted(name for name in next(iter(results.values()))["early"]["found"]
                                             if name != "guarded")
    equal, best = ([r["early"]["chosen"][how] for r in results.values()]
                   for how in ("early, equal reward", "early, best judged"))
    gain = each(results, of("early", "early, best judged", "reward"))
    soon = np.array([name in (first, second) for name in best])
    return {"runs": len(results), "last": equal.count(last), "before": equal.count(before),
            "missed": sum(not r["early"]["reached"] for r in results.values()),
            "first": best.count(first), "second": best.count(second), "gain": percent(gain[soon]),
            "late": " and ".join(percent(x) for x in sorted(gain[~soon]))}


def values_9(results: dict[tuple, dict], numbers: dict) -> dict:
    """What other guards change: means of each method in each corner."""
    def change(name: str, metric: str) -> Callable[[dict], float]:
        """A guard's, less the default's."""
        means = f"guard: {name}"
        return lambda r: r[means]["means"]["variant"][metric] - r[means]["means"]["guarded"][metric]

    def lost(name: str, runs: dict[tuple, dict]) -> list[float]:
        """Of the gain in reward on training prompts."""
        def gain(r: dict) -> float:
            """RL's."""
            return r["main"]["training reward"]["unguarded"] - r["main"]["training reward"]["base"]
        return -np.array(of_cells(runs, change(name, "reward"))) / of_cells(runs, gain)

    def liked(names: tuple[str, ...], runs: dict[tuple, dict]) -> str:
        """How often they are preferred to the default."""
        rates = [rate(f"guard: {name}", "variant vs guarded") for name in names]
        return percent(0.5 + x for read in rates for x in of_cells(runs, read))

    def higher(name: str) -> list[float]:
        """By how much the highest step is above the default's."""
        own, default = (ratio(who, highest, f"guard: {name}") for who in ("variant", "guarded"))
        return of_cells(results, lambda r: own(r) - default(r))

    forms = "squared, lam 0.5", "margin 0.02", "per token"
    sd3, flux = some(results, "sd3"), some(results, "flux")
    dpo, strong = some(sd3, "dpo"), others(results, "sd3 dpo")
    steps = each(results, ratio("variant", highest, "guard: lam 0.5"))
    return {"held": f"{sum(steps <= 0)} of {len(steps)}", "sd3": percent(lost("lam 0.5", others(sd3, "dpo"))),
            "flux": percent(lost("lam 0.5", flux)), "liked": liked(("lam 0.5",), strong),
            "dpo": percent(lost("lam 0.5", dpo)), "dpo_liked": liked(("lam 0.5",), dpo),
            "higher": percent(max(x for name in forms for x in higher(name))),
            "lost": percent(max(x for name in forms for x in lost(name, results))),
            "below": percent(-min(of_cells(flux, ratio("guarded", overall, "guard: lam 0.5")))),
            "forms_liked": liked(forms, flux), "auto_liked": liked(("auto",), flux)}


def values_10(results: dict[tuple, dict], numbers: dict) -> dict:
    """The rivals beside the guard."""
    found, kls = numbers["10"], ("velocity KL", "EMA-KL", "GARDO", "CRD")
    sd3, flux = (found[f"{corner}, with 5 % less"] for corner in ("sd3, pickscore", "flux, hps"))
    weak, three = found["flux, hps, at their weakest"], ("velocity KL", "two-sided", "EMA-KL")
    equal = found["sd3, pickscore, at equal reward"]
    return {"equal": percent(0.5 + equal[name]["preferred"]["difference"] for name in ("two-sided", "EMA-KL", "GARDO")),
            "sd3_lost": percent(-sd3[name]["reward"]["difference"] for name in (*kls, "two-sided")),
            "lost": percent((-weak[name]["reward"]["difference"] for name in three), 1),
            "errors": percent((weak[name]["reward"]["half"] for name in three), 1),
            "liked": percent(0.5 - weak[name]["preferred"]["difference"] for name in three),
            "gardo": percent(0.5 - weak["GARDO"]["preferred"]["difference"]),
            "kls": percent(row[name]["highest step"] - 1 for row in (sd3, flux) for name in kls),
            "two_sided": percent(row["two-sided"]["highest step"] - 1 for row in (sd3, flux))}


READING = {  # claim: how many runs had been measured, what the text's numbers are, and our text
    "1": (36, values_1,
        "As the paper says, and beyond its range in {above} runs, {flux} of them on flux. But there is next to no "
        "over-sharpening: colours turn loud, edges only a little harder. These pictures have no fine texture that "
        "could be over-sharpened. Inflation is largest at the noisy steps (on flux up to {highest} %). DPO inflates "
        "least, and the judge minds its pictures least."),
    "2": (36, values_2,
        "The miniature contradicts the paper: rescaling makes good {good} % of what the judge sees and {distance} % "
        "of the distance, for {reward} % of the reward's gain. We think that the damage here is mostly loud colours, "
        "and that in whitened latents of smooth pictures the velocity's norm is nearly their contrast: to shrink it "
        "while sampling is to turn the colours down. What is co-adapted into the weights remains. The guarded model "
        "has more reward in every cell; it is nearer to the renders except with DPO, and preferred except for DPO on "
        "flux with hps."),
    "3": (36, values_3,
        "The base gains to first order from longer velocities at most steps. Once trained, models come near to the "
        "paper's claim with pickscore on sd3 ({sd3_pickscore} steps beyond chance), less so on flux "
        "({flux_pickscore}), and not with hps ({sd3_hps} on sd3, {flux_hps} on flux). The signal is far weaker than "
        "the control's in all. At the noisiest step, where RL inflates most, a longer velocity would gain by its sign "
        "in {gain} models, beyond chance in {clear}. At the other steps the sign is the same in all models of sd3 "
        "with hps and of DPO on flux with hps (t of {same}); elsewhere it differs from model to model (t of {rest})."),
    "4": (36, values_4,
        "Over the trajectory, not at each step. The guard acts on each sample's norm at a random t. It leaves {high} "
        "% at the noisy steps, where RL pushes hardest (with DPO up to {dpo} %, on flux with hps {worst} %), and has "
        "pushed the norm under the reference elsewhere, furthest on flux. Nothing pulls it back up. With `--lam auto` "
        "the highest step is {below} % below the reference in the mean and {most} % above it at most; over the "
        "trajectory the norm sinks further. `auto` costs reward in {costs} runs, most with DPO on flux with hps "
        "({cost}), where lam 0.05 leaves {left} % of the highest step's excess. With DPO it also changes an eighth of "
        "the noise levels that are trained at."),
    "5 and 6": (36, values_5_and_6,
        "The reward is preserved within the error, which is large. The mean hides two opposite things: on sd3 each "
        "cell loses ({sd3} % of the gain; NFT with pickscore {nft} %), on flux most gain ({flux} %; one run of DPO "
        "{dpo} %). The judge agrees with the paper, most clearly where the unguarded pictures are bad, and least with "
        "DPO, which spoils them least; there the distance hardly gains from the guard, on flux it loses. The detector "
        "contradicts: it takes loud pictures for real. It knows samples by their softness (tiny/README.md) and has "
        "never seen loud colours among them, so on them its word is worth little. The base's pictures are preferred "
        "to the guarded model's in {base} % of pairs (not with DPO and pickscore), and are nearer to renders."),
    "7": (36, lambda results, numbers: {},
        "The miniature contradicts the paper: the gain shrinks. At few steps all pictures lose contrast (see the "
        "base's saturation). There an inflated norm makes up for what is missing instead of adding to what is there. "
        "`--lam auto`, whose norm is lower, loses most."),
    "8": (36, values_8,
        "The first checkpoint that has the guarded model's reward is the last in {last} of {runs} runs (in {missed} "
        "of them not even that) and the last but one in {before}: to stop early gives up the reward. So the "
        "comparison at equal reward is nearly claim 6 again. The checkpoint that the judge likes best is the first in "
        "{first} runs and the second in {second}, with {gain} % of the gain in reward (in the others {late} %). It is "
        "preferred to the guarded model, but for DPO with pickscore."),
    "9": (18, values_9,
        "lam says how much reward is given for the norm. lam 0.005 leaves most of the inflation. lam 0.5 holds every "
        "step in {held} runs, for {sd3} % of the gain in reward with NFT and AWM on sd3 and {flux} % on flux; the "
        "judge prefers its pictures to the default's in {liked} % of pairs. With DPO on sd3 it costs {dpo} %, and "
        "{dpo_liked} % are preferred. The form hardly changes the reward. Measured in the latent's own units "
        "(absolute) the guard is nearly the same here, where all latents have one scale, a little stronger. Squared, "
        "with a margin, or with a norm for each token, it lets the highest step grow by up to {higher} % more, for at "
        "most {lost} % of the gain. On flux the default's norms end up to {below} % below the reference over the "
        "trajectory, and these less so: there the judge prefers them in {forms_liked} % of pairs, `--lam auto` in "
        "{auto_liked} %."),
    "10": (18, values_10,
        "It is not a shorter step: a lower learning rate, a scaled LoRA, clipping and the projection are far behind "
        "the guard on both corners. Against the four KLs and the two-sided penalty the corners differ. On sd3 with "
        "pickscore, at equal reward, the guard is preferred to EMA-KL, to GARDO's KL and to the two-sided penalty (in "
        "{equal} % of pairs), to the velocity KL and CRD's within the error. But their pictures are as near to the "
        "renders or nearer. Where they may lose 5 % of the gain (on held-out prompts {sd3_lost} %), none of them is "
        "told from the guard, and all are nearer to the renders. On flux with hps it is the other way. At their "
        "weakest, the velocity KL, EMA-KL and the two-sided penalty lose {lost} % of the gain (± {errors} %) and are "
        "preferred to the guard in {liked} % of pairs, GARDO's in {gardo} %; all are much nearer to the renders. At "
        "equal reward none of these is told from it: there they are about as weak as that or weaker, and with DPO "
        "they are the unguarded model, which has less reward than the guarded one. With 5 % less all are preferred to "
        "it, GARDO's within the error; `--lam auto` gives up as much there and gains less by it. The KLs work in "
        "another way: the norm is then still {kls} % too long at the highest step, with the two-sided penalty "
        "{two_sided} %. On sd3 GARDO's KL is too weak to say, for two methods."),
}


def reading(claim: str, measured: dict[tuple, dict], numbers: dict) -> str | None:
    """A claim's text, or None where it was written of something else than what was measured."""
    runs, values, text = READING[claim]
    if len(measured) != runs:
        return None
    try:
        return text.format_map(values(measured, numbers))
    except (KeyError, ValueError):  # a part, a cell or a rival is not there
        return None
