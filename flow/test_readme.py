"""The README does what it says: its commands on the miniature run, its flags exist, its lines of diffusers work."""
import importlib
import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from flow import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))
TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^ {4}(?:pip install \S+ \S+ && )?python (\S+\.py.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
# flags that shorten a minute to seconds, given after the README's; not run: reproduce.py, hours (its --smoke is tested)
SHORTER = {
    "train_awm.py": "--epochs 1 --eval-every 0 --group 2 --groups 2 --steps 4",
    "sample.py": "--n 1 --steps 4",
    "tiny/world.py": "--n 16",
    "eval_judge.py": "",
}
FOREIGN = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # of no script's Args


def flags_of(script: str) -> set[str]:
    """The flags that a script takes."""
    name = script.removesuffix(".py").replace("/", ".")
    args = importlib.import_module(name.removeprefix("tiny.")).Args
    return {f"--{part.name.replace('_', '-')}" for part in fields(args)}


def test_every_flag_is_one():
    scripts = ["train_nft.py", "train_awm.py", "train_dpo.py", "sample.py", "eval_judge.py", "tiny/reproduce.py",
               "tiny/world.py", "tiny/make.py", "flow/budget.py", "flow/bench.py"]
    known = set().union(*map(flags_of, scripts))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert len(named) > 20 and named - known <= FOREIGN
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        script, *words = shlex.split(command)
        assert {word for word in words if word.startswith("--")} <= flags_of(script), command


def test_the_commands_run_one_after_the_other_and_so_does_plain_diffusers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "tiny", "tiny")
    run = [command for command in COMMANDS if "FILE" not in command and "reproduce.py" not in command]
    assert [shlex.split(command)[0] for command in run] == [
        "train_awm.py", "sample.py", "sample.py", "tiny/world.py", "eval_judge.py"]
    for command in run:
        script, *words = shlex.split(command)
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, *words, *SHORTER[script].split()])
        module.main(cli.parse(module.Args, module.__doc__))
    assert "| judge/overall" in capsys.readouterr().out and Path("runs/eval/report.png").is_file()
    (block,) = re.findall(r"```python\n(import torch\nfrom diffusers.*?)```", TEXT, re.DOTALL)
    assert "dtype=torch.float32" in block
    exec(block, {})
    assert Image.open("star.png").size == (64, 64)


@pytest.mark.parametrize("file", ["README.md", "tiny/README.md"])
def test_every_file_that_is_named_is_there(file):
    named = re.findall(r"\]\(([^):#]+)\)", (ROOT / file).read_text())
    assert named and all((ROOT / file).parent.joinpath(name).exists() for name in named)
