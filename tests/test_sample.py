"""Tests of sample.py: pictures against plain diffusers, norms, renormalization, the adjoint."""
import json
import math

import numpy as np
import pytest
import torch
import world
from diffusers import FluxPipeline, StableDiffusion3Pipeline

import sample
from flow.pipeline import decode_batch, draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from tests.helpers import CPU, SCRIPTS, pixels, refuses, sample_rows, small_run


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
    rows = sample_rows(tmp_path)
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
    for row in sample_rows(tmp_path / "out")[:2]:
        theirs = pipe(row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"]).images[0]
        assert np.abs(pixels(tmp_path / "out" / row["file"]) - np.asarray(theirs).astype(int)).max() <= 2
    assert row["pipe"]["guidance_scale"] == 3.5
    assert json.loads((tmp_path / "out/norms.json").read_text())["overall"] != 1


def test_sample_leaves_other_pictures_alone(tmp_path, capsys):
    def draw(n: int = 1):
        sample.main(sample.Args(prompt="a red star", n=n, steps=1, out=str(tmp_path)))
    for n in (3, 1):  # its own earlier pictures make place
        draw(n)
        assert len(list(tmp_path.glob("0*.png"))) == n
    (tmp_path / "00007.png").write_text("mine")
    refuses(capsys, draw, "00007.png", unchanged=tmp_path)
    (tmp_path / "samples.jsonl").write_text("[1]\n")
    refuses(capsys, draw, "samples.jsonl", unchanged=tmp_path)


def seeded(n: int, first: int = 0) -> list[torch.Generator]:
    """Generators of consecutive seeds."""
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


@torch.no_grad()
def test_norms_and_renorm(run):
    pipe, prompts, n = load_pipeline("tiny/sd3", CPU), world.CAPTIONS[:32], 32
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
    """dR/ds_k in float64 from one graph over all steps, where the velocity of step k is scaled by 1 + s_k."""
    pipe, prompts = load_pipeline(model, CPU), ["a red star", "a blue ring"]
    for part in (pipe.transformer, pipe.vae, *pipe.flow.encoders.values()):
        part.double()
    encode_prompts(pipe, prompts, guidance)
    noise, sigmas = draw_noise(pipe, 2, seeded(2, first=1)).double(), schedule(pipe, 4).double()
    rewards = [lambda images, *_: images[:, 0].double().mean((1, 2)),
               lambda images, *_: images.double().square().mean((1, 2, 3))]
    pipe.transformer.enable_gradient_checkpointing()  # as on a GPU
    ours = sample.adjoint(pipe, noise, prompts, [{}] * 2, sigmas, rewards, guidance=guidance, batch=2)
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


def test_adjoint_writes_what_it_says(tmp_path):
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
