"""Tests of machines as they are: stray variables, file systems without locks, other versions, missing compilers."""
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train_awm
from flow import cli, run
from flow.pipeline import load_pipeline
from tests.helpers import CPU, ROOT, refuses, small_run


@pytest.mark.parametrize("stray", [
    {"RANK": "8"},
    {"WORLD_SIZE": ""},
    {"RANK": "", "WORLD_SIZE": "4", "LOCAL_RANK": "none"},
    {"RANK": "8", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "low", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
], ids=str)
def test_variables_that_torchrun_did_not_set_are_ignored(monkeypatch, stray):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert cli.torchrun_processes() == (0, 1)
    torchruns = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in torchruns.items():
        monkeypatch.setenv(name, value)
    assert cli.torchrun_processes() == (1, 2)


def test_a_sweeps_rank_does_not_silence_a_process():
    """Nor is it taken for one of several."""
    env = {**os.environ, "RANK": "8", "WORLD_SIZE": "", "LOCAL_RANK": ""}
    code = ("from flow.distributed import PROCESSES, local_device\nfrom flow.cli import exit_with\nlocal_device()\n"
            "print(PROCESSES, 'printed')\nexit_with('said')")
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (end.returncode, end.stdout, end.stderr) == (2, "1 printed\n", "error: said\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(run.fcntl, "lockf", lockf)
    out = small_run(tmp_path / "run", epochs=1, eval_every=0)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and str(out) in said and os.strerror(number) in said and "done: " in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_holds_is_refused(tmp_path, monkeypatch, capsys, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(run.fcntl, "lockf", lockf)
    refuses(capsys, lambda: small_run(tmp_path / "run", epochs=1), "another process is at work")


@pytest.mark.parametrize("parts", [
    ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    ("transformer",),
])
def test_a_folder_of_fp16_files_is_loaded_by_its_variant(tmp_path, parts):
    model = tmp_path / "half"
    shutil.copytree("tiny/sd3", model)
    for part in parts:
        for file in (model / part).glob("*.safetensors") if (model / part).exists() else ():
            half = {name: x.half() if x.is_floating_point() else x for name, x in load_file(file).items()}
            save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
            file.unlink()
    assert (model / "transformer/diffusion_pytorch_model.fp16.safetensors").exists()
    ours, whole = (load_pipeline(name, CPU).transformer.state_dict() for name in (str(model), "tiny/sd3"))
    assert all(torch.equal(x, whole[name].half().float()) for name, x in ours.items() if "pos_embed.pos" not in name)


def test_a_folder_with_both_is_loaded_in_full_precision(tmp_path):
    shutil.copytree("tiny/sd3", tmp_path / "both")
    file = tmp_path / "both/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 0 * x for name, x in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    weights = load_pipeline(str(tmp_path / "both"), CPU).transformer.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in load_file(file).items())


def test_other_versions_are_named(tmp_path, monkeypatch, capsys):
    """A model that cannot be loaded where other versions are installed than requirements.txt asks for."""
    shutil.copytree("tiny/sd3", tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer.json").write_text("{}")

    def load():
        load_pipeline(str(tmp_path / "model"), CPU)
    refuses(capsys, load, "--model", "the folder is broken")
    real = cli.version
    monkeypatch.setattr(cli, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    asked = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("transformers"))
    refuses(capsys, load, "--model", f"transformers 4.57.0 (requirements.txt: {asked.partition('==')[2]})",
            "pip install -r requirements.txt")
    with pytest.raises(cli.InputError) as said:
        load()
    assert "broken" not in str(said.value) and "diffusers" not in str(said.value)


@dataclass(frozen=True)  # as tiny/make.py's
class Paths:
    out: str = "runs"
    model: str | None = None
    reward: str = "pickscore"
    dirs: tuple[str, ...] = ()
    n: int = 1


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["script", "--out=~/runs", "--model", "~/sd3", "--reward",
                                      "vlm:~/judge:0.5,~/mine.py:f:0.5", "--dirs", "~/a", "b~/c"])
    found = cli.parse(Paths, "")
    assert found == Paths("/home/me/runs", "/home/me/sd3", "vlm:/home/me/judge:0.5,/home/me/mine.py:f:0.5",
                          ("/home/me/a", "b~/c"))


def test_compiling_without_a_compiler_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.check_args(train_awm.Args(compile=True))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    run.check_args(train_awm.Args())
    refuses(capsys, lambda: train_awm.main(train_awm.Args(compile=True, out=f"{tmp_path}/run")), "--compile", "g++",
            unchanged=tmp_path)


# ---------------------------------------------------------------- torchrun sample.py (test_distributed.py runs it)

def test_fewer_pictures_than_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample.distributed, "PROCESSES", 2)
    refuses(capsys, lambda: sample.main(sample.Args(prompt="a red star", out=str(tmp_path))), "--n 1", "2 processes",
            unchanged=tmp_path)
