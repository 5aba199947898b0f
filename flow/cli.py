"""The command line and its errors: flags parsed, files read, and one line where something is wrong."""
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import torch
import tyro
from tqdm import tqdm


def fail(message: str):
    """End the process with one line on stderr and exit code 2: the user's input is wrong, nothing was overwritten."""
    alike = int(os.environ.get("LOCAL_RANK", 0)) > 0 and not torch.distributed.is_initialized()
    if not alike:  # of several processes that fail alike before they meet, the first speaks
        tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_model(flag: str, name: str, or_else: str = ""):
    """End the process if `name` is no folder and cannot be a hub id either: to ask the hub would take a minute."""
    if not name or not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
        fail(f"{flag} {name or repr('')}: there is no such folder; give {or_else}a folder or a hub id")


def cannot_load(flag: str, name: str, error: Exception, needs: tuple[str, ...] = ()):
    """End the process: why a model cannot be loaded, and what to do. `needs`: the hub ids behind a short name."""
    if isinstance(error, ImportError):  # Qwen-VL's processor also reads videos, for which it wants torchvision
        fail(f"{flag} {name}: needs a package that is not installed: {str(error).strip()[:200]} "
             "(for torch 2.13: pip install torchvision==0.28.0)")
    why = f"{flag} {name}: cannot be loaded ({type(error).__name__}: {reason(error.__cause__ or error)})"
    if Path(name).is_dir():
        fail(f"{why}; the folder is of another kind of model, or broken")
    away = f"`hf download {name} --local-dir DIR` elsewhere and give {flag} DIR"
    if needs:
        away = "copy $HF_HOME from a machine that has them"
    fail(f"{why}; it needs {' and '.join(dict.fromkeys(needs or (name,)))} from huggingface.co: if gated, accept the "
         f"licence there and `hf auth login`; if offline, {away}")


def parse(args_class, doc: str):
    """tyro, with its framed errors turned into one line; Ctrl-C and a GPU out of memory, later, become one too."""
    trains = hasattr(args_class, "save_every")
    lower = ("--batch or --rollout-batch; the same command with those resumes from the last checkpoint" if trains
             else "--batch or --size")

    def last_words(kind, error, trace):
        """The interpreter's excepthook, but for these two."""
        if issubclass(kind, KeyboardInterrupt):
            resumes = "; the same command resumes from the last checkpoint" if trains else ""
            return tqdm.write("interrupted" + resumes, file=sys.stderr)
        if not issubclass(kind, torch.OutOfMemoryError):
            return sys.__excepthook__(kind, error, trace)
        tqdm.write(f"error: the GPU is out of memory; lower {lower} ({reason(error)})", file=sys.stderr)

    sys.excepthook = last_words
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            args, unknown = tyro.cli(args_class, description=doc, return_unknown_args=True)
    except SystemExit as end:
        if end.code:
            said = " ".join(framed.getvalue().translate(str.maketrans("", "", "╭╮╰╯─│")).split())
            wrong = re.search(r"Error parsing (--\S+): (.*?)(?: Got errors.*?)? Argument helptext: --\S+ (\S+)", said)
            fail("{0}: {1}; it takes {2}".format(*wrong.groups())[:150] if wrong else said[:150])
        raise
    if unknown:
        fail(f"unknown flag {unknown[0]}; --help lists them all")
    return args


def json_text(value, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null: JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent)


def read_prompts(path: str, flag: str) -> list[str]:
    """The non-empty lines of a text file; a missing or empty one ends the process, naming `flag`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        hint = "; the defaults are for the repository's folder" if path.startswith("tiny/") else ""
        fail(f"{flag} {path}: cannot be read ({e}){hint}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        fail(f"{flag} {path}: holds no prompt; one a line")
    return prompts


def make_dir(path: str, flag: str) -> Path:
    """Create a folder that can be written to, or end the process, naming `flag`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        fail(f"{flag} {path}: cannot be written to ({e})")
    return Path(path)
