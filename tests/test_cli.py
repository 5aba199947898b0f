"""Tests of the command line: what is wrong is said in a line that names the flag and what it takes."""
import errno
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module

import make
import pytest
import torch

import train_awm
from flow import cli, run
from tests.helpers import ROOT

SCRIPTS = ["train_nft", "train_awm", "train_dpo", "sample", "eval_judge", "make", "reproduce", "world"]


@pytest.mark.parametrize("argv", [
    ["--lr", "abc"],
    ["--epochs", "1e3"],
    ["--lr"],
    ["--lamda", "1"],
    ["--lam", "always"],
    ["--compile", "yes"],
    ["stray"],
])
def test_a_wrong_flag_is_tyros_error(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["train_awm.py", *argv])
    with pytest.raises(SystemExit) as end:
        cli.parse(train_awm.Args, train_awm.__doc__)
    assert end.value.code == 2 and argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize("parts", [["vea"], ["sd3", "vea"]])
def test_an_unknown_part_is_tyros_error(monkeypatch, capsys, parts):
    monkeypatch.setattr(sys, "argv", ["make.py", "--parts", *parts])
    with pytest.raises(SystemExit) as end:
        cli.parse(make.Args, make.__doc__)
    error = capsys.readouterr().err
    assert end.value.code == 2 and all(word in error for word in ("--parts", "'vea'", "'sd3'"))


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run code in another process, in the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_changes_nothing_in_the_process():
    """A notebook that imports flow and the scripts keeps its hooks, signals, loggers, warnings and plot settings, and
    its errors keep their words."""
    end = run_python("""
import logging, signal, sys, warnings
import diffusers, matplotlib, torch, tqdm, transformers
def state():
    levels = [logging.getLogger(name).level for name in ("diffusers", "transformers", "peft")]
    bars = [library.utils.logging.is_progress_bar_enabled() for library in (diffusers, transformers)]
    return [sys.excepthook, signal.getsignal(signal.SIGINT), levels, bars, dict(matplotlib.rcParams),
            vars(tqdm.tqdm)["__init__"], sys.stdout, torch.get_num_threads(),
            [str(seen) for seen in warnings.filters if "peft" in str(seen)],
            torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), torch.is_grad_enabled()]
before = state()
import eval_judge, sample, train_awm, train_dpo, train_nft
import flow.cost.bench, flow.cost.budget
after = state()
assert before == after, [(a, b) for a, b in zip(before, after) if a != b]
raise RuntimeError("No space left on my shelf")
""")
    assert end.stderr.strip().endswith("RuntimeError: No space left on my shelf"), end.stderr
    assert "Traceback" in end.stderr and "disk" not in end.stderr


def test_bars_are_silent_where_stderr_is_no_terminal(capsys):
    assert list(cli.progress(range(3), desc="work")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_out_of_memory_keeps_its_traceback_and_advises_what_can_be_changed(capsys, monkeypatch):
    """The advice also holds for a resumed run: it names no flag that the checkpoint would refuse."""
    monkeypatch.setattr(sys, "argv", ["train_awm.py"])
    try:
        raise torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB")
    except torch.OutOfMemoryError:
        cli.excepthook(*sys.exc_info())
    first, *_, said, advice = capsys.readouterr().err.splitlines()
    advised = set(re.findall(r"--[a-z-]+", advice))
    assert advised and advised <= set(run.MAY_CHANGE + run.CHANGES_ROUNDING)
    assert first.startswith("Traceback") and said.endswith("tried to allocate 2 GiB")


def test_a_full_disk_is_a_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.excepthook(OSError, OSError(errno.ENOSPC, "No space left on device", "runs/x"), None)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "runs/x: cannot be written" in error


@dataclass
class Args:
    on: bool = False
    perhaps: bool | None = None


@pytest.mark.parametrize("argv, on, perhaps", [
    ([], False, None),
    (["--on", "--no-perhaps"], True, False),
    (["--perhaps", "--no-on"], False, True)])
def test_switches_take_no_value(monkeypatch, argv, on, perhaps):
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    assert cli.parse(Args, "") == Args(on, perhaps)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_each_flag(monkeypatch, capsys, script):
    module = import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.parse(module.Args, module.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and module.__doc__.strip().splitlines()[0][:40] in text
    for field in fields(module.Args):
        assert ("[STR [STR ...]]" if field.name == "dirs" else f"--{field.name.replace('_', '-')}") in text


def test_ctrl_c_is_one_line_that_says_how_to_go_on():
    code = ("import sys, os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell\n"
            "sys.argv = ['train_dpo.py']\nimport train_dpo\nfrom flow import cli\n"
            "cli.parse(train_dpo.Args, '')\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**8): pass")
    end = run_python(code)
    assert end.stderr == "interrupted; the same command resumes from the last checkpoint\n"
    assert end.returncode == -signal.SIGINT  # which a shell shows as 130


def test_json_has_no_nan():
    assert json.loads(cli.to_json({"a": [math.nan, 1.0], "b": math.inf})) == {"a": [None, 1.0], "b": None}


def test_a_fingerprint_sees_names_sizes_and_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    before = cli.fingerprint(str(tmp_path))
    assert before == cli.fingerprint(str(tmp_path)) and cli.fingerprint("a/hub-id") is cli.fingerprint("") is None
    (tmp_path / "a").write_bytes(bytes([1]) * 3_000_000)
    assert cli.fingerprint(str(tmp_path)) != before
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").write_bytes(bytes(3_000_000))
    assert cli.fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize("size, sides", [
    (None, None),
    (512, (512, 512)),
    ("512", (512, 512)),
    ("768x512", (768, 512)),
    ("512X768", (512, 768)),
])
def test_a_size_is_a_side_or_width_x_height(size, sides):
    assert cli.width_and_height(size) == sides


@pytest.mark.parametrize("size", [0, -64, 9000, "64x0", "64x9000", "64x", "x64", "64x64x3", "64*32", "6.4", "large"])
def test_other_sizes_are_refused(size):
    with pytest.raises(cli.InputError, match="--size .* at most 8192") as said:
        cli.width_and_height(size)
    assert f"--size {size}:" in str(said.value)
