"""Any flow-matching pipeline of diffusers, text to image or video, without code for single model families.

Rectified flow: x_t = (1 - t) x0 + t eps, velocity v = eps - x0, t in [0, 1], t = 1 is noise. Whatever a transformer's
signature, packing, sign or timestep convention, its pipeline hands its scheduler v in this convention. So
v(x_t, t | prompt) is what the scheduler gets when the pipeline starts from x_t at noise level t. Latents have the
layout in which the scheduler gets them: (b, channels, h, w), packed tokens, or video.

    pipe = load_pipeline("tiny/sd3", device)
    encode_prompts(pipe, prompts)                                # once; this removes the text encoders
    sigmas = schedule(pipe, 28)                                  # the pipeline's own noise levels, from 1 down to 0
    noise = draw_noise(pipe, len(prompts), torch.Generator())    # (n, ...), as the pipeline draws it
    x0, _ = integrate(pipe, noise, prompts, sigmas)              # Euler, in the pipeline's own loop
    pictures = decode(pipe, x0)                                  # (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1]
    v = velocity(pipe, add_noise(x0, noise, t), t, prompts)      # with gradients; t (n,), one for each sample
"""
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from flow import intercept
from flow.cli import InputError, loading, progress, quiet_libraries, reason, width_and_height
from flow.distributed import base_dtype, shard
from flow.intercept import Captured, capture, first_step, latents_of, patched, transformer_inputs_hook
from flow.lora import merged, quantization, shallow_copy, use_autocast, use_fast_kernels
from flow.prompts import PROBE_PAIR, batches, cache_prompts, call_settings, encode_all, encodes_in_one_go
from normguard import norm_ratio, reference, renormalize

# ---------------------------------------------------------------- loading

def load_pipeline(model: str, device: torch.device, size: int | str | None = None, frames: int | None = None,
                  quantize: str = "none", sharded: bool = False, base: torch.dtype | None = None):
    """Load a frozen pipeline from a diffusers folder or hub id, for pictures of `size` (pixels a side, or WIDTHxHEIGHT)
    and videos of `frames` frames (None: the model's own). The transformer is on `device` in `base` (None: base_dtype)
    or quantized, the VAE in fp32, text encoders on the CPU. InputError if it is no flow pipeline that needs only a
    prompt."""
    quiet_libraries()
    base = base or base_dtype(device)
    options = {"dtype": {"default": base, "vae": torch.float32}, "quantization_config": quantization(quantize)}
    with loading("--model", model):
        intercept.check_parts(model, diffusers.DiffusionPipeline.load_config(model))
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, variant=only_variant(model), **options)
    probe = shallow_copy(pipe.transformer)  # before it is divided among processes
    if sharded:
        shard(pipe.transformer, device)
    use_autocast(pipe.transformer, device, base)
    use_fast_kernels(getattr(pipe, "vae", None))
    return prepare_pipeline(pipe, model, device, size, frames, probe=probe)


def prepare_pipeline(pipe, model: str, device: torch.device, size: int | str | None = None,
                     frames: int | None = None, probe: torch.nn.Module | None = None):
    """Freeze a pipeline, take out its text encoders, and find out how it works, into `pipe.flow`. Arguments as for
    load_pipeline; `probe`: its transformer's shallow_copy."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for part in modules.values():
        part.requires_grad_(False).eval()
    encoders = {name: part for name, part in modules.items() if name.startswith("text_encoder")}
    for name in encoders:
        setattr(pipe, name, None)
    if getattr(pipe, "guider", None) is not None:  # guidance as a component, whose scale cannot be set here
        pipe.guider = pipe.guider.new(enabled=False)
    pipe.set_progress_bar_config(disable=True)
    name = type(pipe).__name__
    # diffusers finds a pipeline's device by a walk through all modules, several times a call
    pipe.__class__ = type(name, (type(pipe),), {"device": device, "_execution_device": device})
    pipe.flow = SimpleNamespace(
        settings=call_settings(pipe, size, frames),  # arguments of each call, besides steps and guidance
        unguided={},         # arguments of calls without guidance
        scheduler=intercept.replace_scheduler(pipe, model),  # its config, or None for the model's own
        timesteps={},        # {noise level: the scheduler's timestep}, of all schedules so far
        timestep_inputs={},  # {noise level: {name: value}}, of the transformer
        encoders=encoders,   # {name: text encoder}; None when all prompts are encoded
        rows={},             # the cache: {(settings, prompt, ...): encoding}
        shapes={},           # {prompt: shapes of its encodings}
        in_one_go=False,     # may several prompts be encoded in one call?
        one_by_one={},       # {guidance: must samples go through the transformer one by one?}
        probe=probe)         # a small fp32 copy of the transformer, until the prompts are encoded
    flags = f"--model {model}" + f" --size {size}" * bool(size) + f" --frames {frames}" * bool(frames)
    try:
        learn(pipe)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # the pipeline's own error about what it lacks or cannot do
        kind = ", an image-to-image pipeline," if "image" in intercept.call_parameters(pipe) and not size else ""
        raise InputError(f"{flags}: {name}{kind} cannot draw that, given a prompt ({type(e).__name__}: {reason(e)})")
    *video, _, height, width = pipe.flow.picture
    if frames and video != [frames] or size and (width, height) != width_and_height(size):
        raise InputError(f"{flags}: {name} draws {width}x{height} pixels; frames in videos: {(video or ['none'])[0]}")
    return pipe


def only_variant(model: str) -> str | None:
    """The variant, for example fp16, of a folder in which a part has weights of that variant alone; or None."""
    for part in sorted({file.parent for file in Path(model).glob("*/*.safetensors")}):
        names = [re.sub(r"-\d+-of-\d+", "", file.name) for file in sorted(part.glob("*.safetensors"))]
        if all(name.count(".") == 2 for name in names):
            return names[0].split(".")[1]
    return None


# ---------------------------------------------------------------- learning about a pipeline by calling it

@torch.no_grad()
def learn(pipe):
    """Find out, by calls of the pipeline, what no config tells, and add it to pipe.flow."""
    flow, parameter = pipe.flow, intercept.call_parameters(pipe).get("guidance_scale")
    cache_prompts(pipe)
    for scale in [parameter.default, 1.0, 0.0] if parameter else [None]:
        flow.unguided, inputs = {} if scale is None else {"guidance_scale": scale}, []
        try:
            levels = schedule(pipe, 1000)
            with transformer_inputs_hook(pipe, inputs.append):
                for level in levels[[0, 700]].tolist():
                    _, x = first_step(pipe, [""], None, level)
        except (TypeError, ValueError):  # for guidance, which is its default, it may need more arguments
            if scale in (0.0, None):
                raise
        if [len(latents_of(given)) for given in inputs] == [1, 1]:  # guidance would double the samples, or the calls
            break
    else:
        raise ValueError("its guidance cannot be switched off")
    if levels[0] > 1.001:
        raise ValueError(f"its noise levels reach {levels[0]:g}; a rectified flow's end at 1")
    early, late = inputs
    flow.timestep_names = [name for name, value in early.items()  # names or positions of inputs that tell the timestep
                           if torch.is_tensor(value) and not torch.equal(value, late[name])]
    flow.latents = tuple(x.shape[1:])  # shape of one sample's latents
    flow.picture = tuple(decode_batch(pipe, x.float()).shape[1:])  # (3, h, w), or of a video (frames, 3, h, w)
    flow.in_one_go = encodes_in_one_go(pipe)
    flow.one_by_one = {None: not holds_in_batches(pipe)}


@torch.no_grad()
def holds_in_batches(pipe, guidance: float | None = None) -> bool:
    """Try whether two samples have the same velocities together and alone. With a small copy of the transformer in
    fp32 and without TF32, since bf16 rounds differently in batches of another size."""
    if getattr(next(pipe.transformer.parameters()), "fake_mode", None):
        return True  # fake tensors cannot tell
    prompts = PROBE_PAIR if len(batches(pipe, PROBE_PAIR, 2)) == 1 else PROBE_PAIR[:1] * 2
    x = draw_noise(pipe, 2, torch.Generator().manual_seed(0)).to(pipe.device)
    probe = pipe.flow.probe = pipe.flow.probe or shallow_copy(pipe.transformer)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = matmul.allow_tf32, cudnn.allow_tf32

    def to_fp32(inputs):
        inputs |= tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, inputs)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with (patched(pipe, transformer=probe.to(pipe.device)), transformer_inputs_hook(pipe, to_fp32),
              patched(pipe.flow, timestep_inputs={})):
            for t in torch.tensor([[0.9, 0.4], [0.4, 0.4]]):
                v = velocity(pipe, x, t, prompts, guidance)
                alone = [velocity(pipe, x[i:i + 1], t[i:i + 1], prompts[i:i + 1], guidance) for i in range(2)]
                if (v - torch.cat(alone)).norm() > 1e-4 * v.norm():
                    raise ValueError("a sample's velocity depends on the other samples of its batch")
        return True
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as e:  # what PyTorch and pipelines raise
        tqdm.write(f"note: {type(pipe).__name__} is called for one sample at a time ({reason(e)})")
        return False
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = allowed
        probe.to("cpu")


# ---------------------------------------------------------------- what the scripts call

def encode_prompts(pipe, prompts: list[str], guidance: float | None = None, store: Path | None = None,
                   guard_guidance: float | None = None):
    """Encode each prompt once, for calls without guidance and with these scales of it, and remove the text encoders.
    Encodings are kept in the folder `store`, if given, for later runs. A model with a guidance embedding gets
    `guidance` in every call from now on."""
    if guidance is not None and pipe.transformer.config.get("guidance_embeds"):
        pipe.flow.unguided = intercept.guided(pipe, guidance)
    scales = [scale for scale in (guidance, guard_guidance) if scale is not None]
    encode_all(pipe, ["", *PROBE_PAIR, *prompts], scales, store)
    for scale in scales:
        pipe.flow.one_by_one[scale] = not holds_in_batches(pipe, scale)
    pipe.flow.probe = None
    torch.cuda.empty_cache()


def schedule(pipe, steps: int) -> Tensor:
    """The pipeline's own noise levels for a number of steps, with its own shift: (steps + 1,), from 1 down to 0."""
    scheduler, original = pipe.scheduler, pipe.scheduler.set_timesteps

    def set_timesteps(*args, **kwargs):
        original(*args, **kwargs)
        raise Captured((scheduler.sigmas.cpu(), scheduler.timesteps.tolist()))
    levels, timesteps = capture(lambda: intercept.call_pipeline(pipe, [""], steps, set_timesteps))
    levels = 1 - levels if scheduler.config.invert_sigmas else levels
    pipe.flow.timesteps.update(zip(levels.tolist(), timesteps))
    return levels


def training_levels(pipe) -> Tensor:
    """The noise levels at which the model was trained, from its scheduler: (num_train_timesteps,), from high to low.
    With the scheduler's fixed shift; unshifted, if the shift depends on the picture's size."""
    scheduler = intercept.EULER.from_config(pipe.scheduler.config)
    levels, timesteps = scheduler.sigmas, scheduler.timesteps
    if scheduler.config.invert_sigmas:
        timesteps = scheduler.config.num_train_timesteps - timesteps
    pipe.flow.timesteps.update(zip(levels.tolist(), timesteps.tolist()))
    return levels


def draw_noise(pipe, n: int, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Draw noise latents (n, ...) as the pipeline does, on the CPU, from one generator or from n, one for each."""
    if not hasattr(type(pipe), "prepare_latents"):
        return intercept.run_loop(pipe, [""] * n, generator=generator)[0].float().cpu()
    changes = {"batch_size": n, "dtype": torch.float32, "device": torch.device("cpu")}
    noise = intercept.call_prepare_latents(pipe, generator, **changes)
    noise = noise[0] if isinstance(noise, tuple) else noise
    return noise[(slice(None), *map(slice, pipe.flow.latents))]  # without a condition that follows the noise


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise; x0 and noise (b, ...), t (b,)."""
    return torch.lerp(x0, noise, t.view(-1, *[1] * (x0.ndim - 1)))


def velocity(pipe, x: Tensor, t: Tensor, prompts: list[str], guidance: float | None = None) -> Tensor:
    """v(x_t, t | prompt) in fp32, (b, ...). x (b, ...), t (b,) in [0, 1]; guidance: a scale in the pipeline's own
    convention. Gradients reach x and the transformer's weights. The caller decides which adapter is active and whether
    gradients are recorded."""
    rows = batches(pipe, prompts, len(prompts), guidance)
    if len(rows) > 1:
        parts = [velocity(pipe, x[batch], t[batch], [prompts[i] for i in batch], guidance) for batch in rows]
        return torch.cat(parts)[torch.tensor(sum(rows, [])).argsort().to(x.device)]  # in the order of x
    with intercept.with_timesteps(pipe, t.tolist()):
        v, _ = first_step(pipe, prompts, x, t[0].item(), guidance)
    return v.float()


def project(v: Tensor, v_ref: Tensor) -> Tensor:
    """Remove from v the part of v - v_ref along v_ref, per sample (b, ...). What is left changes only the direction, to
    first order. Compare APG (arXiv 2410.02416), which does this to guidance."""
    d, ref = (v - v_ref).flatten(1), v_ref.flatten(1)
    along = (d * ref).sum(1, keepdim=True) / ref.square().sum(1, keepdim=True).clamp_min(1e-12) * ref
    return (v_ref.flatten(1) + d - along).view_as(v)


REPAIRS = {"match": renormalize, "cap": functools.partial(renormalize, cap=True), "project": project}  # by --renorm


@torch.no_grad()
def integrate(pipe, noise: Tensor, prompts: list[str], sigmas: Tensor, *, guidance: float | None = None,
              renorm: str = "none", compare: bool = False, batch: int = 64,
              desc: str = "sample") -> tuple[Tensor, Tensor | None]:
    """Make Euler steps from noise (n, ...) down `sigmas` (steps + 1,), in the pipeline's own loop. Returns x0 (n, ...)
    on the CPU and, with `compare` or a renorm of REPAIRS, the norm ratio to the reference before renorm, (n, steps)."""
    x0, dts = torch.empty_like(noise), sigmas.diff().tolist()
    ratios = torch.empty(len(noise), len(dts)) if compare or renorm != "none" else None
    with merged(pipe.transformer):
        for rows in progress(batches(pipe, prompts, batch, guidance), desc=desc, leave=False):
            batch_prompts = [prompts[i] for i in rows]

            def step(v, x, i):
                v = v.float()
                if ratios is not None:
                    with reference(pipe.transformer):
                        v_ref = velocity(pipe, x, sigmas[i].expand(len(x)), batch_prompts, guidance)
                    ratios[rows, i] = norm_ratio(v, v_ref).cpu()
                    v = v if renorm == "none" else REPAIRS[renorm](v, v_ref)
                x = x + dts[i] * v
                if i == len(dts) - 1:
                    x0[rows] = x.cpu()
                return x
            intercept.run_loop(pipe, batch_prompts, noise[rows].to(pipe.device), sigmas, step, guidance)
    return x0, ratios


def decode_batch(pipe, x0: Tensor) -> Tensor:
    """Decode latents (b, ...) to pictures (b, 3, h, w) or videos (b, frames, 3, h, w) in [0, 1], with gradients."""
    return intercept.run_loop(pipe, [""] * len(x0), x0, output="pt")[0].float()


def decode_size(pipe) -> int:
    """The number of pictures to decode at once: a megapixel in all, but at most 32, since more are slower."""
    return max(1, min(32, 3 * 2**20 // int(np.prod(pipe.flow.picture))))


@torch.no_grad()
def decode(pipe, x0: Tensor) -> Tensor:
    """decode_batch for latents (n, ...) on any device, a few at a time; the pictures are on the CPU. InputError if they
    hold a NaN."""
    chunks = progress(x0.split(decode_size(pipe)), desc="decode", leave=False)
    pictures = torch.cat([decode_batch(pipe, chunk.to(pipe.device)).cpu() for chunk in chunks])
    if not (x0.isfinite().all() and pictures.isfinite().all()):
        raise InputError("the model draws pictures that are not finite (NaN): a damaged model or LoRA, or too high "
                         "an --lr")
    return pictures
