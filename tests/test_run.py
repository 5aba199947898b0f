"""Tests of a run's folder: resuming, what is refused, what is said, wandb, a full disk."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import world

import eval_judge
import flow.cli
import flow.run
import train_awm
import train_dpo
import train_nft
from flow import cli, pictures, run
from tests.helpers import CPU, SMALL, contents, lora_bytes, lora_weights, metrics, refuses, small_run, timeless

SHORT = dict(epochs=2, group=2, updates=1, steps=3, eval_n=2, save_every=2)


def train(out, script=train_awm, **changes) -> Path:
    """A run that is shorter than small_run's."""
    return small_run(out, script, **SHORT | changes)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Path:
    """A finished run, which no test may change."""
    return train(tmp_path_factory.mktemp("runs") / "run", save_every=1)


@pytest.fixture(scope="session")
def longer(tmp_path_factory) -> Path:
    """An uninterrupted run of one more epoch."""
    return train(tmp_path_factory.mktemp("runs") / "longer", epochs=3)


@pytest.fixture()
def trained(once, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(once, tmp_path / "run")


# ---------------------------------------------------------------- resuming

def test_killed_runs_resume_bit_for_bit(run, tmp_path, capsys):
    flags = {**SMALL, "save_every": 1, "out": tmp_path / "run"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    command = [sys.executable, "train_awm.py", *flags]
    code = (f"import torch, runpy, sys; torch.set_num_threads({torch.get_num_threads()}); sys.argv = {command[1:]!r}; "
            "runpy.run_path('train_awm.py', run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 7):  # within epoch 3
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert lora_bytes(tmp_path / "run") != lora_bytes(run)
    small_run(tmp_path / "run")
    assert "resumed at epoch" in capsys.readouterr().out
    assert lora_bytes(tmp_path / "run") == lora_bytes(run)
    assert timeless(tmp_path / "run") == timeless(run)


@pytest.mark.parametrize("given, recorded", [
    ("64", 64),
    ("64x32", "64x32"),
])
def test_a_run_of_a_size_resumes(tmp_path, monkeypatch, capsys, given, recorded):
    """args.json has a number if the flag is one, as it had before a size could be WIDTHxHEIGHT."""
    out, flags = tmp_path / "run", {**SMALL, "epochs": 1, "eval_every": 1, "size": given, "out": tmp_path / "run"}

    def go_on(epochs: int):
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in {**flags, "epochs": epochs}.items()]
        monkeypatch.setattr(sys, "argv", ["train_awm.py", *argv])
        train_awm.main(flow.cli.parse(train_awm.Args, ""))
    go_on(1)
    assert json.loads((out / "args.json").read_text())["size"] == recorded
    go_on(2)
    assert "resumed at epoch 1" in capsys.readouterr().out
    state = torch.load(out / "checkpoint/state.pt")
    assert state["epoch"] == 2 and metrics(out)[-1]["eval_reward"] is not None


def test_a_save_cut_short_anywhere_resumes_bit_for_bit(tmp_path, monkeypatch):
    """save_checkpoint is interrupted at each of its steps in turn; the next start goes on."""
    flags = dict(epochs=2, group=2, updates=1, steps=2, eval_every=0, save_every=1)
    whole = lora_bytes(small_run(tmp_path / "whole", **flags))
    for module, name in ((flow.run, "save_lora"), (flow.run, "plot_curves"), (torch, "save")):
        honest, calls = getattr(module, name), []

        def cut(*args, **kwargs):
            calls.append(None)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return honest(*args, **kwargs)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, cut)
            small_run(tmp_path / name, **flags)
        assert lora_bytes(small_run(tmp_path / name, **flags)) == whole


@pytest.mark.parametrize("script", [train_nft, train_dpo])
def test_the_twins_resume_bit_for_bit(script, finished, tmp_path, monkeypatch, capsys):
    """With a checkpoint of before --ema came, too, which lacks that."""
    honest, calls = flow.run.plot_curves, []

    def cut(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flow.run, "plot_curves", cut)
        small_run(tmp_path, script, save_every=1)
    state = torch.load(tmp_path / "checkpoint/state.pt", weights_only=True)
    assert state.pop("ema") is None
    torch.save(state, tmp_path / "checkpoint/state.pt")
    assert lora_bytes(small_run(tmp_path, script)) == lora_bytes(finished(script))
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert timeless(tmp_path) == timeless(finished(script))


def test_a_run_that_another_process_has_begun_meanwhile(tmp_path, monkeypatch, capsys):
    """While the models are loaded: args.json is there, and this process holds no lock."""
    load = flow.run.load_models

    def meanwhile(*given):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "args.json").write_text("{}")
        return load(*given)
    monkeypatch.setattr(flow.run, "load_models", meanwhile)
    refuses(capsys, lambda: small_run(tmp_path / "run"), "--out", "another process has been at work there")
    assert (tmp_path / "run" / "args.json").read_text() == "{}" and not flow.run.LOCKS


def test_a_finished_run_holds_no_folder_and_trains_with_checkpointing(tmp_path, monkeypatch):
    on = []
    monkeypatch.setattr(train_awm, "evaluate", lambda out, args, pipe, *given, **named: on.append(
        pipe.transformer.is_gradient_checkpointing))
    for checkpointing in (None, True):
        train(tmp_path / str(checkpointing), checkpointing=checkpointing, epochs=1, eval_every=1)
    assert on == [False, False, True, True] and not flow.run.LOCKS


def test_finished_run_says_so(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        small_run(run)
    assert end.value.code == 0 and "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_a_finished_run_is_extended_to_what_a_longer_one_gives(trained, longer, capsys):
    """Only state.pt is needed: all other files of checkpoint/ may be lost."""
    state = (trained / "checkpoint/state.pt").read_bytes()
    shutil.rmtree(trained / "checkpoint")
    (trained / "checkpoint").mkdir()
    (trained / "checkpoint/state.pt").write_bytes(state)
    train(trained, epochs=3, save_every=2, eval_every=3)
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert all(torch.equal(value, lora_weights(longer)[name]) for name, value in lora_weights(trained).items())
    assert json.loads((trained / "args.json").read_text())["epochs"] == 3


def test_flags_that_only_round_may_change_and_say_so(trained, capsys):
    train(trained, epochs=3, batch=3, checkpointing=True)
    assert "but for rounding" in capsys.readouterr().out


def test_other_files_stay_in_a_runs_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert (train(tmp_path, epochs=1) / "notes.txt").read_text() == "mine"


def test_a_run_killed_at_its_very_start_starts_again(tmp_path):
    for part in ("checkpoint", "samples"):
        (tmp_path / "run" / part).mkdir(parents=True)
    (tmp_path / "run/checkpoint/lock").touch()
    assert (train(tmp_path / "run", epochs=1) / "checkpoint/state.pt").exists()


def test_a_resume_on_another_machine_says_what_it_may_change(trained, capsys):
    """Another device, dtype, number of threads or processes, or library version: equal to an uninterrupted run but for
    rounding. A second resume says so again, because part of the run was made elsewhere."""
    args = json.loads((trained / "args.json").read_text())
    assert args["threads"] == torch.get_num_threads() and args["dtype"] == "float32" and args["processes"] == 1
    assert args["device"].startswith("cpu") and set(args["versions"]) == {"torch", "diffusers", "transformers", "peft"}
    there = {"device": "NVIDIA H200", "threads": 99, "versions": {**args["versions"], "peft": "0.1"}}
    (trained / "args.json").write_text(json.dumps(args | there))
    for epochs in (3, 4):
        train(trained, epochs=epochs, eval_every=0)
        said = capsys.readouterr().out.splitlines()[0]
        for word in ("NVIDIA H200 there", "threads (99 there", "peft (0.1 there", "but for rounding"):
            assert word in said
        assert "dtype" not in said and "torch (" not in said
    args = json.loads((trained / "args.json").read_text())
    assert args["device"] == "NVIDIA H200" and [machine["device"][:3] for machine in args["resumed_on"]] == ["cpu"]


# ---------------------------------------------------------------- what is refused


def test_two_runs_into_one_folder(trained, capsys):
    """Another process holds the folder, and its death frees it."""
    read, write = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            run.lock(trained)
            os.write(write, b"held")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 4) == b"held"
    refuses(capsys, lambda: train(trained, epochs=3), "--out", "another process is at work", unchanged=trained)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    train(trained, epochs=3)


@pytest.mark.parametrize("flag", ["prompts", "eval_prompts", "reward"])
def test_a_changed_input_is_named(tmp_path, capsys, flag):
    source = {"prompts": Path("tiny/prompts.txt"), "eval_prompts": Path("tiny/eval_prompts.txt")}.get(flag)
    text = source.read_text() if source else "def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    file = tmp_path / ("input.py" if flag == "reward" else "input.txt")
    file.write_text(text)
    given = {flag: f"{file}:f" if flag == "reward" else str(file)}
    out = train(tmp_path / "run", **given)
    file.write_text(text + "\n")
    name = flag.replace("_", "-")
    refuses(capsys, lambda: train(out, epochs=3, **given), f"--{name}", "changed since", unchanged=out)
    if flag == "reward":
        file.write_text(text)
        train(out, epochs=3, **given)


def test_what_a_run_holds_out_of_its_own_prompts_is_recorded(tmp_path, capsys):
    """Resuming agrees with it; other held-out prompts are refused."""
    given = dict(prompts=f"{tmp_path}/p.txt", eval_every=1)
    Path(given["prompts"]).write_text("\n".join(world.CAPTIONS[:22]))
    out = train(tmp_path / "run", **given)
    args = json.loads((out / "args.json").read_text())
    assert args["eval_prompts"] is None and args["held_out"] == world.CAPTIONS[20:22]
    assert all(prompt in (out / "lora/README.md").read_text() for prompt in args["held_out"])
    train(out, epochs=3, **given)
    assert json.loads((out / "args.json").read_text()) == {**args, "epochs": 3}
    refuses(capsys, lambda: train(out, epochs=4, eval_prompts="tiny/eval_prompts.txt", **given), "--eval-prompts",
            unchanged=out)
    default = json.loads((train(tmp_path / "default") / "args.json").read_text())
    assert default["eval_prompts"] == "tiny/eval_prompts.txt" and default["held_out"] is None


def test_a_run_of_an_earlier_version_is_not_resumed(trained, capsys):
    """It computed advantages in another way."""
    args = json.loads((trained / "args.json").read_text())
    del args["format"]
    (trained / "args.json").write_text(json.dumps(args))
    refuses(capsys, lambda: train(trained, epochs=3), "--out", "earlier version", unchanged=trained)


def test_another_revision_of_a_hub_model_is_refused(trained, tmp_path, monkeypatch, capsys):
    """The revision is the snapshot in the hub's cache. Without a cache it is not known."""
    def cache(commit: str):
        """The hub's main is this commit."""
        snapshot = tmp_path / f"models--some--model/snapshots/{commit}"
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").touch()
        (tmp_path / "models--some--model/refs").mkdir(exist_ok=True)
        (tmp_path / "models--some--model/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run.revision("some/model") is None and run.revision("tiny/sd3") is None
    assert run.revision("no/such/folder") is None
    cache("abc123")
    args = json.loads((trained / "args.json").read_text())
    args |= {"model": "some/model", "inputs": {**args["inputs"], "model": "abc123"}}
    (trained / "args.json").write_text(json.dumps(args))
    given = train_awm.Args(**SMALL | SHORT | dict(epochs=3, model="some/model", out=str(trained)))
    run.find_run("awm", given, CPU)
    run.unlock()
    cache("def456")
    refuses(capsys, lambda: run.find_run("awm", given, CPU), "--model some/model", "changed since",
            unchanged=trained)


# ---------------------------------------------------------------- what a run says

@pytest.mark.parametrize("lam, name", [
    (0.05, "lam0.05"),
    (0, "lam0"),
    ("auto", "lamauto")])
def test_the_default_folder_names_lam(tmp_path, monkeypatch, lam, name):
    monkeypatch.chdir(tmp_path)
    out, state = run.find_run("awm", train_awm.Args(lam=lam), CPU)
    assert (str(out), state) == (f"runs/awm-sd3-pickscore-{name}-s0", None)


def test_a_run_ends_by_saying_what_came_of_it(tmp_path, capsys):
    train(tmp_path / "run")
    said = capsys.readouterr().out.splitlines()[-1]
    lines = metrics(tmp_path / "run")
    evals = [line for line in lines if "eval_reward" in line]
    first, last = re.search(r"reward (\S+) -> (\S+),", said).groups()
    assert first != last  # as many digits as are needed to tell them apart
    assert [float(first), float(last)] == pytest.approx([line["eval_reward"] for line in evals], abs=1e-3)
    assert f"norm ratio 1.000 -> {evals[-1]['eval_norm_ratio']:.3f}" in said


def test_the_model_card_has_what_the_hub_wants(trained):
    card = (trained / "lora/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "base_model" not in card  # the model is a folder
    assert "rank 4 and alpha 4" in card and "--rank 4" in card and "NormGuard" in card and "license" not in card


def test_the_model_card_of_a_hub_model_without_the_guard():
    card = run.model_card("nft", train_nft.Args(model="some/model", lam=0.0), [{"prompt": "a red star"}])
    assert card.startswith("---\nbase_model: some/model\n") and "normguard" not in card.lower()


@pytest.fixture()
def wandb(monkeypatch):
    """A fake wandb that records each run as (the arguments of init, the numbers logged)."""
    started, fake = [], type(sys)("wandb")

    def init(**given):
        own = type(sys)("run")
        started.append((given, []))
        own.log = lambda numbers, step: started[-1][1].append(numbers)
        return own
    fake.init, fake.Image = init, str
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refuses(capsys, lambda: train(tmp_path / "run", wandb="project"), "--wandb", "pip install wandb",
            unchanged=tmp_path)


def test_wandb_gets_the_numbers_and_the_grids(tmp_path, wandb):
    out = train(tmp_path / "run", wandb="project", epochs=1, eval_every=1)
    lines = metrics(out)
    ((_, logged),) = wandb
    assert [numbers["loss"] for numbers in logged if "loss" in numbers] == [lines[1]["loss"]]
    assert sum("samples" in numbers for numbers in logged) == 2


def test_a_wandb_run_belongs_to_one_folder(tmp_path, wandb):
    """Two folders of the same name are two runs; a resumed run continues its own."""
    for out, epochs, project in (("a/run", 1, "one"), ("b/run", 1, "one"), ("a/run", 2, None), ("a/run", 3, "one")):
        train(tmp_path / out, wandb=project, epochs=epochs, eval_every=0)
    ids = [given["id"] for given, _ in wandb]
    assert ids[0] == ids[2] != ids[1] and {given["name"] for given, _ in wandb} == {"run"}


# ---------------------------------------------------------------- a full disk

@contextmanager
def full_beyond(size: int):
    """No file can be longer than `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", [
    "args.json",
    "metrics.jsonl",
    "lora/pytorch_lora_weights.safetensors",
    "checkpoint/state.pt",
    "checkpoint/prompts",
])
def test_a_full_disk_costs_no_more_than_the_epoch(trained, longer, capsys, file):
    """The disk is full when the file is written. The error names the file, and earlier files are whole. With room
    again, the same command gives what an uninterrupted run gives."""
    if file != "checkpoint/prompts":
        shutil.copytree(longer / "checkpoint/prompts", trained / "checkpoint/prompts", dirs_exist_ok=True)
    before = contents(trained)
    limit = len(before[file]) - 1 if file in before else 4000
    with full_beyond(limit), pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        train(trained, epochs=3)
    run.unlock()
    said = capsys.readouterr().err.replace("\x1b[A", "")  # bars go up a line
    error = [line for line in said.splitlines() if line.strip() and "%|" not in line]
    assert end.value.code == 2 and len(error) == 1 and re.search(f"{file}\\S*: cannot be written", error[0]), error
    after = contents(trained)
    assert after.get(file) == before.get(file) and after["checkpoint/state.pt"] == before["checkpoint/state.pt"]
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert not [name for name in after if name.endswith(".tmp")]
    train(trained, epochs=3)
    assert all(torch.equal(value, lora_weights(longer)[name]) for name, value in lora_weights(trained).items())


def test_a_full_disk_leaves_earlier_pictures_and_reports(tmp_path, capsys):
    rows = [{"prompt": "a red star", "seed": seed} for seed in range(2)]
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dirs = [str(tmp_path / name) for name in "ab"]
    for folder in dirs:
        pictures.save_samples(folder, noise, rows)
    with full_beyond(2000):  # more than samples.jsonl, less than a picture
        refuses(capsys, lambda: pictures.save_samples(dirs[0], 1 - noise, rows), "00000.png", "room",
                unchanged=tmp_path)
    args = eval_judge.Args(tuple(dirs), reward=(), judge=None, out=str(tmp_path / "eval"))
    eval_judge.main(args)
    args.dirs = args.dirs[::-1]  # another report, of the same scores
    with full_beyond(5000):
        refuses(capsys, lambda: eval_judge.main(args), "report.png", "room", unchanged=tmp_path)


def test_a_log_that_cannot_grow_stays_as_it_was(tmp_path, capsys):
    (tmp_path / "log").write_text("a line\n")
    with full_beyond(10):
        refuses(capsys, lambda: cli.append(tmp_path / "log", "another line\n"), "log", "room", unchanged=tmp_path)
    refuses(capsys, lambda: cli.append(Path("/dev/full"), "a line\n"), "/dev/full", "No space left", unchanged=tmp_path)
