"""README and docs/ do what they say: files and flags exist, commands on the miniature run, Python blocks run."""
import ast
import base64
import importlib.util
import io
import itertools
import json
import math
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
from tests.helpers import generator, metrics, serve

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
FOREIGN = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir", "--host",
           "--port", "--generation-config"}

# files of the user's and of other people's trainers
OTHERS = {"file.py", "my_reward.py", "ask_server.py", "train_dreambooth_lora_sd3.py", "train_sd3_dpo.py",
          "train_sd3.py", "nft.py", "train_grpo.py"}


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
        "train_awm.py", "train_awm.py", "train_awm.py", "sample.py", "sample.py", "tiny/world.py", "eval_judge.py"]
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


def test_the_function_that_asks_a_server(tmp_path, monkeypatch):
    """It sends each picture, unchanged, with its prompt, and returns the server's scores in their order."""
    code = block("docs/rewards.md", "# ask_server.py")
    (tmp_path / "ask_server.py").write_text(code)
    assert len(code.splitlines()) <= 20 and "--reward ask_server.py:score@pil" in code

    def reply(path, headers, request):
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in request["images"]]
        scores = [picture.getpixel((0, 0))[0] + len(prompt) for picture, prompt in zip(pictures, request["prompts"])]
        return (200, json.dumps({"scores": scores}).encode()) if path == "/v1/score" else (404, b"")
    images = torch.arange(3).view(3, 1, 1, 1).expand(3, 3, 8, 8) / 255
    with serve(reply) as url:
        monkeypatch.setenv("REWARD_URL", f"{url}/score")
        scores = load_reward(f"{tmp_path}/ask_server.py:score@pil", torch.device("cpu"))(images, ["", "a", "word"])
    assert scores.tolist() == [0, 2, 6]


@pytest.mark.parametrize("guard", ["hinge", "oppose", "guided"])
def test_the_loop_of_the_readme(guard):
    """With a toy model; other guards take the hinge's place as the comments say. Without one the ratio is above 2."""
    from peft import LoraConfig, get_peft_model

    loop = block("README.md", "from normguard")
    if guard != "hinge":
        loop = re.sub(r"\n    loss = loss \+ .*", "", loop)
        for line in {"oppose": ["oppose("], "guided": ["with reference", "u = ", "loss = loss"]}[guard]:
            assert loop.count(f"\n    # {line}") == 1
            loop = loop.replace(f"\n    # {line}", f"\n    {line}")
    active = [line for line in loop.splitlines() if not line.lstrip().startswith("#")]
    assert sum("norm_hinge(" in line for line in active) == (guard != "oppose")
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=4, target_modules=["0"]))
    call = model.forward
    model.forward = lambda x, t, cond: call(x)  # a velocity that hears neither time nor prompt
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    names = dict(model=model, optimizer=optimizer, w=3.0, empty=None, your_loss=lambda v: -0.01 * v.norm(dim=1).mean(),
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


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """train_awm.py with the changes of docs/trainers.md's "Write your own method", as a module."""
    section = TEXT["docs/trainers.md"].partition("## Write your own method\n")[2].partition("\n## ")[0]
    imports, functions, rollout, rows, loss = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    script = (ROOT / "train_awm.py").read_text()
    for start, end, new in (  # in the document's words: new takes the place of what is from start up to end
            ("from flow.pipeline", "from normguard", imports),
            ("def likelihood_ratio", "@one_line_errors()", functions + "\n\n"),
            ("        x0, _ = integrate", "\n        # ---- reward and advantage", rollout),
            ("        t = sigmas[", "\n        for u, update", rows),
            ("                batch = draws.training_batch", "                guard = kl =", loss)):
        before, _, after = script.partition(start)
        assert before and after and start not in after
        script = before + new + end + after.partition(end)[2]
    names = re.findall(r"`([^`]+)` becomes\s`([^`]+)`", section)
    for old, new in names:
        assert script.count(old) == (3 if old == '"awm"' else 1)
        script = script.replace(old, new)
    file = tmp_path_factory.mktemp("grpo") / "train_grpo.py"
    file.write_text(script)
    spec = importlib.util.spec_from_file_location("train_grpo", file)
    module = sys.modules["train_grpo"] = importlib.util.module_from_spec(spec)  # dataclass looks there
    spec.loader.exec_module(module)
    return module


def sde_log_prob(v, x, x_next, t, t_next, sigma):
    """log p(x_next | x) of the SDE of arXiv 2505.05470, equation 9, per value; time runs from t down to t_next:
    dx = [v + sigma^2 / 2t (x + (1 - t) v)] dt + sigma dw."""
    drift = v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)
    return torch.distributions.Normal(x + drift * (t_next - t), sigma * math.sqrt(t - t_next)).log_prob(x_next).mean()


def test_the_log_prob_of_the_method_of_ones_own(grpo):
    """In float64, at each step of a schedule; at t = 1, where sigma would be infinite, sigma is that of the next t."""
    sigmas = torch.tensor([1, 0.9, 0.75, 0.5, 0.2, 0], dtype=torch.float64)
    v, x, x_next = torch.randn(3, 5, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = grpo.sde_step(v, x, torch.arange(5), sigmas, 0.7)
    got = grpo.log_prob(x_next, mean, std)
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        sigma = 0.7 * math.sqrt(t / (1 - min(t, 0.9)))
        told = sde_log_prob(v[i], x[i], x_next[i], t, t_next, sigma)
        assert got[i].item() == pytest.approx(told.item(), rel=1e-12)


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_method_of_ones_own_trains(grpo, tmp_path, monkeypatch, guidance):
    """Two epochs of two updates: on policy, in the first update of an epoch, the ratio is 1, in the second it is not.
    The loss is the clipped one of these ratios. The noise of a rollout is what its generators draw. A resumed run gives
    the same log in other batches."""
    monkeypatch.chdir(ROOT)
    seen = {name: [] for name in ("likelihood_ratio", "rollout", "score", "group_advantages")}

    def watched(obj, name):
        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            seen[name].append((args, result))
            return result
        real = getattr(obj, name)
        monkeypatch.setattr(obj, name, call)
    watched(grpo, "likelihood_ratio")
    watched(grpo, "rollout")
    watched(grpo, "score")
    watched(grpo.draws, "group_advantages")
    flags = dict(group=4, groups=2, steps=5, timesteps=4, updates=2, rank=4, eval_every=0, save_every=1, lr=2e-3,
                 kl=0.0, lam=0.002, guidance=guidance)
    grpo.main(grpo.Args(out=str(tmp_path / "whole"), epochs=2, batch=16, **flags))
    log = metrics(tmp_path / "whole")
    ratios = [ratio.detach() for (v, *_), ratio in seen["likelihood_ratio"] if v.requires_grad]
    assert len(log) == len(ratios) == 4 and log[0]["guard"] == 0 and max(line["guard"] for line in log) > 0
    for update, (line, ratio) in enumerate(zip(log, ratios)):
        on_policy = update in (0, 2)
        assert ((ratio - 1).abs().max() < 1e-5) == on_policy and (line["clip_share"] == 0) == on_policy
        picture = torch.randperm(8, generator=generator(0, 1, line["epoch"])).repeat_interleave(4).split(16)[update % 2]
        adv = seen["group_advantages"][line["epoch"]][1][picture]
        told = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
        assert line["base_loss"] == pytest.approx(told.item(), abs=1e-6)
    for epoch, ((pipe, noise, texts, sigmas, *_), (xs, log_probs)) in enumerate(seen["rollout"]):
        assert (xs[:, 0] == noise).all() and xs.shape[:2] == (8, 6) and log_probs.shape == (8, 5)
        assert (seen["score"][epoch][0][2] == xs[:, -1]).all()
        for picture in range(8):
            g = generator(0, 4, epoch, picture)
            for i, (t, t_next) in enumerate(itertools.pairwise(sigmas.tolist())):
                std = 0.7 * math.sqrt(t / (1 - min(t, sigmas[1].item())) * (t - t_next))
                told = torch.distributions.Normal(0, std).log_prob(std * torch.randn(xs.shape[2:], generator=g)).mean()
                assert log_probs[picture, i].item() == pytest.approx(told.item(), abs=1e-4)
    for epochs in (1, 2):
        grpo.main(grpo.Args(out=str(tmp_path / "resumed"), epochs=epochs, batch=6, **flags))
    for line, again in zip(log, metrics(tmp_path / "resumed"), strict=True):
        for key in ("loss", "norm_ratio", "reward"):
            assert again[key] == pytest.approx(line[key], rel=1e-3, abs=1e-5)


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
    code = "import sys, train_nft, train_dpo, train_awm as awm; print(*sys.modules); awm.main(awm.parse(awm.Args, ''))"
    run = [sys.executable, "-c", code, *flags.split(), "--out", "run"]
    out = subprocess.check_output(run, cwd=tmp_path, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert (tmp_path / "run/samples/00002.png").is_file() and (tmp_path / "run/checkpoint/state.pt").is_file()
    modules = sorted(name for name in out.splitlines()[0].split() if name.startswith("flow."))
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
