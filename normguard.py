"""NormGuard: hold the velocity norm of a flow model during RL post-training. One file, torch only: copy it anywhere.

RL fine-tuning (NFT, AWM, DPO) inflates the norm of the velocity v_theta over that of the reference v_ref, and pictures
degrade (over-sharp, oversaturated, unnaturally lit) where the reward does not see it. NormGuard adds a hinge that acts
only on samples whose norm exceeds the reference's and leaves every other sample's gradient untouched:

    guard = relu(||v_theta|| / ||v_ref|| - 1 - margin)          loss = base_loss + lam * mean(guard)

In a foreign training loop, with any velocity-local base loss:

    from normguard import norm_hinge, reference
    v = model(x_t, t, cond)                                     # the forward you already have
    with reference(model):                                      # LoRA off, eval mode, no gradient
        v_ref = model(x_t, t, cond)
    loss = base_loss + 0.05 * norm_hinge(v, v_ref).mean()

or, for a loss of unknown scale, oppose(v, v_ref) before base_loss.backward(): a guard in units of the loss's own
gradient, with one number that fits any scale (guard_gradient).

The idea: "NormGuard: Reward-Preserving Norm Constraints in Flow-Matching Reinforcement Learning" (arXiv 2606.27771).
Only its abstract was at hand. The hinge's form here (linear, relative, one norm per sample) is our choice: relative to
||v_ref||, so that lam means the same at any resolution and latent scale.
"""
import warnings
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor

EPS = 1e-6  # floor of a norm that divides; a latent of unit variance has a norm of tens to hundreds


def velocity_norm(v: Tensor) -> Tensor:
    """L2 norm of each sample over all its non-batch dims, in fp32. v (b, ...) of any float dtype -> (b,) fp32."""
    return torch.linalg.vector_norm(v.float().flatten(1), dim=1)


def norm_ratio(v: Tensor, v_ref: Tensor) -> Tensor:
    """||v|| / ||v_ref|| per sample; no gradient to v_ref. v, v_ref (b, ...) of one shape -> (b,) fp32, 1 where equal.

    Raises ValueError if the shapes differ: a broadcast would compare the wrong samples.
    """
    if v.shape != v_ref.shape:
        raise ValueError(f"v {tuple(v.shape)} and v_ref {tuple(v_ref.shape)} must have the same shape")
    return velocity_norm(v) / velocity_norm(v_ref.detach()).clamp_min(EPS)


def norm_hinge(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """The guard: relu(||v|| / ||v_ref|| - 1 - margin) per sample, (b, ...) -> (b,) fp32. Gradient to v only.

    Linear, so its pull is the same for any excess; exactly 0, with exactly 0 gradient, at or under the threshold.
    margin is a relative excess: 0.02 lets the norm grow by 2 % before the guard acts.
    """
    return torch.relu(norm_ratio(v, v_ref) - (1.0 + margin))


@torch.no_grad()
def guard_gradient(g: Tensor, v: Tensor, v_ref: Tensor, margin: float = 0.0, c: float = 0.3) -> Tensor:
    """Takes a loss's gradient g = dL/dv and returns the guarded one g', of g's shape and dtype. All (b, ...) of one
    shape.

    With u = v / ||v||, where ||v|| > (1 + margin) ||v_ref||:    g' = g - min(<g, u>, 0) u + c ||g|| u
    and elsewhere g' is g, exactly. As a step goes against the gradient, the second term takes out what lengthens v, and
    the third shortens it by c of what the loss does to v in all.

    Why it is scale-free: each term is a multiple of g, so g' of k g is k g' (k > 0), and where it acts depends on norms
    alone; Adam then divides k out. A weight lam has to know how hard the loss pushes; c is a share of that. So a sample
    on which the loss does not pull at all, g = 0, gets no guard, however long its v.
    """
    longer = norm_ratio(v, v_ref) > 1.0 + margin
    flat, u = g.float().flatten(1), v.float().flatten(1) / velocity_norm(v).clamp_min(EPS)[:, None]  # (b, d)
    radial = (flat * u).sum(1)  # (b,), negative where a step lengthens v
    pull = c * velocity_norm(g) - radial.clamp_max(0)
    guarded = (flat + pull[:, None] * u).view(g.shape).to(g.dtype)
    return torch.where(longer.view(-1, *[1] * (g.ndim - 1)), guarded, g)


def oppose(v: Tensor, v_ref: Tensor, margin: float = 0.0, c: float = 0.3):
    """Registers a hook on v: in the next backward pass the gradient at v is replaced by its guard_gradient. v, v_ref
    (b, ...) of one shape, v part of a graph. Costs no forward and does not change one.

    Whatever the loss computes from this v is opposed as one, a KL to the reference too.
    """
    inner, v_ref = v.detach(), v_ref.detach()
    v.register_hook(lambda g: guard_gradient(g, inner, v_ref, margin, c))


def renormalize(v: Tensor, v_ref: Tensor, cap: bool = False) -> Tensor:
    """v rescaled to the reference's norm, per sample: v * ||v_ref|| / ||v||. Same shape and dtype as v.

    cap=True only shrinks: samples at or under the reference's norm stay as they are. This is the inference-time repair
    (compare diffusers' guidance_rescale) that the paper finds of no use against RL's inflation; here to check that.
    Raises ValueError if the shapes differ.
    """
    scale = norm_ratio(v_ref, v)
    if cap:
        scale = scale.clamp_max(1.0)
    return (v.float() * scale.view(-1, *[1] * (v.ndim - 1))).to(v.dtype)


@contextmanager
def reference(model: torch.nn.Module, keep: tuple[str, ...] = ()):
    """Inside, `model` is the frozen base it was before RL: LoRA adapters off, eval mode, no gradient recorded.

    For diffusers models with adapters and for PeftModel (LoRA and its kin). On exit, after an exception too, and when
    nested, everything is as it was: the active adapters, which parameters train, and each module's train/eval mode.
    Does the model have dropout? Then compute v in eval mode too: its noise would count as excess norm.

    keep: adapters that were there before RL, such as a frozen style LoRA. They stay on, as part of the reference.
    Warns once if trained parameters stay on, such as LoRA biases: v_ref changes with them.
    Raises ValueError if the model holds no adapter (under full fine-tuning, keep a frozen copy) or a merged one; if an
    adapter in `keep` does not exist or trains; if a frozen adapter is active beside a trained one and not in `keep`:
    list it there, or deactivate it.
    """
    modules = list(model.modules())
    # every adapter layer of peft reads this flag in its forward; disable_adapters() would also reset requires_grad
    layers = [m for m in modules if "_disable_adapters" in vars(m) or hasattr(type(m), "_disable_adapters")]
    if not layers:
        raise ValueError("reference(model) found no adapter to switch off; add a LoRA, or keep a frozen copy as the "
                         "reference")
    if any(getattr(m, "merged", False) for m in layers):
        raise ValueError("reference(model): an adapter is merged (fused) into the base weights; unmerge it first")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    before = [(m, m._disable_adapters, m._active_adapter) for m in layers]
    several = any(not disabled and not isinstance(active, str) and len(active) > 1 for _, disabled, active in before)
    if several or keep or model not in _checked:
        _check_adapters(model, layers, keep)
    training = [m for m in modules if m.training]
    try:
        for m, disabled, active in before:
            kept = [name for name in ([active] if isinstance(active, str) else active) if name in keep]
            m._disable_adapters = disabled or not kept
            if kept:
                m._active_adapter = kept
        for m in training:
            m.training = False
        with torch.no_grad():
            yield model
    finally:
        for m, disabled, active in before:
            m._disable_adapters, m._active_adapter = disabled, active
        for m in training:
            m.training = True


_checked = weakref.WeakSet()  # models that have been warned of, or need not be


def _check_adapters(model: torch.nn.Module, layers: list[torch.nn.Module], keep: tuple[str, ...]):
    """Raise ValueError, or warn, where the model without its adapters (but `keep`) is not the base before RL."""
    weights, active = {}, set()  # each adapter's parameters; the adapters that are on
    for layer in layers:
        if not layer._disable_adapters:
            active.update([layer._active_adapter] if isinstance(layer._active_adapter, str) else layer._active_adapter)
        for part in layer.children():
            if isinstance(part, (torch.nn.ModuleDict, torch.nn.ParameterDict)):  # keyed by adapter
                for name, held in part.items():
                    weights.setdefault(name, []).extend([held] if isinstance(held, Tensor) else held.parameters())
    if unknown := sorted(set(keep) - weights.keys()):
        raise ValueError(f"reference(model, keep=...): there is no adapter {', '.join(unknown)}")
    trained = {name for name, held in weights.items() if any(p.requires_grad for p in held)}
    frozen = sorted((active & weights.keys()) - trained)
    if moved := sorted(trained & set(keep)):
        raise ValueError(f"reference(model, keep=...): {', '.join(moved)} trains, so it is no part of the reference")
    if set(frozen) - set(keep) and active & trained:
        raise ValueError(f"reference(model): {', '.join(frozen)} (frozen) and {', '.join(sorted(active & trained))} "
                         f"(trained) are active together; say what belongs to the reference: keep={tuple(frozen)}")
    if model not in _checked:
        _checked.add(model)
        off = {id(p) for name, held in weights.items() if name not in keep for p in held}
        moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in off]
        if moving:
            warnings.warn(f"reference(model) is not the frozen base: {len(moving)} trained parameters stay on in it "
                          f"({', '.join(moving[:3])}{', ...' if len(moving) > 3 else ''})", stacklevel=4)
