"""A run's folder: is it ours, where did it stop, and the checkpoint that it resumes from."""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flow.cli import fail, make_dir, reason
from flow.lora import save_lora
from flow.pictures import plot_curves


def find_run(name: str, args) -> tuple[Path, dict | None]:
    """The run's folder and the state to resume from, if any. A run with other args or an unreadable checkpoint ends the
    process before anything is touched."""
    reward = "+".join(Path(r).name.replace(".py:", "-").replace(":", "") for r in args.reward.split(","))
    out = Path(args.out or f"runs/{name}-{Path(args.model).name}-{reward}-lam{args.lam:g}-s{args.seed}")
    args_file, state_file, state = out / "args.json", out / "checkpoint" / "state.pt", None
    if args_file.exists():
        try:
            theirs = json.loads(args_file.read_text())
        except ValueError as e:
            fail(f"{args_file}: cannot be read ({reason(e)}); restore it, or give another --out")
        mine = {k: v for k, v in asdict(args).items() if k != "out"}
        differ = [f"--{k.replace('_', '-')} ({theirs.get(k)} there, {v} here)" for k, v in mine.items()
                  if theirs.get(k) != v]
        if differ:
            fail(f"--out {out}: holds a run with other args: {', '.join(differ)}; give another --out, or the same args "
                 "to resume it")
    if state_file.exists():
        try:
            state = torch.load(state_file, weights_only=True, map_location="cpu")
        except Exception as e:  # torch raises what its unpickler or zip reader raises
            fail(f"{state_file}: cannot be read ({type(e).__name__}); restore it, or delete {out} to start over")
        if state["epoch"] == args.epochs:
            print(f"{out}: this run is finished ({args.epochs} epochs); give another --out to run again")
            sys.exit(0)
        log = out / "metrics.jsonl"
        if not log.exists() or log.stat().st_size < state["log_bytes"]:
            fail(f"{log}: is shorter than the checkpoint knows it; restore it, or give another --out")
    elif args_file.exists():
        print(f"{out}: holds no checkpoint yet; starts over")
    return out, state


def open_folder(run):
    """Make the folder and args.json: the args, and what else the model's input depends on. Lines of the log that the
    checkpoint does not know are written anew."""
    make_dir(run.out / "checkpoint", "--out")
    make_dir(run.out / "samples", "--out")
    args_file = run.out / "args.json"
    if not args_file.exists():
        recorded = {k: v for k, v in asdict(run.args).items() if k != "out"}
        recorded["max_sequence_length"] = run.pipe.seam.settings.get("max_sequence_length")
        args_file.with_suffix(".tmp").write_text(json.dumps(recorded, indent=2) + "\n")
        args_file.with_suffix(".tmp").replace(args_file)
    with open(run.out / "metrics.jsonl", "a") as log:
        log.truncate(run.state["log_bytes"] if run.state else 0)


def resume(run):
    """Put back what the checkpoint knows, if there is one."""
    if run.state:
        set_peft_model_state_dict(run.pipe.transformer, run.state["lora"])
        run.opt.load_state_dict(run.state["opt"])
        run.step, run.skipped, run.bad = (run.state[k] for k in ("step", "skipped", "bad"))
        print(f"{run.out}: resumed at epoch {run.epoch}")


def save_checkpoint(run, epoch: int, **state):
    """lora/ and curves.png, then all that the next epoch depends on, to a temporary name and renamed: a run killed in
    between does the epochs since the checkpoint again and writes the same files."""
    save_lora(run.pipe, run.out / "lora")
    plot_curves(run.out)
    tmp = run.out / "checkpoint" / "state.tmp"
    torch.save({"lora": get_peft_model_state_dict(run.pipe.transformer), "opt": run.opt.state_dict(), "epoch": epoch,
                "step": run.step, "skipped": run.skipped, "bad": run.bad, **state,
                "log_bytes": (run.out / "metrics.jsonl").stat().st_size}, tmp)
    tmp.replace(tmp.with_name("state.pt"))
