"""Tests of the training loop that no formula of test_normguard.py covers: what rollouts are of, what a step adds up,
which policy is kept, what the guard does to a run."""
import contextlib
import functools
import re
from pathlib import Path

import pytest
import torch

import flow.cli
import flow.draws
import flow.pipeline
import flow.run
import train_awm
import train_dpo
import train_nft
from flow.lora import lora_layers
from flow.pipeline import load_pipeline, schedule
from tests.helpers import CPU, SCRIPTS, SMALL, flat_copy, generator, lora_bytes, metrics, small_run, timeless

QUICK = dict(seed=5, epochs=2, group=2, steps=3, batch=3, lr=2e-2, eval_every=0, eval_n=3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_rollouts_are_of_the_epochs_prompts_and_the_right_policy(tmp_path, monkeypatch, script):
    """Each picture has its own noise, which no training row shares. NFT draws with its old policy, the others with the
    current one."""
    rollouts, name = [], "old" if script is train_nft else "default"

    def watched(pipe, noise, prompts, sigmas, **kwargs):
        layers = lora_layers(pipe.transformer)
        assert all(layer.active_adapters == [name] for layer in layers)
        weights = {key: flat_copy(layer.lora_B[key].weight for layer in layers) for key in ("default", name)}
        rollouts.append((noise, prompts, weights))
        return noise.clone(), None
    monkeypatch.setattr(script, "integrate", watched)
    monkeypatch.setattr(script, "score", lambda *args: torch.tensor([[0.1, 0.5, 0.3, 0.2]]))
    more = {"old_decay": (0, 0.2, 0.5)} if script is train_nft else {"pairs": 1} if script is train_dpo else {}
    small_run(tmp_path, script, **QUICK | more)
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    order = torch.randperm(len(captions), generator=generator(5, 0, 0))
    assert len(rollouts) == 2
    for epoch, (noise, prompts, weights) in enumerate(rollouts):
        assert prompts == [captions[order[2 * epoch + i // 2]] for i in range(4)]
        expected = [torch.randn(1, 16, 8, 8, generator=generator(5, 2, epoch, i)) for i in range(4)]
        assert torch.equal(noise, torch.cat(expected))
        assert torch.equal(weights["default"], weights[name]) == (epoch == 0 or script is not train_nft)
        assert weights[name].any() == (epoch == 1)


@pytest.mark.parametrize("good, steps", [
    ([10], 19),  # nine bad steps, a good one, nine bad ones
    ([], 10),
])
def test_ten_bad_steps_end_a_run_only_in_a_row(tmp_path, monkeypatch, good, steps):
    calls, honest = [], train_awm.awm_loss

    def broken(*args):
        calls.append(None)
        return honest(*args) * (1 if len(calls) in good else float("nan"))
    monkeypatch.setattr(train_awm, "awm_loss", broken)
    monkeypatch.setattr(train_awm, "integrate", lambda pipe, noise, *args, **kwargs: (noise.clone(), None))
    monkeypatch.setattr(train_awm, "score", lambda *args: torch.tensor([[0.1, 0.5, 0.3, 0.2]]))
    with contextlib.nullcontext() if good else pytest.raises(SystemExit):
        small_run(tmp_path, **QUICK | dict(epochs=19, updates=1, batch=8, save_every=19))
    lines = metrics(tmp_path)
    assert len(lines) == steps and lines[-1]["skipped"] == steps - len(good)


@pytest.mark.parametrize("local, loss", [
    ([{"loss": torch.tensor([0.25, 0.75])}], 1.5),
    ([], 1.25),
])
def test_a_steps_means_are_over_the_rows_of_all_processes(monkeypatch, local, loss):
    """Of four rows; this process has two, or none."""
    theirs = {"loss": 5.0, "norm_ratio": 4.4, "ratio in bin 4": 3.3, "rows in bin 4": 3.0}
    monkeypatch.setattr(flow.distributed, "all_gather", lambda own: [own, theirs])
    means = flow.distributed.mean_over_rows(local, 4)
    assert [means["loss"], means["norm_ratio"]] == pytest.approx([loss, 1.1]) and means["active"] is None
    assert means["norm_ratio_by_t"] == [None] * 4 + [pytest.approx(1.1)]


def same(a, b) -> bool:
    """Nested dicts and lists hold the same tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_resumed_run_has_kept_everything(tmp_path, monkeypatch):
    """The LoRA, its average, the optimizer, NFT's old policy, the counts of steps and of skipped ones: checkpoint and
    log are those of an uninterrupted run. A line that a killed epoch has logged is gone."""
    honest, calls = train_nft.nft_loss, []

    def second_is_nan(*args):
        calls.append(None)
        return honest(*args) * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(train_nft, "nft_loss", second_is_nan)
    monkeypatch.setattr(train_nft, "integrate", lambda pipe, noise, *args, **kwargs: (noise.clone(), None))
    monkeypatch.setattr(train_nft, "score", lambda *args: torch.tensor([[0.1, 0.5, 0.3, 0.2]]))

    def train(out, epochs):
        more = dict(epochs=epochs, save_every=3, ema=0.6, old_decay=(0, 0.2, 0.5))
        small_run(out, train_nft, **QUICK | more)
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
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts") and bad == 1
    kept = [tmp_path / name / "lora/pytorch_lora_weights.safetensors" for name in ("whole", "parts")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert [line["skipped"] for line in timeless(tmp_path / "whole")] == [0, 1, 1, 1, 1, 1]


def test_nonfinite_steps_are_skipped_and_ten_stop_the_run(tmp_path, monkeypatch, capsys):
    honest, calls = train_awm.awm_loss, []

    def broken(*args):
        calls.append(None)
        return honest(*args) * (float("nan") if len(calls) > 2 else 1)  # the first epoch is sound
    monkeypatch.setattr(train_awm, "awm_loss", broken)
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        small_run(tmp_path / "run", epochs=9, eval_every=0, batch=64)
    assert end.value.code == 2 and "ten steps" in capsys.readouterr().err
    lines = metrics(tmp_path / "run")
    assert lines[-1]["skipped"] == 10 and lines[-1]["loss"] is None and len(lines) == 12
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in state["lora"].values()) and state["bad"] == 2 * (state["epoch"] - 1)


@pytest.mark.parametrize("pairs, each", [
    (None, 2),  # half of the group, where four do not fit
    (1, 1),
])
def test_dpo_takes_a_small_group(tmp_path, monkeypatch, pairs, each):
    rows, honest = [], train_dpo.dpo_loss

    def counted(v_w, *others, **named):
        rows.append(len(v_w))
        return honest(v_w, *others, **named)
    monkeypatch.setattr(train_dpo, "dpo_loss", counted)
    flags = dict(group=4, groups=2, updates=1, pairs=pairs, epochs=1, eval_every=0)
    (line,) = metrics(small_run(tmp_path / "run", train_dpo, **flags))
    assert line["loss"] > 0 and sum(rows) == 2 * each * SMALL["timesteps"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_lam_0_the_guard_changes_nothing(tmp_path, monkeypatch, script):
    """Runs with different guards are equal to the bit."""
    short = dict(epochs=1, groups=1, steps=2, eval_every=0)
    zero = lora_bytes(small_run(tmp_path / "zero", script, lam=0.0, **short))
    monkeypatch.setattr(script, "norm_hinge", lambda v, v_ref, margin: 1e3 * v.flatten(1).sum(1))
    assert lora_bytes(small_run(tmp_path / "other", script, lam=0.0, **short)) == zero


@pytest.mark.parametrize("script", SCRIPTS)
def test_lam_auto_does_not_depend_on_the_scale_of_the_loss(tmp_path, monkeypatch, script):
    """A loss times 1024, which rounds nothing, gives the same run: without the KL, clipping and Adam's epsilon. The
    second run is also interrupted and resumed."""
    name = script.__name__.replace("train_", "") + "_loss"
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-30))
    flags = dict(lam="auto", eval_every=0, kl=0.0, max_grad_norm=1e9, lr=1e-2)
    one = small_run(tmp_path / "one", script, **flags | dict(epochs=2))
    honest = getattr(script, name)
    monkeypatch.setattr(script, name, lambda *args: 1024 * honest(*args))
    for epochs in (1, 2):
        other = small_run(tmp_path / "other", script, **flags | dict(epochs=epochs))
    assert lora_bytes(one) == lora_bytes(other)
    steps, scaled = metrics(one), metrics(other)
    assert any(line["active"] > 0 for line in steps) and len(steps) == len(scaled) == 4
    for a, b in zip(steps, scaled):
        assert a["loss"] == a["base_loss"] == pytest.approx(b["loss"] / 1024, rel=1e-6)
        assert (a["guard"], a["norm_ratio"], a["active"]) == (b["guard"], b["norm_ratio"], b["active"])


def test_dpo_with_lam_auto_also_trains_at_the_rollouts_noise_levels(tmp_path, monkeypatch):
    levels, honest = [], flow.draws.add_noise

    def capture(x0, noise, t):
        levels.append(t[:len(t) // 2])
        return honest(x0, noise, t)
    monkeypatch.setattr(flow.draws, "add_noise", capture)
    for lam in (0.05, "auto"):
        small_run(tmp_path / str(lam), train_dpo, lam=lam, groups=4, updates=1, timesteps=2, epochs=1, batch=64,
                  eval_every=0)
    plain, auto = levels
    changed = plain != auto
    assert len(plain) == 16 and set(changed.nonzero().flatten().tolist()) == {0, 8}
    pipe = load_pipeline("tiny/sd3", CPU)
    assert all(t in schedule(pipe, SMALL["steps"])[:-1] for t in auto[changed])


@pytest.mark.parametrize("script", [train_nft, train_awm])
def test_no_reference_forward_is_paid_when_none_is_needed(tmp_path, monkeypatch, script):
    def refuse(model):
        raise AssertionError("a reference forward was paid")
    monkeypatch.setattr(script, "reference", refuse)
    monkeypatch.setattr(flow.pipeline, "reference", refuse)
    lines = metrics(small_run(tmp_path, script, lam=0.0, kl=0.0, eval_every=0, epochs=1))
    assert [line["norm_ratio"] for line in lines] == [None, None]


SHORT = dict(group=8, groups=2, updates=1, batch=32, rank=8, steps=4, timesteps=2, eval_n=16, epochs=3, eval_every=3,
             lr=8e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_raises_a_reward_it_can_raise(tmp_path, script):
    """The reward is brightness. A wrong sign of the advantage, wrong pairing with rows, noising or accumulation would
    fail."""
    (tmp_path / "bright.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    out = small_run(tmp_path / "run", script, reward=f"{tmp_path}/bright.py:bright", lam=0.0, **SHORT)
    first, *_, last = metrics(out)
    assert last["eval_reward"] - first["eval_reward"] > 3 * first["eval_reward_se"]


def test_guard_holds_the_norm(tmp_path):
    """The reward, contrast, inflates the norm. With the guard the norm ends lower, at most at the reference's."""
    (tmp_path / "contrast.py").write_text("def contrast(images, prompts):\n    return images.std((1, 2, 3))\n")
    ratio = {}
    for lam in (0.0, 1.0):
        out = small_run(tmp_path / str(lam), lam=lam, reward=f"{tmp_path}/contrast.py:contrast", **SHORT)
        ratio[lam] = metrics(out)[-1]["eval_norm_ratio"]
    assert ratio[0.0] > 1.02 and ratio[1.0] < 1.01


def test_a_reward_without_differences_is_reported(tmp_path, capsys):
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return images.new_ones(len(images))\n")
    small_run(tmp_path / "run", reward=f"{tmp_path}/flat.py:flat", epochs=1, eval_every=0)
    assert "note: all pictures of a prompt have the same reward (1, ...)" in capsys.readouterr().out


# ---------------------------------------------------------------- the three scripts are twins

def blocks(method: str) -> dict[str, str]:
    """A script's main by its headings; under names of our own its imports, the first lines of main, how a loss becomes
    a gradient, and of this what is the same for pairs."""
    text = Path(f"train_{method}.py").read_text().replace(f'"{method}"', '"METHOD"')
    imports, main = text[text.index("import os\n"):text.index("@dataclass")], text[text.index("@one_line_errors()"):]
    parts = re.split(r"^ +# ---- (.*)\n", main, flags=re.MULTILINE)
    (backward,) = re.findall(r"^ +loss = .*?backward\(\)\n", main, re.MULTILINE | re.DOTALL)
    loss = main[main.index("guard = "):main.index(backward)] + backward
    return {"imports": imports, "begin": "".join(parts[0].splitlines(True)[:5]), "backward": backward, "loss": loss,
            **dict(zip(parts[1::2], parts[2::2]))}


@pytest.mark.parametrize("heading, methods", [
    ("begin", ["awm", "nft", "dpo"]),
    ("load; errors come before anything is written", ["awm", "nft"]),  # DPO's has one line more
    ("LoRA and optimizer", ["awm", "dpo"]),  # NFT's has the old policy
    ("start or resume", ["awm", "dpo"]),
    ("rollout: `group` pictures of each prompt from the policy as it stands", ["awm", "dpo"]),
    ("loss", ["awm", "nft"]),  # DPO's has the means of pairs
    ("backward", ["awm", "nft", "dpo"]),
    ("optimizer step, unless the loss or a gradient is not finite", ["awm", "nft", "dpo"]),
    ("evaluation and checkpoint", ["awm", "dpo"]),
])
def test_shared_blocks_of_the_scripts_are_the_same_word_for_word(heading, methods):
    assert len({blocks(method)[heading] for method in methods}) == 1


def test_what_a_script_adds_to_a_shared_block_is_added_lines():
    """NFT's old policy, DPO's noise levels and pairs: without these lines the blocks are the same."""
    for heading, method, words in (
            ("imports", "nft", "contextmanager|CLIP"),
            ("imports", "dpo", "functional|einops|CLIP"),
            ("load; errors come before anything is written", "dpo", "training_levels"),
            ("LoRA and optimizer", "nft", "old|set_adapter"),
            ("start or resume", "nft", "old_decay"),
            ("evaluation and checkpoint", "nft", "old=")):
        theirs = blocks(method)[heading].replace(", old=old_params", "").replace("ema=ema,\n", "ema=ema)\n")
        theirs = theirs.replace("set_adapter, ", "").replace("training_levels, ", "")
        ours = [line for line in blocks("awm")[heading].splitlines() if not re.search("CLIP", line)]
        lines = [line for line in theirs.splitlines() if not re.search(words, line)]
        assert "\n".join(lines).split() == "\n".join(ours).split(), heading


def test_shared_flags_have_one_default_and_one_help():
    """But for what the methods mean differently."""
    texts = [Path(f"train_{method}.py").read_text() for method in ("nft", "awm", "dpo")]
    found = [re.findall(r"^((?:    # .*\n)?    (\w+): .*)$", text, re.MULTILINE) for text in texts]
    fields = [{name: line for line, name in lines} for lines in found]
    own = {"lam", "lr", "kl", "updates", "timesteps", "batch", "out"}
    for name in set().union(*fields) - own:
        assert len({lines[name] for lines in fields if name in lines}) == 1, name
    assert len(set.intersection(*map(set, fields)) - own) > 20
