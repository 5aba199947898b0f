"""Pictures: from tensors to PNGs and grids, videos to GIFs, and the folder that sample.py writes and eval_judge.py
reads."""
import hashlib
import io
import json
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flow.cli import InputError, json_text, make_dir, progress, reason, write_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # a folder's files that are pictures


def to_image(picture: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1], or of bytes -> PIL."""
    return Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy())


def to_bytes(pictures: Tensor) -> Tensor:
    """Numbers in [0, 1] -> bytes on the CPU, rounded as diffusers does; bytes stay as they are."""
    return pictures if pictures.dtype == torch.uint8 else (pictures.cpu() * 255).round().byte()


def middle_frames(pictures: Tensor) -> Tensor:
    """Videos (n, frames, 3, h, w) -> (n, 3, h, w); pictures stay as they are."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures


def grid(pictures: Tensor, columns: int, captions: list[str] | None = None) -> Image.Image:
    """(n, 3, h, w) in [0, 1] -> one picture, row by row, on white, each with its caption below."""
    tiles = [to_image(picture) for picture in pictures]
    wide, high = tiles[0].size
    size = max(9, wide // 20)
    strip = 0 if captions is None else 2 * size + 6
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide, rows * (high + strip)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for i, tile in enumerate(tiles):
        x, y = i % columns * wide, i // columns * (high + strip)
        sheet.paste(tile, (x, y))
        if captions is not None:
            lines = textwrap.wrap(captions[i], max(4, int(wide / (0.52 * size))))
            draw.multiline_text((x + 2, y + high), "\n".join(lines[:2]), "black", font, spacing=1)
    return sheet


def save_grid(path: Path, pictures: Tensor, columns: int, captions: list[str] | None = None):
    """A grid as `path`.png; of videos (n, frames, 3, h, w) the middle frames', and one that moves as `path`.gif."""
    write_files(grid_files(path, pictures, columns, captions))


def grid_files(path: Path, pictures: Tensor, columns: int, captions: list[str] | None = None) -> dict[Path, bytes]:
    """What save_grid writes."""
    still, moving = io.BytesIO(), io.BytesIO()
    grid(middle_frames(pictures), columns, captions).save(still, "PNG")
    if pictures.ndim < 5:
        return {path.with_suffix(".png"): still.getvalue()}
    first, *rest = [grid(frame, columns, captions) for frame in pictures.unbind(1)]
    first.save(moving, "GIF", save_all=True, append_images=rest, duration=125, loop=0)  # 8 a second
    return {path.with_suffix(".png"): still.getvalue(), path.with_suffix(".gif"): moving.getvalue()}


def earlier_samples(out: str) -> list[Path]:
    """Pictures in a folder that its samples.jsonl lists. If other files of such names are there, a training run's for
    one, the process ends: they would be overwritten."""
    folder, listed = Path(out), Path(out) / "samples.jsonl"
    try:
        rows = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        names = {Path(row["file"]).stem for row in rows if isinstance(row["prompt"], str)}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"--out {out}: its samples.jsonl is not as sample.py writes it ({reason(e)}); give another "
                         "--out")
    taken = [*folder.glob("[0-9]" * 5 + ".*"), *([] if listed.exists() else folder.glob("grid.*"))]
    strange = sorted(file.name for file in taken if file.stem not in names)
    if strange:
        raise InputError(f"--out {out}: {strange[0]} there was not written by sample.py; give another --out")
    return taken


def save_samples(out: str, pictures: Tensor, rows: list[dict]):
    """PNGs (of videos: of the middle frame, and a GIF), grid.png and samples.jsonl in the folder `out`, for pictures
    (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1] and n dicts that hold at least prompt and seed."""
    folder = make_dir(out, "--out")
    old = {path for path in earlier_samples(out) if path.stem != "grid"}
    lines = [json_text({"file": f"{i:05d}.png", **row}) + "\n" for i, row in enumerate(rows)]
    files = {folder / "samples.jsonl": "".join(lines)}  # first: what follows is known to be ours
    for i in progress(range(len(pictures)), desc="save", leave=False):
        files |= grid_files(folder / f"{i:05d}", pictures[i:i + 1], 1)
    write_files(files | grid_files(folder / "grid", pictures[:64], min(8, len(pictures))))
    for path in old - files.keys():
        path.unlink()  # there were more
    print(f"{len(rows)} pictures in {folder}/")


def read_folder(folder: str, plain: bool = False) -> list[dict]:
    """samples.jsonl's rows, each with its picture's file, size and content hash. `plain`: any folder of pictures."""
    rows, row = [], {}
    listed = Path(folder) / "samples.jsonl"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: there is no such folder")
    try:
        if plain and not listed.exists():
            found = sorted(p.name for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)
            lines = [{"prompt": "", "seed": i, "file": name} for i, name in enumerate(found)]
        else:
            lines = [json.loads(line) for line in listed.read_text().splitlines()]
            if not all(isinstance(line, dict) and isinstance(line.get("prompt"), str) for line in lines):
                raise ValueError("a line is no JSON object with a prompt")
        for row in lines:
            content = (Path(folder) / row["file"]).read_bytes()
            size = Image.open(io.BytesIO(content)).convert("RGB").size  # decodes it: a broken file is to show now
            rows.append({"key": (row["prompt"], row["seed"]), "prompt": row["prompt"], "size": size,
                         "file": f"{folder}/{row['file']}", "hash": hashlib.sha256(content).hexdigest()})
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as e:  # SyntaxError: PIL's for a broken PNG
        name = f"{folder}/{row.get('file', 'samples.jsonl')}"
        raise InputError(f"{name}: cannot be read, as sample.py writes it ({type(e).__name__}: {reason(e)})")
    if not rows:
        raise InputError(f"{folder}: holds no picture")
    seen = Counter()
    for row in rows:  # a prompt and seed that come again are told apart by their order
        seen[row["key"]] += 1
        row["key"] += (seen[row["key"]],)
    return rows


def load_pictures(files: list[str]) -> Tensor:
    """Files of one size -> (n, 3, h, w) in [0, 1]."""
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) / 255 for array in arrays])


def plot_curves(out: Path, guidance: float | None = None):
    """curves.png from metrics.jsonl: reward, norm ratio and guard over the steps, the norm ratio of training batches by
    noise level, and each evaluation's norm ratio along its trajectory. Training sees the conditional velocity,
    evaluations that with `guidance`."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    panels = {"reward": ["reward", "eval_reward"],
              "norm ratio to the reference": ["norm_ratio", "eval_norm_ratio", "eval_norm_ratio_max"],
              "guard: share of samples over the reference": ["active"]}
    figure = Figure(figsize=(21, 3.4))
    axes = figure.subplots(1, 5)
    figure.subplots_adjust(0.025, 0.14, 0.995, 0.91, 0.18)  # to find a layout takes as long as to draw it
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            marker = "o" if key.startswith("eval") else None
            guided = f" (guidance {guidance:g})" if guidance is not None and key.startswith("eval_norm") else ""
            label = f"{key} (conditional)" if guidance is not None and key == "norm_ratio" else key + guided
            axis.plot(*zip(*points) if points else ([], []), label=label, marker=marker, markersize=3, linewidth=1)
        axis.set_title(title, y=1)  # where it stands anyway: to look for a place takes a quarter of the time
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=8)
    steps = [line for line in lines if "norm_ratio_by_t" in line]
    bins = len(steps[0]["norm_ratio_by_t"]) if steps else 0
    for k in range(bins):
        points = [(line["step"], line["norm_ratio_by_t"][k]) for line in steps]
        points = [point for point in points if point[1] is not None]
        label, colour = f"t {k / bins:.1f} to {(k + 1) / bins:.1f}", matplotlib.colormaps["plasma"](k / bins)
        if points:
            axes[3].plot(*zip(*points), color=colour, label=label, linewidth=1)
    axes[3].set_title("norm ratio by noise level, training", y=1)
    axes[3].set_xlabel("optimizer step")
    evals = [line for line in lines if "eval_norm_ratio_steps" in line]
    for i, line in enumerate(evals):
        colour = matplotlib.colormaps["viridis"](i / max(len(evals) - 1, 1))
        axes[4].plot(line["eval_norm_ratio_steps"], color=colour, label=f"epoch {line['epoch']}", linewidth=1)
    axes[4].set_title("norm ratio along the trajectory", y=1)
    axes[4].set_xlabel("sampling step (0 is noise)")
    for axis in axes[3:]:
        if axis.lines:
            axis.legend(fontsize=7)
    for axis in axes:
        axis.locator_params(nbins=5)  # each tick takes its time to draw
        axis.grid(alpha=0.3)
    write_files({out / "curves.png": png(figure)})


def png(figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    return content.getvalue()
