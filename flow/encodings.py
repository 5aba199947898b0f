"""Encoded prompts on disk, memory-mapped: a run of many prompts holds few of them in memory, and encodes none again
when it resumes. A file holds a few prompts: their tensors, each once, and in its metadata how they are put
together."""
import hashlib
import json
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flow.cli import progress
from flow.files import write_files
from flow.seam import call
from flow.text import remember, text_encoders


def encode_each(pipe, prompts: list[str], size: int, guidance: float | None, store: Path | None):
    """Have the pipeline encode each prompt once, `size` in one go, for calls without guidance and with that; a folder
    `store` keeps them, and what it has kept is not encoded again. The text encoders are gone after that."""
    unique = list(dict.fromkeys(prompts))
    with ExitStack() as stack:
        for i in progress(range(0, len(unique), size), desc="encode prompts", leave=False):
            chunk = (unique[i:i + size] + [""] * size)[:size]
            if store is not None and recall(pipe.seam, store, chunk, guidance):
                continue
            stack.enter_context(text_encoders(pipe))
            known = len(pipe.seam.rows)
            for scale in dict.fromkeys([None, guidance]):
                call(pipe, chunk, levels=torch.zeros(1), guidance=scale)
            if store is not None:
                keep(pipe.seam, store, chunk, guidance, known)
        pipe.seam.encoders = None


def file_of(seam, store: Path, prompts: list[str], guidance: float | None) -> Path:
    """Where the encodings of these prompts are, if they have been kept: by these settings, in this precision, on this
    kind of device, by these libraries."""
    precision = [str(encoder.dtype) for encoder in seam.encoders.values()], seam.device.type
    libraries = torch.__version__, diffusers.__version__, transformers.__version__
    settings = prompts, guidance, sorted(seam.settings.items()), precision, libraries
    return store / (hashlib.sha256(repr(settings).encode()).hexdigest()[:16] + ".safetensors")


def recall(seam, store: Path, prompts: list[str], guidance: float | None) -> bool:
    """Take these prompts' encodings from the folder, if they are there and can be read."""
    try:
        rows = read_rows(file_of(seam, store, prompts, guidance))
    except (OSError, SafetensorError, ValueError, KeyError):
        return False  # they are encoded again
    for key, row in rows.items():
        remember(seam, key, row)
    return True


def keep(seam, store: Path, prompts: list[str], guidance: float | None, known: int):
    """Write to the folder what has been encoded since so many encodings were known, and hold that from now on."""
    store.mkdir(parents=True, exist_ok=True)
    write_rows(file_of(seam, store, prompts, guidance), dict(islice(seam.rows.items(), known, None)))
    recall(seam, store, prompts, guidance)


def write_rows(file: Path, rows: dict[tuple, tuple]):
    """Write {key: encoding}; keys are tuples of strings, encodings nested tuples and lists of tensors and JSON's own
    values."""
    tensors, places = {}, {}

    def outline(value):
        """The encoding with each tensor's name in its place."""
        if isinstance(value, (tuple, list)):
            return {type(value).__name__: [outline(part) for part in value]}
        if not torch.is_tensor(value):
            return value
        name = places.setdefault(id(value), f"{len(places)}")
        tensors.setdefault(name, value.clone(memory_format=torch.contiguous_format))
        return {"tensor": name}

    index = json.dumps([[list(key), outline(row)] for key, row in rows.items()])
    write_files({file: save(tensors, {"rows": index})})


def read_rows(file: Path) -> dict[tuple, tuple]:
    """Read them back; the tensors stay on disk until they are used."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        index = json.loads(opened.metadata()["rows"])

    def filled(value):
        """The reverse of `outline`."""
        if not isinstance(value, dict):
            return value
        kind, content = next(iter(value.items()))
        if kind == "tensor":
            return tensors[content]
        parts = [filled(part) for part in content]
        return tuple(parts) if kind == "tuple" else parts

    return {tuple(key): filled(row) for key, row in index}
