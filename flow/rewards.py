"""Rewards: functions (images (b, 3, h, w) in [0, 1], prompts), or (images, prompts, metadata), -> (b,).

A reward is given as text:
  pickscore, hpsv2.1, clipscore    yuvalkirstain/PickScore_v1, xswu/HPSv2, CLIP ViT-L/14
  aesthetic, ocr                   LAION's aesthetic predictor on CLIP ViT-L/14; the prompt's quoted text can be read
  a folder or a hub id             a CLIPModel, scored by PickScore's formula
  file.py:function                 your own function
  vlm:MODEL, vlm:MODEL@URL         P(yes) of a vision-language model's answer to a question, here or on a server
  A:0.5,B:0.5                      a weighted sum of these
"""
import contextlib
import copy
import inspect
import math
import re
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flow.cli import InputError, load_whole, loading, on_error, quiet_libraries, reason
from flow.pictures import to_bytes, to_image
from flow.prompts import warn_cut

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and HPSv2 use its processor
VIT_L = "openai/clip-vit-large-patch14"
HUB = {"pickscore": ("yuvalkirstain/PickScore_v1", VIT_H),  # reward: (its model, its processor, its head if it has one)
       "hpsv2.1": ("xswu/HPSv2", VIT_H),
       "clipscore": (VIT_L, VIT_L),
       "aesthetic": (VIT_L, VIT_L, "camenduru/improved-aesthetic-predictor")}
KNOWN = f"{', '.join(HUB)}, ocr, file.py:function, vlm:MODEL, "
KEY = re.compile(r"\[[^]]*]$")  # at the end of a function's name: which score of its dict is used
VLM_QUESTION = 'Does this picture show "{prompt}", without defects? Answer yes or no.'


def split_reward(spec: str) -> list[tuple[str, float]]:
    """The parts of a reward and their weights: "A:0.5,B" -> [("A", 0.5), ("B", 1.0)]."""
    parts = []
    for part in map(str.strip, spec.split(",")):
        name, _, weight = part.rpartition(":")
        is_weight = not re.search(r"\.py$|://[^/]*$", name)  # but a function, which may be called nan, or a port
        try:
            weight = float(weight if is_weight else "")
        except ValueError:
            name, weight = part, 1.0
        if not name:
            raise InputError(f"--reward '{spec}': a name is missing; give {KNOWN}a folder or a hub id")
        if not math.isfinite(weight):
            raise InputError(f"--reward {part}: its weight must be a finite number")
        parts.append((name, weight))
    return parts


def reward_model(name: str) -> str:
    """The file, folder or model id behind one part of a reward."""
    if name.startswith("vlm:"):
        return name.removeprefix("vlm:").partition("@")[0]
    if ".py:" in name:
        return name.rpartition(":")[0]
    return HUB.get(name, [name])[0]


def short_reward(spec: str) -> str:
    """The reward's text with only the last piece of each path or id: "DIR/clip:0.5,vlm:ORG/M@URL" -> "clip:0.5,M"."""
    short = []
    for text, (name, _) in zip(map(str.strip, spec.split(",")), split_reward(spec)):
        weight = text.removeprefix(name)  # as it was written
        name = (reward_model(name) if name.startswith("vlm:") else name).rstrip("/").rpartition("/")[2]
        short.append(name + weight)
    return ",".join(short)


def load_reward(spec: str, device: torch.device, batch: int = 64, differentiable: bool = False,
                question: str | None = None, flag: str = "--reward") -> Callable:
    """Load a reward as a function (images, prompts) -> (n,) fp32 on the CPU, which scores `batch` images at once.

    Images are (n, 3, h, w) in [0, 1]; a video (n, frames, 3, h, w) gets the mean of at most four evenly spaced frames.
    `question` is what a vlm is asked (None: VLM_QUESTION); {prompt} in it becomes the image's prompt. `differentiable`
    scores have gradients to the images, which must be square; they differ from the others by rounding to 8 bits.
    Attributes of the function: `models`; `names` of the parts and, after the first call, of each score in a dict that a
    part returns; `scores_of(images, prompts) -> (names, n)`; `weighted(scores) -> (n,)`; `check_prompts(rows)`, about
    prompts that a part cuts or cannot use. It and scores_of take as `metadata` a dict per image, for functions that
    take a third argument. A call moves the models to `device`; move them away to free its memory.
    Raises InputError if a part cannot be loaded, or later if it returns anything but one finite number per image."""
    quiet_libraries()
    with naming(flag):
        parts = [(name, weight, load_part(name, device, differentiable, question))
                 for name, weight in split_reward(spec)]
    models = [score.model for _, _, score in parts if hasattr(score, "model")]

    @naming(flag)
    @torch.set_grad_enabled(differentiable)
    def scores_of(images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        metadata = metadata or [{} for _ in prompts]
        if images.ndim == 5:
            frames = torch.linspace(0, images.shape[1] - 1, min(4, images.shape[1])).round().long()
            prompts, metadata = [[x for x in values for _ in frames] for values in (prompts, metadata)]
            scores = scores_of(images[:, frames].flatten(0, 1), prompts, metadata)
            return scores.view(len(scores), len(images), len(frames)).mean(2)
        for model in models:
            model.to(device)
        rows, reward.names = [], []
        for short, (name, _, score) in zip(names, parts):  # each gets a copy of the images, as it may write into them
            rows.append(torch.cat([call_part(name, score, images[i:i + batch].clone(), prompts[i:i + batch],
                                             metadata[i:i + batch])
                                   for i in range(0, len(images), batch)], 1))
            reward.names += [short, *(f"{KEY.sub('', short)}[{key}]" for key in getattr(score, "logged", ()))]
        return torch.cat(rows)

    def weighted(scores: Tensor) -> Tensor:
        scores = dict(zip(reward.names, scores))
        return sum(weight * scores[name] for name, (_, weight, _) in zip(names, parts))

    def reward(images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        return weighted(scores_of(images, prompts, metadata))

    @naming(flag)
    def check_prompts(rows: list[dict]):
        for _, _, score in parts:
            getattr(score, "check", len)(rows)  # len: nothing to check

    names = [name for name, _, _ in parts]
    short = [short_reward(name) for name in names]
    functions, short_functions = [{KEY.sub("", text) for text in texts} for texts in (names, short)]
    names = reward.names = short if len(short_functions) == len(functions) else names
    reward.models, reward.scores_of, reward.weighted = models, scores_of, weighted
    reward.check_prompts, reward.deviations = check_prompts, running_deviations
    if differentiable:
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = scores_of(images, ['"a picture"']) + 0 * images.sum()  # NumPy code has no gradient
        for short, (name, _, _) in zip(names, parts):
            if not torch.autograd.grad(scores[reward.names.index(short)], images, retain_graph=True)[0].any():
                raise InputError(f"--adjoint: --reward {name} has no gradient")
    return reward


@contextlib.contextmanager
def naming(flag: str):
    """Inside, an InputError names this flag in place of --reward."""
    try:
        yield
    except InputError as e:
        raise InputError(str(e).replace("--reward", flag, 1))


def running_deviations(scores: Tensor, variances: list[Tensor], epoch: int) -> Tensor:
    """The deviation of each row of an epoch's scores (rows, n), root mean square over the epochs so far, (rows, 1); 1
    for rows that are constant up to rounding. variances: [(rows, 1)], summed over the epochs; this one's are added."""
    variances[0] += scores.nan_to_num().double().var(1, keepdim=True)
    std = (variances[0] / (epoch + 1)).sqrt().float()
    return torch.where(std > 1e-6 * scores.abs().amax(1, keepdim=True), std, 1.0)


def takes_metadata(function: Callable) -> bool:
    """Whether a function takes a third argument by position."""
    function = function.forward if isinstance(function, torch.nn.Module) else function  # __call__ takes anything
    with contextlib.suppress(TypeError, ValueError):  # of a built-in function, which has no signature
        parameters = inspect.signature(function).parameters.values()
        return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 2
    return False


def call_part(name: str, score: Callable, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """score(images, prompts), or score(images, prompts, metadata) if it takes that, as (1, b) fp32 on the CPU, and a
    row more for each score that is only logged. Raises InputError unless the first is one finite number per image."""
    n, path = len(images), reward_model(name)
    try:
        third = [[copy.deepcopy(fields) for fields in metadata]] if takes_metadata(score) else []
        returned = score(images, prompts, *third)
    except InputError:  # a vlm's, or about a dict's keys
        raise
    except (Exception, SystemExit) as e:  # a function is the user's code: name its file and line
        frames = traceback.extract_tb(e.__traceback__)
        at = next((frame for frame in frames if frame.filename == path), frames[-1])
        why = f"{type(e).__name__}: {reason(e)}; {at.filename}:{at.lineno}"
        called = f"{tuple(images.shape)} pictures, {n} prompts{f', {n} dicts' * len(third)}"
        raise InputError(f"--reward {name}: failed when called with {called} ({why})")
    rows = returned if isinstance(returned, list) else [returned]
    with on_error(f"--reward {name}: returned {rows[0]!r:.60}", f"; it must be {n} numbers, one for each picture"):
        rows = [torch.as_tensor(row).float().cpu() for row in rows]
    rows = [row[:, 0] if row.shape == (n, 1) else row for row in rows]
    if rows[0].shape != (n,):  # the others are of a dict, and have it
        raise InputError(f"--reward {name}: returned shape {tuple(rows[0].shape)} for {n} pictures; it must be ({n},)")
    for value, prompt in zip(rows[0].tolist(), prompts):
        if not math.isfinite(value):
            raise InputError(f"--reward {name}: returned {value} for the prompt {prompt!r}")
    return torch.stack(rows)


def load_part(name: str, device: torch.device, differentiable: bool, question: str | None) -> Callable:
    """One part of a reward, without its weight."""
    if name.startswith("vlm:"):
        return load_vlm(name, device, question or VLM_QUESTION)
    if name == "ocr":
        return load_ocr()
    if name.endswith(".py"):
        raise InputError(f"--reward {name}: which function of it? Give {name}:FUNCTION")
    if ".py:" in name:
        return load_function(name, device)
    with loading("--reward", name, KNOWN, needs=HUB.get(name, ())):
        return load_clip(name, device, differentiable)


def load_function(name: str, device: torch.device) -> Callable:
    """file.py:FUNCTION as score(images, prompts). FUNCTION takes images (b, 3, h, w) in [0, 1] on `device`, or as
    FUNCTION@pil a list of PIL images, as FUNCTION@uint8 a NumPy array (b, h, w, 3) of bytes; prompts; and, if it has a
    third parameter, a dict of metadata per image. It returns scores, (scores, anything), or a dict of scores, of which
    FUNCTION[KEY] takes one; without KEY it is "avg", or the mean of all. The dict's others are logged. A class, or a
    function that takes nothing or `device` alone, is called once, and returns the reward."""
    path, _, function_name = name.rpartition(":")
    function_name, _, key = function_name.rstrip("]").partition("[")
    function_name, _, kind = function_name.partition("@")
    if kind not in ("", "pil", "uint8"):
        raise InputError(f"--reward {name}: give {function_name}, {function_name}@pil or {function_name}@uint8")
    sys.path.append(str(Path(path).resolve().parent))  # for what the file imports from beside it
    with on_error(f"--reward {name}: cannot be imported"):
        function = runpy.run_path(path).get(function_name)
        parameters = inspect.signature(function).parameters if callable(function) else ()
    if isinstance(function, type) or callable(function) and set(parameters) <= {"device"}:
        given = {"device": device} if "device" in parameters else {}
        with on_error(f"--reward {name}: {function_name}({', '.join(given)}) failed",
                      "; write a function of nothing, or of device alone, that returns the reward"):
            function = function(**given)
    if not callable(function):
        raise InputError(f"--reward {name}: there is no function {function_name} in {path}")

    first = {}  # a dict's names in the first call: all, and those that are logged

    def score(images: Tensor, prompts: list[str], metadata: list[dict]) -> list:
        given = {"": lambda: images.to(device), "pil": lambda: [to_image(x) for x in images],
                 "uint8": lambda: to_bytes(images).permute(0, 2, 3, 1).numpy()}[kind]()
        returned = function(given, prompts, *[metadata] * takes_metadata(function))
        returned = returned[0] if isinstance(returned, tuple) else returned
        names = [*map(str, returned)] if isinstance(returned, dict) else []
        if {*names} != {*first.setdefault("names", names)}:
            raise InputError(f"--reward {name}: returned scores named {', '.join(names) or 'nothing'}, but first "
                             f"{', '.join(first['names']) or 'nothing'}; give the same names each time")
        if not isinstance(returned, dict):
            return [returned]
        scores = {}
        for one, values in returned.items():
            with contextlib.suppress(Exception):  # it is not one number per picture
                scores[one] = torch.as_tensor(values).float().cpu().reshape(len(images))
        chosen = [key] if key else ["avg"] if "avg" in returned else [*returned]
        if not chosen or not scores.keys() >= {*chosen}:
            raise InputError(f"--reward {name}: returned scores named {', '.join(names)}; {key or 'one of them'} is "
                             f"not one number per picture; give {path}:{function_name}[NAME]")
        score.logged = first.setdefault("logged", sorted(scores.keys() - {key}, key=str))
        return [torch.stack([scores[one] for one in chosen]).mean(0), *(scores[one] for one in score.logged)]
    return score


def load_vlm(name: str, device: torch.device, question: str) -> Callable:
    """P(yes) of a vision-language model's answer to `question`, in which {prompt} is the picture's prompt."""
    from flow import judge  # here, so that other rewards run without that file

    match = re.fullmatch(r"vlm:(?!https?://)([^@[]+)(?:@(https?://[^/]+/[^[]*))?", name)
    if not match:
        raise InputError(f"--reward {name}: give vlm:MODEL or vlm:MODEL@http://HOST:PORT/v1, and --vlm-question")
    model, url = match.groups()
    flag = "--reward vlm:"
    ask = judge.http_judge(url, model, flag=flag) if url else judge.local_judge(model, device, flag)
    notes = [f"note: --reward {name}: answers without probabilities count as certain: 0 or 1"]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        questions = [question.replace("{prompt}", prompt) for prompt in prompts]
        with tempfile.TemporaryDirectory() as folder:  # a judge reads files, 16 at once for the memory of a large one
            files = [[f"{folder}/{i}.png"] for i in range(len(images))]
            for image, (file,) in zip(images, files):
                to_image(image).save(file)
            answers = [answer for i in range(0, len(files), 16) for answer in ask(questions[i:i + 16], files[i:i + 16])]
        margins = [judge.read_answer(answer, "yes", "no") for answer in answers]
        for asked, answer, margin in zip(questions, answers, margins):
            if math.isnan(margin):
                said = repr(answer[0][0]) if answer else "nothing"
                raise InputError(f"--reward {name}: neither yes nor no but {said} came to the question {asked!r}")
        while url and notes and judge.CERTAIN in map(abs, margins):
            print(notes.pop())
        return torch.tensor(margins).sigmoid()

    if not url:
        score.model = ask.model
    return score


def load_ocr() -> Callable:
    """The reward `ocr` as score(images (b, 3, h, w) in [0, 1], prompts, metadata) -> (b,): how well the wanted text can
    be read in a picture. As flow_grpo's ocr.py: 1 if it is part of what is read, else 1 - edit distance / its length,
    at least 0. Spaces and case do not count."""
    with on_error("--reward ocr: cannot be loaded", "; pip install rapidocr-onnxruntime==1.4.4"):
        from rapidocr_onnxruntime import RapidOCR  # an optional package
        read = RapidOCR()

    def score(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        scores = []
        for image, prompt, fields in zip(images, prompts, metadata):
            lines, _ = read(to_image(image), use_cls=False)  # as it is, not turned by 180 degrees
            found = "".join("".join(text.lower().split()) for _, text, _ in lines or ())
            wanted = "".join(wanted_text(prompt, fields).lower().split())
            distance = 0 if wanted in found else min(edit_distance(wanted, found), len(wanted))
            scores.append(1 - distance / len(wanted))
        return torch.tensor(scores)

    score.check = lambda rows: [wanted_text(row["prompt"], row["metadata"]) for row in rows]
    return score


def wanted_text(prompt: str, metadata: dict) -> str:
    """The text that a picture is to show: `text` of the prompt's metadata, else the first in double quotes."""
    given, quoted = metadata.get("text"), re.findall('(?<![0-9])["“„«「]([^"“”„«»「」]*)["”“»」]', prompt)
    is_given = isinstance(given, (str, int, float)) and given == given  # NaN is an empty cell
    for text in filter(str.strip, [str(given), *quoted] if is_given else quoted):
        return text
    raise InputError(f"--reward ocr: the prompt {prompt!r} has no text in double quotes, nor a field `text` in its row "
                     "of the prompt file; it needs one of them")


def edit_distance(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))  # from the empty text to each beginning of b
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


def load_clip(name: str, device: torch.device, differentiable: bool = False) -> Callable:
    """PickScore's formula (arXiv 2305.01569) for any CLIPModel: exp(logit_scale) cos(image, text) / 26. For clipscore
    and hpsv2.1 the cosine alone; for aesthetic what a head makes of the image's embedding."""
    model, processor, *head = HUB.get(name, (name, name))
    if name == "hpsv2.1":  # arXiv 2306.09341, github.com/tgxs002/HPSv2
        state = torch.load(hf_hub_download(model, "HPS_v2.1_compressed.pt"), map_location="cpu", weights_only=True)
        clip = CLIPModel(CLIPConfig(**VIT_H_CONFIG))
        clip.load_state_dict(from_open_clip(state["state_dict"]))
    else:
        clip = load_whole(AutoModel, model, dtype=torch.float32)
    if head:  # github.com/christophschuhmann/improved-aesthetic-predictor; no activation between its layers
        state = torch.load(hf_hub_download(*head, "sac+logos+ava1-l14-linearMSE.pth"), "cpu", weights_only=True)
        linear, dropout = torch.nn.Linear, torch.nn.Dropout()
        clip.head = torch.nn.Sequential(linear(768, 1024), dropout, linear(1024, 128), dropout, linear(128, 64),
                                        dropout, linear(64, 16), linear(16, 1))
        clip.head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    clip.eval().requires_grad_(False)
    scale = 1.0 if name in ("clipscore", "hpsv2.1") else clip.logit_scale.exp().item() / 26
    processor = AutoProcessor.from_pretrained(processor)
    prepare = processor.image_processor
    is_siglip = "siglip" in clip.config.model_type  # trained on prompts padded to full length, without a mask
    padding = dict(padding="max_length" if is_siglip else True, truncation=True,
                   max_length=clip.config.text_config.max_position_embeddings)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        if differentiable:
            side = (getattr(prepare, "crop_size", None) or prepare.size)["height"]
            crop = min if getattr(prepare, "do_center_crop", False) else None
            fit = max if name == "hpsv2.1" else crop
            pixels = torch_pixels(images, side, prepare.image_mean, prepare.image_std, fit)
        elif name == "hpsv2.1":
            pixels = torch.stack([hps_pixels(x) for x in images])
        else:
            pixels = prepare([to_image(x) for x in images], return_tensors="pt")["pixel_values"]
        tokens = processor.tokenizer(prompts, return_tensors="pt", **padding).to(device)
        if is_siglip:
            tokens = {"input_ids": tokens["input_ids"]}
        out = clip(pixel_values=pixels.to(device), **tokens)  # gives normalized embeddings
        return clip.head(out.image_embeds)[:, 0] if head else (out.image_embeds * out.text_embeds).sum(1) * scale

    def check(rows: list[dict]):
        warn_cut(f"--reward {name}", [row["prompt"] for row in rows], [(processor.tokenizer, padding["max_length"])])

    score.model, score.check = clip, (len if head else check)  # the head does not read prompts
    return score


# HPSv2.1 is an open_clip ViT-H-14, which has gelu (transformers' default for CLIP is quick_gelu).
SHARED = dict(num_attention_heads=16, hidden_act="gelu")
TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **SHARED)
VISION = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **SHARED)
VIT_H_CONFIG = dict(text_config=TEXT, vision_config=VISION, projection_dim=1024)


def torch_pixels(images: Tensor, side: int, mean: list[float], std: list[float], fit: Callable | None = None) -> Tensor:
    """Resize images (b, 3, h, w) in [0, 1] to (b, 3, side, side) and normalize them, with a gradient. fit=min resizes
    the shorter side to `side` and crops, fit=max resizes the longer one and pads with black, None stretches."""
    shape = images.shape[2:]
    if fit is None:
        height, width = side, side
    else:
        height, width = [(round if fit is max else int)(side * length / fit(shape)) for length in shape]
    if shape != (height, width):
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    left, top = (side - width) // 2, (side - height) // 2  # negative where it crops
    images = F.pad(images, (left, side - width - left, top, side - height - top))
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's state dict with the names of transformers' CLIPModel, in fp32."""
    names = {"transformer.resblocks": "encoder.layers", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.",
             ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
             "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.", "ln_final.": "final_layer_norm.",
             "conv1.": "embeddings.patch_embedding.", "class_embedding": "embeddings.class_embedding",
             "token_embedding.": "embeddings.token_embedding.",
             "positional_embedding": "embeddings.position_embedding.weight"}
    state = {key: value.float() for key, value in state.items() if key != "attn_mask"}
    out = {"logit_scale": state.pop("logit_scale"), "text_projection.weight": state.pop("text_projection").T,
           "visual_projection.weight": state.pop("visual.proj").T}
    for key, value in state.items():
        key = f"vision_model.{key.removeprefix('visual.')}" if key.startswith("visual.") else f"text_model.{key}"
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        parts = zip("qkv", value.chunk(3)) if "in_proj_" in key else [("", value)]  # q, k and v in one
        out |= {key.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
    return out


def hps_pixels(picture: Tensor, side: int = 224) -> Tensor:
    """HPSv2's input: the longest side resized to `side`, padded with black. (3, h, w) in [0, 1] -> (3, side, side)."""
    image = ImageOps.contain(to_image(picture), (side, side), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return torch_pixels(pixels[None], side, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)[0]
