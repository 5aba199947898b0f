"""Precision, merged rollouts and quantized bases: the GPU's path (bf16 base under autocast, fp32 LoRA), on a CPU."""
import importlib.util
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import flow.run
import sample
import train_nft
from flow import lora
from flow.lora import NAME, add_lora, lora_layers, lora_targets, merged, quantization, read_lora, save_lora, swapped
from flow.pictures import grid_files, load_pictures
from flow.pipeline import add_noise, draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from normguard import norm_hinge, norm_ratio, reference
from tests.helpers import CPU, SCRIPTS, SMALL, metrics, refuses, sample_rows, small_run

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


# ---------------------------------------------------------------- formats

def trained_file(folder, model: str) -> dict[str, torch.Tensor]:
    """Write the LoRA of `ready` to a folder; returns its tensors without the prefix."""
    pipe, _ = ready(model)
    save_lora(pipe, folder)
    return {name.removeprefix("transformer."): value for name, value in load_file(folder / NAME).items()}


def drawn(model: str, file) -> torch.Tensor:
    """The velocity of a LoRA read from a file, a folder or the hub; None: the base's."""
    pipe = load_pipeline(model, CPU)
    encode_prompts(pipe, PROMPTS)
    if file is not None:
        start = read_lora(pipe, "--lora", str(file))
        add_lora(pipe.transformer, max(len(a) for a, _ in start.values()), 0, initial=start)
    with torch.no_grad():
        return velocity(pipe, draw_noise(pipe, 2, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4]), PROMPTS)


def peft_format(folder, tensors: dict, **changes):
    """Write PEFT's format, with half of B and alpha twice the rank."""
    folder.mkdir()
    halves = {f"base_model.model.{k}": v / 2 if "lora_B" in k else v for k, v in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux"])
def test_each_format_is_the_same_lora(tmp_path, capsys, model):
    """diffusers' format with alphas, without metadata, of mixed ranks, in one file; PEFT's; one with dots for
    underscores, as kohya's scripts write it; text encoders' tensors are named and left out."""
    tensors = trained_file(tmp_path / "diffusers", model)
    expected, base = drawn(model, tmp_path / "diffusers"), drawn(model, None)
    assert (expected - base).norm() > 0.01 * base.norm()
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    downs = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}
    old = {f"transformer.{k}": v for k, v in downs.items()}
    alphas = {f"transformer.{layer}.alpha": torch.tensor(8.0) for layer in layers}
    doubled = {f"transformer.{k}": v / 2 if "lora_B" in k else v for k, v in tensors.items()} | alphas
    first = f"transformer.{layers[0]}.lora_"
    mixed = {f"transformer.{k}": v for k, v in tensors.items()}
    mixed |= {first + "A.weight": torch.cat([mixed[first + "A.weight"]] * 2),
              first + "B.weight": torch.cat([mixed[first + "B.weight"] / 2] * 2, 1)}
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 4)}
    kohya = {}
    for key, value in tensors.items():
        layer, part = key.removesuffix(".weight").rsplit(".", 1)
        part = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
        kohya[f"lora_transformer_{layer.replace('.', '_')}.{part}.weight"] = value
        kohya[f"lora_transformer_{layer.replace('.', '_')}.alpha"] = torch.tensor(4.0)
    for name, content in {"old": old, "alphas": doubled, "mixed": mixed, "text": mixed | text, "kohya": kohya}.items():
        save_file({k: v.contiguous() for k, v in content.items()}, tmp_path / f"{name}.safetensors")
        capsys.readouterr()
        torch.testing.assert_close(drawn(model, tmp_path / f"{name}.safetensors"), expected)
        assert ("text_encoder.text_model" in capsys.readouterr().out) == (name == "text")
    peft_format(tmp_path / "peft", tensors)
    torch.testing.assert_close(drawn(model, tmp_path / "peft"), expected)
    peft_format(tmp_path / "rslora", tensors, use_rslora=True, lora_alpha=4, r=4)  # alpha / sqrt(4)
    torch.testing.assert_close(drawn(model, tmp_path / "rslora"), expected)
    peft_format(tmp_path / "pattern", tensors, r=2, lora_alpha=5, rank_pattern=dict.fromkeys(layers, 4),
                alpha_pattern=dict.fromkeys(layers, 8))
    torch.testing.assert_close(drawn(model, tmp_path / "pattern"), expected)
    (tmp_path / "pattern/adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "rank_pattern": null}')
    torch.testing.assert_close(drawn(model, tmp_path / "pattern"), expected)


def test_the_rank_of_a_warm_start_is_not_its_text_encoders(tmp_path):
    tensors = {f"transformer.{k}": v for k, v in trained_file(tmp_path / "diffusers", "tiny/sd3").items()}
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(16, 4)
    save_file(tensors, tmp_path / "text.safetensors")
    for rank in (None, 4):
        assert lora.lora_rank(train_nft.Args(init_lora=f"{tmp_path}/text.safetensors", rank=rank)) == 4


def test_a_lora_of_a_changed_base_is_refused(tmp_path, capsys):
    """PiSSA and the like take the first B A out of the base's weights, so the file fits no base that we load."""
    tensors = trained_file(tmp_path / "diffusers", "tiny/sd3")
    for start in ("pissa", "pissa_niter_4", "olora", "loftq"):
        peft_format(tmp_path / start, tensors, init_lora_weights=start)
        refuses(capsys, lambda: drawn("tiny/sd3", tmp_path / start), f"--lora {tmp_path}/{start}", "changes the base")
    peft_format(tmp_path / "gaussian", tensors, init_lora_weights="gaussian")
    torch.testing.assert_close(drawn("tiny/sd3", tmp_path / "gaussian"), drawn("tiny/sd3", tmp_path / "diffusers"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_names_and_types_that_programs_write(tmp_path, dtype):
    """An adapter's name in the keys, other prefixes or none, half precision, PEFT's file given itself."""
    tensors = {k: v.to(dtype) for k, v in trained_file(tmp_path / "diffusers", "tiny/sd3").items()}
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, tmp_path / "same.safetensors")
    expected = drawn("tiny/sd3", tmp_path / "same.safetensors")
    for prefix, ending in (("", ".weight"), ("diffusion_model.", ".weight"), ("transformer.", ".default.weight")):
        renamed = {f"{prefix}{k.removesuffix('.weight')}{ending}": v for k, v in tensors.items()}
        save_file(renamed, tmp_path / "renamed.safetensors")
        assert torch.equal(drawn("tiny/sd3", tmp_path / "renamed.safetensors"), expected)
    peft_format(tmp_path / "peft", tensors)
    torch.testing.assert_close(drawn("tiny/sd3", tmp_path / "peft/adapter_model.safetensors"), expected)


def test_a_layer_whose_name_ends_another(tmp_path):
    """FLUX has `proj_out` and `single_transformer_blocks.0.proj_out`, of other ranks here, and layers outside
    attention: each gets its own, and no other layer gets one. So it is on a bf16 base, and in what a run writes."""
    layers = {"proj_out": 2, "single_transformer_blocks.0.proj_out": 3, "transformer_blocks.0.ff.net.2": 3}
    pipe = load_pipeline("tiny/flux", CPU, base=torch.bfloat16)
    tensors, g = {}, torch.Generator().manual_seed(0)
    for layer, rank in layers.items():
        linear = pipe.transformer.get_submodule(layer)
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=g)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=g)
    save_file(tensors, tmp_path / "mlp.safetensors")
    start = read_lora(pipe, "--init-lora", f"{tmp_path}/mlp.safetensors")
    add_lora(pipe.transformer, 3, 0, initial=start)
    found = {name: part for name, part in pipe.transformer.named_modules() if part in lora_layers(pipe.transformer)}
    assert {name: part.r["default"] for name, part in found.items()} == layers
    for layer, part in found.items():
        assert part.scaling["default"] == 2
        product = tensors[f"transformer.{layer}.lora_B.weight"] @ tensors[f"transformer.{layer}.lora_A.weight"]
        torch.testing.assert_close(part.get_delta_weight("default"), product)
    save_lora(pipe, tmp_path / "lora")
    for name, value in load_file(tmp_path / "lora" / NAME).items():
        assert torch.equal(value, tensors[name])
    again = read_lora(load_pipeline("tiny/flux", CPU), "--lora", f"{tmp_path}/lora")
    assert all(torch.equal(x, y) for layer in layers for x, y in zip(again[layer], start[layer]))
    plain = diffusers.DiffusionPipeline.from_pretrained("tiny/flux")
    plain.load_lora_weights(tmp_path / "lora")
    theirs = {name for name, part in plain.transformer.named_modules() if part in lora_layers(plain.transformer)}
    assert theirs == layers.keys()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_lora_on_an_int8_base(tmp_path):
    trained_file(tmp_path / "diffusers", "tiny/sd3")
    pipe = load_pipeline("tiny/sd3", CPU, quantize="int8")
    start = read_lora(pipe, "--lora", str(tmp_path / "diffusers"))
    assert len(add_lora(pipe.transformer, 4, 0, initial=start)) == 2 * len(start) == 62


def test_kohyas_fused_layers(tmp_path):
    """sd-scripts' FLUX layers, with q, k and v in one and alpha half of the rank: diffusers converts them."""
    tensors = trained_file(tmp_path / "diffusers", "tiny/flux")
    kept, kohya = {}, {}
    for block in range(2):
        for theirs, ours in (("img_attn_qkv", ("to_q", "to_k", "to_v")),
                             ("txt_attn_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
                             ("img_attn_proj", ("to_out.0",)), ("txt_attn_proj", ("to_add_out",))):
            parts = [f"transformer_blocks.{block}.attn.{name}.lora_" for name in ours]
            if f"{parts[0]}A.weight" not in tensors:
                continue
            kept |= {f"transformer.{part}{x}.weight": tensors[f"{part}{x}.weight"] for part in parts for x in "AB"}
            name = f"lora_unet_double_blocks_{block}_{theirs}"
            down = torch.cat([tensors[f"{part}A.weight"] for part in parts])
            up = torch.block_diag(*[tensors[f"{part}B.weight"] for part in parts])
            kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": 2 * up,
                      f"{name}.alpha": torch.tensor(len(down) / 2)}
    save_file(kept, tmp_path / "kept.safetensors")
    save_file(kohya, tmp_path / "kohya.safetensors")
    expected = drawn("tiny/flux", tmp_path / "kept.safetensors")
    torch.testing.assert_close(drawn("tiny/flux", tmp_path / "kohya.safetensors"), expected)
    assert (expected - drawn("tiny/flux", None)).norm() > 0.01 * expected.norm()


def test_a_layer_that_a_conversion_drops_is_no_secret(tmp_path, monkeypatch, capsys):
    """Where diffusers would convert only a part of a file, the file is refused."""
    tensors = {f"transformer.{k}": v for k, v in trained_file(tmp_path / "diffusers", "tiny/sd3").items()}
    faint = next(name for name in tensors if "lora_B" in name)
    tensors[faint] = 0.05 * tensors[faint]  # of the layer that is dropped
    save_file(tensors, tmp_path / "diffusers" / NAME)
    save_file({f"other.{k}": v for k, v in tensors.items()}, tmp_path / "other.safetensors")
    for dropped in (0, 2):  # of 62 tensors
        kept = dict(list(tensors.items())[dropped:])
        monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "lora_state_dict", lambda given: kept)
        if dropped:
            refuses(capsys, lambda: drawn("tiny/sd3", tmp_path / "other.safetensors"), "no place")
        else:
            assert torch.equal(drawn("tiny/sd3", tmp_path / "other.safetensors"),
                               drawn("tiny/sd3", tmp_path / "diffusers"))


def test_a_lora_of_the_hub(tmp_path, monkeypatch, capsys):
    """By its repository, or by a folder or a file in it; what is not a LoRA is not downloaded. The hub is a folder."""
    tensors, hub = trained_file(tmp_path / "diffusers", "tiny/sd3"), tmp_path / "hub"
    for file in ("one/mine.safetensors", "one/transformer/weights.safetensors", "many/a.safetensors",
                 "many/b.safetensors", "many/epoch 9/c.safetensors"):
        (hub / file).parent.mkdir(parents=True, exist_ok=True)
        (hub / file).write_bytes((tmp_path / "diffusers" / NAME).read_bytes())
    peft_format(hub / "peft", tensors)
    asked = []

    def download(hub_id, **patterns):
        owner, name = hub_id.split("/")
        names = [file.relative_to(hub / name).as_posix() for file in (hub / name).rglob("*") if file.is_file()]
        chosen, cache = sorted(filter_repo_objects(names, **patterns)), tmp_path / f"cache{len(asked)}"
        for file in chosen:
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes((hub / name / file).read_bytes())
        asked.append(chosen)
        return str(cache)
    monkeypatch.setattr(lora, "snapshot_download", download)
    expected = drawn("tiny/sd3", tmp_path / "diffusers")
    for name in ("me/one", "me/many/b.safetensors", "me/many/epoch 9", "me/peft"):
        assert torch.equal(drawn("tiny/sd3", name), expected), name
    assert asked == [["mine.safetensors"], ["b.safetensors"], ["epoch 9/c.safetensors"],
                     ["adapter_config.json", "adapter_model.safetensors"]]
    refuses(capsys, lambda: drawn("tiny/sd3", "me/many"), "--lora me/many", "a.safetensors, b.safetensors; give one")


# ---------------------------------------------------------------- --init-lora

def test_a_warm_start_has_alpha_twice_the_rank(tmp_path):
    """Whatever alpha the file has, also of mixed ranks: the product is kept, and alpha is twice the rank."""
    tensors = trained_file(tmp_path / "diffusers", "tiny/sd3")
    peft_format(tmp_path / "peft", {k: v / 3 if "lora_B" in k else v for k, v in tensors.items()}, lora_alpha=24)
    pipe = load_pipeline("tiny/sd3", CPU)
    start = read_lora(pipe, "--init-lora", str(tmp_path / "peft"))
    first, (a, b) = next(iter(start.items()))
    start[first] = torch.cat([a, a]), torch.cat([b, 0 * b], 1)  # of rank 8
    params = add_lora(pipe.transformer, 4, seed=0, initial=start)
    add_lora(pipe.transformer, 4, 0, "old", start)
    assert len(params) == len(tensors) and all(p.dtype == torch.float32 for p in params)
    for layer, (a, b) in start.items():
        part = pipe.transformer.get_submodule(layer)
        for name in ("default", "old"):
            assert part.scaling[name] == 2 and part.r[name] == (8 if layer == first else 4)
            torch.testing.assert_close(part.get_delta_weight(name), b @ a)
        kept = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(b @ a, kept)
    save_lora(pipe, tmp_path / "again")
    torch.testing.assert_close(drawn("tiny/sd3", tmp_path / "again"), drawn("tiny/sd3", tmp_path / "diffusers"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_starts_from_a_lora(run, tmp_path, script):
    """Its first evaluation is that of the trained LoRA, is sample.py's, and counts inflation from the base. args.json
    and the card name it."""
    lora = str(run / "lora")
    old = {"old_decay": (0, 1.0, 0.99)} if script is train_nft else {}
    out = small_run(tmp_path / "warm", script, init_lora=lora, rank=None, epochs=1, save_every=1, lr=1e-9, **old)
    assert (out / "samples/00000.png").read_bytes() == (run / "samples/00004.png").read_bytes()
    first = next(line for line in metrics(out) if "eval_reward" in line)
    assert abs(first["eval_norm_ratio"] - 1) > 1e-4
    (tmp_path / "four.txt").write_text("\n".join(Path("tiny/eval_prompts.txt").read_text().splitlines()[:4]))
    sample.main(sample.Args(lora=lora, prompts=f"{tmp_path}/four.txt", steps=SMALL["steps"], norms=True,
                            out=f"{tmp_path}/out"))
    drawn = load_pictures([f"{tmp_path}/out/{i:05d}.png" for i in range(4)])
    (grid,) = grid_files(tmp_path / "grid", drawn, 8, [row["prompt"] for row in sample_rows(tmp_path / "out")]).values()
    assert grid == (out / "samples/00000.png").read_bytes()
    assert json.loads((tmp_path / "out/norms.json").read_text())["mean"] == first["eval_norm_ratio_steps"]
    recorded = json.loads((out / "args.json").read_text())
    assert recorded["init_lora"] == lora and recorded["rank"] == 4 and recorded["inputs"]["init_lora"]
    assert "from the LoRA `lora`" in (out / "lora/README.md").read_text()
    given = {name.removeprefix("transformer."): x for name, x in load_file(run / "lora" / NAME).items()}
    for name, x in load_file(out / "lora" / NAME).items():  # after a step of next to nothing
        torch.testing.assert_close(x, given[name.removeprefix("transformer.")], rtol=0, atol=1e-6)
    if script is train_nft:
        state = torch.load(out / "checkpoint/state.pt", weights_only=True)
        held = dict(zip(state["lora"], state["old"]))
        for name, x in held.items():
            torch.testing.assert_close(x, given[name] / (2 if "lora_B" in name else 1), rtol=0, atol=1e-6)


def test_a_run_refuses_another_start(run, tmp_path, capsys):
    """Another rank than the file's, a file that has changed since the run began, and one of another model."""
    lora = shutil.copytree(run / "lora", tmp_path / "lora")
    warm = dict(init_lora=str(lora), rank=4, epochs=1, save_every=1, eval_every=0)
    refuses(capsys, lambda: small_run(tmp_path / "run", **warm | {"rank": 8}), "--rank 8", "has rank 4")
    refuses(capsys, lambda: small_run(tmp_path / "run", model="tiny/flux", **warm), f"--init-lora {lora}", "tiny/flux")
    refuses(capsys, lambda: small_run(tmp_path / "run", **warm | {"init_lora": "gone"}), "--init-lora gone", "folder")
    assert not (tmp_path / "run").exists()
    out = small_run(tmp_path / "run", **warm)
    before = load_file(out / "lora" / NAME)
    small_run(out, **warm | {"epochs": 2})  # resumes
    flow.run.unlock()
    assert any(not torch.equal(x, before[name]) for name, x in load_file(out / "lora" / NAME).items())
    tensors = {name: 2 * x for name, x in load_file(lora / NAME).items()}
    save_file(tensors, lora / NAME)
    refuses(capsys, lambda: small_run(out, **warm | {"epochs": 3}), "--init-lora", "changed", unchanged=out)
