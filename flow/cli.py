"""The command line: flags read and checked, errors of one line, files written whole or not at all."""
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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

MOST_PIXELS = 8_192  # of a picture's side
# Larger values are typing errors: they would take all memory, or days.
MOST = {"epochs": 100_000, "groups": 10_000, "group": 1_000, "updates": 10_000, "steps": 1_000, "timesteps": 1_000,
        "eval_steps": 1_000, "rank": 4_096, "frames": 1_000, "eval_n": 10_000, "n": 100_000,
        "renders": 10**7, "bootstrap": 100_000, "judge_retries": 100, "judge_concurrency": 1_000,
        "judge_timeout": 86_400}


def torchrun_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun says. (0, 1) without torchrun, also where something
    else, like a sweep, sets only a RANK or a WORLD_SIZE."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, processes, *address = [os.environ.get(name, "") for name in names]
    if all(address) and rank.isdigit() and processes.isdigit() and int(rank) < int(processes):
        return int(rank), int(processes)
    return 0, 1


RANK, PROCESSES = torchrun_processes()


class InputError(Exception):
    """The user's input is wrong. The message names the flag or the file and says what to do."""


@contextlib.contextmanager
def one_line_errors():
    """For a script's main: an InputError ends the process with its message in one line and exit code 2."""
    try:
        yield
    except InputError as e:
        exit_with(e)


def exit_with(message):
    """Print one line on stderr and end the process with exit code 2."""
    line = " ".join(str(message).split())
    line = re.sub(r"\S{200,}", lambda word: f"{word[0][:60]}...{word[0][-60:]}", line)
    if RANK > 0:
        time.sleep(2)  # when all processes fail alike, only the first prints: torchrun then ends the others
    tqdm.write(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def reason(error: BaseException) -> str:
    """The first line of an error's message, at most 150 characters, without colours; its type if it has no message."""
    message = getattr(error, "strerror", None) or str(error)  # of a file: without its name
    return (message.strip().splitlines() or [type(error).__name__])[0].partition("\x1b")[0][:150]


@contextlib.contextmanager
def on_error(problem: str, advice: str = ""):
    """Inside, any error becomes an InputError: the problem, the error in brackets, the advice."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as e:  # each library raises its own; the user's code may even exit
        raise InputError(f"{problem} ({type(e).__name__}: {reason(e.__cause__ or e)[:90]}){advice}")


def reading(file: Path, advice: str = "restore it, or give another --out"):
    """Inside, any error becomes an InputError: the file cannot be read."""
    return on_error(f"{file}: cannot be read", f"; {advice}")


def loading(flag: str, name: str, or_else: str = "", needs: tuple[str, ...] = ()):
    """Inside, any error becomes an InputError: the model `name` cannot be loaded, and what to do. Checks the name first
    (check_model), unless it is short for the hub ids `needs`."""
    offline = "copy $HF_HOME from a machine that has them"
    if not needs:
        check_model(flag, name, or_else)
        offline = f"`hf download {name} --local-dir DIR` elsewhere and give {flag} DIR"
    advice = (f"no such folder is here, so it needs {' and '.join(dict.fromkeys(needs or (name,)))} from "
              f"huggingface.co: if gated, accept the licence there and `hf auth login`; if offline, {offline}")
    if Path(name).is_dir():
        others = other_versions()
        advice = "the folder is broken, holds another kind of model, or needs the package that the error names"
        advice = f"here are {others}: pip install -r requirements.txt" if others else advice
    return on_error(f"{flag} {name}: cannot be loaded", f"; {advice}")


def load_whole(cls, name: str, **options):
    """cls.from_pretrained(name), frozen and in eval mode. ValueError if `name` lacks some of its weights: transformers
    would make them random."""
    model, info = cls.from_pretrained(name, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"it lacks weights of {type(model).__name__}: {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def other_versions() -> str:
    """The libraries that load models, where another version is installed than requirements.txt asks for; or ""."""
    file = Path(__file__).parent.parent / "requirements.txt"
    asked = dict(re.findall(r"^(transformers|diffusers|peft)==(\S+)", file.read_text() if file.exists() else "", re.M))
    return ", ".join(f"{name} {version(name)} (requirements.txt: {wanted})" for name, wanted in asked.items()
                     if version(name) != wanted)


# ---------------------------------------------------------------- flags


def parse(args_class, doc: str):
    """Read a script's Args from the command line with tyro; ~/ at the start of a path is the home folder. Also installs
    `excepthook` in this process."""
    sys.excepthook = excepthook
    args = tyro.cli(args_class, description=doc, config=(tyro.conf.DisallowNone,))
    return replace(args, **{field: expand_home(value) for field, value in vars(args).items()})


def expand_home(value):
    """A text, or a tuple of texts, with ~/ replaced by the home folder, at the start and after : or , (as in
    vlm:~/judge). Any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    home = os.path.expanduser("~/")
    return re.sub(r"(^|[:,])~/", lambda found: found[1] + home, value) if isinstance(value, str) else value


def excepthook(kind, error, trace):
    """Print one line for Ctrl-C or a full disk, else the traceback, and after running out of GPU memory some advice."""
    training = Path(sys.argv[0]).name.startswith("train_")
    resume = "; the same command resumes from the last checkpoint" if training else ""
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write(f"interrupted{resume}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # so that a shell sees exit code 130
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        exit_with(f"{error.filename or 'a file'}: cannot be written ({error.strerror}); files saved before are intact")
    sys.__excepthook__(kind, error, trace)
    if kind.__name__ == "OutOfMemoryError":
        flags = "--batch or --rollout-batch" if training else "--batch or --size"
        tqdm.write(f"error: the GPU is out of memory; lower {flags}{resume}", file=sys.stderr)


def progress(items=None, **options) -> tqdm:
    """A tqdm bar. Silent where stderr is no terminal, and on all processes but the first."""
    return tqdm(items, disable=None if RANK == 0 else True, **options)


def quiet_libraries():
    """Turn off the warnings and progress bars of diffusers and transformers, where they are imported."""
    for name in {"diffusers", "transformers"} & sys.modules.keys():
        sys.modules[name].utils.logging.set_verbosity_error()
        sys.modules[name].utils.logging.disable_progress_bar()


def check_flags(args, least: dict[str, float]):
    """Raise InputError if a flag is empty, not finite, below its value in `least`, or above its value in MOST."""
    for field, value in vars(args).items():
        flag = f"--{field.replace('_', '-')}"
        if value == "" or isinstance(value, tuple) and "" in value:
            raise InputError(f"{flag} '': is empty; give a value, or leave the flag out")
        if field == "size":
            width_and_height(value)
        low, high = least.get(field, -math.inf), MOST.get(field, math.inf)
        if isinstance(value, (int, float)) and not (low <= value <= high and -math.inf < value < math.inf):
            limits = [f", at least {low:g}"] * (low > -math.inf) + [f", at most {high}"] * (high < math.inf)
            raise InputError(f"{flag} {value}: must be a finite number{''.join(limits)}")


def width_and_height(size: int | str | None) -> tuple[int, int] | None:
    """The value of --size as (width, height) in pixels: 512 or "512" is (512, 512), "768x512" is (768, 512), None is
    None. Raises InputError for anything else."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(size).lower())
    sides = [int(side) for side in found.groups(default=found[1])] if found else [0]
    if not 1 <= min(sides) <= max(sides) <= MOST_PIXELS:
        raise InputError(f"--size {size}: give pixels a side, or WIDTHxHEIGHT like 768x512; at least 1, at most "
                         f"{MOST_PIXELS}")
    return sides[0], sides[1]


def check_model(flag: str, name: str, or_else: str = ""):
    """Raise InputError if `name` is neither a folder nor a possible hub id (the hub takes a minute to say so).
    `or_else` lists what else the flag takes."""
    may_be_hub_id = name.count("/") == 1 and not Path(name).parent.is_dir()
    if not name or not Path(name).is_dir() and not may_be_hub_id:
        raise InputError(f"{flag} {name or repr('')}: there is no such folder; give {or_else}a folder or a hub id")


def check_place(path: str | Path, flag: str, files: tuple = (), folders: tuple = ()):
    """Raise InputError if the folder `path` cannot be made or written to, or if one of `files` in it is no file, or one
    of `folders` no folder. Makes nothing: it is for a script's start, before hours of work."""
    place = Path(path)
    with on_error(f"{flag} {path}: cannot be written to"):  # for example a name that is too long
        nearest = next(part for part in (place, *place.absolute().parents) if part.exists() or part.is_symlink())
        parts = {nearest: "folder", **{place / name: "folder" for name in folders}}
        for part, kind in (parts | {place / name: "file" for name in files}).items():
            if os.path.lexists(part) and not (part.is_dir() if kind == "folder" else part.is_file()):
                raise InputError(f"{flag} {path}: {part} is no {kind}; move it, or give another {flag}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {path}: {nearest} cannot be written to; give another {flag}")


def make_dir(path: str | Path, flag: str) -> Path:
    """Make a folder. Raises InputError, naming `flag`, if it cannot be made or written to."""
    check_place(path, flag)
    with on_error(f"{flag} {path}: cannot be written to"):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def to_json(value, indent: int | None = None) -> str:
    """`value` as JSON, with null for numbers that are not finite, which JSON cannot hold."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent)


def write_files(contents: dict[Path, bytes | str]):
    """Write files under temporary names, then rename them: a kill leaves each file old or new, never half. On a full
    disk all stay old, and InputError is raised."""
    # several processes may write the same file
    temporary = {file: file.with_name(f".{file.name}.{RANK}.tmp") for file in contents}
    try:
        for file, content in contents.items():
            temporary[file].write_bytes(content if isinstance(content, bytes) else content.encode())
        for file in contents:
            temporary[file].replace(file)
    except OSError as e:
        for left in temporary.values():
            left.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


def append(file: Path, text: str):
    """Add text to a file. On a full disk the file stays as it was, and InputError is raised."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(text)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.truncate(file, size)
        raise InputError(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


def fingerprint(path: str) -> str | None:
    """A hash of a file, or of a folder's files: names, sizes and 16 samples of each. None of a hub id and of ""."""
    root, digest = Path(path), hashlib.sha256()
    if not path or not root.exists():
        return None
    for file in sorted(part for part in (root, *root.rglob("*")) if part.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)} {size}".encode())
        with open(file, "rb") as opened:
            for start in range(0, size, max(2**16, size // 16)):
                opened.seek(start)
                digest.update(opened.read(2**16))
    return digest.hexdigest()[:16]
