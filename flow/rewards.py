"""Rewards: functions (images (b, 3, h, w) in [0, 1], prompts) -> (b,).

`pickscore` (yuvalkirstain/PickScore_v1), `hpsv2.1` (xswu/HPSv2), `clipscore` (CLIP ViT-L/14), a CLIPModel folder or hub
id, scored by PickScore's formula, or `file.py:function`. Several make a weighted sum: `pickscore:0.5,hpsv2.1:0.5`.

`vlm:MODEL` is the P(yes) of a vision-language model (a folder, a hub id, or `vlm:MODEL@http://HOST:PORT/v1`), asked
VLM_QUESTION or what follows it in brackets: `vlm:MODEL[Is this a good picture of {prompt}? Answer yes or no.]`. A model
that was the reward is then no judge: the pictures have learnt to please it.
"""
import importlib.util
import math
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flow.cli import InputError, cannot_load, check_model, quiet_libraries, reason
from flow.judge import http_judge, local_judge, read_answer
from flow.pictures import to_image

Reward = Callable[[Tensor, list[str]], Tensor]

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor PickScore and HPSv2 use
HUB = {"pickscore": ("yuvalkirstain/PickScore_v1", VIT_H),  # reward: (its model, its processor)
       "hpsv2.1": ("xswu/HPSv2", VIT_H),
       "clipscore": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14")}
KNOWN = f"{', '.join(HUB)}, file.py:function, vlm:MODEL, "
VLM_QUESTION = 'Does this picture show "{prompt}", without defects? Answer yes or no.'


def load_reward(spec: str, device: torch.device, batch: int = 64, differentiable: bool = False,
                question=None) -> Reward:
    """spec, or "spec:weight,spec:weight" -> function (images (b, 3, h, w) in [0, 1], prompts) -> (b,) fp32 on the CPU.
    Videos (b, frames, 3, h, w) get the mean over at most four evenly spaced frames. Its `models` are on `device` from a
    call on; to make room, move them away. Its `names` are its parts'; reward(...) is weighted(scores_of(...)).

    `differentiable`: square images are resized by torch instead of PIL (equal but for its rounding to 8 bits) and keep
    the graph. Ends the process with a line that names --reward if a spec cannot be loaded, or later if it returns
    anything but one finite number a picture.
    """
    quiet_libraries()
    parts = []
    for part in re.split(r",(?![^[]*\])", spec):  # but for the commas of a [question]
        name, _, weight = part.rpartition(":")
        try:  # no weight follows .py: that colon is file.py:function's, even of a function called nan
            weight = float("" if name.endswith(".py") else weight)
        except ValueError:
            name, weight = part, 1.0
        if not name:
            raise InputError(f"--reward '{spec}': a name is missing; give {KNOWN}a folder or a hub id")
        if not math.isfinite(weight):
            raise InputError(f"--reward {part}: its weight must be a finite number")
        parts.append((name, weight, load_part(name, device, differentiable)))
        if differentiable:
            check_gradient(name, parts[-1][2], device)

    models = [score.model for _, _, score in parts if hasattr(score, "model")]

    @torch.set_grad_enabled(differentiable)
    def scores_of(images: Tensor, prompts: list[str]) -> Tensor:
        """images (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1] and n prompts -> each part's scores, (parts, n) fp32.
        A part gets a copy of the pictures: what it does to them, no other sees."""
        if images.ndim == 5:
            frames = torch.linspace(0, images.shape[1] - 1, min(4, images.shape[1])).round().long()
            scores = scores_of(images[:, frames].flatten(0, 1), [prompt for prompt in prompts for _ in frames])
            return scores.view(len(parts), len(images), len(frames)).mean(2)
        for model in models:
            model.to(device)
        scores = [[checked(name, score, images[i:i + batch].clone(), prompts[i:i + batch]) for name, _, score in parts]
                  for i in range(0, len(images), batch)]
        return torch.cat([torch.stack(chunk) for chunk in scores], 1)

    def weighted(scores: Tensor) -> Tensor:
        """The parts' scores (parts, n) -> the weighted sum (n,)."""
        total = torch.zeros(scores.shape[1])
        for (_, weight, _), score in zip(parts, scores):
            total = total + weight * score
        return total

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        """images (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1] and n prompts -> the weighted sum, (n,) fp32."""
        return weighted(scores_of(images, prompts))

    reward.models, reward.scores_of, reward.weighted = models, scores_of, weighted
    short = [without_questions(name).rstrip("/").split("/")[-1] for name, _, _ in parts]
    reward.names = short if len(set(short)) == len(short) else [name for name, _, _ in parts]
    return reward


def check_gradient(name: str, score: Reward, device: torch.device):
    """End the process if a reward does not say how it changes with the picture, as a function of NumPy's."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if hasattr(score, "model"):
        score.model.to(device)
    with torch.enable_grad():
        value = checked(name, score, images, ["a picture"]).sum()
    if not (value.requires_grad and torch.autograd.grad(value, images, allow_unused=True)[0] is not None):
        raise InputError(f"--adjoint: --reward {name} has no gradient")


def split_reward(spec):
    return [(part, 1.0) for part in without_questions(spec).split(",")]


def reward_model(name):
    return name.rpartition(".py:")[0] + ".py" if ".py:" in name else name.split(":")[0]


def without_questions(spec: str) -> str:
    """A reward's spec with MODEL in place of vlm:MODEL@URL[QUESTION]: what it is made of, and a name for it."""
    return re.sub(r"vlm:([^@[,]+)(@[^[,]*)?(\[.*?\])?", r"\1", spec, flags=re.DOTALL)


def load_part(name: str, device: torch.device, differentiable: bool) -> Reward:
    """One reward, without its weight."""
    if name.startswith("vlm:"):
        if differentiable:
            raise InputError(f"--adjoint: --reward {name} has no gradient")
        return load_vlm(name, device)
    if ".py:" in name:
        return load_function(name)
    if name.endswith(".py"):
        raise InputError(f"--reward {name}: which function of it? Give {name}:FUNCTION")
    if name not in HUB:
        check_model("--reward", name, KNOWN)
    try:
        return load_clip(name, device, differentiable)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--reward", name, e, needs=HUB.get(name, ()))


def checked(name: str, score: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """score(images, prompts), (b,) fp32 on the CPU; ends the process if it is not one finite number a picture."""
    try:
        values = torch.as_tensor(score(images, prompts)).float().cpu()
    except InputError:  # a judge's own
        raise
    except (Exception, SystemExit) as e:  # a function is the user's code
        frames = traceback.extract_tb(e.__traceback__)
        own = [frame for frame in frames if frame.filename == name.rpartition(":")[0]]  # of file.py:function
        at = (own or frames)[-1]
        why = f"{type(e).__name__}: {reason(e)}; {at.filename}:{at.lineno}"
        raise InputError(f"--reward {name}: failed on {tuple(images.shape)} pictures ({why})")
    n, shape = len(images), tuple(values.shape)
    if shape != (n,):
        raise InputError(f"--reward {name}: returned shape {shape} for {n} pictures; it must be ({n},)")
    for value, prompt in zip(values.tolist(), prompts):
        if not math.isfinite(value):
            raise InputError(f"--reward {name}: returned {value} for the prompt {prompt!r}")
    return values


def load_clip(name: str, device: torch.device, differentiable: bool = False) -> Reward:
    """PickScore's formula (arXiv 2305.01569) on any CLIPModel: exp(logit_scale) cos(image, text) / 26. clipscore and
    hpsv2.1 are the plain cosine."""
    model, processor = HUB.get(name, (name, name))
    clip = load_hps(model) if name == "hpsv2.1" else AutoModel.from_pretrained(model, dtype=torch.float32)
    clip.eval().requires_grad_(False)
    scale = 1.0 if name in ("clipscore", "hpsv2.1") else clip.logit_scale.exp().item() / 26
    processor = AutoProcessor.from_pretrained(processor)
    prepare = processor.image_processor
    # SigLIP was trained on padded prompts, without a mask: its score depends on how much padding there is
    padding = "max_length" if "siglip" in clip.config.model_type else True

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        if differentiable:
            side = (getattr(prepare, "crop_size", None) or prepare.size)["height"]
            pixels = torch_pixels(images, side, prepare.image_mean, prepare.image_std)
        elif name == "hpsv2.1":
            pixels = torch.stack([hps_pixels(x) for x in images])
        else:
            pixels = prepare([to_image(x) for x in images], return_tensors="pt")["pixel_values"]
        longest = clip.config.text_config.max_position_embeddings
        tokens = processor.tokenizer(prompts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        tokens = tokens if padding is True else {"input_ids": tokens["input_ids"]}
        tokens = {name: value.to(device) for name, value in tokens.items()}
        out = clip(pixel_values=pixels.to(device), **tokens)  # its embeddings come normalised
        return (out.image_embeds * out.text_embeds).sum(1) * scale

    score.model = clip
    return score


def load_vlm(name: str, device: torch.device) -> Reward:
    """P(yes) of a vision-language model's answer to a question about a picture, in which {prompt} is its prompt."""
    pattern = r"vlm:(?!https?://)([^@[\]]+)(?:@(https?://[^/[\]]+/[^[\]]*))?(?:\[(.+)\])?"
    parts = re.fullmatch(pattern, name, re.DOTALL)
    if not parts:
        raise InputError(f"--reward {name}: give vlm:MODEL or vlm:MODEL@http://HOST:PORT/v1, and after it [QUESTION] "
                         "or nothing")
    model, url, question = parts.groups(default="")
    question, flag = question or VLM_QUESTION, "--reward vlm:"
    ask = http_judge(url, model, flag=flag) if url else local_judge(model, device, flag)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        questions = [question.replace("{prompt}", prompt) for prompt in prompts]
        with tempfile.TemporaryDirectory() as folder:  # a judge is asked about files
            files = [[f"{folder}/{i}.png"] for i in range(len(images))]
            for image, (file,) in zip(images, files):
                to_image(image).save(file)
            # 16 at a time: a large model's activations
            answers = [top for i in range(0, len(files), 16) for top in ask(questions[i:i + 16], files[i:i + 16])]
        margins = [read_answer(top, "yes", "no") for top in answers]
        for asked, margin in zip(questions, margins):
            if math.isnan(margin):
                raise InputError(f"--reward {name}: the answer is neither yes nor no, or has failed; the question "
                                 f"was {asked!r}")
        return torch.tensor(margins).sigmoid()

    if not url:
        score.model = ask.model
    return score


def load_function(spec: str) -> Reward:
    """`file.py:function`, imported from its path."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"--reward {spec}: there is no file {path}")
    found = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            raise TypeError(f"there is no function {name} in it")
        return getattr(module, name)
    except (Exception, SystemExit) as e:  # the user's code
        raise InputError(f"--reward {spec}: cannot be imported ({type(e).__name__}: {reason(e)})")


# ---------------------------------------------------------------- HPSv2.1

# HPSv2.1 is an open_clip ViT-H-14; transformers' default activation, quick_gelu, would be wrong for it
VIT_H_CONFIG = dict(
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     hidden_act="gelu"),
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                       patch_size=14, hidden_act="gelu"),
    projection_dim=1024)


def torch_pixels(images: Tensor, side: int, mean: list[float], std: list[float]) -> Tensor:
    """Square images (b, 3, h, h) in [0, 1] -> CLIP's (b, 3, side, side): as the PIL processors do, with a gradient."""
    if images.shape[2] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def load_hps(model: str) -> CLIPModel:
    """HPSv2.1 (arXiv 2306.09341, github.com/tgxs002/HPSv2), an open_clip ViT-H-14, as transformers' CLIPModel."""
    state = torch.load(hf_hub_download(model, "HPS_v2.1_compressed.pt"), map_location="cpu", weights_only=True)
    clip = CLIPModel(CLIPConfig(**VIT_H_CONFIG))
    clip.load_state_dict(from_open_clip(state["state_dict"]))
    return clip


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's state dict under the names of transformers' CLIPModel, fp32."""
    projections = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
    names = {"transformer.resblocks": "encoder.layers", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.",
             ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
             "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.", "ln_final.": "final_layer_norm.",
             "conv1.": "embeddings.patch_embedding.", "class_embedding": "embeddings.class_embedding",
             "token_embedding.": "embeddings.token_embedding.",
             "positional_embedding": "embeddings.position_embedding.weight"}
    out = {}
    for key, value in state.items():
        value = value.float()
        if key in projections:
            out[projections[key]] = value.T.contiguous()
        elif key == "logit_scale":
            out[key] = value
        elif key != "attn_mask":
            key = ("vision_model." if key.startswith("visual.") else "text_model.") + key.removeprefix("visual.")
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            if "in_proj_" in key:  # q, k and v in one
                out |= {key.replace("in_proj_", f"{n}_proj."): x.contiguous() for n, x in zip("qkv", value.chunk(3))}
            else:
                out[key] = value
    return out


def hps_pixels(picture: Tensor, side: int = 224) -> Tensor:
    """HPSv2's: longest side to `side`, bicubic, zero-padded to a square. (3, h, w) in [0, 1] -> (3, side, side)."""
    image = to_image(picture)
    scale = side / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return torch_pixels(pixels[None], side, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)[0]
