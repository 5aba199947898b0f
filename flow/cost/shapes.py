"""A pipeline of any model's full shape without its weights: from configs alone, for budget.py and bench.py.

    pipe = blank_pipeline("Qwen/Qwen-Image", torch.device("cpu"), size=512, fake=True)  # takes no memory
    pipe = blank_pipeline("tiny/sd3", torch.device("cuda"))                          # random weights

The configs are those of a diffusers folder, of a hub id (nothing else is downloaded), or, for the five models of
PUBLISHED, those below. Text encoders are of fake tensors always and give zeros of the true shapes; a stand-in tokenizer
makes a token of each word. So all that the transformer is given has the shape that it has in a real run, but for the
number of tokens in families that do not pad prompts to one length (see WORDS).
"""
import copy
import inspect
import json
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flow import pipeline
from flow.cli import loading
from flow.intercept import check_parts
from flow.lora import add_lora, use_autocast, use_fast_kernels
from flow.prompts import CHUNK
from flow.rewards import VIT_H_CONFIG

WORDS = 40  # of the prompt: tokens, where a pipeline does not pad to one length
PROMPT = " ".join(["word"] * WORDS)
CHAT = "{% for m in messages %}user {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"

# What differs from the classes' defaults in diffusers and transformers. Looked up in public code that quotes the
# published config.json files: SD3.5-M and its VAE in Tenstorrent's loader of Comfy-Org/stable-diffusion-3.5-fp8; FLUX.1
# in diffusers' scripts/convert_flux_to_diffusers.py (the class's defaults; dev adds guidance); Qwen-Image's transformer
# and text model in MindStudio's checks of Qwen-Image-Edit; klein's, Z-Image's and Qwen3-4B's in their loaders.
# Not looked up: CLIP, T5 and Qwen2.5-VL's vision tower (from memory); schedulers, on which no shape depends.
KL_VAE = ("AutoencoderKL", dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, use_quant_conv=False,
    use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159))
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
              projection_dim=1280, hidden_act="gelu")
T5_XXL = ("T5EncoderModel", dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
                                 feed_forward_proj="gated-gelu"))
QWEN3_4B = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
QWEN25VL_7B = dict(text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
                                    num_attention_heads=28, num_key_value_heads=4),
                   vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584))
FLUX_SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", dict(
        transformer=("SD3Transformer2DModel", dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")),
        vae=(KL_VAE[0], KL_VAE[1] | dict(scaling_factor=1.5305, shift_factor=0.0609)), scheduler=dict(shift=3.0),
        text_encoder=("CLIPTextModelWithProjection", CLIP_L), text_encoder_2=("CLIPTextModelWithProjection", CLIP_G),
        text_encoder_3=T5_XXL)),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", dict(
        transformer=("FluxTransformer2DModel", dict(guidance_embeds=True)), vae=KL_VAE, scheduler=FLUX_SHIFT,
        text_encoder=("CLIPTextModel", CLIP_L), text_encoder_2=T5_XXL)),
    "Tongyi-MAI/Z-Image": ("ZImagePipeline", dict(
        transformer=("ZImageTransformer2DModel", dict(axes_lens=[1536, 512, 512])), vae=KL_VAE,
        scheduler=dict(shift=6.0), text_encoder=("Qwen3Model", QWEN3_4B))),
    "Qwen/Qwen-Image": ("QwenImagePipeline", dict(
        transformer=("QwenImageTransformer2DModel", {}), vae=("AutoencoderKLQwenImage", {}), scheduler=FLUX_SHIFT,
        text_encoder=("Qwen2_5_VLForConditionalGeneration", QWEN25VL_7B))),
    "black-forest-labs/FLUX.2-klein-base-4B": ("Flux2KleinPipeline", dict(
        transformer=("Flux2Transformer2DModel", dict(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False)),
        vae=("AutoencoderKLFlux2", {}), scheduler=FLUX_SHIFT, text_encoder=("Qwen3ForCausalLM", QWEN3_4B))),
}


# ---------------------------------------------------------------- configs

def read_configs(model: str) -> tuple[str, dict, dict]:
    """A model's pipeline class, its parts {name: (class name, config)}, and the pipeline's own settings. From a folder,
    from PUBLISHED, or from the hub, of which only JSON files are read. Raises InputError if there are none."""
    if model in PUBLISHED:
        return *copy.deepcopy(PUBLISHED[model]), {}

    def read(file: str) -> dict:
        """One of the model's JSON files."""
        path = Path(model) / file if Path(model).is_dir() else hf_hub_download(model, file)
        return json.loads(Path(path).read_text())
    with loading("--model", model):
        index = read("model_index.json")
        check_parts(model, index)
        parts, own = {}, {}
        for name, value in index.items():
            if not isinstance(value, list):
                own |= {} if name.startswith("_") else {name: value}
            elif value[0] and name == "scheduler":
                parts[name] = read("scheduler/scheduler_config.json")
            elif value[0] and name.startswith("tokenizer"):
                parts[name] = read(f"{name}/tokenizer_config.json").get("model_max_length", 512)
            elif value[0] and name in ("transformer", "vae") or name.startswith("text_encoder"):
                parts[name] = value[1], read(f"{name}/config.json")
    return index["_class_name"], parts, own


def word_tokenizer(length: int):
    """A tokenizer for any text encoder: each word, and each run of signs, is the same token."""
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<word>": 3}, unk_token="<word>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<word>",
                                                chat_template=CHAT, model_max_length=length)


# ---------------------------------------------------------------- models and pipelines

def made(build, dtype: torch.dtype, device: torch.device, mode=None):
    """The model that build() makes, in dtype: on a device with random weights, or in a FakeTensorMode without any."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with mode or torch.device(device):
            model = build()
    finally:
        torch.set_default_dtype(before)
    if not mode:
        return model.to(dtype).requires_grad_(False).eval()
    model.to = lambda *args, **kwargs: model  # fake tensors are nowhere, and cannot be moved
    for part in model.modules():  # what would come out of a file comes in dtype
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                part._buffers[name] = buffer.to(dtype)
    return model.requires_grad_(False).eval()


def blank_reward(name: str, device: torch.device, mode=None):
    """The CLIPModel of a reward (`pickscore`, `hpsv2.1`, or a CLIPModel folder), in fp32; None for another reward."""
    if name in ("pickscore", "hpsv2.1"):
        config = transformers.CLIPConfig(**VIT_H_CONFIG)
    elif (Path(name) / "config.json").is_file():
        config = transformers.CLIPConfig.from_pretrained(name)
    else:
        return None
    return made(lambda: transformers.CLIPModel(config), torch.float32, device, mode)


def fake_encoder(name: str, config: dict, dtype: torch.dtype, device: torch.device, mode):
    """A text encoder of fake tensors that takes real tokens and gives real zeros of the true shapes."""
    cls = getattr(transformers, name)
    config = cls.config_class.from_dict(config)
    for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
        part.dtype = dtype  # not the file's
    encoder = made(lambda: cls(config), dtype, device, mode)
    run = encoder.forward

    def forward(*args, **kwargs):
        """Each of the zeros is the same one, so they take no memory."""
        args, kwargs = tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x.cpu()), (args, kwargs))
        out = run(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda x: torch.zeros((), dtype=x.dtype, device=device).expand(x.shape), out)
    encoder.forward = forward
    return encoder


def blank_pipeline(model: str, device: torch.device, size: int | str | None = None, frames: int | None = None,
                   fake: bool = False, dtype: torch.dtype | None = None):
    """A pipeline as flow.pipeline.load_pipeline's, with random weights; `fake`: of fake tensors.
    The transformer is in bf16 under autocast on a GPU and if fake, else in fp32, unless dtype says otherwise. Prompts
    are to be those of `encode`. Ends the process, naming --model, where load_pipeline does."""
    name, parts, own = read_configs(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    low = dtype or (torch.bfloat16 if fake or device.type == "cuda" else torch.float32)
    cls = getattr(diffusers, name)
    components = {key: None for key in inspect.signature(cls.__init__).parameters if key not in ("self", *own)}
    scheduler = parts.pop("scheduler")
    scheduler_cls = getattr(diffusers, scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    components["scheduler"] = scheduler_cls.from_config(scheduler)
    for key in ("transformer", "vae"):
        model_cls, config = getattr(diffusers, parts[key][0]), parts[key][1]
        dtype = low if key == "transformer" else torch.float32
        components[key] = made(lambda: model_cls.from_config(config), dtype, device, mode if fake else None)
    for key in [key for key in parts if key.startswith("text_encoder")]:
        encoder, tokenizer = fake_encoder(*parts[key], low, device, mode), key.replace("text_encoder", "tokenizer")
        length = parts.get(tokenizer) or getattr(encoder.config, "max_position_embeddings", 512)
        components |= {key: encoder, tokenizer: word_tokenizer(length)}
    pipe = cls(**components, **own)
    use_autocast(components["transformer"], device, low)
    if not fake:
        use_fast_kernels(components["vae"])
    return pipeline.prepare_pipeline(pipe, model, device, size, frames)


def encode(pipe, guidance: float | None = None, guard_guidance: float | None = None):
    """flow.pipeline.encode_prompts for PROMPT and as many more as are encoded in one go."""
    n = CHUNK if pipe.flow.in_one_go else 1
    pipeline.encode_prompts(pipe, [PROMPT, *(f"{PROMPT} {i}" for i in range(1, n))], guidance, None, guard_guidance)


def blank_lora(pipe, rank: int, name: str = "default") -> list[torch.nn.Parameter]:
    """flow.lora.add_lora, also for a fake transformer."""
    mode = getattr(next(pipe.transformer.parameters()), "fake_mode", None)
    if not mode:
        return add_lora(pipe.transformer, rank, 0, name)
    with mode, mock.patch.object(torch.nn.Module, "to", lambda model, *args, **kwargs: model):  # as made() has it
        return add_lora(pipe.transformer, rank, 0, name)
