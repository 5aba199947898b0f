"""What NormGuard's hinge is compared with: other velocities and weights of it (claim 9) and rival methods (claim 10).

Some of them are a function that a training script calls instead of `norm_hinge`, and whose result (b,) it weights with
--lam: rival(v, v_ref, pipe, batch), given to `script.main(args, rival)`. The functions here have one more argument,
`state`: a dict, empty at the start of a training, in which they keep what they need from step to step.

v and v_ref: velocities (b, ...) of the policy and of the base, guided ones with --guard-guidance. `batch` is a dict:
x0, noise, xt (b, ...); t (b,); prompts, a list of b; picture (b,), the place of each row's picture among the epoch's n
pictures; scores (rewards, n) of these pictures; step and epoch, both counted from 0.
"""
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import sample
from flow import intercept
from flow.lora import swapped
from flow.pipeline import velocity
from normguard import norm_hinge, norm_ratio, reference

LAM = 0.05  # the scripts' default, which is compared with the others
GUIDANCE = 3  # the guidance scale of "with guidance", and of the guided velocity that is guarded
BOTH = "none", str(GUIDANCE)  # the scales at which norms are measured and claims are tested

# ---------------------------------------------------------------- guided velocities

@contextmanager
def true_guidance():
    """Inside, a guidance scale given for tiny/flux is that of classifier-free guidance, as FluxPipeline calls it
    `true_cfg_scale`. Outside, it is what the guidance embedding is told; no flag of the scripts sets the other."""
    original = intercept.guided

    def guided(pipe, guidance: float | None, n: int = 1) -> dict:
        if guidance is None or not pipe.transformer.config.get("guidance_embeds"):
            return original(pipe, guidance, n)
        return {"guidance_scale": 3.5, "true_cfg_scale": guidance, "negative_prompt": [""] * n}
    with mock.patch.object(intercept, "guided", guided), mock.patch.object(sample, "guided", guided):
        yield


def velocities(pipe, batch: dict, guidance: float | None) -> tuple[Tensor, Tensor]:
    """The batch's velocities of the policy and of the base, (b, ...) each, with this guidance scale (None: without)."""
    pipe.flow.one_by_one.setdefault(guidance, pipe.flow.one_by_one[None])
    given = pipe, batch["xt"], batch["t"], batch["prompts"], guidance
    with reference(pipe.transformer):
        v_ref = velocity(*given)
    return velocity(*given), v_ref


# ---------------------------------------------------------------- claim 9: which velocity is guarded

def guided_hinge(v: Tensor, v_ref: Tensor, pipe, batch: dict, state: dict) -> Tensor:
    """What --guard-guidance gives the hinge, for a model with a guidance embedding, which the flag refuses."""
    return norm_hinge(*velocities(pipe, batch, GUIDANCE))


def both(v: Tensor, v_ref: Tensor, pipe, batch: dict, state: dict, weight: float) -> Tensor:
    """The hinge of the conditional velocity, plus `weight` times that of the guided one, which it is given."""
    return norm_hinge(*velocities(pipe, batch, None)) + weight * norm_hinge(v, v_ref)


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
    return squared_error(v, velocity_with(state["average"], pipe, batch, state.get("guidance")))


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
    v_anchor = velocity_with(state["reference"], pipe, batch, state.get("guidance"))
    kl = gate / gate.mean() * squared_error(v, v_anchor)
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


def squared_error(v: Tensor, v_anchor: Tensor, *_) -> Tensor:
    """The training scripts' velocity KL: (b, ...) -> (b,)."""
    return (v - v_anchor).square().flatten(1).mean(1)


def trained_parameters(pipe) -> list[torch.nn.Parameter]:
    """The LoRA's parameters."""
    return [p for p in pipe.transformer.parameters() if p.requires_grad]


def velocity_with(values: list[Tensor], pipe, batch: dict, guidance: float | None = None) -> Tensor:
    """The batch's velocities (b, ...) under other values of the trained parameters, without gradient."""
    with torch.no_grad(), swapped(trained_parameters(pipe), values):
        return velocity(pipe, batch["xt"], batch["t"], batch["prompts"], guidance)


# ---------------------------------------------------------------- how each is trained

class Variant(NamedTuple):
    """How a training differs from the unguarded one."""
    flags: str  # {s}: the strength; {reward}, {other}: both rewards
    rival: Callable | None = None  # instead of NormGuard's hinge


OF_GUIDED = f" --guard-guidance {GUIDANCE}"
GUIDED = {  # the guard of the guided velocity, by base
    "sd3": Variant(f"--lam {LAM}" + OF_GUIDED),
    "flux": Variant(f"--lam {LAM}", guided_hinge),
}
GUARDS = {f"plain, lam {lam}": Variant(f"--lam {lam}") for lam in (0.2, 0.5)}
GUARDS |= {f"guided, lam {lam}": Variant(f"--lam {lam}" + OF_GUIDED) for lam in (0.0125, 0.025, 0.1, 0.2)}
GUARDS |= {f"guided {scale}": Variant(f"--lam {LAM} --guard-guidance {scale}") for scale in (2, 4.5)}
GUARDS |= {f"both, guided times {weight}": Variant(f"--lam {LAM}" + OF_GUIDED, partial(both, weight=weight))
           for weight in (0.25, 1)}
GUARDS |= {f"KL {kl}": Variant(f"--lam 0 --kl {kl}") for kl in (0.1, 0.2)}  # what a guard must be better than
GUARDS |= {f"KL 0.1 and {kind}": Variant(f"--lam {LAM} --kl 0.1{more}")
           for kind, more in (("plain", ""), ("guided", OF_GUIDED))}
GUARDS |= {"guided, margin 0.1": Variant(f"--lam {LAM} --margin 0.1" + OF_GUIDED)}
AUTO = Variant("--lam auto")


class Rival(NamedTuple):
    """A rival method at several strengths, from weak to strong."""
    strengths: tuple[float, ...]  # with one strength, it is not compared at equal reward
    training: Variant | None = None  # None: it samples from the unguarded model
    sampling: str = ""  # flags of sample.py
    none: float = 0.0  # the strength that is the unguarded model
    dpo: tuple[float, ...] = ()  # DPO's strengths, if they differ: its gradient is about 3 times larger
    corners: tuple[str, ...] = ("sd3, pickscore", "flux, hps")  # where it is measured

    def strengths_of(self, method: str) -> tuple[float, ...]:
        """The strengths that are measured with a method."""
        return self.dpo if self.dpo and method == "dpo" else self.strengths


# "guided" rivals act on the guided velocity. Its squared error is about 6 times larger, so strengths are smaller
TWO_REWARDS = " --reward tiny/{reward}:1,tiny/{other}:0"
SD3 = ("sd3, pickscore",)
RIVALS = {
    "velocity KL": Rival((0.03, 0.055, 0.1, 0.2, 0.4), Variant("--lam 0 --kl {s}"), dpo=(0.05, 0.1, 0.3)),
    "guided velocity KL": Rival((0.005, 0.015, 0.05), Variant("--lam {s}" + OF_GUIDED, squared_error),
                                dpo=(0.008, 0.02, 0.05), corners=SD3),
    "EMA-KL": Rival((0.1, 0.3), Variant("--lam {s}", ema_kl), dpo=(0.1, 1)),
    "guided EMA-KL": Rival((0.015, 0.05), Variant("--lam {s}" + OF_GUIDED, ema_kl), dpo=(0.015, 0.15), corners=SD3),
    "KL and guard": Rival((0.1,), Variant(f"--lam {LAM} --kl {{s}}")),
    "KL and guided guard": Rival((0.1,), Variant(f"--lam {LAM} --kl {{s}}" + OF_GUIDED), corners=SD3),
    "two-sided": Rival((0.05, 0.2), Variant("--lam {s}", two_sided), dpo=(0.2, 0.8)),
    "guided two-sided": Rival((0.025, 0.05), Variant("--lam {s}" + OF_GUIDED, two_sided), dpo=(0.05, 0.2), corners=SD3),
    "CRD": Rival((0.05, 0.15), Variant("--lam {s}", crd), dpo=(0.15, 0.5)),
    "guided CRD": Rival((0.01, 0.03), Variant("--lam {s}" + OF_GUIDED, crd), dpo=(0.02, 0.05), corners=SD3),
    "GARDO": Rival((0.1, 0.3), Variant("--lam {s}" + TWO_REWARDS, gardo)),
    "guided GARDO": Rival((0.015, 0.05), Variant("--lam {s}" + OF_GUIDED + TWO_REWARDS, partial(gardo, max_kl=0.6)),
                          corners=SD3),
    "LoRA scaled": Rival((0.8, 0.65), sampling="--lora-scale {s}", none=1),
}
