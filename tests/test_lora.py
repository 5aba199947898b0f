"""Precision, merged rollouts and quantized bases: the GPU's path (bf16 base under autocast, fp32 LoRA), on a CPU."""
import importlib.util
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from flow.lora import NAME, add_lora, lora_layers, lora_targets, merged, quantization, save_lora, swapped
from flow.pictures import load_pictures
from flow.pipeline import add_noise, draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from normguard import norm_hinge, norm_ratio, reference
from tests.helpers import CPU, refuses

PROMPTS = ["a red star", "a blue circle"]


def ready(model, **options):
    """A pipeline with a LoRA whose B is not zero, and two encoded prompts: (pipe, the LoRA's parameters)."""
    pipe = load_pipeline(model, CPU, **options)
    encode_prompts(pipe, PROMPTS)
    params = add_lora(pipe.transformer, 4, seed=0)
    g = torch.Generator().manual_seed(1)
    for layer in lora_layers(pipe.transformer):
        layer.lora_B["default"].weight.data.normal_(std=0.02, generator=g)
    return pipe, params


def step(pipe, params):
    """A rollout, then the three forward passes and the backward pass of an update: (x0, v, norm ratio, gradient)."""
    x0, _ = integrate(pipe, draw_noise(pipe, 2, torch.Generator().manual_seed(0)), PROMPTS, schedule(pipe, 2))
    t = torch.tensor([0.9, 0.4])
    xt = add_noise(x0, draw_noise(pipe, 2, torch.Generator().manual_seed(2)), t)
    v = velocity(pipe, xt, t, PROMPTS)
    with torch.no_grad():
        v_old = velocity(pipe, xt, t, PROMPTS)
    with reference(pipe.transformer):
        v_ref = velocity(pipe, xt, t, PROMPTS)
    loss = (v - v_old - 0.1).square().flatten(1).mean(1) + 0.05 * norm_hinge(v, v_ref)
    loss.sum().backward()
    grad = torch.cat([p.grad.flatten() for p in params if p.grad is not None])  # Qwen-Image's last text layer has none
    for p in params:
        p.grad = None
    return x0, v.detach(), norm_ratio(v.detach(), v_ref), grad


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux", "qwen_image", "sana"])
def test_the_gpus_path(family, model):
    """A bf16 base under autocast with an fp32 LoRA: velocities near fp32's, gradients in fp32, with gradient
    checkpointing or without."""
    full = step(*ready(family(model), size=64))
    pipe, params = ready(family(model), size=64, base=torch.bfloat16)
    frozen = [p for p in pipe.transformer.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen if p.dtype == torch.bfloat16) > 0.9 * sum(p.numel() for p in frozen)
    assert {p.dtype for p in params} == {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    plain = step(pipe, params)
    pipe.transformer.enable_gradient_checkpointing()
    checkpointed = step(pipe, params)
    for a, b, c in zip(full, plain, checkpointed):
        assert a.dtype == b.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9
        assert 0.8 < b.norm() / a.norm() < 1.2
        assert (c - b).norm() < 0.02 * b.norm()


def first_velocity(pipe, x, sigmas) -> torch.Tensor:
    """The velocity of a rollout's first step."""
    x1, _ = integrate(pipe, x, PROMPTS, sigmas[:2])
    return (x1 - x) / (sigmas[1] - sigmas[0])


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux"])
def test_the_policy_that_draws_is_the_one_that_trains(model):
    """On a bf16 base, a young LoRA (entries of B of 3e-4, the size of one Adam step) changes the velocity of a rollout
    as it changes that of training. Merged into bf16 weights, most of it would be lost."""
    pipe, _ = ready(model, base=torch.bfloat16)
    x, sigmas = draw_noise(pipe, 2, torch.Generator().manual_seed(0)), schedule(pipe, 4)
    changes = []
    for size in (3e-4, 0.0):
        for layer in lora_layers(pipe.transformer):
            b = layer.lora_B["default"].weight.data
            b.copy_(size * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).sign())
        with torch.no_grad():
            trained = velocity(pipe, x, sigmas[:1].expand(2), PROMPTS)
        changes.append((first_velocity(pipe, x, sigmas), trained))
    (drawn, trained), (drawn_base, trained_base) = changes
    change = trained - trained_base
    assert change.norm() > 1e-3 * trained.norm()
    assert (drawn - drawn_base - change).norm() <= 0.01 * change.norm()


def test_merged_is_the_adapter_and_leaves_no_trace():
    """A rollout uses a copy of the weights with the LoRA added: the velocity is equal but for rounding, the reference
    is still the base, and afterwards everything is as before, to the bit."""
    pipe, _ = ready("tiny/sd3")
    x, t = draw_noise(pipe, 2, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    @torch.no_grad()
    def both():
        """(policy's, reference's) velocity."""
        v = velocity(pipe, x, t, PROMPTS)
        with reference(pipe.transformer):
            return v, velocity(pipe, x, t, PROMPTS)

    v, v_ref = both()
    with merged(pipe.transformer):
        w, w_ref = both()
        assert all(hasattr(layer, "merged_weight") for layer in lora_layers(pipe.transformer))
    assert not torch.equal(w, v) and (w - v).norm() < 1e-5 * v.norm() < 1e-3 * (v - v_ref).norm()
    assert torch.equal(w_ref, v_ref)
    again, _ = both()
    assert torch.equal(again, v)
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_merged_takes_the_active_adapter():
    pipe, _ = ready("tiny/sd3")
    add_lora(pipe.transformer, 4, 0, "old")  # its B is zero: the base
    x, t = draw_noise(pipe, 2, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    with merged(pipe.transformer), torch.no_grad():
        v = velocity(pipe, x, t, PROMPTS)
    with reference(pipe.transformer):
        torch.testing.assert_close(v, velocity(pipe, x, t, PROMPTS))


def test_swapped_puts_back_the_same_tensors():
    p = torch.nn.Parameter(torch.ones(2))
    own = p.data
    with pytest.raises(KeyError), swapped([p], [torch.zeros(2)]):
        assert p.sum() == 0
        raise KeyError
    assert p.data.data_ptr() == own.data_ptr()
    with swapped([p], None):
        assert p.sum() == 2


def test_quantize_names_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # none is installed
    for kind, said in (("int8", "pip install torchao"), ("nf4", "pip install bitsandbytes"), ("int7", "none, int8 or")):
        refuses(capsys, lambda: quantization(kind), f"--quantize {kind}: ", said)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_an_int8_base(tmp_path):
    """Quantized while loading, or loaded quantized: near the full base, trainable, and not merged."""
    full = step(*ready("tiny/sd3"))
    pipe, params = ready("tiny/sd3", quantize="int8")
    ours = step(pipe, params)
    assert (ours[1] - full[1]).norm() < 0.1 * full[1].norm()
    assert torch.nn.functional.cosine_similarity(ours[3], full[3], dim=0) > 0.95
    with merged(pipe.transformer):
        assert not any(hasattr(layer, "merged_weight") for layer in lora_layers(pipe.transformer))
    saved = diffusers.DiffusionPipeline.from_pretrained("tiny/sd3", quantization_config=quantization("int8"))
    saved.save_pretrained(tmp_path / "int8")
    torch.testing.assert_close(step(*ready(f"{tmp_path}/int8"))[1], ours[1])


def test_lora_goes_where_it_went_before():
    """On SD3, SD3.5 and FLUX.1: the layers that DiffusionNFT, AWM and Flow-GRPO list by name, without SD3.5's attn2."""
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
             "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
    small = dict(num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
                 pooled_projection_dim=8)
    sd3 = dict(sample_size=8, patch_size=2, caption_projection_dim=16, pos_embed_max_size=8, **small)
    for model, count in [
            (diffusers.SD3Transformer2DModel(**sd3), 23),
            (diffusers.SD3Transformer2DModel(dual_attention_layers=(0, 1), qk_norm="rms_norm", **sd3), 23),
            (diffusers.FluxTransformer2DModel(num_single_layers=2, axes_dims_rope=(2, 2, 4), **small), 30)]:
        parts = dict(model.named_modules())
        listed = [name for name in parts if any(name.endswith("." + target) for target in names)]
        assert lora_targets(model) == listed and len(listed) == count
        assert any(".attn2." in name for name in parts) == bool(getattr(model.config, "dual_attention_layers", ()))


def test_the_file_does_without_its_metadata(tmp_path):
    """alpha = rank and the scale in B: read with metadata or without, by diffusers or sample.py, it draws what the
    trained LoRA draws. The trained B is left as it is."""
    pipe, _ = ready("tiny/sd3")
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    save_lora(pipe, tmp_path / "lora")
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    t, x = torch.tensor([0.9, 0.4]), draw_noise(pipe, 2, torch.Generator().manual_seed(0))
    trained = velocity(pipe, x, t, PROMPTS)
    (tmp_path / "plain").mkdir()
    save_file(load_file(tmp_path / "lora" / NAME), tmp_path / "plain" / NAME)  # without metadata
    found = []
    for name in ("lora", "plain"):
        theirs = load_pipeline("tiny/sd3", CPU)
        encode_prompts(theirs, PROMPTS)
        theirs.load_lora_weights(tmp_path / name)
        torch.testing.assert_close(velocity(theirs, x, t, PROMPTS), trained)
        out = str(tmp_path / f"{name}-out")
        sample.main(sample.Args(prompt="a red star", steps=2, lora=f"{tmp_path}/{name}", out=out))
        found.append(load_pictures([f"{out}/00000.png"]))
    assert torch.equal(*found)


def test_a_scaled_lora_is_plain_diffusers(tmp_path):
    """Compare `sample.py --lora-scale` with diffusers' set_adapters; scale 0 is the base."""
    pipe, _ = ready("tiny/sd3")
    save_lora(pipe, tmp_path / "lora")
    pictures = {}
    for scale in (0.0, 0.5, 1.0):
        out = str(tmp_path / f"{scale}")
        sample.main(sample.Args(prompt="a red star", steps=2, lora=f"{tmp_path}/lora", lora_scale=scale, out=out))
        pictures[scale] = load_pictures([f"{out}/00000.png"])
    row = json.loads((tmp_path / "0.5/samples.jsonl").read_text())
    plain = diffusers.DiffusionPipeline.from_pretrained(row["model"], dtype=torch.float32)
    noise = torch.Generator("cpu")
    base = plain(row["prompt"], generator=noise.manual_seed(0), **row["pipe"], output_type="pt").images
    plain.load_lora_weights(row["lora"])
    plain.set_adapters(plain.get_active_adapters(), row["lora_scale"])
    half = plain(row["prompt"], generator=noise.manual_seed(0), **row["pipe"], output_type="pt").images
    torch.testing.assert_close(pictures[0.0], base, rtol=0, atol=2 / 255)
    torch.testing.assert_close(pictures[0.5], half, rtol=0, atol=2 / 255)
    assert (half - base).abs().max() > 8 / 255 and (pictures[1.0] - half).abs().max() > 8 / 255
