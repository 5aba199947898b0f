"""What NormGuard's hinge is compared with: other forms of it (claim 9) and rival methods (claim 10).

Most of them are a function that a training script calls instead of `norm_hinge`, and whose result (b,) it weights with
--lam: rival(v, v_ref, pipe, batch), given to `script.main(args, rival)`. The functions here have one more argument,
`state`: a dict, empty at the start of a training, in which they keep what they need from step to step.

v and v_ref: velocities (b, ...) of the policy and of the base. `batch` is a dict: x0, noise, xt (b, ...); t (b,);
prompts, a list of b; picture (b,), the place of each row's picture among the epoch's n pictures; scores (rewards, n) of
these pictures; step and epoch, both counted from 0.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flow.lora import swapped
from flow.pipeline import velocity
from normguard import norm_ratio, velocity_norm

LAM = 0.05  # the scripts' default, which is compared with the others

# ---------------------------------------------------------------- claim 9: other forms of the hinge

def squared(v: Tensor, v_ref: Tensor, *_) -> Tensor:
    """relu(ratio - 1)^2: its gradient is 0 at the threshold and grows with the excess."""
    return torch.relu(norm_ratio(v, v_ref) - 1).square()


def absolute(v: Tensor, v_ref: Tensor, *_) -> Tensor:
    """relu(||v|| - ||v_ref||), in units of the latents."""
    return torch.relu(velocity_norm(v) - velocity_norm(v_ref.detach()))


def per_token(v: Tensor, v_ref: Tensor, *_) -> Tensor:
    """The mean over tokens of the hinge of each token's norm. A token is a 2x2 patch of (b, c, h, w), or a row of
    (b, tokens, c)."""
    if v.ndim == 4:
        v, v_ref = (rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) for x in (v, v_ref))
    ratio = norm_ratio(v.flatten(0, 1), v_ref.flatten(0, 1))  # (b tokens,)
    return torch.relu(ratio - 1).view(len(v), -1).mean(1)


# ---------------------------------------------------------------- claim 10: rival penalties

def two_sided(v: Tensor, v_ref: Tensor, *_) -> Tensor:
    """|ratio - 1|: also penalizes a norm below the reference's."""
    return (norm_ratio(v, v_ref) - 1).abs()


def ema_kl(v: Tensor, v_ref: Tensor, pipe, batch: dict, state: dict, decay: float = 0.9) -> Tensor:
    """Velocity KL to an exponential moving average of the policy, which AWM's official script has beside its KL to the
    base. There the decay is 0.001 times the step, so that the average is nearly the policy itself; here it is 0.9."""
    params = trained_parameters(pipe)
    if "average" not in state:
        state["average"] = [p.detach().clone() for p in params]
        state["step"] = -1
    if batch["step"] > state["step"]:
        for average, p in zip(state["average"], params):
            average.lerp_(p.detach(), 1 - decay)
        state["step"] = batch["step"]
    return squared_error(v, velocity_with(state["average"], pipe, batch))


def gardo(v: Tensor, v_ref: Tensor, pipe, batch: dict, state: dict, fraction: float = 0.1, max_kl: float = 0.1,
          max_epochs: int = 15) -> Tensor:
    """The gated and adaptive KL of GARDO (arXiv 2512.24138, github.com/tinnerhrhe/GARDO). It needs two rewards.

    The KL acts on the `fraction` of pictures whose rank by the first reward lies furthest above their rank by the
    second one. Its reference becomes the policy where the KL's mean exceeded `max_kl` in the last epoch, and after
    `max_epochs`. The official code differs: it gates pictures that the reward ranks lower than the other rewards do,
    adapts fraction and threshold, and has a bonus for diversity."""
    if batch["epoch"] > state.get("epoch", -1):  # choose the epoch's gated pictures, and perhaps a new reference
        kls = state.get("kls", [])
        too_far = sum(kls) > max_kl * len(kls)
        if "reference" not in state or too_far or batch["epoch"] - state["reference epoch"] >= max_epochs:
            state["reference"] = [p.detach().clone() for p in trained_parameters(pipe)]
            state["reference epoch"] = batch["epoch"]
        rank, other_rank = (scores.argsort().argsort() for scores in batch["scores"][:2])
        rank_gap = (rank - other_rank).float()
        state["gate"] = rank_gap >= rank_gap.quantile(1 - fraction)  # (n,)
        state["epoch"], state["kls"] = batch["epoch"], []
    gate = of_rows(state["gate"], batch, v).float()
    if not gate.any():
        return torch.zeros_like(gate)
    # scaled, so that its mean over all rows is the KL's over the gated ones
    kl = gate / gate.mean() * squared_error(v, velocity_with(state["reference"], pipe, batch))
    state["kls"].append(kl.mean().item())
    return kl


def crd(v: Tensor, v_ref: Tensor, pipe, batch: dict, state: dict, least: float = 0.1) -> Tensor:
    """The KL of CRD (arXiv 2603.14128): to the base, weighted with m + r (1 - m), where m is `least` and r the
    picture's reward, clamped to [0, 1]. CRD's loss and its guided reference are left out."""
    r = of_rows(batch["scores"][0], batch, v).clamp(0, 1)
    return (least + r * (1 - least)) * squared_error(v, v_ref)


def of_rows(values: Tensor, batch: dict, v: Tensor) -> Tensor:
    """Values (n,) of the epoch's pictures -> those of the batch's rows (b,), on v's device."""
    return values.to(v.device)[batch["picture"].to(v.device)]


def squared_error(v: Tensor, v_anchor: Tensor) -> Tensor:
    """The training scripts' velocity KL: (b, ...) -> (b,)."""
    return (v - v_anchor).square().flatten(1).mean(1)


def trained_parameters(pipe) -> list[torch.nn.Parameter]:
    """The LoRA's parameters."""
    return [p for p in pipe.transformer.parameters() if p.requires_grad]


def velocity_with(values: list[Tensor], pipe, batch: dict) -> Tensor:
    """The batch's velocities (b, ...) under other values of the trained parameters, without gradient."""
    with torch.no_grad(), swapped(trained_parameters(pipe), values):
        return velocity(pipe, batch["xt"], batch["t"], batch["prompts"])


# ---------------------------------------------------------------- how each is trained

class Variant(NamedTuple):
    """How a training differs from the unguarded one."""
    flags: str  # {s}: the strength; {lr}: the script's learning rate times that; {reward}, {other}: both rewards
    rival: Callable | None = None  # instead of NormGuard's hinge


# At an excess of 5 %, the squared hinge with lam 0.5 has the gradient of the linear one with lam 0.05. The absolute
# hinge's lam is that of the relative one over ||v_ref||, which is 30 to 40 here.
GUARDS = {
    "lam 0.005": Variant("--lam 0.005"),
    "lam 0.5": Variant("--lam 0.5"),
    "squared, lam 0.5": Variant("--lam 0.5", squared),
    "absolute, lam 0.0015": Variant("--lam 0.0015", absolute),
    "per token": Variant(f"--lam {LAM}", per_token),
    "margin 0.02": Variant(f"--lam {LAM} --margin 0.02"),
    "auto": Variant("--lam auto"),
}


class Rival(NamedTuple):
    """A rival method at several strengths, from weak to strong."""
    strengths: tuple[float, ...]  # with one strength, it is not compared at equal reward
    training: Variant | None = None  # None: it samples from the unguarded model
    sampling: str = ""  # flags of sample.py
    none: float = 0.0  # the strength that is the unguarded model
    dpo: tuple[float, ...] = ()  # strengths with DPO, whose gradient is about 3 times larger, if they are others

    def strengths_of(self, method: str) -> tuple[float, ...]:
        """The strengths that are measured with a method."""
        return self.dpo if self.dpo and method == "dpo" else self.strengths


RIVALS = {
    "velocity KL": Rival((0.03, 0.055, 0.1), Variant("--lam 0 --kl {s}"), dpo=(0.05, 0.1, 0.3)),
    "two-sided": Rival((0.05, 0.2), Variant("--lam {s}", two_sided), dpo=(0.2, 0.8)),
    "EMA-KL": Rival((0.1, 0.17, 0.3), Variant("--lam {s}", ema_kl), dpo=(0.1, 0.3, 1)),
    "lower lr": Rival((0.8, 0.5), Variant("--lam 0 --lr {lr}"), none=1),
    "clipping": Rival((0.001,), Variant("--lam 0 --max-grad-norm {s}")),
    "GARDO": Rival((0.1, 0.3), Variant("--lam {s} --reward tiny/{reward}:1,tiny/{other}:0", gardo)),
    "CRD": Rival((0.05, 0.15), Variant("--lam {s}", crd), dpo=(0.15, 0.5)),
    "LoRA scaled": Rival((0.9, 0.8, 0.65), sampling="--lora-scale {s}", none=1),
    "projected": Rival((1,), sampling="--renorm project"),
}
