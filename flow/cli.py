"""The command line and its errors: flags and files read, files written, and one line where something is wrong."""
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import tyro
from tqdm import tqdm

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # what keeps a disk from taking more
RESUMES = "; the same command resumes from the last checkpoint"

# more than this is a slip of the keyboard, which would take all memory or days before it shows
MOST = {"epochs": 100_000, "groups": 10_000, "group": 1_000, "updates": 10_000, "steps": 1_000, "timesteps": 1_000,
        "eval_steps": 1_000, "rank": 4_096, "size": 8_192, "frames": 1_000, "eval_n": 10_000, "n": 100_000,
        "renders": 10**7, "bootstrap": 100_000, "judge_retries": 100, "judge_concurrency": 1_000,
        "judge_timeout": 86_400}


class InputError(Exception):
    """The user's input is wrong: a flag, a file. The message says which one and what to do; nothing was overwritten."""


def exit_with(message):
    """End the process with one line on stderr and exit code 2."""
    message = re.sub(r"\S{200,}", lambda name: f"{name[0][:60]}...{name[0][-60:]}", " ".join(str(message).split()))
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # of processes that fail alike only the first speaks: torchrun then ends the others
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors():
    """For a script's main: an InputError inside ends the process with its message in one line and exit code 2."""
    try:
        yield
    except InputError as e:
        exit_with(e)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def reading(file: Path, advice: str = "restore it, or give another --out"):
    """Inside, any error becomes an InputError: the file cannot be read."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # each library's reader raises its own
        raise InputError(f"{file}: cannot be read ({type(e).__name__}: {reason(e)}); {advice}")


# ---------------------------------------------------------------- flags

def parse(args_class, doc: str):
    """A script's Args from the command line, by tyro: its help, its errors, its exit codes. For a script's last lines:
    from here on Ctrl-C, a full disk and a GPU out of memory end this process with a line of advice."""
    sys.excepthook = excepthook
    return tyro.cli(args_class, description=doc, config=(tyro.conf.DisallowNone,))


def training() -> bool:
    """Is it a training script that runs?"""
    return Path(sys.argv[0]).name.startswith("train_")


def excepthook(kind, error, trace):
    """The interpreter's, but Ctrl-C and a full disk are one line, and after a GPU out of memory there is advice."""
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write("interrupted" + (RESUMES if training() else ""), file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # a shell shows that as 130
    elif issubclass(kind, OSError) and error.errno in FULL:
        exit_with(f"{error.filename or 'a file'}: cannot be written ({error.strerror}); what was saved before is whole")
    else:
        sys.__excepthook__(kind, error, trace)
    if kind.__name__ == "OutOfMemoryError":
        lower = "--batch or --rollout-batch" + RESUMES if training() else "--batch or --size"
        tqdm.write(f"error: the GPU is out of memory; lower {lower}", file=sys.stderr)


def progress(items=None, **options) -> tqdm:
    """tqdm's bar, silent where stderr is no terminal and on all processes but the first."""
    return tqdm(items, disable=None if os.environ.get("RANK", "0") == "0" else True, **options)


def quiet_libraries():
    """diffusers and transformers, as far as they are imported, give no warnings and show no bars of their own."""
    for name in ("diffusers", "transformers"):
        if library := sys.modules.get(name):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()


def check_flags(args, least: dict[str, float]):
    """End the process where a flag is empty, or a number not finite, below `least` of its flag or beyond reason."""
    for flag, value in vars(args).items():
        name = f"--{flag.replace('_', '-')}"
        if "" in (value if isinstance(value, tuple) else [value]):
            raise InputError(f"{name} '': is empty; give a value, or leave the flag out")
        if isinstance(value, (int, float)):
            if value != value or value in (math.inf, -math.inf):
                raise InputError(f"{name} {value}: must be a finite number")
            if value < least.get(flag, value):
                raise InputError(f"{name} {value}: must be at least {least[flag]:g}")
            if value > MOST.get(flag, value):
                raise InputError(f"{name} {value}: must be at most {MOST[flag]}")


def check_model(flag: str, name: str, or_else: str = ""):
    """End the process if `name` is no folder and cannot be a hub id either: to ask the hub would take a minute."""
    if not name or not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
        raise InputError(f"{flag} {name or repr('')}: there is no such folder; give {or_else}a folder or a hub id")


def cannot_load(flag: str, name: str, error: Exception, needs: tuple[str, ...] = ()):
    """End the process: why a model cannot be loaded, and what to do. `needs`: the hub ids behind a short name."""
    if isinstance(error, ImportError):  # Qwen-VL's processor also reads videos, for which it wants torchvision
        raise InputError(f"{flag} {name}: needs a package that is not installed: {str(error).strip()[:200]} (for "
                         "torch 2.13: pip install torchvision==0.28.0)")
    why = f"{flag} {name}: cannot be loaded ({type(error).__name__}: {reason(error.__cause__ or error)[:90]})"
    if Path(name).is_dir():
        raise InputError(f"{why}; the folder is of another kind of model, or broken")
    away = f"`hf download {name} --local-dir DIR` elsewhere and give {flag} DIR"
    if needs:
        away = "copy $HF_HOME from a machine that has them"
    raise InputError(f"{why}; it needs {' and '.join(dict.fromkeys(needs or (name,)))} from huggingface.co: if "
                     f"gated, accept the licence there and `hf auth login`; if offline, {away}")


# ---------------------------------------------------------------- files and folders

def check_place(path: str | Path, flag: str, files: tuple = (), folders: tuple = ()):
    """End the process if a folder cannot be made or written to, or if what is to be a file or a folder in it is of
    another kind. Nothing is made yet: it is found at the start, not after hours at the first save."""
    place = Path(path)
    try:
        there = next(part for part in (place, *place.absolute().parents) if part.exists() or part.is_symlink())
        if not there.is_dir():
            raise InputError(f"{flag} {path}: {there} is no folder; give another {flag}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {path}: {there} cannot be written to; give another {flag}")
        for names, is_right, kind in ((files, Path.is_file, "file"), (folders, Path.is_dir, "folder")):
            for part in (place / name for name in names):
                if (part.exists() or part.is_symlink()) and not is_right(part):
                    raise InputError(f"{flag} {path}: {part} is no {kind}; move it, or give another {flag}")
    except OSError as e:  # a name that is too long, for one
        raise InputError(f"{flag} {path}: cannot be written to ({e.strerror})")


def make_dir(path: str, flag: str) -> Path:
    """Create a folder that can be written to, or end the process, naming `flag`."""
    check_place(path, flag)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"{flag} {path}: cannot be written to ({e.strerror})")
    return Path(path)


# ---------------------------------------------------------------- files written whole

def json_text(value, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null: JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent)


def write_files(contents: dict[Path, bytes | str]):
    """Write files under temporary names, then rename them: a kill leaves each as it was or as it is to be. A full disk
    ends the process with all of them as they were."""
    own = os.environ.get("RANK", "0")  # of several processes that write the same
    temporary = {file: file.with_name(f".{file.name}.{own}.tmp") for file in contents}
    try:
        for file, content in contents.items():
            temporary[file].write_bytes(content if isinstance(content, bytes) else content.encode())
        for file in contents:
            temporary[file].replace(file)
    except OSError as e:
        for left in temporary.values():
            with contextlib.suppress(OSError):
                left.unlink()
        raise InputError(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


def append(file: Path, text: str):
    """Add to a log. A full disk ends the process with the log as it was."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(text)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.truncate(file, size)
        raise InputError(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


def fingerprint(path: str) -> str | None:
    """A hash of a file or a folder's files: names, sizes and up to a megabyte from all over each. None of a hub id."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with open(file, "rb") as opened:
            for start in range(0, size, max(2**16, size // 16)):
                opened.seek(start)
                digest.update(opened.read(2**16))
    return digest.hexdigest()[:16] if Path(path).exists() else None
