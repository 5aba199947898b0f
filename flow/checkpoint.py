"""A run's folder: whose it is, where it stopped, and the checkpoint that it resumes from. Nothing that the run itself
has not written is overwritten or deleted."""
import fcntl
import hashlib
import json
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flow.cli import fail, make_dir, reason
from flow.lora import save_lora
from flow.pictures import plot_curves
from flow.rewards import without_questions

# may differ when a run is resumed; the first four leave it bit for bit what it would be, the others but for rounding
FREE = {"epochs", "save_every", "eval_every", "wandb", "batch", "checkpointing", "compile"}
HELD = []  # locks
OURS = ["args.json", "metrics.jsonl", "samples", "curves.png", "lora", "checkpoint"]


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


def inputs_of(args) -> dict[str, str | None]:
    """Fingerprints of what the run reads, by flag."""
    rewards = [part.rpartition(".py:")[0] + ".py" if ".py:" in part else part.split(":")[0]
               for part in without_questions(args.reward).split(",")]
    return {"prompts": fingerprint(args.prompts), "eval_prompts": fingerprint(args.eval_prompts),
            "model": fingerprint(args.model), "reward": " ".join(str(fingerprint(part)) for part in rewards)}


def lock(out: Path):
    """Hold a folder until the run or the process ends; end it now if another process holds it."""
    HELD.append(open(out / "checkpoint" / "lock", "a"))
    try:
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"--out {out}: another process is at work there; give another --out")


def unlock():
    """Let go of the folders that this process holds."""
    while HELD:
        HELD.pop().close()


def find_run(name: str, args) -> tuple[Path, dict | None]:
    """The run's folder and the state to resume from, if any. Whatever is no unfinished run of this command ends the
    process before anything is touched."""
    rewards = without_questions(args.reward).split(",")
    reward = "+".join(Path(part).name.replace(".py:", "-").replace(":", "") for part in rewards)
    lam = args.lam if args.lam == "auto" else f"{args.lam:g}"
    out = Path(args.out or f"runs/{name}-{Path(args.model).name}-{reward}-lam{lam}-s{args.seed}")
    args_file, state_file, log = out / "args.json", out / "checkpoint" / "state.pt", out / "metrics.jsonl"
    files = [path for part in OURS for path in (out / part, *(out / part).rglob("*"))]
    files = [path for path in files if path.is_file() and path.name != "lock"]  # left by a run killed at its start
    found = sorted({path.relative_to(out).parts[0] for path in files})
    if not found:
        return out, None
    theirs = read_args(args_file, f"train_{name}.py") if args_file.exists() else None
    if theirs is None:
        fail(f"--out {out}: {', '.join(found)} there is not of a run of train_{name}.py; give another --out")
    mine = {flag: value for flag, value in asdict(args).items() if flag != "out"}
    differ = [f"--{flag.replace('_', '-')} ({theirs.get(flag)} there, {value} here)" for flag, value in mine.items()
              if flag not in FREE and theirs.get(flag) != value]
    if differ:
        fail(f"--out {out}: holds a run with other args: {', '.join(differ)}; give another --out, or the same args "
             "to resume it")
    changed = [f"--{flag.replace('_', '-')} {mine[flag]}" for flag, value in inputs_of(args).items()
               if theirs["inputs"].get(flag) != value]
    if changed:
        fail(f"--out {out}: {' and '.join(changed)} changed since the run began; restore it, or give another --out")
    if not (out / "checkpoint").is_dir() or not state_file.exists() and last_epoch(log) >= theirs["save_every"]:
        fail(f"--out {out}: its checkpoint is gone; restore {state_file}, or give another --out")
    lock(out)
    if not state_file.exists():
        print(f"{out}: holds no checkpoint yet; starts over")
        return out, None
    state = read_state(state_file)
    if state["epoch"] > args.epochs:
        fail(f"--epochs {args.epochs}: the run in {out} has done {state['epoch']}")
    if state["epoch"] == args.epochs:
        print(f"{out}: this run is finished ({args.epochs} epochs); a larger --epochs goes on with it")
        sys.exit(0)
    if not log.is_file() or log.stat().st_size < state["log_bytes"]:
        fail(f"{log}: is shorter than the checkpoint knows it; restore it, or give another --out")
    rounding = [f"--{flag}" for flag in ("batch", "checkpointing", "compile") if theirs.get(flag) != mine[flag]]
    if rounding:
        print(f"{out}: {', '.join(rounding)} changed: from here on equal to an uninterrupted run but for rounding")
    return out, state


def read_args(file: Path, script: str) -> dict | None:
    """args.json of a run of this script, or None."""
    try:
        args = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        fail(f"{file}: cannot be read ({reason(e)}); restore it, or give another --out")
    return args if isinstance(args, dict) and args.get("script") == script and "inputs" in args else None


def last_epoch(log: Path) -> int:
    """The highest epoch of a training step in metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return max((line["epoch"] for line in lines if "loss" in line), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # it has not come to that


def read_state(file: Path) -> dict:
    """The checkpoint, whole and of finite numbers, or end the process."""
    why = ""
    try:
        with zipfile.ZipFile(file) as opened:  # torch's format; its checksums are not looked at by torch
            why = opened.testzip() and "a checksum is wrong"
        state = torch.load(file, weights_only=True, map_location="cpu")
        known = {"lora", "opt", "epoch", "step", "skipped", "bad", "log_bytes"}
        if not why and not known <= state.keys():
            why = f"it lacks {', '.join(sorted(known - state.keys()))}"
        if not why and not all(x.isfinite().all() for x in tensors(state)):
            why = "it holds numbers that are not finite"
    except Exception as e:  # torch and zipfile raise what their readers raise
        why = type(e).__name__
    if why:
        fail(f"{file}: cannot be read ({why}); restore it, or give another --out")
    return state


def tensors(value) -> list[torch.Tensor]:
    """All floating-point tensors in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in tensors(part)]
    return [value] if torch.is_tensor(value) and value.is_floating_point() else []


def open_folder(run):
    """Make the folder, hold it, and write args.json: the args, and what else the run depends on. Lines of the log that
    the checkpoint does not know are written anew."""
    args_file = run.out / "args.json"
    if run.began != args_file.exists():
        fail(f"--out {run.out}: another process has been at work there; give another --out")
    make_dir(run.out / "checkpoint", "--out")
    make_dir(run.out / "samples", "--out")
    lock(run.out)
    args = {flag: value for flag, value in asdict(run.args).items() if flag != "out"}
    recorded = {"script": f"train_{run.name}.py", **args, "inputs": inputs_of(run.args),
                "max_sequence_length": run.pipe.seam.settings.get("max_sequence_length")}
    args_file.with_suffix(".tmp").write_text(json.dumps(recorded, indent=2) + "\n")
    args_file.with_suffix(".tmp").replace(args_file)
    with open(run.out / "metrics.jsonl", "a") as log:
        log.truncate(run.state["log_bytes"] if run.state else 0)


def resume(run):
    """Put back what the checkpoint knows, if there is one that fits."""
    if run.state:
        saved, now = run.state["lora"], get_peft_model_state_dict(run.pipe.transformer)
        fits = {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in now.items()}
        for i, moments in run.state["opt"]["state"].items():
            fits = fits and moments["exp_avg"].shape == run.params[i].shape
        if not fits:
            fail(f"{run.out}/checkpoint/state.pt: does not fit the model; restore it, or give another --out")
        set_peft_model_state_dict(run.pipe.transformer, saved)
        run.opt.load_state_dict(run.state["opt"])
        run.step, run.skipped, run.bad = (run.state[k] for k in ("step", "skipped", "bad"))
        print(f"{run.out}: resumed at epoch {run.epoch}")


def write_card(run):
    """lora/README.md: a model card as the hub expects it; the licence is the user's to choose."""
    args, flags = run.args, []
    for field in fields(args):
        value, flag = getattr(args, field.name), field.name.replace("_", "-")
        if value != field.default:
            flags.append({True: f"--{flag}", False: f"--no-{flag}"}.get(value, f"--{flag} {value}"))
    prompts = "\n".join(f"- {prompt}" for prompt in dict.fromkeys(run.eval_prompts[:4]))
    text = f"""---
base_model: {args.model}
library_name: diffusers
tags: [lora, diffusers, normguard, {run.name}]
---
A LoRA of rank {args.rank} for `{args.model}` (`pipe.load_lora_weights(FOLDER)`), trained for the reward
`{args.reward}` with {run.name.upper()} and NormGuard (arXiv 2606.27771), lam {args.lam}:

    python train_{run.name}.py {" ".join(flags)}

Prompts to try:

{prompts}
"""
    (run.out / "lora" / "README.md").write_text(text)


def save_checkpoint(run, epoch: int, **state):
    """lora/ and curves.png, then all that the next epoch depends on, to a temporary name and renamed: a run killed in
    between does the epochs since the checkpoint again and writes the same files."""
    save_lora(run.pipe, run.out / "lora")
    write_card(run)
    plot_curves(run.out)
    tmp = run.out / "checkpoint" / "state.tmp"
    torch.save({"lora": get_peft_model_state_dict(run.pipe.transformer), "opt": run.opt.state_dict(), "epoch": epoch,
                "step": run.step, "skipped": run.skipped, "bad": run.bad, **state,
                "log_bytes": (run.out / "metrics.jsonl").stat().st_size}, tmp)
    tmp.replace(tmp.with_name("state.pt"))
