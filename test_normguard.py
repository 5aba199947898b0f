"""The tests. On a CPU, deterministic, a few minutes:  python -m pytest -q

They run the real small models of tiny/, through the paths a user runs. Norms, losses, advantages, schedule, rewards and
distances are checked against derivations written here in float64 numpy; pictures against plain diffusers.
"""
import copy
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

import eval_judge
import flow.checkpoint
import flow.cli
import flow.draws
import flow.judge
import flow.pictures
import flow.pipeline
import flow.rewards
import sample
import train_awm
import train_dpo
import train_nft
from flow.intercept import timestep_inputs
from flow.lora import add_lora
from flow.pipeline import (
    decode_batch,
    draw_noise,
    encode_prompts,
    integrate,
    load_pipeline,
    schedule,
    training_levels,
    velocity,
)
from normguard import guard_gradient, norm_hinge, norm_ratio, oppose, reference, renormalize, velocity_norm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tiny"))
import world  # noqa: E402

SCRIPTS = [train_nft, train_awm, train_dpo]
SMALL = dict(epochs=4, group=4, groups=2, updates=2, batch=8, rank=4, steps=5, timesteps=1,
             eval_n=4, eval_every=2, save_every=4, lr=2e-3)  # four epochs, saved once: curves.png takes its time


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Defaults like tiny/sd3 are relative to the repository."""
    monkeypatch.chdir(ROOT)


def small(script, **changes) -> dict:
    """The args of a short training run."""
    return {**SMALL, **({"pairs": 2} if script is train_dpo else {}), **changes}


def small_run(out, script=train_awm, **changes) -> Path:
    """A short training run in this process."""
    script.main(script.Args(out=str(out), **small(script, **changes)))
    return Path(out)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict:
    """The folders of a finished short run of each script."""
    os.chdir(ROOT)
    return {script: small_run(tmp_path_factory.mktemp("runs") / script.__name__, script) for script in SCRIPTS}


@pytest.fixture(scope="session")
def run(runs) -> Path:
    """AWM's."""
    return runs[train_awm]


def lora_bytes(out: Path) -> bytes:
    return (out / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict]:
    """The log but for the only number that depends on the clock."""
    return [{k: v for k, v in line.items() if k != "img_per_s"} for line in metrics(out)]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# ---------------------------------------------------------------- normguard.py

def random_pair(b=5, scale=1.2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    v_ref = torch.randn(b, 4, 3, 2, generator=g, dtype=dtype)
    scales = torch.linspace(0.7, scale, b, dtype=dtype).view(-1, 1, 1, 1)
    v = v_ref * scales + 0.1 * torch.randn(v_ref.shape, generator=g, dtype=dtype)
    return v, v_ref


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


def test_hinge_is_silent_on_the_reference_itself():
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


def test_guard_gradient_knows_no_scale():
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
    """Two ways from the loss back to v: it is their sum that is guarded, and it goes on to the weights."""
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


@pytest.fixture()
def lora_model():
    """tiny/sd3's transformer with a LoRA that changes its output, and an input."""
    model = SD3Transformer2DModel.from_pretrained("tiny/sd3", subfolder="transformer", dtype=torch.float32)
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(2, 16, 8, 8, generator=g),
        timestep=torch.tensor([900.0, 300.0]),
        return_dict=False,
        encoder_hidden_states=torch.randn(2, 16, 96, generator=g),
        pooled_projections=torch.randn(2, 80, generator=g),
    )
    base = model(**inputs)[0]
    params = add_lora(model, rank=4, seed=0)
    for p in params:
        torch.nn.init.normal_(p, std=0.1, generator=g)
    return model, inputs, base.detach(), params


def test_reference_is_the_base_and_puts_everything_back(lora_model):
    model, inputs, base, params = lora_model
    model.train()
    model.transformer_blocks[0].eval()  # a mode that differs inside the model must come back too
    tuned = model(**inputs)[0]
    assert not torch.equal(tuned, base)

    def state():
        modes = [(m, m.training) for m in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], model.active_adapters()
    before = state()
    with pytest.raises(RuntimeError, match="inside"):
        with reference(model):
            with reference(model):
                assert torch.equal(model(**inputs)[0], base)
            out = model(**inputs)[0]  # the inner exit does not switch the adapter on
            assert torch.equal(out, base) and not out.requires_grad and not model.training
            raise RuntimeError("inside")
    assert torch.equal(model(**inputs)[0], tuned) and torch.is_grad_enabled()
    assert before == state()
    model(**inputs)[0].sum().backward()
    assert all(p.grad is not None for p in params)


def test_reference_keeps_the_second_adapter_active(lora_model):
    model, inputs, base, _ = lora_model
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False), adapter_name="old")
    model.set_adapter("old")
    tuned = model(**inputs)[0]
    with reference(model):
        assert torch.equal(model(**inputs)[0], base)
    assert model.active_adapters() == ["old"] and torch.equal(model(**inputs)[0], tuned)


def test_reference_works_for_peft_models():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    x = torch.randn(3, 4)
    base = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5))
    with reference(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base) and model.training


def test_reference_refuses_a_model_without_adapter():
    with pytest.raises(ValueError, match="no adapter"):
        with reference(torch.nn.Linear(2, 2)):
            pass


@pytest.fixture(params=["bare", "ddp", "compiled", "accelerate", "accelerate-bf16"])
def wrap(request, tmp_path):
    """What other people's trainers wrap a model in, as a function of the model."""
    wrappers = {
        "bare": lambda model: model,
        "ddp": torch.nn.parallel.DistributedDataParallel,
        "compiled": functools.partial(torch.compile, backend="eager"),
        "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
        "accelerate-bf16": lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
    }
    if "ddp" in request.param:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield wrappers[request.param]
    if "ddp" in request.param:
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_sees_through_wrappers(wrap, dtype):
    """Between a trained forward and its backward, through DDP, torch.compile or accelerate, on a base in fp32 or bf16:
    inside is the base, the gradient is as if nothing had been in between, and an exception inside changes nothing."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)
    base = wrap(copy.deepcopy(net).eval())(x).detach()
    lora = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model, params = wrap(lora), [p for p in lora.parameters() if p.requires_grad]

    def step(inside):
        v = model(x)
        v_ref = base
        if inside:
            with pytest.raises(RuntimeError, match="inside"):
                with reference(model):
                    v_ref = model(x)
                    raise RuntimeError("inside")
        assert torch.equal(v_ref, base) and not v_ref.requires_grad
        (v.float().mean() + norm_hinge(v, v_ref, margin=-1).mean()).backward()
        gradients = [p.grad.clone() for p in params]
        lora.zero_grad()
        return v, *gradients

    for _ in range(2):  # DDP and dynamo treat a second step differently
        for ours, theirs in zip(step(inside=True), step(inside=False), strict=True):
            assert torch.equal(ours, theirs)
    assert model.training and all(m.training for m in lora.modules()) and all(p.requires_grad for p in params)
    with reference(Accelerator(cpu=True).unwrap_model(model)):  # inside its wrapper, the model is the base as well
        assert torch.equal(model(x), base)


def test_reference_turns_off_whole_trained_copies_too():
    """peft's modules_to_save: a layer trained in full beside its frozen original."""
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    base = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    torch.nn.init.normal_(model.base_model.model[1].modules_to_save["default"].weight)
    with reference(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)


def two_adapters() -> tuple[torch.nn.Module, torch.Tensor]:
    """A PeftModel with a frozen style LoRA and a trained one, both active, and the base's output with the style."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), "style")
    styled = model(x).detach()
    model.add_adapter("default", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["style", "default"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)
    return model, x, styled


def test_reference_keeps_what_was_there_before_rl():
    model, x, styled = two_adapters()
    tuned = model(x)
    with reference(model, keep=("style",)):
        assert torch.equal(model(x), styled)
    assert torch.equal(model(x), tuned) and not torch.equal(tuned, styled)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    with pytest.raises(ValueError, match=r"style \(frozen\) and default \(trained\).*keep=\('style',\)"):
        with reference(model):
            pass
    for keep, words in (("styl", "there is no adapter styl"), (("default",), "default trains")):
        with pytest.raises(ValueError, match=words), reference(model, keep=keep):
            pass
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    model.base_model.set_adapter(["style", "other", "default"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)
    with pytest.raises(ValueError, match="other, style"), reference(model, keep=("style",)):
        pass
    model.base_model.set_adapter("default")  # alone, it is switched off as ever
    with reference(model):
        assert not torch.equal(model(x), styled)


@pytest.mark.parametrize("moved", ["a LoRA's bias", "a base weight"])
def test_reference_warns_once_of_a_base_that_trains(moved, recwarn):
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], bias="none" if "base" in moved else "lora_only"))
    if "base" in moved:
        model.base_model.model[1].weight.requires_grad_()
    for _ in range(2):
        with reference(model):
            model(x)
    said = [str(w.message) for w in recwarn if "not the frozen base" in str(w.message)]
    name = "1.weight" if "base" in moved else "0.base_layer.bias"
    assert len(said) == 1 and name in said[0]


def test_reference_does_not_warn_of_a_frozen_base(lora_model, recwarn):
    with reference(lora_model[0]):
        pass
    assert not [w for w in recwarn if "reference" in str(w.message)]


def test_reference_refuses_a_merged_adapter(lora_model):
    model, inputs, base, _ = lora_model
    tuned = model(**inputs)[0]
    model.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        with reference(model):
            pass
    torch.testing.assert_close(model(**inputs)[0], tuned)  # left as it was
    model.unfuse_lora()
    with reference(model):
        torch.testing.assert_close(model(**inputs)[0], base)



# ---------------------------------------------------------------- the loss

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
    loss = train_awm.awm_loss(x, *(torch.from_numpy(a) for a in (v_old, x0, noise, t, adv)), 0.25, clip)
    loss.sum().backward()
    assert loss.shape == (8,)
    np.testing.assert_allclose(loss.detach().numpy(), value, rtol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), slope, atol=2e-6)
    clipped = (slope == 0).reshape(8, -1).all(1)
    assert clipped.any() == (clip < 1) and not clipped.all()  # both branches are met


def test_awm_on_policy_ratio_is_one():
    v, x0, noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    adv, t = torch.tensor([1.0, -0.5, 0.25, 0.0]), torch.full((4,), 0.5)
    assert torch.equal(train_awm.awm_loss(v, v, x0, noise, t, adv), -adv)


def slopes(f, *velocities, h=1e-6):
    """Central differences of f (arrays -> number) in each of its arrays."""
    out = [np.zeros_like(v) for v in velocities]
    for k, i in ((k, i) for k, v in enumerate(velocities) for i in np.ndindex(v.shape)):
        moved = [[v.copy() for v in velocities] for _ in range(2)]
        moved[0][k][i] += h
        moved[1][k][i] -= h
        out[k][i] = (f(*moved[0]) - f(*moved[1])) / (2 * h)
    return out


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_loss_value_and_gradient(beta):
    """The official loss (train_nft_sd3.py), whose weights are held fixed in the differences as its no_grad holds
    them."""
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


def test_old_policy_follows_as_officially():
    """return_decay of train_nft_sd3.py, types 0, 1 and 2."""
    for start, rate, most in ((0, 0.0, 0.0), (0, 0.001, 0.5), (75, 0.0075, 0.999)):
        for step in (0, 1, 74, 75, 76, 200, 499, 500, 501, 9999):
            expected = 0.0 if step < start else min((step - start) * rate, most)
            assert train_nft.old_decay(step, start, rate, most) == expected


def test_advantages():
    reward = np.random.default_rng(0).normal(size=(3, 4)) ** 5  # heavy tails, so that some are clipped
    expected = np.clip((reward - reward.mean(1, keepdims=True)) / reward.std(), -1.5, 1.5) / 1.5
    ours = flow.draws.group_advantages(torch.from_numpy(reward.flatten()), group=4, clip=1.5)
    np.testing.assert_allclose(ours.numpy(), expected.flatten(), rtol=1e-9)
    assert (abs(expected) == 1).any()


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e5, 1e12])
def test_advantages_do_not_depend_on_the_rewards_scale(scale):
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0))
    one, other = (flow.draws.group_advantages(r, group=4, clip=5) for r in (reward, scale * reward))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert flow.draws.zero_std_share(scale * reward, group=4) == 0


@pytest.mark.parametrize("level", [0.0, 1e-9, 0.7, -3e4])
def test_rewards_that_are_equal_to_rounding_have_no_advantage(level):
    """All of them, or those of one prompt of two."""
    equal = level * (1 + 1e-7 * torch.randn(8, generator=torch.Generator().manual_seed(0)))
    assert (flow.draws.group_advantages(equal, group=4, clip=5) == 0).all()
    assert flow.draws.zero_std_share(equal, group=4) == 1
    equal[4:] += (abs(level) or 1) * torch.tensor([0.0, 0.1, 0.2, 0.3])
    adv = flow.draws.group_advantages(equal, group=4, clip=5)
    assert (adv[:4] == 0).all() and (adv[4:] != 0).all()
    assert flow.draws.zero_std_share(equal, group=4) == 0.5


def test_stratified_moments():
    k = flow.draws.stratified(4000, 6, 12, torch.Generator().manual_seed(0))
    # the official "discrete" ones for 14 steps and 6 moments
    expected = [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]
    assert [set(column.tolist()) for column in k.T] == expected


# ---------------------------------------------------------------- one run of each script, recomputed in float64

# three prompts, the rewards of the third all equal but for rounding; in the second's, the middle pair
REWARDS = torch.tensor([0.1, 0.9, 0.5, 0.3, 2.0, 0.7, 0.7, 0.2, 0.4, 0.4, 0.4 + 3e-8, 0.4])
PARTS = {"red": REWARDS.flip(0), "blue": 2 * REWARDS}  # of a summed reward, for the log
CHECKED = dict(seed=5, epochs=2, groups=3, group=4, steps=5, timesteps=2, updates=2, batch=5, rank=4, lr=2e-2, lam=0.7,
               kl=0.2, margin=0.01, max_grad_norm=0.05, ema=0.6, eval_every=0, save_every=1)


def generator(*key: int) -> torch.Generator:
    """What a run draws from, by (seed, purpose, place): purpose 0 is prompts, 1 an epoch, 3 noise of a row."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class Plain:
    """tiny/sd3 in float64, called directly: velocities of a LoRA given as {name: A or B}, with a gradient to it."""

    def __init__(self):
        pipe = StableDiffusion3Pipeline.from_pretrained("tiny/sd3", dtype=torch.float32)
        encode = functools.partial(pipe.encode_prompt, do_classifier_free_guidance=False, max_sequence_length=8)
        self.encode = functools.cache(lambda prompt: [x if x is None else x.detach().double()
                                                      for x in encode(prompt, prompt, prompt)])
        self.model = pipe.transformer.double().requires_grad_(False)
        self.weights = dict(self.model.named_parameters())
        pipe.scheduler.set_timesteps(CHECKED["steps"])
        self.sigmas = pipe.scheduler.sigmas

    def __call__(self, lora: dict, xt, t, prompts: list[str]) -> torch.Tensor:
        """W + 2 B A; t (b,) in fp32, as a pipeline computes a timestep."""
        text, _, pooled, _ = zip(*map(self.encode, prompts))
        merged = {}
        for name in lora:
            if ".lora_A." in name:
                base = name.split(".lora_A.")[0] + ".weight"
                merged[base] = self.weights[base] + 2 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
        given = dict(hidden_states=xt, timestep=1000 * t, encoder_hidden_states=torch.cat(text),
                     pooled_projections=torch.cat(pooled), return_dict=False)
        return torch.func.functional_call(self.model, merged, (), given)[0]


def recorded_run(script, out, monkeypatch, **changes) -> tuple[list[dict], torch.Tensor]:
    """A run on fixed pictures and rewards: at each step the LoRA, its gradients before and after clipping and the lines
    of the log, and in the end the LoRA; and the pictures."""
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

    def given_rewards(run, *args):
        run.parts = PARTS
        return REWARDS.clone()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    monkeypatch.setattr(script, "integrate", given_pictures)
    monkeypatch.setattr(script, "score", given_rewards)
    monkeypatch.setattr(train_awm, "CLIP", 0.05)  # only of the log's clip_share; no ratio here reaches the loss's 1
    more = {train_nft: {"old_decay": (1, 0.2, 0.5)}, train_dpo: {"pairs": 2, "dpo_beta": 30.0},
            train_awm: {"adv_clip": 1.0, "power": 0.3}}
    script.main(script.Args(out=str(out), **CHECKED | more.get(script, {}) | changes))
    steps.append({"lora": [p.detach().double() for p in names["params"]]})
    for record in steps:
        record |= {key: dict(zip(names["all"], values)) for key, values in record.items()}
    return steps, x0.double()


def rows_of(method: str, epoch: int, sigmas, auto: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An epoch's training rows: (picture or pair, t in fp32, noise)."""
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


def update_rows(method, plain, lora, old, x0, prompts, which, t, noise, lam, kl) -> dict[str, torch.Tensor]:
    """An update's loss, row by row, and what the log says of it, from the papers' formulas. `old`: NFT's old policy,
    AWM's policy before the epoch."""
    clip = 1 if method == "awm" else 5
    centred = REWARDS.double().view(3, 4) - REWARDS.double().view(3, 4).mean(1, keepdim=True)
    centred[2] = 0
    adv = (centred.flatten() / REWARDS.double().std(correction=0)).clamp(-clip, clip) / clip
    base = {name: torch.zeros_like(value) for name, value in lora.items()}
    moment = t.double().view(-1, 1, 1, 1)

    def at(picture):
        """(what v is to be, v, v_ref, x_t, a caller of the model) for these pictures at the rows' moments."""
        xt, text = (1 - moment) * x0[picture] + moment * noise, [prompts[i] for i in picture]
        return noise - x0[picture], plain(lora, xt, t, text), plain(base, xt, t, text), xt, text

    def compared(v, v_ref):
        ratio = v.flatten(1).norm(dim=1) / v_ref.flatten(1).norm(dim=1)
        if lam == "auto":
            u = (v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()

            def opposed(g):
                """The loss's gradient at v: without what lengthens, and with an inward pull, where v is too long."""
                outward = (g * u).sum((1, 2, 3)).clamp_max(0)
                pull = 0.3 * g.square().sum((1, 2, 3)).sqrt() - outward
                return g + (pull * (ratio.detach() > 1.01)).view(-1, 1, 1, 1) * u
            v.register_hook(opposed)
        return {"norm_ratio": ratio, "guard": (ratio - 1.01).clamp_min(0), "kl": mean((v - v_ref) ** 2)}

    if method == "dpo":
        best, worst = torch.tensor([[1, 2, 4, 5, 10, 8], [0, 3, 7, 6, 11, 9]])  # of equal rewards, the first is better
        error, sides = [], []
        for picture in (best[which], worst[which]):
            target, v, v_ref, _, _ = at(picture)
            error.append(mean((v - target) ** 2) - mean((v_ref - target) ** 2))
            sides.append(compared(v, v_ref))
        rows = {name: (sides[0][name] + sides[1][name]) / 2 for name in sides[0]}
        rows["ratios"] = torch.cat([side["norm_ratio"] for side in sides])
        rows["differ"] = (which != 3) & (which < 4)  # not the second prompt's middle pair, nor the third's
        rows["margin"] = -15 * (error[0] - error[1])
        rows["base_loss"] = torch.where(rows["differ"], 2 / 30 * torch.log(1 + torch.exp(-rows["margin"])), 0)
    else:
        target, v, v_ref, xt, text = at(which)
        v_old = plain(old, xt, t, text).detach()
        rows = compared(v, v_ref)
        rows["ratios"] = rows["norm_ratio"]
    if method == "awm":
        log_p, log_p_old = (-t.double() / 0.3 * (mean((x - target) ** 2) + 1e-10) ** 0.3 for x in (v, v_old))
        rows["likelihood"], a = torch.exp(log_p - log_p_old), adv[which]
        rows["base_loss"] = torch.maximum(-a * rows["likelihood"], -a * rows["likelihood"].clamp(0, 2))
    if method == "nft":
        rows["old_distance"], rows["base_loss"] = mean((v - v_old) ** 2), 0
        for sign, share in ((1, 0.5 + adv[which] / 2), (-1, 0.5 - adv[which] / 2)):
            off = xt - moment * (v_old + sign * (v - v_old)).detach() - x0[which]
            moving = xt - moment * ((1 - sign) * v_old + sign * v) - x0[which]
            rows["base_loss"] = rows["base_loss"] + share * mean(moving**2) / mean(off.abs())
    return rows | {"loss": rows["base_loss"] + (0 if lam == "auto" else lam) * rows["guard"] + kl * rows["kl"]}


def share_above(values, limit: float):
    """Of values above a limit; those that rounding may take across count as either."""
    undecided = ((values - limit).abs() < 1e-4).double().mean().item()
    return pytest.approx((values > limit).double().mean().item(), abs=undecided + 1e-6)


def check_line(line: dict, rows: dict, t):
    """A line of the log against an update's rows."""
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
    """Of two sets of tensors of the same names, relative to the second."""
    off = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return math.sqrt(off / sum(value.square().sum() for value in theirs.values()))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("lam, batch, checkpointing", [
    (0.7, 5, False),
    (0.0, 64, True),
    ("auto", 5, False),
])
def test_updates_are_the_methods(tmp_path, monkeypatch, script, lam, batch, checkpointing):
    """Every update's gradient, before and after clipping, is that of the paper's loss plus lam times the hinge, or
    opposed at the velocities; in micro-batches or at once, with gradient checkpointing or without; and the log's
    numbers are that update's."""
    method, plain = script.__name__.removeprefix("train_"), Plain()
    steps, x0 = recorded_run(script, tmp_path, monkeypatch, lam=lam, batch=batch, checkpointing=checkpointing)
    order = torch.randperm(48, generator=generator(5, 0, 0))
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    lines, guarded = metrics(tmp_path), 0
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    for k, record in enumerate(steps[:-1]):
        epoch, u = divmod(k, 2)
        which, t, noise = rows_of(method, epoch, plain.sigmas, lam == "auto")
        part = slice(u * len(t) // 2, (u + 1) * len(t) // 2)
        prompts = [captions[order[3 * epoch + i // 4]] for i in range(12)]
        lora = {name: value.clone().requires_grad_() for name, value in record["lora"].items()}
        old = steps[2 * epoch]["lora"]  # AWM's; with these old_decay NFT's is half of the way behind in epoch 1
        if method == "nft" and epoch == 1:
            old = {name: 0.2 * steps[0]["lora"][name] + 0.8 * value for name, value in old.items()}
        rows = update_rows(method, plain, lora, old, x0, prompts, which[part], t[part], noise[part], lam, 0.2)
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
    """From the script's own gradients: AdamW, the average of --ema and NFT's old policy, in float64."""
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
    kept = {f"{name.removeprefix('transformer.').removesuffix('.weight')}.default.weight": value.double()
            for name, value in kept.items()}
    assert distance(kept, average) < 1e-5 and distance(average, lora) > 1e-2
    if script is train_nft:
        saved = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["old"]
        saved = dict(zip(old, (value.double() for value in saved)))
        assert distance(saved, old) < 1e-5 and distance(old, lora) > 1e-2


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("guidance, lora", [
    (1.0, False),
    (3.0, True),
])
def test_sample_is_plain_diffusers(run, tmp_path, guidance, lora):
    args = sample.Args(n=1, prompts="tiny/eval_prompts.txt", steps=6, guidance=guidance,
                       lora=str(run / "lora") if lora else None, seed=5, batch=5, out=str(tmp_path),
                       reward="tiny/pickscore")
    sample.main(args)
    pipe = StableDiffusion3Pipeline.from_pretrained("tiny/sd3", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(run / "lora")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(math.isfinite(row["reward"]) for row in rows)
    for row in rows[:4]:
        theirs = pipe(row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"]).images[0]
        assert np.abs(pixels(tmp_path / row["file"]) - np.asarray(theirs).astype(int)).max() <= 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_flux_trains_and_samples_as_plain_diffusers(tmp_path, script):
    small_run(tmp_path / "run", script, model="tiny/flux", epochs=2)
    args = sample.Args(model="tiny/flux", lora=f"{tmp_path}/run/lora", steps=5, norms=True, out=f"{tmp_path}/out")
    sample.main(args)
    pipe = FluxPipeline.from_pretrained("tiny/flux", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run/lora")
    for row in [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()][:2]:
        theirs = pipe(row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"]).images[0]
        assert np.abs(pixels(tmp_path / "out" / row["file"]) - np.asarray(theirs).astype(int)).max() <= 2
    assert row["pipe"]["guidance_scale"] == 3.5
    assert json.loads((tmp_path / "out/norms.json").read_text())["overall"] != 1


def test_lora_changes_the_picture(run, tmp_path):
    # more pictures than the next sample into that folder has
    sample.main(sample.Args(steps=1, n=2, out=str(tmp_path / "base")))
    for name, lora in (("base", None), ("lora", str(run / "lora"))):
        sample.main(sample.Args(prompt="a red star", steps=4, lora=lora, out=str(tmp_path / name)))
    assert np.abs(pixels(tmp_path / "base/00000.png") - pixels(tmp_path / "lora/00000.png")).max() > 2


def seeded(n: int, first: int = 0) -> list[torch.Generator]:
    """Generators of consecutive seeds."""
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


@torch.no_grad()
def test_norms_and_renorm(run):
    pipe, prompts, n = load_pipeline("tiny/sd3", torch.device("cpu")), world.CAPTIONS[:32], 32
    pipe.load_lora_weights(run / "lora")
    torch.manual_seed(1)
    for name, p in pipe.transformer.named_parameters():
        if "lora_B" in name:
            p.add_(0.03 * torch.randn(p.shape))  # far enough from the base for norms on both sides of it
    encode_prompts(pipe, prompts)
    sigmas, noise = schedule(pipe, 5), draw_noise(pipe, n, seeded(n))
    _, ratios = integrate(pipe, noise, prompts, sigmas, compare=True)
    # the first step by hand: from the same noise, with the LoRA and without it
    v = velocity(pipe, noise, torch.ones(n), prompts)
    pipe.disable_lora()
    v_ref = velocity(pipe, noise, torch.ones(n), prompts)
    pipe.enable_lora()
    r = torch.from_numpy(np.linalg.norm(v.flatten(1), axis=1) / np.linalg.norm(v_ref.flatten(1), axis=1))
    np.testing.assert_allclose(ratios[:, 0], r, rtol=1e-5)
    assert ratios.shape == (n, 5) and (r > 1).any() and (r < 1).any()  # both sides of the cap
    dt = sigmas[1] - sigmas[0]
    matched, _ = integrate(pipe, noise, prompts, sigmas[:2], renorm="match")
    np.testing.assert_allclose(matched, noise + dt * v / r.view(-1, 1, 1, 1), atol=1e-5)
    capped, _ = integrate(pipe, noise, prompts, sigmas[:2], renorm="cap")
    np.testing.assert_allclose(capped, noise + dt * v / r.clamp_min(1).view(-1, 1, 1, 1), atol=1e-5)


@pytest.mark.parametrize("model, guidance", [
    ("tiny/sd3", None),
    ("tiny/sd3", 3.0),
    ("tiny/flux", None),
])
def test_adjoint_is_autograd_through_the_whole_trajectory(model, guidance):
    """dR/ds_k from one graph over all steps, in which every step's velocity is scaled by its own 1 + s_k; in
    float64."""
    pipe, prompts = load_pipeline(model, torch.device("cpu")), ["a red star", "a blue ring"]
    for part in (pipe.transformer, pipe.vae, *pipe.flow.encoders.values()):
        part.double()
    encode_prompts(pipe, prompts, guidance)
    noise, sigmas = draw_noise(pipe, 2, seeded(2, first=1)).double(), schedule(pipe, 4).double()
    rewards = [lambda images, _: images[:, 0].double().mean((1, 2)),
               lambda images, _: images.double().square().mean((1, 2, 3))]
    pipe.transformer.enable_gradient_checkpointing()  # as on a GPU
    ours = sample.adjoint(pipe, noise, prompts, sigmas, rewards, guidance=guidance, batch=2)
    pipe.transformer.disable_gradient_checkpointing()
    s, x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), noise
    for k in range(4):
        v = velocity(pipe, x, sigmas[k].expand(2), prompts, guidance)
        x = x + (sigmas[k + 1] - sigmas[k]) * (1 + s[:, k].view(2, *[1] * (x.ndim - 1))) * v
    pictures = decode_batch(pipe, x)
    for reward, mine in zip(rewards, ours):
        whole = torch.autograd.grad(reward(pictures, prompts).sum(), s, retain_graph=True)[0]
        assert whole.abs().max() > 1e-3
        np.testing.assert_allclose(mine, whole, rtol=1e-3, atol=1e-5 * whole.abs().max().item())


def test_adjoint_writes_what_it_says(tmp_path, capsys):
    args = sample.Args(adjoint=True, reward="tiny/pickscore", steps=3, prompt="a red star", n=6, out=str(tmp_path))
    sample.main(args)
    said = json.loads((tmp_path / "adjoint.json").read_text())
    assert set(said) == {"t", "n", "units", "tiny/pickscore", "energy (control)"}
    assert said["n"] == said["units"] == 6
    assert (tmp_path / "adjoint.png").exists()
    control = said["energy (control)"]
    np.testing.assert_allclose(control["t_statistic"], np.divide(control["mean"], control["std"]) * 6**0.5)
    assert all(0 <= share <= 1 for share in control["same_sign"]) and -1 <= control["half_batch_cosine"] <= 1
    s = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    prompts = ["a", "a", "b", "b", "c", "c"]  # three prompts: three independent means
    sample.write_adjoint(tmp_path, torch.linspace(1, 0, 4), {"r": s}, prompts)
    said, means = json.loads((tmp_path / "adjoint.json").read_text()), s.numpy().reshape(3, 2, 3).mean(1)
    np.testing.assert_allclose(said["r"]["t_statistic"], means.mean(0) / (means.std(0, ddof=1) / 3**0.5))
    halves = means[::2].mean(0), means[1]
    cosine = np.dot(*halves) / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
    assert said["r"]["half_batch_cosine"] == pytest.approx(cosine)
    refuses(capsys, lambda: sample.main(sample.Args(adjoint=True, out=str(tmp_path / "x"))), "--adjoint", "--reward")


@pytest.mark.parametrize("size", [64, 224, 512])
def test_differentiable_rewards_are_the_rewards(size):
    """torch's bicubic against PIL's, for pictures smaller than, as large as and larger than what the network takes."""
    drawn = world.render(world.scene(torch.arange(8), torch.Generator().manual_seed(1)))
    pictures = torch.nn.functional.interpolate(drawn, size, mode="bicubic").clamp(0, 1)
    ours, theirs = (
        flow.rewards.load_reward("tiny/pickscore", torch.device("cpu"), differentiable=d)(pictures, world.CAPTIONS[:8])
        for d in (True, False)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.01)
    mean, std = flow.rewards.OPENAI_CLIP_MEAN, flow.rewards.OPENAI_CLIP_STD
    for picture in pictures[:2]:
        pil = flow.rewards.hps_pixels(picture)
        own = flow.rewards.torch_pixels(picture[None], 224, mean, std)[0]
        assert (pil - own).abs().mean() < 0.02  # both in standard deviations: half a level of 255


def test_schedule_is_the_pipelines_own():
    """FlowMatchEulerDiscreteScheduler shifts twice with shift = 3: its sigma_min is shifted, then the even schedule
    down to it."""
    def shift(s):
        return 3 * s / (1 + 2 * s)
    expected = np.append(shift(np.linspace(1, shift(0.001), 8)), 0)
    np.testing.assert_allclose(schedule(load_pipeline("tiny/sd3", torch.device("cpu")), 8), expected, atol=1e-6)


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux"])
def test_dpo_trains_at_the_schedulers_own_levels(model):
    """As officially: the levels and timesteps that the scheduler is made with, shifted once (sd3) or not at all (flux,
    whose shift depends on the size); and it is these timesteps that the transformer is told."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    pipe = load_pipeline(model, torch.device("cpu"))
    levels = training_levels(pipe)
    assert torch.equal(levels, scheduler.sigmas) and len(levels) == 1000
    assert levels[-1].item() == pytest.approx(0.003 / 1.002 if model == "tiny/sd3" else 0.001)
    for k in (0, 1, 500, 998, 999):
        told = timestep_inputs(pipe, levels[k].item())["timestep"].item()
        assert told * (1000 if model == "tiny/flux" else 1) == pytest.approx(scheduler.timesteps[k].item(), rel=1e-6)


# ---------------------------------------------------------------- rewards and distances

def test_pickscore_formula():
    from transformers import CLIPModel, CLIPTokenizer
    pictures = world.render(world.scene(torch.arange(4), torch.Generator().manual_seed(0)))
    prompts = world.CAPTIONS[:2] + world.CAPTIONS[40:42]
    clip = CLIPModel.from_pretrained("tiny/pickscore", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained("tiny/pickscore")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        image = clip.get_image_features(((pictures * 255).round() / 255 - mean) / std).pooler_output
        words = clip.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output
    image, words = image.numpy().astype(np.float64), words.numpy().astype(np.float64)
    cosine = (image * words).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(words, axis=1)
    ours = flow.rewards.load_reward("tiny/pickscore", torch.device("cpu"))(pictures, prompts)
    np.testing.assert_allclose(ours.numpy(), cosine * math.exp(clip.logit_scale.item()) / 26, rtol=1e-4)
    assert ours[:2].min() > ours[2:].max()  # renders of the first captions: right ones score above wrong colours


def test_weighted_sum_of_rewards(tmp_path):
    (tmp_path / "two.py").write_text("def a(images, prompts):\n    return images.mean((1, 2, 3))\n"
                                     "def b(images, prompts):\n    return images.amax((1, 2, 3))\n")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weighted = f"{tmp_path}/two.py:a:0.25,{tmp_path}/two.py:b"
    ours = flow.rewards.load_reward(weighted, torch.device("cpu"))(images, ["x"] * 3)
    expected = 0.25 * images.numpy().mean((1, 2, 3)) + images.numpy().max((1, 2, 3))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6)


class OpenClip(torch.nn.Module):
    """open_clip's CLIP of two small towers, written from its checkpoint's layout with torch's own layers."""

    def __init__(self, width, heads, positions, vocabulary=None, patch=14, out=16):
        super().__init__()
        self.class_embedding = torch.nn.Parameter(torch.randn(width)) if vocabulary is None else None
        self.positional_embedding = torch.nn.Parameter(0.3 * torch.randn(positions, width))
        self.proj = torch.nn.Parameter(torch.randn(width, out) / width**0.5)
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False) if vocabulary is None else None
        self.token_embedding = None if vocabulary is None else torch.nn.Embedding(vocabulary, width)
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width) if vocabulary is None else None, torch.nn.LayerNorm(width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({
                "ln_1": torch.nn.LayerNorm(width),
                "attn": torch.nn.MultiheadAttention(width, heads, batch_first=True),
                "ln_2": torch.nn.LayerNorm(width),
                "mlp": torch.nn.ModuleDict({
                    "c_fc": torch.nn.Linear(width, 4 * width),
                    "c_proj": torch.nn.Linear(4 * width, width),
                }),
            })
            for _ in range(2)
        )
        for p in self.parameters():
            p.data += 0.1 * torch.randn_like(p)

    def forward(self, x):
        if self.conv1 is not None:
            x = self.conv1(x).flatten(2).mT
            x = self.ln_pre(torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding)
            last, mask = 0, None
        else:
            last, x = x.argmax(1), self.token_embedding(x) + self.positional_embedding[:x.shape[1]]
            mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        for block in self.blocks:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + block["mlp"]["c_proj"](torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return torch.nn.functional.normalize(self.ln_post(x[torch.arange(len(x)), last]) @ self.proj, dim=1)


@torch.no_grad()
def test_hps_checkpoint_layout():
    """Agreement with open_clip 3.3.0's own model was checked the same way, outside: 6e-16 in float64."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    image, words = OpenClip(32, 2, 5), OpenClip(24, 3, 8, vocabulary=50)
    state = {f"visual.{k.replace('blocks.', 'transformer.resblocks.')}": v for k, v in image.state_dict().items()}
    state["logit_scale"] = torch.tensor(2.0)
    for k, v in words.state_dict().items():
        renamed = k.replace("blocks.", "transformer.resblocks.").replace("ln_post", "ln_final")
        state[{"proj": "text_projection"}.get(k, renamed)] = v
    shared = dict(num_hidden_layers=2, hidden_act="gelu")
    vision = dict(hidden_size=32, intermediate_size=128, num_attention_heads=2, image_size=28, patch_size=14, **shared)
    text = dict(hidden_size=24, intermediate_size=96, num_attention_heads=3, max_position_embeddings=8,
                vocab_size=50, eos_token_id=49, **shared)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    clip.load_state_dict(flow.rewards.from_open_clip(state))
    pixels = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    ids = torch.tensor([[48, 3, 7, 49, 0], [48, 1, 49, 0, 0], [48, 1, 2, 3, 49]])
    out = clip.double()(pixel_values=pixels, input_ids=ids)
    np.testing.assert_allclose(out.image_embeds, image.double()(pixels), atol=1e-12)
    np.testing.assert_allclose(out.text_embeds, words.double()(ids), atol=1e-12)
    assert clip.logit_scale == 2
    with torch.device("meta"):
        published = CLIPModel(CLIPConfig(**flow.rewards.VIT_H_CONFIG))
    assert sum(p.numel() for p in published.parameters()) == 986_109_441  # open_clip's ViT-H-14


def test_hps_pixels():
    """Longest side to 224, the rest zero (black) before normalisation, as HPSv2's own ResizeMaxSize."""
    x = flow.rewards.hps_pixels(torch.ones(3, 32, 64))
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    black, white = (np.subtract(v, mean) / std for v in (0, 1))
    assert x.shape == (3, 224, 224)
    np.testing.assert_allclose(x[:, :56].amax((1, 2)), black, rtol=1e-5)
    np.testing.assert_allclose(x[:, 168:].amax((1, 2)), black, rtol=1e-5)
    np.testing.assert_allclose(x[:, 56:168].amin((1, 2)), white, rtol=1e-5)


def test_the_two_proxies_differ():
    """Both follow the caption; one is blind to a dimmed or blurred picture, the other was tuned on preferences and is
    not."""
    pictures = world.render(world.scene(torch.arange(64), torch.Generator().manual_seed(5)))
    dim = 0.65 * pictures
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pictures, 4), 64, mode="bilinear")
    pick, hps = (flow.rewards.load_reward(f"tiny/{name}", torch.device("cpu")) for name in ("pickscore", "hps"))
    for reward in (pick, hps):
        mismatched = reward(pictures, world.CAPTIONS[9:] + world.CAPTIONS[:9])
        assert reward(pictures, world.CAPTIONS).mean() > mismatched.mean() + 0.7
    for worse in (dim, blurred):
        assert (pick(pictures, world.CAPTIONS) - pick(worse, world.CAPTIONS)).mean().abs() < 0.05
        assert (hps(pictures, world.CAPTIONS) - hps(worse, world.CAPTIONS)).mean() > 0.15


def test_reward_from_a_function(tmp_path):
    (tmp_path / "red.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2)) + len(prompts)\n")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = flow.rewards.load_reward(f"{tmp_path}/red.py:red", torch.device("cpu"), batch=2)(images, ["a"] * 3)
    np.testing.assert_allclose(ours.numpy(), images[:, 0].numpy().reshape(3, -1).mean(1) + [2, 2, 1], rtol=1e-6)


def test_a_reward_cannot_change_pictures_that_others_see(tmp_path):
    """It may write into its own copy: neither the next part of a sum nor the file that is saved shows it."""
    (tmp_path / "rude.py").write_text("def rude(images, prompts):\n    images.mul_(255)\n    prompts.clear()\n"
                                      "    return images.mean((1, 2, 3))\n"
                                      "def after(images, prompts):\n    return images.amax((1, 2, 3)) + len(prompts)\n")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    spec = f"{tmp_path}/rude.py:rude,{tmp_path}/rude.py:after"
    scores = flow.rewards.load_reward(spec, torch.device("cpu")).scores_of(images, ["a"] * 3)
    torch.testing.assert_close(scores, torch.stack([255 * before.mean((1, 2, 3)), before.amax((1, 2, 3)) + 3]))
    assert torch.equal(images, before)
    for name, reward in (("plain", None), ("rude", f"{tmp_path}/rude.py:rude")):
        sample.main(sample.Args(prompt="a red star", steps=2, reward=reward, out=str(tmp_path / name)))
    assert (tmp_path / "plain/00000.png").read_bytes() == (tmp_path / "rude/00000.png").read_bytes()


@pytest.mark.parametrize("size", [None, 32])
def test_a_reward_is_tried_on_pictures_like_the_runs(tmp_path, size):
    """Of the run's size, and not all of one colour."""
    (tmp_path / "picky.py").write_text(f"def picky(images, prompts):\n    assert images.shape[1:] == (3, {size or 64}, "
                                       f"{size or 64})\n    return images.std((1, 2, 3)) / images.mean((1, 2, 3))\n")
    small_run(tmp_path / "run", reward=f"{tmp_path}/picky.py:picky", size=size, epochs=1, eval_every=0)


def test_a_siglip_reward_does_not_depend_on_the_other_prompts(tmp_path):
    """SigLIP sees padding: each prompt is padded to the same length, whatever stands beside it."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

    from tests.families import fast_tokenizer, vocab_size
    torch.manual_seed(0)
    shared = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(shared, vocab_size=vocab_size(), max_position_embeddings=16, projection_size=16)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(shared, image_size=32, patch_size=8))).eval()
    processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), fast_tokenizer(length=16))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures, prompts = torch.rand(2, 3, 32, 32), ["a red star", "a red ring and a blue heart and a green moon"]
    pictures = (pictures * 255).round() / 255
    load = functools.partial(flow.rewards.load_reward, str(tmp_path), torch.device("cpu"))
    together = load()(pictures, prompts)
    alone = torch.cat([load()(pictures[i:i + 1], prompts[i:i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    ids = processor.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(pixel_values=2 * pictures - 1, input_ids=ids)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds) * model.logit_scale.exp() / 26
    torch.testing.assert_close(together, cosine.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(load(differentiable=True)(pictures, prompts), cosine.detach(), rtol=1e-4, atol=1e-6)


def test_a_reward_that_cannot_teach_is_told(tmp_path, capsys):
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return images.new_ones(len(images))\n")
    small_run(tmp_path / "run", reward=f"{tmp_path}/flat.py:flat", epochs=1, eval_every=0)
    assert "note: epoch 0: all pictures of a prompt have the same reward (1, ...)" in capsys.readouterr().out


def test_frechet_distance_of_known_gaussians():
    g = np.random.default_rng(0)
    a = g.normal(size=(4000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # zero mean and unit covariance, exactly
    b = a * [1, 2, 3] + [0, 0, 2]
    ours = eval_judge.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert ours == pytest.approx(2**2 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-9)  # |dm|^2 + sum (s1 - s2)^2
    turn, _ = np.linalg.qr(g.normal(size=(3, 3)))
    turned = eval_judge.frechet_distance(torch.from_numpy(a @ turn), torch.from_numpy(b @ turn))
    assert turned == pytest.approx(ours, rel=1e-9)


def test_world_is_deterministic_and_split():
    f = [world.scene(torch.arange(64), torch.Generator().manual_seed(3)) for _ in range(2)]
    a, b = (world.render(x) for x in f)
    assert torch.equal(a, b) and a.shape == (64, 3, 64, 64) and 0 <= a.min() and a.max() <= 1
    rl, held_out = (Path(p).read_text().splitlines() for p in ("tiny/prompts.txt", "tiny/eval_prompts.txt"))
    assert not set(rl) & set(held_out) and set(rl) | set(held_out) == set(world.CAPTIONS)
    assert (len(rl), len(held_out)) == (48, 16)


# ---------------------------------------------------------------- training

@pytest.mark.parametrize("script", SCRIPTS)
def test_run_writes_what_it_says(runs, script):
    run = runs[script]
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


def test_killed_runs_resume_bit_for_bit(run, tmp_path, capsys):
    flags = {**SMALL, "save_every": 1, "out": tmp_path / "run"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    command = [sys.executable, "train_awm.py", *flags]
    code = (f"import torch, runpy, sys; torch.set_num_threads({torch.get_num_threads()}); sys.argv = {command[1:]!r}; "
            "runpy.run_path('train_awm.py', run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 7):  # within epoch 3
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert lora_bytes(tmp_path / "run") != lora_bytes(run)
    small_run(tmp_path / "run")
    assert "resumed at epoch" in capsys.readouterr().out
    assert lora_bytes(tmp_path / "run") == lora_bytes(run)
    assert timeless(tmp_path / "run") == timeless(run)


def test_a_save_cut_short_anywhere_resumes_bit_for_bit(tmp_path, monkeypatch):
    """save_checkpoint fails at each of its own steps in turn, at the end of some epoch; the next start goes on."""
    flags = dict(epochs=2, group=2, updates=1, steps=2, eval_every=0, save_every=1)
    whole = lora_bytes(small_run(tmp_path / "whole", **flags))
    for module, name in ((flow.checkpoint, "save_lora"), (flow.checkpoint, "plot_curves"), (torch, "save")):
        honest, calls = getattr(module, name), []

        def cut(*args, **kwargs):
            calls.append(None)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return honest(*args, **kwargs)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, cut)
            small_run(tmp_path / name, **flags)
        assert lora_bytes(small_run(tmp_path / name, **flags)) == whole


@pytest.mark.parametrize("script", [train_nft, train_dpo])
def test_the_twins_resume_bit_for_bit(runs, tmp_path, monkeypatch, capsys, script):
    honest, calls = torch.save, []

    def cut(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", cut)
        small_run(tmp_path, script, save_every=1)
    assert lora_bytes(small_run(tmp_path, script)) == lora_bytes(runs[script])
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert timeless(tmp_path) == timeless(runs[script])


@pytest.mark.parametrize("pairs, each", [
    (None, 2),  # half of the group, where four do not fit
    (1, 1),
])
def test_dpo_takes_a_small_group(tmp_path, monkeypatch, pairs, each):
    rows, honest = [], train_dpo.dpo_loss

    def counted(v_w, *others, **named):
        rows.append(len(v_w))
        return honest(v_w, *others, **named)
    monkeypatch.setattr(train_dpo, "dpo_loss", counted)
    flags = dict(group=4, groups=2, updates=1, pairs=pairs, epochs=1, eval_every=0)
    (line,) = metrics(small_run(tmp_path / "run", train_dpo, **flags))
    assert line["loss"] > 0 and sum(rows) == 2 * each * SMALL["timesteps"]


def test_finished_run_says_so(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        small_run(run)
    assert end.value.code == 0 and "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_lam_0_no_guard_has_a_say(tmp_path, monkeypatch, script):
    """To the bit, whatever the guard is."""
    short = dict(epochs=1, groups=1, steps=2, eval_every=0)
    zero = lora_bytes(small_run(tmp_path / "zero", script, lam=0.0, **short))
    monkeypatch.setattr(script, "norm_hinge", lambda v, v_ref, margin: 1e3 * v.flatten(1).sum(1))
    assert lora_bytes(small_run(tmp_path / "other", script, lam=0.0, **short)) == zero


@pytest.mark.parametrize("script", SCRIPTS)
def test_lam_auto_knows_no_scale_and_resumes_bit_for_bit(tmp_path, monkeypatch, script):
    """base_loss times 1024, which rounds nothing, and interrupted: but for Adam's epsilon, the clipping and the KL, the
    same run."""
    name = script.__name__.replace("train_", "") + "_loss"
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-30))
    flags = small(script, lam="auto", eval_every=0, kl=0.0, max_grad_norm=1e9, lr=1e-2)
    one = small_run(tmp_path / "one", script, **flags | dict(epochs=2))
    honest = getattr(script, name)
    monkeypatch.setattr(script, name, lambda *args: 1024 * honest(*args))
    for epochs in (1, 2):
        other = small_run(tmp_path / "other", script, **flags | dict(epochs=epochs))
    assert lora_bytes(one) == lora_bytes(other)
    steps, scaled = metrics(one), metrics(other)
    assert any(line["active"] > 0 for line in steps) and len(steps) == len(scaled) == 4
    for a, b in zip(steps, scaled):
        assert a["loss"] == a["base_loss"] == pytest.approx(b["loss"] / 1024, rel=1e-6)
        assert (a["guard"], a["norm_ratio"], a["active"]) == (b["guard"], b["norm_ratio"], b["active"])


def test_evaluations_have_steps_and_batches_of_their_own(tmp_path):
    """--eval-steps is theirs; --batch and --rollout-batch change nothing but rounding, as far as no step is taken."""
    few, many = (metrics(small_run(tmp_path / f"{n}", epochs=1, eval_every=1, eval_steps=3, rollout_batch=n, batch=b))
                 for n, b in ((2, 4), (64, 32)))
    assert [len(line["eval_norm_ratio_steps"]) for line in few if "eval_reward" in line] == [3, 3]
    for a, b in zip(few[:2], many):  # the first evaluation and the first update; after its step rounding may grow
        assert {k: v for k, v in a.items() if isinstance(v, float) and k != "img_per_s"} == pytest.approx(
            {k: v for k, v in b.items() if isinstance(v, float) and k != "img_per_s"}, rel=1e-3, abs=1e-6)


def test_dpo_with_lam_auto_also_trains_where_sampling_goes(tmp_path, monkeypatch):
    moments, honest = [], train_dpo.add_noise

    def capture(x0, noise, t):
        moments.append(t[:len(t) // 2])
        return honest(x0, noise, t)
    monkeypatch.setattr(train_dpo, "add_noise", capture)
    for lam in (0.05, "auto"):
        small_run(tmp_path / str(lam), train_dpo, lam=lam, groups=4, updates=1, timesteps=2, epochs=1, batch=64,
                  eval_every=0)
    plain, auto = moments
    changed = plain != auto
    assert len(plain) == 16 and set(changed.nonzero().flatten().tolist()) == {0, 8}
    pipe = load_pipeline("tiny/sd3", torch.device("cpu"))
    assert all(t in schedule(pipe, SMALL["steps"])[:-1] for t in auto[changed])


@pytest.mark.parametrize("script", [train_nft, train_awm])
def test_no_reference_forward_is_paid_when_none_is_needed(tmp_path, monkeypatch, script):
    def refuse(model):
        raise AssertionError("a reference forward was paid")
    monkeypatch.setattr(script, "reference", refuse)
    monkeypatch.setattr(flow.pipeline, "reference", refuse)
    lines = metrics(small_run(tmp_path, script, lam=0.0, kl=0.0, eval_every=0, epochs=1))
    assert [line["norm_ratio"] for line in lines] == [None, None]


SHORT = dict(group=8, groups=2, updates=1, batch=32, rank=8, steps=4, timesteps=2, eval_n=16, epochs=3, eval_every=3,
             lr=8e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_raises_a_reward_it_can_raise(tmp_path, script):
    """Brightness: the sign of the advantage, its pairing with rows, the noising and the accumulation all count."""
    (tmp_path / "bright.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    out = small_run(tmp_path / "run", script, reward=f"{tmp_path}/bright.py:bright", lam=0.0, **SHORT)
    first, *_, last = metrics(out)
    assert last["eval_reward"] - first["eval_reward"] > 3 * first["eval_reward_se"]


def test_guard_holds_the_norm(tmp_path):
    """A reward that inflates the norm (contrast): with the guard the norm ends lower, and at most at the
    reference's."""
    (tmp_path / "contrast.py").write_text("def contrast(images, prompts):\n    return images.std((1, 2, 3))\n")
    ratio = {}
    for lam in (0.0, 1.0):
        out = small_run(tmp_path / str(lam), lam=lam, reward=f"{tmp_path}/contrast.py:contrast", **SHORT)
        ratio[lam] = metrics(out)[-1]["eval_norm_ratio"]
    assert ratio[0.0] > 1.02 and ratio[1.0] < 1.01


def test_nonfinite_steps_are_skipped_and_ten_stop_the_run(tmp_path, monkeypatch, capsys):
    honest, calls = train_awm.awm_loss, []

    def broken(*args):
        calls.append(None)
        return honest(*args) * (float("nan") if len(calls) > 2 else 1)  # the first epoch is sound
    monkeypatch.setattr(train_awm, "awm_loss", broken)
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        small_run(tmp_path / "run", epochs=9, eval_every=0, batch=64)
    assert end.value.code == 2 and "ten steps" in capsys.readouterr().err
    lines = metrics(tmp_path / "run")
    assert lines[-1]["skipped"] == 10 and lines[-1]["loss"] is None and len(lines) == 12
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in state["lora"].values()) and state["bad"] == 2 * (state["epoch"] - 1)


# ---------------------------------------------------------------- bad input: one line, exit code 2, nothing overwritten

def refuses(capsys, call, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        call()
    printed = capsys.readouterr().err.splitlines()
    error = [line for line in printed if line.strip() and "%|" not in line]  # without progress bars
    assert end.value.code == 2 and len(error) == 1, error
    for word in words:
        assert word in error[0], error[0]


def test_checkpoint_of_another_run_and_broken_checkpoint(run, tmp_path, capsys):
    import shutil
    copy = shutil.copytree(run, tmp_path / "run")

    def files():
        return {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    before = files()
    refuses(capsys, lambda: small_run(copy, lr=1e-5, group=6), "--lr", "--group", "0.002", "1e-05")
    assert before == files()
    (copy / "checkpoint" / "state.pt").write_bytes(before[copy / "checkpoint" / "state.pt"][:1000])
    before = files()
    refuses(capsys, lambda: small_run(copy), "state.pt")
    assert before == files()
    (copy / "checkpoint" / "state.pt").unlink()  # killed before its first checkpoint: still not another run's folder
    refuses(capsys, lambda: small_run(copy, lr=1e-5), "--lr")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "samples.jsonl").touch()  # sample.py's
    refuses(capsys, lambda: small_run(pictures), "samples.jsonl", "another --out")
    assert [path.name for path in pictures.iterdir()] == ["samples.jsonl"]


def test_a_model_that_cannot_be_downloaded(monkeypatch, tmp_path, capsys):
    """A hub id without network and without a cache: what to accept or download, and how to point the flag to a
    folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for flag, call, name in [
        ("--model", lambda n: load_pipeline(n, torch.device("cpu")), "stabilityai/stable-diffusion-3.5-medium"),
        ("--embed", lambda n: eval_judge.load_embed(n, torch.device("cpu")), "facebook/dinov2-base"),
    ]:
        refuses(capsys, lambda: call(name),
                f"{flag} {name}", "licence", f"hf download {name} --local-dir DIR", f"{flag} DIR")
    for name, needs in (
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("hpsv2.1", "xswu/HPSv2"),
        ("clipscore", "openai/clip-vit-large-patch14"),
    ):
        refuses(capsys, lambda: flow.rewards.load_reward(name, torch.device("cpu")),
                f"--reward {name}", needs, "HF_HOME")


# ---------------------------------------------------------------- comparing folders

@pytest.fixture(scope="session")
def folders(run, tmp_path_factory) -> tuple[str, str]:
    """16 pictures of the base and of a trained LoRA, same prompts and noise."""
    os.chdir(ROOT)
    root = tmp_path_factory.mktemp("folders")
    # more pictures than the next sample into that folder has
    sample.main(sample.Args(steps=1, n=2, out=str(root / "base")))
    for name, lora in (("base", None), ("lora", str(run / "lora"))):
        sample.main(sample.Args(steps=4, lora=lora, out=str(root / name), reward="tiny/pickscore"))
    return f"{root}/base", f"{root}/lora"


def compare(*dirs, out, **changes) -> dict:
    args = {"dirs": dirs, "forensic": (), "judge": None, "judge_model": "tiny", "out": str(out), **changes}
    eval_judge.main(eval_judge.Args(**args))
    return json.loads((Path(out) / "report.json").read_text())


def renders(folder, n=16, flaw=None, strength=0.0, seed=3) -> str:
    """A folder of renders as sample.py would write it, flawed at that strength."""
    index = torch.arange(n) * 7 % 64
    pictures = world.render(world.scene(index, torch.Generator().manual_seed(seed)))
    if flaw:
        pictures = world.degrade(pictures, flaw, torch.full((n,), strength), torch.Generator().manual_seed(seed + 1))
    flow.pictures.save_samples(str(folder), pictures, [{"prompt": world.CAPTIONS[i], "seed": seed} for i in index])
    return str(folder)


def test_eval_judge_compares_folders(folders, tmp_path, capsys):
    base, lora = folders
    report = compare(base, lora, real=base, forensic=("tiny/forensic",), judge="tiny/judge", out=tmp_path / "report")
    assert sorted(p.name for p in Path(base).glob("0*.png")) == [f"{i:05d}.png" for i in range(16)]
    rows = [json.loads(line)["reward"] for line in (Path(lora) / "samples.jsonl").read_text().splitlines()]
    mine = report["metrics"]["reward/pickscore"][lora]
    assert mine["mean"] == pytest.approx(np.mean(rows), abs=2e-3) and mine["lo"] < mine["mean"] < mine["hi"]
    assert report["n"] == mine["n"] == 16
    difference = mine["mean"] - report["metrics"]["reward/pickscore"][base]["mean"]
    assert mine["diff"]["mean"] == pytest.approx(difference, abs=1e-6)
    distance = report["metrics"]["fd/embed"]
    assert abs(distance[base]["mean"]) < 1e-3 < distance[lora]["mean"]
    judged = [f"judge/{d}" for d in eval_judge.SINGLE]
    assert set(report["metrics"]) == {"reward/pickscore", "forensic/forensic", "fd/embed", *judged}
    verdict = report["pairs"]["judge/quality"][f"{base} vs {lora}"]
    assert verdict["win"] + verdict["tie"] + verdict["loss"] == 16 and verdict["nan"] == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[0] == f"| metric | {base} | {lora} |"
    assert f"{mine['mean']:.4f} [{mine['lo']:.4f}, {mine['hi']:.4f}]" in table[2]


def test_bootstrap_interval_of_known_coverage():
    """One picture a prompt: the interval is that of the mean, 1.96 standard errors to either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = eval_judge.summary(torch.cat([values, torch.tensor([math.nan])]), [str(i) for i in range(401)], 4000)
    se = values.std().item() / 20
    assert s["n"] == 400 and s["nan"] == 1 and s["mean"] == pytest.approx(values.mean().item())
    np.testing.assert_allclose([s["mean"] - s["lo"], s["hi"] - s["mean"]], 1.96 * se, rtol=0.1)
    two = eval_judge.summary(values, ["a"] * 200 + ["b"] * 200, 4000)  # two prompts: the interval spans their means
    assert sorted([values[:200].mean().item(), values[200:].mean().item()]) == pytest.approx([two["lo"], two["hi"]])
    # mean and interval weigh pictures alike
    uneven = eval_judge.summary(torch.tensor([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"], 4000)
    assert (uneven["mean"], uneven["lo"], uneven["hi"]) == pytest.approx((0.9, 0.0, 1.0))
    one = eval_judge.summary(values, ["a"] * 400, 4000)  # one prompt: over its pictures
    np.testing.assert_allclose([one["mean"] - one["lo"], one["hi"] - one["mean"]], 1.96 * se, rtol=0.1)


@pytest.mark.parametrize("flaw", world.FLAWS)
def test_judge_prefers_the_clean_picture(tmp_path, flaw):
    dirs = [renders(tmp_path / "clean", n=8)] + [renders(tmp_path / f"{s}", 8, flaw, s) for s in (0.35, 0.7, 1.0)]
    report = compare(*dirs, judge="tiny/judge", reward=(), out=tmp_path / "report")
    pairs = report["pairs"]["judge/quality"]
    assert all(pairs[f"{dirs[0]} vs {d}"]["win"] == 8 for d in dirs[2:])
    margins = [pairs[f"{dirs[0]} vs {d}"]["margin"] for d in dirs[1:]]
    assert 0 < margins[0] < margins[1] < margins[2]
    assert all(pairs[f"{a} vs {b}"]["rate"] >= 0.75 for a, b in zip(dirs[1:], dirs[2:]))  # the weaker flaw is preferred
    overall = [report["metrics"]["judge/overall"][d]["mean"] for d in dirs]
    assert overall[0] > 0.7 and max(overall[2:]) < 0.3
    flaws_told_by = {
        "over-sharpening": ["sharpening"],
        "oversaturation": ["saturation"],
        "unnatural lighting": ["light", "contrast"],
    }
    own = next((d for d, flaws in flaws_told_by.items() if flaw in flaws), "artifacts")
    said = [report["metrics"][f"judge/{own}"][d]["mean"] for d in dirs]
    assert said[0] < 0.3 and min(said[2:]) > 0.7


def test_identical_pictures_tie_and_swapped_folders_mirror(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_judge, "SINGLE", {"overall": eval_judge.SINGLE["overall"]})
    base, lora = folders
    import shutil
    copy = str(shutil.copytree(base, tmp_path / "copy"))
    same = compare(base, copy, judge="tiny/judge", out=tmp_path / "same")
    verdict = same["pairs"]["judge/quality"][f"{base} vs {copy}"]
    assert verdict["tie"] == 16 and verdict["rate"] == 0.5 and verdict["margin"] == 0
    there = compare(base, lora, judge="tiny/judge", out=tmp_path / "there")
    back = compare(lora, base, judge="tiny/judge", out=tmp_path / "back")
    one, two = there["pairs"]["judge/quality"][f"{base} vs {lora}"], back["pairs"]["judge/quality"][f"{lora} vs {base}"]
    assert (one["win"], one["tie"], one["loss"], one["margin"]) == (two["loss"], two["tie"], two["win"], -two["margin"])
    assert one["rate"] == pytest.approx(1 - two["rate"], abs=1e-12)
    assert one["lo"] == pytest.approx(1 - two["hi"], abs=1e-12)
    for name in there["metrics"]:
        for d in (base, lora):
            ours, mirrored = ({k: r["metrics"][name][d][k] for k in ("mean", "lo", "hi")} for r in (there, back))
            assert ours == mirrored


def test_read_answer():
    log = math.log
    spellings = [("A", log(0.5)), (" a", log(0.1)), ("B", log(0.2)), ("The", log(0.2))]
    assert flow.judge.read_answer(spellings, "A", "B") == pytest.approx(log(0.6 / 0.2))
    assert flow.judge.read_answer([("YES", log(0.3)), ("No.", log(0.6))], "yes", "no") == pytest.approx(log(0.3 / 0.6))
    # B has what is left at most
    assert flow.judge.read_answer([("A", log(0.9)), ("x", log(0.06))], "A", "B") == pytest.approx(log(0.9 / 0.04))
    # and the last one's at most
    assert flow.judge.read_answer([("A", log(0.5)), ("x", log(0.01))], "A", "B") == pytest.approx(log(0.5 / 0.01))
    # a server that gives a word without probabilities
    assert flow.judge.read_answer([("B", 0.0)], "A", "B") == pytest.approx(log(1e-9))
    for top in ([], [("The", 0.0)], [("A", log(0.002)), ("B", log(0.003)), ("I", log(0.9))]):
        assert math.isnan(flow.judge.read_answer(top, "A", "B"))


@pytest.fixture(scope="session")
def server():
    """An OpenAI-compatible server of tiny/judge. Pictures whose content hash is in `faults` get that fault in place of
    an answer."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Lock, Thread

    from transformers import AutoModelForImageTextToText, AutoProcessor
    os.chdir(ROOT)
    model = AutoModelForImageTextToText.from_pretrained("tiny/judge", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained("tiny/judge")
    faults, asked, lock = {}, [], Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            import base64
            import hashlib
            import io
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (request["temperature"], request["max_tokens"]) == (0, 1)
            assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
            (message,), raw = request["messages"], []
            for part in message["content"]:
                if part["type"] == "image_url":
                    raw.append(base64.b64decode(part.pop("image_url")["url"].removeprefix("data:image/png;base64,")))
                    part |= {"type": "image", "image": Image.open(io.BytesIO(raw[-1])).convert("RGB")}
            asked.append(request["model"])
            fault = next((faults[h] for h in (hashlib.sha256(r).hexdigest() for r in raw) if h in faults), None)
            if fault == "hang":
                time.sleep(2)
                return None
            if fault == "cut":
                return self.connection.close()
            wrong_path = self.path != "/v1/chat/completions"
            wrong_key = self.headers.get("Authorization") == "Bearer wrong"
            if fault == "500" or wrong_path or wrong_key:
                return self.send_error(500 if fault else 404 if wrong_path else 401)
            with lock, torch.no_grad():
                inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True,
                                                       return_dict=True, return_tensors="pt")
                top = model(**inputs).logits[0, -1].log_softmax(0).topk(20)
            likeliest = zip(top.indices.tolist(), top.values.tolist())
            top = [{"token": processor.tokenizer.decode([i]), "logprob": p} for i, p in likeliest]
            if fault == "words":
                top = [{"token": "Well", "logprob": -0.01}]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
            content = {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": logprobs}]}
            body = b"<html>" if fault == "garbage" else b"{}" if fault == "empty" else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the default of 5 drops some of many clients at once for a second

    http = Server(("127.0.0.1", 0), Handler)
    http.daemon_threads = False  # server_close waits for them
    Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", faults, asked
    http.shutdown()
    http.server_close()


def test_judge_over_http_is_the_judge_in_process(folders, server, tmp_path, monkeypatch, capsys):
    url, _, asked = server
    there = compare(*folders, judge=url, judge_model="tiny", out=tmp_path / "http")
    here = compare(*folders, judge="tiny/judge", judge_model="tiny", out=tmp_path / "local")
    for name, verdict in here["pairs"]["judge/quality"].items():
        assert verdict == pytest.approx(there["pairs"]["judge/quality"][name], abs=1e-4)
    for name in here["metrics"]:
        for d in folders:
            assert here["metrics"][name][d]["mean"] == pytest.approx(there["metrics"][name][d]["mean"], abs=1e-4)
    assert set(asked) == {"tiny"}
    before = len(asked)
    again = compare(*folders, judge=url, judge_model="tiny", out=tmp_path / "http")  # all is known
    assert again == there and len(asked) == before
    scores = (tmp_path / "http/scores.jsonl").read_text().splitlines()
    # killed while it wrote
    (tmp_path / "http/scores.jsonl").write_text("\n".join(scores[:-3]) + "\n" + scores[-3][:20])
    for _ in range(2):  # the second time it finds all that the first has added
        assert compare(*folders, judge=url, judge_model="tiny", out=tmp_path / "http") == there
        assert len(asked) == before + 3
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    refuses(capsys, lambda: compare(*folders, judge=url, out=tmp_path / "key"), "--judge", "401", "OPENAI_API_KEY")
    refuses(capsys, lambda: compare(*folders, judge=url[:-3] + "/v2", out=tmp_path / "path"), "--judge", "404")
    refuses(capsys, lambda: compare(*folders, judge="http://127.0.0.1:9/v1", judge_retries=0, out=tmp_path / "port"),
            "--judge", "reached")
    refuses(capsys, lambda: compare(*folders, judge=url, judge_model=None, out=tmp_path / "port"), "--judge-model")


def test_faults_of_the_server_are_counted(folders, server, tmp_path, monkeypatch, capsys):
    url, faults, asked = server
    monkeypatch.setattr(eval_judge, "SINGLE", {"overall": eval_judge.SINGLE["overall"]})
    rows = flow.pictures.read_folder(folders[1])
    try:
        kinds = ("garbage", "empty", "words", "500", "hang", "cut")
        faults.update({row["hash"]: fault for row, fault in zip(rows, kinds)})
        report = compare(*folders, judge=url, judge_retries=0, judge_timeout=1.0, judge_concurrency=4,
                         out=tmp_path / "report")
    finally:
        faults.clear()
    verdict = report["pairs"]["judge/quality"][f"{folders[0]} vs {folders[1]}"]
    assert verdict["nan"] == 6 and verdict["win"] + verdict["tie"] + verdict["loss"] == 10
    for name in eval_judge.SINGLE:
        said = [report["metrics"][f"judge/{name}"][d] for d in folders]
        assert [(m["n"], m["nan"]) for m in said] == [(16, 0), (10, 6)] and 0 <= said[1]["mean"] <= 1
    captured = capsys.readouterr()
    assert captured.out.count("6 of 16 not read") == len(eval_judge.SINGLE) and "500" in captured.err
    before = len(asked)
    whole = compare(*folders, judge=url, out=tmp_path / "report")  # what failed is asked again, and only that
    assert len(asked) == before + 6 + 2 * 6
    assert whole["pairs"]["judge/quality"][f"{folders[0]} vs {folders[1]}"]["nan"] == 0
    assert all(m["nan"] == 0 for scores in whole["metrics"].values() for m in scores.values())


def test_forensic_tells_renders_from_samples(tmp_path):
    """Of a base and of prompts that the detector was not trained on."""
    sample.main(sample.Args(steps=12, n=6, seed=500, out=str(tmp_path / "base")))
    score = eval_judge.load_forensic("tiny/forensic", None, torch.device("cpu"))
    dirs = (renders(tmp_path / "renders", n=96), str(tmp_path / "base"))
    real, drawn = (score([row["file"] for row in flow.pictures.read_folder(folder)]) for folder in dirs)
    auc = (real[:, None] > drawn[None]).float().mean().item()  # P(a render scores above a sample)
    assert auc >= 0.9 and 0 <= min(real.min(), drawn.min()) and max(real.max(), drawn.max()) <= 1


def test_detector_labels(capsys):
    for labels, real in [
        ({0: "artificial", 1: "human"}, [1]),
        ({0: "REAL", 1: "FAKE"}, [0]),
        ({0: "AI-generated image", 1: "Natural image"}, [1]),
        ({0: "Real", 1: "Synthetic", 2: "Deepfake, generated"}, [0]),
    ]:
        assert flow.judge.real_labels("x", labels, None) == real
    assert flow.judge.real_labels("x", {0: "LABEL_0", 1: "LABEL_1"}, "LABEL_1") == [1]
    refuses(capsys, lambda: flow.judge.real_labels("x", {0: "fake", 1: "real"}, "typo"),
            "--real-label typo", "fake, real")
    for labels in (
        {0: "LABEL_0", 1: "LABEL_1"},
        {0: "real", 1: "cat"},
        {0: "ai", 1: "fake"},
        {0: "real fake", 1: "fake"},
    ):
        refuses(capsys, lambda: flow.judge.real_labels("x", labels, None),
                "--forensic x", labels[0], labels[1], "--real-label")


def test_folders_that_do_not_fit(folders, tmp_path, capsys):
    import shutil
    base, lora = folders
    names = iter(range(99))

    def broken(change) -> str:
        """A changed copy of a folder."""
        copy = shutil.copytree(lora, tmp_path / f"copy-{next(names)}")
        change(copy)
        return str(copy)

    def lines(folder, keep):
        jsonl = folder / "samples.jsonl"
        jsonl.write_text("".join(line + "\n" for line in keep(jsonl.read_text().splitlines())))

    for change, word in [
        (lambda d: (d / "00003.png").write_bytes(b"not a picture"), "00003.png"),
        (lambda d: (d / "00004.png").unlink(), "00004.png"),
        (lambda d: (d / "00005.png").write_bytes((d / "00005.png").read_bytes()[:200]), "00005.png"),
        (lambda d: (d / "samples.jsonl").unlink(), "samples.jsonl"),
        (lambda d: (d / "samples.jsonl").write_text("{}\n"), "samples.jsonl"),
        (lambda d: (d / "samples.jsonl").write_text("[1]\n"), "samples.jsonl"),
        (lambda d: (d / "samples.jsonl").write_text('{"prompt": ["a"], "seed": 0, "file": "00000.png"}\n'),
         "samples.jsonl"),
        (lambda d: (d / "samples.jsonl").write_text(""), "no picture"),
        (lambda d: Image.open(d / "00006.png").resize((32, 32)).save(d / "00006.png"), "00006.png"),
        (lambda d: lines(d, lambda rows: [row.replace('"seed": ', '"seed": 9') for row in rows]), "no prompt and seed"),
    ]:
        refuses(capsys, lambda: compare(base, broken(change), out=tmp_path / "report"), word)
    refuses(capsys, lambda: compare(base, base, out=tmp_path / "report"), "twice")
    refuses(capsys, lambda: compare(base, str(tmp_path / "none"), out=tmp_path / "report"), "none", "no such folder")
    refuses(capsys, lambda: compare(out=tmp_path / "report"), "folders")
    single = broken(lambda d: lines(d, lambda rows: rows[:1]))
    refuses(capsys, lambda: compare(base, real=single, out=tmp_path / "report"), "--real", "at least two")
    refuses(capsys, lambda: compare(base, reward=(), out=tmp_path / "report"), "--reward")
    assert not (tmp_path / "report").exists()
    # half of them, in another order: the common ones are compared
    fewer = broken(lambda d: lines(d, lambda rows: rows[::-2]))
    report = compare(base, fewer, out=tmp_path / "report")
    assert report["n"] == 8 and "8 of the 16 pictures in " + base in capsys.readouterr().out
    # the same pictures in another order: each is paired with itself
    turned = broken(lambda d: lines(d, lambda rows: rows[::-1]))
    report = compare(lora, turned, judge="tiny/judge", out=tmp_path / "turned")
    verdict = report["pairs"]["judge/quality"][f"{lora} vs {turned}"]
    diff = report["metrics"]["reward/pickscore"][turned]["diff"]
    assert verdict["tie"] == 16 and verdict["margin"] == 0 and diff == {"mean": 0, "lo": 0, "hi": 0}
    # no interval of a single picture
    single = broken(lambda d: lines(d, lambda rows: rows[:1]))
    one = compare(base, single, judge="tiny/judge", out=tmp_path / "one")
    assert one["metrics"]["reward/pickscore"][base]["lo"] is None
    assert one["pairs"]["judge/quality"].popitem()[1]["lo"] is None


def test_a_report_of_odd_names(tmp_path):
    """Prompts that matplotlib would take for mathematics, folders of one name, a sum of rewards."""
    dirs = [renders(tmp_path / side / "same", n=4, seed=seed) for side, seed in (("a", 3), ("b", 3))]
    for d in dirs:
        jsonl = Path(d) / "samples.jsonl"
        jsonl.write_text("".join(json.dumps({**json.loads(line), "prompt": f"cost is $\\foo$ {i}"}) + "\n"
                                 for i, line in enumerate(jsonl.read_text().splitlines())))
    report = compare(*dirs, reward=("tiny/pickscore:0.5,tiny/hps:0.5",), out=tmp_path / "report")
    assert list(report["metrics"]) == ["reward/pickscore:0.5,hps:0.5"] and (tmp_path / "report/report.png").exists()
