"""Tests of a training's parts that no formula of test_normguard.py covers: what rollouts are of, what several processes
add up to, what a resumed run has kept, and what evaluations and summed rewards say."""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flow.cli
import flow.distributed  # noqa: E402
import flow.draws  # noqa: E402
import flow.evaluate  # noqa: E402
import flow.rewards  # noqa: E402
import flow.run  # noqa: E402
import train_awm  # noqa: E402
import train_dpo  # noqa: E402
import train_nft  # noqa: E402
from flow.lora import lora_layers  # noqa: E402
from flow.pipeline import decode  # noqa: E402
from normguard import guard_gradient, norm_hinge, oppose, reference  # noqa: E402

SCRIPTS = [train_nft, train_awm, train_dpo]
SMALL = dict(seed=5, epochs=2, groups=2, group=2, steps=3, timesteps=1, updates=2, batch=3, rank=4, lr=2e-2,
             eval_every=0, save_every=1, eval_n=3)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Defaults like tiny/sd3 are relative to the repository."""
    monkeypatch.chdir(ROOT)


def generator(*key: int) -> torch.Generator:
    """What a run draws from, by (seed, purpose, place): purpose 0 is prompts, 2 noise of a rollout."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def lines(out: Path, without: str = "img_per_s") -> list[dict]:
    """The log, but for a number."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != without} for line in log]


def values(params) -> torch.Tensor:
    """A copy of all parameters, flat."""
    return torch.cat([p.detach().flatten() for p in params])


# ---------------------------------------------------------------- the guard, a loss, what is drawn

def test_within_the_margin_no_guard_acts():
    """Velocities longer than the reference's by 0 %, 3 % and 7 %, at a margin of 5 %."""
    v_ref, g = torch.randn(2, 3, 4, 2, generator=generator(0), dtype=torch.float64)
    v = v_ref * torch.tensor([1.0, 1.03, 1.07], dtype=torch.float64).view(3, 1, 1)
    for margin, acts in ((0.05, [False, False, True]), (0.02, [False, True, True]), (0.1, [False] * 3)):
        leaf = v.clone().requires_grad_()
        moved = 1 * leaf
        oppose(moved, v_ref, margin)
        (moved * g).sum().backward()
        for guarded in (guard_gradient(g, v, v_ref, margin), leaf.grad):
            assert (guarded != g).any(2).any(1).tolist() == acts
        assert (norm_hinge(v, v_ref, margin) > 0).tolist() == acts


def test_the_reference_records_no_gradient_of_its_input():
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.ones(2, 3, requires_grad=True)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    with reference(model):
        v_ref = model(x)
    assert not v_ref.requires_grad and model(x).requires_grad


def test_awm_gives_its_old_policy_no_gradient():
    v, v_old, x0, noise = torch.randn(4, 3, 2, 2, 2, generator=generator(0), dtype=torch.float64)
    t, adv = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.5, -0.5, 1.0])
    v.requires_grad_()
    v_old.requires_grad_()
    train_awm.awm_loss(v, v_old, x0, noise, t, adv).sum().backward()
    assert v_old.grad is None and v.grad.abs().amin() > 0


def test_each_pass_over_the_prompts_is_a_shuffle_of_its_own():
    args = train_awm.Args(seed=5, epochs=21, groups=5, eval_n=100)
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    held_out = Path("tiny/eval_prompts.txt").read_text().splitlines()
    prompts, eval_prompts = flow.draws.draw_prompts(args)
    order = torch.cat([torch.randperm(len(captions), generator=generator(5, 0, i)) for i in range(3)])
    assert len(captions) == 48 and prompts == [captions[i] for i in order[:105]] and prompts[:48] != prompts[48:96]
    assert eval_prompts == list(itertools.islice(itertools.cycle(held_out), 100))


@pytest.mark.parametrize("script", SCRIPTS)
def test_rollouts_are_of_the_epochs_prompts_and_the_right_policy(tmp_path, monkeypatch, script):
    """Each picture has its own noise, which no training row shares; NFT's old policy draws, elsewhere the current."""
    rollouts, name = [], "old" if script is train_nft else "default"

    def watched(pipe, noise, prompts, sigmas, **kwargs):
        layers = lora_layers(pipe.transformer)
        assert all(layer.active_adapters == [name] for layer in layers)
        weights = {key: values(layer.lora_B[key].weight for layer in layers) for key in ("default", name)}
        rollouts.append((noise, prompts, weights))
        return noise.clone(), None
    monkeypatch.setattr(script, "integrate", watched)
    monkeypatch.setattr(script, "score", lambda *args: torch.tensor([0.1, 0.5, 0.3, 0.2]))
    more = {"old_decay": (0, 0.2, 0.5)} if script is train_nft else {"pairs": 1} if script is train_dpo else {}
    script.main(script.Args(out=str(tmp_path), **SMALL, **more))
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    order = torch.randperm(len(captions), generator=generator(5, 0, 0))
    assert len(rollouts) == 2
    for epoch, (noise, prompts, weights) in enumerate(rollouts):
        assert prompts == [captions[order[2 * epoch + i // 2]] for i in range(4)]
        expected = [torch.randn(1, 16, 8, 8, generator=generator(5, 2, epoch, i)) for i in range(4)]
        assert torch.equal(noise, torch.cat(expected))
        assert torch.equal(weights["default"], weights[name]) == (epoch == 0 or script is not train_nft)
        assert weights[name].any() == (epoch == 1)


# ---------------------------------------------------------------- several processes, which one plays in turn

def play(monkeypatch, rank: int, processes: int, run_collective=None):
    """Be one of several processes, with something in the place of the network."""
    monkeypatch.setattr(flow.distributed, "RANK", rank)
    monkeypatch.setattr(flow.distributed, "PROCESSES", processes)
    monkeypatch.setattr(flow.distributed, "run_collective", run_collective)


@pytest.mark.parametrize("n, processes", [
    (12, 3),
    (7, 3),
    (5, 1),
])
def test_shares_are_everything_once_and_in_order(monkeypatch, n, processes):
    shares = []
    for rank in range(processes):
        play(monkeypatch, rank, processes)
        shares.append(range(n)[flow.distributed.local_slice(n)])
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_own_batches_are_an_updates_rows_once():
    picture, update = torch.tensor([3, 0, 5, 2, 1, 4]).repeat_interleave(2), torch.arange(2, 11)
    for owns in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        batches = [flow.draws.local_batches(update, picture, own, 4) for own in owns]
        assert sorted(row for own in batches for b in own for row in b.tolist()) == update.tolist()
        for own, parts in zip(owns, batches):
            assert all(own.start <= picture[row] < own.stop for b in parts for row in b) and max(map(len, parts)) <= 4
    assert flow.draws.local_batches(update, picture, slice(6, 8), 4) == []


def test_what_is_gathered_is_in_order(monkeypatch):
    sent = []
    for rank, mine in enumerate((torch.tensor([1, 2]), torch.tensor([3]))):
        sent.append(mine)

        def run_collective(collective, out, value):
            out[:] = [*sent[:rank], value]
        play(monkeypatch, rank, 2, run_collective)
        everything = flow.distributed.all_gather_tensor(mine)
    assert everything.tolist() == [1, 2, 3]


def test_gradients_are_summed_over_processes(monkeypatch):
    """Not averaged; where one process has none, it is the other's, and where none has one, there is none."""
    given = [[1.0, 2.0, None, None], [10.0, None, 3.0, None]]
    sent = []
    for rank, grads in enumerate(given):
        params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in grads]
        for p, value in zip(params, grads):
            p.grad = None if value is None else torch.full((2, 3), value)

        def run_collective(collective, flat):
            sent.append(flat.clone())
            flat.copy_(sum(sent))
        play(monkeypatch, rank, 2, run_collective)
        flow.distributed.sum_gradients(params)
    assert params[3].grad is None
    assert [p.grad.unique().tolist() for p in params[:3]] == [[11.0], [2.0], [3.0]]


def bare_run(out: Path):
    """As much of a run as a step's end needs, and its only parameter."""
    p = torch.nn.Parameter(torch.zeros(2))
    bar = SimpleNamespace(set_postfix=lambda **said: None)
    return SimpleNamespace(name="awm", args=train_awm.Args(group=2), params=[p], opt=torch.optim.SGD([p], lr=1),
                           ema=None, step=0, epoch=0, skipped=0, bad=0, parts={}, peaks={}, start=0.0, out=out,
                           wandb=None, bar=bar), p


def test_ten_bad_steps_end_a_run_only_in_a_row(tmp_path):
    run, p = bare_run(tmp_path)
    reward = torch.tensor([0.1, 0.2, 0.5, 0.5])

    def step(good: bool):
        p.grad = torch.tensor([0.0, 0.5 if good else float("nan")])
        flow.run.finish_step(run, {"loss": torch.tensor(1.0)}, 1, reward, 1.0)
    for good in [False] * 9 + [True] + [False] * 9:
        step(good)
    assert p.tolist() == [0, -0.5] and run.skipped == 18 and run.step == 19
    with pytest.raises(SystemExit), flow.cli.one_line_errors():
        step(good=False)


@pytest.mark.parametrize("sums, loss", [
    ({"loss": torch.tensor(1.0)}, 1.5),
    ({}, 1.25),
])
def test_a_steps_means_are_over_the_rows_of_all_processes(tmp_path, monkeypatch, sums, loss):
    """Of four rows; this process has one, or none."""
    theirs = {"loss": 5.0, "norm_ratio": 4.4, "ratio_at_4": 3.3, "rows_at_4": 3.0}
    monkeypatch.setattr(flow.run, "all_gather", lambda own: [own, theirs])
    run, p = bare_run(tmp_path)
    p.grad = torch.tensor([3.0, 4.0])
    flow.run.finish_step(run, sums, 4, torch.tensor([0.1, 0.2, 0.5, 0.5]), 1.0)
    (line,) = lines(tmp_path)
    said = [line[name] for name in ("loss", "norm_ratio", "grad_norm", "zero_std_share")]
    assert said == pytest.approx([loss, 1.1, 5, 0.5])
    assert line["norm_ratio_by_t"] == [None] * 4 + [pytest.approx(1.1)] and line["guard"] is None
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8]))  # clipped to 1


# ---------------------------------------------------------------- resuming

def same(a, b) -> bool:
    """Nested dicts and lists of the same tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_resumed_run_has_kept_everything(tmp_path, monkeypatch):
    """The LoRA, its average, the optimizer, NFT's old policy, the count of steps and of skipped ones: the checkpoints
    are those of an uninterrupted run, and the log too, of which a killed epoch's line is gone."""
    honest, calls = train_nft.nft_loss, []

    def second_is_nan(*args):
        calls.append(None)
        return honest(*args) * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(train_nft, "nft_loss", second_is_nan)
    monkeypatch.setattr(train_nft, "integrate", lambda pipe, noise, *args, **kwargs: (noise.clone(), None))
    monkeypatch.setattr(train_nft, "score", lambda *args: torch.tensor([0.1, 0.5, 0.3, 0.2]))

    def train(out, epochs):
        more = dict(epochs=epochs, save_every=3, ema=0.6, old_decay=(0, 0.2, 0.5))
        train_nft.main(train_nft.Args(out=str(out), **SMALL | more))
    train(tmp_path / "whole", 3)
    calls.clear()
    train(tmp_path / "parts", 1)
    bad = torch.load(tmp_path / "parts/checkpoint/state.pt", weights_only=True)["bad"]
    with open(tmp_path / "parts/metrics.jsonl", "a") as log:
        log.write('{"step": 3, "epoch": 1, "loss": 1.0}\n')  # the run was killed after it
    train(tmp_path / "parts", 3)
    saved = [tmp_path / name / "checkpoint/state.pt" for name in ("whole", "parts")]
    whole, parts = (torch.load(file, weights_only=True) for file in saved)
    assert whole["skipped"] == 1 and whole["step"] == 6 and not same(whole["old"], list(whole["lora"].values()))
    assert whole.keys() == parts.keys()
    for name in whole.keys() - {"log_bytes"}:
        assert same(whole[name], parts[name]), name
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts") and bad == 1
    kept = [tmp_path / name / "lora/pytorch_lora_weights.safetensors" for name in ("whole", "parts")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert [line["skipped"] for line in lines(tmp_path / "whole")] == [0, 1, 1, 1, 1, 1]


# ---------------------------------------------------------------- rewards and evaluations

REWARDS = """
import torch
def spoiling(images, prompts):
    images.neg_().add_(1)
    return images[:, 0].mean((1, 2))
def red(images, prompts):
    return images[:, 0].mean((1, 2))
def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])
"""


def test_a_summed_rewards_parts_see_the_same_pictures_with_their_prompts(tmp_path, monkeypatch):
    """What one does to the pictures no other sees, whatever the pieces in which they are decoded and scored."""
    (tmp_path / "r.py").write_text(REWARDS)
    spec = ",".join(f"{tmp_path}/r.py:{name}" for name in ("spoiling:2", "red", "length:-0.5"))
    reward = flow.rewards.load_reward(spec, torch.device("cpu"), batch=3)
    monkeypatch.setattr(flow.evaluate, "decode", lambda pipe, x0: x0)
    large = SimpleNamespace(flow=SimpleNamespace(picture=(3, 2048, 2048)))  # four of them are decoded at a time
    run = SimpleNamespace(pipe=large, reward=reward, peaks={}, parts={})
    images, prompts = torch.rand(10, 3, 8, 8, generator=generator(0)), ["x" * k for k in range(10)]
    before, red, length = images.clone(), images[:, 0].double().mean((1, 2)), torch.arange(10.0)
    scores = flow.evaluate.score(run, images, prompts)
    torch.testing.assert_close(scores.double(), 2 * (1 - red) + red - 0.5 * length)
    expected = {"r.py:spoiling": 1 - red, "r.py:red": red, "r.py:length": length.double()}
    torch.testing.assert_close({name: part.double() for name, part in run.parts.items()}, expected)
    assert torch.equal(images, before)


def test_what_an_evaluation_says(tmp_path, monkeypatch):
    """The same prompts and noise each time, of the average of --ema; its numbers against NumPy's. And the speed."""
    (tmp_path / "r.py").write_text(REWARDS)
    seen, ratios = [], 1 + torch.rand(3, 4, generator=generator(1))
    ratios[1, 2] += 1
    honest = flow.run.evaluate

    def watched(run, epoch):
        seen.append({"run": run, "own": values(run.params), "ema": values(run.ema)})
        honest(run, epoch)
        assert torch.equal(values(run.params), seen[-1]["own"])

    def drawn(pipe, noise, prompts, sigmas, **kwargs):
        seen[-1] |= {"noise": noise, "prompts": prompts, "sigmas": sigmas, "used": values(seen[-1]["run"].params)}
        return 0.3 * noise, ratios
    monkeypatch.setattr(flow.run, "evaluate", watched)
    monkeypatch.setattr(flow.evaluate, "integrate", drawn)
    monkeypatch.setattr(flow.run, "time", SimpleNamespace(time=itertools.count(0, 10).__next__))
    changes = dict(eval_every=1, eval_steps=4, ema=0.6, reward=f"{tmp_path}/r.py:red:3,{tmp_path}/r.py:length")
    train_awm.main(train_awm.Args(out=str(tmp_path / "run"), **SMALL | changes))
    held_out = Path("tiny/eval_prompts.txt").read_text().splitlines()[:3]
    noise = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    pictures = decode(seen[0]["run"].pipe, 0.3 * noise).double().numpy()
    red, length = pictures[:, 0].mean((1, 2)), np.array([len(prompt) for prompt in held_out])
    reward = 3 * red + length
    said = [line for line in lines(tmp_path / "run") if "eval_reward" in line]
    assert len(seen) == len(said) == 3
    for epoch, (line, evaluation) in enumerate(zip(said, seen)):
        assert (line["epoch"], line["step"]) == (epoch, 2 * epoch)
        assert torch.equal(evaluation["noise"], noise) and evaluation["prompts"] == held_out
        assert len(evaluation["sigmas"]) == 5
        assert torch.equal(evaluation["used"], evaluation["ema"])
        assert torch.equal(evaluation["own"], evaluation["ema"]) == (epoch == 0)
        expected = {"eval_reward": reward.mean(), "eval_reward_se": reward.std(ddof=1) / 3**0.5,
                    "eval_reward/r.py:red": red.mean(), "eval_reward/r.py:length": length.mean(),
                    "eval_norm_ratio": ratios.mean().item(), "eval_norm_ratio_max": ratios.mean(0).max().item(),
                    "eval_saturation": matplotlib.colors.rgb_to_hsv(np.moveaxis(pictures, 1, -1))[..., 1].mean()}
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
        assert line["eval_norm_ratio_steps"] == pytest.approx(ratios.mean(0).tolist(), rel=1e-5)
    steps = [line["img_per_s"] for line in lines(tmp_path / "run", without="") if "loss" in line]
    assert steps == pytest.approx([0.5 * 4 / 10, 4 / 20] * 2)  # the clock goes on by 10 s at each look
