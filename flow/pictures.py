"""Pictures as files: PNGs, grids, GIFs of videos, a run's curves and card, and the folders of sample.py."""
import hashlib
import io
import json
import math
import shlex
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flow.cli import InputError, make_dir, on_error, progress, reading, to_json, write_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # files that are read as pictures


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, h, w), in [0, 1] or as bytes, for PIL."""
    return Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy())


def to_bytes(pictures: Tensor) -> Tensor:
    """Numbers in [0, 1] as bytes on the CPU, rounded as diffusers does. Bytes stay as they are."""
    return pictures if pictures.dtype == torch.uint8 else (pictures.cpu() * 255).round().byte()


def middle_frames(pictures: Tensor) -> Tensor:
    """The middle frames (n, 3, h, w) of videos (n, frames, 3, h, w). Pictures stay as they are."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures


def saturation(pictures: Tensor) -> Tensor:
    """HSV saturation, the mean over a picture's pixels (of a video: its middle frame): (n, ...) in [0, 1] -> (n,)."""
    top, low = middle_frames(pictures).amax(1), middle_frames(pictures).amin(1)
    return ((top - low) / top.clamp_min(1e-3)).flatten(1).mean(1)


def grid(pictures: Tensor, columns: int, captions: list[str] | None = None) -> Image.Image:
    """One picture of many (n, 3, h, w), row by row, each with its caption below."""
    tiles = [to_image(picture) for picture in pictures]
    wide, high = tiles[0].size
    size = max(9, wide // 20)
    strip = 2 * size + 6 if captions else 0
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide, rows * (high + strip)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for i, (tile, caption) in enumerate(zip(tiles, captions or [""] * len(tiles))):
        x, y = i % columns * wide, i // columns * (high + strip)
        sheet.paste(tile, (x, y))
        lines = textwrap.wrap(caption, max(4, int(wide / (0.52 * size))))
        draw.multiline_text((x + 2, y + high), "\n".join(lines[:2]), "black", font, spacing=1)
    return sheet


def save_grid(path: Path, pictures: Tensor, columns: int, captions: list[str] | None = None):
    """Write a grid as `path`.png. For videos (n, frames, 3, h, w): of the middle frames, and as a GIF `path`.gif."""
    write_files(grid_files(path, pictures, columns, captions))


def grid_files(path: Path, pictures: Tensor, columns: int, captions: list[str] | None = None) -> dict[Path, bytes]:
    """The files that save_grid writes."""
    content = io.BytesIO()
    grid(middle_frames(pictures), columns, captions).save(content, "PNG")
    files = {path.with_suffix(".png"): content.getvalue()}
    if pictures.ndim == 5:
        content = io.BytesIO()
        first, *rest = [grid(frame, columns, captions) for frame in pictures.unbind(1)]
        first.save(content, "GIF", save_all=True, append_images=rest, duration=125, loop=0)  # 8 frames a second
        files[path.with_suffix(".gif")] = content.getvalue()
    return files


def earlier_samples(out: str) -> list[Path]:
    """The pictures that sample.py wrote to a folder earlier. Raises InputError if there are other pictures with such
    names, for example a training run's: they would be overwritten."""
    listed, names = Path(out) / "samples.jsonl", set()
    if listed.exists():
        with on_error(f"--out {out}: its samples.jsonl is not as sample.py writes it", "; give another --out"):
            names = {"grid", *(Path(json.loads(line)["file"]).stem for line in listed.read_text().splitlines())}
    pictures = list(Path(out).glob("[0-9]" * 5 + ".*"))
    others = [file.name for file in (*pictures, *Path(out).glob("grid.*")) if file.stem not in names]
    if others:
        raise InputError(f"--out {out}: {min(others)} there was not written by sample.py; give another --out")
    return pictures


def save_samples(out: str, pictures: Tensor, rows: list[dict]):
    """Write pictures (n, 3, h, w) or videos (n, frames, 3, h, w) in [0, 1] to the folder `out`: a PNG each (for a video
    its middle frame, and a GIF), grid.png, and samples.jsonl with `rows`, which hold at least prompt and seed."""
    folder = make_dir(out, "--out")
    old = set(earlier_samples(out))
    lines = [to_json({"file": f"{i:05d}.png", **row}) + "\n" for i, row in enumerate(rows)]
    files = {folder / "samples.jsonl": "".join(lines)}  # written first, so that earlier_samples knows the others
    for i in progress(range(len(pictures)), desc="save", leave=False):
        files |= grid_files(folder / f"{i:05d}", pictures[i:i + 1], 1)
    write_files(files | grid_files(folder / "grid", pictures[:64], min(8, len(pictures))))
    for path in old - files.keys():
        path.unlink()  # left from a larger n
    print(f"{len(rows)} pictures in {folder}/")


def read_folder(folder: str, plain: bool = False) -> list[dict]:
    """A row per picture: prompt, metadata, file, size, hash of its content, and a key that pairs it with other folders'
    pictures.

    Reads samples.jsonl. With `plain` a folder without one is read too: all its pictures, with empty prompts."""
    rows, seen, listed = [], Counter(), Path(folder) / "samples.jsonl"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: there is no such folder")
    with reading(listed, "give a folder that sample.py wrote"):
        if plain and not listed.exists():
            found = sorted(file.name for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES)
            lines = [("", i, name, {}) for i, name in enumerate(found)]
        else:
            lines = [json.loads(line) for line in listed.read_text().splitlines()]
            lines = [(line["prompt"], line["seed"], line["file"], line.get("metadata", {})) for line in lines]
        if not all(isinstance(prompt, str) and isinstance(metadata, dict) for prompt, _, _, metadata in lines):
            raise ValueError("a prompt is no text, or its metadata no object")
    for prompt, seed, name, metadata in lines:
        file = f"{folder}/{name}"
        with reading(file, "restore it"):
            content = Path(file).read_bytes()
            size = Image.open(io.BytesIO(content)).convert("RGB").size  # decodes it, to find a broken file now
        seen[prompt, seed] += 1  # a prompt and seed that come again are told apart by their order
        rows.append({"key": (prompt, seed, seen[prompt, seed]), "prompt": prompt, "metadata": metadata, "file": file,
                     "size": size, "hash": hashlib.sha256(content).hexdigest()})
    if not rows:
        raise InputError(f"{folder}: holds no picture")
    return rows


def load_pictures(files: list[str]) -> Tensor:
    """Files of one size as (n, 3, h, w) in [0, 1]."""
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) / 255 for array in arrays])


def read_log(log: Path, size: int | None = None) -> list[dict]:
    """The lines in the first `size` bytes of metrics.jsonl. Raises InputError if they are not there or no JSON."""
    with reading(log):
        content = log.read_bytes()
        lines = []
        for line in content[:size].splitlines():
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict):
                raise ValueError("a line is no JSON object")
        if len(content) < (size or 0):
            raise ValueError("it is shorter than the checkpoint says")
    return lines


def epochs_logged(log: Path) -> int:
    """The number of the last epoch that metrics.jsonl has a training step of, 0 if there is none."""
    try:
        return max((line["epoch"] for line in read_log(log) if "loss" in line), default=0)
    except (InputError, KeyError):  # cut short in its first epoch
        return 0


def digits(value: float, spread: float) -> str:
    """A number with as many decimals as show a change of `spread`, at least 3."""
    decimals = 2 - math.floor(math.log10(max(spread, 1e-6 * abs(value)))) if 0 < spread < math.inf else 3
    return f"{value:.{min(max(decimals, 3), 15)}f}"


def summarize(out: Path) -> str:
    """A run's first and last reward and norm ratio, of held-out prompts if they were evaluated."""
    lines, parts = read_log(out / "metrics.jsonl"), []
    prefix, prompts = ("eval_", "held-out") if any("eval_reward" in line for line in lines) else ("", "training")
    for name in ("reward", "norm_ratio"):
        values = [line[prefix + name] for line in lines if line.get(prefix + name) is not None]
        if values:
            change = abs(values[-1] - values[0]) if name == "reward" else 0.1
            first, last = digits(values[0], change), digits(values[-1], change)
            parts.append(f"{prompts} {name.replace('_', ' ')} {first} -> {last}")
    return ", ".join(parts)


def model_card(method: str, args, eval_prompts: list[dict]) -> str:
    """lora/README.md: a model card for the hub. The user chooses the licence."""
    command, defaults = ["python", f"train_{method}.py"], vars(type(args)())
    changed = {name.replace("_", "-"): value for name, value in vars(args).items() if value != defaults[name]}
    for flag, value in changed.items():
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    prompts = "\n".join(f"- {prompt}" for prompt in dict.fromkeys(row["prompt"] for row in eval_prompts[:4]))
    base_model = "" if Path(args.model).is_dir() else f"base_model: {args.model}\n"  # the hub does not know a folder
    guard = f" and NormGuard (arXiv 2606.27771), lam {args.lam}" if args.lam != 0 else ""
    start = f", from the LoRA `{Path(args.init_lora).name}`" if args.init_lora else ""
    tags = ["lora", "diffusers", *["normguard"] * bool(guard), method]
    return f"""---
{base_model}library_name: diffusers
tags: [{', '.join(tags)}]
---
A LoRA of rank {args.rank} and alpha {args.rank} for `{Path(args.model).name if not base_model else args.model}`
(`pipe.load_lora_weights(FOLDER)`), trained for the reward `{args.reward}` with {method.upper()}{guard}{start}:

    {shlex.join(command)}

Prompts to try:

{prompts}
"""


def plot_curves(out: Path, guidance: float | None = None):
    """Draw curves.png from metrics.jsonl. Norm ratios are of the conditional velocity in training, and with `guidance`
    in evaluations."""
    lines = read_log(out / "metrics.jsonl")
    trained, evaluated = ("", "") if guidance is None else (" (conditional)", f" (guidance {guidance:g})")

    by_t = [line for line in lines if "norm_ratio_by_t" in line]
    bins = len(by_t[0]["norm_ratio_by_t"]) if by_t else 0  # equal parts of [0, 1]

    other_rewards = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_reward/"))

    def values(key: str) -> list[tuple]:
        return [(line["step"], line.get(key)) for line in lines]

    parts, bands = {}, {}  # of the reward: mean - first mean, with a band of the deviation, both / first deviation
    for name in dict.fromkeys(key for line in lines for key in line if key.startswith("reward/")):
        rows = [[line["step"], line.get(name), line.get(f"{name}_std")] for line in lines]
        if rows := [row for row in rows if None not in row]:  # name is a mean
            step, mean, std = np.array(rows).T
            unit = std[0] or 1.0
            label, gain = f"{name}: from {mean[0]:.3g}, unit {unit:.2g}", (mean - mean[0]) / unit
            parts[label], bands[label] = zip(step, gain), (step, gain - std / unit, gain + std / unit)

    panels = {  # title: {label: [(x, y or None), ...]}
        "reward": {key: values(key) for key in ["reward", "eval_reward", *other_rewards]},
        **({"parts of the reward, in units of their first deviation": parts} if parts else {}),
        "norm ratio to the reference": {
            "norm_ratio" + trained: values("norm_ratio"),
            **{key + evaluated: values(key) for key in ("eval_norm_ratio", "eval_norm_ratio_max")}},
        "guard: fraction of samples over the reference": {"active": values("active")},
        "norm ratio by noise level, training": {
            f"t {k / bins:.1f} to {(k + 1) / bins:.1f}": [(line["step"], line["norm_ratio_by_t"][k]) for line in by_t]
            for k in range(bins)},
        "norm ratio along the trajectory": {
            f"epoch {line['epoch']}": enumerate(line["eval_norm_ratio_steps"])
            for line in lines if "eval_norm_ratio_steps" in line}}
    figure = Figure(figsize=(4.2 * len(panels), 3.4))
    figure.subplots_adjust(0.025, 0.14, 0.995, 0.91, 0.18)  # a computed layout takes as long as the drawing
    for axis, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        for i, (label, curve) in enumerate(curves.items()):
            colour, marker = matplotlib.colormaps["viridis"](i / len(curves)), "o" if label.startswith("eval") else None
            if curve := [(x, y) for x, y in curve if y is not None]:
                axis.plot(*zip(*curve), color=colour, label=label, marker=marker, markersize=3, linewidth=1)
            if label in bands:
                axis.fill_between(*bands[label], color=colour, alpha=0.15, linewidth=0)
        if axis.lines:
            axis.legend(fontsize=8)
        axis.set_title(title, y=1)  # y=1 is its default place, but matplotlib takes long to find it
        axis.set_xlabel("optimizer step")
        axis.locator_params(nbins=5)  # fewer ticks are faster to draw
        axis.grid(alpha=0.3)
    axis.set_xlabel("sampling step (0 is noise)")  # of the last one
    write_files({out / "curves.png": png(figure)})


def png(figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    return content.getvalue()
