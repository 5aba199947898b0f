"""Other ways to hold a policy: the guards that claim 9 compares with NormGuard's own, and its rivals of claim 10.

A guard takes the place of a training script's `norm_hinge`, and so has the weight --lam: guard(v, v_ref, margin) ->
(b,). One that must know more than two velocities is made for its training: make(training) -> guard, where `training`
follows the script (`instead_of_hinge`).
"""
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flow.lora import swapped
from flow.rewards import load_reward
from normguard import norm_ratio, velocity_norm

LAM = 0.05  # the default that is put to the test


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


# ---------------------------------------------------------------- claim 10: its rivals

def two_sided(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """|ratio - 1|: also against a norm below the reference's."""
    return (norm_ratio(v, v_ref) - 1).abs()


def squared_error(v: Tensor, v_anchor: Tensor) -> Tensor:
    """The velocity KL of the training scripts, (b, ...) -> (b,)."""
    return (v - v_anchor).square().flatten(1).mean(1)


def ema_kl(training, decay: float = 0.9) -> Callable:
    """Velocity KL to an average of the policy over its steps, as AWM's official script has beside its KL to the base
    (there the decay is a thousandth of the step, so that the average all but is the policy; here it is a tenth's)."""
    average, state = [], {"step": -1}

    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """The average takes up the policy before each step."""
        if not average:
            average.extend(p.detach().clone() for p in training.run.params)
        if training.run.step > state["step"]:
            for mean, p in zip(average, training.run.params):
                mean.lerp_(p.detach(), 1 - decay)
            state["step"] = training.run.step
        return squared_error(v, training.velocity_with(average))
    return guard


def gardo(training, share: float = 0.1, most: float = 0.1, epochs: int = 15) -> Callable:
    """The gated and adaptive KL of GARDO (arXiv 2512.24138, github.com/tinnerhrhe/GARDO): only for the share of
    pictures whose rank by the reward lies furthest above their rank by another reward; to a reference that becomes the
    policy once that KL exceeded `most` in an epoch, or after so many. Not as there: the released code's ranks say the
    opposite (it gates where the reward ranks a picture lower than the others do); share and threshold do not adapt; no
    bonus for diversity; a batch without a gated row has no KL."""
    other = load_reward("tiny/hps" if "pickscore" in training.args.reward else "tiny/pickscore", torch.device("cpu"))
    anchor, state = [], {"epoch": -1, "since": 0, "kls": []}

    def begin_epoch(epoch: int):
        """Which pictures are gated, and whether the reference becomes the policy."""
        too_far = sum(state["kls"]) > most * len(state["kls"])
        if not anchor or too_far or epoch - state["since"] >= epochs:
            anchor[:] = [p.detach().clone() for p in training.run.params]
            state["since"] = epoch
        rank_gap = training.reward.argsort().argsort() - training.score_with(other).argsort().argsort()
        state.update(epoch=epoch, kls=[], gate=rank_gap >= rank_gap.float().quantile(1 - share))

    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """The mean over the gated rows is that of the KL."""
        if training.run.epoch > state["epoch"]:
            begin_epoch(training.run.epoch)
        gate = state["gate"][training.rows].float().to(v.device)
        if not gate.any():
            return torch.zeros_like(gate)
        kl = gate / gate.mean() * squared_error(v, training.velocity_with(anchor))
        state["kls"].append(kl.mean().item())
        return kl
    return guard


def crd(training, least: float = 0.1) -> Callable:
    """The KL of CRD (arXiv 2603.14128), the stronger the higher a picture's reward r: times m + r (1 - m), r clamped to
    [0, 1] as its rewards are. Not here: its loss, and its reference with guidance."""
    def guard(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
        """The KL to the base, weighted by the rows' rewards."""
        r = training.reward.clamp(0, 1)[training.rows].to(v.device)
        return (least + r * (1 - least)) * squared_error(v, v_ref)
    return guard


# ---------------------------------------------------------------- in a training script

class Other(NamedTuple):
    """How a training differs from the unguarded one."""
    flags: str  # {s} is the strength, {lr} the script's learning rate times that
    guard: Callable | None = None  # or NormGuard's own hinge
    made: bool = False  # is `guard` what makes the guard?


@contextmanager
def instead_of_hinge(script: ModuleType, other: Other):
    """While this lasts, another guard takes the place of a training script's norm_hinge. One that is made for its
    training is given `training`, which follows the script: its args; its run; the reward (n,) of its last rollout's
    pictures; which of them the rows at hand are, rows (b,); and two functions, velocity_with and score_with."""
    own = {name: getattr(script, name) for name in ("start_run", "score", "add_noise", "velocity", "norm_hinge")}
    training, made = SimpleNamespace(), []

    def start_run(method, args):
        """The script's, remembered: the training begins."""
        training.args, training.run = args, own["start_run"](method, args)
        return training.run

    def score(run, x0, prompts):
        """The script's, remembered: a rollout has ended."""
        training.x0, training.prompts, training.reward = x0, prompts, own["score"](run, x0, prompts)
        return training.reward

    def add_noise(x0, noise, t):
        """The script's, remembered: a batch begins."""
        same = (x0.flatten(1)[:, None].cpu() == training.x0.flatten(1)).all(2)  # (rows, pictures)
        assert same.any(1).all()
        training.rows = same.float().argmax(1)
        return own["add_noise"](x0, noise, t)

    def velocity(pipe, *inputs):
        """The script's, remembered."""
        training.inputs = inputs
        return own["velocity"](pipe, *inputs)

    def velocity_with(params: list[Tensor]) -> Tensor:
        """The policy's velocity of the rows at hand, with other values of its LoRA."""
        with torch.no_grad(), swapped(training.run.params, params):
            return own["velocity"](training.run.pipe, *training.inputs)

    def score_with(reward) -> Tensor:
        """Another reward of the last rollout's pictures, (n,)."""
        training.run.reward, reward_of_run = reward, training.run.reward
        try:
            return own["score"](training.run, training.x0, training.prompts)
        finally:
            training.run.reward = reward_of_run

    def norm_hinge(*velocities) -> Tensor:
        """The guard, made when it is first called: before that there is no run."""
        if not made:
            made.append(other.guard(training))
        return made[0](*velocities)

    training.velocity_with, training.score_with = velocity_with, score_with
    following = (start_run, score, add_noise, velocity, norm_hinge)
    instead = {function.__name__: function for function in following if other.made}
    for name, function in (instead or {"norm_hinge": other.guard or own["norm_hinge"]}).items():
        setattr(script, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(script, name, function)


# A squared hinge's slope is the linear one's at an excess of 5 % if lam is ten times larger; ||v_ref|| is about 30 to
# 40 here, hence the lam of the absolute one.
GUARDS = {
    "lam 0.005": Other("--lam 0.005"),
    "lam 0.5": Other("--lam 0.5"),
    "squared, lam 0.5": Other("--lam 0.5", squared),
    "absolute, lam 0.0015": Other("--lam 0.0015", absolute),
    "per token": Other(f"--lam {LAM}", per_token),
    "margin 0.02": Other(f"--lam {LAM} --margin 0.02"),
    "auto": Other("--lam auto"),
}


class Rival(NamedTuple):
    """A way to hold the policy, at several strengths, from weak to strong."""
    strengths: tuple[float, ...]  # one: it is taken as it is, its reward matched to nothing
    training: Other | None = None  # or the unguarded model
    sampling: str = ""  # flags of sample.py
    none: float = 0.0  # the strength that is the unguarded model
    dpo: tuple[float, ...] = ()  # DPO's strengths, where they are others: its gradient is about 3 times larger

    def of(self, method: str) -> tuple[float, ...]:
        """A method's strengths."""
        return self.dpo if self.dpo and method == "dpo" else self.strengths


RIVALS = {
    "velocity KL": Rival((0.03, 0.055, 0.1), Other("--lam 0 --kl {s}"), dpo=(0.05, 0.1, 0.3)),
    "two-sided": Rival((0.05, 0.2), Other("--lam {s}", two_sided), dpo=(0.2, 0.8)),
    "EMA-KL": Rival((0.1, 0.17, 0.3), Other("--lam {s}", ema_kl, made=True), dpo=(0.1, 0.3, 1)),
    "lower lr": Rival((0.8, 0.5), Other("--lam 0 --lr {lr}"), none=1),
    "clipping": Rival((0.001,), Other("--lam 0 --max-grad-norm {s}")),
    "GARDO": Rival((0.1, 0.3), Other("--lam {s}", gardo, made=True)),
    "CRD": Rival((0.05, 0.15), Other("--lam {s}", crd, made=True), dpo=(0.15, 0.5)),
    "LoRA scaled": Rival((0.9, 0.8, 0.65), sampling="--lora-scale {s}", none=1),
    "projected": Rival((1,), sampling="--renorm project"),
}
