"""Prompts: read them from a file, encode each once, keep the encodings in memory and on disk, make batches of them."""
import csv
import functools
import hashlib
import inspect
import io
import json
import pickle
import re
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import transformers
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from flow.cli import InputError, progress, reading, width_and_height, write_files
from flow.intercept import call_parameters, patched, run_loop

COLUMNS = "prompt", "prompts", "text", "caption"  # names of a column of prompts; the first that is there
NO_TEXT = re.compile("[\0-\x08\x0e-\x1b\x7f\ud800-\udfff]")  # control characters and halves of characters
CHUNK = 16  # prompts per call of the text encoders; always that many, since another number can change the last bits
PROBE_PAIR = ["a grey cat", "a grey dog"]  # prompts of the same length, to try a pipeline
PROBE_PROMPTS = [*PROBE_PAIR, "", "a grey cat asleep beside a grey dog by the fire"] * (CHUNK // 4)


def read_prompts(path: str, flag: str) -> list[dict]:
    """The rows of a .txt, .jsonl, .json, .csv, .tsv or .parquet file: {"prompt", "metadata": the other fields}. Prints
    how many prompts repeat. Raises InputError, which names `flag`, for any other file."""
    formats = ".txt (UTF-8, a prompt a line), .jsonl, .json, .csv, .tsv or .parquet (pip install pyarrow)"
    if not Path(path).is_file():
        kind = "a folder; give a file in it" if Path(path).is_dir() else f"no file in {Path.cwd()}; give {formats}"
        raise InputError(f"{flag} {path}: is {kind}")
    with reading(f"{flag} {path}", f"give {formats}"):
        fields = read_fields(Path(path).read_bytes(), Path(path).suffix.lower())
    if not fields:
        raise InputError(f"{flag} {path}: holds no prompt; one a line, or a table with a column prompt")
    columns = {name.strip().lower(): name for name in reversed(fields[0])}
    column = next((columns[name] for name in COLUMNS if name in columns), None)
    if column is None:
        raise InputError(f"{flag} {path}: has no column prompt, text or caption; rename one of {', '.join(fields[0])} "
                         "(a table begins with a header; JSON is a list of objects, or an object a line)")
    for i, row in enumerate(fields, 1):
        prompt = row.get(column)
        if not isinstance(prompt, str) or not prompt.strip() or NO_TEXT.search(prompt):
            raise InputError(f"{flag} {path}: row {i} has no text as its {column} ({prompt!r:.50}); give a "
                             "table with a header, or a list of JSON objects, or an object a line")
    rows = [{"prompt": row.pop(column).strip(), "metadata": row} for row in fields]
    if repeated := len(rows) - len({row["prompt"] for row in rows}):
        tqdm.write(f"note: {flag} {path}: {repeated} of {len(rows)} prompts repeat an earlier one; all are kept")
    return rows


def read_fields(content: bytes, suffix: str) -> list[dict]:
    """A file's rows with all their fields, by its content and its suffix."""
    if content.startswith(b"PAR1") or suffix == ".parquet":
        from pyarrow import BufferReader, parquet  # an optional package

        rows = parquet.read_table(BufferReader(content)).to_pylist()  # in JSON's types; bytes (pictures) become None
        return json.loads(json.dumps(rows, default=lambda value: None if isinstance(value, bytes) else str(value)))
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is binary, or not UTF-8: for that, `iconv -f latin1 -t utf-8`")
    if "\0" in text:
        raise ValueError("holds NULs: it is binary, or UTF-16 without a BOM")
    if re.match(r"\s*(<!doctype|<html|version https://git-lfs)", text, re.I):
        raise ValueError("a web page, or a pointer of git-lfs, is there in place of the file: download it again")
    lines = [line.strip() for line in re.split("\r\n?|\n", text) if line.strip()]
    if (whole := read_json(text, (list, dict))) is not None:
        rows = whole if isinstance(whole, list) else [whole]
        return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    named_json, is_table = suffix in (".json", ".jsonl"), suffix in (".csv", ".tsv")
    rows = [read_json(line, (dict, str) if named_json else dict) for line in lines]
    is_json = [row is not None for row in rows]
    if named_json or (all if is_table else any)(is_json):
        if not all(is_json):
            raise ValueError(f"row {rows.index(None) + 1} is no JSON object or text")
        return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    header = re.split("[,;\t]", lines[0].lower().replace('"', "")) if lines else []
    is_header = all(map(str.isidentifier, header)) and {*COLUMNS[:2 if len(header) == 1 else 4]} & {*header}
    if is_table or is_header:
        return read_table(text, "\t" if suffix == ".tsv" else max(",;\t", key=lines[0].count))
    if lines and suffix not in ("", ".txt"):
        raise ValueError("it is neither JSON nor a table; if each line is a prompt, name it .txt")
    return [{"prompt": line} for line in lines]


def read_json(text: str, kind: type | tuple[type, ...]):
    """JSON of a kind (dict, list, str), or None. NaN in it becomes None."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=lambda _: None)
        return value if isinstance(value, kind) else None


def read_table(text: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[dict]:
    """The rows of a table with a header. In one with tabs quotes may be part of a cell, as in PartiPrompts."""
    try:
        table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        header, *rows = [row for row in table if any(map(str.strip, row))]
        if delimiter == "\t" and any("\t" in cell for row in rows for cell in row):
            raise csv.Error("a quote swallowed the next cells")
    except csv.Error:
        if delimiter == "\t" and quoting != csv.QUOTE_NONE:
            return read_table(text, delimiter, csv.QUOTE_NONE)
        raise
    if len({*filter(None, header)}) < len([*filter(None, header)]):
        raise ValueError("two columns have one name")
    if long := [i for i, row in enumerate(rows, 1) if len(row) > len(header)]:
        raise ValueError(f"row {long[0]} has more cells than the header: put text with {delimiter!r} in quotes")
    return [dict(zip(header, row)) for row in rows]


def eval_file(args) -> str | None:
    """The file of a run's held-out prompts; None if they are a part of --prompts."""
    return args.eval_prompts or ("tiny/eval_prompts.txt" if args.prompts == "tiny/prompts.txt" else None)


def read_split(args) -> tuple[list[dict], list[dict]]:
    """The rows to train on, and the held-out ones: a file's, or the last tenth of the distinct prompts (1 to 64)."""
    rows, file = read_prompts(args.prompts, "--prompts"), eval_file(args)
    if file:
        return rows, read_prompts(file, "--eval-prompts")
    distinct = list(dict.fromkeys(row["prompt"] for row in rows))
    held_out = distinct[-min(64, max(1, len(distinct) // 10)):]
    if len(distinct) == 1:
        raise InputError(f"--prompts {args.prompts}: has one prompt, none to evaluate on; give --eval-prompts")
    print(f"{args.prompts}: the last {len(held_out)} of {len(distinct)} prompts are held out (no --eval-prompts)")
    return [row for row in rows if row["prompt"] not in held_out], [row for row in rows if row["prompt"] in held_out]


# ---------------------------------------------------------------- what a model is made for

def tokenizers_of(pipe) -> list:
    """The pipeline's tokenizers in the order of their names: tokenizer, tokenizer_2, ..."""
    parts = [part for name, part in sorted(pipe.components.items()) if name.startswith("tokenizer")]
    return [getattr(part, "tokenizer", part) for part in parts if part is not None]  # a processor has one


def sizes_of(pipe) -> tuple[int, int]:
    """The pipeline's default size in pixels (0: unknown), and the size that its VAE is made for (unknown: the same)."""
    default = getattr(call_parameters(pipe).get("height"), "default", None)
    default = default or getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
    vae_size = pipe.vae.config.get("sample_size") if getattr(pipe, "vae", None) else None
    return default, vae_size if isinstance(vae_size, int) else default


def call_settings(pipe, size: int | str | None, frames: int | None) -> dict:
    """The pipeline's arguments besides steps and guidance. If no size is given and the VAE is made for less than the
    pipeline's default, the VAE's size. The text length is at most what the last tokenizer reads."""
    parameters, tokenizers, (default, vae_size) = call_parameters(pipe), tokenizers_of(pipe), sizes_of(pipe)
    length = getattr(parameters.get("max_sequence_length"), "default", None)
    if length:
        length = min(length, tokenizers[-1].model_max_length)
    if size is None and vae_size < default and "height" in parameters and parameters["height"].default is None:
        size = vae_size
    width, height = width_and_height(size) or (None, None)
    settings = {"height": height, "width": width, "num_frames": frames, "frames": frames, "max_sequence_length": length,
                "enable_prompt_rewrite": False,  # rewards judge the prompt that was given
                "use_resolution_binning": False}  # the transformer draws in the size that was given
    return {name: value for name, value in settings.items() if value is not None and name in parameters}


def warn_unsuitable(pipe, prompts: list[str], size: int | str | None):
    """Print a note if prompts are longer than any tokenizer can read, and one if `size` is far from the model's."""
    tokenizers, made_for = tokenizers_of(pipe), min(sizes_of(pipe))
    limits = [tokenizer.model_max_length for tokenizer in tokenizers]
    limits[-1] = pipe.flow.settings.get("max_sequence_length", limits[-1])
    warn_cut(type(pipe).__name__, prompts, list(zip(tokenizers, limits)))
    width, height = width_and_height(size) or (made_for, made_for)
    if made_for and not made_for / 2 <= (width * height) ** 0.5 <= made_for * 2:
        tqdm.write(f"note: --size {size}: {type(pipe).__name__} was made for pictures of {made_for} pixels a side")


def warn_cut(reader: str, prompts: list[str], limits: list[tuple]):
    """Print a note if prompts are longer than `reader` reads: in all of its limits, each (tokenizer, tokens)."""
    unique = list(dict.fromkeys(prompts))
    cut = [prompt for prompt in unique if all(len(tokenizer(prompt).input_ids) > most for tokenizer, most in limits)]
    if cut:
        tqdm.write(f"note: {len(cut)} of {len(unique)} prompts are longer than the {max(most for _, most in limits)} "
                   f"tokens that {reader} reads; the end is lost, first of {cut[0][:80]!r}")


# ---------------------------------------------------------------- encoding

@contextmanager
def text_encoders(pipe):
    """Put the text encoders into the pipeline and on the device; transformer and VAE are on the CPU meanwhile."""
    encoders = pipe.flow.encoders
    if encoders is None:
        raise ValueError("the text encoders are gone: give all prompts to encode_prompts")
    if any(getattr(pipe, name) is not None for name in encoders):  # they are there already
        yield
        return
    others = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for part in others:
        part.to("cpu")
    for encoder in encoders.values():
        encoder.to(pipe.device)
    try:
        with patched(pipe, **encoders):
            yield
    finally:
        for encoder in (pipe.flow.encoders or {}).values():  # they are needed again
            encoder.to("cpu")
        for part in others:
            part.to(pipe.device)


def cache_prompts(pipe):
    """Replace pipe.encode_prompt by one that encodes each prompt once. A batch's encodings must have one length."""
    flow, encode_prompt, signature = pipe.flow, pipe.encode_prompt, inspect.signature(pipe.encode_prompt)

    @torch.no_grad()
    def encode(call: inspect.BoundArguments) -> tuple:
        with text_encoders(pipe):
            encoded = encode_prompt(*call.args, **call.kwargs)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, encoded if isinstance(encoded, tuple) else (encoded,))

    @functools.lru_cache(2)  # a rollout asks for the same batches again and again
    def make_batch(keys: tuple) -> tuple:
        batch = concat_encodings([flow.rows[key] for key in keys])
        return tree_map_only(torch.Tensor, lambda x: x.to(pipe.device), batch)

    @functools.wraps(encode_prompt)
    def cached_encode_prompt(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        keys, single_calls = split_call(call, pipe.device)
        missing = [key for key in single_calls if key not in flow.rows]
        if flow.in_one_go and len(missing) > 1:
            encodings = dict(zip(keys, split_encodings(encode(call), len(keys))))
        else:
            encodings = {key: encode(single_calls[key]) for key in missing}
        cache_encodings(flow, {key: encodings[key] for key in missing})
        encoded = make_batch(tuple(keys))
        return encoded if len(encoded) > 1 else encoded[0]
    pipe.encode_prompt = cached_encode_prompt


def split_call(call: inspect.BoundArguments, device: torch.device) -> tuple[list[tuple], dict]:
    """Split a call of encode_prompt for n prompts into calls for one prompt each. Returns n keys, and the call for each
    different key. A key is (settings, prompt, negative prompt, ...). `call` itself gets its default arguments."""
    call.apply_defaults()
    arguments = call.arguments
    prompts = arguments["prompt"] or [""] * arguments.get("batch_size", 1)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    lists = {"prompt": prompts} | {name: list(value) for name, value in arguments.items() if "prompt" in name
                                   and isinstance(value, list) and len(value) == len(prompts)}
    settings = [value for name, value in arguments.items() if name not in {*lists, "batch_size", "device", "dtype"}]
    keys = [(repr(settings), *values) for values in zip(*lists.values())]
    # inspect.BoundArguments leaves out what encode_prompt does not take
    arguments |= {**lists, "batch_size": len(prompts), "device": device}
    calls = {}
    for key in keys:
        values = {name: [value] for name, value in zip(lists, key[1:])}
        calls[key] = inspect.BoundArguments(call.signature, {**arguments, **values, "batch_size": 1})
    return keys, calls


def cache_encodings(flow, encodings: dict[tuple, tuple]):
    """Put {key: encoding} into the cache, and note the shapes."""
    flow.rows |= encodings
    for key, encoding in encodings.items():
        shapes = str([value.shape for value in encoding if torch.is_tensor(value)])
        flow.shapes[key[1]] = flow.shapes.get(key[1], frozenset()) | {shapes}


def encodes_in_one_go(pipe) -> bool:
    """Try whether one call for several prompts gives what a call for each gives: the same up to rounding, from tokens
    that are always padded to one length."""
    lengths = set()

    def record(encoder, args, kwargs):
        tokens = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.ndim == 2]
        lengths.update((encoder, x.shape[1]) for x in tokens if not x.is_floating_point())
    with text_encoders(pipe), ExitStack() as hooks:
        for encoder in pipe.flow.encoders.values():
            hooks.enter_context(encoder.register_forward_pre_hook(record, with_kwargs=True))
        for prompt in PROBE_PROMPTS:
            run_loop(pipe, [prompt])
        singles = pipe.flow.rows
        with patched(pipe.flow, in_one_go=True, rows={}, shapes={}):
            run_loop(pipe, PROBE_PROMPTS)
            same = all(nearly_equal(encoding, singles.get(key)) for key, encoding in pipe.flow.rows.items())
    return same and 0 < len(lengths) == len({encoder for encoder, _ in lengths})


def nearly_equal(a, b) -> bool:
    """Whether two encodings are equal up to rounding."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(nearly_equal, a, b))
    if not torch.is_tensor(a) or not torch.is_tensor(b):
        return a is b
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 0.03 * a.float().norm())


def concat_encodings(encodings: list):
    """Make one batch from the encodings of single prompts. Tensors are concatenated along their batch dimension, the
    first of size 1. A list of one item holds one prompt; a longer list holds one item per layer. Anything else (None)
    is the same for all prompts."""
    first = encodings[0]
    if isinstance(first, list) and len(first) == 1:
        return [encoding[0] for encoding in encodings]
    if isinstance(first, (tuple, list)):
        return type(first)(concat_encodings(items) for items in zip(*encodings))
    if torch.is_tensor(first) and 1 in first.shape:
        return torch.cat(encodings, list(first.shape).index(1))
    return first


def split_encodings(batch: tuple, n: int) -> list[tuple]:
    """The reverse of concat_encodings: the encodings of n single prompts, along the first dimension of size n."""
    def select(value, i):
        if isinstance(value, list):
            return value[i:i + 1] if len(value) == n else [select(layer, i) for layer in value]
        if torch.is_tensor(value) and n in value.shape:
            return value.narrow(list(value.shape).index(n), i, 1).clone()
        return value
    return [tuple(select(value, i) for value in batch) for i in range(n)]


def batches(pipe, prompts: list[str], size: int, guidance: float | None = None) -> list[list[int]]:
    """Divide the indices of prompts into batches of at most `size`. The encodings of a batch have one length, so that
    none is padded: the model might attend to padding."""
    for prompt in set(prompts) - pipe.flow.shapes.keys():  # encode_prompts was not given it
        run_loop(pipe, [prompt])
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(pipe.flow.shapes.get(prompt), []).append(i)
    size = 1 if pipe.flow.one_by_one.get(guidance) else size
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def encode_all(pipe, prompts: list[str], scales: list[float], store: Path | None):
    """Encode each prompt once, without guidance and with each scale of it, and remove the text encoders. Encodings are
    kept in the folder `store`, and those that are there already are read. A file's name depends on all that changes its
    content."""
    flow, unique = pipe.flow, list(dict.fromkeys(prompts))
    size = CHUNK if flow.in_one_go else 1
    precision = [encoder.dtype for encoder in flow.encoders.values()], pipe.device.type
    settings = scales, flow.settings, precision, torch.__version__, transformers.__version__
    with ExitStack() as stack:
        for i in progress(range(0, len(unique), size), desc="encode prompts", leave=False):
            chunk = (unique[i:i + size] + [""] * size)[:size]
            name = hashlib.sha256(repr((chunk, settings)).encode()).hexdigest()[:16]
            file = store and store / f"{name}.pt"
            if file and load_encodings(flow, file):
                continue
            stack.enter_context(text_encoders(pipe))
            known = len(flow.rows)
            for scale in dict.fromkeys([None, *scales]):
                run_loop(pipe, chunk, guidance=scale)
            cache_encodings(flow, share_tensors(list(flow.rows.items())[known:]))
            if file:
                content = io.BytesIO()
                torch.save(dict(list(flow.rows.items())[known:]), content)
                store.mkdir(parents=True, exist_ok=True)
                write_files({file: content.getvalue()})
                load_encodings(flow, file)  # the cache then refers to the file, and memory is freed
        flow.encoders = None


def share_tensors(encodings: list[tuple[tuple, tuple]]) -> dict[tuple, tuple]:
    """Make equal tensors of one prompt, or of neighbours with the same settings, one tensor, to save memory."""
    shared = {}
    for key, encoding in encodings:
        known = [x for part in key[:2] for x in shared.get(part, ()) if torch.is_tensor(x)]
        shared[key] = tuple(next((x for x in known if torch.is_tensor(value) and torch.equal(x, value)), value)
                            for value in encoding)
        shared[key[0]] = shared[key[1]] = shared[key]  # the latest
    return {key: shared[key] for key, _ in encodings}


def load_encodings(flow, file: Path) -> bool:
    """Put a file's encodings into the cache; tensors stay on disk until used. False if it is missing or damaged."""
    with suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        cache_encodings(flow, torch.load(file, mmap=True, weights_only=True))
        return True
    return False
