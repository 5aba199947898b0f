"""How a pipeline of diffusers is made to show its velocity: called as ever, but for its noise, its schedule and its
step.

Every flow pipeline prepares latents, asks its scheduler for noise levels, and hands it v at each of them. `call` puts
itself in those three places. What else a transformer takes (masks, positions, lists, packed text) the pipeline goes on
to make itself. `pipe.flow` (made by flow/pipeline.py) holds what has been found out about the pipeline. """
import functools
import inspect
import itertools
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as EULER
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput as StepOutput,
)
from torch import Tensor

from flow.cli import InputError


class Captured(Exception):
    """Leaves a pipeline's call from within, with what was to be seen there."""


def capture(run):
    """What run() has left with."""
    try:
        run()
    except Captured as left:
        return left.args[0]


@contextmanager
def patched(obj, **attributes):
    """While this lasts, attributes of an object that stand before its class's, a method for one; it can be nested."""
    own = vars(obj)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


def call(pipe, prompts: list[str], x: Tensor | None = None, levels: Tensor | None = None, step=None,
         guidance: float | None = None, output: str = "latent", steps: int = 1, generator=None):
    """Call the pipeline, recording gradients: from latents x (None: any), down noise levels (k + 1,), the i-th step of
    its scheduler replaced by step(v, x, i) -> next x. One level alone is no step: x is decoded, or prompts are encoded.
    No levels at all: Captured leaves with the pipeline's own for so many steps, (levels, timesteps)."""
    seam, scheduler, own, count = pipe.flow, pipe.scheduler, pipe.scheduler.set_timesteps, itertools.count()

    def prepare_latents(*args, **kwargs):
        """What the pipeline's own makes, once for a size of batch, with x in the place of the noise."""
        seam.prepare = args, kwargs
        key = repr([a for a in (*args, *kwargs.values()) if isinstance(a, (int, torch.device, torch.dtype))])
        if key not in seam.prepared:
            seam.prepared[key] = prepare(pipe)
        made = seam.prepared[key]
        if x is None:
            return made
        latents = made[0] if isinstance(made, tuple) else made
        if latents.shape != x.shape:  # latents that carry a condition behind the noise
            latents = latents.to(x.dtype, copy=True)
            latents[tuple(map(slice, x.shape))] = x
        else:
            latents = x
        return (latents, *made[1:]) if isinstance(made, tuple) else latents

    @functools.wraps(own)
    def set_timesteps(*args, **kwargs):
        """The given levels, not those that the pipeline asks for."""
        if levels is None:
            own(*args, **kwargs)
            raise Captured((scheduler.sigmas.cpu(), scheduler.timesteps.cpu()))
        times = [timestep(pipe, level) for level in levels[:-1].tolist()]
        scheduler.timesteps = torch.tensor(times, device=seam.device)
        scheduler.sigmas = (1 - levels if seam.inverted else levels).to(seam.device)

    def scheduler_step(v, timestep, x, *args, return_dict=True, **kwargs):
        """The given step, not the scheduler's."""
        x = step(-v if seam.inverted else v, x, next(count))
        return StepOutput(prev_sample=x) if return_dict else (x,)

    given = {"prompt": list(prompts), "output_type": output, **seam.settings, **guided(pipe, guidance, len(prompts))}
    given["num_inference_steps"] = steps if levels is None else max(2, len(levels) - 1)  # some divide by its half
    if not hasattr(type(pipe), "prepare_latents"):
        given |= {"latents": x, "generator": generator or torch.Generator(seam.device)}
    scheduler_pins = {"set_timesteps": set_timesteps, "step": scheduler_step,
                      "timesteps": scheduler.timesteps, "sigmas": scheduler.sigmas}  # put back after a nested call
    with patched(pipe, prepare_latents=prepare_latents), patched(scheduler, **scheduler_pins):
        return inspect.unwrap(type(pipe).__call__)(pipe, **given)


def guided(pipe, guidance: float | None, n: int = 1) -> dict:
    """The pipeline's arguments for n prompts and a guidance scale in its own convention. None: without guidance, or
    with what it tells a guidance embedding by default."""
    if guidance is None:
        return pipe.flow.unguided
    if "true_cfg_scale" in pipe.flow.takes and not pipe.transformer.config.get("guidance_embeds"):
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * n}
    if "guidance_scale" not in pipe.flow.takes:
        raise InputError(f"--guidance {guidance}: {type(pipe).__name__} takes none")
    return {"guidance_scale": guidance}


def prepare(pipe, generator=None, **changes):
    """prepare_latents as the pipeline has called it last, but for these arguments. It moves no global generator."""
    method, (args, kwargs) = type(pipe).prepare_latents, pipe.flow.prepare
    bound = inspect.signature(method).bind(pipe, *args, **kwargs)
    changes["generator"] = generator or torch.Generator(bound.arguments.get("device") or "cpu")
    bound.arguments.update({name: value for name, value in changes.items() if name in bound.signature.parameters})
    return method(*bound.args, **bound.kwargs)


def timestep(pipe, level: float) -> float:
    """The scheduler's timestep at a noise level: of one of its schedules, or between two of theirs."""
    known = pipe.flow.timesteps
    return known[level] if level in known else float(np.interp(level, *zip(*sorted(known.items()))))


def replace_scheduler(pipe, model: str) -> dict | None:
    """Any scheduler of a flow but plain Euler makes place for that, with its shift; returns its config, if so."""
    config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
    if not ("FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
        raise InputError(f"--model {model}: is a {type(pipe).__name__} with {name}; it takes a flow-matching pipeline")
    if type(pipe.scheduler) is EULER and not config.stochastic_sampling:
        return None
    shift = config.get("shift", config.get("flow_shift", 1.0))
    pipe.scheduler = EULER.from_config(config, shift=shift, stochastic_sampling=False)
    return {name: pipe.scheduler.config[name] for name in inspect.signature(EULER).parameters}


# ---------------------------------------------------------------- what the transformer is told

@contextmanager
def transformer_inputs_hook(pipe, listen):
    """While this lasts, listen(given) sees, and may change, what the transformer is given: {place or name: value}."""
    def hook(module, args, kwargs):
        """diffusers' transformers take their inputs by place or by name."""
        given = {**dict(enumerate(args)), **kwargs}
        listen(given)
        return tuple(given[i] for i in range(len(args))), {name: given[name] for name in kwargs}
    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def latents_of(given: dict):
    """The latents among a transformer's inputs: a tensor or a list of tensors, one a sample."""
    return given.get("hidden_states", next(iter(given.values())))


def timestep_inputs(pipe, level: float) -> dict:
    """What the transformer is given for one sample at a noise level; once pipe.flow.clock is known, only that, and
    remembered."""
    def see(given):
        raise Captured(given)
    seam = pipe.flow
    if level not in seam.timestep_inputs:
        with transformer_inputs_hook(pipe, see):
            # latents of our own, in fp32 as in a rollout: the pipeline's would round the time to the base's bf16
            x = torch.zeros(1, *seam.latents, device=seam.device)
            given = capture(lambda: call(pipe, [""], x, torch.tensor([level, 0.0])))
        if seam.clock is None:
            return given
        seam.timestep_inputs[level] = {name: given[name].reshape(1, *given[name].shape[1:]) for name in seam.clock}
    return seam.timestep_inputs[level]


@contextmanager
def with_timesteps(pipe, levels: list[float]):
    """While this lasts, the transformer is told a noise level of each sample's own."""
    if len(set(levels)) == 1:  # the pipeline tells it
        yield
        return
    each = {name: torch.cat([timestep_inputs(pipe, level)[name] for level in levels]) for name in pipe.flow.clock}

    def tell(given):
        """Twice, where there are as many samples again for guidance."""
        for name, value in each.items():
            given[name] = value.repeat(len(latents_of(given)) // len(levels), *[1] * (value.ndim - 1))
    with transformer_inputs_hook(pipe, tell):
        yield
