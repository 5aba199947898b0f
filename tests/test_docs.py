"""README and docs/ do what they say: files and flags exist, commands on the miniature run, Python blocks run."""
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from flow import cli
from flow.rewards import load_reward
from normguard import norm_ratio

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {file.relative_to(ROOT).as_posix(): file.read_text() for file in DOCS}
COMMAND = r"^ {4}(?:pip install \S+ \S+ && )?(?:python|python -m|torchrun .*?) ((?:\S+\.py|flow\.\S+).*)$"
COMMANDS = {file: re.findall(COMMAND, text.replace("\\\n", " "), re.MULTILINE) for file, text in TEXT.items()}
BLOCKS = {file: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for file, text in TEXT.items()}
SCRIPTS = ["train_nft.py", "train_awm.py", "train_dpo.py", "sample.py", "eval_judge.py", "tiny/reproduce.py",
           "tiny/world.py", "tiny/make.py", "flow.cost.budget", "flow.cost.bench"]
# not run: what has a place to fill in, several processes, reproduce.py (hours; its --smoke is tested), flow.cost (slow)
NOT_RUN = re.compile(r"\b(FILE|DIR|NAME|MODEL|HOST)\b|\.\.\.|reproduce\.py|flow\.cost")
# flags that shorten a minute to seconds, given after the document's own
SHORTER = {
    "train_awm.py": "--epochs 1 --eval-every 0 --group 2 --groups 2 --steps 4",
    "sample.py": "--n 1 --steps 4",
    "tiny/world.py": "--n 16",
    "eval_judge.py": "",
}
# flags of no script's Args
FOREIGN = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir"}

# files of the user's and of other people's trainers
OTHERS = {"file.py", "my_reward.py", "train_dreambooth_lora_sd3.py", "train_sd3_dpo.py", "nft.py"}


def flags_of(script: str) -> set[str]:
    """The flags that a script takes."""
    name = script.removesuffix(".py").replace("/", ".")
    args = importlib.import_module(name.removeprefix("tiny.")).Args
    return {f"--{part.name.replace('_', '-')}" for part in fields(args)}


def block(file: str, start: str) -> str:
    """The one Python block of a document that starts like this."""
    (found,) = [text for text in BLOCKS[file] if text.startswith(start)]
    return found


@pytest.mark.parametrize("file", TEXT)
def test_every_flag_is_one(file):
    """In the text: of some script; in a command: of its own."""
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT[file]))
    assert named - set().union(*map(flags_of, SCRIPTS)) <= FOREIGN
    for command in COMMANDS[file]:
        script, *words = shlex.split(command)
        assert {word for word in words if word.startswith("--")} <= flags_of(script), command


def test_the_commands_run_one_after_the_other_and_so_does_plain_diffusers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "tiny", "tiny")
    Path("my_reward.py").write_text(block("docs/rewards.md", "# my_reward.py"))
    assert load_reward("my_reward.py:redness", torch.device("cpu"))(torch.rand(2, 3, 8, 8), ["", ""]).shape == (2,)
    run = [command for file in ("README.md", "docs/rewards.md") for command in COMMANDS[file]
           if not NOT_RUN.search(command)]
    assert [shlex.split(command)[0] for command in run] == [
        "train_awm.py", "train_awm.py", "sample.py", "sample.py", "tiny/world.py", "eval_judge.py"]
    for command in run:
        script, *words = shlex.split(command)
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, *words, *SHORTER[script].split()])
        module.main(cli.parse(module.Args, module.__doc__))
    assert "| judge/overall" in capsys.readouterr().out and Path("runs/eval-base-guarded/report.png").is_file()
    plain = block("README.md", "import torch\nfrom diffusers")
    assert "dtype=torch.float32" in plain
    exec(plain, {})
    assert Image.open("star.png").size == (64, 64)


def test_no_other_document_has_a_command_that_runs():
    """So that no command is forgotten above."""
    assert sum(map(len, COMMANDS.values())) >= 15
    for file in COMMANDS.keys() - {"README.md", "docs/rewards.md"}:
        assert all(NOT_RUN.search(command) for command in COMMANDS[file]), file


@pytest.mark.parametrize("guard", ["hinge", "oppose"])
def test_the_loop_of_the_readme(guard):
    """With a toy model; `oppose` takes the hinge's place as the comment says. Without a guard the ratio is above 2."""
    from peft import LoraConfig, get_peft_model

    loop = block("README.md", "from normguard")
    if guard == "oppose":
        loop = re.sub(r"\n    loss = loss \+ .*", "", loop).replace("# oppose(v, v_ref)", "oppose(v, v_ref)")
        assert "norm_hinge(" not in loop and "\n    oppose(" in loop
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=4, target_modules=["0"]))
    call = model.forward
    model.forward = lambda x, t, cond: call(x)  # a velocity that hears neither time nor prompt
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    names = dict(model=model, optimizer=optimizer, your_loss=lambda v: -0.01 * v.norm(dim=1).mean(),
                 batches=[(torch.randn(16, 8), 0.5, None) for _ in range(200)])
    exec(loop, names)
    assert 0.8 < norm_ratio(names["v"].detach(), names["v_ref"]).mean() < 1.2


def test_the_loop_of_the_trainers(capsys):
    """Its numbers are those of the table below it."""
    code = block("docs/trainers.md", "import torch\nfrom peft")
    threads = torch.get_num_threads()
    exec(code, {"__name__": "trainers"})
    assert torch.get_num_threads() == threads
    rows = [ast.literal_eval(line.partition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    told = re.findall(r"^\| (?:1|0\.01) \| (.*) \|$", TEXT["docs/trainers.md"], re.MULTILINE)
    assert len(rows) == len(told) == 2
    for row, cells in zip(rows, told):
        for value, cell in zip(row.values(), cells.split(" | ")):
            assert value == pytest.approx(float(cell), rel=0.05), (row, cells)


def test_a_script_trains_from_the_files_that_are_listed(tmp_path):
    """docs/trainers.md lists the modules of flow/ that a training script imports: copied with it into an empty folder,
    they are enough for two epochs, an evaluation and a checkpoint."""
    listed = re.search(r"these modules of `flow/`: (.*?)\n- ", TEXT["docs/trainers.md"], re.DOTALL)[1]
    (tmp_path / "flow").mkdir()
    for file in ("normguard.py", "train_awm.py", "train_nft.py", "train_dpo.py", "flow/__init__.py",
                 *(f"flow/{module}.py" for module in re.findall(r"`(\w+)`", listed))):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    flags = "--epochs 2 --eval-every 2 --eval-n 2 --group 2 --groups 2 --batch 4 --rank 2 --steps 4 --timesteps 1"
    run = [sys.executable, "train_awm.py", *flags.split(), "--out", "run"]
    subprocess.run(run, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
    assert (tmp_path / "run/samples/00002.png").is_file() and (tmp_path / "run/checkpoint/state.pt").is_file()
    twins = "import train_nft, train_dpo, sys; print(*sorted(name for name in sys.modules if name.startswith('flow.')))"
    modules = subprocess.check_output([sys.executable, "-c", twins], cwd=tmp_path, text=True).split()
    assert modules == sorted(f"flow.{module}" for module in re.findall(r"`(\w+)`", listed))  # no more and no less


@pytest.mark.parametrize("script", ["train_nft", "train_awm", "train_dpo"])
def test_every_key_of_the_log_is_explained(tmp_path, monkeypatch, script):
    """docs/rewards.md has a row for each key of metrics.jsonl, of a summed reward too."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script)
    module.main(module.Args(out=str(tmp_path), reward="tiny/pickscore:0.5,tiny/hps:0.5", epochs=1, group=2, groups=2,
                            steps=4, rank=2, eval_n=2))
    keys = set().union(*map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    keys = {re.sub("/(pickscore|hps)", "/NAME", key) for key in keys}
    rows = re.findall(r"^\| (`[^|]*) \|", TEXT["docs/rewards.md"].partition("## The log")[2], re.MULTILINE)
    explained = {key for row in rows for key in re.findall(r"`([^`]*)`", row)}
    assert len(keys) > 20 and keys <= explained and "peak_gb" in explained


@pytest.mark.parametrize("file", [*TEXT, "tiny/README.md"])
def test_every_file_that_is_named_is_there(file):
    text = (ROOT / file).read_text()
    named = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert all((ROOT / file).parent.joinpath(name).exists() for name in named)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        other = (ROOT / file).parent.joinpath(target) if target else ROOT / file
        heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], anchor
    code = re.findall(r"`((?:flow|tests|tiny|docs)/[\w./]+|\w+\.py)(?:`|:)", TEXT.get(file, ""))
    assert [name for name in code if name not in OTHERS and not (ROOT / name).exists()] == []


def test_the_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 160
    for file, text in TEXT.items():
        assert max(map(len, text.splitlines())) <= 120, file
