"""Tests of the method, and of each script's updates.  All tests: python -m pytest -q

Norms, ratios, the guard and the losses are checked against NumPy in float64. Each script's updates (loss, gradient,
optimizer, averages) are recomputed from its formulas in plain float64 code. The other tests lie in tests/.
"""
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import train_awm
import train_dpo
import train_nft
from normguard import guard_gradient, norm_hinge, norm_ratio, oppose, renormalize, velocity_norm
from tests.helpers import SCRIPTS, SMALL, generator, metrics, random_pair

# ---------------------------------------------------------------- the guard

def test_norm_and_ratio_match_numpy():
    v, v_ref = random_pair()
    a, b = (np.sqrt((x.numpy().reshape(5, -1) ** 2).sum(1)) for x in (v, v_ref))
    np.testing.assert_allclose(velocity_norm(v).numpy(), a, rtol=1e-6)
    np.testing.assert_allclose(norm_ratio(v, v_ref).numpy(), a / b, rtol=1e-6)
    assert velocity_norm(v).dtype == torch.float32 and velocity_norm(v).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_before_the_norm(dtype):
    v = torch.full((2, 16, 64, 64), 300.0, dtype=dtype)  # the norm, 76800, and the squares overflow fp16
    np.testing.assert_allclose(velocity_norm(v).numpy(), v[0, 0, 0, 0].item() * 256, rtol=1e-4)
    assert norm_hinge(v * 1.5, v).allclose(torch.tensor(0.5), atol=1e-2)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_hinge_value_and_gradient(margin):
    v, v_ref = random_pair()
    v.requires_grad_()
    v_ref.requires_grad_()
    hinge = norm_hinge(v, v_ref, margin)
    hinge.sum().backward()
    x, r = v.detach().numpy().reshape(5, -1), v_ref.detach().numpy().reshape(5, -1)
    n, m = np.linalg.norm(x, axis=1), np.linalg.norm(r, axis=1)
    excess = n / m - 1 - margin
    assert (excess > 0).any() and (excess < 0).any()
    np.testing.assert_allclose(hinge.detach().numpy(), np.maximum(excess, 0), atol=1e-6)
    expected = np.where(excess[:, None] > 0, x / (n * m)[:, None], 0)  # d/dv of ||v|| / ||v_ref||
    np.testing.assert_allclose(v.grad.numpy().reshape(5, -1), expected, atol=1e-7)
    assert (hinge[excess < 0] == 0).all() and (v.grad[torch.from_numpy(excess < 0)] == 0).all()  # exactly
    assert v_ref.grad is None


def test_hinge_is_zero_on_the_reference_itself():
    v, _ = random_pair()
    v = v.float().requires_grad_()
    norm_hinge(v, v.detach()).sum().backward()
    assert (norm_ratio(v, v.detach()) == 1).all() and (v.grad == 0).all()


def test_zero_velocities_stay_finite():
    for v, v_ref in [
        (torch.zeros(2, 3), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 3)),
    ]:
        v.requires_grad_()
        norm_hinge(v, v_ref).sum().backward()
        assert norm_hinge(v, v_ref).isfinite().all() and v.grad.isfinite().all()
        assert renormalize(v, v_ref).isfinite().all()


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_guard_gradient_takes_out_what_lengthens_and_pulls_inward(margin):
    v, v_ref = random_pair(b=8, scale=1.3)
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    guarded = guard_gradient(g, v, v_ref, margin, c=0.3)
    outward, inward = 0, 0
    for i in range(8):
        x, r, a, b = (y[i].numpy().ravel() for y in (v, v_ref, g, guarded))
        if np.linalg.norm(x) <= (1 + margin) * np.linalg.norm(r):
            assert (a == b).all()  # untouched, to the last bit
            continue
        u, pull = x / np.linalg.norm(x), 0.3 * np.linalg.norm(a)
        np.testing.assert_allclose(b - (b @ u) * u, a - (a @ u) * u, atol=1e-6)  # across v: the loss's own
        np.testing.assert_allclose(b @ u, max(a @ u, 0) + pull, rtol=1e-5)  # along v: a step shortens it
        outward, inward = outward + (a @ u < 0), inward + (a @ u > 0)
    assert outward and inward and outward + inward < 8
    assert guarded.dtype == g.dtype and guarded.shape == g.shape


def test_guard_gradient_scales_with_the_gradient():
    v, v_ref = random_pair()
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        one = guard_gradient(g.to(dtype), v, v_ref)
        for k in (2.0**-20, 2.0**20):  # powers of two, which round nothing
            assert torch.equal(guard_gradient(k * g.to(dtype), v, v_ref), k * one)
    torch.testing.assert_close(guard_gradient(1000 * g, v, v_ref), 1000 * guard_gradient(g, v, v_ref), rtol=1e-6,
                               atol=1e-3)
    torch.testing.assert_close(guard_gradient(g, 3 * v, 3 * v_ref), guard_gradient(g, v, v_ref), rtol=1e-5, atol=1e-6)


def test_guard_gradient_stays_finite_and_in_its_dtype():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    for g in (zero, one, -one):
        for v, v_ref in [(zero, one), (one, zero), (zero, zero), (2 * one, one)]:
            assert guard_gradient(g, v, v_ref).isfinite().all()
    assert (guard_gradient(zero, 2 * one, one) == 0).all()  # no pull where there is no loss
    large = torch.full((2, 16, 64, 64), 300.0)  # its norm, 76800, overflows fp16
    for dtype in (torch.float16, torch.bfloat16):
        g = guard_gradient(-large.to(dtype), 1.1 * large.to(dtype), large.to(dtype))
        assert g.dtype == dtype and g.float().allclose(0.3 * large, rtol=2e-2)
    with pytest.raises(ValueError, match="same shape"):
        guard_gradient(one, one, one[:1])


def test_oppose_changes_the_gradient_and_nothing_else():
    """The loss depends on v in two ways: the sum of both gradients is guarded, and it goes on to the weights."""
    generator = torch.Generator().manual_seed(0)
    x, target, v_ref = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (4, 9, 9))
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    x *= torch.linspace(0.2, 1, 6)[:, None]
    v = x @ weight
    longer = v.norm(dim=1) > 1.01 * v_ref.norm(dim=1)
    loss = (v - target).square().mean(1) + 0.1 * (v - v_ref).abs().mean(1)
    at_v = 2 * (v - target).detach() / 9 + 0.1 * (v - v_ref).detach().sign() / 9
    before = v.detach().clone()
    oppose(v, v_ref, margin=0.01)
    loss.sum().backward()
    expected = x.T @ guard_gradient(at_v, v.detach(), v_ref, margin=0.01)
    assert longer.any() and not longer.all() and not torch.allclose(expected, x.T @ at_v)
    torch.testing.assert_close(weight.grad, expected)
    assert torch.equal(v, before)


def test_within_the_margin_no_guard_acts():
    """Velocities that are 0 %, 3 % and 7 % longer than the reference, at margins of 5 %, 2 % and 10 %."""
    v_ref, g = torch.randn(2, 3, 4, 2, generator=generator(0), dtype=torch.float64)
    v = v_ref * torch.tensor([1.0, 1.03, 1.07], dtype=torch.float64).view(3, 1, 1)
    for margin, acts in ((0.05, [False, False, True]), (0.02, [False, True, True]), (0.1, [False] * 3)):
        leaf = v.clone().requires_grad_()
        moved = 1 * leaf
        oppose(moved, v_ref, margin)
        (moved * g).sum().backward()
        for guarded in (guard_gradient(g, v, v_ref, margin), leaf.grad):
            assert (guarded != g).any(2).any(1).tolist() == acts
        assert (norm_hinge(v, v_ref, margin) > 0).tolist() == acts


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        norm_hinge(torch.ones(2, 3), torch.ones(1, 3))


def test_renormalize():
    v, v_ref = random_pair()
    np.testing.assert_allclose(velocity_norm(renormalize(v, v_ref)).numpy(), velocity_norm(v_ref).numpy(), rtol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(renormalize(v, v_ref).flatten(1), v.flatten(1))
    np.testing.assert_allclose(cosine.numpy(), 1, rtol=1e-6)
    capped, ratio = renormalize(v, v_ref, cap=True), norm_ratio(v, v_ref)
    smaller = torch.minimum(velocity_norm(v), velocity_norm(v_ref))
    np.testing.assert_allclose(velocity_norm(capped).numpy(), smaller.numpy(), rtol=1e-6)
    np.testing.assert_allclose(capped[ratio <= 1].numpy(), v[ratio <= 1].numpy(), rtol=1e-6)
    assert renormalize(v.bfloat16(), v_ref.bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------- the losses

def awm_reference(v, v_old, x0, noise, t, adv, power, clip):
    """AWM's loss of one sample, from the paper and train_sd3_awm.py, in float64 numpy."""
    def ghuber(v):
        mse = np.mean((v - (noise - x0)) ** 2)
        return -((mse + 1e-10) ** power - 1e-10**power) * t / power
    ratio = math.exp(ghuber(v) - ghuber(v_old))
    return max(-adv * ratio, -adv * min(max(ratio, 1 - clip), 1 + clip))


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_awm_loss_value_and_gradient(clip):
    g = np.random.default_rng(0)
    v, v_old, x0, noise = (g.normal(size=(8, 2, 3)) for _ in range(4))
    v_old = v + 0.3 * v_old
    t, adv = g.uniform(0.1, 1, 8), g.uniform(-1, 1, 8)
    value = [awm_reference(v[i], v_old[i], x0[i], noise[i], t[i], adv[i], 0.25, clip) for i in range(8)]
    slope = np.zeros_like(v)
    for i, j in np.ndindex(8, 6):
        step = np.zeros(6)
        step[j] = 1e-6
        up, down = (
            awm_reference(v[i] + s * step.reshape(2, 3), v_old[i], x0[i], noise[i], t[i], adv[i], 0.25, clip)
            for s in (1, -1)
        )
        slope[i].flat[j] = (up - down) / 2e-6
    x = torch.from_numpy(v).requires_grad_()
    old = torch.from_numpy(v_old).requires_grad_()
    loss = train_awm.awm_loss(x, old, *(torch.from_numpy(a) for a in (x0, noise, t, adv)), 0.25, clip)
    loss.sum().backward()
    assert loss.shape == (8,) and old.grad is None
    np.testing.assert_allclose(loss.detach().numpy(), value, rtol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), slope, atol=2e-6)
    clipped = (slope == 0).reshape(8, -1).all(1)
    assert clipped.any() == (clip < 1) and not clipped.all()  # both branches are tested


def test_awm_on_policy_ratio_is_one():
    v, x0, noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    adv, t = torch.tensor([1.0, -0.5, 0.25, 0.0]), torch.full((4,), 0.5)
    assert torch.equal(train_awm.awm_loss(v, v, x0, noise, t, adv), -adv)


def slopes(f, *velocities, h=1e-6):
    """Central differences of f (arrays -> number) by each of its arrays."""
    out = [np.zeros_like(v) for v in velocities]
    for k, i in ((k, i) for k, v in enumerate(velocities) for i in np.ndindex(v.shape)):
        moved = [[v.copy() for v in velocities] for _ in range(2)]
        moved[0][k][i] += h
        moved[1][k][i] -= h
        out[k][i] = (f(*moved[0]) - f(*moved[1])) / (2 * h)
    return out


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_loss_value_and_gradient(beta):
    """Against the official loss (train_nft_sd3.py). Its adaptive weights have no gradient there, so the finite
    differences keep them fixed."""
    g = np.random.default_rng(0)
    v, v_old, x0, xt = g.normal(size=(4, 6, 2, 3))
    t, r = g.uniform(0.1, 1, 6), np.array([0.0, 1.0, 0.5, 0.3, 0.8, 0.6])

    def official(i, v_i, weights_at):
        total = 0
        for sign, share in ((1, r[i]), (-1, 1 - r[i])):
            def x0_of(v):
                return xt[i] - t[i] * ((1 - sign * beta) * v_old[i] + sign * beta * v)
            weight = max(np.mean(np.abs(x0_of(weights_at) - x0[i])), 1e-5)
            total += share * np.mean((x0_of(v_i) - x0[i]) ** 2 / weight) / beta
        return total

    x = torch.from_numpy(v).requires_grad_()
    old = torch.from_numpy(v_old).requires_grad_()
    loss = train_nft.nft_loss(x, old, *(torch.from_numpy(a) for a in (x0, xt, t, r)), beta)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), [official(i, v[i], v[i]) for i in range(6)], rtol=3e-6)
    for i in range(6):
        np.testing.assert_allclose(x.grad[i].numpy(), slopes(lambda w: official(i, w, v[i]), v[i])[0], atol=3e-6)
    assert old.grad is None


def test_dpo_loss_value_and_gradient():
    g = np.random.default_rng(0)
    a = g.normal(size=(6, 5, 2, 3)) * 0.3  # v_w, v_l, v_ref_w, v_ref_l, target_w, target_l

    def official(w, l, ref_w, ref_l, to_w, to_l, beta=30.0):
        """train_sd3_dpo.py's loss of one pair."""
        w_diff = np.mean((w - to_w) ** 2) - np.mean((ref_w - to_w) ** 2)
        l_diff = np.mean((l - to_l) ** 2) - np.mean((ref_l - to_l) ** 2)
        return np.log1p(np.exp(0.5 * beta * (w_diff - l_diff)))

    tensors = [torch.from_numpy(x).requires_grad_() for x in a]
    loss = train_dpo.dpo_loss(*tensors, beta=30.0)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), [official(*a[:, i]) for i in range(5)], rtol=3e-6)
    for i in range(5):
        for tensor, slope in zip(tensors[:2], slopes(lambda w, l: official(w, l, *a[2:, i]), a[0, i], a[1, i])):
            np.testing.assert_allclose(tensor.grad[i].numpy(), slope, atol=2e-5)
    assert tensors[2].grad is None and tensors[3].grad is None


def test_best_and_worst():
    w, l = train_dpo.best_and_worst(torch.tensor([0.1, 0.9, 0.5, 0.3, 2.0, 2.0, 2.0, 1.0]), group=4, pairs=2)
    assert w.tolist() == [1, 2, 4, 5] and l.tolist() == [0, 3, 7, 6]


def test_old_decay_is_the_official_one():
    """return_decay of train_nft_sd3.py, types 0, 1 and 2."""
    for start, rate, most in ((0, 0.0, 0.0), (0, 0.001, 0.5), (75, 0.0075, 0.999)):
        for step in (0, 1, 74, 75, 76, 200, 499, 500, 501, 9999):
            expected = 0.0 if step < start else min((step - start) * rate, most)
            assert train_nft.old_decay(step, start, rate, most) == expected


# ---------------------------------------------------------------- the updates of each script, recomputed in float64

# three prompts, the rewards of the third all equal but for rounding; in the second's, the middle pair
REWARDS = torch.tensor([0.1, 0.9, 0.5, 0.3, 2.0, 0.7, 0.7, 0.2, 0.4, 0.4, 0.4 + 3e-8, 0.4])
PARTS = {"red": REWARDS.flip(0), "blue": 2 * REWARDS}  # of a summed reward, for the log
CHECKED = dict(seed=5, epochs=2, groups=3, group=4, steps=5, timesteps=2, updates=2, batch=5, rank=4, lr=2e-2, lam=0.7,
               kl=0.2, margin=0.01, max_grad_norm=0.05, ema=0.6, eval_every=0)


def plain_sd3():
    """tiny/sd3 in float64, called directly: (velocity, noise levels). velocity(lora, xt, t, prompts) takes the LoRA as
    {name: A or B} and has a gradient to it."""
    pipe = StableDiffusion3Pipeline.from_pretrained("tiny/sd3", dtype=torch.float32)
    model = pipe.transformer.double().requires_grad_(False)
    weights = dict(model.named_parameters())
    pipe.scheduler.set_timesteps(CHECKED["steps"])

    @functools.cache
    def encode(prompt: str) -> tuple:
        """(text, pooled text) of a prompt."""
        text, _, pooled, _ = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False,
                                                max_sequence_length=8)
        return text.detach().double(), pooled.detach().double()

    def velocity(lora: dict, xt, t, prompts: list[str], guidance: float | None = None) -> torch.Tensor:
        """With the weights W + 2 B A; t (b,) in fp32, as a pipeline computes a timestep."""
        if guidance is not None:
            empty = velocity(lora, xt, t, [""] * len(prompts))
            return empty + guidance * (velocity(lora, xt, t, prompts) - empty)
        text, pooled = zip(*map(encode, prompts))
        merged = {}
        for name in lora:
            if ".lora_A." in name:
                base = name.split(".lora_A.")[0] + ".weight"
                merged[base] = weights[base] + 2 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
        given = dict(hidden_states=xt, timestep=1000 * t, encoder_hidden_states=torch.cat(text),
                     pooled_projections=torch.cat(pooled), return_dict=False)
        return torch.func.functional_call(model, merged, (), given)[0]
    return velocity, pipe.scheduler.sigmas


def recorded_run(script, out, monkeypatch, **changes) -> tuple[list[dict], torch.Tensor]:
    """Run a script on fixed pictures and rewards. Returns (steps, pictures): for each step the LoRA and its gradients
    before and after clipping, and at the end the LoRA once more."""
    steps, names = [], {}
    x0 = torch.randn(len(REWARDS), 16, 8, 8, generator=torch.Generator().manual_seed(1))
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def grads(params) -> list:
        return [torch.zeros_like(p).double() if p.grad is None else p.grad.double().clone() for p in params]

    def watched_clip(params, *args, **kwargs):
        params = list(params)
        steps.append({"lora": [p.detach().double().clone() for p in params], "before": grads(params)})
        return clip(params, *args, **kwargs)

    def watched_step(optimizer, *args, **kwargs):
        (group,) = optimizer.param_groups
        steps[-1]["after"], names["params"] = grads(group["params"]), group["params"]
        return step(optimizer, *args, **kwargs)

    def given_pictures(pipe, *args, **kwargs):
        names["all"] = [n for n, p in pipe.transformer.named_parameters() if ".default." in n]
        return x0.clone(), None

    def given_scores(pipe, reward, *args):
        reward.names, reward.weighted = list(PARTS), lambda scores: REWARDS.clone()
        return torch.stack([*PARTS.values()])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    monkeypatch.setattr(script, "integrate", given_pictures)
    monkeypatch.setattr(script, "score", given_scores)
    monkeypatch.setattr(train_awm, "CLIP", 0.05)  # only of the log's clip_share; no ratio here reaches the loss's 1
    more = {train_nft: {"old_decay": (1, 0.2, 0.5)}, train_dpo: {"pairs": 2, "dpo_beta": 30.0},
            train_awm: {"adv_clip": 1.0, "power": 0.3}}
    script.main(script.Args(out=str(out), **CHECKED | more.get(script, {}) | changes))
    steps.append({"lora": [p.detach().double() for p in names["params"]]})
    for record in steps:
        record |= {key: dict(zip(names["all"], values)) for key, values in record.items()}
    return steps, x0.double()


def rows_of(method: str, epoch: int, sigmas, auto: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An epoch's training rows: (index of the picture or pair, t in fp32, noise)."""
    g, n = generator(5, 1, epoch), 6 if method == "dpo" else 12  # six pairs
    which = torch.randperm(n, generator=g).repeat_interleave(2)
    if method == "awm":  # one of steps 0, 1 and one of 2, 3: without the last tenth
        k = torch.tensor([0, 2]) + (2 * torch.rand(n, 2, generator=g)).long()
        t = sigmas[k.flatten()]
    elif method == "nft":
        t = sigmas[torch.rand(n, 5, generator=g).argsort(1)[:, :2].flatten()]
    else:  # logit-normal in 1000 levels, shifted by 3
        s = (1000 - (1000 * torch.sigmoid(torch.randn(2 * n, generator=g))).long()).float() / 1000
        t = 3 * s / (1 + 2 * s)
        if auto:  # every eighth is one of the rollout's
            t[[0, 8]] = sigmas[torch.randint(5, (2,), generator=g)]
    noise = torch.cat([torch.randn(1, 16, 8, 8, generator=generator(5, 3, epoch, row)) for row in range(2 * n)])
    return which, t, noise.double()


def mean(x) -> torch.Tensor:
    return x.flatten(1).mean(1)


def update_rows(method, velocity, lora, old, x0, prompts, which, t, noise, lam, kl, g=None) -> dict[str, torch.Tensor]:
    """The loss of each training row of an update, and what the log says of it, from the papers' formulas. `old` is
    NFT's old policy, and AWM's policy before the epoch. g is --guard-guidance."""
    clip = 1 if method == "awm" else 5
    centred = REWARDS.double().view(3, 4) - REWARDS.double().view(3, 4).mean(1, keepdim=True)
    centred[2] = 0
    adv = (centred.flatten() / REWARDS.double().std(correction=0)).clamp(-clip, clip) / clip
    base = {name: torch.zeros_like(value) for name, value in lora.items()}
    level = t.double().view(-1, 1, 1, 1)  # the noise level of each row

    def at(picture):
        """(target, v, v_ref, x_t, prompts) of these pictures at the rows' noise levels."""
        xt, text = (1 - level) * x0[picture] + level * noise, [prompts[i] for i in picture]
        return noise - x0[picture], velocity(lora, xt, t, text), velocity(base, xt, t, text), xt, text

    def compared(v, v_ref, xt, text):
        guarded, guarded_ref = (velocity(policy, xt, t, text, g) for policy in (lora, base))
        ratio = guarded.flatten(1).norm(dim=1) / guarded_ref.flatten(1).norm(dim=1)
        if lam == "auto":
            u = (v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()

            def opposed(g):
                """The loss's gradient at v. Where v is too long: without its outward part, and with an inward pull."""
                outward = (g * u).sum((1, 2, 3)).clamp_max(0)
                pull = 0.3 * g.square().sum((1, 2, 3)).sqrt() - outward
                return g + (pull * (ratio.detach() > 1.01)).view(-1, 1, 1, 1) * u
            v.register_hook(opposed)
        return {"norm_ratio": ratio, "guard": (ratio - 1.01).clamp_min(0), "kl": mean((v - v_ref) ** 2)}

    if method == "dpo":
        best, worst = torch.tensor([[1, 2, 4, 5, 10, 8], [0, 3, 7, 6, 11, 9]])  # of equal rewards, the first is better
        error, sides = [], []
        for picture in (best[which], worst[which]):
            target, v, v_ref, xt, text = at(picture)
            error.append(mean((v - target) ** 2) - mean((v_ref - target) ** 2))
            sides.append(compared(v, v_ref, xt, text))
        rows = {name: (sides[0][name] + sides[1][name]) / 2 for name in sides[0]}
        rows["ratios"] = torch.cat([side["norm_ratio"] for side in sides])
        rows["differ"] = (which != 3) & (which < 4)  # not the second prompt's middle pair, nor the third's
        rows["margin"] = -15 * (error[0] - error[1])
        rows["base_loss"] = torch.where(rows["differ"], 2 / 30 * torch.log(1 + torch.exp(-rows["margin"])), 0)
    else:
        target, v, v_ref, xt, text = at(which)
        v_old = velocity(old, xt, t, text).detach()
        rows = compared(v, v_ref, xt, text)
        rows["ratios"] = rows["norm_ratio"]
    if method == "awm":
        log_p, log_p_old = (-t.double() / 0.3 * (mean((x - target) ** 2) + 1e-10) ** 0.3 for x in (v, v_old))
        rows["likelihood"], a = torch.exp(log_p - log_p_old), adv[which]
        rows["base_loss"] = torch.maximum(-a * rows["likelihood"], -a * rows["likelihood"].clamp(0, 2))
    if method == "nft":
        rows["old_distance"], rows["base_loss"] = mean((v - v_old) ** 2), 0
        for sign, weight in ((1, 0.5 + adv[which] / 2), (-1, 0.5 - adv[which] / 2)):
            fixed = xt - level * (v_old + sign * (v - v_old)).detach() - x0[which]
            error = xt - level * ((1 - sign) * v_old + sign * v) - x0[which]
            rows["base_loss"] = rows["base_loss"] + weight * mean(error**2) / mean(fixed.abs())
    return rows | {"loss": rows["base_loss"] + (0 if lam == "auto" else lam) * rows["guard"] + kl * rows["kl"]}


def share_above(values, limit: float):
    """The share of values above a limit. Values so near to it that rounding may take them across count as either."""
    undecided = ((values - limit).abs() < 1e-4).double().mean().item()
    return pytest.approx((values > limit).double().mean().item(), abs=undecided + 1e-6)


def check_line(line: dict, rows: dict, t):
    """Compare a line of the log with an update's rows."""
    rows = {name: value.detach() for name, value in rows.items()}
    for name in ("loss", "base_loss", "guard", "kl", "norm_ratio"):
        assert line[name] == pytest.approx(rows[name].mean().item(), rel=1e-4, abs=1e-5), name
    assert line["active"] == share_above(rows["ratios"], 1.01)
    place = (5 * t).floor().clamp_max(4)
    for k, said in enumerate(line["norm_ratio_by_t"]):
        there = rows["norm_ratio"][place == k]
        assert said == (pytest.approx(there.mean().item(), rel=1e-5) if len(there) else None)
    if "old_distance" in rows:
        assert line["old_distance"] == pytest.approx(rows["old_distance"].mean().item(), rel=1e-4, abs=1e-6)
    if "likelihood" in rows:
        assert line["clip_share"] == share_above((rows["likelihood"] - 1).abs(), 0.05)
        assert line["ratio_std"] == pytest.approx(rows["likelihood"].std(correction=0).item(), rel=1e-4, abs=1e-5)
    if "margin" in rows:
        margin = rows["margin"][rows["differ"]]
        assert line["accuracy"] == share_above(margin, 0)
        assert line["margin"] == pytest.approx(margin.mean().item(), rel=1e-4, abs=1e-4)
    assert line["zero_std_share"] == pytest.approx(1 / 3)
    for name, values in {"reward": REWARDS, "reward/red": PARTS["red"], "reward/blue": PARTS["blue"]}.items():
        assert line[name] == pytest.approx(np.mean(values.numpy()), rel=1e-5)
        assert line[f"{name}_std"] == pytest.approx(np.std(values.numpy(), ddof=1), rel=1e-5)


def distance(ours: dict, theirs: dict) -> float:
    """The distance of two sets of named tensors, relative to the second's norm."""
    off = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return math.sqrt(off / sum(value.square().sum() for value in theirs.values()))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("lam, batch, checkpointing, guidance", [
    (0.7, 5, False, None),
    (0.7, 5, True, 3.0),
    (0.0, 64, True, None),
    ("auto", 5, False, None),
])
def test_updates_are_the_methods(tmp_path, monkeypatch, script, lam, batch, checkpointing, guidance):
    """Every update's gradient, before and after clipping, is that of the paper's loss plus lam times the hinge, of the
    guided velocities if asked for (with auto, of the loss with its gradient opposed at the velocities): in
    micro-batches or at once, with gradient checkpointing or without. And the log's numbers are that update's."""
    method = script.__name__.removeprefix("train_")
    velocity, sigmas = plain_sd3()
    flags = dict(lam=lam, batch=batch, checkpointing=checkpointing, guard_guidance=guidance)
    steps, x0 = recorded_run(script, tmp_path, monkeypatch, **flags)
    order = torch.randperm(48, generator=generator(5, 0, 0))
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    lines, guarded = metrics(tmp_path), 0
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    for k, record in enumerate(steps[:-1]):
        epoch, u = divmod(k, 2)
        which, t, noise = rows_of(method, epoch, sigmas, lam == "auto")
        part = slice(u * len(t) // 2, (u + 1) * len(t) // 2)
        prompts = [captions[order[3 * epoch + i // 4]] for i in range(12)]
        lora = {name: value.clone().requires_grad_() for name, value in record["lora"].items()}
        old = steps[2 * epoch]["lora"]  # AWM's; with these old_decay NFT's is half of the way behind in epoch 1
        if method == "nft" and epoch == 1:
            old = {name: 0.2 * steps[0]["lora"][name] + 0.8 * value for name, value in old.items()}
        drawn = which[part], t[part], noise[part]
        rows = update_rows(method, velocity, lora, old, x0, prompts, *drawn, lam, 0.2, guidance)
        rows["loss"].mean().backward()
        gradient = {name: value.grad for name, value in lora.items()}
        guarded += (rows["guard"] > 0).sum().item()
        check_line(lines[k], rows, t[part])
        assert distance(record["before"], gradient) < 1e-4, (epoch, u)
        norm = math.sqrt(sum(value.square().sum() for value in gradient.values()))
        assert lines[k]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        clipped = {name: value * min(1, 0.05 / norm) for name, value in gradient.items()}
        assert distance(record["after"], clipped) < 1e-4, (epoch, u)
    assert guarded > 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_are_adamw_and_the_averages_follow(tmp_path, monkeypatch, script):
    """AdamW, the average of --ema and NFT's old policy, recomputed in float64 from the script's gradients."""
    steps, _ = recorded_run(script, tmp_path, monkeypatch)
    lora, first = steps[0]["lora"], steps[0]["lora"]
    m, v, average, old = ({name: 0 * value for name, value in lora.items()} for _ in range(4))
    average = old = lora
    for s, record in enumerate(steps[:-1], start=1):
        assert distance(record["lora"], lora) < 1e-5
        m = {name: 0.9 * m[name] + 0.1 * g for name, g in record["after"].items()}
        v = {name: 0.999 * v[name] + 0.001 * g**2 for name, g in record["after"].items()}
        for name, value in lora.items():
            change = (m[name] / (1 - 0.9**s)) / ((v[name] / (1 - 0.999**s)).sqrt() + 1e-8)
            lora = lora | {name: value - 2e-2 * (change + 1e-4 * value)}
        decay = min((1 + s) / (10 + s), 0.6)
        average = {name: decay * average[name] + (1 - decay) * value for name, value in lora.items()}
        if s % 2 == 0:  # an epoch ends
            decay = min(0.2 * max(s - 1, 0), 0.5)
            old = {name: decay * old[name] + (1 - decay) * value for name, value in lora.items()}
    assert distance(steps[-1]["lora"], lora) < 1e-5 < distance(lora, first)
    kept = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    kept = {f"{name.removeprefix('transformer.').removesuffix('.weight')}.default.weight":
            value.double() / (2 if ".lora_B." in name else 1) for name, value in kept.items()}  # B has the scale in it
    assert distance(kept, average) < 1e-5 and distance(average, lora) > 1e-2
    if script is train_nft:
        saved = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["old"]
        saved = dict(zip(old, (value.double() for value in saved)))
        assert distance(saved, old) < 1e-5 and distance(old, lora) > 1e-2


# ---------------------------------------------------------------- one short run of each script

@pytest.mark.parametrize("script", SCRIPTS)
def test_run_writes_what_it_says(finished, script):
    run = finished(script)
    lines, kl = metrics(run), script.Args.kl
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))  # 4 epochs of 2 updates
    logged = {"step", "epoch", "reward", "loss", "base_loss", "guard", "norm_ratio", "active", "grad_norm", "img_per_s"}
    assert logged <= set(steps[0])
    assert steps[0]["norm_ratio"] == 1 and steps[0]["guard"] == 0  # before its first update the model is its reference
    for line in steps:
        total = line["base_loss"] + 0.05 * line["guard"] + kl * line["kl"]
        assert line["loss"] == pytest.approx(total, rel=1e-6, abs=1e-6)
        assert line["grad_norm"] > 0 and line["guard"] >= 0 and 0 <= line["active"] <= 1
    evals = [line for line in lines if "eval_reward" in line]
    assert [line["epoch"] for line in evals] == [0, 2, 4]
    assert evals[0]["eval_norm_ratio"] == 1 != evals[-1]["eval_norm_ratio"]
    assert len(evals[-1]["eval_norm_ratio_steps"]) == SMALL["steps"]
    written = ["args.json", "checkpoint", "curves.png", "lora", "metrics.jsonl", "samples"]
    assert sorted(p.name for p in run.iterdir()) == written
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["00000.png", "00002.png", "00004.png"]
