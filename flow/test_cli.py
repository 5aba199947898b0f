"""Tests of the command line: what is wrong is said in a line that names the flag and what it takes."""
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_awm
from flow import checkpoint, cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))
SCRIPTS = ["train_nft", "train_awm", "train_dpo", "sample", "eval_judge", "make", "reproduce", "world"]


@pytest.mark.parametrize("argv, words", [
    (["--lr", "abc"], ["--lr", "abc", "FLOAT"]),
    (["--epochs", "1e3"], ["--epochs", "1e3", "INT"]),
    (["--size", "x"], ["--size", "INT", "x"]),
    (["--lr"], ["--lr", "value"]),
    (["--lamda", "1"], ["--lamda", "--help"])])
def test_a_wrong_flag_is_one_short_plain_line(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(sys, "argv", ["train_awm.py", *argv])
    with pytest.raises(SystemExit) as end:
        cli.parse(train_awm.Args, train_awm.__doc__)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and len(error) <= 160
    assert "\x1b" not in error and not set(error) & set("╭╮╰╯│") and all(word in error for word in words)


def test_out_of_memory_advises_what_can_be_changed(capsys, monkeypatch):
    """On a resumed run, too: no flag that the checkpoint would refuse."""
    monkeypatch.setattr(sys, "argv", ["train_awm.py"])
    with pytest.raises(SystemExit):
        cli.last_words(torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB"), None)
    line = capsys.readouterr().err
    advised = set(re.findall(r"--([a-z-]+)", line))
    assert advised and {flag.replace("-", "_") for flag in advised} <= set(checkpoint.FREE + checkpoint.NEARLY_FREE)
    assert "tried to allocate 2 GiB" in line and line.count("\n") == 1


@dataclass
class Args:
    on: bool = False
    perhaps: bool | None = None


@pytest.mark.parametrize("argv, on, perhaps", [
    ([], False, None),
    (["--on", "--no-perhaps"], True, False),
    (["--on", "True", "--perhaps", "False"], True, False),
    (["--perhaps", "True", "--no-on"], False, True)])
def test_switches_are_given_in_two_ways(monkeypatch, argv, on, perhaps):
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    assert cli.parse(Args, "") == Args(on, perhaps)


def help_of(script: str, monkeypatch, capsys) -> str:
    """What --help prints in a terminal of 80 columns."""
    module = import_module(script)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.parse(module.Args, module.__doc__)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_each_flag_once_in_80_columns(monkeypatch, capsys, script):
    text = help_of(script, monkeypatch, capsys)
    doc, flags = re.split(r"\n\n(?=  --| +DIRS)", text, maxsplit=1)
    # commands and formulas are not broken: they are to be copied
    assert all(len(line) <= 80 or line.startswith("    ") for line in doc.splitlines())
    assert all(len(line) <= 80 for line in flags.splitlines())
    entries = re.split(r"^  (?=\S)", flags, flags=re.MULTILINE)[1:]
    args = fields(import_module(script).Args)
    for entry, field in zip(entries, args, strict=True):
        name = field.name.upper() if field.name == "dirs" else "--" + field.name.replace("_", "-")
        assert entry.startswith(name) and entry.count("(default") <= 1 and "None" not in entry, entry
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert "(default" in entry, entry


def test_help_does_not_wait_for_torch():
    end = subprocess.run([sys.executable, "-X", "importtime", "train_awm.py", "--help"], cwd=ROOT, capture_output=True,
                         text=True)
    assert end.returncode == 0 and "--lam FLOAT" in end.stdout
    assert "flow.cli" in end.stderr and not re.search(r"\b(torch|diffusers|numpy|tyro)$", end.stderr, re.MULTILINE)


@pytest.mark.parametrize("script, line", [
    ("train_dpo.py", "interrupted; the same command resumes from the last checkpoint\n"),
    ("tiny/make.py", "interrupted\n")])
def test_ctrl_c_during_the_imports_is_one_line(script, line):
    process = subprocess.Popen([sys.executable, script, "--seed", "-1"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # torch is on its way
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == line and process.returncode == -signal.SIGINT  # which a shell shows as 130
