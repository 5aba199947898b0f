"""LoRA on a diffusers transformer: add, merge, save and read it. Precision and quantization of the frozen base."""
import copy
import importlib.util
import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MethodType, SimpleNamespace

import diffusers
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save

from flow.cli import RANK, InputError, loading, make_dir, on_error, reading, write_files

NAME = "pytorch_lora_weights.safetensors"  # as diffusers names it
# names of tensors in files: a plain LoRA's, and text encoders'; parts of names that tell a format
PART = re.compile(r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)?"
                  r"(?P<layer>.+)\.(?:lora[_.](?:(?P<A>A|down)|(?P<B>B|up))(?:\.\w+)?\.weight|(?P<alpha>alpha))")
TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d*[._])")
FORMATS = {"hada": "LoHa", "lokr": "LoKr", "dora_": "DoRA", "magnitude": "DoRA", "base_model.": "PEFT", "unet.": "UNet",
           "lora_unet": "kohya", "lora_tr": "kohya", "diffusion_model.": "ComfyUI", "transformer.": "diffusers"}


def lora_targets(model: torch.nn.Module) -> list[str]:
    """The names of all linear layers inside attention modules. A second attention `attn2` beside `attn` is left out:
    DiffusionNFT, AWM and Flow-GRPO do not train SD3.5's."""
    parts = dict(model.named_modules())
    attentions = {name for name, part in parts.items() if hasattr(part, "to_q") or "Attention" in type(part).__name__}
    seconds = {name for name in attentions if name.endswith(".attn2") and name[:-1] in attentions}
    inside = tuple(f"{name}." for name in attentions - seconds)
    return [name for name, part in parts.items() if isinstance(part, torch.nn.Linear) and name.startswith(inside)]


def add_lora(model: torch.nn.Module, rank: int, seed: int, name: str = "default",
             initial: dict | None = None) -> list[torch.nn.Parameter]:
    """Add a LoRA with alpha = 2 rank to the attention layers of a transformer, or to the layers that have an adapter
    already; or with the layers, ranks and products B A of `initial` (see read_lora). Returns its fp32 parameters."""
    torch.manual_seed(seed)
    configs, initial = list(getattr(model, "peft_config", {}).values()), initial or {}
    whole_names = "|".join(map(re.escape, initial))  # names in a list would also be taken for the ends of longer ones
    ranks = {f"^{re.escape(layer)}": len(a) for layer, (a, _) in initial.items() if len(a) != rank}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", rank_pattern=ranks,
                        alpha_pattern={layer: 2 * r for layer, r in ranks.items()},
                        target_modules=configs[0].target_modules if configs else whole_names or lora_targets(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # NFT needs two adapters
        inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True  # diffusers' own methods for adapters ask for it
    set_adapter(model, name)
    diffusers.training_utils.cast_training_params(model, torch.float32)
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts too, and less often
    for layer, (a, b) in initial.items():
        model.get_submodule(layer).lora_A[name].weight.data.copy_(a)
        model.get_submodule(layer).lora_B[name].weight.data.copy_(b / 2)  # alpha / rank is 2
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def lora_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers that have an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
@torch.no_grad()
def merged(model: torch.nn.Module):
    """Use the weights W + scale B A of the active adapters, so that a forward without gradients costs what the base's
    costs. W is not changed; `reference` still finds it. Only for W in fp32: rounded to bf16, the sum would lose most of
    a young LoRA, and rollouts would not use the policy that is trained. Nor for W that is quantized or sharded."""
    def forward(layer, x):
        if layer.disable_adapters:  # as in `reference`
            return layer.base_layer(x)
        return torch.nn.functional.linear(x, layer.merged_weight, layer.base_layer.bias)

    weights = [(layer, layer.base_layer.weight.detach()) for layer in lora_layers(model)]
    weights = [(layer, w) for layer, w in weights if type(w) is torch.Tensor and w.dtype == torch.float32]
    for layer, w in weights:
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
        layer.merged_weight = sum(deltas, w)
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer, _ in weights:
            del layer.forward, layer.merged_weight


@contextmanager
def swapped(params: list[torch.nn.Parameter], values: list[torch.Tensor] | None):
    """Give the parameters other values, for example their moving average, until the end. None changes nothing."""
    before = [p.data for p in params]
    for p, value in zip(params, values or ()):
        p.data = value
    try:
        yield
    finally:
        for p, data in zip(params, before):
            p.data = data


def save_lora(pipe, folder: Path):
    """Write the LoRA to a folder, with alpha = rank and the training's scale 2 in B: readers that ignore metadata draw
    the same picture. `pipe.save_lora_weights` writes metadata in random order; equal runs must write equal files."""
    config = pipe.transformer.peft_config["default"].to_dict()  # it has a set, which is written sorted
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"]}
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True, default=sorted)
    lora = {f"transformer.{name}": (2 * value if ".lora_B." in name else value).contiguous()
            for name, value in get_peft_model_state_dict(pipe.transformer).items()}
    write_files({make_dir(folder, "--out") / NAME: save(lora, {"lora_adapter_metadata": header})})


def read_file(flag: str, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """A LoRA's tensors by their names in the file, in fp32, and the configuration in its metadata or beside it. `name`
    is a file, a folder with one, or on the hub OWNER/NAME, OWNER/NAME/FOLDER or OWNER/NAME/FILE."""
    place, parts = Path(name), name.split("/")
    if not place.exists():
        hub_id, inside = "/".join(parts[:2]), "/".join(parts[2:])
        wanted, deeper = ([inside, f"{inside}/*"], None) if inside else (["*.safetensors", "*.json"], "*/*")
        with loading(flag, name if Path(parts[0] or "/").is_dir() else hub_id, "a .safetensors file, "):
            place = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=deeper), inside)
    found = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "no .safetensors file"
        raise InputError(f"{flag} {name}: holds {names}; give one LoRA, of a training run its lora/")
    if found[0].suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{flag} {found[0]}: is a pickle, which can run code; convert it to .safetensors")
    with reading(f"{flag} {found[0]}", "give another .safetensors file"), safe_open(found[0], "pt") as opened:
        tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
        configs = [file.read_text() for file in found[0].parent.glob("adapter_config.json")]  # PEFT's
        config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", [*configs, "{}"][0]))
        return tensors, {"target_modules": [], **{key.removeprefix("transformer."): x for key, x in config.items()}}


def lora_rank(args) -> int:
    """--rank. If it is not given, the largest rank in --init-lora, or 32 without that."""
    if args.init_lora is None:
        return args.rank or 32
    tensors, _ = read_file("--init-lora", args.init_lora)
    ranks = [len(x) for key, x in tensors.items() if re.search(r"lora[_.](A|down)", key) and not TEXT.match(key)]
    rank = max(ranks, default=args.rank)
    if args.rank not in (None, rank):
        raise InputError(f"--rank {args.rank}: --init-lora {args.init_lora} has rank {rank}; leave --rank out")
    return rank


def layers_of(tensors: dict[str, torch.Tensor], config: dict = {}) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (A, B times alpha / r)}. Alpha is the file's, else the configuration's, else r. ValueError if it is no
    plain LoRA, or lacks a part."""
    layers = {}
    for name, tensor in tensors.items():
        part = PART.fullmatch(name)
        if not part or part.lastgroup in layers.setdefault(part["layer"], {}):
            raise ValueError(f"{name[-60:]} {'comes twice' if part else 'is no part of a plain LoRA'}")
        layers[part["layer"]][part.lastgroup] = tensor
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for layer, part in layers.items():
        if not part.keys() >= {"A", "B"}:
            raise ValueError(f"it lacks the A or B of {layer}")
        rank = len(part["A"])
        if (said := ranks.get(get_pattern_key(ranks, layer), config.get("r", rank))) != rank:
            raise ValueError(f"rank {rank} where its configuration says {said}: {layer}")
        alpha = alphas.get(get_pattern_key(alphas, layer), config.get("lora_alpha", rank))
        alpha *= rank**0.5 if config.get("use_rslora") else 1  # its scale is alpha / sqrt(r)
        layers[layer] = part["A"], part["B"] * (float(part.get("alpha", alpha)) / rank)
    return layers


def read_lora(pipe, flag: str, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer of the transformer: (A (r, in), B (out, r))} of a LoRA: B A is added to the layer's weight. `name`: see
    read_file. InputError if anything but text encoders' tensors, which are named, has no place."""
    tensors, config = read_file(flag, name)
    if (texts := [key for key in tensors if TEXT.match(key)]) and RANK == 0:
        print(f"{flag} {name}: {len(texts)} tensors for text encoders are left out ({texts[0]}, ...)")
    tensors = {key: tensor for key, tensor in tensors.items() if key not in texts}
    kind = next((kind for mark, kind in FORMATS.items() if any(mark in key for key in tensors)), "unknown")
    linears = {key: part for key, part in pipe.transformer.named_modules() if isinstance(part, torch.nn.Linear)}
    places = {key.replace(".", "_"): key for key in linears} | {key: key for key in linears}
    with on_error(f"{flag} {name}: a LoRA of format {kind} does not fit --model {pipe.name_or_path}",
                  "; convert it to diffusers' format, or give another"):
        if kind == "PEFT" and "r" not in config:
            raise ValueError("put its adapter_config.json, which has its alpha, beside it")
        if re.match("pissa|olora|corda|loftq", str(start := config.get("init_lora_weights"))):
            raise ValueError(f"it began as {start}, which changes the base's weights; convert it to a plain one")
        lora = layers_of(tensors, config)
        if not lora.keys() <= places.keys() and hasattr(pipe, "transformer_name"):  # PRX's loader is one for UNets
            with suppress(Exception):  # each of diffusers' converters raises its own
                converted = layers_of(type(pipe).lora_state_dict(dict(tensors)))
                # diffusers drops what it does not know, unsaid; then the sum of ||B A||^2 over the layers is less
                pairs = ([(a.double(), b.double()) for a, b in layers.values()] for layers in (converted, lora))
                kept, whole = (sum(((a @ a.T) * (b.T @ b)).sum() for a, b in layers) for layers in pairs)
                lora = converted if torch.isclose(kept, whole, rtol=1e-6, atol=0) else lora
        for layer, (a, b) in lora.items():
            linear = linears.pop(places.get(layer), None)
            if not linear or (*b.shape, *a.shape) != (linear.out_features, len(a), len(a), linear.in_features):
                raise ValueError(f"no place for B {list(b.shape)}, A {list(a.shape)} of {layer}")
        lacking = [key for key in linears if check_target_module_exists(SimpleNamespace(**config), key)]
        if lacking or not lora:
            raise ValueError(f"it lacks {[*lacking, 'any layer of the transformer'][0]}")
    return {places[layer]: value for layer, value in lora.items()}


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
    """Run a bf16 transformer under autocast, so that an fp32 LoRA trains on it; not what diffusers keeps in fp32."""
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
        raise InputError(f"--compile: needs the compiler {kinds[1]}: apt install g++, or leave --compile out")


def compile_blocks(model: torch.nn.Module, backend: str = "inductor"):
    """torch.compile each of a transformer's blocks; the whole is called through hooks. Each kind of block is compiled
    up to five times: for the rollout, the update, the reference in either, and NFT's old policy."""
    torch._dynamo.config.recompile_limit = 64  # the default, 8, would leave blocks uncompiled
    for blocks in model.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            block.compile(backend=backend)
