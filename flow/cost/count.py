"""What a training run's phases cost: memory and FLOPs, counted in any call, on real tensors or fake ones.

    live, flops = metered(lambda: update(pipe, 4))

The phases call the project's own functions as the training scripts do. flow/cost/budget.py counts them on fake tensors,
flow/cost/bench.py times them on real ones.
"""
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from flow.cost.shapes import PROMPT, blank_lora, blank_pipeline, blank_reward, encode
from flow.lora import lora_layers
from flow.pipeline import decode_batch, decode_size, draw_noise, velocity
from flow.prompts import CHUNK
from normguard import norm_hinge, reference

GB = 2**30
SCORED = 64  # pictures that the reward sees at once: load_reward's default
FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# what autocast computes in fp32 on a GPU but not on a CPU: of its list, what transformers of pictures call
FP32 = [(F, "layer_norm"), (F, "rms_norm"), (F, "group_norm"), (F, "softmax"), (torch, "softmax"), (Tensor, "softmax"),
        (torch, "pow"), (Tensor, "pow"), (torch, "rsqrt"), (Tensor, "rsqrt"), (torch, "exp"), (Tensor, "exp"),
        (torch, "sum"), (Tensor, "sum"), (F, "normalize")]


# ---------------------------------------------------------------- counting

if FLASH_ON_CPU not in flop_registry:  # a CPU's attention, which PyTorch counts on GPUs only
    @register_flop_formula(FLASH_ON_CPU)
    def _(q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    @register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)


class Meter(TorchDispatchMode):
    """PyTorch's way to see each operation: counts FLOPs and the bytes of what operations make, for as long as they
    live."""
    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.flops = {}, 0, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op._overloadpacket in flop_registry:
            self.flops += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        if op.namespace == "prim":  # a question about a tensor, of which fake ones hear many
            return out
        outs = [x.untyped_storage() for x in (out if isinstance(out, (list, tuple)) else (out,)) if torch.is_tensor(x)]
        new = {x._cdata: x for x in outs if x._cdata not in self.live}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)} if new else ()
        for key, storage in new.items():
            if key not in given:  # not a view of what was there before
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key: int):
        """A storage is gone."""
        self.now -= self.live.pop(key)


@contextmanager
def as_on_cuda():
    """While this lasts, a CPU's autocast computes in fp32 what a GPU's does. (Autocast for fake GPU tensors needs a
    PyTorch built for GPUs, and the fake pipeline is to be the same everywhere.)"""
    def in_fp32(function):
        """The function, of arguments in fp32."""
        def run(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args)
            return function(*args, **kwargs)
        return run
    with ExitStack() as stack:
        for owner, name in FP32:
            stack.enter_context(mock.patch.object(owner, name, in_fp32(getattr(owner, name))))
        yield


def metered(run) -> tuple[int, int]:
    """The most bytes that lived at once of all that run() made, and its FLOPs (a multiplication and an addition are
    two)."""
    with Meter() as meter:
        run()
    return meter.peak, meter.flops


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def held(model: torch.nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return size_of(*model.parameters(), *model.buffers())


def linear_bytes(model: torch.nn.Module, kind: str) -> tuple[int, int]:
    """Bytes of a bf16 model whose linear layers are quantized to `kind`, and of the largest layer's weight in bf16, as
    which it is used. int8 has an fp32 scale a row; nf4 half a byte and an fp32 scale for 64 numbers."""
    weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
    if kind == "none":
        return held(model), 0
    each = {"int8": lambda w: w.numel() + 4 * len(w), "nf4": lambda w: w.numel() * (1 / 2 + 4 / 64)}[kind]
    rest = held(model) - size_of(*weights)
    return int(rest + sum(map(each, weights))), 2 * max(w.numel() for w in weights)


# ---------------------------------------------------------------- phases

def inputs(pipe, n: int) -> tuple[Tensor, Tensor, list[str]]:
    """Latents (n, ...), noise levels (n,) that differ, and prompts."""
    x = draw_noise(pipe, n, torch.Generator().manual_seed(0)).to(pipe.device)
    return x, torch.linspace(0.2, 0.8, n), [PROMPT] * n


@torch.no_grad()
def rollout_step(pipe, n: int, guidance: float | None = None) -> Tensor:
    """One of a rollout's steps for n pictures."""
    x, _, prompts = inputs(pipe, n)
    return x - 0.1 * velocity(pipe, x, torch.full((n,), 0.5), prompts, guidance)


def reference_pass(pipe, n: int, guidance: float | None = None) -> Tensor:
    """The frozen base's velocities of n training rows."""
    with reference(pipe.transformer):
        return velocity(pipe, *inputs(pipe, n), guidance)


def update(pipe, n: int, opt=None, guided: float | None = None):
    """Forward, reference, backward and step of n training rows with the guard, as in the training scripts. guided:
    --guard-guidance."""
    v = velocity(pipe, *inputs(pipe, n))
    v_ref = reference_pass(pipe, n)
    vg = v if guided is None else velocity(pipe, *inputs(pipe, n), guided)
    vg_ref = v_ref if guided is None else reference_pass(pipe, n, guided)
    loss = (v - v_ref).square().flatten(1).mean(1) + norm_hinge(vg, vg_ref)
    loss.sum().backward()
    if opt:
        opt.step()
    for p in pipe.transformer.parameters():
        p.grad = None


@torch.no_grad()
def decode_step(pipe, n: int) -> Tensor:
    """Pictures of n latents."""
    return decode_batch(pipe, inputs(pipe, n)[0])


@torch.no_grad()
def reward_step(clip, n: int) -> Tensor:
    """A CLIPModel's scores of n pictures and prompts."""
    device, vision = clip.logit_scale.device, clip.config.vision_config
    pictures = clip.get_image_features(torch.zeros(n, 3, vision.image_size, vision.image_size, device=device))
    tokens = torch.ones(n, clip.config.text_config.max_position_embeddings, dtype=torch.long, device=device)
    texts = clip.get_text_features(tokens)
    return (pictures.pooler_output * texts.pooler_output).sum(1)


@contextmanager
def checkpointing(pipe, on: bool):
    """While this lasts, the transformer's blocks are computed again in the backward pass, or not."""
    if on:
        pipe.transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        pipe.transformer.disable_gradient_checkpointing()


# ---------------------------------------------------------------- all of them, on fake tensors

def count(args, dtype: torch.dtype = torch.bfloat16) -> dict:
    """A run's parts on fake tensors, from the flags of budget.py: bytes of weights; the live bytes of each phase,
    as {pictures: bytes} where they depend on these; and FLOPs for a picture."""
    pipe = blank_pipeline(args.model, torch.device("cpu"), args.size, args.frames, True, dtype)
    mode, transformer = next(pipe.transformer.parameters()).fake_mode, pipe.transformer
    clip = blank_reward(args.reward, torch.device("cpu"), mode)
    base = {kind: linear_bytes(transformer, kind) for kind in ("none", "int8", "nf4")}
    found = {"parameters": sum(p.numel() for p in transformer.parameters()), "base": base, "vae": held(pipe.vae),
             "reward": held(clip) if clip else 0, "text": sum(map(held, pipe.flow.encoders.values())),
             "together": CHUNK if pipe.flow.in_one_go else 1,
             "encode": metered(lambda: encode(pipe, args.guidance, args.guard_guidance))[0]}
    found["lora"] = size_of(*blank_lora(pipe, args.rank))
    weights = [layer.base_layer.weight for layer in lora_layers(transformer)]
    mergeable = [weight for weight in weights if weight.dtype == torch.float32]
    found["merged"] = size_of(*mergeable)
    low, high = 1, max(2, args.batch)
    with as_on_cuda():
        with reference(transformer) if mergeable else nullcontext():  # merged, a policy computes what the base does
            run = {n: metered(lambda: rollout_step(pipe, n, args.guidance)) for n in (low, high)}
        ref = metered(lambda: reference_pass(pipe, 1))
        found |= {"rollout": {n: peak for n, (peak, _) in run.items()}, "flops": {"step": run[1][1], "row": ref[1]}}
        for on in (False, True):
            with checkpointing(pipe, on):
                run = {n: metered(lambda: update(pipe, n, guided=args.guard_guidance)) for n in (low, high)}
            found[f"update {on}"] = {n: peak for n, (peak, _) in run.items()}
            found["flops"][f"update {on}"] = run[1][1] - ref[1]
    chunk = decode_size(pipe)
    found["decode"], flops = metered(lambda: decode_step(pipe, chunk))
    found["flops"]["decode"] = flops / chunk
    found["score"], flops = metered(lambda: reward_step(clip, SCORED)) if clip else (0, 0)
    found["flops"]["score"] = flops / SCORED
    return found
