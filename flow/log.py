"""What a run says: metrics.jsonl, wandb if asked for, and its last line."""
import json
import math
from dataclasses import asdict
from pathlib import Path

from flow.cli import InputError, append, json_text
from flow.distributed import RANK


def write_line(run, line: dict):
    """Append to metrics.jsonl, and to wandb if asked for."""
    if RANK > 0:
        return
    append(run.out / "metrics.jsonl", json_text(line) + "\n")
    if run.wandb:
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        run.wandb.log(numbers, step=line["step"])


def digits(value: float, spread: float) -> str:
    """A number with as many decimals as are needed to see a change of `spread`: at least 3."""
    decimals = 2 - math.floor(math.log10(max(spread, 1e-6 * abs(value)))) if 0 < spread < math.inf else 3
    return f"{value:.{min(max(decimals, 3), 15)}f}"


def last_line(run):
    """Print what came of the run: reward and norm ratio of held-out prompts if there are any, first against last."""
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    said = [f"{run.skipped} steps skipped"] if run.skipped else []
    for name in ("reward", "norm_ratio"):
        values = [line[f"eval_{name}"] for line in lines if f"eval_{name}" in line]
        whose = "held-out" if values else "training"
        values = values or [line[name] for line in lines if line.get(name) is not None]
        if values:
            change = abs(values[-1] - values[0]) if name == "reward" else 0.1
            said.append(f"{whose} {name.replace('_', ' ')} {digits(values[0], change)} -> {digits(values[-1], change)}")
    print(f"done: {', '.join(said)}; {run.out}/ holds lora/, samples/, curves.png and metrics.jsonl")


def check_wandb(args):
    """End the process if --wandb is given and cannot be had."""
    try:
        if args.wandb:
            import wandb  # noqa: F401 - no requirement, and slow to import
    except ImportError:
        raise InputError("--wandb: needs a package that is not installed: pip install wandb")


def start_wandb(run):
    """A wandb run that goes on when the training does, or None without --wandb."""
    if not run.args.wandb or RANK > 0:
        return None
    import wandb  # it is there
    return wandb.init(project=run.args.wandb, name=run.out.name, id=run.wandb_id, resume="allow",
                      config=asdict(run.args))


def log_picture(run, file: Path):
    """A grid of samples, to wandb if asked for."""
    if run.wandb:
        import wandb  # it is there
        run.wandb.log({"samples": wandb.Image(str(file))}, step=run.step)
