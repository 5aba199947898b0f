"""Call a pipeline of diffusers with its noise, its noise levels and its scheduler's step replaced.

Every flow pipeline prepares latents, asks its scheduler for noise levels, and hands the scheduler a velocity at each of
them. These three methods are replaced while a call lasts. Everything else that a transformer takes (masks, positions,
packed text) the pipeline makes itself. `pipe.flow` holds what is known about the pipeline: see flow/pipeline.py.
"""
import functools
import inspect
import itertools
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as EULER
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from flow.cli import InputError


class Captured(Exception):
    """Ends a pipeline's call early and carries a value out of it."""


def capture(run):
    """Call run() and return the value that Captured carries out of it."""
    try:
        run()
    except Captured as captured:
        return captured.args[0]


def patched(obj, **attributes):
    """A context in which an object has these attributes, instead of its own or its class's. At its end the object's
    attributes are all as they were."""
    return mock.patch.dict(vars(obj), attributes)


# ---------------------------------------------------------------- calls of the pipeline

def run_loop(pipe, prompts: list[str], x: Tensor | None = None, levels: Tensor = torch.zeros(1), step=None,
             guidance: float | None = None, output: str = "latent", generator=None):
    """Run the pipeline's loop down noise levels (k + 1,), from latents x (b, ...) or, if None, from its own noise.
    step(v, x, i) -> next x replaces the scheduler's i-th step. Without any step (k = 0) the pipeline only encodes the
    prompts and decodes the latents. Gradients are recorded. Returns the pipeline's output."""
    scheduler, step_indices = pipe.scheduler, itertools.count()
    inverted = scheduler.config.invert_sigmas  # its sigmas are 1 - t, and its velocity is -v

    def set_timesteps(*args, **kwargs):
        timesteps = [timestep(pipe, level) for level in levels[:-1].tolist()]
        scheduler.timesteps = torch.tensor(timesteps, device=pipe.device)
        scheduler.sigmas = (1 - levels if inverted else levels).to(pipe.device)

    def scheduler_step(v, timestep, x, *args, return_dict=True, **kwargs):
        x = step(-v if inverted else v, x, next(step_indices))
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
    steps = max(2, len(levels) - 1)  # some pipelines divide by half of it
    return call_pipeline(pipe, prompts, steps, set_timesteps, scheduler_step, x, guidance, output, generator)


def first_step(pipe, prompts: list[str], x: Tensor | None, level: float, guidance: float | None = None):
    """What the scheduler gets at the first step of a loop that starts at a noise level: (v, x), each (b, ...)."""
    def see(v, x, i):
        raise Captured((v, x))
    return capture(lambda: run_loop(pipe, prompts, x, torch.tensor([level, 0.0]), see, guidance))


def call_pipeline(pipe, prompts: list[str], steps: int, set_timesteps, step=None, x: Tensor | None = None,
                  guidance: float | None = None, output: str = "latent", generator=None):
    """Call the pipeline with its scheduler's set_timesteps and step replaced, and with x in place of its noise."""
    scheduler = pipe.scheduler
    arguments = {"prompt": list(prompts), "num_inference_steps": steps, "output_type": output, **pipe.flow.settings,
                 **guided(pipe, guidance, len(prompts))}
    if not hasattr(type(pipe), "prepare_latents"):
        arguments |= {"latents": x, "generator": generator or torch.Generator(pipe.device)}
    set_timesteps = functools.wraps(scheduler.set_timesteps)(set_timesteps)  # pipelines look at its signature
    with (patched(pipe, prepare_latents=functools.partial(prepare_latents, pipe, x)),
          patched(scheduler, set_timesteps=set_timesteps, step=step)):
        return inspect.unwrap(type(pipe).__call__)(pipe, **arguments)


def prepare_latents(pipe, x: Tensor | None, *args, **kwargs):
    """Return what the pipeline's prepare_latents returns, with x, if given, in place of the noise."""
    pipe.flow.prepare_arguments = args, kwargs
    prepared = call_prepare_latents(pipe)
    if x is None:
        return prepared
    latents, *others = prepared if isinstance(prepared, tuple) else (prepared,)
    latents = latents.to(x.dtype)
    latents[tuple(map(slice, x.shape))] = x  # a condition that follows the noise stays
    return (latents, *others) if isinstance(prepared, tuple) else latents


def call_prepare_latents(pipe, generator=None, **changes):
    """Call the pipeline's prepare_latents with its latest arguments, some of them changed. The global generator is not
    used."""
    method, (args, kwargs) = type(pipe).prepare_latents, pipe.flow.prepare_arguments
    bound = inspect.signature(method).bind(pipe, *args, **kwargs)
    changes["generator"] = generator or torch.Generator(bound.arguments.get("device") or "cpu")
    bound.arguments.update({name: value for name, value in changes.items() if name in bound.signature.parameters})
    return method(*bound.args, **bound.kwargs)


def call_parameters(pipe):
    """The parameters of the pipeline's call: {name: inspect.Parameter}."""
    return inspect.signature(type(pipe).__call__).parameters


def guided(pipe, guidance: float | None, n: int = 1) -> dict:
    """The pipeline's arguments for n prompts and a guidance scale in its own convention. None is no guidance; a
    guidance embedding then gets its default, or the value that encode_prompts was given."""
    if guidance is None:
        return pipe.flow.unguided
    parameters = call_parameters(pipe)
    if "true_cfg_scale" in parameters and not pipe.transformer.config.get("guidance_embeds"):
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * n}
    if "guidance_scale" not in parameters:
        raise InputError(f"--guidance {guidance}: {type(pipe).__name__} takes none")
    return {"guidance_scale": guidance}


def timestep(pipe, level: float) -> float:
    """The scheduler's timestep at a noise level, interpolated if the level belongs to none of the schedules so far."""
    known = pipe.flow.timesteps
    return known[level] if level in known else float(np.interp(level, *zip(*sorted(known.items()))))


def check_parts(model: str, config: dict):
    """Check a model_index.json, before weights are loaded: the only denoiser must be a transformer."""
    found = [name for name in ("transformer", "transformer_2", "unet", "prior") if (config.get(name) or [None])[0]]
    if found != ["transformer"]:
        raise InputError(f"--model {model}: is a {config['_class_name']} with {' and '.join(found) or 'no denoiser'}; "
                         "it takes a flow-matching pipeline with one transformer")


def replace_scheduler(pipe, model: str) -> dict | None:
    """Replace the scheduler by plain Euler with the same shift. Returns its config, or None if it was Euler before."""
    config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
    if not ("FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
        raise InputError(f"--model {model}: is a {type(pipe).__name__} with {name}; it takes a flow-matching pipeline")
    if type(pipe.scheduler) is EULER and not config.stochastic_sampling:
        return None
    shift = config.get("shift", config.get("flow_shift", 1.0))
    pipe.scheduler = EULER.from_config(config, shift=shift, stochastic_sampling=False)
    return {name: pipe.scheduler.config[name] for name in inspect.signature(EULER).parameters}


# ---------------------------------------------------------------- inputs of the transformer

@contextmanager
def transformer_inputs_hook(pipe, listen):
    """Call listen(inputs) before each forward of the transformer. `inputs` is {position or name: value}; listen may
    change it."""
    def hook(module, args, kwargs):
        inputs = {**dict(enumerate(args)), **kwargs}
        listen(inputs)
        return tuple(inputs[i] for i in range(len(args))), {name: inputs[name] for name in kwargs}
    with pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def latents_of(inputs: dict):
    """The latents among a transformer's inputs: a tensor (b, ...) or a list of b tensors."""
    return inputs.get("hidden_states", next(iter(inputs.values())))


def timestep_inputs(pipe, level: float) -> dict:
    """The inputs of the transformer that depend on the timestep, for one sample at a noise level; cached."""
    cache = pipe.flow.timestep_inputs

    def see(inputs):
        raise Captured(inputs)
    if level not in cache:
        # fp32 latents, as in a rollout: with the pipeline's own the timestep would be rounded to the base's bf16
        x = torch.zeros(1, *pipe.flow.latents, device=pipe.device)
        with transformer_inputs_hook(pipe, see):
            inputs = capture(lambda: run_loop(pipe, [""], x, torch.tensor([level, 0.0])))
        values = {name: inputs[name] for name in pipe.flow.timestep_names}
        cache[level] = {name: value.reshape(1, *value.shape[1:]) for name, value in values.items()}  # also of a scalar
    return cache[level]


@contextmanager
def with_timesteps(pipe, levels: list[float]):
    """Give the transformer the timesteps of these noise levels, one level for each sample of the batch."""
    if len(set(levels)) == 1:  # the pipeline itself gives the right timestep
        yield
        return
    by_sample = [timestep_inputs(pipe, level) for level in levels]
    values = {name: torch.cat([inputs[name] for inputs in by_sample]) for name in pipe.flow.timestep_names}

    def replace(inputs):
        repeats = len(latents_of(inputs)) // len(levels)  # 2 where guidance doubles the batch
        for name, value in values.items():
            inputs[name] = value.repeat(repeats, *[1] * (value.ndim - 1))
    with transformer_inputs_hook(pipe, replace):
        yield
