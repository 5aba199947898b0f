"""Tests of pipelines, their interception and LoRAs against plain diffusers, on tiny random pipelines (families.py).

They show that the velocities, pictures and LoRAs are right. Random weights can say nothing of quality.
"""
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import sample
import train_awm
import train_dpo
import train_nft
from flow import lora, run
from flow.intercept import latents_of, timestep_inputs
from flow.lora import add_lora
from flow.pipeline import (
    decode,
    draw_noise,
    encode_prompts,
    integrate,
    load_pipeline,
    project,
    schedule,
    training_levels,
    velocity,
)
from normguard import reference
from tests.helpers import CPU, PROMPTS, metrics, refuses, sample_rows

IMAGES = ["z_image", "qwen_image", "flux2_klein", "sana", "lumina2", "chroma", "aura_flow", "cogview4", "prx",
          "ernie_image"]
VIDEOS = {"wan": 5, "mochi": 7, "kandinsky5_t2v": 5}  # their frames


def shape(name: str) -> dict:
    """The flags for small pictures or videos."""
    return {"size": 32 if name == "wan" else 64, "frames": VIDEOS.get(name)}


@functools.lru_cache(1)
def plain_pipeline(model: str, lora: str | None, scheduler: str):
    """Load a pipeline with plain diffusers, as the docstring of sample.py shows."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if scheduler != "null":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(json.loads(scheduler))
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def plain_picture(row: dict) -> np.ndarray:
    """The picture that plain diffusers makes from a line of samples.jsonl; of a video, the middle frame."""
    pipe = plain_pipeline(row["model"], row["lora"], json.dumps(row["scheduler"]))
    generator = torch.Generator("cpu").manual_seed(row["seed"])
    made = pipe(prompt=row["prompt"], generator=generator, output_type="np", **row["pipe"])[0][0]
    made = made if made.ndim == 3 else made[len(made) // 2]
    return (made * 255).round().astype(int)


def compare_with_plain(out: Path, most: int = 1):
    """The pictures in a folder are those of plain diffusers, but for `most` levels of 255. Returns the lines of
    samples.jsonl."""
    rows = sample_rows(out)
    for row in rows:
        ours = np.asarray(Image.open(out / row["file"]).convert("RGB")).astype(int)
        assert ours.std() > 5  # something is to be seen
        assert np.abs(ours - plain_picture(row)).max() <= most
    return rows


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_pictures_are_plain_diffusers(family, tmp_path, name, guidance):
    sample.main(sample.Args(model=family(name), prompt=PROMPTS[1], seed=5, steps=3, guidance=guidance, n=2,
                            out=str(tmp_path), **shape(name)))
    rows = compare_with_plain(tmp_path)
    assert (rows[0]["scheduler"] is None) == (name not in ("sana", "wan"))
    assert len(list(tmp_path.glob("*.gif"))) == (3 if name in VIDEOS else 0)  # each video, and the grid


@torch.no_grad()
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_a_mixed_batch_is_one_sample_at_a_time(family, name):
    """A batch of different noise levels and prompts, with and without guidance, gives the velocities of single samples.
    The global generator is not used."""
    pipe = load_pipeline(family(name), CPU, **shape(name))
    encode_prompts(pipe, PROMPTS, 3.0)
    before = torch.get_rng_state()
    x = draw_noise(pipe, 3, torch.Generator().manual_seed(0))
    levels = [0.9, schedule(pipe, 7)[5].item(), 0.55], [0.4, 0.4, 0.4]
    for guidance, t in itertools.product((None, 3.0), map(torch.tensor, levels)):
        together = velocity(pipe, x, t, PROMPTS, guidance)
        alone = torch.cat([velocity(pipe, x[i:i + 1], t[i:i + 1], PROMPTS[i:i + 1], guidance) for i in range(3)])
        assert (together - alone).norm() <= 1e-4 * alone.norm()
    assert torch.equal(before, torch.get_rng_state())
    for other in (velocity(pipe, x, t + 0.3, PROMPTS, guidance), velocity(pipe, x, t, PROMPTS[::-1], guidance)):
        assert (other - together).norm() > 1e-3 * together.norm()  # time and prompt are heard


def test_a_size_is_the_size_that_the_transformer_draws(family, tmp_path):
    """By default SANA's pipeline would draw at one of its preset sizes, 512 pixels a side, and resize the picture."""
    pipe = load_pipeline(family("sana"), CPU, 64)
    assert pipe.flow.latents[-2:] == (2, 2)  # 32 pixels each
    sample.main(sample.Args(model=family("sana"), prompt=PROMPTS[0], steps=1, size=64, out=str(tmp_path)))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["pipe"]["use_resolution_binning"] is False


@pytest.mark.parametrize("name, size", [
    ("tiny/sd3", "64x32"),
    ("tiny/flux", "32x64"),
    ("qwen_image", "64x32"),
    ("wan", "32x64"),
])
def test_wide_and_high_pictures_are_plain_diffusers(family, tmp_path, name, size):
    """--size is width x height."""
    frames = VIDEOS.get(name)
    sample.main(sample.Args(model=family(name), prompt=PROMPTS[1], seed=5, steps=3, n=2, size=size, frames=frames,
                            out=str(tmp_path)))
    row = compare_with_plain(tmp_path)[0]
    width, height = map(int, size.split("x"))
    assert (row["pipe"]["width"], row["pipe"]["height"]) == (width, height)
    assert Image.open(tmp_path / "00000.png").size == (width, height)


def timesteps_given(pipe, run) -> list[dict]:
    """The timesteps that the transformer is given, for each call during run(): {position or name: values}."""
    told, clock = [], pipe.flow.timestep_names

    def hear(module, args, kwargs, out):
        """After all hooks that change what is given."""
        given = {**dict(enumerate(args)), **kwargs}
        told.append({name: given[name].clone() for name in clock})
    handle = pipe.transformer.register_forward_hook(hear, with_kwargs=True)
    run()
    handle.remove()
    return told


@pytest.mark.parametrize("name", ["tiny/sd3", "tiny/flux", *IMAGES, *VIDEOS])
def test_on_a_bf16_base_training_gives_the_timesteps_of_rollouts(family, name):
    """A mixed batch of an update gets, to the bit, the timesteps that one sample gets at these steps of a rollout, and
    its velocities are those of single samples. (bf16 rounds differently at other batch sizes: a few percent.)"""
    pipe = load_pipeline(family(name), CPU, base=torch.bfloat16, **shape(name))
    encode_prompts(pipe, PROMPTS[:1])
    sigmas, steps = schedule(pipe, 7), [1, 3, 5]
    x, prompts = draw_noise(pipe, 3, torch.Generator().manual_seed(0)), PROMPTS[:1] * 3
    in_rollout = timesteps_given(pipe, lambda: integrate(pipe, x[:1], prompts[:1], sigmas))
    together = []
    (mixed,) = timesteps_given(pipe, lambda: together.append(velocity(pipe, x, sigmas[steps], prompts)))
    for name, values in mixed.items():
        assert torch.equal(values, torch.cat([in_rollout[k][name].reshape(values[:1].shape) for k in steps]))
    with torch.no_grad():
        alone = torch.cat([velocity(pipe, x[i:i + 1], sigmas[[k]], prompts[:1]) for i, k in enumerate(steps)])
    assert (together[0] - alone).norm() <= 0.05 * alone.norm()


@pytest.mark.parametrize("name, in_one_go, one_by_one", [
    ("tiny/sd3", True, False),
    ("aura_flow", True, False),  # in bf16 its batches differ by a tenth from one sample: rounding, here
    ("qwen_image", False, False),  # it pads to the longest prompt
    ("prx", True, True),  # guided, it tells its time to two samples, however many there are
])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_how_batches_are_called_does_not_depend_on_precision(family, name, in_one_go, one_by_one, base):
    pipe = load_pipeline(family(name), CPU, 64, base=base)
    encode_prompts(pipe, PROMPTS, 3.0)
    assert (pipe.flow.in_one_go, pipe.flow.one_by_one) == (in_one_go, {None: False, 3.0: one_by_one})


@pytest.mark.parametrize("name", ["timestep", "hidden_states"])
def test_samples_that_see_each_other_a_little_are_called_one_by_one(name):
    """A hundredth of each sample's timestep or latents comes from another: less than the rounding of a bf16 base."""
    pipe = load_pipeline("tiny/sd3", CPU, base=torch.bfloat16)
    kind = type(pipe.transformer)

    def forward(self, **given):
        given[name] = 0.99 * given[name] + 0.01 * given[name].flip(0)
        return kind.forward(self, **given)
    pipe.transformer.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    pipe.flow.probe = None  # a copy from before
    encode_prompts(pipe, PROMPTS, 3.0)
    assert pipe.flow.one_by_one == {None: False, 3.0: True}


@pytest.mark.parametrize("name", ["z_image", "mochi", "flux2_klein"])
def test_gradients_reach_the_latents(family, name):
    """Compared with central differences along a direction. Z-Image's pipeline changes the sign, Mochi's noise levels
    rise."""
    pipe = load_pipeline(family(name), CPU, **shape(name))
    g = torch.Generator().manual_seed(0)
    x, w, h = draw_noise(pipe, 2, g).requires_grad_(), draw_noise(pipe, 2, g), 1e-2 * draw_noise(pipe, 2, g)
    t = torch.tensor([0.8, 0.4])
    (velocity(pipe, x, t, PROMPTS[::2]) * w).sum().backward()
    with torch.no_grad():
        up, down = (velocity(pipe, x + sign * h, t, PROMPTS[::2]) for sign in (1, -1))
    assert (x.grad * h).sum().item() == pytest.approx(((up - down) / 2 * w).sum().item(), rel=0.02)


@pytest.mark.parametrize("script, name", [
    *((train_awm, name) for name in ("z_image", "sana", "aura_flow", "kandinsky5_t2v")),
    *((train_nft, name) for name in ("qwen_image", "lumina2", "cogview4", "wan")),
    *((train_dpo, name) for name in ("flux2_klein", "chroma", "prx", "ernie_image"))])
def test_short_training(family, tmp_path, script, name):
    """After two epochs, the pictures of sample.py with the LoRA are those of plain diffusers with it."""
    guidance = 3.0 if name in ("flux2_klein", "qwen_image") else None
    out, more = tmp_path / "run", {"pairs": 1} if script is train_dpo else {}
    script.main(script.Args(
        model=family(name), out=str(out), epochs=2, group=2, groups=2, batch=3, rank=4, steps=3, timesteps=1, eval_n=2,
        eval_every=2, save_every=2, lr=2e-2, guidance=guidance, **shape(name), **more))
    lines = metrics(out)
    assert [lines[0]["eval_norm_ratio"], lines[1]["norm_ratio"]] == pytest.approx([1, 1], abs=1e-5)
    assert lines[-1]["eval_norm_ratio"] != 1 and all(line["grad_norm"] > 0 for line in lines if "loss" in line)
    assert (out / "samples/00002.png").exists() and (out / "samples/00002.gif").exists() == (name in VIDEOS)
    sample.main(sample.Args(model=family(name), lora=f"{out}/lora", prompt=PROMPTS[0], steps=3, norms=True,
                            out=f"{tmp_path}/lora", **shape(name)))
    assert json.loads((tmp_path / "lora/norms.json").read_text())["overall"] != 1
    if name != "prx":  # diffusers has no LoRA loader for it
        compare_with_plain(tmp_path / "lora")


def test_rollouts_are_guided_and_training_is_conditional(tmp_path, monkeypatch):
    """As in Flow-GRPO's train_sd3_dpo.py: the transformer sees each sample once in training, and twice in rollouts."""
    seen, honest = [], run.load_pipeline

    def watched(*args):
        pipe = honest(*args)
        pipe.transformer.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((torch.is_grad_enabled(), len(latents_of(kwargs)))),
            with_kwargs=True)
        return pipe
    monkeypatch.setattr(run, "load_pipeline", watched)
    train_awm.main(train_awm.Args(out=str(tmp_path), epochs=1, group=3, groups=2, rank=4, steps=3, timesteps=1,
                                  eval_every=0, guidance=4.0, lam=0, kl=0))
    trained, rolled = ([rows for grad, rows in seen if grad == kind] for kind in (True, False))
    assert trained == [6] and rolled[-3:] == [12, 12, 12]


def test_a_guidance_embedding_gets_the_same_in_rollouts_and_training(tmp_path, monkeypatch):
    told, honest = set(), run.load_pipeline

    def watched(*args):
        pipe = honest(*args)
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: told.update(kwargs["guidance"].tolist()), with_kwargs=True)
        return pipe
    monkeypatch.setattr(run, "load_pipeline", watched)
    for guidance in (None, 2.0):
        train_awm.main(train_awm.Args(
            model="tiny/flux", out=f"{tmp_path}/{guidance}", epochs=1, group=2, groups=2, rank=4, steps=3, timesteps=1,
            eval_n=2, guidance=guidance))
        assert told == {guidance or 3.5}
        told.clear()


def test_other_pipelines_are_refused(family, tmp_path, capsys):
    image_to_image = shutil.copytree("tiny/sd3", tmp_path / "img2img")
    index = json.loads((image_to_image / "model_index.json").read_text())
    changed = {**index, "_class_name": "StableDiffusion3Img2ImgPipeline"}
    (image_to_image / "model_index.json").write_text(json.dumps(changed))
    noise = shutil.copytree("tiny/sd3", tmp_path / "noise")
    (noise / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (noise / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    for name, words in [
            (family("stable_diffusion"), ["StableDiffusionPipeline", "unet", "flow-matching"]),
            (family("wan_a14b"), ["WanPipeline", "transformer and transformer_2"]),
            (family("qwen_image_edit"), ["QwenImageEditPipeline", "image-to-image"]),
            (image_to_image, ["StableDiffusion3Img2ImgPipeline", "image-to-image"]),
            (noise, ["DDIMScheduler", "flow-matching"])]:
        refuses(capsys, lambda: load_pipeline(str(name), CPU), f"--model {name}", *words)


def test_decoding_calls_no_transformer(family):
    pipe = load_pipeline(family("flux2_klein"), CPU, 64)
    x0 = draw_noise(pipe, 3, torch.Generator().manual_seed(0))
    pipe.transformer.register_forward_pre_hook(lambda *args: pytest.fail("the transformer was called"))
    assert decode(pipe, x0).shape == (3, 3, 64, 64)


def test_compiled_blocks_give_the_same_velocities_and_are_compiled_once():
    """A second epoch compiles nothing more."""
    pipe = load_pipeline("tiny/sd3", CPU)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-2:]  # SD3's last one drops its text
    encode_prompts(pipe, PROMPTS)
    add_lora(pipe.transformer, 4, 0)
    noise, t = draw_noise(pipe, 3, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.2])

    def epoch() -> list[torch.Tensor]:
        """Each kind of call that a training makes: rollout, update, old policy, reference."""
        x0, ratios = integrate(pipe, noise, PROMPTS, schedule(pipe, 2), compare=True)
        v = velocity(pipe, noise, t, PROMPTS)
        v.square().sum().backward()
        with torch.no_grad():
            v_old = velocity(pipe, noise, t, PROMPTS)
        with reference(pipe.transformer):
            return [x0, ratios, v.detach(), v_old, velocity(pipe, noise, t, PROMPTS)]

    plain, graphs = epoch(), []
    torch._dynamo.reset()
    lora.compile_blocks(pipe.transformer, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for ours, theirs in zip(epoch(), plain):
        torch.testing.assert_close(ours, theirs)
    compiled = len(graphs)
    epoch()
    torch._dynamo.reset()
    assert compiled == len(graphs) > 0


def test_schedule_is_the_pipelines():
    """With shift = 3, FlowMatchEulerDiscreteScheduler shifts twice: first sigma_min, then the even schedule down to
    it."""
    def shift(s):
        return 3 * s / (1 + 2 * s)
    expected = np.append(shift(np.linspace(1, shift(0.001), 8)), 0)
    np.testing.assert_allclose(schedule(load_pipeline("tiny/sd3", CPU), 8), expected, atol=1e-6)


@pytest.mark.parametrize("model", ["tiny/sd3", "tiny/flux"])
def test_dpo_trains_at_the_schedulers_levels(model):
    """As officially: the levels and timesteps that the scheduler starts with, shifted once (sd3) or not (flux, whose
    shift depends on the size). And the transformer is given these timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    pipe = load_pipeline(model, CPU)
    levels = training_levels(pipe)
    assert torch.equal(levels, scheduler.sigmas) and len(levels) == 1000
    assert levels[-1].item() == pytest.approx(0.003 / 1.002 if model == "tiny/sd3" else 0.001)
    for k in (0, 1, 500, 998, 999):
        told = timestep_inputs(pipe, levels[k].item())["timestep"].item()
        assert told * (1000 if model == "tiny/flux" else 1) == pytest.approx(scheduler.timesteps[k].item(), rel=1e-6)


def test_pictures_that_are_not_finite_end_the_run(capsys):
    pipe = load_pipeline("tiny/sd3", CPU)
    latents = torch.zeros(2, 16, 8, 8)
    latents[1, 0, 0, 0] = math.nan
    refuses(capsys, lambda: decode(pipe, latents), "not finite")


def test_project_takes_out_what_lies_along_the_reference():
    g = torch.Generator().manual_seed(0)
    v, v_ref = torch.randn(2, 3, 4, 4, 4, generator=g, dtype=torch.float64)
    ours = project(v, v_ref)
    for one, v_one, ref in zip(ours, v, v_ref):  # by Gram-Schmidt on each sample alone
        unit = ref / ref.square().sum().sqrt()
        change = (v_one - ref) - ((v_one - ref) * unit).sum() * unit
        torch.testing.assert_close(one, ref + change)
    torch.testing.assert_close(((ours - v_ref) * v_ref).flatten(1).sum(1), torch.zeros(3, dtype=torch.float64))
    assert project(v, torch.zeros_like(v)).isfinite().all()
