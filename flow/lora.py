"""LoRA on a diffusers transformer: add, merge, save and load it. Precision and quantization of the frozen base."""
import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save

from flow.cli import InputError, make_dir, reading, write_files

NAME = "pytorch_lora_weights.safetensors"  # as diffusers names it


def lora_targets(model: torch.nn.Module) -> list[str]:
    """The names of all linear layers inside attention modules. A second attention `attn2` beside `attn` is left out:
    DiffusionNFT, AWM and Flow-GRPO do not train SD3.5's."""
    parts = dict(model.named_modules())
    attentions = {name for name, part in parts.items() if hasattr(part, "to_q") or "Attention" in type(part).__name__}
    seconds = {name for name in attentions if name.endswith(".attn2") and name[:-1] in attentions}
    inside = tuple(f"{name}." for name in attentions - seconds)
    return [name for name, part in parts.items() if isinstance(part, torch.nn.Linear) and name.startswith(inside)]


def add_lora(model: torch.nn.Module, rank: int, seed: int, name: str = "default") -> list[torch.nn.Parameter]:
    """Add a LoRA with alpha = 2 rank to the attention layers of a transformer, or to the layers that have an adapter
    already. Returns its fp32 parameters."""
    torch.manual_seed(seed)
    configs = list(getattr(model, "peft_config", {}).values())
    targets = configs[0].target_modules if configs else lora_targets(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # NFT needs two adapters
        inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True  # diffusers' own methods for adapters ask for it
    use_adapter(model, name)
    diffusers.training_utils.cast_training_params(model, torch.float32)
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts too, and less often
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def lora_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers that have an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def use_adapter(model: torch.nn.Module, name: str):
    """Make one of several adapters the active one, and the only one that trains."""
    for layer in lora_layers(model):
        layer.set_adapter(name)


def merged_forward(layer, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer whose adapter is merged; with adapters off, that of the frozen layer."""
    if layer.disable_adapters:
        return layer.base_layer(x)
    return torch.nn.functional.linear(x, layer.merged_weight, layer.base_layer.bias)


def can_merge(layer: BaseTunerLayer) -> bool:
    """Whether a plain LoRA can be merged into the layer: a linear layer in fp32, neither quantized nor sharded."""
    weight, linear = layer.base_layer.weight, isinstance(layer.base_layer, torch.nn.Linear)
    plain = type(weight) is torch.nn.Parameter and type(weight.data) is torch.Tensor
    plain = plain and linear and not layer.lora_variant and not any(layer.lora_bias.values())
    return plain and weight.dtype == torch.float32


@contextmanager
@torch.no_grad()
def merged(model: torch.nn.Module):
    """Use the weights W + scale B A of the active adapters, so that a forward without gradients costs what the base's
    costs. W is not changed; `reference` still finds it. Only for W in fp32: rounded to bf16, the sum would lose most of
    a young LoRA, and rollouts would not use the policy that is trained."""
    layers = [layer for layer in lora_layers(model) if can_merge(layer)]
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
def swapped(params: list[torch.nn.Parameter], values: list[torch.Tensor] | None):
    """Give the parameters other values, for example their moving average, and put the old ones back at the end. None
    changes nothing."""
    before = [p.data for p in params]
    for p, value in zip(params, values or ()):
        p.data = value
    try:
        yield
    finally:
        for p, data in zip(params, before):
            p.data = data


def save_lora(pipe, folder: Path):
    """Write the LoRA to a folder, for `pipe.load_lora_weights(folder)`. The file has alpha = rank, and B times the
    scale alpha / rank of the training, so that readers that ignore metadata draw the same picture. Not by
    `pipe.save_lora_weights`: it writes its metadata in random order, and equal runs must write equal files."""
    lora, config = get_peft_model_state_dict(pipe.transformer), pipe.transformer.peft_config["default"].to_dict()
    for name, value in lora.items():
        layer, _, part = name.partition(".lora_")
        scale = pipe.transformer.get_submodule(layer).scaling["default"] if part.startswith("B") else 1
        lora[name] = (scale * value).contiguous()
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"]}
    config = {f"transformer.{name}": value for name, value in config.items()}
    metadata = json.dumps(config, sort_keys=True, default=sorted)  # it has a set
    make_dir(str(folder), "--out")
    lora = {f"transformer.{name}": value for name, value in lora.items()}
    write_files({folder / NAME: save(lora, {"lora_adapter_metadata": metadata})})


def check_lora(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a LoRA from a folder: its tensors and its metadata. InputError if it has none, or a broken one."""
    file = Path(folder) / NAME
    if not file.is_file():
        raise InputError(f"--lora {folder}: is no folder with {NAME}; a run keeps it in its lora/ folder")
    with reading(f"--lora {file}", "give another"), safe_open(file, "pt") as opened:
        lora = {name: opened.get_tensor(name) for name in opened.keys()}
        if not all(tensor.isfinite().all() for tensor in lora.values()):
            raise ValueError("it holds numbers that are not finite")
        return lora, opened.metadata()


def load_lora(pipe, folder: str, model: str, scale: float = 1.0):
    """Load a LoRA into the transformer, by diffusers' loader if there is one for it, and multiply it by `scale`.
    InputError if tensors do not fit, are missing, or have no place."""
    lora, metadata = check_lora(folder)
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # diffusers would list each tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # peft warns of layers that do not match
            if hasattr(pipe, "transformer_name"):
                pipe.load_lora_weights(folder)
            else:  # PRX's loader is one for UNets
                config = json.loads(metadata["lora_adapter_metadata"])
                config, tensors = ({k.removeprefix("transformer."): v for k, v in d.items()} for d in (config, lora))
                inject_adapter_in_model(LoraConfig(**config), pipe.transformer)
                set_peft_model_state_dict(pipe.transformer, tensors)
        weights = [p for name, p in pipe.transformer.named_parameters() if ".lora_" in name]
        if not weights:
            raise ValueError("it holds nothing for the transformer")
        if any(p.is_meta for p in weights):
            raise ValueError("it lacks some of its tensors")
        in_our_format = all(name.startswith("transformer.") and ".lora_" in name for name in lora)
        if in_our_format and len(lora) != len(weights):
            raise ValueError(f"it has {len(lora)} tensors, of which {len(weights)} have a place")
    except Exception as e:  # of another rank, model or library: peft, diffusers and safetensors each raise their own
        why = str(e).partition("\n\t")[2] or str(e)  # below PyTorch's headline: the first tensor of another size
        why = "it lacks tensors, or is of another pipeline" if isinstance(e, RuntimeWarning) else why[:190]
        raise InputError(f"--lora {folder}: does not fit --model {model} ({why})")
    finally:
        diffusers.utils.logging.set_verbosity_error()
    for layer in lora_layers(pipe.transformer):
        layer.scale_layer(scale)


# ---------------------------------------------------------------- precision

def quantization(kind: str) -> diffusers.PipelineQuantizationConfig | None:
    """diffusers' configuration for a transformer with int8 or nf4 weights; matrix products are in bf16 or fp32."""
    if kind == "none":
        return None
    packages = {"int8": "torchao", "nf4": "bitsandbytes"}
    if kind not in packages:
        raise InputError(f"--quantize {kind}: none, int8 or nf4")
    if importlib.util.find_spec(packages[kind]) is None:
        raise InputError(f"--quantize {kind}: needs a package that is not installed: pip install {packages[kind]}")
    if kind == "nf4" and not torch.cuda.is_available():
        raise InputError("--quantize nf4: needs a GPU; int8 does without")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                              bnb_4bit_compute_dtype=torch.bfloat16)
    return diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})


def use_autocast(transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype):
    """Run a bf16 transformer under autocast, which lets an fp32 LoRA train on it. The modules that diffusers keeps in
    fp32 stay in fp32."""
    if dtype == torch.float32:
        return
    transformer.forward = torch.autocast(device.type, dtype)(transformer.forward)
    for name, part in transformer.named_modules():
        if set(name.split(".")) & set(transformer._keep_in_fp32_modules or ()):
            part.forward = torch.autocast(device.type, enabled=False)(part.forward)


def use_fast_kernels(vae: torch.nn.Module | None):
    """On a GPU, allow TF32 for matrix products in fp32, and store the VAE's convolutions in their fastest layout.
    Turn off cuDNN's attention, whose backward pass fails in FLUX.1-dev (docs/models.md)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    for layer in vae.modules() if vae is not None else ():
        if isinstance(layer, torch.nn.Conv2d):
            layer.to(memory_format=torch.channels_last)


def model_card(method: str, args, eval_prompts: list[dict]) -> str:
    """lora/README.md: a model card for the hub. The user chooses the licence."""
    command, defaults = ["python", f"train_{method}.py"], vars(type(args)())
    changed = {name.replace("_", "-"): value for name, value in vars(args).items() if value != defaults[name]}
    for flag, value in changed.items():
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    prompts = "\n".join(f"- {prompt}" for prompt in dict.fromkeys(row["prompt"] for row in eval_prompts[:4]))
    base_model = "" if Path(args.model).is_dir() else f"base_model: {args.model}\n"  # the hub does not know a folder
    guard = f" and NormGuard (arXiv 2606.27771), lam {args.lam}" if args.lam != 0 else ""
    tags = ["lora", "diffusers", *["normguard"] * bool(guard), method]
    return f"""---
{base_model}library_name: diffusers
tags: [{', '.join(tags)}]
---
A LoRA of rank {args.rank} and alpha {args.rank} for `{Path(args.model).name if not base_model else args.model}`
(`pipe.load_lora_weights(FOLDER)`), trained for the reward `{args.reward}` with {method.upper()}{guard}:

    {shlex.join(command)}

Prompts to try:

{prompts}
"""


def shallow_copy(transformer: torch.nn.Module) -> torch.nn.Module:
    """Copy a transformer in fp32 with one block of each list of blocks: enough to see how it treats its inputs, at a
    small part of its size. Quantized layers become random ones."""
    repeated = {*(transformer._repeated_blocks or ()), *(transformer._no_split_modules or ())}  # if it lists them
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)
             and (not repeated or any(type(inner).__name__ in repeated for inner in part.modules()))]
    shortened = {id(blocks): copy.deepcopy(blocks[:1]) for blocks in lists}
    copied = copy.deepcopy(transformer, shortened)  # takes these for the copies of the lists
    for name, layer in list(copied.named_modules()):
        vars(layer).pop("forward", None)  # autocast's, which calls the original
        if isinstance(layer, torch.nn.Linear) and (type(layer.weight.data) is not torch.Tensor
                                                   or not layer.weight.is_floating_point()):
            copied.set_submodule(name, torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
    return torch.nn.Module.float(copied).requires_grad_(False).eval()


def only_variant(model: str) -> str | None:
    """The variant, for example fp16, of a folder in which a part has weights of that variant alone; or None."""
    for part in sorted({file.parent for file in Path(model).glob("*/*.safetensors")}):
        names = [re.sub(r"-\d+-of-\d+", "", file.name) for file in sorted(part.glob("*.safetensors"))]
        if all(name.count(".") == 2 for name in names):
            return names[0].split(".")[1]
    return None


def prepare_transformer(pipe, args):
    """Gradient checkpointing (by default on a GPU) and torch.compile, as the flags say."""
    on = pipe.device.type == "cuda" if args.checkpointing is None else args.checkpointing
    if on and pipe.transformer._supports_gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(pipe.transformer)


def check_compiler(wanted: bool):
    """Raise InputError if torch.compile is wanted and lacks its compiler: on a CPU for C++, on a GPU for C."""
    kinds = ("CC", "gcc", "clang") if torch.cuda.is_available() else ("CXX", "g++")
    if wanted and not any(shutil.which(os.environ.get(kind, kind)) for kind in kinds):
        raise InputError(f"--compile: needs the compiler {kinds[1]}, which is not there; install it (apt install g++), "
                         "or leave --compile out")


def compile_blocks(model: torch.nn.Module, backend: str = "inductor"):
    """torch.compile each of a transformer's blocks; the whole is called through hooks. Each kind of block is compiled
    up to five times: for the rollout, the update, the reference in either, and NFT's old policy."""
    torch._dynamo.config.recompile_limit = 64  # the default, 8, would leave blocks uncompiled
    for blocks in model.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            block.compile(backend=backend)
