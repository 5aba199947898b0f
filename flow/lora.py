"""LoRA on a diffusers transformer: its places are found, not listed; in and out in diffusers' own format."""
import importlib.util
import json
import logging
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import diffusers
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save

from flow.cli import InputError, make_dir, reason, write_files
from flow.distributed import base_dtype  # noqa: F401 - pipeline imports it from here

NAME = "pytorch_lora_weights.safetensors"  # diffusers'


def lora_targets(model: torch.nn.Module) -> list[str]:
    """The linear layers of a transformer's attentions, whatever their names; but not of an attn2 beside an attn:
    SD3.5's second attention stays as it is in DiffusionNFT, AWM and Flow-GRPO."""
    parts = dict(model.named_modules())
    found = {name for name, part in parts.items() if hasattr(part, "to_q") or "Attention" in type(part).__name__}
    inside = tuple(name + "." for name in found if not (name.endswith(".attn2") and name[:-1] in found))
    return [name for name, part in parts.items() if isinstance(part, torch.nn.Linear) and name.startswith(inside)]


def add_lora(model: torch.nn.Module, rank: int, seed: int, name: str = "default") -> list[torch.nn.Parameter]:
    """A LoRA with alpha = 2 rank on the attention projections of a diffusers transformer; returns its fp32
    parameters."""
    torch.manual_seed(seed)
    others = list(getattr(model, "peft_config", {}).values())  # a second adapter goes where the first is
    targets = others[0].target_modules if others else lora_targets(model)
    inject(model, name, LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=targets))
    diffusers.training_utils.cast_training_params(model, torch.float32)
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast sees to it, with fewer copies
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def inject(model: torch.nn.Module, name: str, config: LoraConfig):
    """Put an adapter into a transformer, by diffusers' own means if it has them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # NFT has two adapters and means it
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, name)
        else:
            inject_adapter_in_model(config, model, name)


def lora_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers that hold an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def use_adapter(model: torch.nn.Module, name: str):
    """Make one of several adapters the active one, which is then the one that trains."""
    for layer in lora_layers(model):
        layer.set_adapter(name)


def merged_forward(layer, x: torch.Tensor) -> torch.Tensor:
    """A linear layer's with the adapter in its weights; with adapters off, the frozen layer's own."""
    if layer.disable_adapters:
        return layer.base_layer(x)
    return F.linear(x, layer.merged_weight, layer.base_layer.bias)


def fp32_linear(layer: torch.nn.Module) -> bool:
    """Is it a linear layer with a plain matrix in fp32: not in bf16, not quantized, not sharded?"""
    plain = isinstance(layer, torch.nn.Linear) and type(layer.weight) is torch.nn.Parameter
    return plain and layer.weight.dtype == torch.float32 and type(layer.weight.data) is torch.Tensor


@contextmanager
@torch.no_grad()
def merged(model: torch.nn.Module):
    """While this lasts, the active adapters are applied as W + scale B A, from a copy of the weights: a forward then
    costs what the base model's does. For calls without gradients. The weights themselves are not touched, and
    `reference` still finds the frozen base. Only where W is in fp32: a sum rounded to bf16 loses up to three quarters
    of a young LoRA, and the policy that draws would not be the one that is trained. Other layers go on as ever."""
    layers = [layer for layer in lora_layers(model) if fp32_linear(layer.base_layer)
              and not layer.lora_variant and not any(layer.lora_bias.values())]
    for layer in layers:
        weight = layer.base_layer.weight.detach()
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
        layer.merged_weight = sum(deltas, weight)
        layer.forward = MethodType(merged_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward, layer.merged_weight


@contextmanager
def swapped(params: list[torch.nn.Parameter], others: list[torch.Tensor] | None):
    """While this lasts, parameters have other values, if there are any: an average's."""
    own = [p.data for p in params]
    for p, other in zip(params, others or ()):
        p.data = other
    try:
        yield
    finally:
        for p, data in zip(params, own):
            p.data = data


def save_lora(pipe, folder: Path):
    """pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` reads back with its rank and alpha.
    Written here, not by `pipe.save_lora_weights`, whose two metadata keys come in random order: equal runs are to give
    equal files."""
    config = pipe.transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # peft holds a set
    lora = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(pipe.transformer).items()}
    metadata = json.dumps({f"transformer.{k}": v for k, v in config.items()}, sort_keys=True)
    make_dir(str(folder), "--out")
    write_files({folder / NAME: save(lora, {"lora_adapter_metadata": metadata})})


def check_lora(folder: str):
    """End the process, before a model is loaded, if a folder holds no LoRA that can be read."""
    file = Path(folder) / NAME
    if Path(folder).is_file():
        raise InputError(f"--lora {folder}: is a file; give the folder that holds it, {Path(folder).parent}")
    if not file.is_file():
        raise InputError(f"--lora {folder}: holds no {NAME}; a run keeps it in its lora/ folder")
    try:
        with safe_open(file, "pt") as opened:
            if not all(opened.get_tensor(name).isfinite().all() for name in opened.keys()):
                raise ValueError("it holds numbers that are not finite")
    except Exception as e:  # safetensors has errors of its own
        raise InputError(f"--lora {folder}: {NAME} cannot be read ({reason(e)})")


def load_lora(pipe, folder: str, model: str, scale: float = 1.0):
    """Put a LoRA on; one that does not fit ends the process, naming --lora and --model."""
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # it would list each tensor
    try:
        with safe_open(Path(folder) / NAME, "pt") as opened, warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # peft's, of weights that have no place in this model
            names = set(opened.keys())
            if hasattr(pipe, "transformer_name"):  # a loader for transformers; PRX has one for UNets
                pipe.load_lora_weights(folder)
            else:
                config = json.loads(opened.metadata()["lora_adapter_metadata"])
                lora = {name.removeprefix("transformer."): opened.get_tensor(name) for name in names}
                config = {name.removeprefix("transformer."): value for name, value in config.items()}
                inject(pipe.transformer, "default", LoraConfig(**config))
                set_peft_model_state_dict(pipe.transformer, lora)
        weights = [p for name, p in pipe.transformer.named_parameters() if ".lora_" in name]
        if not weights:
            raise ValueError("it holds nothing for the transformer")
        if any(p.is_meta for p in weights):
            raise ValueError("it lacks some of its tensors")
        ours = [name for name in names if name.startswith("transformer.") and ".lora_" in name]
        if len(ours) == len(names) != len(weights):
            raise ValueError(f"it has {len(names)} tensors, of which {len(weights)} have a place")
    except Exception as e:  # of another rank, model or library: peft, diffusers and safetensors each raise their own
        raise InputError(f"--lora {folder}: does not fit --model {model} ({lora_mismatch(e)})")
    finally:
        diffusers.utils.logging.set_verbosity_error()
    for layer in lora_layers(pipe.transformer):
        layer.scale_layer(scale)


def lora_mismatch(error: Exception) -> str:
    """Why a LoRA does not fit, in a line, out of the libraries' many."""
    sizes = re.search(r"size mismatch for (\S+?)\.lora_\S+ .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
    if sizes:
        return "{} has {} in it, and {} in the model".format(*sizes.groups())
    if "inconsistency" in str(error):  # peft's, of places
        return "it is of another pipeline, or lacks some of its tensors"
    return reason(error)[:150]


# ---------------------------------------------------------------- precision

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}  # --quantize, and the optional package that does it


def quantization(kind: str) -> diffusers.PipelineQuantizationConfig | None:
    """diffusers' configuration for a transformer of int8 or nf4 weights; its matrix products are in bf16 or fp32."""
    if kind == "none":
        return None
    if kind not in PACKAGES:
        raise InputError(f"--quantize {kind}: none, int8 or nf4")
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise InputError(f"--quantize {kind}: needs a package that is not installed: pip install {PACKAGES[kind]}")
    if kind == "nf4" and not torch.cuda.is_available():
        raise InputError("--quantize nf4: needs a GPU; int8 does without")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # an optional package
        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                              bnb_4bit_compute_dtype=torch.bfloat16)
    return diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})


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
