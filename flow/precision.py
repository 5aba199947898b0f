"""Precision: a frozen base in bf16 or quantized, under autocast; VAE, LoRA and optimizer in fp32. On a CPU all fp32."""
import importlib.util

import diffusers
import torch

from flow.cli import fail

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}  # --quantize, and the optional package that does it


def quantization(kind: str) -> diffusers.PipelineQuantizationConfig | None:
    """diffusers' configuration for a transformer of int8 or nf4 weights; its matrix products are in bf16 or fp32."""
    if kind == "none":
        return None
    if kind not in PACKAGES:
        fail(f"--quantize {kind}: none, int8 or nf4")
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        fail(f"--quantize {kind}: needs a package that is not installed: pip install {PACKAGES[kind]}")
    if kind == "nf4" and not torch.cuda.is_available():
        fail("--quantize nf4: needs a GPU; int8 does without")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # an optional package
        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                              bnb_4bit_compute_dtype=torch.bfloat16)
    return diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})


def base_dtype(device: torch.device) -> torch.dtype:
    """Of the frozen transformer and the text encoders: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def use_autocast(transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype):
    """An fp32 LoRA on a bf16 base: products in bf16. What diffusers keeps in fp32 stays out of it."""
    if dtype == torch.float32:
        return
    transformer.forward = torch.autocast(device.type, dtype)(transformer.forward)
    for name, part in transformer.named_modules():
        if set(name.split(".")) & set(transformer._keep_in_fp32_modules or ()):
            part.forward = torch.autocast(device.type, enabled=False)(part.forward)


def use_fast_kernels(vae: torch.nn.Module | None):
    """TF32 for what is in fp32 on a GPU, and convolutions of pictures in the layout that they are fastest in."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for layer in vae.modules() if vae is not None else ():
        if isinstance(layer, torch.nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
