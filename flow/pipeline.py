"""Any flow-matching pipeline of diffusers, text to image or video, without a line that knows its family.

Rectified flow: x_t = (1 - t) x0 + t eps, velocity v = eps - x0, t in [0, 1], t = 1 is noise. The seam is the scheduler:
whatever a transformer's signature, packing, sign, text or way of telling the time, its pipeline hands its scheduler v
in this one convention. So v(x_t, t | prompt) is what the pipeline hands its scheduler when it starts from x_t at noise
level t, and latents have the layout in which the pipeline keeps them between two steps: pictures of latents, packed
tokens, video.

    pipe = load_pipeline("tiny/sd3", device)
    encode_prompts(pipe, prompts)                                   # once; the text encoders are gone after that
    sigmas = schedule(pipe, 28)                                     # the pipeline's own noise levels, from 1 down to 0
    noise = draw_noise(pipe, len(prompts), torch.Generator())       # (n, ...), as the pipeline draws it
    x0, _ = integrate(pipe, noise, prompts, sigmas)                 # Euler, in the pipeline's own loop
    pictures = decode(pipe, x0)                                     # (n, 3, h, w) or (n, frames, 3, h, w) in [0, 1]
    v = velocity(pipe, add_noise(x0, noise, t), t, prompts)         # with a gradient, each sample at a t of its own
"""
import copy
import functools
import inspect
import traceback
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from flow.cli import InputError, cannot_load, check_model, progress, quiet_libraries, reason
from flow.distributed import shard
from flow.intercept import (
    EULER,
    Captured,
    call,
    capture,
    guided,
    latents_of,
    patched,
    prepare,
    replace_scheduler,
    timestep_inputs,
    transformer_inputs_hook,
    with_timesteps,
)
from flow.lora import base_dtype, merged, quantization, use_autocast, use_fast_kernels
from flow.prompts import batches, encode_each, own_settings, remember_prompts, same, text_encoders
from normguard import norm_ratio, reference, renormalize

PAIR = ["a grey cat", "a grey dog"]  # prompts of one length, to try a pipeline on
CHUNK = 16  # prompts that are encoded in one go; always so many, since their number can change last bits
TRY = [*PAIR, "", "a grey cat asleep beside a grey dog by the fire"] * (CHUNK // 4)


# ---------------------------------------------------------------- loading

def load_pipeline(model: str, device: torch.device, size: int | None = None, frames: int | None = None,
                  quantize: str = "none", sharded: bool = False, base: torch.dtype | None = None):
    """A frozen pipeline from a diffusers folder or hub id, for pictures of `size` pixels a side and videos of `frames`
    frames (None: its own). Transformer and VAE on `device`; the transformer in `base` (bf16 on a GPU) or quantized, the
    VAE in fp32; text encoders wait on the CPU. Ends the process, naming --model, if it cannot be loaded or is no flow
    that draws from a prompt alone."""
    quiet_libraries()
    check_model("--model", model)
    base = base or base_dtype(device)
    options = {"dtype": {"default": base, "vae": torch.float32}, "quantization_config": quantization(quantize)}
    try:
        check_parts(model, diffusers.DiffusionPipeline.load_config(model))
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **options)
    except InputError:
        raise
    except Exception as e:  # no network, a gated repository, a broken file: each library raises its own
        cannot_load("--model", model, e)
    probe = shallow_copy(pipe.transformer)
    if sharded:
        shard(pipe.transformer, device)
    use_autocast(pipe.transformer, device, base)
    return prepare_pipeline(pipe, model, device, size, frames, probe=probe)


def prepare_pipeline(pipe, model: str, device: torch.device, size: int | None = None, frames: int | None = None,
                     fake: bool = False, probe: torch.nn.Module | None = None):
    """The same for a pipeline that is there; `fake`: of fake tensors, which have shapes and no numbers. `probe`: its
    transformer's shallow_copy, if that cannot be made any more."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for part in parts.values():
        part.requires_grad_(False).eval()
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    for name in encoders:
        setattr(pipe, name, None)
    if getattr(pipe, "guider", None) is not None:  # guidance as a part of its own, which has no scale to set here
        pipe.guider = pipe.guider.new(enabled=False)
    if not fake:
        use_fast_kernels(getattr(pipe, "vae", None))
    pipe.set_progress_bar_config(disable=True)
    # diffusers' look-up of a pipeline's device walks through all modules, several times a call
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"device": device, "_execution_device": device})
    takes = inspect.signature(type(pipe).__call__).parameters
    if frames and not takes.keys() & {"num_frames", "frames"}:
        raise InputError(f"--frames {frames}: --model {model} is a {type(pipe).__name__}, which makes no videos")
    pipe.flow = SimpleNamespace(
        device=device, takes=takes, settings=own_settings(pipe, takes, size, frames), encoders=encoders, fake=fake,
        scheduler=replace_scheduler(pipe, model), inverted=bool(pipe.scheduler.config.get("invert_sigmas")), clock=None,
        in_one_go=None, probe=probe, one_by_one={}, rows={}, last={}, shapes={}, timesteps={},
        timestep_inputs={}, prepared={})
    if hasattr(pipe, "encode_prompt"):
        remember_prompts(pipe)
    try:
        learn(pipe)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # a pipeline's own words for what it lacks or cannot do
        flags = f"--model {model}" + f" --size {size}" * bool(size) + f" --frames {frames}" * bool(frames)
        kind = ", an image-to-image pipeline," if "image" in takes and not size else ""
        at = traceback.extract_tb(e.__traceback__)[-1]
        why = f"{type(e).__name__}: {reason(e)}; {Path(at.filename).name}:{at.lineno}"
        raise InputError(f"{flags}: {type(pipe).__name__}{kind} cannot draw that, given a prompt ({why})")
    if size and pipe.flow.picture[-2:] != (size, size):
        raise InputError(f"--size {size}: {type(pipe).__name__} makes it "
                         f"{pipe.flow.picture[-1]}x{pipe.flow.picture[-2]}")
    if frames and pipe.flow.picture[0] != frames:
        raise InputError(f"--frames {frames}: {type(pipe).__name__} makes it {pipe.flow.picture[0]}")
    return pipe


def check_parts(model: str, config: dict):
    """End the process, before weights are loaded, if a model_index.json does not name one denoiser, a transformer."""
    has = [name for name in ("transformer", "transformer_2", "unet", "prior") if (config.get(name) or [None])[0]]
    if has != ["transformer"]:
        raise InputError(f"--model {model}: is a {config['_class_name']} with {' and '.join(has) or 'no denoiser'}; "
                         "it takes a flow-matching pipeline with one transformer")


@torch.no_grad()
def learn(pipe):
    """Find out by calling the pipeline, into pipe.flow: what keeps it from guidance, its latents, its noise levels and
    how its transformer is told them, whether samples of a batch are as each alone, and its pictures' shape."""
    def see(v, x, i):
        """The latents in the scheduler's layout."""
        raise Captured(x)
    seam, rows = pipe.flow, []
    scales = [seam.takes["guidance_scale"].default, 1.0, 0.0] if "guidance_scale" in seam.takes else [None]
    for scale in scales:
        seam.unguided = {} if scale is None else {"guidance_scale": scale}
        rows.clear()
        try:
            with text_encoders(pipe):
                for prompt in ("", *PAIR):
                    call(pipe, [prompt], levels=torch.zeros(1))
                if seam.in_one_go is None:
                    capture(lambda: call(pipe, TRY, levels=torch.zeros(1)))
            levels = schedule(pipe, 1000)
            with transformer_inputs_hook(pipe, lambda given: rows.append(len(latents_of(given)))):
                x = capture(lambda: call(pipe, [""], levels=torch.tensor([levels[0], 0.0]), step=see))
        except (TypeError, ValueError):
            if scale == scales[-1]:
                raise
            rows.clear()  # guided by default, it may want more
        if rows == [1]:  # the transformer was called once, for one sample
            break
    else:
        raise ValueError("its guidance cannot be switched off")
    if levels[0] > 1.001:
        raise ValueError(f"its noise levels reach {levels[0]:g}; a rectified flow's end at 1")
    seam.latents = tuple(x.shape[1:])
    one, other = (timestep_inputs(pipe, level) for level in levels[[100, 700]].tolist())
    seam.clock = [name for name, value in one.items() if torch.is_tensor(value) and not same(value, other[name])]

    seam.one_by_one = {None: not holds_in_batches(pipe)}
    x = draw_noise(pipe, 1, torch.Generator().manual_seed(0)).to(seam.device)
    seam.picture = tuple(decode_batch(pipe, x).shape[1:])


def shallow_copy(transformer: torch.nn.Module) -> torch.nn.Module:
    """An fp32 copy with one block of each list of blocks: enough to see how a transformer treats its inputs, at a small
    part of its size. Quantized layers become random ones."""
    repeated = {*(transformer._repeated_blocks or ()), *(transformer._no_split_modules or ())}  # if they are named
    blocks = {name: part for name, part in transformer.named_children() if isinstance(part, torch.nn.ModuleList)
              and (not repeated or any(type(inner).__name__ in repeated for inner in part.modules()))}
    for name, part in blocks.items():
        setattr(transformer, name, part[:1])
    try:
        copied = copy.deepcopy(transformer)
    finally:
        for name, part in blocks.items():
            setattr(transformer, name, part)
    for name, layer in list(copied.named_modules()):
        vars(layer).pop("forward", None)  # autocast's, which is the original's
        if isinstance(layer, torch.nn.Linear) and (type(layer.weight.data) is not torch.Tensor
                                                   or not layer.weight.is_floating_point()):
            copied.set_submodule(name, torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
    return torch.nn.Module.float(copied).requires_grad_(False).eval()


@torch.no_grad()
def holds_in_batches(pipe, guidance: float | None = None) -> bool:
    """Are the velocities of two samples the same together as each alone? If they are not, batches are of one. Asked of
    an fp32 copy of a few blocks, where what is not the same cannot pass for the rounding of bf16."""
    if pipe.flow.fake:
        return True  # on trust
    device, pair = pipe.flow.device, PAIR if len(batches(pipe, PAIR, 2)) == 1 else PAIR[:1] * 2  # of one length
    x = draw_noise(pipe, 2, torch.Generator().manual_seed(0)).to(device)
    pipe.flow.probe = pipe.flow.probe or shallow_copy(pipe.transformer)

    def in_fp32(given):
        """What the transformer is given, in the copy's precision."""
        given |= tree_map_only(torch.Tensor, lambda value: value.float() if value.is_floating_point() else value, given)

    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with patched(pipe, transformer=pipe.flow.probe.to(device)), patched(pipe.flow, timestep_inputs={}, prepared={}):
            with transformer_inputs_hook(pipe, in_fp32):
                for t in torch.tensor([[0.9, 0.4], [0.4, 0.4]]):
                    v = velocity(pipe, x, t, pair, guidance)
                    alone = [velocity(pipe, x[i:i + 1], t[i:i + 1], pair[i:i + 1], guidance) for i in range(2)]
                    if (v - torch.cat(alone)).norm() > 1e-4 * v.norm():
                        raise ValueError("the samples of a batch are not as each alone")
        return True
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as e:  # what PyTorch and pipelines raise
        tqdm.write(f"note: {type(pipe).__name__} is called for one sample at a time ({reason(e)})")
        return False
    finally:
        for backend, allowed in zip(backends, tf32):
            backend.allow_tf32 = allowed
        pipe.flow.probe.to("cpu")


# ---------------------------------------------------------------- what the scripts call

def encode_prompts(pipe, prompts: list[str], guidance: float | None = None, store: Path | None = None):
    """Encode each of the prompts once, for calls without guidance and with that, and let the text encoders go. In a
    folder `store` the encodings are kept on disk, where a later run finds them. What a guidance embedding is told
    belongs to the model: from now on it is told that in every call."""
    if guidance is not None and pipe.transformer.config.get("guidance_embeds"):
        pipe.flow.unguided = guided(pipe, guidance)
    if hasattr(pipe, "encode_prompt"):
        encode_each(pipe, ["", *PAIR, *prompts], CHUNK if pipe.flow.in_one_go else 1, guidance, store)
    if guidance is not None:
        pipe.flow.one_by_one[guidance] = not holds_in_batches(pipe, guidance)
    pipe.flow.probe = None  # it has served
    if pipe.flow.device.type == "cuda":
        torch.cuda.empty_cache()


def schedule(pipe, steps: int) -> Tensor:
    """The pipeline's own noise levels for so many steps, with its own shift: (steps + 1,), from 1 down to 0."""
    levels, timesteps = capture(lambda: call(pipe, [""], steps=steps))
    levels = 1 - levels if pipe.flow.inverted else levels
    pipe.flow.timesteps.update(zip(levels.tolist(), timesteps.tolist()))
    return levels


def training_levels(pipe) -> Tensor:
    """The noise levels that the model was trained at, by its scheduler: (num_train_timesteps,), from high to low. With
    the scheduler's fixed shift; unshifted where the shift depends on the size of the picture."""
    scheduler = EULER.from_config(pipe.scheduler.config)
    levels, timesteps = scheduler.sigmas, scheduler.timesteps
    if pipe.flow.inverted:
        timesteps = scheduler.config.num_train_timesteps - timesteps
    pipe.flow.timesteps.update(zip(levels.tolist(), timesteps.tolist()))
    return levels


def draw_noise(pipe, n: int, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """(n, ...) latents of pure noise as the pipeline draws them, on the CPU, from one generator or one for each."""
    def see(given):
        """The latents, which the transformer need not see."""
        raise Captured(latents_of(given).float().cpu())
    if not hasattr(type(pipe), "prepare_latents"):
        with transformer_inputs_hook(pipe, see):
            return capture(lambda: call(pipe, [""] * n, levels=torch.tensor([1.0, 0.0]), generator=generator))
    made = prepare(pipe, generator, batch_size=n, dtype=torch.float32, device=torch.device("cpu"))
    made = made[0] if isinstance(made, tuple) else made
    return made[(slice(None), *map(slice, pipe.flow.latents))]


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise; x0 and noise (b, ...), t (b,)."""
    return torch.lerp(x0, noise, t.view(-1, *[1] * (x0.ndim - 1)))


def velocity(pipe, x: Tensor, t: Tensor, prompts: list[str], guidance: float | None = None) -> Tensor:
    """v(x_t, t | prompt), fp32. x (b, ...), t (b,) in [0, 1]; guidance: a scale in the pipeline's own convention.
    Gradients reach x and the transformer's weights; which adapter is on, and whether gradients are recorded, is for the
    caller to say."""
    def see(v, x, i):
        """The velocity, at the only step."""
        raise Captured(v.float())
    order, parts = [], []
    for rows in batches(pipe, prompts, len(prompts), guidance):
        whole, levels = len(rows) == len(prompts), t[rows].tolist()
        some, x_rows = (prompts, x) if whole else ([prompts[i] for i in rows], x[rows])
        with with_timesteps(pipe, levels):
            parts.append(capture(lambda: call(pipe, some, x_rows, torch.tensor([levels[0], 0.0]), see, guidance)))
        order += rows
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]


def project(v: Tensor, v_ref: Tensor) -> Tensor:
    """v without the part of v - v_ref that lies along v_ref, per sample: what is left changes the direction only to
    first order. (b, ...). Compare APG (arXiv 2410.02416), which does so to guidance."""
    d, ref = (v - v_ref).flatten(1), v_ref.flatten(1)
    along = (d * ref).sum(1, keepdim=True) / ref.square().sum(1, keepdim=True).clamp_min(1e-12) * ref
    return (v_ref.flatten(1) + d - along).view_as(v)


REPAIRS = {"match": renormalize, "cap": functools.partial(renormalize, cap=True), "project": project}  # by --renorm


@torch.no_grad()
def integrate(pipe, noise: Tensor, prompts: list[str], sigmas: Tensor, *, guidance: float | None = None,
              renorm: str = "none", compare: bool = False, batch: int = 64,
              desc: str = "sample") -> tuple[Tensor, Tensor | None]:
    """Euler from noise (n, ...) down `sigmas` (steps + 1,), in the pipeline's own loop. Returns x0 (n, ...) on the CPU
    and, with `compare` or a renorm of REPAIRS, the norm ratio to the reference at each step, (n, steps), before any of
    that."""
    out, dts = torch.empty_like(noise), sigmas.diff().tolist()
    ratios = torch.empty(len(noise), len(dts)) if compare or renorm != "none" else None
    with merged(pipe.transformer):
        for rows in progress(batches(pipe, prompts, batch, guidance), desc=desc, leave=False):
            some = [prompts[i] for i in rows]

            def step(v, x, i):
                """Euler's, of (b, ...)."""
                v = v.float()
                if ratios is not None:
                    with reference(pipe.transformer):
                        v_ref = velocity(pipe, x, sigmas[i].expand(len(x)), some, guidance)
                    ratios[rows, i] = norm_ratio(v, v_ref).cpu()
                    v = v if renorm == "none" else REPAIRS[renorm](v, v_ref)
                x = x + dts[i] * v
                if i == len(dts) - 1:
                    out[rows] = x.cpu()
                return x
            call(pipe, some, noise[rows].to(pipe.flow.device), sigmas, step, guidance)
    return out, ratios


def decode_batch(pipe, x0: Tensor) -> Tensor:
    """Latents (b, ...) -> pictures (b, 3, h, w), or videos (b, frames, 3, h, w), fp32 in [0, 1], with a gradient if
    recorded."""
    return call(pipe, [""] * len(x0), x0, torch.zeros(1), output="pt")[0].float()


def decode_size(pipe) -> int:
    """How many pictures are decoded at once: a megapixel of them, and at most 32, above which it gets slower."""
    return max(1, min(32, 3 * 2**20 // int(np.prod(pipe.flow.picture))))


@torch.no_grad()
def decode(pipe, x0: Tensor) -> Tensor:
    """The same for latents (n, ...) anywhere, on the CPU, a few at a time. Ends the process if it gives a NaN."""
    chunks = progress(x0.split(decode_size(pipe)), desc="decode", leave=False)
    pictures = torch.cat([decode_batch(pipe, z.to(pipe.flow.device)).cpu() for z in chunks])
    if not (x0.isfinite().all() and pictures.isfinite().all()):
        raise InputError("the model draws pictures that are not finite (NaN): a damaged model or LoRA, or too high "
                         "an --lr")
    return pictures
