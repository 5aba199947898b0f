"""Tests of scores and held-out evaluations."""
import itertools
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import numpy as np
import pytest
import torch

import flow.evaluate
import flow.rewards
import train_awm
from flow.evaluate import score
from flow.pipeline import decode, draw_noise, encode_prompts, load_pipeline
from flow.rewards import load_reward
from tests.helpers import CPU, PROMPTS, flat_copy, generator, lora_bytes, metrics, refuses, small_run

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
    """A part that changes its pictures changes no other part's, however many pictures are decoded and scored at
    once."""
    (tmp_path / "r.py").write_text(REWARDS)
    spec = ",".join(f"{tmp_path}/r.py:{name}" for name in ("spoiling:2", "red", "length:-0.5"))
    reward = flow.rewards.load_reward(spec, CPU, batch=3)
    monkeypatch.setattr(flow.evaluate, "decode", lambda pipe, x0: x0)
    large = SimpleNamespace(flow=SimpleNamespace(picture=(3, 2048, 2048)))  # four of them are decoded at a time
    images = torch.rand(10, 3, 8, 8, generator=generator(0))
    prompts = [{"prompt": "x" * k, "metadata": {}} for k in range(10)]
    before, red, length = images.clone(), images[:, 0].double().mean((1, 2)), torch.arange(10.0)
    scores = flow.evaluate.score(large, reward, images, prompts)
    torch.testing.assert_close(reward.weighted(scores).double(), 2 * (1 - red) + red - 0.5 * length)
    expected = {"r.py:spoiling": 1 - red, "r.py:red": red, "r.py:length": length.double()}
    torch.testing.assert_close({name: part.double() for name, part in zip(reward.names, scores)}, expected)
    assert torch.equal(images, before)


def test_what_an_evaluation_logs(tmp_path, monkeypatch):
    """It uses the same prompts and noise each time, and the average of --ema. Its numbers are compared with NumPy's.
    The training speed is checked, too."""
    (tmp_path / "r.py").write_text(REWARDS)
    seen, ratios = [], 1 + torch.rand(3, 4, generator=generator(1))
    ratios[1, 2] += 1
    decay = [min((1 + s) / (10 + s), 0.6) for s in range(1, 5)]

    def lora(pipe):
        return flat_copy(p for p in pipe.transformer.parameters() if p.requires_grad)

    def drawn(pipe, noise, prompts, sigmas, **kwargs):
        seen.append({"pipe": pipe, "noise": noise, "prompts": prompts, "sigmas": sigmas, "used": lora(pipe)})
        return 0.3 * noise, ratios

    def stepped(optimizer, *args, **kwargs):
        honest(optimizer, *args, **kwargs)
        policies.append(flat_copy(optimizer.param_groups[0]["params"]))
    policies, honest = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    monkeypatch.setattr(flow.evaluate, "integrate", drawn)
    monkeypatch.setattr(train_awm, "time", SimpleNamespace(time=itertools.count(0, 10).__next__))
    small_run(tmp_path / "run", seed=5, epochs=2, group=2, steps=3, batch=3, lr=2e-2, eval_n=3, eval_every=1,
              eval_steps=4, ema=0.6, reward=f"{tmp_path}/r.py:red:3,{tmp_path}/r.py:length")
    held_out = Path("tiny/eval_prompts.txt").read_text().splitlines()[:3]
    noise = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    pictures = decode(seen[0]["pipe"], 0.3 * noise).double().numpy()
    red, length = pictures[:, 0].mean((1, 2)), np.array([len(prompt) for prompt in held_out])
    reward = 3 * red + length
    said = [line for line in metrics(tmp_path / "run") if "eval_reward" in line]
    assert len(seen) == len(said) == 3
    average = [seen[0]["used"]]
    for policy, d in zip(policies, decay):
        average.append(d * average[-1] + (1 - d) * policy)
    for epoch, (line, evaluation) in enumerate(zip(said, seen)):
        assert (line["epoch"], line["step"]) == (epoch, 2 * epoch)
        assert torch.equal(evaluation["noise"], noise) and evaluation["prompts"] == held_out
        assert len(evaluation["sigmas"]) == 5
        torch.testing.assert_close(evaluation["used"], average[2 * epoch])
        expected = {"eval_reward": reward.mean(), "eval_reward_se": reward.std(ddof=1) / 3**0.5,
                    "eval_reward/r.py:red": red.mean(), "eval_reward/r.py:length": length.mean(),
                    "eval_norm_ratio": ratios.mean().item(), "eval_norm_ratio_max": ratios.mean(0).max().item(),
                    "eval_saturation": matplotlib.colors.rgb_to_hsv(np.moveaxis(pictures, 1, -1))[..., 1].mean()}
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
        assert line["eval_norm_ratio_steps"] == pytest.approx(ratios.mean(0).tolist(), rel=1e-5)
    steps = [line["img_per_s"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert steps == pytest.approx([0.5 * 4 / 10, 4 / 20] * 2)  # the clock goes on by 10 s at each look


def test_evaluations_follow_eval_steps_and_rollout_batch(tmp_path):
    """--eval-steps sets their steps. --batch and --rollout-batch change only rounding, until the first optimizer
    step."""
    few, many = (metrics(small_run(tmp_path / f"{n}", epochs=1, eval_every=1, eval_steps=3, rollout_batch=n, batch=b))
                 for n, b in ((2, 4), (64, 32)))
    assert [len(line["eval_norm_ratio_steps"]) for line in few if "eval_reward" in line] == [3, 3]
    for a, b in zip(few[:2], many):  # the first evaluation and the first update; after its step rounding may grow
        assert {k: v for k, v in a.items() if isinstance(v, float) and k != "img_per_s"} == pytest.approx(
            {k: v for k, v in b.items() if isinstance(v, float) and k != "img_per_s"}, rel=1e-3, abs=1e-6)


def test_a_rewards_model_waits_on_the_cpu(monkeypatch):
    """It is moved to the device to score pictures, and back afterwards."""
    pipe = load_pipeline("tiny/sd3", CPU)
    encode_prompts(pipe, PROMPTS)
    reward, sent = load_reward("tiny/pickscore", CPU), []
    (model,) = reward.models
    monkeypatch.setattr(model, "to", sent.append)
    x0 = draw_noise(pipe, 3, torch.Generator().manual_seed(0))
    (scores,) = score(pipe, reward, x0, [{"prompt": prompt, "metadata": {}} for prompt in PROMPTS])
    assert sent == [CPU, "cpu"] and isinstance(sent[0], torch.device) and isinstance(sent[1], str)
    torch.testing.assert_close(scores, reward(decode(pipe, x0), PROMPTS))


def test_other_rewards_score_evaluations_and_change_nothing(tmp_path):
    """--eval-reward: logged by name beside the trained reward, also a sum; the training is the same, byte for byte."""
    (tmp_path / "r.py").write_text(REWARDS)
    flags = dict(epochs=1, group=2, steps=2, eval_n=3, eval_every=1, save_every=1, reward=f"{tmp_path}/r.py:red")
    plain = small_run(tmp_path / "plain", **flags)
    others = f"{tmp_path}/r.py:length", f"{tmp_path}/r.py:length:2,{tmp_path}/r.py:spoiling:0"
    both = small_run(tmp_path / "both", eval_reward=others, **flags)
    assert lora_bytes(plain) == lora_bytes(both)
    held_out = Path("tiny/eval_prompts.txt").read_text().splitlines()[:3]
    length = np.mean([len(prompt) for prompt in held_out])
    for line, other in zip(metrics(plain), metrics(both)):
        if "eval_reward" in line:
            assert other.pop("eval_reward/r.py:red") == pytest.approx(line["eval_reward"])
            assert other.pop("eval_reward/r.py:length") == pytest.approx(length)
            assert other.pop("eval_reward/r.py:length:2,r.py:spoiling:0") == pytest.approx(2 * length)
        assert {**line, "img_per_s": 0} == {**other, "img_per_s": 0}


def test_other_rewards_of_one_name_are_logged_apart_and_may_not_change(tmp_path, capsys):
    """Two files of one name, one of them the trained reward's; a change of either is seen when the run resumes."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(REWARDS)
    flags = dict(epochs=2, group=2, steps=2, eval_n=3, eval_every=1, save_every=1, reward=f"{tmp_path}/a/r.py:red",
                 eval_reward=(f"{tmp_path}/b/r.py:red", f"{tmp_path}/b/r.py:length", f"{tmp_path}/a/r.py:length"))
    out = small_run(tmp_path / "run", **flags | dict(epochs=1))
    names = {key.removeprefix("eval_reward/") for key in metrics(out)[0] if key.startswith("eval_reward/")}
    assert names == {"r.py:red", f"{tmp_path}/b/r.py:red", "r.py:length", f"{tmp_path}/a/r.py:length"}
    (tmp_path / "b" / "r.py").write_text(REWARDS + "# changed\n")
    refuses(capsys, lambda: small_run(out, **flags), "--reward", "changed since the run began")
