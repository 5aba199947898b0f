"""Tests of pipelines, their interception and LoRAs against plain diffusers, on tiny random pipelines (families.py).

They show that the velocities, pictures and LoRAs are right. Random weights can say nothing of quality.
"""
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import flow.cli
import sample
import train_awm
import train_dpo
import train_nft
from flow import pipeline, run
from flow.checkpoint import tensors
from flow.intercept import latents_of
from flow.lora import add_lora, lora_targets
from flow.pipeline import draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from flow.rewards import load_reward
from normguard import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))
from families import build  # noqa: E402

CPU = torch.device("cpu")
IMAGES = ["z_image", "qwen_image", "flux2_klein", "sana", "lumina2", "chroma", "aura_flow", "cogview4", "prx",
          "ernie_image"]
VIDEOS = {"wan": 5, "mochi": 7, "kandinsky5_t2v": 5}  # their frames
PROMPTS = ["a red star", "a very large blue ring", "a green moon"]  # of several lengths


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Defaults like tiny/sd3 are relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(name): of a family's pipeline, built once."""
    made = tmp_path_factory.mktemp("families")

    def of(name: str) -> str:
        if not (made / name).exists():
            build(name, made / name)
        return str(made / name)
    return of


def shape(name: str) -> dict:
    """The flags for small pictures, or videos."""
    return {"size": 32 if name == "wan" else 64, "frames": VIDEOS.get(name)}


@functools.lru_cache(1)
def plain_pipeline(model: str, lora: str | None, scheduler: str):
    """Plain diffusers', as the docstring of sample.py loads it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if scheduler != "null":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(json.loads(scheduler))
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def plain_picture(row: dict) -> np.ndarray:
    """What plain diffusers makes of a line of samples.jsonl; of a video the middle frame."""
    pipe = plain_pipeline(row["model"], row["lora"], json.dumps(row["scheduler"]))
    generator = torch.Generator("cpu").manual_seed(row["seed"])
    made = pipe(prompt=row["prompt"], generator=generator, output_type="np", **row["pipe"])[0][0]
    made = made if made.ndim == 3 else made[len(made) // 2]
    return (made * 255).round().astype(int)


def compare_with_plain(out: Path, most: int = 1):
    """The pictures in a folder are plain diffusers', up to the last of 8 bits."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        ours = np.asarray(Image.open(out / row["file"]).convert("RGB")).astype(int)
        assert ours.std() > 5  # something is to be seen
        assert np.abs(ours - plain_picture(row)).max() <= most
    return rows


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_pictures_are_plain_diffusers(folder, tmp_path, name, guidance):
    sample.main(sample.Args(model=folder(name), prompt=PROMPTS[1], seed=5, steps=3, guidance=guidance, n=2,
                            out=str(tmp_path), **shape(name)))
    rows = compare_with_plain(tmp_path)
    assert (rows[0]["scheduler"] is None) == (name not in ("sana", "wan"))
    assert len(list(tmp_path.glob("*.gif"))) == (3 if name in VIDEOS else 0)  # each video, and the grid


@torch.no_grad()
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_a_mixed_batch_is_one_sample_at_a_time(folder, name):
    """Samples at noise levels and with prompts of their own, with and without guidance, against the pipeline told one
    time for one prompt; nothing moves the global generator."""
    pipe = load_pipeline(folder(name), CPU, **shape(name))
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


def test_a_size_is_the_size_that_the_transformer_draws(folder, tmp_path):
    """SANA's pipeline would draw in a bin of its own, 512 pixels a side, and resize the picture."""
    pipe = load_pipeline(folder("sana"), CPU, 64)
    assert pipe.flow.latents[-2:] == (2, 2)  # 32 pixels each
    sample.main(sample.Args(model=folder("sana"), prompt=PROMPTS[0], steps=1, size=64, out=str(tmp_path)))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["pipe"]["use_resolution_binning"] is False


def times_told(pipe, run) -> list[dict]:
    """What the transformer is told of the time, call by call, while run() lasts: {place or name: values}."""
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
def test_on_a_bf16_base_training_tells_the_time_of_rollouts(folder, name):
    """A mixed batch of an update is told, to the bit, what one sample is told at these steps of a rollout, and its
    velocities are those of each sample alone. (bf16 rounds otherwise in batches of another size: a few percent.)"""
    pipe = load_pipeline(name if "/" in name else folder(name), CPU, base=torch.bfloat16, **shape(name))
    encode_prompts(pipe, PROMPTS[:1])
    sigmas, steps = schedule(pipe, 7), [1, 3, 5]
    x, prompts = draw_noise(pipe, 3, torch.Generator().manual_seed(0)), PROMPTS[:1] * 3
    in_rollout = times_told(pipe, lambda: integrate(pipe, x[:1], prompts[:1], sigmas))
    together = []
    (mixed,) = times_told(pipe, lambda: together.append(velocity(pipe, x, sigmas[steps], prompts)))
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
def test_whether_batches_hold_does_not_depend_on_precision(folder, name, in_one_go, one_by_one, base):
    pipe = load_pipeline(name if "/" in name else folder(name), CPU, 64, base=base)
    encode_prompts(pipe, PROMPTS, 3.0)
    assert (pipe.flow.in_one_go, pipe.flow.one_by_one) == (in_one_go, {None: False, 3.0: one_by_one})


@pytest.mark.parametrize("name", ["timestep", "hidden_states"])
def test_samples_that_see_each_other_a_little_are_called_one_by_one(name):
    """A hundredth of a sample's time or latents is another's: less than the rounding of a bf16 base."""
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
def test_gradients_reach_the_latents(folder, name):
    """Along a direction, against central differences; Z-Image's pipeline turns the sign, Mochi's noise levels rise."""
    pipe = load_pipeline(folder(name), CPU, **shape(name))
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
def test_short_training(folder, tmp_path, script, name):
    """Two epochs; then the pictures of sample.py with the LoRA are those of plain diffusers with it."""
    guidance = 3.0 if name in ("flux2_klein", "qwen_image") else None
    out, more = tmp_path / "run", {"pairs": 1} if script is train_dpo else {}
    script.main(script.Args(
        model=folder(name), out=str(out), epochs=2, group=2, groups=2, batch=3, rank=4, steps=3, timesteps=1, eval_n=2,
        eval_every=2, save_every=2, lr=2e-2, guidance=guidance, **shape(name), **more))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [lines[0]["eval_norm_ratio"], lines[1]["norm_ratio"]] == pytest.approx([1, 1], abs=1e-5)
    assert lines[-1]["eval_norm_ratio"] != 1 and all(line["grad_norm"] > 0 for line in lines if "loss" in line)
    assert (out / "samples/00002.png").exists() and (out / "samples/00002.gif").exists() == (name in VIDEOS)
    sample.main(sample.Args(model=folder(name), lora=f"{out}/lora", prompt=PROMPTS[0], steps=3, norms=True,
                            out=f"{tmp_path}/lora", **shape(name)))
    assert json.loads((tmp_path / "lora/norms.json").read_text())["overall"] != 1
    if name != "prx":  # diffusers has no LoRA loader for it
        compare_with_plain(tmp_path / "lora")


def test_rollouts_are_guided_and_training_is_conditional(tmp_path, monkeypatch):
    """As in Flow-GRPO's train_sd3_dpo.py: with a gradient the transformer sees each sample once, in rollouts twice."""
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


def test_a_guidance_embedding_is_told_the_same_in_rollouts_and_training(tmp_path, monkeypatch):
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


def test_lora_goes_where_it_went_before():
    """On SD3, SD3.5 and FLUX.1 the layers that DiffusionNFT, AWM and Flow-GRPO list by name, without SD3.5's attn2."""
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


def test_what_is_no_such_pipeline_is_refused(folder, tmp_path, capsys):
    image_to_image = shutil.copytree("tiny/sd3", tmp_path / "img2img")
    index = json.loads((image_to_image / "model_index.json").read_text())
    changed = {**index, "_class_name": "StableDiffusion3Img2ImgPipeline"}
    (image_to_image / "model_index.json").write_text(json.dumps(changed))
    noise = shutil.copytree("tiny/sd3", tmp_path / "noise")
    (noise / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (noise / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    for name, words in [
            (folder("stable_diffusion"), ["StableDiffusionPipeline", "unet", "flow-matching"]),
            (folder("wan_a14b"), ["WanPipeline", "transformer and transformer_2"]),
            (folder("qwen_image_edit"), ["QwenImageEditPipeline", "image-to-image"]),
            (image_to_image, ["StableDiffusion3Img2ImgPipeline", "image-to-image"]),
            (noise, ["DDIMScheduler", "flow-matching"])]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
            load_pipeline(str(name), CPU)
        error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2 and len(error) == 1 and f"--model {name}" in error[0], error
        assert all(word in error[0] for word in words), error
    for changes, word in [({"frames": 5}, "--frames 5"), ({"size": 60}, "--size 60")]:
        with pytest.raises(SystemExit), flow.cli.one_line_errors():
            load_pipeline("tiny/sd3", CPU, **changes)
        assert word in capsys.readouterr().err


def test_prompts_are_encoded_once(folder, monkeypatch):
    """By the pipeline's own encoding, each prompt; with the encoders gone a prompt that was not encoded is told."""
    pipe, asked = load_pipeline(folder("qwen_image"), CPU, 64), []
    pipe.flow.encoders["text_encoder"].register_forward_hook(lambda *args: asked.append(None))
    encode_prompts(pipe, PROMPTS * 3)
    assert len(asked) == len(PROMPTS)
    noise = draw_noise(pipe, 6, torch.Generator().manual_seed(0))
    integrate(pipe, noise, PROMPTS * 2, schedule(pipe, 2))
    assert len(asked) == len(PROMPTS)
    with pytest.raises(ValueError, match="encode_prompts"):
        velocity(pipe, noise[:1], torch.ones(1), ["a prompt that nobody has encoded"])


def test_a_videos_reward_is_the_mean_over_four_frames(tmp_path):
    (tmp_path / "red.py").write_text("def red(images, prompts):\n    assert images.ndim == 4\n"
                                     "    return images[:, 0].mean((1, 2))\n")
    reward = load_reward(f"{tmp_path}/red.py:red", CPU)
    videos = torch.rand(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(reward(videos, ["a", "b"]), videos[:, [0, 3, 6, 9], 0].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(reward(videos[:, :3], ["a", "b"]), videos[:, :3, 0].mean((1, 2, 3)), rtol=1e-6)


def test_the_empty_loop_decodes_and_nothing_else(folder):
    """Decoding calls no transformer."""
    pipe = load_pipeline(folder("flux2_klein"), CPU, 64)
    x0 = draw_noise(pipe, 3, torch.Generator().manual_seed(0))
    pipe.transformer.register_forward_pre_hook(lambda *args: pytest.fail("the transformer was called"))
    assert pipeline.decode(pipe, x0).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("model", ["tiny/sd3", "z_image", "qwen_image", "cogview4"])
def test_kept_encodings_are_the_encoders_own(folder, tmp_path, model):
    """With a folder for them, guided and not, a second pipeline asks its encoders nothing and computes the same."""
    name = model if "/" in model else folder(model)
    velocities = []
    for again in (False, True):
        pipe, asked = load_pipeline(name, CPU, 64), []
        for encoder in pipe.flow.encoders.values():
            encoder.register_forward_hook(lambda *args: asked.append(None))
        encode_prompts(pipe, PROMPTS, 3.0, tmp_path)
        assert bool(asked) != again
        noise, t = draw_noise(pipe, 3, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.2])
        with torch.no_grad():
            velocities.append([velocity(pipe, noise, t, PROMPTS, guidance) for guidance in (None, 3.0)])
    assert torch.equal(*map(torch.stack, velocities))
    encode_prompts(pipe := load_pipeline(name, torch.device("cpu", 0), 64), PROMPTS, 3.0, tmp_path)  # another device
    with torch.no_grad():
        torch.testing.assert_close(velocity(pipe, noise, t, PROMPTS, 3.0), velocities[0][1])
    in_bf16, asked = load_pipeline(name, CPU, 64, base=torch.bfloat16), []
    for encoder in in_bf16.flow.encoders.values():
        encoder.register_forward_hook(lambda *args: asked.append(None))
    encode_prompts(in_bf16, PROMPTS, 3.0, tmp_path)
    assert asked  # what fp32 encoders have made is not taken for bf16's
    for file in tmp_path.glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])  # broken: they are encoded again
    encode_prompts(pipe := load_pipeline(name, CPU, 64), [*PROMPTS, "a new prompt"], 3.0, tmp_path)  # is encoded
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(tmp_path) in line]
    kept = [x for key, row in pipe.flow.rows.items() if key[1] in PROMPTS for x in tensors(list(row))]
    kept += [x for key, row in pipe.flow.last.items() if key in PROMPTS for x in tensors(list(row))]
    assert kept and all(any(int(a, 16) <= x.data_ptr() < int(b, 16) for a, b in maps) for x in kept)  # on disk


def test_compiled_blocks_are_the_blocks_and_are_compiled_once():
    """The velocities are the same, and a second epoch compiles nothing more."""
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
    run.compile_blocks(pipe.transformer, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for ours, theirs in zip(epoch(), plain):
        torch.testing.assert_close(ours, theirs)
    compiled = len(graphs)
    epoch()
    torch._dynamo.reset()
    assert compiled == len(graphs) > 0
