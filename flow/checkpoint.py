"""A run's folder: whose it is, where it stopped, and the checkpoint that it resumes from. Nothing that the run itself
has not written is overwritten or deleted."""
import fcntl
import io
import json
import sys
import uuid
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flow.card import write_card
from flow.cli import InputError, check_place, fingerprint, json_text, make_dir, reason, write_files
from flow.distributed import PROCESSES, RANK
from flow.lora import base_dtype, save_lora, swapped
from flow.pictures import plot_curves
from flow.rewards import reward_model, short_reward, split_reward

# may differ when a run is resumed: these leave it bit for bit what it would be, and those but for rounding
FREE = ["epochs", "save_every", "eval_every", "wandb"]
NEARLY_FREE = ["batch", "rollout_batch", "checkpointing", "compile", "shard"]
HELD = []  # locks
FORMAT = 2  # of args.json; another one is of code that computed other advantages, noise levels and averages
FOLDERS = "samples", "lora", "checkpoint"
FILES = ("args.json", "metrics.jsonl", "curves.png", "lora/pytorch_lora_weights.safetensors", "lora/README.md",
         "checkpoint/state.pt", "checkpoint/lock")


def machine(device: torch.device) -> dict:
    """What a run's last bits depend on besides its flags, as args.json records it."""
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "dtype": str(base_dtype(device)).removeprefix("torch."), "threads": torch.get_num_threads(),
            "processes": PROCESSES,
            "versions": {library: version(library) for library in ("torch", "diffusers", "transformers", "peft")}}


def revision(model: str) -> str | None:
    """The commit of a hub model in the local cache; None of a folder, and of what is not there yet."""
    if Path(model).is_dir():
        return None
    try:
        file = try_to_load_from_cache(model, "model_index.json")
    except ValueError:  # no hub id, but a folder that is gone: load_pipeline says so
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def inputs_of(args) -> dict[str, str | None]:
    """Fingerprints of what the run reads, by flag; None of what cannot be known."""
    rewards = [reward_model(name) for name, _ in split_reward(args.reward)]
    return {"prompts": fingerprint(args.prompts), "eval_prompts": fingerprint(args.eval_prompts),
            "model": fingerprint(args.model) or revision(args.model),
            "reward": " ".join(str(fingerprint(part)) for part in rewards)}


def lock(out: Path):
    """Hold a folder until the run or the process ends; end it now if another run holds it."""
    if RANK > 0:
        return  # the first process holds it for all
    HELD.append(open(out / "checkpoint" / "lock", "a"))
    try:
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"--out {out}: another process is at work there; give another --out")


def unlock():
    """Let go of the folders that this process holds."""
    while HELD:
        HELD.pop().close()


def find_run(name: str, args, device: torch.device) -> tuple[Path, dict | None]:
    """The run's folder and the state to resume from, if any. Whatever is no unfinished run of this command ends the
    process before anything is touched."""
    reward = short_reward(args.reward).replace(",", "+").replace(".py:", "-").replace(":", "")
    lam = args.lam if args.lam == "auto" else f"{args.lam:g}"
    out = Path(args.out or f"runs/{name}-{Path(args.model).name}-{reward}-lam{lam}-s{args.seed}")
    check_place(out, "--out", FILES, FOLDERS)
    check_place(out, "--out", tuple(f"samples/{path.name}" for path in (out / "samples").glob("[0-9]" * 5 + ".*")))
    args_file, state_file, log = out / "args.json", out / "checkpoint" / "state.pt", out / "metrics.jsonl"
    files = [path for part in (*FILES, *FOLDERS, "samples.jsonl") for path in (out / part, *(out / part).rglob("*"))]
    files = [path for path in files if path.is_file() and path.name != "lock"]  # left by a run killed at its start
    found = sorted({path.relative_to(out).parts[0] for path in files})
    if not found:
        return out, None
    theirs = read_args(args_file, f"train_{name}.py") if args_file.exists() else None
    if theirs is None:
        raise InputError(f"--out {out}: {', '.join(found)} there is not of a run of train_{name}.py; give another "
                         "--out")
    if theirs.get("format") != FORMAT:
        raise InputError(f"--out {out}: the run there was begun by an earlier version of this code, which computed "
                         "advantages, DPO's noise levels and --ema otherwise; finish it with that version, or give "
                         "another --out")
    mine = {flag: value for flag, value in json.loads(json_text(asdict(args))).items() if flag != "out"}
    theirs = json.loads(json_text(asdict(type(args)()))) | theirs  # a flag that is newer than the run had its default
    differ = [f"--{flag.replace('_', '-')} ({theirs[flag]} there, {value} here)" for flag, value in mine.items()
              if flag not in FREE + NEARLY_FREE and theirs[flag] != value]
    if differ:
        raise InputError(f"--out {out}: holds a run with other args: {', '.join(differ)}; give another --out, or the "
                         "same args to resume it")
    check_inputs(out, args, theirs)
    if not (out / "checkpoint").is_dir() or not state_file.exists() and last_epoch(log) >= theirs["save_every"]:
        raise InputError(f"--out {out}: its checkpoint is gone; restore {state_file}, or give another --out")
    lock(out)
    if not state_file.exists():
        print(f"{out}: holds no checkpoint yet; starts over")
        return out, None
    state = read_state(state_file, {"old": list} if name == "nft" else {})
    if state["epoch"] > args.epochs:
        raise InputError(f"--epochs {args.epochs}: the run in {out} has done {state['epoch']}")
    if state["epoch"] == args.epochs:
        print(f"{out}: this run is finished ({args.epochs} epochs); a larger --epochs goes on with it")
        sys.exit(0)
    check_log(log, state["log_bytes"])
    rounding = [f"--{flag.replace('_', '-')}" for flag in NEARLY_FREE if theirs[flag] != mine[flag]]
    here = machine(device)
    for there in (theirs, *theirs["resumed_on"]):
        there, now = ({**record, **record["versions"]} for record in (there, here))
        rounding += [f"{what} ({there[what]} there, {now[what]} here)" for what in now
                     if what != "versions" and there[what] != now[what]]
    if rounding := dict.fromkeys(rounding):
        print(f"{out}: {', '.join(rounding)} changed: from here on equal to an uninterrupted run but for rounding")
    return out, state


def check_inputs(out: Path, args, theirs: dict):
    """End the process if what a run reads is not what it was when the run began, as its args.json tells."""
    changed = [f"--{flag.replace('_', '-')} {getattr(args, flag)}" for flag, value in inputs_of(args).items()
               if value is not None and theirs["inputs"].get(flag) not in (value, None)]
    if changed:
        raise InputError(f"--out {out}: {' and '.join(changed)} changed since the run began; restore it, or give "
                         "another --out")


def read_args(file: Path, script: str) -> dict | None:
    """args.json of a run of this script, or None."""
    try:
        args = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read ({reason(e)}); restore it, or give another --out")
    known = {"script": str, "inputs": dict, "save_every": int, "epochs": int}
    ours = isinstance(args, dict) and all(isinstance(args.get(name), kind) for name, kind in known.items())
    return args if ours and args["script"] == script else None


def check_log(log: Path, size: int):
    """End the process unless a run's log is there, as long as the checkpoint knows it, and as it was written."""
    try:
        content = log.read_bytes()
        if len(content) < size:
            raise ValueError("it is shorter than the checkpoint knows it")
        if not all(isinstance(json.loads(line), dict) for line in content[:size].splitlines()):
            raise ValueError("a line is no JSON object")
    except (OSError, ValueError) as e:
        raise InputError(f"{log}: cannot be read ({reason(e)}); restore it, or give another --out")


def last_epoch(log: Path) -> int:
    """The highest epoch of a training step in metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return max((line["epoch"] for line in lines if "loss" in line), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # it has not come to that


def read_state(file: Path, more: dict[str, type]) -> dict:
    """The checkpoint, whole and of finite numbers, or end the process. `more`: what a method keeps besides."""
    why = ""
    try:
        with zipfile.ZipFile(file) as opened:  # torch's format; its checksums are not looked at by torch
            why = opened.testzip() and "a checksum is wrong"
        state = torch.load(file, weights_only=True, map_location="cpu")
        known = {"lora": dict, "opt": dict, "epoch": int, "step": int, "skipped": int, "bad": int, "log_bytes": int}
        known |= more
        lacks = sorted(name for name, kind in known.items() if not isinstance(state.get(name), kind))
        if not why and lacks:
            why = f"it lacks {', '.join(lacks)}"
        if not why and not all(x.isfinite().all() for x in tensors(state)):
            why = "it holds numbers that are not finite"
    except Exception as e:  # torch and zipfile raise what their readers raise
        why = type(e).__name__
    if why:
        raise InputError(f"{file}: cannot be read ({why}); restore it, or give another --out")
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
        raise InputError(f"--out {run.out}: another process has been at work there; give another --out")
    make_dir(run.out / "checkpoint", "--out")
    make_dir(run.out / "samples", "--out")
    lock(run.out)
    args = {flag: value for flag, value in asdict(run.args).items() if flag != "out"}
    here = machine(run.pipe.flow.device)
    first, resumed_on, known = here, [], {}
    if run.state:
        known = json.loads(args_file.read_text())
        check_inputs(run.out, run.args, known)  # again: to load a hub model may have brought another revision
        first, resumed_on = {name: known[name] for name in here}, known["resumed_on"]
        resumed_on += [here] if here not in (first, *resumed_on) else []
    run.wandb_id = known.get("wandb_id") or (uuid.uuid4().hex[:8] if run.args.wandb else None)
    recorded = {"script": f"train_{run.name}.py", "format": FORMAT, **args, **first, "resumed_on": resumed_on,
                "wandb_id": run.wandb_id, "inputs": inputs_of(run.args),
                "max_sequence_length": run.pipe.flow.settings.get("max_sequence_length")}
    write_files({args_file: json.dumps(recorded, indent=2) + "\n"})
    with open(run.out / "metrics.jsonl", "a") as log:
        log.truncate(run.state["log_bytes"] if run.state else 0)


def resume(run):
    """Put back what the checkpoint knows, if there is one that fits."""
    if run.state:
        saved, now = run.state["lora"], get_peft_model_state_dict(run.pipe.transformer)
        try:
            fits = {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in now.items()}
            for i, moments in run.state["opt"]["state"].items():
                fits = fits and moments["exp_avg"].shape == moments["exp_avg_sq"].shape == run.params[i].shape
            fits = fits and [x.shape for x in run.state.get("old", run.params)] == [p.shape for p in run.params]
            run.opt.load_state_dict(run.state["opt"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # an optimizer's state of another form
            fits = False
        if not fits:
            raise InputError(f"{run.out}/checkpoint/state.pt: does not fit the model; restore it, or give another "
                             "--out")
        set_peft_model_state_dict(run.pipe.transformer, saved)
        for average, saved in zip(run.ema or (), run.state.get("ema") or ()):
            average.copy_(saved)
        run.step, run.skipped, run.bad = (run.state[k] for k in ("step", "skipped", "bad"))
        print(f"{run.out}: resumed at epoch {run.epoch}")


def save_checkpoint(run, epoch: int, **state):
    """lora/ and curves.png, then all that the next epoch depends on: a run that is killed, or has filled the disk, in
    between does the epochs since the checkpoint again and writes the same files."""
    with swapped(run.params, run.ema):
        save_lora(run.pipe, run.out / "lora")
    write_card(run)
    embedded = run.pipe.transformer.config.get("guidance_embeds")  # training is told the same guidance
    plot_curves(run.out, None if embedded else run.args.guidance)
    content = io.BytesIO()  # torch itself does not say that a disk is full
    torch.save({"lora": get_peft_model_state_dict(run.pipe.transformer), "opt": run.opt.state_dict(), "epoch": epoch,
                "step": run.step, "skipped": run.skipped, "bad": run.bad, "ema": run.ema, **state,
                "log_bytes": (run.out / "metrics.jsonl").stat().st_size}, content)
    write_files({run.out / "checkpoint" / "state.pt": content.getvalue()})
