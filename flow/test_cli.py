"""Tests of the command line: what is wrong is said in a line that names the flag and what it takes."""
import sys

import pytest

import train_awm
from flow import cli


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
