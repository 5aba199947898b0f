"""How fast a model trains on this machine, without its weights: a run's phases at full shape with random weights.

    python -m flow.cost.bench --model black-forest-labs/FLUX.1-dev --size 512 --batch 4
    python -m flow.cost.bench --model tiny/sd3 --size 64 --reward tiny/pickscore        # seconds, also without a GPU

Each phase runs once to warm up, then --repeat times; the median counts. FLOPs are counted beforehand on fake tensors.
Next to each peak stands budget.py's estimate for the same precision: bf16 under autocast on a GPU, fp32 without one.
Peaks are the GPU allocator's; without a GPU they are the bytes of tensors that live at once, counted. No network
is needed but for the configs of a hub id that flow/cost/shapes.py does not know.
"""
import json
import statistics
import time
from dataclasses import dataclass, fields

import torch

from flow.cli import one_line_errors, parse, quiet_libraries
from flow.cost import budget
from flow.cost.count import (
    GB,
    SCORED,
    checkpointing,
    count,
    decode_step,
    held,
    metered,
    reference_pass,
    reward_step,
    rollout_step,
    update,
)
from flow.cost.shapes import blank_lora, blank_pipeline, blank_reward, encode
from flow.lora import compile_blocks, merged
from flow.pipeline import decode_size


@dataclass
class Args:
    model: str = "stabilityai/stable-diffusion-3.5-medium"
    """a diffusers folder or hub id; five models are known offline (PUBLISHED in flow/cost/shapes.py)"""
    reward: str = "pickscore"
    """pickscore, hpsv2.1 or a CLIPModel folder; none is not measured"""
    size: int | str | None = 512
    """pixels a side, or WIDTHxHEIGHT"""
    frames: int | None = None
    """frames of a video"""
    steps: int = 14
    """Euler steps of a rollout"""
    batch: int = 4
    """pictures at once in an update"""
    rollout_batch: int | None = None
    """pictures at once in a rollout (None: as --batch)"""
    rank: int = 32
    """LoRA rank"""
    guidance: float | None = None
    """guidance scale of rollouts"""
    guard_guidance: float | None = None
    """guidance scale of the velocities that the guard compares"""
    checkpointing: bool = True
    """gradient checkpointing"""
    compile: bool = False
    """torch.compile the transformer's blocks"""
    repeat: int = 3
    """how often each phase is timed"""
    json: bool = False
    """print JSON instead of the table"""


def timed(run, device: torch.device, repeat: int) -> tuple[float, int]:
    """Median seconds of run(), after one to warm up, and bytes: all that is allocated on a GPU at the most, or without
    one what run() makes."""
    gpu, seconds = device.type == "cuda", []
    run()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    peak = 0 if gpu else metered(run)[0]
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if gpu else peak


def measure(args: Args, device: torch.device) -> list[dict]:
    """Each phase's pictures, seconds, pictures a second, TFLOP/s, and peak GB, measured and estimated."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    flags = budget.Args(**{f.name: getattr(args, f.name) for f in fields(budget.Args) if hasattr(args, f.name)})
    found = count(flags, dtype)
    estimated, flops = budget.peaks(flags, found), found["flops"]
    pipe = blank_pipeline(args.model, device, args.size, args.frames)
    encode(pipe, args.guidance, args.guard_guidance)
    opt = torch.optim.AdamW(blank_lora(pipe, args.rank), fused=device.type == "cuda")
    if args.compile:
        compile_blocks(pipe.transformer)
    n, many = args.batch, args.rollout_batch or args.batch
    chunk = decode_size(pipe)
    with checkpointing(pipe, args.checkpointing):
        train = timed(lambda: update(pipe, n, opt, args.guard_guidance), device, args.repeat)
    with merged(pipe.transformer):
        rollout = timed(lambda: rollout_step(pipe, many, args.guidance), device, args.repeat)
    took = {"update": (n, 1, flops[f"update {args.checkpointing}"] + flops["row"], train),
            "reference": (n, 1, flops["row"], timed(lambda: reference_pass(pipe, n), device, args.repeat)),
            "rollout": (many, args.steps, flops["step"], rollout),
            "decode": (chunk, 1, flops["decode"], timed(lambda: decode_step(pipe, chunk), device, args.repeat))}
    clip = blank_reward(args.reward, device)
    if clip:
        took["reward"] = SCORED, 1, flops["score"], timed(lambda: reward_step(clip, SCORED), device, args.repeat)
    adam = sum(x.numel() * x.element_size() for state in opt.state.values() for x in state.values())
    base = 0 if device.type == "cuda" else held(pipe.transformer) + held(pipe.vae) + adam
    rows = []
    for phase, (pictures, steps, each, (seconds, peak)) in took.items():
        own = {"reward": clip and held(clip), "rollout": found["merged"]}.get(phase, 0) if base else 0
        rows.append({"phase": phase, "pictures": pictures, "seconds": seconds * steps,
                     "pictures_per_s": pictures / seconds / steps, "tflop_per_s": pictures * each / seconds / 1e12,
                     "peak_gb": (peak + base + own) / GB, "estimated_gb": estimated.get(phase)})
    return rows


@one_line_errors()
def main(args: Args):
    """Measure and print."""
    quiet_libraries()
    budget.check_positive(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows = measure(args, device)
    if args.json:
        return print(json.dumps({"device": name, "args": vars(args), "phases": rows}))
    print(f"{args.model}, --size {args.size}, random weights, on {name}; a rollout has --steps {args.steps}, an update "
          "a reference pass in it")
    heads = ["pictures", "seconds", "pictures/s", "TFLOP/s", "peak GB", "estimated GB"]
    print(f"{'phase':10}" + "".join(f"{head:>14}" for head in heads))
    for row in rows:
        estimate = "-" if row["estimated_gb"] is None else f"{row['estimated_gb']:.3f}"
        print(f"{row['phase']:10}{row['pictures']:14}{row['seconds']:14.3f}{row['pictures_per_s']:14.2f}"
              f"{row['tflop_per_s']:14.4f}{row['peak_gb']:14.3f}{estimate:>14}")


if __name__ == "__main__":
    main(parse(Args, __doc__))
