"""Tests of the miniature's reproduction (tiny/): other guards and rivals, differences and verdicts, the report, and
reproduce.py from end to end."""
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import guards
import numpy as np
import paired
import pytest
import reading
import report
import reproduce
import torch
import torch.nn.functional as F
import world

import flow.cli
import flow.lora
import flow.pipeline
import flow.rewards
import train_awm
import train_dpo
from normguard import norm_hinge, reference
from tests.helpers import CPU, lora_bytes, pixels, random_pair, sample_rows


def test_other_guards():
    """Claim 9's hinges against numpy in float64, their slopes against finite differences, and no pull where all norms
    are small."""
    v, v_ref = (F.interpolate(x, (4, 2)) for x in random_pair(scale=1.6))  # (5, 4, 4, 2): two tokens a sample
    a, b = v.numpy(), v_ref.numpy()
    norms = [np.sqrt((x**2).sum((1, 2, 3))) for x in (a, b)]
    tokens = [np.sqrt(np.stack([(x[:, :, :2] ** 2).sum((1, 2, 3)), (x[:, :, 2:] ** 2).sum((1, 2, 3))])) for x in (a, b)]
    ratio = norms[0] / norms[1]
    assert ratio.max() > 1 and ratio.min() < 1
    for hinge, expected in (
        (guards.squared, np.maximum(ratio - 1, 0) ** 2),
        (guards.absolute, np.maximum(norms[0] - norms[1], 0)),
        (guards.per_token, np.maximum(tokens[0] / tokens[1] - 1, 0).mean(0)),
    ):
        np.testing.assert_allclose(hinge(v, v_ref).numpy(), expected, rtol=1e-5, atol=1e-6)
        longer = v.clone().requires_grad_()
        hinge(longer, v_ref).sum().backward()
        h = 1e-2 * v  # norms are fp32: a coarse step, along the radius
        slope = (hinge(v + h, v_ref) - hinge(v - h, v_ref)).sum().item() / 2
        assert slope > 0 and (longer.grad * h).sum().item() == pytest.approx(slope, rel=0.02)
        shorter = (0.5 * v_ref).requires_grad_()
        hinge(shorter, v_ref).sum().backward()
        assert shorter.grad.abs().max() == 0


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
    assert d["difference"] == pytest.approx(values.mean()) and (d["runs"], d["cells"]) == (12, 4)
    assert d["cells larger"] == (values.mean(1) > 0).sum() and d["runs larger"] == (values > 0).sum()
    assert d["half"] == pytest.approx(4.303 * values.mean(0).std(ddof=1) / 3**0.5, rel=1e-3)
    twice = results | {run._replace(base=f"{run.base} again"): r for run, r in results.items()}
    assert paired.paired(twice, lambda r: r["a"], lambda r: r["b"])["half"] == pytest.approx(d["half"])
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


def test_rivals_at_equal_reward(monkeypatch):
    """Between two strengths interpolated, each run at its own target; never beyond what was measured. At strength s
    all here is linear: reward 1 - s, judged good 0.5 + s, the guard preferred by 0.3 - s, the highest step 1.3 - s."""
    def part(strength: float, who: str, **more) -> dict:
        """Numbers of a model at a strength."""
        means = {"reward": 1 - strength, "judge/overall": 0.5 + strength}
        won = round(8 - 10 * strength)
        return {"means": {who: means, **more}, "ratio": {who: {"mean": [0.9, 1.3 - strength]}}, "of": {"code": "a"},
                "training reward": {who: 1 - strength}, "verdicts": {f"guarded vs {who}": [won, 0, 10 - won, 0]}}

    monkeypatch.setitem(guards.RIVALS, "velocity KL", guards.Rival((0.2, 0.4), dpo=(0.1, 0.3)))
    runs = {}
    for seed, base in enumerate((0.0, 0.2)):
        other = {"reward": base, "judge/overall": 0.8}
        main = part(0, "unguarded", base=other, guarded=other)
        main["training reward"] |= {"base": base, "guarded": 1.5}  # the unguarded gain is the lesser one
        runs[reproduce.Run("sd3", "awm", "hps", seed)] = {"main": main, "rival: velocity KL 0.2": part(0.2, "rival")}
    assert paired.equal_reward(runs, "velocity KL") is None  # a strength is missing
    for r in runs.values():
        r["rival: velocity KL 0.4"] = part(0.4, "rival")
    for keep, strength, own in ((1, 0, (0, 0)), (0.9, 0.09, (0.1, 0.08)), (0.7, 0.27, (0.3, 0.24)),
                                (None, 0.2, (0.2, 0.2))):  # the weakest, as it is
        met, chosen = paired.equal_reward(runs, "velocity KL", keep)
        assert list(met) == list(runs) and chosen == pytest.approx(strength)
        for s, found in zip(own, met.values()):
            known = {"reward": 1 - s, "judge/overall": 0.5 + s, "training reward": 1 - s, "preferred": 0.3 - s,
                     "highest": 1.3 - s}
            assert found["rival"] == pytest.approx(known) and found["guarded"]["judge/overall"] == 0.8
    assert paired.equal_reward(runs, "velocity KL", 0.5) == ({}, None)  # the strengths end before that
    assert paired.crossing([0.9, 0.5, 0.7], 0.6) is None  # it comes back: where it ends is not known
    assert paired.equal_reward({run._replace(method="dpo"): r for run, r in runs.items()}, "velocity KL") is None
    r["main"]["of"] = {"code": "b"}
    assert len(paired.equal_reward(runs, "velocity KL")[0]) == 1  # measured beside other code: not compared

    monkeypatch.setattr(report, "BESIDE", {"judge/overall": 3})
    r["auto"] = part(0.1, "auto")
    auto = report.rivals_of(runs, None)[report.AUTO]  # of the one run that has it
    assert auto["preferred"]["difference"] == pytest.approx(0.2) and auto["verdict"] == "one seed: no interval"
    assert auto["judge/overall"]["difference"] == pytest.approx(-0.2)
    for preferred, half, said in ((0.2, 0.1, "the guard"), (-0.2, 0.1, "**the rival**"), (0.1, 0.2, "not resolved")):
        assert report.preferred_side({"difference": preferred, "half": half}) == said


def test_results_are_what_the_report_says(tmp_path):
    """RESULTS.md and results.json are what report.py makes of tiny/results; nobody has edited them."""
    report.write_report(*reproduce.gathered(Path("tiny/results")), reproduce.Size(), tmp_path, Path("assets"))
    text = (tmp_path / "RESULTS.md").read_text().replace(os.path.relpath("assets", tmp_path), "../assets")
    assert text.replace(str(tmp_path), "tiny") == Path("tiny/RESULTS.md").read_text()
    assert (tmp_path / "results.json").read_text() == Path("tiny/results.json").read_text()


def test_the_texts_hold_no_numbers():
    """The numbers in the texts are filled in from the results, and each text is in RESULTS.md."""
    names = r"\{\w+\}|sd3|claim 6|lam 0\.\d+|may lose 5 %|With 5 % less"
    comments = re.findall(r"^\[\d+ runs\] (.*)", report.TEMPLATE.read_text(), re.MULTILINE)
    assert len(comments) == len(reading.VALUES) == len(report.CLAIMS)
    for text in comments:
        assert not re.search(r"\d", re.sub(names, "", text)), text
        assert text.partition("{")[0] in Path("tiny/RESULTS.md").read_text()


def test_stale_numbers_are_seen(tmp_path, monkeypatch):
    """Numbers know the weights, the code and the flags they come from; a comment changes none of it. What other weights
    or code made is in other folders."""
    run, size = reproduce.Run("sd3", "awm", "hps", 0), reproduce.Size()
    numbers = {part: {"of": reproduce.depends(run, size, part)} for part in ("main", "guard: per token")}
    assert reproduce.stale_parts({run: numbers}, {}, size) == {}
    stale = reproduce.stale_parts({run: numbers}, {}, size._replace(steps=4))
    assert stale == {"flags": [f"{run.name}: main", f"{run.name}: guard: per token"]}
    numbers["main"] = {}  # from before there were hashes
    bases = {"sd3": {"colours": {"of": {"weights": "other"}}}}
    stale = reproduce.stale_parts({run: numbers}, bases, size)
    assert set(stale) == {"weights", "code", "flags"} and "sd3: colours" in stale["weights"]
    others = (guards.GUARDS["squared, lam 0.5"], guards.RIVALS["EMA-KL"].training, guards.GUARDS["lam 0.5"])
    codes = [reproduce.rival_code(other) for other in others]
    assert len(set(codes)) == 3 and codes[2] == ""

    assert reproduce.source_hash("def f(): pass") == "c4bf3c5c"  # in every version of Python
    monkeypatch.chdir(tmp_path)
    counted = ("normguard.py", "train_awm.py", "sample.py", "eval_judge.py", "tiny/world.py", "flow/pictures.py")
    others = ("train_nft.py", "flow/test_pictures.py", "flow/cost/budget.py")
    text, code = 'class Args:\n    x: int = 1\n    """words"""\n', reproduce.code.__wrapped__
    for file in (*counted, *others):
        report.write_text(Path(file), text)
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
    run = reproduce.Run("sd3", "awm", "hps", 0)
    home = reproduce.home_of(tmp_path, "sd3", run)
    state = home / "lam0" / "checkpoint" / "state.pt"
    process = subprocess.Popen([*command, "--only", "10"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (home / "commands.txt").exists() or "--lam 0.05" not in (home / "commands.txt").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept, trained = paired.read_json(tmp_path / "results" / "sd3.json"), state.stat().st_mtime_ns
    assert kept["colours"]["of"]["commit"] == reproduce.commit()
    monkeypatch.setattr(reproduce, "SMOKE", reproduce.SMOKE._replace(only=parts))
    monkeypatch.setattr(sys, "argv", command[1:])
    reproduce.main(flow.cli.parse(reproduce.Args, reproduce.__doc__))
    done = paired.read_json(tmp_path / "results" / "sd3-awm-hps-s0.json")
    assert tuple(done) == parts and paired.read_json(tmp_path / "results" / "sd3.json") == kept  # to the second
    assert state.stat().st_mtime_ns == trained
    commands = [line for file in tmp_path.rglob("commands.txt") for line in file.read_text().splitlines()]
    again = {line for line in commands if commands.count(line) > 1}
    assert len(again) == 1 and "--lam 0.05" in again.pop()  # the one that was killed

    hps = flow.rewards.load_reward("tiny/hps", CPU)
    for name, folder in (("unguarded", "awm"), ("guarded", "awm+normguard")):
        rows = sample_rows(home / folder)
        arrays = [pixels(home / folder / row["file"]) for row in rows]
        pictures = torch.stack([torch.from_numpy(array).permute(2, 0, 1) / 255 for array in arrays])
        score = hps(pictures, [row["prompt"] for row in rows])
        assert done["main"]["means"][name]["reward"] == pytest.approx(score.mean().item(), rel=1e-4)
    guarded = reproduce.train_variant(home, run, reproduce.SMOKE, "guards/per-token", guards.GUARDS["per token"])
    assert lora_bytes(guarded) != lora_bytes(home / "lam0.05")  # the other hinge was in place
    assert lora_bytes(home / "rivals" / "EMA-KL-0.3") != lora_bytes(home / "lam0")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("\n## ") == 9 and text.count("Not measured yet") == 5
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"1", "4", "5 and 6", "10"}
    graphs = {"inflation.png", "differences.png", "rivals.png", "front.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == graphs


def test_world_is_deterministic_and_split():
    f = [world.scene(torch.arange(64), torch.Generator().manual_seed(3)) for _ in range(2)]
    a, b = (world.render(x) for x in f)
    assert torch.equal(a, b) and a.shape == (64, 3, 64, 64) and 0 <= a.min() and a.max() <= 1
    rl, held_out = (Path(p).read_text().splitlines() for p in ("tiny/prompts.txt", "tiny/eval_prompts.txt"))
    assert not set(rl) & set(held_out) and set(rl) | set(held_out) == set(world.CAPTIONS)
    assert (len(rl), len(held_out)) == (48, 16)
