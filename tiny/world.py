"""The miniature world: captioned 64x64 pictures, rendered from a seed.

A coloured shape stands before a wall and a floor, under soft light, with a soft shadow and film grain. Colours are
muted, as in a photograph. The caption names the colour and the shape. All else (place, size, angle, light, backdrop,
texture, grain) varies at random, and a reward that knows only captions cannot see it.

    python tiny/world.py --n 64 --seed 0 --out runs/renders        # PNGs and samples.jsonl, as sample.py writes them
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

from flow.cli import InputError, check_flags, check_place, one_line_errors, parse
from flow.pictures import earlier_samples, save_samples
from flow.prompts import read_prompts

SIZE = 64  # pixels a side
# hue, degrees
COLOURS = {"red": 0, "orange": 27, "yellow": 52, "green": 118, "teal": 176, "blue": 218, "purple": 272, "pink": 328}
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "moon"]
COMBOS = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
HELD_OUT = [(c, s) for c, s in COMBOS if (s - c) % 8 in (0, 3)]  # 16 of 64: each colour and each shape twice


def caption(colour: int, shape: int) -> str:
    """'a red circle' for the colour's and the shape's index; the article agrees ('an orange star')."""
    name = list(COLOURS)[colour]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {SHAPES[shape]}"


CAPTIONS = [caption(c, s) for c, s in COMBOS]


def scene(index: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw what varies in scenes. index (n,) long: their captions' places in CAPTIONS. Returns factors, each (n,) or
    (n, k)."""
    n = len(index)

    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(n, *shape, generator=generator)

    hues = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    f = {"colour": index // len(SHAPES), "shape": index % len(SHAPES)}
    f["hue"] = (hues[f["colour"]] + uniform(-8, 8)) / 360
    f["sat"], f["val"] = uniform(0.30, 0.64), uniform(0.45, 0.85)
    f["x"], f["y"], f["r"] = uniform(-0.12, 0.12), uniform(-0.10, 0.10), uniform(0.56, 0.68)
    f["angle"] = uniform(-0.15, 0.15)
    f["wall"] = torch.stack([uniform(0, 1), uniform(0.02, 0.28), uniform(0.40, 0.88)], 1)  # HSV
    f["floor"] = torch.stack([uniform(0, 1), uniform(0.02, 0.28), uniform(0.25, 0.75)], 1)
    f["horizon"], f["light"], f["fall"] = uniform(-0.20, 0.65), uniform(-1, 1), uniform(0.05, 0.30)
    f["warm"], f["gloss"], f["shade"] = uniform(-0.05, 0.05), uniform(0.0, 0.25), uniform(0.25, 0.55)
    f["texture"], f["grain"] = uniform(0.0, 0.02), uniform(0.002, 0.006)
    f["noise"] = torch.randint(2**31, (n,), generator=generator)  # seeds the texture and the grain
    return f


def hsv_to_rgb(hsv: torch.Tensor) -> torch.Tensor:
    """HSV (n, 3) in [0, 1] -> RGB (n, 3) in [0, 1]."""
    h, s, v = hsv.unbind(1)
    k = (torch.tensor([5.0, 3.0, 1.0]) + h[:, None] * 6) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def signed_distance(p: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Approximate signed distances of points p (n, 2, h, w) to shapes (n,) of unit size: (n, h, w), negative inside."""
    out = torch.empty(p.shape[0], *p.shape[2:])
    for i, name in enumerate(SHAPES):
        rows = (shape == i).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        x, y = p[rows].unbind(1)
        radius = (x * x + y * y).sqrt()
        if name == "circle":
            d = radius - 0.85
        elif name == "square":
            d = torch.maximum(x.abs(), y.abs()) - 0.75
        elif name == "triangle":
            d = torch.maximum(0.866 * x.abs() - 0.5 * y - 0.42, y - 0.62)
        elif name == "star":
            a = torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
            u, w = radius * torch.sin(a.abs()), radius * torch.cos(a)  # one edge of one arm, from the tip (0, 1)
            d = (w - 1.05) * 0.588 + u * 0.809
        elif name == "ring":
            d = (radius - 0.66).abs() - 0.25
        elif name == "cross":
            arm = torch.maximum(x.abs() - 0.28, y.abs() - 0.88)
            d = torch.minimum(arm, torch.maximum(y.abs() - 0.28, x.abs() - 0.88))
        elif name == "heart":
            lobes = ((x.abs() - 0.42) ** 2 + (y + 0.30) ** 2).sqrt() - 0.47
            tip = torch.maximum(torch.maximum((x.abs() + y) * 0.707 - 0.555, -(y + 0.30)), x.abs() - 0.75)
            d = torch.minimum(lobes, tip)
        else:  # moon
            d = torch.maximum(radius - 0.88, 0.72 - ((x - 0.45) ** 2 + (y + 0.12) ** 2).sqrt())
        out[rows] = d
    return out


def render(f: dict[str, torch.Tensor]) -> torch.Tensor:
    """Factors from `scene` -> pictures (n, 3, 64, 64) in [0, 1]. Edges are smoothed by the distance to the shape."""
    n, axis = len(f["x"]), (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]  # (1, 2, h, w): x, y in [-1, 1]

    def col(name):
        return f[name].view(n, 1, 1)

    def smooth(d, width):
        return torch.sigmoid(-d / width)

    generators = [torch.Generator().manual_seed(int(s)) for s in f["noise"]]
    noise = torch.stack([torch.randn(2, SIZE, SIZE, generator=g) for g in generators])
    texture = F.interpolate(noise[:, :1, ::8, ::8], SIZE, mode="bicubic", align_corners=False)
    grain = F.avg_pool2d(noise[:, 1:], 3, 1, 1, count_include_pad=False) * 3  # blurred: film grain has a size

    # backdrop: a wall and a floor that meet at a soft horizon, lit from one side
    floor = smooth(col("horizon") - grid[:, 1], 0.02)[:, None]
    rgb = floor * hsv_to_rgb(f["floor"])[:, :, None, None] + (1 - floor) * hsv_to_rgb(f["wall"])[:, :, None, None]
    rgb = rgb * (1 + texture * f["texture"].view(n, 1, 1, 1))

    # the shape's shadow falls away from the light, soft and a little below
    centre = torch.stack([f["x"], f["y"]], 1).view(n, 2, 1, 1)
    size = f["r"].view(n, 1, 1, 1)
    fall = torch.stack([-f["light"] * 0.16, torch.full((n,), 0.13)], 1).view(n, 2, 1, 1)
    cos, sin = f["angle"].cos().view(n, 1, 1), f["angle"].sin().view(n, 1, 1)

    def local(q):
        x, y = q.unbind(1)
        return torch.stack([cos * x + sin * y, cos * y - sin * x], 1)

    shadow = smooth(signed_distance(local((grid - centre - fall) / size), f["shape"]) * col("r"), 0.05)
    rgb = rgb * (1 - col("shade") * shadow)[:, None]

    # the shape: flat colour, lit from the light's side, darker towards its far edge, with a faint gloss
    q = (grid - centre) / size
    d = signed_distance(local(q), f["shape"])
    lit = 1 + 0.22 * (q[:, 0] * col("light") - q[:, 1] * 0.7).clamp(-1.2, 1.2) - 0.25 * torch.exp(d.clamp(max=0) / 0.10)
    spot = torch.exp(-((q[:, 0] - 0.3 * col("light")) ** 2 + (q[:, 1] + 0.35) ** 2) / 0.06) * col("gloss")
    paint = hsv_to_rgb(torch.stack([f["hue"] % 1, f["sat"], f["val"]], 1))[:, :, None, None]
    body = paint * lit[:, None] + spot[:, None]
    cover = smooth(d * col("r"), 0.012)[:, None]  # about half a pixel
    rgb = cover * body + (1 - cover) * rgb

    # light that falls off over the picture, a tint, the lens's vignette, grain
    sweep = 1 + col("fall") * (grid[:, 0] * col("light") - 0.6 * grid[:, 1])
    vignette = 1 - 0.10 * (grid**2).sum(1)
    tint = 1 + torch.stack([f["warm"], torch.zeros(n), -f["warm"]], 1).view(n, 3, 1, 1)
    return (rgb * (sweep * vignette)[:, None] * tint + grain * f["grain"].view(n, 1, 1, 1)).clamp(0, 1)


FLAWS = ["sharpening", "saturation", "light", "contrast", "blur", "noise", "blocks", "shapes"]


def degrade(pictures: torch.Tensor, flaw: str, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Give pictures (n, 3, 64, 64) in [0, 1] one of FLAWS, at strengths (n,) from 0 (unchanged) to 1 (gross)."""
    n, s = len(pictures), strength.view(-1, 1, 1, 1)
    small = torch.randn(n, 2, 6, 6, generator=generator)
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    grey = pictures.mean(1, keepdim=True)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if flaw == "sharpening":  # unsharp mask
        out = pictures + 5 * s * (pictures - soften(pictures, 1.0))
    elif flaw == "saturation":
        out = grey + (1 + 2 * s) * (pictures - grey)
    elif flaw == "light":  # a hard light from one side
        out = pictures * (1 + s * torch.tanh(2.5 * (angle.cos() * x + angle.sin() * y))[:, None])
    elif flaw == "contrast":
        middle = pictures.mean((1, 2, 3), keepdim=True)
        out = middle + (1 + 1.2 * s) * (pictures - middle)
    elif flaw == "blur":
        out = torch.lerp(pictures, soften(pictures, 2.5), s)
    elif flaw == "noise":
        out = pictures + 0.10 * s * noise
    elif flaw == "blocks":
        out = torch.lerp(pictures, F.interpolate(F.avg_pool2d(pictures, 8), SIZE), 0.8 * s)
    else:  # shapes: bent
        bend = 0.18 * s * F.interpolate(small, SIZE, mode="bicubic", align_corners=False)
        grid = (torch.stack([x, y])[None] + bend).permute(0, 2, 3, 1)
        out = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return torch.where(s > 0, out.clamp(0, 1), pictures)


def soften(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (n, 3, h, w), with edges repeated."""
    radius = math.ceil(3 * sigma)
    k = torch.exp(-torch.arange(-radius, radius + 1) ** 2 / (2 * sigma**2))
    k = (k / k.sum()).expand(3, 1, -1)
    padded = F.pad(pictures, [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, k[:, :, None], groups=3), k[..., None], groups=3)


@dataclass
class Args:
    n: int = 64
    """number of pictures"""
    seed: int = 0
    """seed of the scenes"""
    out: str = "runs/renders"
    """folder for the PNGs and samples.jsonl"""
    prompts: str | None = None
    """render only the captions in this file, in turn (default: all 64)"""


@one_line_errors()
def main(args: Args):
    """Write n captioned renders, as sample.py writes its pictures."""
    check_flags(args, {"n": 1, "seed": 0})
    if args.seed >= 2**63:
        raise InputError(f"--seed {args.seed}: must be below 2^63")
    check_place(args.out, "--out", ("samples.jsonl", "grid.png"))
    earlier_samples(args.out)
    captions = [row["prompt"] for row in read_prompts(args.prompts, "--prompts")] if args.prompts else CAPTIONS
    strange = [c for c in captions if c not in CAPTIONS]
    if strange:
        raise InputError(f"--prompts {args.prompts}: the world has no {strange[0]!r}; its captions read like "
                         f"{CAPTIONS[0]!r}")
    captions = [captions[i % len(captions)] for i in range(args.n)]
    index = torch.tensor([CAPTIONS.index(c) for c in captions])
    pictures = render(scene(index, torch.Generator().manual_seed(args.seed)))
    save_samples(args.out, pictures, [{"prompt": c, "seed": args.seed} for c in captions])


if __name__ == "__main__":
    main(parse(Args, __doc__))
