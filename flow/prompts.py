"""Prompts: each is encoded once and by itself, remembered, and put into batches; the text encoders come and go."""
import functools
import hashlib
import inspect
import json
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from flow.cli import InputError, progress, write_files
from flow.intercept import Captured, call


def read_prompts(path: str, flag: str) -> list[str]:
    """The non-empty lines of a text file; a missing or empty one ends the process, naming `flag`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        hint = "; the defaults are for the repository's folder" if path.startswith("tiny/") else ""
        raise InputError(f"{flag} {path}: cannot be read ({e}){hint}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{flag} {path}: holds no prompt; one a line")
    return prompts


@contextmanager
def text_encoders(pipe):
    """While this lasts, the text encoders are in their places and on the device; transformer and VAE make room for
    them."""
    seam, encoders = pipe.flow, pipe.flow.encoders
    if encoders is None:
        raise ValueError("the text encoders are gone: give all prompts to encode_prompts")
    if any(getattr(pipe, name) is not None for name in encoders):  # it is nested
        yield
        return
    others = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for part in others:
        part.to("cpu")
    for name, encoder in encoders.items():
        setattr(pipe, name, encoder.to(seam.device))
    try:
        yield
    finally:
        for name, encoder in encoders.items():
            setattr(pipe, name, None)
            if seam.encoders:  # they are needed again
                encoder.to("cpu")
        for part in others:
            part.to(seam.device)


def remember_prompts(pipe):
    """Make pipe.encode_prompt encode each prompt once, and put batches together from what it remembers. Prompts are
    encoded one by one, or in one go if that is the same: if in a batch the text encoders are given the very tokens and
    masks that they are given for each prompt alone (so no padding to the longest), and what comes out has the same
    shape and, but for rounding, the same numbers."""
    encode, seam, rows = pipe.encode_prompt, pipe.flow, pipe.flow.rows
    signature = inspect.signature(encode)

    @torch.no_grad()
    def run(asked: dict) -> tuple:
        """The pipeline's own encoding, on the CPU."""
        with text_encoders(pipe):
            bound = inspect.BoundArguments(signature, asked)
            encoded = encode(*bound.args, **bound.kwargs)
        return moved(encoded if isinstance(encoded, tuple) else (encoded,), "cpu")

    def run_heard(asked: dict) -> tuple[tuple, list]:
        """The same, and the tokens and masks (prompts, length) that the text encoders were given, in their order."""
        heard, handles = [], []
        for encoder in seam.encoders.values():
            def hear(module, args, kwargs):
                """All batches of whole numbers."""
                for value in (*args, *kwargs.values()):
                    if torch.is_tensor(value) and value.ndim == 2 and not value.is_floating_point():
                        heard.append(value.cpu())
            handles.append(encoder.register_forward_pre_hook(hear, with_kwargs=True))
        try:
            return run(asked), heard
        finally:
            for handle in handles:
                handle.remove()

    @functools.lru_cache(2)
    def batch(keys: tuple) -> tuple:
        """Encodings of several prompts as those of a batch."""
        return moved(tuple(map(join, zip(*(rows[key] for key in keys)))), seam.device)

    def encode_prompt(*args, **kwargs):
        """As the pipeline's own; a batch's encodings must have one length (see `batches`)."""
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        prompts = asked["prompt"] or [""] * asked.get("batch_size", 1)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n = len(prompts)
        asked.update({name: value for name, value in (("device", seam.device), ("batch_size", 1)) if name in asked})
        each = {"prompt": prompts} | {name: value for name, value in asked.items() if "prompt" in name
                                      and isinstance(value, list) and len(value) == n}
        rest = repr([value for name, value in asked.items() if name not in {*each, "device", "dtype"}])
        keys = tuple((rest, *one) for one in zip(*each.values()))
        together = {**asked, **each} | ({"batch_size": n} if "batch_size" in asked else {})
        missing = [key for key in dict.fromkeys(keys) if key not in rows]
        if seam.in_one_go and len(missing) > 1:
            found = zip(keys, split(run(together), n))
        else:
            found = ((key, run(by_itself(asked, each, key))) for key in missing)
        for key, row in found:
            if key not in rows:
                known = [*seam.last.get(rest, ()), *seam.last.get(key[1], ())]  # what is equal is kept once
                remember(seam, key, tuple(next((x for x in known if same(x, value)), value) for value in row))
        if seam.in_one_go is None and n > 1:
            alone = {key: run_heard(by_itself(asked, each, key)) for key in dict.fromkeys(keys)}
            whole, heard = run_heard(together)
            same_tokens = bool(heard) and all(  # a call of 2 n rows has n negative prompts, too
                len(heard) == len(alone[key][1])
                and all(torch.equal(tokens[i::n], own) for tokens, own in zip(heard, alone[key][1]))
                for i, key in enumerate(keys))
            same_encoding = all(alike(alone[key][0], row) for key, row in zip(keys, split(whole, n)))
            seam.in_one_go = same_tokens and same_encoding
            raise Captured(None)
        encoded = batch(keys)
        return encoded if len(encoded) > 1 else encoded[0]

    pipe.encode_prompt = encode_prompt


def by_itself(asked: dict, each: dict, key: tuple) -> dict:
    """The arguments of encode_prompt for one prompt of several. `each` has one value a prompt, `key` that one's."""
    return {**asked, **{name: [value] for name, value in zip(each, key[1:])}}


def remember(seam, key: tuple, row: tuple):
    """Keep a prompt's encoding, and the shapes by which it goes into batches."""
    seam.rows[key] = seam.last[key[0]] = seam.last[key[1]] = row  # the last of its settings, and of its prompt
    shapes = str([value.shape for value in row if torch.is_tensor(value)])
    seam.shapes[key[1]] = seam.shapes.get(key[1], frozenset()) | {shapes}


def same(a, b) -> bool:
    """Are two values the same tensor?"""
    return torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b)


def moved(value, device):
    """Tensors in tuples and lists, on a device."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    return value.to(device) if torch.is_tensor(value) else value


def alike(a, b) -> bool:
    """Are two encodings the same but for rounding?"""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(alike, a, b))
    if not torch.is_tensor(a) or not torch.is_tensor(b):
        return a is b
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 0.03 * a.float().norm())


def join(parts: tuple):
    """One of several prompts' encodings as that of a batch: a tensor's first dimension of 1 counts them, or a list of
    one; a longer list is of layers; what has neither is shared."""
    if isinstance(parts[0], list):
        return [part[0] for part in parts] if len(parts[0]) == 1 else [join(layer) for layer in zip(*parts)]
    if torch.is_tensor(parts[0]) and 1 in parts[0].shape:
        return torch.cat(parts, list(parts[0].shape).index(1))
    return parts[0]


def split(encoded: tuple, n: int) -> list[tuple]:
    """The reverse of `join`, of all encodings: along a tensor's first dimension of n."""
    def part(value, i):
        """One prompt's."""
        if isinstance(value, list):
            return value[i:i + 1] if len(value) == n else [part(layer, i) for layer in value]
        if torch.is_tensor(value) and n in value.shape:
            return value.narrow(list(value.shape).index(n), i, 1).clone()
        return value
    return [tuple(part(value, i) for value in encoded) for i in range(n)]


def batches(pipe, prompts: list[str], most: int, guidance: float | None = None) -> list[list[int]]:
    """Places of prompts in batches of at most `most`, in each of which all encodings have one length: padding might be
    seen."""
    groups = {}
    for prompt in set(prompts) - pipe.flow.shapes.keys() if hasattr(pipe, "encode_prompt") else ():
        call(pipe, [prompt], levels=torch.zeros(1))  # nobody has asked encode_prompts for it
    for i, prompt in enumerate(prompts):
        groups.setdefault(pipe.flow.shapes.get(prompt), []).append(i)
    most = 1 if pipe.flow.one_by_one.get(guidance) else most
    return [rows[i:i + most] for rows in groups.values() for i in range(0, len(rows), most)]


def own_settings(pipe, takes, size: int | None, frames: int | None) -> dict:
    """The pipeline's arguments besides steps and guidance: a picture no larger than the VAE was made for, and as much
    (padded) text as the last tokenizer takes, where these are less than the pipeline's defaults."""
    most = takes["max_sequence_length"].default if "max_sequence_length" in takes else None
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    if most and tokenizers:
        most = min(most, tokenizers[-1].model_max_length)
    if size is None and "height" in takes and takes["height"].default is None and hasattr(pipe, "default_sample_size"):
        made_for = pipe.vae.config.get("sample_size") if getattr(pipe, "vae", None) else None
        if isinstance(made_for, int) and made_for < pipe.default_sample_size * pipe.vae_scale_factor:
            size = made_for
    settings = {"height": size, "width": size, "num_frames": frames, "frames": frames, "max_sequence_length": most,
                "enable_prompt_rewrite": False,  # a reward is asked about the prompt that was given
                "use_resolution_binning": False}  # the transformer draws the size that was given
    return {name: value for name, value in settings.items() if value is not None and name in takes}


def warn_unsuitable(pipe, prompts: list[str], size: int | None):
    """Say what the model was not made for: prompts longer than any of its tokenizers reads, a size far from its own."""
    names = sorted(name for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None)
    tokenizers = [getattr(pipe.components[name], "tokenizer", pipe.components[name]) for name in names]  # a processor's
    limits = [tokenizer.model_max_length for tokenizer in tokenizers]
    limits[-1:] = [pipe.flow.settings.get("max_sequence_length", limit) for limit in limits[-1:]]
    unique = list(dict.fromkeys(prompts))
    cut = [prompt for prompt in unique if tokenizers and not any(
        len(tokenizer(prompt).input_ids) <= limit for tokenizer, limit in zip(tokenizers, limits))]
    if cut:
        tqdm.write(f"note: {len(cut)} of {len(unique)} prompts are longer than the {max(limits)} tokens that "
                   f"{type(pipe).__name__} reads; the end is lost, first of {cut[0][:80]!r}")
    own = pipe.flow.takes["height"].default if "height" in pipe.flow.takes else None
    own = own or getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
    made_for = pipe.vae.config.get("sample_size") if getattr(pipe, "vae", None) else None
    own = min(own, made_for) if isinstance(made_for, int) else own
    if size and own and not own / 2 <= size <= own * 2:
        tqdm.write(f"note: --size {size}: {type(pipe).__name__} was made for pictures of {own} pixels a side")


# ---------------------------------------------------------------- encodings on disk

def encode_each(pipe, prompts: list[str], size: int, guidance: float | None, store: Path | None):
    """Have the pipeline encode each prompt once, `size` in one go, for calls without guidance and with that; a folder
    `store` keeps them, and what it has kept is not encoded again. The text encoders are gone after that."""
    unique = list(dict.fromkeys(prompts))
    with ExitStack() as stack:
        for i in progress(range(0, len(unique), size), desc="encode prompts", leave=False):
            chunk = (unique[i:i + size] + [""] * size)[:size]
            if store is not None and recall(pipe.flow, store, chunk, guidance):
                continue
            stack.enter_context(text_encoders(pipe))
            known = len(pipe.flow.rows)
            for scale in dict.fromkeys([None, guidance]):
                call(pipe, chunk, levels=torch.zeros(1), guidance=scale)
            if store is not None:
                keep(pipe.flow, store, chunk, guidance, known)
        pipe.flow.encoders = None


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
