"""Tests of several processes: one plays them in turn; then torchrun on a CPU, over gloo."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import flow.distributed
import flow.run
import sample
import train_awm
import train_dpo
import train_nft
from flow.cli import parse
from tests.helpers import ROOT, generator, lora_weights, pixels, refuses, sample_rows, timeless

# ---------------------------------------------------------------- played by one process

def play(monkeypatch, rank: int, processes: int, run_collective=None):
    """Pretend to be one of several processes, with a function in the place of the network."""
    monkeypatch.setattr(flow.distributed, "RANK", rank)
    monkeypatch.setattr(flow.distributed, "PROCESSES", processes)
    monkeypatch.setattr(flow.distributed, "run_collective", run_collective)


@pytest.mark.parametrize("n, processes", [
    (12, 3),
    (7, 3),
    (5, 1),
])
def test_local_slices_hold_everything_once_and_in_order(monkeypatch, n, processes):
    shares = []
    for rank in range(processes):
        play(monkeypatch, rank, processes)
        shares.append(range(n)[flow.distributed.local_slice(n)])
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


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
    """They are not averaged. If one process has none, the sum is the other's; if none has one, there is none."""
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


# ---------------------------------------------------------------- two real processes

FLAGS = ("--epochs 3 --groups 2 --group 4 --updates 2 --batch 4 --steps 3 --eval-n 3 --eval-every 2 --save-every 3 "
         "--ema 0.5 --lr 5").split()
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
def dark(images, prompts):
    return -images.mean((1, 2, 3)).square() / 1000
def times_n(images, prompts, metadata):
    return images.mean((1, 2, 3)) * images.new_tensor([float(fields.get("n", 1)) for fields in metadata])
"""


SAMPLE = """
import sample
sys.argv = ["sample.py", *{flags}]
sample.main(parse(sample.Args, ""))
"""


FAILING = """
import os
os.environ["FAIL_AT"] = "6"
sys.argv = ["nft", *{flags}]
train_nft.main(parse(train_nft.Args, ""))
"""


def rewards_of(folder: Path, name: str) -> list[str]:
    """A script's flags of rewards: for AWM a normalized sum. CLIP's see 8 bits, of which rounding can flip one."""
    red, dark = f"{folder}/red.py:red", f"{folder}/red.py:dark:2"
    return ["--reward", f"{red},{dark}", "--normalize-rewards"] if name == "awm" else ["--reward", red]


def sample_of(folder: Path, out: str) -> list[str]:
    """Flags of sample.py: three prompts, and a reward that takes their metadata."""
    reward = f"tiny/pickscore,{folder}/red.py:times_n"
    return ["--prompts", f"{folder}/prompts.csv", "--steps", "3", "--reward", reward, "--adjoint",
            "--out", f"{folder}/{out}"]


def torchrun(folder: Path, runs: list, then: str = "") -> subprocess.CompletedProcess:
    """Do the runs (script, flags) one after another in two processes, then run some code."""
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), runs=runs) + then)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"{folder}/driver.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, float]:
    """Run each script in two processes, NFT once more with --shard, sample.py, and NFT once more with a reward that
    fails in the second process in the third epoch. Returns (folder of the runs, the ended process, seconds from the
    last log line to the end)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "red.py").write_text(REWARD)
    flags = [*FLAGS, *rewards_of(folder, "nft")]
    runs = [(name, [*FLAGS, *rewards_of(folder, name), "--out", f"{folder}/{name}"]) for name in SCRIPTS]
    runs += [("nft", [*flags, *EVEN, "--out", f"{folder}/sharded", "--shard"])]
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "a red star", "n": {i}}}\n' for i in range(4)))
    (folder / "n.py").write_text("def n(images, prompts, metadata):\n    return [row['n'] for row in metadata]\n")
    rows = ["--prompts", f"{folder}/rows.jsonl", "--eval-prompts", f"{folder}/rows.jsonl"]
    runs += [("awm", [*FLAGS, *rows, "--reward", f"{folder}/n.py:n", "--out", f"{folder}/rows"])]
    (folder / "prompts.csv").write_text("prompt,n\na red star,1\na very large blue ring,10\na green moon,100\n")
    failed = [*flags, "--save-every", "1", "--out", f"{folder}/failed"]
    sample_flags = sample_of(folder, "sampled")
    ended = torchrun(folder, runs, SAMPLE.format(flags=sample_flags) + SHARDED + FAILING.format(flags=failed))
    return folder, ended, time.time() - (folder / "failed/metrics.jsonl").stat().st_mtime


@pytest.fixture()
def two(launch) -> Path:
    """The folder of these runs."""
    folder, ended, _ = launch
    assert ended.stdout.count("done: ") == 5, ended.stderr[-4000:]  # by the first process alone
    return folder


def test_each_process_scores_the_rows_of_its_own_pictures(two):
    """All rows have one text; two of four are drawn in an epoch, three are held out."""
    lines = timeless(two / "rows")
    order = [i for k in range(2) for i in torch.randperm(4, generator=generator(0, 0, k)).tolist()]
    assert [x["reward"] for x in lines if "loss" in x][::2] == [sum(order[i:i + 2]) / 2 for i in (0, 2, 4)]
    assert [x["eval_reward"] for x in lines if "eval_reward" in x] == [1.0] * 3


def run_here(name: str, flags: list[str], monkeypatch):
    """Run a script in this process alone, with SGD as well."""
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, lr, **others: torch.optim.SGD(params, lr))
    SCRIPTS[name].main(parse(SCRIPTS[name].Args, ""))


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_compute_what_one_does(two, name, tmp_path, monkeypatch):
    """The log and the LoRA are equal but for rounding, though the two have different numbers of held-out prompts. The
    parts of a sum are normalized by the deviations of all pictures."""
    run_here(name, [*FLAGS, *rewards_of(two, name), "--out", f"{tmp_path}/one"], monkeypatch)
    assert len(timeless(two / name)) == 3 * 2 + 3  # two steps an epoch, and evaluations at 0, 2 and 3
    assert_nearly_equal(tmp_path / "one", two / name)
    if name == "awm":
        one, both = (torch.load(run / "checkpoint/state.pt", weights_only=True)["variances"][0]
                     for run in (tmp_path / "one", two / name))
        torch.testing.assert_close(one, both, rtol=1e-3, atol=0)


def assert_nearly_equal(one: Path, other: Path):
    """Logs and LoRAs are equal but for the rounding of fp32, which six SGD steps enlarge a few thousand times at most.
    Fractions of rows are left out: rounding can move a row across their limit."""
    ours, theirs = timeless(one), timeless(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - {"active", "clip_share", "accuracy"}:
            ours, theirs = (x if isinstance(x, list) else [x] for x in (a[key], b[key]))
            assert [x is None for x in ours] == [x is None for x in theirs], key
            numbers = [[x for x in values if x is not None] for values in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5), key
    ours, theirs = lora_weights(one), lora_weights(other)
    for key, value in ours.items():
        assert (value - theirs[key]).norm() <= 1e-3 * value.norm(), key
    assert all(value.any() for key, value in ours.items() if "lora_B" in key and "blocks.0" in key)  # it has learned


def test_a_sharded_base_computes_what_a_whole_one_does(two, tmp_path, monkeypatch):
    flags = [*FLAGS, *rewards_of(two, "nft"), *EVEN, "--out", f"{tmp_path}/whole"]
    run_here("nft", flags, monkeypatch)
    assert_nearly_equal(tmp_path / "whole", two / "sharded")


def test_two_processes_write_what_one_writes(two, launch, monkeypatch):
    """sample.py: the pictures are divided; the first process writes all of them, of the third prompt's too. Each
    process's reward gets the metadata of its own rows."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *sample_of(two, "one")])
    sample.main(parse(sample.Args, ""))
    assert launch[1].stdout.count(f"3 pictures in {two}/sampled") == 1
    one, both = two / "one", two / "sampled"
    assert {path.name for path in one.iterdir()} == {path.name for path in both.iterdir()}
    for a, b in zip(sample_rows(one), sample_rows(both), strict=True):
        assert a.pop("reward") == pytest.approx(b.pop("reward"), abs=0.1) and a == b
        assert np.abs(pixels(one / a["file"]) - pixels(both / a["file"])).max() <= 1
    control, other = (json.loads((out / "adjoint.json").read_text())["energy (control)"] for out in (one, both))
    assert control["mean"] == pytest.approx(other["mean"], rel=1e-3)


def test_when_one_process_fails_all_end_and_the_same_command_resumes(two, launch):
    """The process that failed says why, once; all end within a minute; the checkpoint is intact. The resumed run is bit
    for bit an uninterrupted run of two processes."""
    _, ended, seconds = launch
    assert ended.returncode != 0 and ended.stderr.count("no red today") == ended.stderr.count("error: ") == 1
    assert seconds < 60
    assert {line["epoch"] for line in timeless(two / "failed") if "loss" in line} == {0, 1}
    flags = [*FLAGS, *rewards_of(two, "nft"), "--out", f"{two}/failed"]
    resumed = torchrun(two, [("nft", flags)])
    assert resumed.returncode == 0 and "resumed at epoch 2" in resumed.stdout, resumed.stderr[-4000:]
    assert timeless(two / "failed") == timeless(two / "nft")
    ours, whole = lora_weights(two / "failed"), lora_weights(two / "nft")
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_another_number_of_processes_is_reported(two, monkeypatch, capsys):
    """A run of two processes goes on with one; a number that does not fit --groups is refused."""
    flags = [*FLAGS, *rewards_of(two, "awm"), "--out", f"{two}/awm", "--epochs", "4"]
    run_here("awm", flags, monkeypatch)
    assert "processes (2 there, 1 here)" in capsys.readouterr().out
    monkeypatch.setattr(flow.run, "PROCESSES", 3)
    refuses(capsys, lambda: flow.run.check_args(train_awm.Args(groups=4)), "--groups 4")
