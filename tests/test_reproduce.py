"""Tests of the miniature's reproduction (tiny/): other guards and rivals, differences and verdicts, the report, and
reproduce.py from end to end."""
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import figures
import guards
import numpy as np
import paired
import PIL.Image
import pytest
import report
import reproduce
import torch
import world

import flow.cli
import flow.lora
import flow.pipeline
import flow.rewards
import train_awm
import train_dpo
from normguard import norm_hinge, reference
from tests.helpers import CPU, lora_bytes, pixels, sample_rows


def batch_of(pipe, scale: float | None = None) -> tuple[dict, list[torch.nn.Parameter]]:
    """A batch as the scripts hand it to a rival, for a policy that has left the base; and the policy's parameters."""
    flow.pipeline.encode_prompts(pipe, ["a red star"], guard_guidance=scale)
    params = flow.lora.add_lora(pipe.transformer, 4, 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in params:
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    xt = flow.pipeline.draw_noise(pipe, 4, g)
    return {"xt": xt, "t": torch.tensor([0.9, 0.7, 0.5, 0.3]), "prompts": ["a red star"] * 4}, params


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux"])
def test_guards_of_the_guided_velocity(model):
    """The guided velocity is u + 3 (v - u), with u of the empty prompt, for flux too. The hinges are of it, or of it
    and of the conditional velocity. A rival's anchor is guided too. They have gradients."""
    with guards.true_guidance():
        pipe = flow.pipeline.load_pipeline(model, CPU)
        batch, params = batch_of(pipe, 3.0 if model == "tiny/sd3" else None)

        def velocities() -> tuple[torch.Tensor, torch.Tensor]:
            """(conditional, guided), each (4, ...)."""
            v, u = (flow.pipeline.velocity(pipe, batch["xt"], batch["t"], prompts) for prompts in
                    (batch["prompts"], [""] * 4))
            return v, u + guards.GUIDANCE * (v - u)

        v, vg = velocities()
        with reference(pipe.transformer):
            v_ref, vg_ref = velocities()
        plain, guided = norm_hinge(v, v_ref), norm_hinge(vg, vg_ref)
        assert plain.max() > 0 and guided.max() > 0
        found = guards.guided_hinge(v, v_ref, pipe, batch, {})
        torch.testing.assert_close(found, guided)
        found.sum().backward()
        assert sum(p.grad.abs().max() > 0 for p in params) > len(params) / 2
        torch.testing.assert_close(guards.both(vg, vg_ref, pipe, batch, {}, weight=0.25), plain + 0.25 * guided)
        start = [torch.zeros_like(p) if p.ndim else p for p in params]
        anchor = guards.velocity_with(start, pipe, batch, guards.GUIDANCE)
        torch.testing.assert_close(anchor, vg_ref, rtol=1e-4, atol=1e-4)  # a LoRA of zeros is the base
    torch.testing.assert_close(flow.pipeline.velocity(pipe, batch["xt"], batch["t"], batch["prompts"]), v)


def check_rivals(v, v_ref, batch, found):
    """What rivals gave for a batch against plain formulas. found: {rival: (b,)}. Returns the KL to the base, (b,)."""
    kl = (v - v_ref).square().flatten(1).mean(1).detach()
    reward, other = batch["scores"][:2]
    torch.testing.assert_close(found["crd"], (0.1 + 0.9 * reward.clamp(0, 1)[batch["picture"]]) * kl)
    rank_gap = reward.argsort().argsort() - other.argsort().argsort()
    furthest = rank_gap.sort().values[math.ceil(0.9 * (len(reward) - 1))]  # a tenth of the pictures
    gate = (rank_gap >= furthest)[batch["picture"]]
    assert torch.equal(found["gardo"] > 0, gate & (batch["epoch"] > 0))  # at first the policy is its reference
    if (found["gardo"] > 0).any():  # the mean over all rows is the KL's over gated rows
        torch.testing.assert_close(found["gardo"].mean(), kl[gate].mean())
    return kl


def make_rivals():
    """The rivals with a state, as one function: (v, v_ref, pipe, batch) -> {name: (b,)}."""
    rivals = {"ema": guards.ema_kl, "gardo": guards.gardo, "crd": guards.crd}
    states = {name: {} for name in rivals}
    return lambda *given: {name: rival(*given, states[name]).detach() for name, rival in rivals.items()}


def test_rivals_of_a_batch():
    """The rivals on batches of two epochs, whose policy moves in between."""
    pipe = flow.pipeline.load_pipeline("tiny/sd3", CPU)
    flow.pipeline.encode_prompts(pipe, ["a red star"])
    params = flow.lora.add_lora(pipe.transformer, 4, 0)
    g, rivals, kls = torch.Generator().manual_seed(0), make_rivals(), []
    xt, t, prompts = torch.randn(4, 16, 8, 8, generator=g), torch.tensor([0.9, 0.7, 0.5, 0.3]), ["a red star"] * 4
    for epoch in range(2):
        batch = {"xt": xt, "t": t, "prompts": prompts, "picture": torch.tensor([3, 0, 7, 3]), "step": epoch,
                 "epoch": epoch, "scores": torch.randn(2, 12, generator=g)}
        batch["scores"][:, 3] = torch.tensor([9.0, -9.0])  # gated
        v = flow.pipeline.velocity(pipe, xt, t, prompts)
        with reference(pipe.transformer):
            v_ref = flow.pipeline.velocity(pipe, xt, t, prompts)
        found = rivals(v, v_ref, pipe, batch)
        kls.append(check_rivals(v, v_ref, batch, found))
        with torch.no_grad():
            for p in params:
                p.add_(0.02 * torch.randn(p.shape, generator=g))
    assert kls[0].max() == 0 and kls[1].min() > 0
    assert 0.6 < (found["ema"] / kls[1]).mean() < 0.95  # the average has gone a tenth of the way from the base


@pytest.mark.parametrize("script", [train_awm, train_dpo])
def test_rivals_in_a_training(tmp_path, script):
    """The rivals with a state, all in one of three epochs in several batches: the batch is what they expect."""
    seen, rivals, pictures = [], make_rivals(), {}

    def rival(v, v_ref, pipe, batch):
        found = rivals(v, v_ref, pipe, batch)
        kl = check_rivals(v, v_ref, batch, found)
        xt = flow.pipeline.add_noise(batch["x0"], batch["noise"], batch["t"])
        assert torch.equal(batch["xt"], xt) and len(batch["prompts"]) == len(v) and batch["scores"].shape == (2, 12)
        for i, x0 in zip(batch["picture"].tolist(), batch["x0"]):
            assert torch.equal(pictures.setdefault((batch["epoch"], i), x0), x0)
        seen.append({**batch, **found, "kl": kl})
        return norm_hinge(v, v_ref)

    args = script.Args(epochs=3, group=4, groups=3, timesteps=2, lr=5e-3, batch=16, eval_every=0,
                       reward="tiny/pickscore:1,tiny/hps:0", out=str(tmp_path / "run"))
    script.main(args, rival=rival)
    assert len(seen) > 3 and any((now["gardo"] > 0).any() for now in seen)
    assert all(now["ema"].max() == 0 for now in seen if now["epoch"] == 0)  # the policy is its own average
    for now in (now for now in seen if now["epoch"] == 1):  # the average has gone a tenth of the way from the base
        assert (now["ema"] / now["kl"]).mean().item() == pytest.approx(0.81, abs=0.05)


def test_paired_differences_and_verdicts():
    """Student's quantiles against a table; a seed counts once, however many cells it has; verdicts of both signs; the
    judge's counts from either side."""
    for df, expected in ((1, 12.706), (2, 4.303), (11, 2.201), (35, 2.030)):
        assert paired.quantile(df) == pytest.approx(expected, rel=1e-3)
    g = np.random.default_rng(0)
    results = {
        reproduce.Run(f"b{cell}", "awm", "hps", seed): {"a": cell + g.normal(), "b": 1.0}
        for cell in range(4)
        for seed in range(3)
    }
    d = paired.paired(results, lambda r: r["a"], lambda r: r["b"])
    values = np.array([r["a"] - 1 for r in results.values()]).reshape(4, 3)
    assert d["difference"] == pytest.approx(values.mean()) and (d["seeds"], d["cells"]) == (3, 4)
    assert d["half"] == pytest.approx(4.303 * values.mean(0).std(ddof=1) / 3**0.5, rel=1e-3)
    twice = results | {run._replace(base=f"{run.base} again"): r for run, r in results.items()}
    assert paired.paired(twice, lambda r: r["a"], lambda r: r["b"])["half"] == pytest.approx(d["half"])
    more = results | {reproduce.Run("b0", "awm", "hps", 7): {"a": 99.0, "b": 0.0}}  # a seed that one cell has
    assert paired.paired(more, lambda r: r["a"], lambda r: r["b"]) == d
    one = {run: r for run, r in results.items() if run.seed == 0}
    assert math.isnan(paired.paired(one, lambda r: r["a"])["half"])
    assert "no interval" in paired.verdict(paired.paired(one, lambda r: r["a"]), 1)
    for difference, half, claimed, said in (
        (1, 0.5, 1, "holds"),
        (1, 0.5, -1, "**contradicted**"),
        (-1, 0.5, -1, "holds"),
        (-1, 0.5, 1, "**contradicted**"),
        (1, 2, 1, "not resolved"),
        (1, 0.5, 0, "**contradicted**"),
        (-1, 0.5, 0, "holds"),
        (0, 0.5, 0, "not resolved"),
    ):
        assert paired.verdict({"difference": difference, "half": half}, claimed) == said
    assert paired.verdict({"difference": 0.01, "half": 0.02}, 0, at_most=0.05) == "holds"
    part = {"p": {"verdicts": {"a vs b": [6, 2, 2, 5]}}}  # of 10 that could be read, 6 won, 2 tied
    assert paired.preference("p", "a vs b")(part) == pytest.approx(0.2)
    assert paired.preference("p", "b vs a")(part) == pytest.approx(-0.2)
    assert [paired.NORMS["excess"]({"mean": [0.9, step]}) for step in (0.97, 1.02)] == [1, 1.02]


def test_models_over_guidance():
    """The verdict where the reward first reaches a target: at the lowest guidance, between two, or nowhere."""
    for target, good in ((0.5, 0.9), (0.7, 0.9), (0.85, 0.8), (1.0, 0.7), (1.1, 0.55), (2.0, math.nan)):
        found = paired.good_at(target, [0.7, 1.0, 1.2, 1.1], [0.9, 0.7, 0.4, 0.1])
        assert found == pytest.approx(good, nan_ok=True)
    part = {"3": {"means": {"a": {"reward": 1, "judge/overall": 2}}}, "of": {"code": "x"}, "seconds": 3.0, "curves": {}}
    assert paired.over_guidance(part, "a") == ([1], [2])


def test_rivals_at_equal_reward(monkeypatch):
    """Between two strengths interpolated, each run at its own target; never beyond what was measured. At strength s
    all here is linear: reward 1 - s, with guidance 1.5 - s, judged good 0.5 + s, with guidance twice that, a guard
    preferred by 0.3 - s, the highest step 1.3 - s. The base's reward with guidance is 1, reached halfway."""
    def part(strength: float, who: str, **more) -> dict:
        """Numbers of a model at a strength."""
        won, judged = round(8 - 10 * strength), {}
        for scale, reward, good in (("none", 1 - strength, 0.5 + strength), ("3", 1.5 - strength, 1 + 2 * strength)):
            means = {who: {"reward": reward, "judge/overall": good, "FD": 5.0}, "base": {"reward": 1.25 - strength}}
            judged[scale] = {"means": means, "ratio": {who: {"mean": [0.9, 1.3 - strength], "overall": 1.0}},
                             "verdicts": {f"{guard} vs {who}": [won, 0, 10 - won, 0] for guard in report.GUARD}}
        return {"of": {"code": "a"}, "training reward": {who: 1 - strength, **more}, **judged}

    monkeypatch.setitem(guards.RIVALS, "velocity KL", guards.Rival((0.2, 0.4), dpo=(0.1, 0.3)))
    guarded, guided = (report.target_of(guard) for guard in report.GUARD)
    runs = {}
    for seed, (plain, other) in enumerate(((1.5, 0.75), (1.5, 0.85))):  # the unguarded reward is less than guarded's
        main = part(0, "unguarded", base=0.0, guarded=plain, guided=other)
        runs[reproduce.Run("sd3", "awm", "hps", seed)] = {"main": main, "rival: velocity KL 0.2": part(0.2, "rival")}
    assert paired.equal_reward(runs, "velocity KL", guarded) is None  # a strength is missing
    for r in runs.values():
        r["rival: velocity KL 0.4"] = part(0.4, "rival")
    # of the unguarded reward of 1, or of each run's own guided reward
    for target, keep, strength, own in ((guarded, 1, 0, (0, 0)), (guarded, 0.95, 0.05, (0.05, 0.05)),
                                        (guided, 0.95, 0.24, (0.2875, 0.1925)), (guided, 1, 0.2, (0.25, 0.15))):
        met, chosen = paired.equal_reward(runs, "velocity KL", target, keep)
        assert list(met) == list(runs) and chosen == pytest.approx(strength)
        for s, found in zip(own, met.values()):
            assert found["reward, none"] == found["training reward"] == pytest.approx(1 - s)
            assert found["good, 3"] == pytest.approx(1 + 2 * s)
            assert found["good at equal reward"] == pytest.approx((1.5 + 3 * s) / 2)
            assert found["guided preferred, 3"] == pytest.approx(0.3 - s)
            assert found["highest, 3"] == pytest.approx(1.3 - s)
    for r in runs.values():
        r["main"]["training reward"]["guided"] = 0.5
    assert paired.equal_reward(runs, "velocity KL", guided) == ({}, None)  # the strengths end before that
    assert paired.crossing([0.9, 0.5, 0.7], 0.6) is None  # it comes back: where it ends is not known
    as_dpo = {run._replace(method="dpo"): r for run, r in runs.items()}
    assert paired.equal_reward(as_dpo, "velocity KL", guarded) is None
    r["main"]["of"] = {"code": "b"}
    assert len(paired.equal_reward(runs, "velocity KL", guarded)[0]) == 1  # measured beside other code: not compared


def models_of(main: dict, given: dict[str, str], scales: tuple[str, ...] = guards.BOTH) -> dict:
    """A part with the numbers of the committed models under other names. given: {name: the model whose numbers it has};
    also the names of all committed models."""
    given, part = {who: who for who in report.MODELS} | given, {}
    for scale in scales:
        known, verdicts = main[scale], {}
        for a, b in itertools.permutations(given, 2):
            pair = known["verdicts"].get(f"{given[a]} vs {given[b]}")
            if pair or given[a] == given[b]:
                verdicts[f"{a} vs {b}"] = pair or [0, 128, 0, 0]
        part[scale] = {"means": {a: known["means"][b] for a, b in given.items()}, "verdicts": verdicts,
                       "ratio": {a: known["ratio"][b] for a, b in given.items() if b in known["ratio"]}}
    return part


def all_parts(main: dict, run: reproduce.Run) -> dict:
    """All parts of a run, made of its committed main part. A rival at its weakest is the unguarded model, at its
    strongest the base."""
    scales = reproduce.Size().scales
    steps = {"t_statistic": [9.0] * 8, "same_sign": [1.0] * 8, "half_batch_cosine": 1.0}
    early = {f"early, equal to {who}": "unguarded" for who in report.GUARD}
    early |= {f"early, best judged, {scale}": "base" for scale in guards.BOTH}
    found = {who: {"reward": 1.0, "none": 0.8, "3": 0.7} for who in ("00005", *report.GUARD)}
    parts = {
        "main": main,
        "auto": models_of(main, {"auto": "guarded"}),
        "renorm": models_of(main, {"match": "base"}),
        "adjoint": {"t": np.linspace(1, 0.1, 8).tolist(), "units": 16, "reward": steps, "energy": steps},
        "few": {"4": models_of(main, {})},
        "early": {**models_of(main, early), "found": found, "chosen": dict.fromkeys(early, "00005"),
                  "reached": {"guarded": False, "guided": True}},
        "told": {"2": models_of(main, {})["none"]},
    }
    for name in guards.GUARDS:
        who = "base" if name == "guided, lam 0.2" else "guarded"
        parts[f"guard: {name}"] = models_of(main, {"variant": who}, scales)
    for name, rival in guards.RIVALS.items():
        for strength in rival.strengths_of(run.method):
            who = "base" if strength == rival.strengths_of(run.method)[-1] and len(rival.strengths) > 1 else "unguarded"
            parts[f"rival: {name} {strength:g}"] = {**models_of(main, {"rival": who}, scales), "of": main["of"],
                                                    "training reward": {"rival": main["training reward"][who]}}
    return parts


@pytest.mark.parametrize("complete", [True, False])
def test_the_report_of_all_claims(tmp_path, monkeypatch, complete):
    """With all parts, every claim has its section, and every row of the template's table its numbers. With parts that
    only some runs have, no base, or another corner with other seeds and a reward of other units, the rest is reported.
    """
    committed, bases = reproduce.gathered(Path("tiny/results"))
    runs = {run: all_parts(r["main"], run) for run, r in committed.items()
            if run.corner == "sd3, pickscore" and run.seed < 3}
    last = list(runs)[-1]
    if not complete:
        runs[last] = {"main": runs[last]["main"]}
        others = {run._replace(base="flux", reward="hps", seed=run.seed + 1): r for run, r in runs.items()}
        runs |= {run: {"main": r["main"]} for run, r in others.items()}
        bases = {}
    report.write_report(runs, bases, reproduce.Size(), tmp_path, tmp_path, comments=False)
    drawn = []  # names of figures; rendering them takes seconds
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi=0: drawn.append(path.stem))
    figures.draw_all(runs, bases, tmp_path)
    figures.plt.close("all")
    text, tables = (tmp_path / "RESULTS.md").read_text(), (tmp_path / "TABLES.md").read_text()
    assert "Not measured" not in text and "nan" not in text + tables
    asked = re.findall(r"^\| (\d+) \| (.*?) \|", report.TEMPLATE.read_text(), re.MULTILINE)
    shown = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert shown == [row for row in asked if complete or "chance, base" not in row[1]]
    same_in = re.findall(r"^\| 1 \| .* (\d of \d) \|$", text, re.MULTILINE)
    assert same_in == (["1 of 1", "1 of 1"] if complete else ["2 of 2", "0 of 2"])  # two seeds do not resolve it
    levels = report.quoted(runs, {})["levels"]
    assert "reward, base, 3, sd3, pickscore" in levels and ("reward, base, 3" in levels) is complete
    assert ("9 runs (sd3, pickscore: 9)" if complete else "18 runs (sd3, pickscore: 9; flux, hps: 9)") in text
    assert set(drawn) == {"inflation", "fronts", "early", "adjoint", "guards", "rivals"}

    table = text.partition("**sd3, pickscore, less the guided guard**")[2]
    row = next(line for line in table.splitlines() if line.startswith("| velocity KL, all (")).strip("| ").split(" | ")
    assert row[0].count(",") == 3 and row[-1] == ("9" if complete else "6")  # of seeds that all cells have
    assert float(row[-2].split()[0]) > 50  # how often the guard is preferred, in %
    numbers = json.loads((tmp_path / "results.json").read_text())
    for keep, how in report.KEPT.items():
        found = numbers["10"][f"sd3, pickscore, velocity KL, {how} of the guided guard's gain"]
        assert found["guided preferred, 3"]["difference"] > found["guided preferred, 3"]["half"]
        if complete:  # about the reward at which it is compared; not quite, as the prompts are others
            rewards = [r["main"]["training reward"] for r in runs.values()]
            aim = np.mean([r["base"] + keep * (r["guided"] - r["base"]) for r in rewards])
            assert found["reward, none"]["a"] == pytest.approx(aim, abs=0.03)
    if complete:  # the first strength is the unguarded model
        first = numbers["10"]["sd3, pickscore, two-sided, strength 1, less the guided guard"]["good, 3"]
        means = [r["main"]["3"]["means"] for r in runs.values()]
        less = [m["unguarded"]["judge/overall"] - m["guided"]["judge/overall"] for m in means]
        assert first["difference"] == pytest.approx(np.mean(less), abs=1e-4)
    default, same = numbers["9"]["plain, lam 0.05"], numbers["9"]["plain, lam 0.2"]
    assert all(same[number] == default[number] for number in report.POINT if number != "guarded preferred, 3")
    assert default["guarded preferred, 3"]["shown"] == "-" and math.isfinite(default["good, 3"]["a"])
    assert numbers["9"]["base"]["good, 3"]["seeds"] == (3 if complete else 2)


def test_what_a_claim_says():
    """One verdict where both agree, else two. A comment about other runs, or without a number, is left out."""
    d = {"difference": 0.25, "half": 0.05}
    checks = {scale: report.checked([("a", d, 1), ("b", {**d, "half": half}, 1)])
              for scale, half in (("none", 0.05), ("3", 0.5))}
    checks["3"]["a"] = checks["none"]["a"]
    assert report.verdicts(checks, "a") == "holds"
    assert report.verdicts(checks, "b") == "not resolved with guidance, holds without guidance"
    same = {scale: checks["none"] for scale in checks}  # in another corner, where b holds twice
    corners = {"1, sd3, hps": checks, "1, flux, hps": same, "10": {}}
    table = report.summary(["| 1 | text | b |", "| 2 | not measured | b |"], {"1": checks, **corners})
    row = "| 1 | text | +0.250 ± 0.500 | +0.250 ± 0.050 | not resolved with guidance, holds without guidance |"
    assert table.splitlines()[2:] == [f"{row} 1 of 2 |"]
    rate, lost = report.checked([("preferred to it", d, 1), ("gain lost", d, 0)]).values()
    assert rate["shown"] == "in 75 ± 5 % of pairs" and lost["shown"] == "25.0 ± 5.0 %"
    unknown = report.checked([(name, paired.paired({}, len), None) for name in ("preferred to it", "gain lost", "a")])
    assert [d["shown"] for d in unknown.values()] == ["-"] * 3
    values = {"about": 2, "found": {"1, 3, a": "x"}}
    assert report.comment("[2 runs] It is {found[1, 3, a]}.", values) == "It is x."
    assert report.comment("[3 runs] It is {found[1, 3, a]}.", values) == ""
    assert report.comment("[2 runs] It is {found[1, 3, b]}.", values) == ""


def test_measures_that_nobody_trained(tmp_path):
    """On pictures whose values are known: a gray one, and one half red and half blue, whose values are all clipped."""
    gray, halves = np.full((8, 8, 3), 128, np.uint8), np.zeros((8, 8, 3), np.uint8)
    halves[:, :4, 0] = halves[:, 4:, 2] = 255
    for i, picture in enumerate((gray, halves)):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i}.png")
    found = {name: x.tolist() for name, x in reproduce.statistics(tmp_path).items()}
    assert all(x[0] == pytest.approx(0, abs=1e-3) for x in found.values())
    rg, yb = np.repeat([255.0, 0.0], 32), np.repeat([127.5, -255.0], 32)
    spread, mean = np.hypot(rg.std(ddof=1), yb.std(ddof=1)), np.hypot(rg.mean(), yb.mean())
    assert found["colourfulness"][1] == pytest.approx(spread + 0.3 * mean, rel=1e-4)
    edge = 0.299 - 0.114  # of the luma; a Laplacian has it in two of its six columns, a gradient in one of seven
    assert found["clipped"][1] == found["saturation"][1] == 1
    assert found["gradient energy"][1] == pytest.approx(1e4 * edge**2 / 7, rel=1e-4)
    assert found["Laplacian energy"][1] == pytest.approx(1e4 * edge**2 * 2 / 6, rel=1e-4)


def test_results_are_what_the_report_says(tmp_path):
    """RESULTS.md, TABLES.md and results.json are what report.py makes of tiny/results; nobody has edited them."""
    measured = reproduce.gathered(Path("tiny/results"))
    report.write_report(*measured, reproduce.Size(), tmp_path, Path("assets"), comments=True)
    text = (tmp_path / "RESULTS.md").read_text().replace(os.path.relpath("assets", tmp_path), "../assets")
    assert text.replace(str(tmp_path), "tiny") == Path("tiny/RESULTS.md").read_text()
    for file in ("TABLES.md", "results.json"):
        assert (tmp_path / file).read_text() == Path("tiny", file).read_text()


def test_the_texts_hold_no_numbers():
    """The numbers in the texts are filled in from the results, and each text is in RESULTS.md."""
    names = (r"\{[^}]+\}|[sS][dD]3|claim \d|sections? \d+( and \d+)?|[Gg]uidance (3|1\.5|2|4\.5)|lam 0\.\d+|"
             r"--guard-guidance \d|95 %|(KL|KL of|--kl|one of) 0\.\d")
    comments = re.findall(r"^\[[\d, ]+ runs\] (.*)", report.TEMPLATE.read_text(), re.MULTILINE)
    assert comments
    for text in comments:
        assert not re.search(r"\d", re.sub(names, "", text)), text
        assert text.partition("{")[0] in Path("tiny/RESULTS.md").read_text()


def test_stale_numbers_are_seen(tmp_path, monkeypatch):
    """Numbers know the weights, the code and the flags they come from; a comment changes none of it. What other weights
    or code made is in other folders."""
    run, size = reproduce.Run("sd3", "awm", "hps", 0), reproduce.Size()
    numbers = {part: {"of": reproduce.depends(run, size, part)} for part in ("main", "guard: guided 2")}
    assert reproduce.stale_parts({run: numbers}, {}, size) == {}
    stale = reproduce.stale_parts({run: numbers}, {}, size._replace(steps=4))
    assert stale == {"flags": [f"{run.name}: main", f"{run.name}: guard: guided 2"]}
    numbers["main"] = {}  # from before there were hashes
    bases = {"sd3": {"renders": {"of": {"weights": "other"}}}}
    stale = reproduce.stale_parts({run: numbers}, bases, size)
    assert set(stale) == {"weights", "code", "flags"} and "sd3: renders" in stale["weights"]
    others = (guards.GUARDS["both, guided times 1"], guards.RIVALS["EMA-KL"].training, guards.GUARDS["plain, lam 0.5"])
    codes = [reproduce.rival_code(other) for other in others]
    assert len(set(codes)) == 3 and codes[2] == ""

    assert reproduce.source_hash("def f(): pass") == "c4bf3c5c"  # in every version of Python
    monkeypatch.chdir(tmp_path)
    counted = ("normguard.py", "train_awm.py", "sample.py", "eval_judge.py", "tiny/world.py", "flow/pictures.py")
    others = ("train_nft.py", "flow/test_pictures.py", "flow/cost/budget.py")
    text, code = 'class Args:\n    x: int = 1\n    """words"""\n', reproduce.code.__wrapped__
    for file in (*counted, *others):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)
    for file in (*counted, *others):
        before = code("train_awm.py")
        Path(file).write_text(text.replace("words", "others") + "# and more\n")
        assert code("train_awm.py") == before
        Path(file).write_text(text.replace("1", "2"))
        assert (code("train_awm.py") != before) is (file in counted)

    monkeypatch.setattr(reproduce, "made_with", lambda base, *scripts: {"weights": base, "code": "".join(scripts)})
    assert reproduce.home_of(Path("runs"), "sd3") == Path("runs/sd3-sd3-")
    assert reproduce.home_of(Path("runs"), "sd3", run) == Path("runs/sd3-awm-hps-s0-sd3-train_awm.py")


def test_reproduce_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """The smoke run of two parts, killed without warning in its second training: what it has is kept, nothing is
    computed again, and the report is of its own pictures. A rival and another guard are really in place."""
    command = [sys.executable, "tiny/reproduce.py", "--smoke", "--runs", str(tmp_path)]
    parts = "main", "rival: EMA-KL 0.3"
    run = reproduce.Run("sd3", "awm", "pickscore", 0)
    home = reproduce.home_of(tmp_path, "sd3", run)
    state = home / "lam0" / "checkpoint" / "state.pt"
    process = subprocess.Popen([*command, "--only", "10"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (home / "commands.txt").exists() or "--lam 0.05" not in (home / "commands.txt").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept, trained = paired.read_json(tmp_path / "results" / "sd3.json"), state.stat().st_mtime_ns
    assert kept["renders"]["of"]["commit"] == reproduce.commit()
    monkeypatch.setattr(reproduce, "SMOKE", reproduce.SMOKE._replace(only=parts))
    monkeypatch.setattr(sys, "argv", command[1:])
    reproduce.main(flow.cli.parse(reproduce.Args, reproduce.__doc__))
    done = paired.read_json(tmp_path / "results" / "sd3-awm-pickscore-s0.json")
    assert tuple(done) == parts and paired.read_json(tmp_path / "results" / "sd3.json") == kept  # to the second
    assert state.stat().st_mtime_ns == trained
    commands = [line for file in tmp_path.rglob("commands.txt") for line in file.read_text().splitlines()]
    again = {line for line in commands if commands.count(line) > 1}
    assert len(again) == 1 and "--lam 0.05" in again.pop()  # the one that was killed

    pickscore = flow.rewards.load_reward("tiny/pickscore", CPU)
    for name, scale in (("unguarded", "none"), ("guided", "3")):
        rows = sample_rows(home / "drawn" / f"{name}@{scale}-4")
        arrays = [pixels(home / "drawn" / f"{name}@{scale}-4" / row["file"]) for row in rows]
        pictures = torch.stack([torch.from_numpy(array).permute(2, 0, 1) / 255 for array in arrays])
        score = pickscore(pictures, [row["prompt"] for row in rows])
        assert done["main"][scale]["means"][name]["reward"] == pytest.approx(score.mean().item(), rel=1e-4)
        assert rows[0]["pipe"]["guidance_scale"] == (3 if scale == "3" else 1)
    loras = [lora_bytes(home / name) for name in ("lam0", "lam0.05", "lam-0.05-guard-guidance-3", "rival-EMA-KL-0.3")]
    assert len(set(loras)) == 4  # the guards and the rival were in place
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("\n## ") == 9 and text.count("Not measured yet") == 5
    assert set(json.loads((tmp_path / "results.json").read_text())) == {
        *(f"{claim}{corner}" for claim in ("1", "4", "5 and 6") for corner in ("", ", sd3, pickscore")), "10"}
    assert (tmp_path / "TABLES.md").read_text().count("\n## ") == 4
    graphs = {"inflation.png", "fronts.png", "rivals.png", "front.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == graphs


def test_two_processes_share_the_work(tmp_path, monkeypatch, capsys):
    """A run that another process works on is left to it, and the rest is measured; a picture of a LoRA that has changed
    in its place is drawn anew."""
    measured, run = [], reproduce.Run("sd3", "awm", "pickscore", 0)
    monkeypatch.setattr(reproduce, "command", lambda *given, **more: None)
    monkeypatch.setattr(reproduce, "measure_base", lambda *given: None)
    part = reproduce.Part(lambda home, run, size: measured.append(run) or {"a": 1}, (9,))
    monkeypatch.setattr(reproduce, "PARTS", {"main": part})
    args = reproduce.Args(("sd3",), ("nft", "awm"), ("pickscore",), (0,), runs=str(tmp_path), results=str(tmp_path))
    with reproduce.locked(reproduce.home_of(tmp_path, "sd3", run)):
        reproduce.measure_all(args, reproduce.Size())
        assert measured == [run._replace(method="nft")] and "1 parts are left to other" in capsys.readouterr().out
    reproduce.measure_all(args, reproduce.Size())
    assert measured == [run._replace(method="nft"), run]

    notes, lora = [], tmp_path / "lora"
    monkeypatch.setattr(reproduce, "command", lambda log, line, out, note: notes.append((line, note)))
    lora.mkdir()
    for content in ("a", "b", "b"):
        (lora / "weights").write_text(content)
        reproduce.draw(tmp_path, "sd3", reproduce.Size(), "guided", lora, "3")
    assert notes[0][0] == notes[1][0] and notes[0] != notes[1] == notes[2]


def test_world_is_deterministic_and_split():
    f = [world.scene(torch.arange(64), torch.Generator().manual_seed(3)) for _ in range(2)]
    a, b = (world.render(x) for x in f)
    assert torch.equal(a, b) and a.shape == (64, 3, 64, 64) and 0 <= a.min() and a.max() <= 1
    rl, held_out = (Path(p).read_text().splitlines() for p in ("tiny/prompts.txt", "tiny/eval_prompts.txt"))
    assert not set(rl) & set(held_out) and set(rl) | set(held_out) == set(world.CAPTIONS)
    assert (len(rl), len(held_out)) == (48, 16)


def test_the_numbers_of_the_readme():
    """README's table is what was measured of SD3 with PickScore; the other corners' numbers are below it, and how often
    pictures are preferred is in RESULTS.md."""
    results_of, results = reproduce.gathered(Path("tiny/results"))[0], Path("tiny/RESULTS.md").read_text()
    runs = {run: r for run, r in results_of.items() if run.corner == "sd3, pickscore"}
    section = Path("README.md").read_text().partition("## Results on the miniature")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    parts = [f"main/{scale}" for scale in guards.BOTH]
    for who, row in zip(report.MODELS, rows, strict=True):
        told = []
        for metric, digits in (("reward", 2), ("judge/overall", 2), ("FD", 1)):
            means = [paired.paired(runs, paired.mean_of(part, who, metric))["a"] for part in parts]
            told.append(", ".join(f"{mean:.{digits}f}" for mean in means))
        if who == "base":
            told[2:2], told[4:] = [""], [""]
        else:
            rates = [report.rate(paired.paired(runs, paired.preference(part, f"{who} vs base"))) for part in parts]
            told.insert(2, "in " + ", ".join(rate.removesuffix(" %") for rate in rates) + " %")
            excess = [paired.paired(runs, paired.ratio(who, "highest", part)) for part in parts]
            shown = [report.plus_minus({k: 100 * d[k] for k in d}, 0).replace("+0 ", "0 ") for d in excess]
            told.append(", ".join(shown) + " %")
        assert [cell.strip() for cell in row] == told
    text, levels = section.rpartition("|\n")[2].replace("\n", " "), report.quoted(results_of, {})["levels"]
    drawn = itertools.product(("base", "guided"), ("reward", "judged good"))
    others = [f"{metric}, {who}, 2, sd3, pickscore" for who, metric in drawn]
    others += [f"judged good, {who}, 3, {corner}" for corner in ("sd3, hps", "flux, hps") for who in report.MODELS]
    assert re.findall(r"\b\d\.\d\d\b", text) == [levels[name] for name in others]
    quoted = re.findall(r"\d+(?:\.\d+)? ± \d+(?:\.\d+)? %", text)
    assert len(quoted) == 2 and all(number in results for number in quoted)
