"""Judge pictures: reward proxies, a vision-language model's verdict, forensic realism, the Frechet distance; compare folders.

    python eval_judge.py runs/base runs/awm runs/awm+normguard --real runs/renders
    python eval_judge.py A B --reward pickscore hpsv2.1 --judge Qwen/Qwen2.5-VL-7B-Instruct --forensic Organika/sdxl-detector
    python eval_judge.py A B --judge http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-VL-7B-Instruct    # vLLM, OpenAI, ...

A and B are folders that sample.py wrote with the same prompts and seeds: their pictures are paired. Prints a Markdown table and
writes report.json and report.png. Means carry 95 % bootstrap intervals over prompts, the same draws for all folders.

judge/quality compares each two folders picture by picture, asked in both orders: where the two answers disagree, it is a tie.
judge/<dimension> is the mean P(yes) of a question about one picture, forensic/<name> the mean P(real). An answer that cannot
be read is counted under nan, never scored. Scores are kept in OUT/scores.jsonl: run again, nothing is asked twice.

Rewards: `pickscore` (yuvalkirstain/PickScore_v1), `hpsv2.1` (xswu/HPSv2), `clipscore` (CLIP ViT-L/14), a CLIPModel folder or
hub id scored by PickScore's formula, or `file.py:function` taking (images (b, 3, h, w) in [0, 1], prompts) and returning (b,).
Several make a weighted sum: `pickscore:0.5,hpsv2.1:0.5`. The training scripts take `load_reward` from here.
"""
import base64
import contextlib
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import socket
import sys
import textwrap
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from einops import rearrange
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import (AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
                          CLIPConfig, CLIPModel, ViTImageProcessorPil)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a $ in a prompt is a $
import matplotlib.pyplot as plt  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# What the judge is asked. One word answers; only its probability counts.
PAIR = ("Which of these two pictures, A or B, has the better quality? Look at sharpness, colours, light and artifacts, "
        "not at what is shown. Answer with one letter.")
SINGLE = {
    "over-sharpening": "Is this picture over-sharpened, with harsh edges or halos? Answer yes or no.",
    "oversaturation": "Is this picture oversaturated, its colours too strong to be natural? Answer yes or no.",
    "unnatural lighting": "Is the light in this picture unnatural: too harsh, too high in contrast, or from nowhere? Answer yes or no.",
    "artifacts": "Does this picture have artifacts, such as noise, blur, blocks or broken shapes? Answer yes or no.",
    "overall": "Is this picture, all in all, of good quality, natural and free of defects? Answer yes or no.",
}

REAL, FAKE = {"real", "human", "natural", "authentic"}, {"fake", "artificial", "ai", "generated", "synthetic"}  # words of a detector's labels

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
    if isinstance(error, ImportError):  # Qwen-VL's processor also reads videos, for which it wants torchvision
        fail(f"{flag} {name}: needs a package that is not installed: {str(error).strip()[:200]} (for torch 2.13: pip install torchvision==0.28.0)")
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
            return tqdm.write("interrupted" + ("; the same command resumes from the last checkpoint" if hasattr(args_class, "save_every") else ""),
                              file=sys.stderr)
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
        fail(f"{flag} {path}: cannot be read ({e})" + ("; the defaults are for the repository's folder" if path.startswith("tiny/") else ""))
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

def load_reward(spec: str, device: torch.device, batch: int = 64, differentiable: bool = False) -> Callable[[Tensor, list[str]], Tensor]:
    """spec, or "spec:weight,spec:weight" -> function (images (b, 3, h, w) in [0, 1], prompts) -> (b,) fp32 on the CPU.

    `differentiable`: square images are resized by torch instead of PIL (equal but for its rounding to 8 bits) and keep the graph.
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
            if name.endswith(".py"):
                fail(f"--reward {name}: which function of it? Give {name}:FUNCTION")
            if name not in HUB:
                check_model("--reward", name, f"{', '.join(HUB)}, file.py:function, ")
            try:
                score = load_hps(device, differentiable) if name == "hpsv2.1" else load_clip(name, device, differentiable)
            except Exception as e:  # no network, another model class, a broken file: each raises its own
                cannot_load("--reward", name, e)
        parts.append((name, weight, score))

    @torch.set_grad_enabled(differentiable)
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        """images (n, 3, h, w) in [0, 1] and n prompts -> the weighted sum, (n,) fp32."""
        total = torch.zeros(len(images))
        for i in range(0, len(images), batch):
            some, said = images[i:i + batch], prompts[i:i + batch]
            for name, weight, score in parts:
                try:
                    r = torch.as_tensor(score(some, said)).float().cpu()
                except Exception as e:  # a function is the user's code
                    where = traceback.extract_tb(e.__traceback__)[-1]
                    fail(f"--reward {name}: failed on {tuple(some.shape)} pictures ({type(e).__name__}: {reason(e)}; {where.filename}:{where.lineno})")
                if r.shape != (len(some),):
                    fail(f"--reward {name}: returned shape {tuple(r.shape)} for {len(some)} pictures; it must be ({len(some)},)")
                if not r.isfinite().all():
                    fail(f"--reward {name}: returned {r[~r.isfinite()][0].item()} for the prompt {said[int((~r.isfinite()).nonzero()[0])]!r}")
                total[i:i + batch] += weight * r
        return total

    return reward


def torch_pixels(images: Tensor, side: int, mean: list[float], std: list[float]) -> Tensor:
    """Square images (b, 3, h, h) in [0, 1] as CLIP takes them, (b, 3, side, side): what the PIL processors do, with a gradient."""
    x = images if images.shape[2] == side else F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def load_clip(name: str, device: torch.device, differentiable: bool = False) -> Callable[[Tensor, list[str]], Tensor]:
    """PickScore's formula (arXiv 2305.01569) on any CLIPModel: exp(logit_scale) cos(image, text) / 26. clipscore is the plain cosine."""
    model, processor = HUB.get(name, (name, name))
    clip = AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device)
    prepare = AutoProcessor.from_pretrained(processor)
    scale = 1.0 if name == "clipscore" else clip.logit_scale.exp().item() / 26

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        own = prepare.image_processor
        if differentiable:
            pixels = torch_pixels(images, own.crop_size["height"], own.image_mean, own.image_std)
        else:
            pixels = own([to_image(x) for x in images], return_tensors="pt")["pixel_values"]
        return clip_cosine(clip, pixels, prepare.tokenizer, prompts) * scale

    return score


def clip_cosine(clip: CLIPModel, pixels: Tensor, tokenizer, prompts: list[str]) -> Tensor:
    """Cosine of each picture, prepared (b, 3, s, s), and its prompt: (b,)."""
    words = tokenizer(prompts, padding=True, truncation=True, max_length=clip.config.text_config.max_position_embeddings, return_tensors="pt")
    out = clip(pixel_values=pixels.to(clip.device), **words.to(clip.device))  # its embeddings come normalised
    return (out.image_embeds * out.text_embeds).sum(1)


def load_hps(device: torch.device, differentiable: bool = False) -> Callable[[Tensor, list[str]], Tensor]:
    """HPSv2.1 (arXiv 2306.09341, github.com/tgxs002/HPSv2): the cosine of an open_clip ViT-H-14, read into transformers' CLIPModel."""
    model, processor = HUB["hpsv2.1"]
    file, tokenizer = hf_hub_download(model, "HPS_v2.1_compressed.pt"), AutoTokenizer.from_pretrained(processor)
    clip = CLIPModel(CLIPConfig(**VIT_H_CONFIG))
    clip.load_state_dict(from_open_clip(torch.load(file, map_location="cpu", weights_only=True)["state_dict"]))
    clip.eval().requires_grad_(False).to(device)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        pixels = torch_pixels(images, 224, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if differentiable else torch.stack([hps_pixels(x) for x in images])
        return clip_cosine(clip, pixels, tokenizer, prompts)

    return score


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


# ---------------------------------------------------------------- judge and detector

def messages(question: str, pictures: list[dict]) -> list[dict]:
    """A chat of one message: the pictures (content parts), called A and B if there are two, then the question."""
    if len(pictures) > 1:
        pictures = [part for name, picture in zip("AB", pictures) for part in ({"type": "text", "text": f"Picture {name}:"}, picture)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def read_answer(top: list[tuple[str, float]], first: str, second: str) -> float:
    """log p(first) - log p(second) for two answer words, from the likeliest first tokens of an answer and their log-probabilities.

    Case and space variants of a word are summed. A word that is not listed has at most what the listed ones leave, and at most
    what the least of them has. NaN if the two together have less than 1 %: the answer cannot be read.
    """
    p = [sum(math.exp(logprob) for token, logprob in top if token.strip(" .,*\"'\n").lower() == word) for word in (first.lower(), second.lower())]
    if sum(p) < 0.01:
        return math.nan
    rest = max(min(1 - sum(math.exp(logprob) for _, logprob in top), *(math.exp(logprob) for _, logprob in top)), 1e-9)
    return math.log(p[0] or rest) - math.log(p[1] or rest)


def local_judge(name: str, device: torch.device) -> Callable:
    """ask(question, [[file, ...], ...]) -> for each, the 20 likeliest first tokens of the answer and their log-probabilities."""
    check_model("--judge", name, "http://HOST:PORT/v1, ")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--judge", name, e)
    if not processor.chat_template:
        fail(f"--judge {name}: has no chat template; give an instruction-tuned model")
    model.eval().to(device)
    processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def ask(question: str, pictures: list[list[str]]) -> list[list[tuple[str, float]]]:
        """A batch, in one forward pass."""
        chats = [messages(question, [{"type": "image", "image": Image.open(file).convert("RGB")} for file in files]) for files in pictures]
        inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                                               processor_kwargs={"padding": True}).to(device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[0]
        top = out.float().log_softmax(1).topk(min(20, out.shape[1]))
        return [[(processor.tokenizer.decode([i]), p) for i, p in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())]

    return ask


def http_judge(url: str, model: str, timeout: float, retries: int, concurrency: int) -> Callable:
    """The same from an OpenAI-compatible server: POST URL/chat/completions with logprobs; its key, if any, from OPENAI_API_KEY.

    A request that fails is tried again after 1, 2, 4, ... seconds (or Retry-After); then its answer is an empty list. A server that
    cannot be reached, refuses the key or the model, or answers none of a first batch ends the process.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    errors, fatal, worked = set(), [], []

    def request(question: str, files: list[str]) -> list[tuple[str, float]]:
        """One question."""
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()}}
                 for file in files]
        body = json.dumps({"model": model, "messages": messages(question, parts), "temperature": 0, "max_tokens": 1, "logprobs": True,
                           "top_logprobs": 20}).encode()
        error, wait = "", 0.0
        for attempt in range(0 if fatal else retries + 1):
            time.sleep(max(wait, min(2 ** (attempt - 1), 30)) if attempt else 0)
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers), timeout=timeout) as reply:
                    choice = json.load(reply)["choices"][0]
                worked.append(True)
                if choice.get("logprobs"):
                    return [(t["token"], float(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
                return [(choice["message"]["content"].split()[0], 0.0)]  # a server without logprobs: the word itself, taken as certain
            except urllib.error.HTTPError as e:
                error = f"{e.code} {e.reason} {e.read(200).decode(errors='replace')}"
                wait = float(after) if (after := e.headers.get("Retry-After", "")).isdigit() else 0.0  # a rate limit's, in seconds
                if e.code in (401, 403, 404):
                    fatal.append(f"--judge {url}: the server says {error}; is --judge-model {model} right, and the key in OPENAI_API_KEY?")
                    return []
                if e.code < 500 and e.code not in (408, 429):
                    break  # it will not like it better the next time
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:  # no, a cut or an unreadable reply
                error = f"{type(e).__name__}: {reason(e)}"
                if attempt == retries and isinstance(getattr(e, "reason", None), (ConnectionRefusedError, socket.gaierror)):
                    fatal.append(f"--judge {url}: cannot be reached ({reason(e)})")
        if not fatal and error not in errors:
            tqdm.write(f"warning: --judge {url}: {error}", file=sys.stderr)
            errors.add(error)
        return []

    def ask(question: str, pictures: list[list[str]]) -> list[list[tuple[str, float]]]:
        """A batch, `concurrency` requests at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda files: request(question, files), pictures))
        if not worked and not fatal:
            fatal.append(f"--judge {url}: no request has succeeded; the last one: {errors.pop()}")
        if fatal:
            fail(fatal[0])
        return answers

    return ask


def load_forensic(name: str, real_label: str | None, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A detector of generated pictures (any image classifier): files -> P(real), (b,)."""
    check_model("--forensic", name)
    try:
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except ValueError:  # detectors of 2022 name a class that transformers 5 has no more
            processor = ViTImageProcessorPil.from_pretrained(name)
        net = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval().to(device)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--forensic", name, e)
    real = real_labels(name, net.config.id2label, real_label)

    @torch.no_grad()
    def score(files: list[str]) -> Tensor:
        """Files -> (b,)."""
        inputs = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").to(device)
        return net(**inputs).logits.softmax(1)[:, real].sum(1).cpu()

    return score


def real_labels(name: str, labels: dict[int, str], real_label: str | None) -> list[int]:
    """Which of a detector's labels mean a real picture: --real-label, or by their words, all of which must be known."""
    if real_label is not None:
        if real_label not in labels.values():
            fail(f"--real-label {real_label}: {name} has no such label; its labels are {', '.join(labels.values())}")
        return [i for i, label in labels.items() if label == real_label]
    words = {i: set(re.findall("[a-z]+", label.lower())) for i, label in labels.items()}
    real, fake = ([i for i, w in words.items() if w & mine and not w & other] for mine, other in ((REAL, FAKE), (FAKE, REAL)))
    if not real or not fake or len(real) + len(fake) < len(labels):
        fail(f"--forensic {name}: which of its labels ({', '.join(labels.values())}) means a real picture? Give it as --real-label")
    return real


# ---------------------------------------------------------------- Frechet distance

def load_embed(model: str, device: torch.device):
    """(network, processor): a CLIPModel, or a vision model whose output has a pooler_output (ResNet, DINOv2, SigLIP, ...)."""
    check_model("--embed", model)
    try:
        return AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device), AutoImageProcessor.from_pretrained(model)
    except Exception as e:  # a missing folder, no network, another kind of file: each raises its own
        cannot_load("--embed", model, e)


@torch.no_grad()
def embed_images(embed, images: Tensor | list[Tensor], batch: int = 64) -> Tensor:
    """Pooled features (n, d) of images (3, h, w) in [0, 1], each of any size."""
    net, processor = embed
    run = net.get_image_features if hasattr(net, "get_image_features") else net
    features = []
    for i in range(0, len(images), batch):
        inputs = processor([to_image(x) for x in images[i:i + batch]], return_tensors="pt").to(net.device)
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
    judge: str | None = "tiny/judge"
    """vision-language model: a folder, a hub id, or an OpenAI-compatible server http://HOST:PORT/v1; none for no judge"""
    judge_model: str | None = None
    """the model's name on that server"""
    judge_timeout: float = 60.0
    """seconds until a request to the server has failed"""
    judge_retries: int = 3
    """further tries then, after 1, 2, 4, ... seconds"""
    judge_concurrency: int = 8
    """requests at a time"""
    forensic: tuple[str, ...] = ("tiny/forensic",)
    """detectors of generated pictures: image classifiers, folders or hub ids"""
    real_label: str | None = None
    """their label for a real picture, where its name does not tell"""
    real: str | None = None
    """folder of real pictures (renders): adds the Frechet distance to them"""
    embed: str = "tiny/embed"
    """network whose features the Frechet distance compares"""
    batch: int = 16
    """pictures or questions at once"""
    bootstrap: int = 2000
    """resamples for the 95 % intervals"""
    out: str = "runs/eval"
    """folder for report.json, report.png and scores.jsonl"""


def read_folder(folder: str, plain: bool = False) -> list[dict]:
    """The rows of samples.jsonl, each with its picture's file, size and content hash. `plain`: any folder of pictures will do."""
    rows, row = [], {}
    if not Path(folder).is_dir():
        fail(f"{folder}: there is no such folder")
    try:
        if plain and not (Path(folder) / "samples.jsonl").exists():
            found = sorted(p.name for p in Path(folder).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            lines = [{"prompt": "", "seed": i, "file": name} for i, name in enumerate(found)]
        else:
            lines = [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]
            if not all(isinstance(line, dict) and isinstance(line.get("prompt"), str) for line in lines):
                raise ValueError("a line is no JSON object with a prompt")
        for row in lines:
            content = (Path(folder) / row["file"]).read_bytes()
            size = Image.open(io.BytesIO(content)).convert("RGB").size  # decodes it: a broken file is to show now
            rows.append({"key": (row["prompt"], row["seed"]), "prompt": row["prompt"], "file": f"{folder}/{row['file']}", "size": size,
                         "hash": hashlib.sha256(content).hexdigest()})
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as e:  # SyntaxError: PIL's for a broken PNG
        fail(f"{folder}/{row.get('file', 'samples.jsonl')}: cannot be read, as sample.py writes it ({type(e).__name__}: {reason(e)})")
    if not rows:
        fail(f"{folder}: holds no picture")
    seen = Counter()
    for row in rows:  # a prompt and seed that come again are told apart by their order
        seen[row["key"]] += 1
        row["key"] += (seen[row["key"]],)
    return rows


def pair_folders(dirs: tuple[str, ...]) -> dict[str, list[dict]]:
    """Each folder's rows, in one order: the prompts and seeds that all folders have."""
    if not dirs:
        fail("give the folders to compare, as sample.py writes them, before the flags")
    if len(set(dirs)) < len(dirs):
        fail(f"{next(d for d in dirs if dirs.count(d) > 1)}: is given twice")
    folders = {d: {row["key"]: row for row in read_folder(d)} for d in dirs}
    common = [key for key in folders[dirs[0]] if all(key in rows for rows in folders.values())]
    for d, rows in folders.items():
        if not common:
            fail(f"{d}: no prompt and seed is in all folders; sample them with the same --prompts, --n and --seed")
        if len(common) < len(rows):
            print(f"note: {len(common)} of the {len(rows)} pictures in {d} are in all folders; the others are left out")
    folders = {d: [rows[key] for key in common] for d, rows in folders.items()}
    size = folders[dirs[0]][0]["size"]
    for row in (row for rows in folders.values() for row in rows):
        if row["size"] != size:
            fail(f"{row['file']}: is {row['size'][0]}x{row['size'][1]}, others are {size[0]}x{size[1]}; compare pictures of one size")
    return folders


def load_pictures(files: list[str]) -> Tensor:
    """Files of one size -> (n, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255 for file in files])


def identity(name: str) -> str:
    """What a score depends on besides the picture: a model's name and, of a folder or file, sizes and times of change."""
    paths = [Path(part.split(":")[0]) for part in name.split(",")]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    return " ".join([name, *(f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in files)])


def cached(out: Path, jobs: dict[str, object], load: Callable[[], Callable], batch: int, desc: str) -> dict[str, float]:
    """The score of each job by its key, from OUT/scores.jsonl if it is there, else by score = load(), score(jobs) -> numbers, and
    added to the file batch by batch. A NaN is not kept: the next run tries again. Jobs go in the order of their keys, so that
    the order of the folders changes nothing."""
    file, known = out / "scores.jsonl", {}
    text = file.read_text() if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a line that was cut short
            known |= json.loads(line)
    missing = sorted(key for key in jobs if key not in known)
    score = load() if missing else None
    with open(file, "a") as log:
        log.write("" if text.endswith("\n") or not text else "\n")
        for i in tqdm(range(0, len(missing), batch), desc=desc, leave=False):
            keys = missing[i:i + batch]
            for key, value in zip(keys, score([jobs[k] for k in keys])):
                known[key] = value
                if math.isfinite(value):
                    log.write(json.dumps({key: value}) + "\n")
            log.flush()
    return {key: known[key] for key in jobs}


def key(*what) -> str:
    """A job's key: a hash of all that its score depends on."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def summary(values: Tensor, prompts: list[str], draws: int) -> dict:
    """Mean of (k,) values, its 95 % interval by resampling prompts with all their pictures (pictures, if there is but one prompt; none of
    a single one), and how many values are NaN and left out."""
    known = ~values.isnan()
    units = prompts if len(set(prompts)) > 1 else range(len(prompts))
    place = {unit: i for i, unit in enumerate(dict.fromkeys(unit for unit, k in zip(units, known) if k))}
    if not place:
        return {"mean": None, "lo": None, "hi": None, "n": 0, "nan": len(values)}
    values, where = values[known].double(), torch.tensor([place[unit] for unit, k in zip(units, known) if k])
    sums, counts = (torch.zeros(len(place), dtype=torch.float64).index_add_(0, where, x) for x in (values, torch.ones_like(values)))
    drawn = torch.randint(len(place), (draws, len(place)), generator=torch.Generator().manual_seed(0))
    bounds = (sums[drawn].sum(1) / counts[drawn].sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    lo, hi = bounds if len(place) > 1 else (None, None)
    return {"mean": values.mean().item(), "lo": lo, "hi": hi, "n": len(values), "nan": int((~known).sum())}


def score_rows(out: Path, folders: dict[str, list[dict]], who: str, load: Callable[[], Callable], batch: int, desc: str) -> dict[str, Tensor]:
    """Each folder's scores, (n,) float64, of a model that `who` tells from all others; load() gives its score(rows) -> numbers."""
    keys = {d: [key(who, row["prompt"], row["hash"]) for row in rows] for d, rows in folders.items()}
    known = cached(out, {k: row for d, rows in folders.items() for k, row in zip(keys[d], rows)}, load, batch, desc)
    return {d: torch.tensor([known[k] for k in ks], dtype=torch.float64) for d, ks in keys.items()}


def compare_pairs(judge: Callable[[], Callable], who: str, folders: dict[str, list[dict]], prompts: list[str], draws: int, batch: int, out: Path) -> dict:
    """Each two folders compared by PAIR in both orders, picture by picture; counts and the rate (a tie is half) are the first one's."""
    both = [(x, y) for a, b in combinations(folders, 2) for x, y in zip(folders[a], folders[b])]
    jobs = {key(who, x["hash"], y["hash"]): [x["file"], y["file"]] for a, b in both for x, y in ((a, b), (b, a))}
    margin = cached(out, jobs, lambda: lambda files: [read_answer(top, "A", "B") for top in judge()(PAIR, files)], batch, "judge/quality")
    pairs = {}
    for a, b in combinations(folders, 2):
        there, back = (torch.tensor([margin[key(who, x["hash"], y["hash"])] for x, y in zip(folders[one], folders[two])], dtype=torch.float64)
                       for one, two in ((a, b), (b, a)))
        nan, win, loss = (there + back).isnan(), (there > 0) & (back < 0), (there < 0) & (back > 0)
        value = summary(torch.where(nan, torch.nan, 0.5 + 0.5 * (win.double() - loss.double())), prompts, draws)
        pairs[f"{a} vs {b}"] = {"win": int(win.sum()), "tie": int((~win & ~loss & ~nan).sum()), "loss": int(loss.sum()), "nan": int(nan.sum()),
                                "rate": value["mean"], "lo": value["lo"], "hi": value["hi"],
                                "margin": ((there - back) / 2)[~nan].mean().item() if not nan.all() else None}
    return pairs


def arrow(name: str) -> str:
    """Which way a metric is better."""
    return "↓" if name.startswith("fd/") or name.startswith("judge/") and name != "judge/overall" else "↑"


def short_names(paths: tuple[str, ...]) -> list[str]:
    """The last part of each path or model id, or all of it where two would be alike."""
    short = [",".join(part.rstrip("/").split("/")[-1] for part in path.split(",")) for path in paths]  # a sum of rewards has parts
    return short if len(set(short)) == len(short) else list(paths)


def draw_report(path: Path, folders: dict[str, list[dict]], metrics: dict, pairs: dict, columns: int = 12):
    """A row of pictures per folder, one column per prompt (the first picture of each); bars per metric; the judge's verdicts."""
    dirs, prompts = list(folders), [row["prompt"] for row in next(iter(folders.values()))]
    names, colour = dict(zip(dirs, short_names(dirs))), {d: plt.cm.tab10.colors[i % 10] for i, d in enumerate(dirs)}
    first = [prompts.index(p) for p in list(dict.fromkeys(prompts))[:columns]]
    wide = min(5, len(metrics))
    high = [1.02 * len(dirs), -(-len(metrics) // wide) * (0.22 * len(dirs) + 0.6)] + ([0.3 * len(pairs) + 0.4] if pairs else [])
    figure = plt.figure(figsize=(max(len(first), 8) + 1.2, sum(high) + 0.3), layout="constrained")
    strip, bars, *verdicts = figure.subfigures(len(high), 1, height_ratios=high)
    axes = strip.subplots(len(dirs), len(first), squeeze=False)
    for row, d in zip(axes, dirs):
        row[0].set_ylabel(names[d], rotation=0, ha="right", va="center", fontsize=9)
        for axis, i in zip(row, first):
            axis.imshow(load_pictures([folders[d][i]["file"]])[0].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
    for axis, i in zip(axes[0], first):
        axis.set_title("\n".join(textwrap.wrap(prompts[i], 16)[:2]), fontsize=7)
    for axis, (name, scores) in zip((charts := bars.subplots(-(-len(metrics) // wide), wide, squeeze=False, sharey=True).flatten()), metrics.items()):
        mean = [math.nan if scores[d]["mean"] is None else scores[d]["mean"] for d in dirs]  # a NaN draws no bar
        error = [[m - scores[d]["lo"], scores[d]["hi"] - m] if scores[d]["lo"] is not None else [0, 0] for d, m in zip(dirs, mean)]
        axis.barh([names[d] for d in dirs], mean, xerr=np.array(error).clip(0).T, color=colour.values(), height=0.75, error_kw={"linewidth": 1})
        lost = sum(m["nan"] for m in scores.values())
        axis.set_title(f"{name} {arrow(name)}" + (f" ({lost} not read)" if lost else ""), fontsize=9)
        axis.tick_params(labelsize=8)
    charts[0].invert_yaxis()
    for axis in verdicts and [verdicts[0].subplots()]:
        for i, ((a, b), said) in enumerate(zip(combinations(dirs, 2), pairs.values())):
            left = 0
            for what, count, shade in ((names[a], said["win"], colour[a]), ("tie", said["tie"], "lightgray"), (names[b], said["loss"], colour[b]),
                                       ("not read", said["nan"], "white")):
                axis.barh(i, count, left=left, color=shade, height=0.75)
                axis.text(left + count / 2, i, f"{what} {count}" if count > 0.06 * len(prompts) else count or "", ha="center", va="center", fontsize=8, clip_on=True)
                left += count
        axis.set(yticks=range(len(pairs)), yticklabels=[f"{names[a]} vs {names[b]}" for a, b in combinations(dirs, 2)], xticks=[], xlim=(0, len(prompts)))
        axis.set_title("judge/quality: pictures preferred, whichever is shown first", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    for axis in figure.axes:
        axis.spines[["top", "right"] if axis in charts[:len(metrics)] else list(axis.spines)].set_visible(False)
        axis.set_visible(axis not in charts[len(metrics):])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(dirs: tuple[str, ...], metrics: dict, pairs: dict) -> str:
    """The report in Markdown."""
    lines = ["| metric | " + " | ".join(dirs) + " |", "|---|" + "---|" * len(dirs)]
    for name, scores in metrics.items():
        cells = []
        for m in (scores[d] for d in dirs):
            cell = "-" if m["mean"] is None else f"{m['mean']:.4f}"
            cell += f" [{m['lo']:.4f}, {m['hi']:.4f}]" if m["lo"] is not None else ""
            cells.append(cell + (f" ({m['nan']} of {m['n'] + m['nan']} not read)" if m["nan"] else ""))
        lines.append(f"| {name} {arrow(name)} | " + " | ".join(cells) + " |")
    if pairs:
        lines += ["", "| judge/quality | win | tie | loss | not read | rate |", "|---|---|---|---|---|---|"]
    for name, m in pairs.items():
        rate = "-" if m["rate"] is None else f"{m['rate']:.3f}" + (f" [{m['lo']:.3f}, {m['hi']:.3f}]" if m["lo"] is not None else "")
        lines.append(f"| {name} | {m['win']} | {m['tie']} | {m['loss']} | {m['nan']} | {rate} |")
    return "\n".join(lines)


def main(args: Args):
    """Compare folders."""
    for flag, least in (("bootstrap", 1), ("batch", 1), ("judge_concurrency", 1), ("judge_retries", 0), ("judge_timeout", 1e-3)):
        if not getattr(args, flag) >= least:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = pair_folders(args.dirs)
    real_rows = read_folder(args.real, plain=True) if args.real else []
    prompts = [row["prompt"] for row in folders[args.dirs[0]]]
    if args.real and min(len(prompts), len(real_rows)) < 2:
        fail(f"--real {args.real}: a Frechet distance takes at least two pictures, here {len(prompts)} against {len(real_rows)}")
    args.judge = None if args.judge in (None, "none") else args.judge
    if not (args.reward or args.forensic or args.judge or args.real):
        fail("nothing to compare by: give --reward, --judge, --forensic or --real")
    server = bool(args.judge) and args.judge.startswith("http")
    if server and not args.judge_model:
        fail(f"--judge {args.judge}: give the model's name on that server as --judge-model")
    tiny = [name for name in (args.judge, *args.forensic, *args.reward) if name and name.startswith("tiny/")]
    if tiny and folders[args.dirs[0]][0]["size"] != (64, 64):
        print(f"note: {', '.join(tiny)} know only the miniature's 64x64 pictures; what they say of these means little")
    out, values, metrics, pairs = make_dir(args.out, "--out"), {}, {}, {}

    def reward_of(spec: str) -> Callable:
        """score(rows) of a reward."""
        reward = load_reward(spec, device)
        return lambda rows: reward(load_pictures([row["file"] for row in rows]), [row["prompt"] for row in rows]).tolist()

    def realism_of(spec: str) -> Callable:
        """score(rows) of a detector."""
        detector = load_forensic(spec, args.real_label, device)
        return lambda rows: detector([row["file"] for row in rows]).tolist()

    @functools.cache
    def judge() -> Callable:
        """The judge's ask(question, pictures)."""
        return http_judge(args.judge, args.judge_model, args.judge_timeout, args.judge_retries, args.judge_concurrency) if server else local_judge(
            args.judge, device)

    # a model is loaded where a score is missing, and let go after
    for spec, name in zip(args.reward, short_names(args.reward)):
        values[f"reward/{name}"] = score_rows(out, folders, identity(spec), lambda s=spec: reward_of(s), args.batch, f"reward/{name}")
    for spec, name in zip(args.forensic, short_names(args.forensic)):
        values[f"forensic/{name}"] = score_rows(out, folders, f"{identity(spec)} {args.real_label}", lambda s=spec: realism_of(s), args.batch,
                                                f"forensic/{name}")
    if args.judge:
        who, batch = f"{identity(args.judge)} {args.judge_model}", args.batch * (args.judge_concurrency if server else 1)
        for name, question in SINGLE.items():
            margin = score_rows(out, folders, f"{who} {question}", lambda q=question: lambda rows: [
                read_answer(top, "yes", "no") for top in judge()(q, [[row["file"]] for row in rows])], batch, f"judge/{name}")
            values[f"judge/{name}"] = {d: m.sigmoid() for d, m in margin.items()}
        pairs = compare_pairs(judge, f"{who} {PAIR}", folders, prompts, args.bootstrap, batch, out)
    for name, by_folder in values.items():
        metrics[name] = {d: summary(v, prompts, args.bootstrap) for d, v in by_folder.items()}
        for d, numbers in list(metrics[name].items())[1:]:  # paired: the same prompts and noise
            diff = summary(by_folder[d] - by_folder[args.dirs[0]], prompts, args.bootstrap)
            numbers["diff"] = {k: diff[k] for k in ("mean", "lo", "hi")}
    if args.real:
        def features(embed, some: list[dict]) -> Tensor:
            """Of rows' pictures, which may differ in size: (n, d)."""
            parts = [some[i:i + args.batch] for i in range(0, len(some), args.batch)]
            return torch.cat([embed_images(embed, [load_pictures([row["file"]])[0] for row in part]) for part in tqdm(parts, desc=name, leave=False)])

        def distances(dirs: list[str]) -> list[float]:
            """Of folders to the real pictures."""
            embed = load_embed(args.embed, device)
            theirs = features(embed, real_rows)
            return [frechet_distance(features(embed, folders[d]), theirs) for d in dirs]

        name, who, theirs = f"fd/{short_names((args.embed,))[0]}", identity(args.embed), sorted(row["hash"] for row in real_rows)
        keys = {d: key(who, sorted(row["hash"] for row in rows), theirs) for d, rows in folders.items()}
        fd = cached(out, {k: d for d, k in keys.items()}, lambda: distances, len(keys), name)
        metrics[name] = {d: {"mean": fd[k], "lo": None, "hi": None, "n": len(prompts), "nan": 0} for d, k in keys.items()}
        if len(prompts) < 128 or len(real_rows) < 128:
            print(f"note: {name} of {len(prompts)} pictures to {len(real_rows)}: so few make it larger than it is, and noisy")

    report = {"dirs": list(args.dirs), "n": len(prompts), "args": asdict(args), "metrics": metrics, "pairs": {"judge/quality": pairs} if pairs else {}}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_report(out / "report.png", folders, metrics, pairs)
    print(table(args.dirs, metrics, pairs))


if __name__ == "__main__":
    main(parse(Args, __doc__))
