"""Tests on a GPU: python -m pytest -m gpu, in the root. NORMGUARD_GPU_TESTS_ON_CPU=1 tries them, small, on a CPU."""
import functools
import json
import math
import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample
import train_awm
import train_dpo
import train_nft
from flow import lora, pictures
from flow.cost import bench, count, shapes
from flow.pipeline import draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from normguard import norm_hinge, reference

ON_CPU = bool(os.environ.get("NORMGUARD_GPU_TESTS_ON_CPU"))
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
PROMPTS = ["a red star", "a blue circle", "a green square", "a red circle"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU")]


@contextmanager
def hearing(pipe, hear):
    """While this lasts, hear(given) sees, and may change, what the transformer is given in the end: {name: value}."""
    forward = pipe.transformer.forward
    with mock.patch.object(pipe.transformer, "forward", lambda **given: (hear(given), forward(**given))[1]):
        yield


def with_lora(pipe, fill):
    """The pipeline with a LoRA whose B is fill(normal noise)."""
    g = torch.Generator().manual_seed(1)
    for p in lora.add_lora(pipe.transformer, 32, 0)[1::2]:  # A, B, A, B, ...
        p.data.copy_(fill(torch.randn(p.shape, generator=g)))
    return pipe


SD3, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
MODELS = {"flux-all": (FLUX, {}), "flux-1+1": (FLUX, dict(num_layers=1, num_single_layers=1)),
          "flux-2+2": (FLUX, dict(num_layers=2, num_single_layers=2)),
          "sd3-2": (SD3, dict(num_layers=2, dual_attention_layers=(0,)))}
NARROW = {SD3: dict(num_attention_heads=2, caption_projection_dim=128), FLUX: dict(num_attention_heads=2)}
KERNELS = ["default", "MATH", "FLASH_ATTENTION"] + ["EFFICIENT_ATTENTION"] * (not ON_CPU)
# model, attention, batch, checkpointing, the LoRA's input casts. Without cuDNN's attention, which failed with FLUX
CASES = [("flux-all", "default", 4, True, False)] * (not ON_CPU)
CASES += [(model, kernel, n, again, False) for model in ("flux-1+1", "sd3-2", "flux-2+2") for kernel in KERNELS
          for n in (4, 1) for again in (True, False)]
CASES += [(model, kernel, 4, True, True) for model in ("flux-1+1", "sd3-2") for kernel in KERNELS]
POOLS, BROKEN = [], []
IDS = ["{}-{}-batch{}".format(*case) + "-checkpointing" * case[3] + "-casts" * case[4] for case in CASES]


@functools.cache
def built(model: str, dtype: torch.dtype):
    """A pipeline of MODELS with a LoRA; in fp32 of the same weights as in bf16."""
    published, few = MODELS[model]
    name, parts = shapes.PUBLISHED[published]
    cls, config = parts["transformer"]
    few = cls, config | few | (NARROW[published] if ON_CPU else {})
    torch.manual_seed(0)
    with mock.patch.dict(shapes.PUBLISHED, {model: (name, parts | dict(transformer=few))}):
        pipe = shapes.blank_pipeline(model, DEVICE, 64 if ON_CPU else 512, dtype=dtype)
    if dtype == torch.float32:
        weights = built(model, torch.bfloat16).transformer.state_dict().items()
        pipe.transformer.load_state_dict({k.replace(".base_layer", ""): w for k, w in weights if ".lora_" not in k})
    shapes.encode(pipe, 4.0 if published == FLUX else None)  # a guidance whose thousandfold bf16 has
    return with_lora(pipe, lambda b: 0.2 * b)


@functools.cache
def update(model: str, dtype: torch.dtype, kernel: str, n: int, again: bool, casts: bool) -> tuple:
    """An update's velocity, what the LoRA changes in it, and the LoRA's gradients {name: gradient}."""
    pipe, rows, prompts = built(model, dtype), [], [shapes.PROMPT] * n
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == torch.bfloat16

    def noise(like):
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(like)
    def tell(given):  # a text that is not all zeros
        rows.append(len(given["hidden_states"]))
        given["encoder_hidden_states"] = noise(given["encoder_hidden_states"])
    x = draw_noise(pipe, n, torch.Generator().manual_seed(0)).to(DEVICE)
    t = torch.tensor([0.5, 0.25, 0.125, 1.0])[:n]  # bf16 has them and their thousandfold, which FLUX makes in bf16
    for layer in lora.lora_layers(pipe.transformer):
        layer.cast_input_dtype_enabled = casts
    one_kernel = nullcontext() if kernel == "default" else sdpa_kernel(getattr(SDPBackend, kernel))
    with one_kernel, count.checkpointing(pipe, again), hearing(pipe, tell):
        v = velocity(pipe, x, t, prompts)
        with reference(pipe.transformer):
            v_ref = velocity(pipe, x, t, prompts)
        hinge = norm_hinge(v, v_ref, margin=-0.5).mean()  # acts on every sample, so no rounding switches it
        ((v - noise(v)).square().mean() + 0.05 * hinge).backward()
    grads = {name: p.grad for name, p in pipe.transformer.named_parameters() if p.grad is not None}
    pipe.transformer.zero_grad()
    assert set(rows) == {n}, f"the transformer was given batches of {rows}"
    return v.detach(), v.detach() - v_ref, grads


def measured(model: str, kernel: str, n: int, again: bool, casts: bool) -> dict | str:
    """How near a case is to fp32 without autocast, unless that is too large; or what it raised."""
    def cosine(a, b):
        return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
    try:
        v, change, grads = update(model, torch.bfloat16, kernel, n, again, casts)
        flat = torch.cat([grad.flatten() for grad in grads.values()])
        found = {"finite": bool(v.isfinite().all() and flat.isfinite().all() and flat.norm() > 0)}  # waits for the GPU
        if model == "flux-all":
            return found
        true_v, true_change, true_grads = update(model, torch.float32, "MATH", n, False, False)
        true = torch.cat([true_grads[name].flatten() for name in grads])
        worst = min(cosine(grads[k], w) for k, w in true_grads.items() if w.norm() > 1e-3 * true.norm())
        return found | {"v": cosine(v, true_v), "change": cosine(change, true_change), "gradient": cosine(flat, true),
                        "norm": (flat.norm() / true.norm()).item(), "worst": worst}
    except Exception:
        return traceback.format_exc()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_update_of_full_width(case):
    """In a second process, and in a fresh one after a failure: after an error of CUDA's nothing works in the old."""
    assert len(BROKEN) < 8, "not run: eight processes have failed before it, and each takes a slow start"
    POOLS.extend([] if POOLS else [ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))])
    try:
        found = POOLS[0].submit(measured, *case).result(timeout=180)
    except Exception as e:  # it was killed, or hangs
        found = repr(e)
    if isinstance(found, str):
        BROKEN.append(case)
        for process in multiprocessing.active_children():
            process.kill()
        POOLS.pop().shutdown()
        pytest.fail(f"{found}\nCUDA_LAUNCH_BLOCKING=1 shows where it fails", pytrace=False)
    assert found["finite"], found
    for name, low in dict(v=0.999, change=0.9, gradient=0.99, worst=0.95, norm=0.97).items():
        assert low < found.get(name, 1) < 1.03, (name, found)


@pytest.fixture(params=["tiny/sd3", "tiny/flux"])
def pipe(request):
    """On a bf16 base, with a LoRA as after a few steps: entries of 3e-4 in B."""
    pipe = load_pipeline(request.param, DEVICE, base=torch.bfloat16)
    encode_prompts(pipe, PROMPTS)
    return with_lora(pipe, lambda b: 3e-4 * b.sign())


def test_a_rollout_has_the_lora_of_training(pipe):
    """What a young LoRA changes in v is the same in a rollout as in training; added to bf16 weights it would drown."""
    start = draw_noise(pipe, 4, torch.Generator().manual_seed(0))
    v = velocity(pipe, start.to(DEVICE), torch.ones(4), PROMPTS).detach().cpu()
    with reference(pipe.transformer):
        v_ref = velocity(pipe, start.to(DEVICE), torch.ones(4), PROMPTS).cpu()
    x0, _ = integrate(pipe, start, PROMPTS, torch.tensor([1.0, 0.0]))  # one step: x0 = start - v
    assert ((start - x0 - v).norm() / (v - v_ref).norm()).item() < 0.01


def test_a_mixed_batch_is_each_sample_alone(pipe):
    """With noise levels of their own, samples are told the time as alone, to the bit, and have the same v."""
    levels, told = torch.cat([torch.tensor([0.82606]), schedule(pipe, 7)[:-1]]), []
    x, prompts = draw_noise(pipe, 8, torch.Generator().manual_seed(0)).to(DEVICE), 2 * PROMPTS
    with torch.no_grad(), hearing(pipe, lambda given: told.append(given["timestep"])):
        mixed = velocity(pipe, x, levels, prompts)
        alone = torch.cat([velocity(pipe, x[i:i + 1], levels[i:i + 1], prompts[i:i + 1]) for i in range(8)])
    assert len(told) == 9 and told[0].tolist() == torch.cat(told[1:]).tolist()
    assert max(((mixed - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).tolist()) < 0.015


def test_the_benchmark(capsys):
    """Its peaks are near the estimates, but for the room that CUDA's libraries work in."""
    before = torch.cuda.memory_allocated() / bench.GB if DEVICE.type == "cuda" else 0
    bench.main(bench.Args("tiny/sd3", "tiny/pickscore", 64, batch=1024, rollout_batch=1024, repeat=1, json=True))
    rows = [row for row in json.loads(capsys.readouterr().out)["phases"] if row["estimated_gb"]]
    assert [row["phase"] for row in rows] == ["update", "rollout", "decode", "reward"]
    for row in rows:
        assert 0.8 < (row["peak_gb"] - before) / row["estimated_gb"] < 1.25 + 0.15 / row["estimated_gb"], (before, row)


@pytest.fixture(scope="module", params=[train_nft, train_awm, train_dpo], ids=lambda script: script.__name__)
def runs(request, tmp_path_factory) -> tuple[Path, list, list]:
    """A script's runs of three epochs, `whole` in one go and `parts` of two and one: their folder and their logs."""
    out, logs, args = tmp_path_factory.mktemp("runs"), [], dict(group=4, groups=2, batch=8, rank=4, lr=2e-3, eval_n=4)
    for name, epochs in (("whole", 3), ("parts", 2), ("parts", 3)):
        request.param.main(request.param.Args(out=str(out / name), epochs=epochs, **args))
        logs.append((out / name / "metrics.jsonl").read_text())
    assert logs[2].startswith(logs[1]), "the resumed run has begun anew"
    return out, *([json.loads(line) for line in text.splitlines()] for text in logs[::2])


def test_training(runs):
    """It starts at the reference; all numbers are finite, and memory is among them; a resumed run is near the whole."""
    for lines in runs[1:]:
        steps = [line for line in lines if "loss" in line]
        assert [line["epoch"] for line in steps] == [0, 1, 2] and steps[-1]["skipped"] == 0
        assert abs(steps[0]["norm_ratio"] - 1) < 1e-4 < abs(steps[-1]["norm_ratio"] - 1)
        assert all(math.isfinite(x) for line in lines for x in line.values() if isinstance(x, float)), lines
        assert ON_CPU or all(0 < line["peak_gb"] < 4 for line in steps)
    loras = [load_file(runs[0] / run / "lora/pytorch_lora_weights.safetensors") for run in ("whole", "parts")]
    whole, parts = (torch.cat([one[k].flatten() for k in sorted(one) if ".lora_B" in k]) for one in loras)
    assert ((parts - whole).norm() / whole.norm()).item() < 0.2  # without the optimizer's state it would be 0.4


def test_sampling_with_the_trained_lora(runs, tmp_path):
    """Scaled to 0 it is the base; scaled to 1 it changes the pictures, and the norm as in the run's evaluation."""
    trained, found = str(runs[0] / "whole/lora"), []
    for i, changes in enumerate([{}, dict(lora=trained, lora_scale=0.0), dict(lora=trained, norms=True)]):
        sample.main(sample.Args(prompt="a red star", n=4, steps=8, out=str(tmp_path / str(i)), **changes))
        found.append(pictures.load_pictures([str(tmp_path / f"{i}/{k:05d}.png") for k in range(4)]))
    base, off, on = found
    assert base.std() > 0.02 and (off - base).abs().max() < 3 / 255 and (on - base).abs().max() > 8 / 255
    assert abs(json.loads((tmp_path / "2/norms.json").read_text())["overall"] - runs[1][-1]["eval_norm_ratio"]) < 0.03
