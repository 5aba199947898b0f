"""What a training run will take, before a weight is downloaded: memory, FLOPs, hours, and the cards that it fits on.

    python -m flow.cost.budget --model black-forest-labs/FLUX.1-dev --size 512 --batch 4 --quantize nf4
    python -m flow.cost.budget --table                      # the table of docs/machines.md; a quarter of an hour

From the model's configs alone (shapes.py) the project's own functions run on fake tensors, which have shapes and no
numbers. Every number is estimated: bytes of tensors that live at once, not what an allocator makes of them. A GB is
2^30 bytes, as in the log's peak_gb. Assumed: transformer in bf16 (or quantized) under autocast, LoRA, Adam, VAE and
reward in fp32; the reward's model on the GPU only while it scores, text encoders only before all else.
"""
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

from flow.cli import InputError, one_line_errors, parse, quiet_libraries
from flow.cost.count import GB, SCORED, count
from flow.cost.shapes import PUBLISHED, WORDS

CARDS = [16, 24, 48, 80]  # GB
RESERVE = 1.0  # GB of a card for CUDA itself and what the allocator leaves between tensors; an assumption
BATCHES = [1, 2, 4, 8, 16, 32, 64]


@dataclass
class Args:
    model: str = "stabilityai/stable-diffusion-3.5-medium"
    """a diffusers folder or hub id; five models are known offline (PUBLISHED in flow/cost/shapes.py)"""
    method: Literal["awm", "nft", "dpo"] = "awm"
    """the training script"""
    reward: str = "pickscore"
    """pickscore, hpsv2.1 or a CLIPModel folder; another reward counts as nothing"""
    size: int | str | None = 512
    """pixels a side, or WIDTHxHEIGHT"""
    frames: int | None = None
    """frames of a video"""
    steps: int = 14
    """Euler steps of a rollout"""
    timesteps: int = 6
    """noise levels at which a picture (DPO: a pair) is trained"""
    group: int = 24
    """pictures a prompt"""
    groups: int = 24
    """prompts an epoch"""
    pairs: int | None = None
    """DPO's pairs a prompt (None: 4, or half of --group)"""
    epochs: int = 100
    """rounds of rollouts and their updates"""
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
    quantize: Literal["none", "int8", "nf4"] = "none"
    """the frozen base's linear layers: none is bf16"""
    tflops: float = 200.0
    """TFLOP/s that a GPU sustains. An assumption, not a measurement: a fifth of an H100's bf16 peak; see bench.py"""
    gpus: int = 1
    """GPUs among which the pictures are divided"""
    table: bool = False
    """all five models at 512 and 1024, as Markdown (docs/machines.md)"""


# ---------------------------------------------------------------- what follows from it

def at(live: dict, n: int) -> float:
    """Live bytes for n pictures, on the line through those that were counted."""
    (low, a), (high, b) = live.items()
    return a + (n - low) * (b - a) / (high - low)


def rows(args: Args, n: int) -> int:
    """Pictures in a micro-batch of --batch n: DPO's come in pairs."""
    return 2 * max(1, n // 2) if args.method == "dpo" else n


def lora_bytes(args: Args, found: dict) -> int:
    """Bytes of the LoRA and of Adam's two moments of it, and of NFT's old policy."""
    return (4 if args.method == "nft" else 3) * found["lora"]


def peaks(args: Args, found: dict) -> dict:
    """GB that each phase takes at most: {phase: GB}."""
    base, unpacked = found["base"][args.quantize]
    fixed = base + found["vae"] + lora_bytes(args, found)
    merged = found["merged"] if args.quantize == "none" else 0  # a rollout's copy of the weights
    bytes_of = {
        "encode": found["text"] + found["encode"],
        "rollout": fixed + unpacked + merged + at(found["rollout"], args.rollout_batch or args.batch),
        "decode": fixed + found["decode"],
        "reward": fixed + found["reward"] + found["score"],
        "update": fixed + unpacked + at(found[f"update {args.checkpointing}"], rows(args, args.batch))}
    return {phase: value / GB for phase, value in bytes_of.items()}


def tflop(args: Args, found: dict) -> dict:
    """TFLOP a picture of an epoch: {phase: TFLOP}."""
    flops, each = found["flops"], args.timesteps
    if args.method == "dpo":
        each *= 2 * (min(4, args.group // 2) if args.pairs is None else args.pairs) / args.group
    frozen = 2 if args.method == "nft" else 1  # the reference, and NFT's old policy
    of = {"rollout": args.steps * flops["step"], "decode": flops["decode"], "reward": flops["score"],
          "reference": each * frozen * flops["row"], "update": each * flops[f"update {args.checkpointing}"]}
    return {phase: value / 1e12 for phase, value in of.items()}


def hours(args: Args, found: dict) -> float:
    """Hours of the run at --tflops, without evaluations and loading."""
    total = sum(tflop(args, found).values()) * args.epochs * args.groups * args.group
    return total / args.tflops / args.gpus / 3600


def largest(args: Args, found: dict, card: float) -> int:
    """The largest batch of BATCHES that fits on a card of so many GB, 0 if none does. Rollouts have --rollout-batch, or
    the same."""
    fits = [n for n in BATCHES if max(peaks(replace(args, batch=n), found).values()) + RESERVE <= card]
    return max(fits, default=0)


def verdict(args: Args, found: dict, card: float) -> str:
    """The largest --batch on a card of so many GB, for a base in bf16, int8 and nf4, with and without checkpointing."""
    said = {}
    for kind in ("none", "int8", "nf4"):
        most = [largest(replace(args, quantize=kind, checkpointing=on), found, card) for on in (True, False)]
        said[kind] = f"{most[0]} / {most[1] or '-'}" if most[0] else "-"
    phase, least = max(peaks(replace(args, quantize="nf4", batch=1), found).items(), key=itemgetter(1))
    return "".join(f"{text:>12}" for text in said.values()) + (
        f"   {phase} takes {least:.1f} GB" if set(said.values()) == {"-"} else "")


# ---------------------------------------------------------------- what is printed

def report(args: Args, found: dict) -> str:
    """The whole budget as plain text."""
    top, pictures = peaks(args, found), rows(args, args.batch)
    base = "bf16" if args.quantize == "none" else args.quantize
    holds = {f"transformer ({base})": found["base"][args.quantize][0], "VAE (fp32)": found["vae"],
             "LoRA and Adam (fp32)": lora_bytes(args, found),
             "reward's model (fp32), while it scores": found["reward"],
             "text encoders (bf16), while they encode": found["text"]}
    live = {"encode": (found["encode"], f"{found['together']} at once, {WORDS} words each"),
            "rollout": (at(found["rollout"], args.rollout_batch or args.batch),
                        f"--rollout-batch {args.rollout_batch or args.batch}"),
            "decode": (found["decode"], "a megapixel at a time"), "reward": (found["score"], f"{SCORED} pictures"),
            "update": (at(found[f"update {args.checkpointing}"], pictures), f"--batch {args.batch}")}
    lines = [f"{args.model}, {found['parameters'] / 1e9:.2f} B parameters, --size {args.size}, {args.method}; all "
             "numbers are estimated", "", f"{'held':42}GB"]
    lines += [f"{name:40}{value / GB:6.2f}" for name, value in holds.items()]
    lines += ["", f"{'phase':12}{'peak GB':>8}{'activations GB':>16}"]
    lines += [f"{phase:12}{top[phase]:8.2f}{live[phase][0] / GB:16.2f}   {live[phase][1]}" for phase in top]
    for on in (True, False):
        each = at(found[f"update {on}"], 2) - at(found[f"update {on}"], 1)
        lines += [f"activations of an update of {pictures}, checkpointing {'on' if on else 'off'}: "
                  f"{at(found[f'update {on}'], pictures) / GB:.2f} GB, {each / GB:.3f} GB for each more"]
    work = tflop(args, found)
    lines += ["", "TFLOP a picture: " + ", ".join(f"{phase} {value:.3g}" for phase, value in work.items()),
              f"{args.epochs} epochs of {args.groups * args.group} pictures: {hours(args, found):.1f} hours at "
              f"--tflops {args.tflops:g}, an assumption, on --gpus {args.gpus}", "",
              f"largest --batch with / without checkpointing, {RESERVE:g} GB left to CUDA and the allocator (assumed)",
              f"{'card':6}" + "".join(f"{kind:>12}" for kind in ("bf16", "int8", "nf4"))]
    return "\n".join([*lines, *(f"{card:3} GB{verdict(args, found, card)}" for card in CARDS)])


def row_of_table(args: Args, found: dict) -> str:
    """A model's row of the table in docs/machines.md."""
    each = [(at(found[f"update {on}"], 2) - at(found[f"update {on}"], 1)) / GB for on in (True, False)]
    cells = [args.model.split("/")[-1], f"{found['parameters'] / 1e9:.2f}", args.size,
             f"{found['base']['none'][0] / GB:.1f}", f"{each[0]:.2f} / {each[1]:.1f}",
             f"{max(peaks(args, found).values()):.1f}", f"{sum(tflop(args, found).values()):.0f}",
             f"{hours(args, found):.0f}"]
    for card in CARDS:
        fits = {kind: largest(replace(args, quantize=kind), found, card) for kind in ("none", "int8", "nf4")}
        kind = next((kind for kind, most in fits.items() if most), None)
        cells.append("-" if kind is None else f"{fits[kind]}{f' ({kind})' * (kind != 'none')}")
    return f"| {' | '.join(map(str, cells))} |"


def check_positive(args):
    """Refuse numbers that cannot work, naming the flag."""
    for flag, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or flag in ("guidance", "guard_guidance") and value == 0):
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be positive")


@one_line_errors()
def main(args: Args):
    """Count and print."""
    quiet_libraries()
    check_positive(args)
    if not args.table:
        return print(report(args, count(args)))
    heads = ["model", "B", "size", "base GB", "activations GB a picture, checkpointing on / off",
             f"peak GB at --batch {args.batch}", "TFLOP a picture", f"hours of {args.epochs} epochs",
             *(f"{card} GB" for card in CARDS)]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for its in (replace(args, model=model, size=size) for model in PUBLISHED for size in (512, 1024)):
        print(row_of_table(its, count(its)), flush=True)


if __name__ == "__main__":
    main(parse(Args, __doc__))
