"""Files written whole or not at all, logs that grow line by line, and how a file is known again."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

from flow.cli import fail


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
        fail(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


def append(file: Path, text: str):
    """Add to a log. A full disk ends the process with the log as it was."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(text)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.truncate(file, size)
        fail(f"{file}: cannot be written ({e.strerror}); make room and run the same command again")


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
