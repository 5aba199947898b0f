"""Tests of prompts: read from files, encoded once, kept on disk; what a model was not made for is told."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from flow import prompts
from flow.pipeline import draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from flow.prompts import warn_unsuitable
from flow.rewards import load_reward
from tests.helpers import CPU, PROMPTS

LONG = "a very very very very very very red star before a wall"


@pytest.fixture(scope="module", params=["tiny/sd3", "tiny/flux"])
def pipe(request):
    return load_pipeline(request.param, CPU)


def test_prompts_that_are_cut_are_reported_once_with_the_limit(pipe, capsys):
    warn_unsuitable(pipe, ["a red star"] * 3, None)
    assert capsys.readouterr().out == ""
    warn_unsuitable(pipe, ["a red star", LONG, LONG, LONG + " and a floor"], None)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "note: 2 of 3 prompts" in said and "the 8 tokens" in said and LONG in said
    # a tokenizer that reads all of it: nothing is lost
    pipe.tokenizer_2.model_max_length, before = 99, pipe.tokenizer_2.model_max_length
    pipe.flow.settings["max_sequence_length"], settings = 99, dict(pipe.flow.settings)
    warn_unsuitable(pipe, [LONG], None)
    pipe.tokenizer_2.model_max_length = before
    pipe.flow.settings = settings
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["tiny/pickscore", "tiny/hps"])
def test_prompts_that_a_reward_cuts_are_reported_once_with_its_name(name, capsys):
    reward = load_reward(f"{name}:0.5,tiny/pickscore", CPU)
    reward.warn_cut(["a red star"] * 3)
    assert capsys.readouterr().out == ""
    longest = reward.models[0].config.text_config.max_position_embeddings
    reward.warn_cut(["a red star", "very " * longest, "very " * longest])
    first, *others = capsys.readouterr().out.splitlines()
    assert f"note: 1 of 2 prompts are longer than the {longest} tokens that --reward {name} reads" in first
    assert len(others) == 1 and "--reward tiny/pickscore reads" in others[0]


def test_a_size_far_from_the_models_is_reported(pipe, capsys):
    for size in (None, 32, 64, 128):
        warn_unsuitable(pipe, ["a red star"], size)
    assert capsys.readouterr().out == ""
    for size in (16, 256):
        warn_unsuitable(pipe, ["a red star"], size)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"--size {size}" in said and "64 pixels" in said


def test_a_byte_order_mark_is_no_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red star\n")
    assert prompts.read_prompts(f"{tmp_path}/prompts.txt", "--prompts") == ["a red star"]


def test_prompts_are_encoded_once(family, monkeypatch):
    """The pipeline encodes each prompt once. Without the encoders, a prompt that was not encoded is an error."""
    pipe, asked = load_pipeline(family("qwen_image"), CPU, 64), []
    pipe.flow.encoders["text_encoder"].register_forward_hook(lambda *args: asked.append(None))
    encode_prompts(pipe, PROMPTS * 3)
    assert len(asked) == len(PROMPTS)
    noise = draw_noise(pipe, 6, torch.Generator().manual_seed(0))
    integrate(pipe, noise, PROMPTS * 2, schedule(pipe, 2))
    assert len(asked) == len(PROMPTS)
    with pytest.raises(ValueError, match="encode_prompts"):
        velocity(pipe, noise[:1], torch.ones(1), ["a prompt that nobody has encoded"])


@pytest.mark.parametrize("model", ["tiny/sd3", "z_image", "qwen_image", "cogview4"])
def test_kept_encodings_are_the_encoders_output(family, tmp_path, model):
    """With a folder for the encodings, guided or not, a second pipeline does not call its encoders and computes the
    same."""
    name = family(model)
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
    kept = tree_leaves([row for key, row in pipe.flow.rows.items() if key[1] in PROMPTS])
    kept = [x for x in kept if torch.is_tensor(x) and x.is_floating_point()]
    assert kept and all(any(int(a, 16) <= x.data_ptr() < int(b, 16) for a, b in maps) for x in kept)  # on disk
