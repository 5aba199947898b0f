"""Tests of the command line: what is wrong is said in a line that names the flag and what it takes."""
import re
import sys

import pytest
import torch

import train_awm
from flow import checkpoint, cli


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
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cli.parse(train_awm.Args, "")
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None)
    line = capsys.readouterr().err
    advised = set(re.findall(r"--([a-z-]+)", line))
    assert advised and {flag.replace("-", "_") for flag in advised} <= set(checkpoint.FREE + checkpoint.NEARLY_FREE)
    assert "Tried to allocate 2 GiB" in line and line.count("\n") == 1
