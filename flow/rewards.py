"""Rewards: functions (images (b, 3, h, w) in [0, 1], prompts) -> (b,).

`pickscore` (yuvalkirstain/PickScore_v1), `hpsv2.1` (xswu/HPSv2), `clipscore` (CLIP ViT-L/14), a CLIPModel folder or hub
id, scored by PickScore's formula, or `file.py:function`. Several make a weighted sum: `pickscore:0.5,hpsv2.1:0.5`.
"""
import importlib.util
import math
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flow.cli import cannot_load, check_model, fail, reason
from flow.pictures import to_image

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Reward = Callable[[Tensor, list[str]], Tensor]

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor PickScore and HPSv2 use
HUB = {"pickscore": ("yuvalkirstain/PickScore_v1", VIT_H),  # reward: (its model, its processor)
       "hpsv2.1": ("xswu/HPSv2", VIT_H),
       "clipscore": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14")}
# HPSv2.1 is an open_clip ViT-H-14; transformers' default activation, quick_gelu, would be wrong for it
VIT_H_CONFIG = dict(
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     hidden_act="gelu"),
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                       patch_size=14, hidden_act="gelu"),
    projection_dim=1024)


def load_reward(spec: str, device: torch.device, batch: int = 64, differentiable: bool = False) -> Reward:
    """spec, or "spec:weight,spec:weight" -> function (images (b, 3, h, w) in [0, 1], prompts) -> (b,) fp32 on the CPU.
    Videos (b, frames, 3, h, w) get the mean over at most four evenly spaced frames.

    `differentiable`: square images are resized by torch instead of PIL (equal but for its rounding to 8 bits) and keep
    the graph. Ends the process with a line that names --reward if a spec cannot be loaded, or later if it returns
    anything but one finite number a picture.
    """
    parts = []
    for part in spec.split(","):
        name, _, weight = part.rpartition(":")
        try:
            weight = float(weight)
        except ValueError:  # no weight: the colon is file.py:function's
            name, weight = part, 1.0
        if not math.isfinite(weight):
            fail(f"--reward {part}: its weight must be a finite number")
        parts.append((name, weight, load_part(name, device, differentiable)))

    @torch.set_grad_enabled(differentiable)
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        """images (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1] and n prompts -> the weighted sum, (n,) fp32."""
        if images.ndim == 5:
            frames = torch.linspace(0, images.shape[1] - 1, min(4, images.shape[1])).round().long()
            scores = reward(images[:, frames].flatten(0, 1), [prompt for prompt in prompts for _ in frames])
            return scores.view(len(images), len(frames)).mean(1)
        total = torch.zeros(len(images))
        for i in range(0, len(images), batch):
            for name, weight, score in parts:
                total[i:i + batch] += weight * checked(name, score, images[i:i + batch], prompts[i:i + batch])
        return total

    return reward


def load_part(name: str, device: torch.device, differentiable: bool) -> Reward:
    """One reward, without its weight."""
    if ".py:" in name:
        return load_function(name)
    if name.endswith(".py"):
        fail(f"--reward {name}: which function of it? Give {name}:FUNCTION")
    if name not in HUB:
        check_model("--reward", name, f"{', '.join(HUB)}, file.py:function, ")
    try:
        return load_clip(name, device, differentiable)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--reward", name, e, needs=HUB.get(name, ()))


def checked(name: str, score: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """score(images, prompts), (b,) fp32 on the CPU; ends the process if it is not one finite number a picture."""
    try:
        values = torch.as_tensor(score(images, prompts)).float().cpu()
    except Exception as e:  # a function is the user's code
        at = traceback.extract_tb(e.__traceback__)[-1]
        why = f"{type(e).__name__}: {reason(e)}; {at.filename}:{at.lineno}"
        fail(f"--reward {name}: failed on {tuple(images.shape)} pictures ({why})")
    n, shape = len(images), tuple(values.shape)
    if shape != (n,):
        fail(f"--reward {name}: returned shape {shape} for {n} pictures; it must be ({n},)")
    for value, prompt in zip(values.tolist(), prompts):
        if not math.isfinite(value):
            fail(f"--reward {name}: returned {value} for the prompt {prompt!r}")
    return values


def torch_pixels(images: Tensor, side: int, mean: list[float], std: list[float]) -> Tensor:
    """Square images (b, 3, h, h) in [0, 1] -> CLIP's (b, 3, side, side): as the PIL processors do, with a gradient."""
    if images.shape[2] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def load_clip(name: str, device: torch.device, differentiable: bool = False) -> Reward:
    """PickScore's formula (arXiv 2305.01569) on any CLIPModel: exp(logit_scale) cos(image, text) / 26. clipscore and
    hpsv2.1 are the plain cosine."""
    model, processor = HUB.get(name, (name, name))
    clip = load_hps(model) if name == "hpsv2.1" else AutoModel.from_pretrained(model, dtype=torch.float32)
    clip.eval().requires_grad_(False).to(device)
    scale = 1.0 if name in ("clipscore", "hpsv2.1") else clip.logit_scale.exp().item() / 26
    processor = AutoProcessor.from_pretrained(processor)
    prepare = processor.image_processor

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b prompts -> (b,)."""
        if differentiable:
            pixels = torch_pixels(images, prepare.crop_size["height"], prepare.image_mean, prepare.image_std)
        elif name == "hpsv2.1":
            pixels = torch.stack([hps_pixels(x) for x in images])
        else:
            pixels = prepare([to_image(x) for x in images], return_tensors="pt")["pixel_values"]
        longest = clip.config.text_config.max_position_embeddings
        tokens = processor.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = clip(pixel_values=pixels.to(device), **tokens.to(device))  # its embeddings come normalised
        return (out.image_embeds * out.text_embeds).sum(1) * scale

    return score


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


def load_function(spec: str) -> Callable:
    """`file.py:function`, imported from its path."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        fail(f"--reward {spec}: there is no file {path}")
    found = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        return getattr(module, name)
    except Exception as e:  # the user's code
        fail(f"--reward {spec}: cannot be imported ({type(e).__name__}: {reason(e)})")
