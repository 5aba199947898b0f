"""Pictures as files: PNGs, grids, GIFs of videos, a run's curves, and the folders of sample.py."""
import base64
import hashlib
import io
import json
import math
import re
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from flow.cli import InputError, make_dir, on_error, progress, reading, to_json, write_files

SUFFIXES = ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif".split()  # of files that are read as pictures


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


def grid_files(path: Path, pictures: Tensor, columns: int, captions: list[str] | None = None) -> dict[Path, bytes]:
    """A grid as the file `path`.png. For videos (n, frames, 3, h, w): of the middle frames, and as a GIF `path`.gif."""
    files = {path.with_suffix(".png"): encode(grid(middle_frames(pictures), columns, captions))}
    if pictures.ndim == 5:
        first, *rest = [grid(frame, columns, captions) for frame in pictures.unbind(1)]
        options = dict(save_all=True, append_images=rest, duration=125, loop=0)  # 8 frames a second
        files[path.with_suffix(".gif")] = encode(first, "GIF", **options)
    return files


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The content of a picture's file of this kind. options: of PIL's save."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def to_data_url(content: bytes, kind: str) -> str:
    """A picture file's content as a data: URL. kind: PNG, JPEG or WEBP."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def earlier_samples(out: str) -> list[Path]:
    """The pictures that sample.py wrote to a folder earlier. Raises InputError if there are other pictures with such
    names, for example a training run's: they would be overwritten."""
    listed = Path(out) / "samples.jsonl"
    with on_error(f"--out {out}: its samples.jsonl is not as sample.py writes it", "; give another --out"):
        lines = ['{"file": "grid"}', *listed.read_text().splitlines()] if listed.exists() else []
        names = {Path(json.loads(line)["file"]).stem for line in lines}
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


def open_picture(file: str | Path) -> Image.Image:
    """A picture as people see it, in 8-bit RGB: turned as its EXIF says, transparency on white, the first frame of
    several. Numbers of more than 8 bits are scaled by their range: 16 bits to their upper 8, others from 0 to the least
    of 1, 255 and 65535 that holds them. Colour profiles are not applied. `info["on_white"]`: it has transparency."""
    huge = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)  # over 89 million pixels
    with reading(file, "restore it, make it smaller, or move it away"), huge, Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        on_white = picture.has_transparency_data
        if picture.mode[0] in "IF":
            values, clear = np.asarray(picture), picture.info.get("transparency")
            low, high = values.min(), values.max()
            tops = [top for top in (1, 255, 65535) if -1e-3 <= low and high <= top + 1e-3]
            if not tops or 1.001 < high < 2:
                raise ValueError(f"its numbers, {low:g} to {high:g}, are not from 0 to 1, to 255 or to 65535")
            scaled = values >> 8 if ";16" in picture.mode else (values * (255 / tops[0])).round().clip(0, 255)
            picture = Image.fromarray(np.where(values == clear, 255, scaled).astype(np.uint8))
        elif on_white:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = picture.convert("RGB")
    picture.info = {"on_white": on_white}
    return picture


def natural(name: str) -> list:
    """A key that sorts names as people do: 2 before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def read_folder(folder: str) -> list[dict]:
    """A row per picture: prompt ("" in a folder without samples.jsonl), metadata, file, name without suffix, size, hash
    of its pixels, and a key of prompt and seed that pairs it with other folders' pictures. Prints what is not read."""
    rows, names, seen, notes, listed = [], {}, Counter(), Counter(), Path(folder) / "samples.jsonl"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: there is no such folder")
    with reading(listed, "give a folder that sample.py wrote"):
        lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        lines = [(line["prompt"], str(line["seed"]), line["file"], line.get("metadata", {})) for line in lines]
        if not all(isinstance(prompt, str) and isinstance(metadata, dict) for prompt, _, _, metadata in lines):
            raise ValueError("a prompt is no text, or its metadata no object")
    for path in [] if listed.exists() else sorted(Path(folder).iterdir(), key=lambda path: natural(path.name)):
        suffix = path.suffix.lower() or "no suffix"
        kind = "hidden" if path.name[0] == "." else "subfolder" if path.is_dir() else suffix
        if kind in SUFFIXES:
            lines.append(("", path.name, path.name, {}))
        else:
            notes[f"not read ({kind})"] += 1
    for prompt, seed, file, metadata in lines:
        picture, name = open_picture(f"{folder}/{file}"), Path(file).stem
        if names.setdefault(name, file) != file and not prompt:
            raise InputError(f"{folder}: {names[name]} and {file} have one name; move one of them away")
        notes["with alpha, put on white"] += picture.info["on_white"]
        seen[prompt, seed] += 1  # a prompt and seed that come again are told apart by their order
        rows.append({"key": (prompt, seed, seen[prompt, seed]), "prompt": prompt, "metadata": metadata,
                     "file": f"{folder}/{file}", "name": name, "size": picture.size,
                     "hash": hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()})
    said = "".join(f"; {count} {what}" for what, count in notes.items() if count)
    if not rows:
        raise InputError(f"{folder}: holds no picture{said}")
    if said:
        print(f"note: {folder}: {len(rows)} pictures{said}")
    return rows


def load_pictures(files: list[str]) -> Tensor:
    """Files of one size as (n, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(open_picture(file))).permute(2, 0, 1) / 255 for file in files])


def read_log(log: Path, size: int | None = None) -> list[dict]:
    """The lines in the first `size` bytes of metrics.jsonl. Raises InputError if they are not there or no JSON."""
    with reading(log):
        content = log.read_bytes()
        lines = [json.loads(line) for line in content[:size].splitlines()]
        if not all(isinstance(line, dict) for line in lines):
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
        if values := [line[prefix + name] for line in lines if line.get(prefix + name) is not None]:
            change = abs(values[-1] - values[0]) if name == "reward" else 0.1
            first, last = digits(values[0], change), digits(values[-1], change)
            parts.append(f"{prompts} {name.replace('_', ' ')} {first} -> {last}")
    return ", ".join(parts)


def page(report: dict, folders: list[list[str]]) -> str:
    """report.html: the template with the report and each folder's first 256 pictures in it, so that it needs no other
    file. Pictures larger than 128 pixels are JPEGs, shrunk so that the page has less than 20 MB."""
    folders = [folder[:256] for folder in folders]
    side = min(1024, int((21e6 / sum(map(len, folders))) ** 0.5))  # noise, the worst case, takes 0.9 bytes a pixel

    def uri(file: str) -> str:
        picture = open_picture(file)
        kind = "PNG" if max(picture.size) <= 128 < side else "JPEG"
        picture.thumbnail((side, side))
        return to_data_url(encode(picture, kind, quality=80), kind)

    pictures = [list(map(uri, folder)) for folder in folders]
    content = to_json({**report, "pictures": pictures}).replace("<", "\\u003c")  # so that nothing ends the script
    return Path(__file__).with_name("report.html").read_text("utf-8").replace("{{report}}", content)


@matplotlib.rc_context({"text.parse_math": False})  # names may have a $
def plot_curves(out: Path, guidance: float | None = None, guard_guidance: float | None = None):
    """Draw curves.png from metrics.jsonl. Norm ratios are of velocities with `guidance` in evaluations, and with
    `guard_guidance` in training; None: the conditional ones."""
    lines, scales = read_log(out / "metrics.jsonl"), (guard_guidance, guidance)
    labels = [" (conditional)" if scale is None else f" (guidance {scale:g})" for scale in scales]
    trained, evaluated = ("", "") if scales == (None, None) else labels

    def values(key: str, x: str = "step") -> list[tuple]:
        return [(line[x], line[key]) for line in lines if key in line]

    other_rewards = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_reward/"))
    parts, bands = {}, {}  # of the reward: mean - first mean, with a band of the deviation, both / first deviation
    for name in dict.fromkeys(key for line in lines for key in line if key.startswith("reward/")):
        rows = [[line["step"], line.get(name), line.get(f"{name}_std")] for line in lines]
        rows = [row for row in rows if None not in row]
        if rows:  # name is a mean
            step, mean, std = np.array(rows).T
            unit = std[0] or 1.0
            label, gain = f"{name}: from {mean[0]:.3g}, unit {unit:.2g}", (mean - mean[0]) / unit
            parts[label], bands[label] = list(zip(step, gain)), (step, gain - std / unit, gain + std / unit)
    by_t, paths = values("norm_ratio_by_t"), values("eval_norm_ratio_steps", "epoch")
    bins = len(by_t[0][1]) if by_t else 0  # equal parts of [0, 1]
    shown = sorted(set(np.linspace(0, len(paths) - 1, 8).round().astype(int))) if paths else []  # the first to the last
    along = f"norm ratio along the trajectory ({len(shown)} of {len(paths)})"
    panels = {  # title: {label: [(x, y or None), ...]}
        "reward": {key: values(key) for key in ["reward", "eval_reward", *other_rewards]},
        "parts of the reward, in units of their first deviation": parts,
        "norm ratio to the reference": {
            "norm_ratio" + trained: values("norm_ratio"),
            **{key + evaluated: values(key) for key in ("eval_norm_ratio", "eval_norm_ratio_max")}},
        "guard: fraction of samples over the reference": {"active": values("active")},
        "norm ratio by noise level, training": {
            f"t {k / bins:.1f} to {(k + 1) / bins:.1f}": [(x, ratios[k]) for x, ratios in by_t] for k in range(bins)},
        along: {f"epoch {paths[i][0]}": list(enumerate(paths[i][1])) for i in shown}}
    for title, curves in panels.items():
        points = {label: [point for point in curve if None not in point] for label, curve in curves.items()}
        # at most 1000 points, the last one among them
        panels[title] = {label: curve[::-math.ceil(len(curve) / 1000)] for label, curve in points.items() if curve}
    panels = {title: curves for title, curves in panels.items() if curves}  # what is not drawn has no panel
    n = len(panels)
    figure = Figure(figsize=(4.2 * n, 3.4))  # a computed layout would take as long as the drawing
    figure.subplots_adjust(0.125 / n, 0.14, 1 - 0.025 / n, 0.91, 0.18)
    for axis, (title, curves) in zip(figure.subplots(1, n, squeeze=False)[0], panels.items()):
        for i, (label, curve) in enumerate(curves.items()):
            is_sparse = len(curve) == 1 or len(curve) < 100 and label.startswith("eval")  # one point has no line
            colour = matplotlib.colormaps["viridis"](i / len(curves))
            marker = "o" if is_sparse else None
            axis.plot(*zip(*curve), color=colour, label=label, marker=marker, markersize=3, linewidth=1)
            if label in bands:
                axis.fill_between(*bands[label], color=colour, alpha=0.15, linewidth=0)
        axis.legend(fontsize=8)
        axis.set_title(title, y=1)  # y=1 is its default place, but matplotlib takes long to find it
        axis.set_xlabel("sampling step (0 is noise)" if title == along else "optimizer step")
        axis.locator_params(nbins=5)  # fewer ticks are faster to draw
        axis.grid(alpha=0.3)
    write_files({out / "curves.png": png(figure)})


def png(figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of signs that the font lacks, and of names that have no place
        figure.savefig(content, dpi=dpi, format="png")
    return content.getvalue()
