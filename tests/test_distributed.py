"""Tests of several processes: torchrun on a CPU, over gloo."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flow.cli
import flow.run
import train_awm
import train_dpo
import train_nft
from flow.cli import parse

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--epochs", "3", *"--groups 2 --group 4 --updates 2 --batch 4 --steps 3".split(),
         *"--eval-n 3 --eval-every 2 --save-every 1 --ema 0.5 --lr 5".split()]
EVEN = ["--updates", "1", "--eval-n", "32", "--epochs", "2"]  # both processes encode the same 16 prompts
SCRIPTS = {"awm": train_awm, "nft": train_nft, "dpo": train_dpo}
# SGD, whose steps are as near as the gradients are: Adam makes full steps of what is but rounding
DRIVER = """
import sys, torch
sys.path.insert(0, {root!r})
import train_awm, train_dpo, train_nft
torch.optim.AdamW = lambda params, lr, **others: torch.optim.SGD(params, lr)
from flow.cli import parse
for name, flags in {runs}:
    script = dict(awm=train_awm, nft=train_nft, dpo=train_dpo)[name]
    sys.argv = [name, *flags]
    script.main(parse(script.Args, ""))
"""
SHARDED = """
from flow.pipeline import load_pipeline
from flow.distributed import local_device
weight = load_pipeline("tiny/sd3", local_device(), sharded=True).transformer.transformer_blocks[0].attn.to_q.weight
assert 2 * weight.to_local().numel() == weight.numel()
"""
REWARD = """
import os
calls = []
def red(images, prompts):
    calls.append(len(images))
    if os.environ.get("RANK") == "1" and len(calls) == int(os.environ.get("FAIL_AT", 0)):
        raise RuntimeError("no red today")
    return images[:, 0].mean((1, 2))
"""


FAILING = """
import os
os.environ["FAIL_AT"] = "6"
sys.argv = ["nft", *{flags}]
train_nft.main(parse(train_nft.Args, ""))
"""


def torchrun(folder: Path, runs: list, then: str = "") -> subprocess.CompletedProcess:
    """The runs (script, flags) one after another, in two processes; then some code."""
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), runs=runs) + then)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"{folder}/driver.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def log(out: Path) -> list[dict]:
    """metrics.jsonl, without the speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "img_per_s"} for line in lines]


def lora(out: Path) -> dict[str, torch.Tensor]:
    """The run's LoRA."""
    return load_file(out / "lora" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, float]:
    """In two processes, all in a folder: a run of each script, one with --shard, and NFT's again, in which the second
    process's reward fails in the third epoch. Also the seconds from its last line to the end."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "red.py").write_text(REWARD)
    flags = [*SMALL, "--reward", f"{folder}/red.py:red"]  # CLIP's see 8 bits, of which rounding can flip one
    runs = [(name, [*flags, "--out", f"{folder}/{name}"]) for name in SCRIPTS]
    runs += [("nft", [*flags, *EVEN, "--out", f"{folder}/sharded", "--shard"])]
    ended = torchrun(folder, runs, SHARDED + FAILING.format(flags=[*flags, "--out", f"{folder}/failed"]))
    return folder, ended, time.time() - (folder / "failed/metrics.jsonl").stat().st_mtime


@pytest.fixture()
def two(launch) -> Path:
    """Their folder."""
    folder, ended, _ = launch
    assert ended.stdout.count("done: ") == 4, ended.stderr[-4000:]  # by the first process alone
    return folder


def run_here(name: str, flags: list[str], monkeypatch):
    """A run in this process alone, with SGD's steps as well."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, lr, **others: torch.optim.SGD(params, lr))
    SCRIPTS[name].main(parse(SCRIPTS[name].Args, ""))


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_compute_what_one_does(two, name, tmp_path, monkeypatch):
    """The same lines and the same LoRA but for rounding, with unequal shares of the held-out prompts."""
    run_here(name, [*SMALL, "--reward", f"{two}/red.py:red", "--out", f"{tmp_path}/one"], monkeypatch)
    assert len(log(two / name)) == 3 * 2 + 3  # two steps an epoch, and evaluations at 0, 2 and 3
    assert_alike(tmp_path / "one", two / name)


def assert_alike(one: Path, other: Path):
    """The same lines and the same LoRA, but for rounding: of fp32, which SGD's six steps make a few thousand times
    larger at most. Shares of rows are left out: a row that lies on the edge moves them by its whole."""
    ours, theirs = log(one), log(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - {"active", "clip_share", "accuracy"}:
            ours, theirs = (x if isinstance(x, list) else [x] for x in (a[key], b[key]))
            assert [x is None for x in ours] == [x is None for x in theirs], key
            numbers = [[x for x in values if x is not None] for values in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5), key
    ours, theirs = lora(one), lora(other)
    for key, value in ours.items():
        assert (value - theirs[key]).norm() <= 1e-3 * value.norm(), key
    assert all(value.any() for key, value in ours.items() if "lora_B" in key and "blocks.0" in key)  # it has learned


def test_a_divided_base_computes_what_a_whole_one_does(two, tmp_path, monkeypatch):
    flags = [*SMALL, "--reward", f"{two}/red.py:red", *EVEN, "--out", f"{tmp_path}/whole"]
    run_here("nft", flags, monkeypatch)
    assert_alike(tmp_path / "whole", two / "sharded")


def test_one_fails_all_end_and_the_same_command_resumes(two, launch):
    """The one that has failed says why, once, all end within a minute, and the checkpoint is intact; then bit for bit
    what an uninterrupted run of two processes gives."""
    _, ended, seconds = launch
    assert ended.returncode != 0 and ended.stderr.count("no red today") == ended.stderr.count("error: ") == 1
    assert seconds < 60
    assert {line["epoch"] for line in log(two / "failed") if "loss" in line} == {0, 1}
    flags = [*SMALL, "--reward", f"{two}/red.py:red", "--out", f"{two}/failed"]
    resumed = torchrun(two, [("nft", flags)])
    assert resumed.returncode == 0 and "resumed at epoch 2" in resumed.stdout, resumed.stderr[-4000:]
    assert log(two / "failed") == log(two / "nft")
    ours, whole = lora(two / "failed"), lora(two / "nft")
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_another_number_of_processes_is_told(two, monkeypatch, capsys):
    """A run of two goes on with one; what cannot be shared is refused."""
    flags = [*SMALL, "--reward", f"{two}/red.py:red", "--out", f"{two}/awm", "--epochs", "4"]
    run_here("awm", flags, monkeypatch)
    assert "processes (2 there, 1 here)" in capsys.readouterr().out
    monkeypatch.setattr(flow.run, "PROCESSES", 3)
    with pytest.raises(SystemExit), flow.cli.one_line_errors():
        flow.run.check_numbers(train_awm.Args(groups=4))
    assert "--groups 4" in capsys.readouterr().err
