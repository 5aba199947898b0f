"""Score pictures: reward proxies and the Frechet distance; as a script, compare folders that sample.py wrote.

    python eval_judge.py runs/base runs/awm runs/guarded --reward tiny/pickscore --real runs/renders

Prints a Markdown table and writes report.json and report.png (bars, and the same prompts side by side). All folders must
hold the same prompts and seeds; means carry 95 % bootstrap intervals over prompts. The training scripts take `load_reward` from here.

Rewards: `pickscore` (yuvalkirstain/PickScore_v1), `hpsv2.1` (xswu/HPSv2), `clipscore` (CLIP ViT-L/14), a CLIPModel folder or
hub id scored by PickScore's formula, or `file.py:function` taking (images (b, 3, h, w) in [0, 1], prompts) and returning (b,).
Several make a weighted sum: `pickscore:0.5,hpsv2.1:0.5`.
"""
import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import transformers
import tyro
from einops import rearrange
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor PickScore and HPSv2 use
HUB = {"pickscore": ("yuvalkirstain/PickScore_v1", VIT_H), "hpsv2.1": ("xswu/HPSv2", VIT_H),  # reward: (its model, its processor)
       "clipscore": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14")}
VIT_H_CONFIG = dict(  # HPSv2.1 is an open_clip ViT-H-14; transformers' default activation, quick_gelu, would be wrong for it
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, hidden_act="gelu"),
    projection_dim=1024)


# ---------------------------------------------------------------- command line and files

def fail(message: str):
    """End the process with one line on stderr and exit code 2: the user's input is wrong and nothing was overwritten."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_model(flag: str, name: str, or_else: str = ""):
    """End the process if `name` is no folder and cannot be a hub id either: to ask the hub would take a minute."""
    if not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
        fail(f"{flag} {name}: there is no such folder; give {or_else}a folder or a hub id")


def cannot_load(flag: str, name: str, error: Exception):
    """End the process: why a model cannot be loaded, and what to do about it."""
    why = f"{flag} {name}: cannot be loaded ({type(error).__name__}: {reason(error.__cause__ or error)})"
    if Path(name).is_dir():
        fail(f"{why}; the folder is of another kind of model, or broken")
    needs = " and ".join(dict.fromkeys(HUB.get(name, (name,))))
    away = "copy $HF_HOME from a machine that has them" if name in HUB else f"`hf download {name} --local-dir DIR` elsewhere and give {flag} DIR"
    fail(f"{why}; it needs {needs} from huggingface.co: if gated, accept the licence there and `hf auth login`; if offline, {away}")


def parse(args_class, doc: str):
    """tyro, with its framed errors turned into one line; Ctrl-C and a GPU that runs out of memory, later, become one too."""
    def last_words(kind, error, trace):
        """The interpreter's excepthook, but for these two."""
        if issubclass(kind, KeyboardInterrupt):
            return tqdm.write("interrupted", file=sys.stderr)
        if not issubclass(kind, torch.OutOfMemoryError):
            return sys.__excepthook__(kind, error, trace)
        tqdm.write(f"error: the GPU is out of memory; lower --batch or --size ({reason(error)})", file=sys.stderr)

    sys.excepthook = last_words
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            args, unknown = tyro.cli(args_class, description=doc, return_unknown_args=True)
    except SystemExit as end:
        if end.code:
            fail(" ".join(framed.getvalue().translate(str.maketrans("", "", "╭╮╰╯─│")).split()))
        raise
    if unknown:
        fail(f"unknown flag {unknown[0]}; --help lists them all")
    return args


def read_prompts(path: str, flag: str) -> list[str]:
    """The non-empty lines of a text file; a missing or empty one ends the process, naming `flag`."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{flag} {path}: cannot be read ({e})")
    if not prompts:
        fail(f"{flag} {path}: holds no prompt; one a line")
    return prompts


def make_dir(path: str, flag: str) -> Path:
    """Create a folder that can be written to, or end the process, naming `flag`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        fail(f"{flag} {path}: cannot be written to ({e})")
    return Path(path)


def to_image(picture: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] -> PIL, rounded to 8 bits as diffusers does."""
    return Image.fromarray((picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy())


def grid(pictures: Tensor, columns: int) -> Image.Image:
    """(n, 3, h, w) in [0, 1] -> one picture, row by row; the last row is filled with white."""
    blank = torch.ones(-len(pictures) % columns, *pictures.shape[1:])
    return to_image(rearrange(torch.cat([pictures.cpu(), blank]), "(r c) k h w -> k (r h) (c w)", c=columns))


def save_samples(out: str, pictures: Tensor, rows: list[dict]):
    """PNGs, grid.png and samples.jsonl for (n, 3, h, w) in [0, 1] and n dicts that hold at least prompt and seed."""
    folder = make_dir(out, "--out")
    for old in folder.glob("[0-9]" * 5 + ".png"):
        old.unlink()  # an earlier sample's, of which there may have been more
    for i, picture in enumerate(pictures):
        to_image(picture).save(folder / f"{i:05d}.png")
    (folder / "samples.jsonl").write_text("".join(json.dumps({"file": f"{i:05d}.png", **row}) + "\n" for i, row in enumerate(rows)))
    grid(pictures[:64], min(8, len(pictures))).save(folder / "grid.png")
    print(f"{len(rows)} pictures in {folder}/")


# ---------------------------------------------------------------- rewards

def load_reward(spec: str, device: torch.device, batch: int = 64) -> Callable[[Tensor, list[str]], Tensor]:
    """spec, or "spec:weight,spec:weight" -> function (images (b, 3, h, w) in [0, 1], prompts) -> (b,) fp32 on the CPU.

    Ends the process with a line that names --reward if a spec cannot be loaded, or later if it returns anything but one
    finite number a picture.
    """
    parts = []
    for part in spec.split(","):
        name, _, weight = part.rpartition(":")
        try:
            weight = float(weight)
        except ValueError:  # no weight: the colon is file.py:function's
            name, weight = part, 1.0
        if not np.isfinite(weight):
            fail(f"--reward {part}: its weight must be a finite number")
        if ".py:" in name:
            score = load_function(name)
        else:
            if name not in HUB:
                check_model("--reward", name, f"{', '.join(HUB)}, file.py:function, ")
            try:
                score = load_hps(device) if name == "hpsv2.1" else load_clip(name, device)
            except Exception as e:  # no network, another model class, a broken file: each raises its own
                cannot_load("--reward", name, e)
        parts.append((name, weight, score))

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        """images (n, 3, h, w) in [0, 1] and n prompts -> the weighted sum, (n,) fp32."""
        total = torch.zeros(len(images))
        for i in range(0, len(images), batch):
            some, said = images[i:i + batch], prompts[i:i + batch]
            for name, weight, score in parts:
                try:
                    r = torch.as_tensor(score(some, said)).detach().float().cpu()
                except Exception as e:  # a function is the user's code
                    fail(f"--reward {name}: failed on {tuple(some.shape)} pictures ({type(e).__name__}: {reason(e)})")
                if r.shape != (len(some),):
                    fail(f"--reward {name}: returned shape {tuple(r.shape)} for {len(some)} pictures; it must be ({len(some)},)")
                if not r.isfinite().all():
                    fail(f"--reward {name}: returned {r[~r.isfinite()][0].item()} for the prompt {said[int((~r.isfinite()).nonzero()[0])]!r}")
                total[i:i + batch] += weight * r
        return total

    return reward


def load_clip(name: str, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """PickScore's formula (arXiv 2305.01569) on any CLIPModel: exp(logit_scale) cos(image, text) / 26. clipscore is the plain cosine."""
    model, processor = HUB.get(name, (name, name))
    clip = AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device)
    prepare = AutoProcessor.from_pretrained(processor)
    scale = 1.0 if name == "clipscore" else clip.logit_scale.exp().item() / 26

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        pixels = prepare.image_processor([to_image(x) for x in images], return_tensors="pt")
        return clip_cosine(clip, pixels["pixel_values"], prepare.tokenizer, prompts) * scale

    return score


def clip_cosine(clip: CLIPModel, pixels: Tensor, tokenizer, prompts: list[str]) -> Tensor:
    """Cosine of each picture, prepared (b, 3, s, s), and its prompt: (b,)."""
    words = tokenizer(prompts, padding=True, truncation=True, max_length=clip.config.text_config.max_position_embeddings, return_tensors="pt")
    out = clip(pixel_values=pixels.to(clip.device), **words.to(clip.device))  # its embeddings come normalised
    return (out.image_embeds * out.text_embeds).sum(1)


def load_hps(device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """HPSv2.1 (arXiv 2306.09341, github.com/tgxs002/HPSv2): the cosine of an open_clip ViT-H-14, read into transformers' CLIPModel."""
    model, processor = HUB["hpsv2.1"]
    file, tokenizer = hf_hub_download(model, "HPS_v2.1_compressed.pt"), AutoTokenizer.from_pretrained(processor)
    clip = CLIPModel(CLIPConfig(**VIT_H_CONFIG))
    clip.load_state_dict(from_open_clip(torch.load(file, map_location="cpu", weights_only=True)["state_dict"]))
    clip.eval().requires_grad_(False).to(device)
    return lambda images, prompts: clip_cosine(clip, torch.stack([hps_pixels(x) for x in images]), tokenizer, prompts)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's state dict under the names of transformers' CLIPModel, fp32."""
    names = (("transformer.resblocks", "encoder.layers"), (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.", ".self_attn."),
             (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."), ("ln_pre.", "pre_layrnorm."), ("ln_post.", "post_layernorm."),
             ("ln_final.", "final_layer_norm."), ("conv1.", "embeddings.patch_embedding."), ("class_embedding", "embeddings.class_embedding"),
             ("token_embedding.", "embeddings.token_embedding."), ("positional_embedding", "embeddings.position_embedding.weight"))
    out = {}
    for key, value in state.items():
        value, side = value.float(), "vision_model." if key.startswith("visual.") else "text_model."
        if key in ("visual.proj", "text_projection"):
            out[f"{'visual' if key == 'visual.proj' else 'text'}_projection.weight"] = value.T.contiguous()
        elif key == "logit_scale":
            out[key] = value
        elif key != "attn_mask":
            key = key.removeprefix("visual.")
            for theirs, ours in names:
                key = key.replace(theirs, ours)
            if "in_proj_" in key:  # q, k and v in one
                out |= {side + key.replace("in_proj_", f"{n}_proj."): part.contiguous() for n, part in zip("qkv", value.chunk(3))}
            else:
                out[side + key] = value
    return out


def hps_pixels(picture: Tensor, side: int = 224) -> Tensor:
    """HPSv2's preprocessing: longest side to `side`, bicubic, zero-padded to a square, normalised. (3, h, w) in [0, 1] -> (3, side, side)."""
    image = to_image(picture)
    scale = side / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    x = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return (x - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def load_function(spec: str) -> Callable:
    """`file.py:function`, imported from its path."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        fail(f"--reward {spec}: there is no file {path}")
    module = importlib.util.module_from_spec(s := importlib.util.spec_from_file_location("reward_function", path))
    try:
        s.loader.exec_module(module)
        return getattr(module, name)
    except Exception as e:  # the user's code
        fail(f"--reward {spec}: cannot be imported ({type(e).__name__}: {reason(e)})")


# ---------------------------------------------------------------- Frechet distance

def load_embed(model: str, device: torch.device):
    """(network, processor): a CLIPModel, or a vision model whose output has a pooler_output (ResNet, DINOv2, SigLIP, ...)."""
    check_model("--embed", model)
    try:
        return AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device), AutoImageProcessor.from_pretrained(model)
    except Exception as e:  # a missing folder, no network, another kind of file: each raises its own
        cannot_load("--embed", model, e)


@torch.no_grad()
def embed_images(embed, images: Tensor, batch: int = 64) -> Tensor:
    """Pooled features (n, d) of images (n, 3, h, w) in [0, 1]."""
    net, processor = embed
    run = net.get_image_features if hasattr(net, "get_image_features") else net
    features = []
    for part in images.split(batch):
        inputs = processor([to_image(x) for x in part], return_tensors="pt").to(net.device)
        features.append(run(**inputs).pooler_output.flatten(1).cpu())
    return torch.cat(features)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500), in float64."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(ca cb) from the eigenvalues of the product of two covariances: real and not negative but for rounding
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    return (mean + ca.trace() + cb.trace() - 2 * root).item()


# ---------------------------------------------------------------- the script

@dataclass
class Args:
    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders that sample.py wrote, the first one the baseline"""
    reward: tuple[str, ...] = ("tiny/pickscore",)
    """rewards to score with"""
    real: str | None = None
    """folder of real pictures (renders): adds the Frechet distance to them"""
    embed: str = "tiny/embed"
    """network whose features the Frechet distance compares"""
    bootstrap: int = 2000
    """resamples for the 95 % intervals"""
    out: str = "runs/eval"
    """folder for report.json and report.png"""


def read_folder(folder: str) -> tuple[list[dict], Tensor]:
    """The rows of samples.jsonl and their pictures (n, 3, h, w) in [0, 1]."""
    rows, pictures = [], []
    try:
        rows = [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]
        for row in rows:
            row["prompt"], row["seed"]  # both are needed to pair folders
            pictures.append(torch.from_numpy(np.array(Image.open(Path(folder) / row["file"]).convert("RGB"))).permute(2, 0, 1) / 255)
        return rows, torch.stack(pictures)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        name = f"{folder}/{rows[len(pictures)].get('file', 'samples.jsonl')}" if len(pictures) < len(rows) else folder
        fail(f"{name}: cannot be read as pictures that sample.py wrote ({type(e).__name__}: {reason(e)})")


def bootstrap(values: Tensor, prompts: list[str], n: int) -> tuple[float, float]:
    """95 % interval of the mean of (k,) values, resampling prompts."""
    groups = [values[[i for i, p in enumerate(prompts) if p == q]].mean() for q in dict.fromkeys(prompts)]
    groups = torch.stack(groups)
    draws = groups[torch.randint(len(groups), (n, len(groups)), generator=torch.Generator().manual_seed(0))].mean(1)
    return tuple(draws.quantile(torch.tensor([0.025, 0.975])).tolist())


def draw_report(path: Path, dirs: tuple[str, ...], metrics: dict, folders: dict, prompts: list[str], columns: int = 12):
    """A row of pictures per folder, one column per prompt (the first picture of each), then a bar chart per metric."""
    names = [Path(d.rstrip("/")).name for d in dirs]
    first = [prompts.index(p) for p in list(dict.fromkeys(prompts))[:columns]]
    figure = plt.figure(figsize=(len(first) + 1.2, len(dirs) * 1.02 + 2.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[len(dirs) * 1.02, 2.2])
    axes = top.subplots(len(dirs), len(first), squeeze=False)
    for row, d, name in zip(axes, dirs, names):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axis, i in zip(row, first):
            axis.imshow(folders[d][1][i].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, i in zip(axes[0], first):
        axis.set_title("\n".join(prompts[i].rsplit(" ", 1)), fontsize=7)
    for axis, (name, scores) in zip(bottom.subplots(1, len(metrics), squeeze=False)[0], metrics.items()):
        mean = [scores[d]["mean"] for d in dirs]
        error = [[m - scores[d]["lo"], scores[d]["hi"] - m] if scores[d]["lo"] is not None else [0, 0] for d, m in zip(dirs, mean)]
        axis.barh(names, mean, xerr=np.array(error).T, color=plt.cm.tab10.colors[:len(dirs)], height=0.7, error_kw={"linewidth": 1})
        axis.set_title(name, fontsize=9)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Args):
    """Compare folders."""
    if args.bootstrap < 1:
        fail(f"--bootstrap {args.bootstrap}: must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = {d: read_folder(d) for d in args.dirs}
    keys = {d: [(r["prompt"], r["seed"]) for r in rows] for d, (rows, _) in folders.items()}
    for d in args.dirs[1:]:
        if keys[d] != keys[args.dirs[0]]:
            fail(f"{d}: holds other prompts and seeds than {args.dirs[0]}; sample both with the same --prompts, --n and --seed")
    prompts = [p for p, _ in keys[args.dirs[0]]]
    metrics = {}
    short = [spec.rstrip("/").split("/")[-1] for spec in args.reward]
    for spec, name in zip(args.reward, short if len(set(short)) == len(short) else args.reward):
        reward, name = load_reward(spec, device), f"reward/{name}"
        metrics[name] = {}
        for d, (_, pictures) in tqdm(folders.items(), desc=name, leave=False):
            r = reward(pictures, prompts)
            lo, hi = bootstrap(r, prompts, args.bootstrap)
            metrics[name][d] = {"mean": r.mean().item(), "lo": lo, "hi": hi, "n": len(r), "nan": 0}
    if args.real:
        embed, name = load_embed(args.embed, device), f"fd/{Path(args.embed.rstrip('/')).name}"
        real = embed_images(embed, read_folder(args.real)[1])
        metrics[name] = {d: {"mean": frechet_distance(embed_images(embed, pictures), real), "lo": None, "hi": None, "n": len(pictures), "nan": 0}
                         for d, (_, pictures) in tqdm(folders.items(), desc=name, leave=False)}
    out = make_dir(args.out, "--out")
    (out / "report.json").write_text(json.dumps({"dirs": list(args.dirs), "n": len(prompts), "metrics": metrics}, indent=2) + "\n")
    draw_report(out / "report.png", args.dirs, metrics, folders, prompts)
    print("| folder | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics))
    for d in args.dirs:
        cells = [f"{m[d]['mean']:.4f}" + (f" [{m[d]['lo']:.4f}, {m[d]['hi']:.4f}]" if m[d]["lo"] is not None else "") for m in metrics.values()]
        print(f"| {d} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parse(Args, __doc__))
