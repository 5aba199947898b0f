"""Other ways to hold a policy: the guards that claim 9 compares with NormGuard's own, and its rivals of claim 10.

A guard takes the place of a training script's `norm_hinge`, and so has the weight --lam: guard(v, v_ref, margin) ->
(b,). One that must know more than two velocities is made for its training: make(at) -> guard, where `at` follows the
script (`instead_of_hinge`).
"""
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flow.draws import rng
from flow.lora import swapped
from flow.rewards import load_reward
from normguard import norm_hinge, norm_ratio, velocity_norm

LAM = 0.05  # the default that is put to the test
ROWS = 9  # what a generator is for, beside those of flow/draws.py


# ---------------------------------------------------------------- claim 9: other forms of the hinge

def squared(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """relu(ratio - 1)^2: no pull at the threshold, and more the further above."""
    return torch.relu(norm_ratio(v, v_ref) - 1 - margin).square()


def absolute(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """relu(||v|| - ||v_ref||), in units of the latent."""
    return torch.relu(velocity_norm(v) - velocity_norm(v_ref.detach()) - margin)


def per_token(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """The hinge of each token's norm, averaged over the tokens: patches of 2x2 of (b, c, h, w), or (b, tokens, c)
    -> (b,)."""
    if v.ndim == 4:
        v, v_ref = (rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) for x in (v, v_ref))
    ratio = norm_ratio(v.flatten(0, 1), v_ref.flatten(0, 1))
    return torch.relu(ratio - 1 - margin).view(len(v), -1).mean(1)


def share_of_rows(share: float) -> Callable:
    """NormGuard's hinge on a random share of the rows, weighted to the same expectation."""
    def make(at):
        """Drawn anew in each batch."""
        g = rng(at.args.seed, ROWS)

        def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
            """0 on the other rows."""
            drawn = torch.rand(len(v), generator=g) < share
            return norm_hinge(v, v_ref, margin) * drawn.to(v.device) / share
        return guard
    return make


# ---------------------------------------------------------------- claim 10: its rivals

def two_sided(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """|ratio - 1|: also against a norm below the reference's."""
    return (norm_ratio(v, v_ref) - 1).abs()


def squared_error(v: Tensor, v_anchor: Tensor) -> Tensor:
    """The velocity KL of the training scripts, (b, ...) -> (b,)."""
    return (v - v_anchor).square().flatten(1).mean(1)


def ema_kl(at, decay: float = 0.9) -> Callable:
    """Velocity KL to an average of the policy over its steps, as in AWM's official script."""
    anchor, step = [], -1

    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """The average takes up the policy before each step."""
        nonlocal step
        if not anchor:
            anchor.extend(p.detach().clone() for p in at.run.params)
        if at.run.step > step:
            for mean, p in zip(anchor, at.run.params):
                mean.lerp_(p.detach(), 1 - decay)
            step = at.run.step
        return squared_error(v, at.velocity_with(anchor))
    return guard


def gardo(at, share: float = 0.1, most: float = 0.1, epochs: int = 15) -> Callable:
    """The gated and adaptive KL of GARDO (arXiv 2512.24138): only for the share of pictures that the reward ranks
    furthest above where another reward ranks them; to a reference that becomes the policy once that KL exceeds `most`,
    or after so many epochs. Not here: its bonus for diversity, and how it adapts the share."""
    other = load_reward("tiny/hps" if "pickscore" in at.args.reward else "tiny/pickscore", torch.device("cpu"))
    anchor, state = [], {"since": 0, "kl": 0.0, "scored": -1}

    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """0 for the pictures on which the two rewards agree."""
        epoch = at.run.epoch
        if not anchor or state["kl"] > most or epoch - state["since"] >= epochs:
            anchor[:] = [p.detach().clone() for p in at.run.params]
            state.update(since=epoch, kl=0.0)
        if epoch > state["scored"]:
            above = at.reward.argsort().argsort() - at.score_with(other).argsort().argsort()
            state.update(scored=epoch, gate=above >= above.float().quantile(1 - share))
        gate = state["gate"][at.rows].float()
        kl = gate * squared_error(v, at.velocity_with(anchor))
        if gate.any():
            state["kl"] = (kl.detach().sum() / gate.sum()).item()
        return kl / share
    return guard


def crd(at, least: float = 0.1) -> Callable:
    """The KL of CRD (arXiv 2603.14128), the stronger the higher a picture's reward r in [0, 1]: times m + r (1 - m).
    Not here: its loss, and its reference with guidance."""
    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """To the base."""
        r = at.reward.clamp(0, 1)[at.rows]
        return (least + r * (1 - least)) * squared_error(v, v_ref)
    return guard


# ---------------------------------------------------------------- in a training script

@contextmanager
def instead_of_hinge(script: ModuleType, guard: Callable | None, made: bool = False):
    """While this lasts, another guard takes the place of a training script's norm_hinge. One that is made for its
    training is given `at`, which follows the script: at.args; at.run; at.reward, its last rollout's (n,); at.rows,
    which of its pictures the rows at hand are (b,); and two functions."""
    own = {name: getattr(script, name) for name in ("start_run", "score", "add_noise", "velocity", "norm_hinge")}
    at, guards = SimpleNamespace(), []

    def start_run(method, args):
        """Which begins a training."""
        at.args, at.run = args, own["start_run"](method, args)
        return at.run

    def score(run, x0, prompts):
        """Which ends a rollout."""
        at.x0, at.prompts, at.reward = x0, prompts, own["score"](run, x0, prompts)
        return at.reward

    def add_noise(x0, noise, t):
        """Which begins a batch."""
        at.rows = (x0.flatten(1)[:, None].cpu() == at.x0.flatten(1)).all(2).float().argmax(1)
        return own["add_noise"](x0, noise, t)

    def velocity(pipe, *inputs):
        """Of the rows at hand."""
        at.inputs = inputs
        return own["velocity"](pipe, *inputs)

    def velocity_with(params: list[Tensor]) -> Tensor:
        """The policy's velocity of the rows at hand, with other values of its LoRA."""
        with torch.no_grad(), swapped(at.run.params, params):
            return own["velocity"](at.run.pipe, *at.inputs)

    def score_with(reward) -> Tensor:
        """Another reward of the last rollout's pictures, (n,)."""
        at.run.reward, reward_of_run = reward, at.run.reward
        try:
            return own["score"](at.run, at.x0, at.prompts)
        finally:
            at.run.reward = reward_of_run

    def hinge(*given) -> Tensor:
        """Made when it is first called: before that there is no run."""
        if not guards:
            guards.append(guard(at))
        return guards[0](*given)

    at.velocity_with, at.score_with = velocity_with, score_with
    follow = {"start_run": start_run, "score": score, "add_noise": add_noise, "velocity": velocity, "norm_hinge": hinge}
    for name, function in (follow if made else {"norm_hinge": guard or own["norm_hinge"]}).items():
        setattr(script, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(script, name, function)


class Other(NamedTuple):
    """How a training differs from the unguarded one."""
    flags: str  # {s} is the strength, {lr} the script's learning rate times that
    guard: Callable | None = None  # or NormGuard's own hinge
    made: bool = False  # does `guard` make the guard?


# A squared hinge's slope is the linear one's at an excess of 5 % if lam is ten times larger; ||v_ref|| is about 30 to
# 40 here, hence the lam of the absolute one.
GUARDS = {
    "lam 0.0005": Other("--lam 0.0005"),
    "lam 0.005": Other("--lam 0.005"),
    "lam 0.5": Other("--lam 0.5"),
    "lam 5": Other("--lam 5"),
    "squared, lam 0.05": Other("--lam 0.05", squared),
    "squared, lam 0.5": Other("--lam 0.5", squared),
    "squared, lam 5": Other("--lam 5", squared),
    "absolute, lam 0.0015": Other("--lam 0.0015", absolute),
    "per token": Other(f"--lam {LAM}", per_token),
    "margin 0.02": Other(f"--lam {LAM} --margin 0.02"),
    "auto": Other("--lam auto"),
    "half the rows": Other(f"--lam {LAM}", share_of_rows(0.5), made=True),
    "a quarter of the rows": Other(f"--lam {LAM}", share_of_rows(0.25), made=True),
}


class Rival(NamedTuple):
    """A way to hold the policy, at several strengths."""
    strengths: tuple[float, ...]
    training: Other | None = None  # or the unguarded model
    sampling: str = ""  # flags of sample.py


RIVALS = {
    "velocity KL": Rival((0.03, 0.1, 0.3), Other("--lam 0 --kl {s}")),
    "two-sided": Rival((0.05, 0.2), Other("--lam {s}", two_sided)),
    "EMA-KL": Rival((0.1, 0.3, 1), Other("--lam {s}", ema_kl, made=True)),
    "lower lr": Rival((0.5, 0.25), Other("--lam 0 --lr {lr}")),
    "clipping": Rival((0.03, 0.01), Other("--lam 0 --max-grad-norm {s}")),
    "GARDO": Rival((0.1, 0.3), Other("--lam {s}", gardo, made=True)),
    "CRD": Rival((0.1, 0.3), Other("--lam {s}", crd, made=True)),
    "LoRA scaled": Rival((0.9, 0.8, 0.65, 0.5), sampling="--lora-scale {s}"),
    "projected": Rival((1,), sampling="--renorm project"),
}
