"""A training run's folder: found, opened, resumed, logged to, saved to. Only files that the run itself wrote are ever
overwritten or deleted."""
import errno
import fcntl
import io
import json
import math
import shlex
import sys
import uuid
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from flow import cli
from flow.cli import InputError, append, check_flags, check_place, fingerprint, make_dir, reading, to_json, write_files
from flow.distributed import PROCESSES, RANK, barrier, base_dtype, local_slice, move_to_cpu, shutdown
from flow.lora import check_compiler, lora_rank, quantization, save_lora, swapped
from flow.pictures import digits, epochs_logged, plot_curves, read_log, summarize
from flow.pipeline import encode_prompts, load_pipeline
from flow.prompts import eval_file, warn_unsuitable
from flow.rewards import KEY, load_reward, reward_model, short_reward, split_reward

# flags that may differ in a resumed run: without an effect on the result, or with a difference in rounding only
MAY_CHANGE = "--epochs", "--save-every", "--eval-every", "--wandb"
CHANGES_ROUNDING = "--batch", "--rollout-batch", "--checkpointing", "--compile", "--shard"
FORMAT = 2  # of args.json; runs of another format had other advantages, noise levels and averages
FOLDERS = "samples", "lora", "checkpoint"
FILES = ("args.json", "metrics.jsonl", "curves.png", "lora/pytorch_lora_weights.safetensors", "lora/README.md",
         "checkpoint/state.pt", "checkpoint/lock")
LOCKS, WANDB = {}, {}  # by folder: this process's open lock file; its wandb run, if it has one


# ---------------------------------------------------------------- flags and models

def check_args(args):
    """Raise InputError, naming the flag, for numbers that cannot work. Flags that a script lacks are skipped."""
    at_least = {"epochs groups rank updates batch rollout_batch timesteps save_every eval_n eval_steps frames": 1,
                "group steps": 2, "seed eval_every lam margin kl guidance guard_guidance": 0}
    check_flags(args, {flag: low for flags, low in at_least.items() for flag in flags.split()})
    if isinstance(args.lam, str) and args.lam != "auto":
        raise InputError(f"--lam {args.lam}: must be at least 0, or auto")
    if args.lam == "auto" and args.guard_guidance is not None:
        raise InputError("--lam auto: needs the loss's gradient at the guarded velocity; with --guard-guidance there "
                         "is none: give a number")
    if args.ema is not None and not 0 < args.ema < 1:
        raise InputError(f"--ema {args.ema}: must be above 0 and below 1")
    if args.groups % PROCESSES or args.eval_n < PROCESSES:
        raise InputError(f"--groups {args.groups} --eval-n {args.eval_n}: with {PROCESSES} processes, the first must "
                         "be a multiple of that and the second no less")
    if args.shard and (PROCESSES == 1 or args.updates > 1 or args.eval_n % PROCESSES or args.quantize != "none"):
        raise InputError("--shard: takes several processes (torchrun), --updates 1, an --eval-n that is a multiple of "
                         "their number, and no --quantize")
    if args.seed >= 2**63:
        raise InputError(f"--seed {args.seed}: must be below 2^63")
    for flag in ("lr", "max_grad_norm", "adv_clip", "power", "nft_beta", "dpo_beta"):
        if not 0 < getattr(args, flag, 1) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")
    quantization(args.quantize)
    check_compiler(args.compile)
    args.rank = lora_rank(args)
    if args.vlm_question and "vlm:" not in ",".join([args.reward, *args.eval_reward]):
        raise InputError("--vlm-question: no reward is a vlm:MODEL that could be asked; leave it out")
    if args.wandb:
        with cli.on_error("--wandb: the package cannot be imported", "; pip install wandb"):
            import wandb  # noqa: F401 - an optional package


def load_models(args, device: torch.device, prompts: list[dict], eval_prompts: list[dict]):
    """(reward, {name: reward that only evaluations use}, pipeline). The rewards are tried on two random pictures of the
    run's size, before the pipeline is loaded if the size is known by then: that can take minutes."""
    def try_rewards(*shape: int):
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        for tried, (row, *_) in rows_of.items():
            tried(images, [row["prompt"]] * 2, [row["metadata"]] * 2)
            move_to_cpu(tried.models)

    reward = load_reward(args.reward, device, question=args.vlm_question)
    others = {}
    for spec in args.eval_reward:
        name = short_reward(spec)
        taken = [KEY.sub("", known) for known in (*reward.names, *others)]
        name = spec if KEY.sub("", name) in taken else name  # so that none is logged under another's name
        others[name] = load_reward(spec, device, question=args.vlm_question, flag="--eval-reward")
    rows_of = {reward: prompts + eval_prompts, **{other: eval_prompts for other in others.values()}}
    for loaded, rows in rows_of.items():
        loaded.check_prompts(rows)
    if args.size and not args.frames:
        try_rewards(3, *reversed(cli.width_and_height(args.size)))  # height, width
    pipe = load_pipeline(args.model, device, args.size, args.frames, args.quantize, args.shard)
    if args.guard_guidance is not None and pipe.transformer.config.get("guidance_embeds"):
        raise InputError(f"--guard-guidance: {type(pipe).__name__} is told --guidance in every call, so the guard sees "
                         "it already; leave the flag out")
    if not args.size or args.frames:
        try_rewards(*pipe.flow.picture)
    warn_unsuitable(pipe, [row["prompt"] for row in prompts + eval_prompts], args.size)
    return reward, others, pipe


def encode_local_prompts(out: Path, args, pipe, prompts: list[dict], eval_prompts: list[dict]):
    """Encode the prompts that this process draws pictures of: its slices of the held-out prompts and of each epoch's.
    They are kept in OUT/checkpoint/prompts for a resumed run."""
    epochs = torch.arange(len(prompts)).split(args.groups)
    local = eval_prompts[local_slice(len(eval_prompts))]
    local = local + [prompts[i] for epoch in epochs for i in epoch[local_slice(args.groups)]]
    local = [row["prompt"] for row in local]
    encode_prompts(pipe, local, args.guidance, out / "checkpoint" / "prompts", args.guard_guidance)
    if args.shard and len({pipe.flow.shapes.get(prompt) for prompt in local}) > 1:  # the processes' calls would differ
        raise InputError(f"--shard: {type(pipe).__name__} encodes prompts to several lengths; it takes a model that "
                         "pads to one")


# ---------------------------------------------------------------- find, open and finish a run

def find_run(method: str, args, device: torch.device) -> tuple[Path, dict | None]:
    """The run's folder, and the checkpoint to resume from (None: a new run). A finished run exits with code 0. Raises
    InputError if the folder holds files of another run, or a damaged one. Writes nothing but the lock."""
    reward = short_reward(args.reward).replace(".py:", "-").replace(":", "").replace(",", "+")
    lam = args.lam if args.lam == "auto" else f"{args.lam:g}"
    out = Path(args.out or f"runs/{method}-{Path(args.model).name}-{reward}-lam{lam}-s{args.seed}")
    check_place(out, "--out", FILES, FOLDERS)
    check_place(out / "samples", "--out", tuple(path.name for path in (out / "samples").glob("[0-9]" * 5 + ".*")))
    files = [path for part in (*FILES, *FOLDERS, "samples.jsonl") for path in (out / part, *(out / part).rglob("*"))]
    files = {path.relative_to(out).parts[0] for path in files if path.is_file() and path.name != "lock"}
    if not files:
        return out, None
    recorded, state_file, log = read_args(out, method, files), out / "checkpoint" / "state.pt", out / "metrics.jsonl"
    before, now, here = flags_of(type(args)(), recorded), flags_of(args), machine(device)
    if changed := differences(before, now, now.keys() - {*MAY_CHANGE, *CHANGES_ROUNDING}):
        raise InputError(f"--out {out}: holds a run with other args: {', '.join(changed)}; give another --out, or the "
                         "same args to resume it")
    check_inputs(out, args, recorded)
    if not state_file.exists() and (not state_file.parent.is_dir() or epochs_logged(log) >= recorded["save_every"]):
        raise InputError(f"--out {out}: its checkpoint is gone; restore {state_file}, or give another --out")
    lock(out)
    if not state_file.exists():
        print(f"{out}: holds no checkpoint yet; starts over")
        return out, None
    saved = read_state(state_file)
    if saved["epoch"] > args.epochs:
        raise InputError(f"--epochs {args.epochs}: the run in {out} has done {saved['epoch']}")
    if saved["epoch"] == args.epochs:
        print(f"{out}: this run is finished ({args.epochs} epochs); a larger --epochs goes on with it")
        sys.exit(0)
    read_log(log, saved["log_bytes"])
    changed = differences(before, now, CHANGES_ROUNDING)
    for there in (recorded, *recorded["resumed_on"]):
        changed += differences(there, here, here.keys() - {"versions"})
        changed += differences(there["versions"], here["versions"], here["versions"])
    if changed:
        print(f"{out}: {', '.join(dict.fromkeys(changed))} changed: from here on equal to an uninterrupted run but for "
              "rounding")
    return out, saved


def flags_of(args, recorded: dict = {}) -> dict:
    """{"--flag": value} of all args but --out, in JSON's types; a value in `recorded` takes precedence."""
    values = json.loads(to_json(asdict(args))) | {"eval_prompts": eval_file(args)}
    return {f"--{name.replace('_', '-')}": recorded.get(name, value) for name, value in values.items() if name != "out"}


def differences(before: dict, now: dict, names) -> list[str]:
    """The names whose values differ, as "--lr (0.1 there, 0.2 here)", in the order of `now`."""
    return [f"{name} ({before[name]} there, {value} here)" for name, value in now.items()
            if name in names and before[name] != value]


def read_args(out: Path, method: str, files: set[str]) -> dict:
    """args.json of a run of this method. Raises InputError if the folder's files are not of such a run."""
    with reading(out / "args.json"):
        recorded = json.loads((out / "args.json").read_text()) if "args.json" in files else None
    kinds = {"script": str, "inputs": dict, "save_every": int, "epochs": int}
    known = isinstance(recorded, dict) and all(isinstance(recorded.get(name), kind) for name, kind in kinds.items())
    if not known or recorded["script"] != f"train_{method}.py":
        raise InputError(f"--out {out}: {', '.join(sorted(files))} there is not of a run of train_{method}.py; give "
                         "another --out")
    if recorded.get("format") != FORMAT:
        raise InputError(f"--out {out}: the run there was begun by an earlier version of this code, which computed "
                         "advantages, DPO's noise levels and --ema otherwise; finish it with that version, or give "
                         "another --out")
    return recorded


def inputs_of(args) -> dict[str, str | None]:
    """Fingerprints of what the run reads, by flag; None where there is nothing to compare."""
    specs = ",".join([args.reward, *args.eval_reward])
    rewards = [str(fingerprint(reward_model(name))) for name, _ in split_reward(specs)]
    return {"prompts": fingerprint(args.prompts), "eval_prompts": fingerprint(eval_file(args) or ""),
            "init_lora": fingerprint(args.init_lora or ""), "reward": " ".join(rewards),
            "model": fingerprint(args.model) or revision(args.model)}


def check_inputs(out: Path, args, recorded: dict):
    """Raise InputError if what a run reads is not what it was when the run began."""
    changed = [f"--{flag.replace('_', '-')} {getattr(args, flag) or eval_file(args)}"
               for flag, value in inputs_of(args).items()
               if value is not None and recorded["inputs"].get(flag) not in (value, None)]
    if changed:
        raise InputError(f"--out {out}: {' and '.join(changed)} changed since the run began; restore it, or give "
                         "another --out")


def revision(model: str) -> str | None:
    """The commit of a hub model in the local cache; None of a folder, and of what is not there yet."""
    try:
        file = None if Path(model).is_dir() else try_to_load_from_cache(model, "model_index.json")
    except ValueError:  # no hub id, but a folder that is gone: load_pipeline says so
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def machine(device: torch.device) -> dict:
    """What a run's rounding depends on besides its flags."""
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "dtype": str(base_dtype(device)).removeprefix("torch."), "threads": torch.get_num_threads(),
            "processes": PROCESSES,
            "versions": {library: version(library) for library in ("torch", "diffusers", "transformers", "peft")}}


def open_run(out: Path, method: str, args, pipe, saved: dict | None, eval_prompts: list[dict]):
    """Make the folder, lock it, write args.json, and start wandb if asked for. Of several processes the first does it.
    Log lines newer than the checkpoint are cut off; the resumed run writes them again."""
    barrier(epoch=saved["epoch"] if saved else 0, step=saved["step"] if saved else 0)
    if RANK == 0:
        file, here = out / "args.json", machine(pipe.device)
        if file.exists() and out not in LOCKS:
            raise InputError(f"--out {out}: another process has been at work there; give another --out")
        make_dir(out / "checkpoint", "--out")
        make_dir(out / "samples", "--out")
        lock(out)
        known = json.loads(file.read_text()) if saved else {**here, "resumed_on": []}
        if saved:
            check_inputs(out, args, known)  # again: loading a hub model may have brought another revision
        first = {name: known[name] for name in here}
        resumed_on = known["resumed_on"] + [here] * (here not in (first, *known["resumed_on"]))
        wandb_id = known.get("wandb_id") or (uuid.uuid4().hex[:8] if args.wandb else None)
        flags = {flag: value for flag, value in asdict(args).items() if flag != "out"}
        flags["eval_prompts"], texts = eval_file(args), [row["prompt"] for row in eval_prompts]
        text = json.dumps({"script": f"train_{method}.py", "format": FORMAT, **flags, **first, "resumed_on": resumed_on,
                           "wandb_id": wandb_id, "inputs": inputs_of(args),
                           "held_out": None if eval_file(args) else list(dict.fromkeys(texts)),
                           "max_sequence_length": pipe.flow.settings.get("max_sequence_length")}, indent=2)
        write_files({file: text + "\n"})
        with open(out / "metrics.jsonl", "a") as log:
            log.truncate(saved["log_bytes"] if saved else 0)
        if args.wandb:
            import wandb  # check_args has found it
            WANDB[out] = wandb.init(project=args.wandb, name=out.name, id=wandb_id, resume="allow", config=asdict(args))
    barrier()


def lock(out: Path):
    """Lock a folder until the run or the process ends. Raises InputError if another run has locked it. Prints a
    warning on a file system without locks."""
    if RANK > 0 or out in LOCKS:
        return  # the first process locks it for all
    LOCKS[out] = open(out / "checkpoint" / "lock", "a")
    try:
        fcntl.lockf(LOCKS[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            LOCKS.pop(out).close()
            raise InputError(f"--out {out}: another process is at work there; give another --out")
        tqdm.write(f"warning: --out {out}: cannot be locked there ({e.strerror}); start no second run in it")


def unlock():
    """Release the locks of this process."""
    while LOCKS:
        LOCKS.popitem()[1].close()


def finish_run(out: Path, skipped: int):
    """Release the folder's lock, and print the run's result."""
    unlock()
    shutdown()
    WANDB.pop(out, None)
    if RANK == 0:
        steps = f"{skipped} steps skipped, " if skipped else ""
        print(f"done: {steps}{summarize(out)}; {out}/ holds lora/, samples/, curves.png and metrics.jsonl")


# ---------------------------------------------------------------- log

def log_step(out: Path, bar, line: dict):
    """Log an optimizer step, and show it on the bar."""
    if torch.cuda.is_available():
        line = {**line, "peak_gb": torch.cuda.max_memory_allocated() / 2**30}
    log_line(out, line)
    ratio = "-" if line["norm_ratio"] is None else f"{line['norm_ratio']:.3f}"
    skipped = {"skipped": line["skipped"]} if line["skipped"] else {}
    bar.set_postfix(reward=digits(line["reward"], line["reward_std"]), norm_ratio=ratio, **skipped)


def log_line(out: Path, line: dict, picture: Path | None = None):
    """Append a line to metrics.jsonl; send its numbers and a picture to wandb if asked for."""
    if RANK > 0:
        return
    append(out / "metrics.jsonl", to_json(line) + "\n")
    if out in WANDB:
        import wandb  # open_run has imported it
        numbers = {name: x for name, x in line.items() if isinstance(x, (int, float)) and math.isfinite(x)}
        WANDB[out].log(numbers | ({"samples": wandb.Image(str(picture))} if picture else {}), step=line["step"])


# ---------------------------------------------------------------- checkpoint

def model_card(method: str, args, eval_prompts: list[dict]) -> str:
    """lora/README.md: a model card for the hub. The user chooses the licence."""
    command, defaults = ["python", f"train_{method}.py"], vars(type(args)())
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if value != defaults[name] and isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != defaults[name]:
            command += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    model, base_model = args.model, f"base_model: {args.model}\n"
    if Path(model).is_dir():  # the hub does not know a folder
        model, base_model = Path(model).name, ""
    guard = f" and NormGuard (arXiv 2606.27771), lam {args.lam}" if args.lam != 0 else ""
    start = f", from the LoRA `{Path(args.init_lora).name}`" if args.init_lora else ""
    prompts = "\n".join(f"- {prompt}" for prompt in dict.fromkeys(row["prompt"] for row in eval_prompts[:4]))
    return f"""---
{base_model}library_name: diffusers
tags: [lora, diffusers, {'normguard, ' if guard else ''}{method}]
---
A LoRA of rank {args.rank} and alpha {args.rank} for `{model}`
(`pipe.load_lora_weights(FOLDER)`), trained for the reward `{args.reward}` with {method.upper()}{guard}{start}:

    {shlex.join(command)}

Prompts to try:

{prompts}
"""


def save_checkpoint(out: Path, method: str, args, pipe, eval_prompts: list[dict], params: list, optimizer, *,
                    epoch: int, step: int, skipped: int, skipped_in_a_row: int, ema: list | None, **copies: list):
    """Write lora/ (of `ema`, if given), curves.png and, at the end, checkpoint/state.pt. A run that is killed before
    that repeats the epochs since the last checkpoint and writes the same files. copies: other lists of tensors like
    params, by name."""
    if RANK > 0:
        return
    with swapped(params, ema):
        save_lora(pipe, out / "lora")
    write_files({out / "lora" / "README.md": model_card(method, args, eval_prompts)})
    embedded = pipe.transformer.config.get("guidance_embeds")  # then training uses the guidance too
    plot_curves(out, None if embedded else args.guidance, args.guard_guidance)
    content = io.BytesIO()  # torch.save to a file does not report a full disk
    torch.save({"lora": get_peft_model_state_dict(pipe.transformer), "opt": optimizer.state_dict(), "epoch": epoch,
                "step": step, "skipped": skipped, "bad": skipped_in_a_row, "ema": ema, **copies,  # bad: in a row
                "log_bytes": (out / "metrics.jsonl").stat().st_size}, content)
    write_files({out / "checkpoint" / "state.pt": content.getvalue()})


def resume(out: Path, saved: dict | None, model: torch.nn.Module, params: list, optimizer,
           **copies: list | None) -> tuple[int, int, int, int]:
    """Restore what the checkpoint holds: the LoRA, the optimizer, and each of `copies` (None: there is none). Returns
    (epochs done, step, skipped, skipped in a row), zeros for a new run. Raises InputError if it does not fit."""
    if saved is None:
        return 0, 0, 0, 0
    lora, now = saved["lora"], get_peft_model_state_dict(model)
    try:
        fits = {name: x.shape for name, x in lora.items()} == {name: x.shape for name, x in now.items()}
        for i, moments in saved["opt"]["state"].items():
            fits = fits and moments["exp_avg"].shape == moments["exp_avg_sq"].shape == params[i].shape
        for name, copy in copies.items():
            fits = fits and (not copy or [x.shape for x in saved[name]] == [x.shape for x in copy])
        optimizer.load_state_dict(saved["opt"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # it is of another form
        fits = False
    if not fits:
        raise InputError(f"{out}/checkpoint/state.pt: does not fit the model; restore it, or give another --out")
    set_peft_model_state_dict(model, lora)
    for name, copy in copies.items():
        for x, value in zip(copy or (), saved.get(name) or ()):
            x.data.copy_(value)
    print(f"{out}: resumed at epoch {saved['epoch']}")
    return saved["epoch"], saved["step"], saved["skipped"], saved["bad"]


def read_state(file: Path) -> dict:
    """The checkpoint. Raises InputError if it is damaged, lacks a part, or holds numbers that are not finite."""
    kinds = {"lora": dict, "opt": dict, "epoch": int, "step": int, "skipped": int, "bad": int, "log_bytes": int}
    with reading(file):
        with zipfile.ZipFile(file) as opened:  # torch.load does not check the checksums
            if opened.testzip():
                raise ValueError("a checksum is wrong")
        state = torch.load(file, weights_only=True, map_location="cpu")
        if lacks := sorted(name for name, kind in kinds.items() if not isinstance(state.get(name), kind)):
            raise ValueError(f"it lacks {', '.join(lacks)}")
        if not all(x.isfinite().all() for x in tree_leaves(state) if torch.is_tensor(x)):
            raise ValueError("it holds numbers that are not finite")
    return state
