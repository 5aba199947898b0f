"""NormGuard: hold the velocity norm of a flow model during RL post-training. One file, torch only: copy it anywhere.

RL fine-tuning (NFT, AWM, DPO) makes velocities v_theta longer than the reference's, v_ref, and pictures get worse in
ways that the reward does not see. NormGuard adds a hinge that acts only on samples whose velocity is too long:

    guard = relu(||v_theta|| / ||v_ref|| - 1 - margin)          loss = base_loss + lam * mean(guard)

In your own training loop, with any loss that is computed from the velocity:

    from normguard import norm_hinge, reference
    v = model(x_t, t, cond)                                     # the forward pass that you already have
    with reference(model):                                      # LoRA off, eval mode, no gradient
        v_ref = model(x_t, t, cond)
    loss = base_loss + 0.05 * norm_hinge(v, v_ref).mean()
    # If people will sample with guidance w, guard the guided velocities. Write this instead of the last line:
    u = model(x_t, t, empty)                                    # empty: the prompt ""
    with reference(model): u_ref = model(x_t, t, empty)
    loss = base_loss + 0.05 * norm_hinge(u + w * (v - u), u_ref + w * (v_ref - u_ref)).mean()

lam = 0.05 suits the losses of this repository. For a loss of unknown scale, call oppose(v, v_ref) before
base_loss.backward() instead: it scales the guard to the loss's own gradient (guard_gradient).

The idea is the paper's (arXiv 2606.27771). We had its abstract only: the hinge's form, linear and relative, is ours.
"""
import warnings
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor

_checked = weakref.WeakKeyDictionary()  # by model: the (active, kept) adapters that were checked last
EPS = 1e-6  # norms are raised to this before they divide; a latent of unit variance has a norm of tens to hundreds


def velocity_norm(v: Tensor) -> Tensor:
    """L2 norm of each sample over all its non-batch dims, in fp32. v (b, ...) of any float dtype -> (b,) fp32."""
    return torch.linalg.vector_norm(v.float().flatten(1), dim=1)


def norm_ratio(v: Tensor, v_ref: Tensor) -> Tensor:
    """||v|| / ||v_ref|| per sample; no gradient to v_ref. v, v_ref (b, ...) of one shape -> (b,) fp32, 1 where equal.

    Raises ValueError if the shapes differ: broadcasting would compare the wrong samples."""
    if v.shape != v_ref.shape:
        raise ValueError(f"v {tuple(v.shape)} and v_ref {tuple(v_ref.shape)} must have the same shape")
    return velocity_norm(v) / velocity_norm(v_ref.detach()).clamp_min(EPS)


def norm_hinge(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """The guard: relu(||v|| / ||v_ref|| - 1 - margin) per sample, (b, ...) -> (b,) fp32. Gradient to v only.

    At or below the threshold it is exactly 0, with exactly 0 gradient. With a margin of 0.02 the norm may exceed the
    reference's by 2 % before the guard acts."""
    return torch.relu(norm_ratio(v, v_ref) - (1.0 + margin))


@torch.no_grad()
def guard_gradient(g: Tensor, v: Tensor, v_ref: Tensor, margin: float = 0.0, c: float = 0.3) -> Tensor:
    """Change a loss's gradient g = dL/dv so that a step shortens each v that is too long. All (b, ...) of one shape ->
    g' of g's shape and dtype.

    With u = v / ||v||, where ||v|| > (1 + margin) ||v_ref||:    g' = g - min(<g, u>, 0) u + c ||g|| u
    and elsewhere g' = g. The second term removes what lengthens v; the third shortens v, by c of the gradient's norm.
    There is no weight to choose: both terms scale with g, so k times the loss gives k g', and Adam divides k out. Where
    the loss has no gradient, there is no guard."""
    longer = norm_ratio(v, v_ref) > 1.0 + margin
    g_flat, u = g.float().flatten(1), v.float().flatten(1) / velocity_norm(v).clamp_min(EPS)[:, None]  # (b, d)
    radial = (g_flat * u).sum(1)  # (b,), negative where a step lengthens v
    inward = c * velocity_norm(g) - radial.clamp_max(0)
    guarded = (g_flat + inward[:, None] * u).view(g.shape).to(g.dtype)
    return torch.where(longer.view(-1, *[1] * (g.ndim - 1)), guarded, g)


def oppose(v: Tensor, v_ref: Tensor, margin: float = 0.0, c: float = 0.3):
    """In the next backward pass, replace the gradient at v by its guard_gradient. v, v_ref (b, ...) of one shape.

    Call it before backward(). It acts on every term that is computed from this v, also on a KL to the reference."""
    inner, v_ref = v.detach(), v_ref.detach()
    v.register_hook(lambda g: guard_gradient(g, inner, v_ref, margin, c))


def renormalize(v: Tensor, v_ref: Tensor, cap: bool = False) -> Tensor:
    """Rescale v to the reference's norm, per sample: v * ||v_ref|| / ||v||. Same shape and dtype as v. cap=True only
    shrinks. A repair at inference time (compare diffusers' guidance_rescale). It does not help in the paper, and helps
    in part on this repository's miniature. Raises ValueError if the shapes differ."""
    scale = norm_ratio(v_ref, v)
    if cap:
        scale = scale.clamp_max(1.0)
    return (v.float() * scale.view(-1, *[1] * (v.ndim - 1))).to(v.dtype)


@contextmanager
def reference(model: torch.nn.Module, keep: tuple[str, ...] = ()):
    """Inside, `model` is the frozen base that it was before RL: LoRA adapters off, eval mode, no gradient.

    For diffusers models with adapters and for PeftModel, also wrapped (DDP, torch.compile, accelerate). On exit, even
    after an exception or when nested, active adapters, requires_grad and train/eval mode are as before. If the model
    has dropout, compute v in eval mode too: the noise of dropout would count as excess norm.

    keep: adapters that were there before RL, such as a frozen style LoRA; they stay on. Warns once if parameters that
    stay on are trained (LoRA biases). Raises ValueError if the model has no adapter or a merged one; if one in `keep`
    does not exist or is trained; if a frozen adapter is active beside a trained one and is not in `keep`."""
    modules = list(model.modules())
    # peft's adapter layers read this flag in forward; its own disable_adapters() would reset requires_grad
    layers = [m for m in modules if "_disable_adapters" in vars(m) or hasattr(type(m), "_disable_adapters")]
    if not layers:
        raise ValueError("reference(model) found no adapter to switch off; add a LoRA, or keep a frozen copy")
    if any(getattr(m, "merged", False) for m in layers):
        raise ValueError("reference(model): an adapter is merged (fused) into the base weights; unmerge it first")
    keep, before = _names(keep), [(m, m._disable_adapters, m._active_adapter) for m in layers]
    on = {name for _, disabled, active in before if not disabled for name in _names(active)}
    if len(on) > 1 or _checked.get(model) != (on, keep):
        _check_adapters(model, layers, on, keep)
        _checked[model] = on, keep
    training = [m for m in modules if m.training]
    try:
        for m, disabled, active in before:
            kept = [name for name in _names(active) if name in keep]
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


def _names(adapters: str | list[str] | tuple[str, ...]) -> list[str]:
    """peft gives one name as a string, several as a list."""
    return [adapters] if isinstance(adapters, str) else list(adapters)


def _check_adapters(model: torch.nn.Module, layers: list[torch.nn.Module], active: set[str], keep: list[str]):
    """Raise ValueError, or warn, where the model without its adapters (but `keep`) is not the base before RL."""
    weights = {}  # parameters by adapter name
    for part in (part for layer in layers for part in layer.children()):
        if isinstance(part, (torch.nn.ModuleDict, torch.nn.ParameterDict)):  # keyed by adapter name
            for name, held in part.items():
                weights.setdefault(name, []).extend([held] if isinstance(held, Tensor) else held.parameters())
    trained = {name for name, held in weights.items() if any(p.requires_grad for p in held)}
    frozen, on = sorted((active & weights.keys()) - trained), sorted(active & trained)
    if unknown := sorted(set(keep) - weights.keys()):
        raise ValueError(f"reference(model, keep=...): there is no adapter {', '.join(unknown)}")
    if moved := sorted(trained & set(keep)):
        raise ValueError(f"reference(model, keep=...): {', '.join(moved)} trains, so it is no part of the reference")
    if set(frozen) - set(keep) and on:
        raise ValueError(f"reference(model): {', '.join(frozen)} (frozen) and {', '.join(on)} (trained) are active "
                         f"together; say what belongs to the reference: keep={tuple(frozen)}")
    if model in _checked:  # it has been warned of
        return
    off = {id(p) for name, held in weights.items() if name not in keep for p in held}
    if moving := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in off]:
        warnings.warn(f"reference(model) is not the frozen base: {len(moving)} trained parameters stay on in it "
                      f"({', '.join(moving[:3])}{', ...' if len(moving) > 3 else ''})", stacklevel=4)
