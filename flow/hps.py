"""HPSv2.1: its open_clip checkpoint as transformers' CLIPModel, and pictures as CLIP models take them."""
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flow.pictures import to_image

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
