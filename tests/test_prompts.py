"""Tests of what is said of prompts and sizes that a model was not made for."""
import pytest
import torch

from flow.pipeline import load_pipeline
from flow.prompts import warn_unsuitable

LONG = "a very very very very very very red star before a wall"


@pytest.fixture(scope="module", params=["tiny/sd3", "tiny/flux"])
def pipe(request):
    return load_pipeline(request.param, torch.device("cpu"))


def test_prompts_that_are_cut_are_told_once_with_the_limit(pipe, capsys):
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


def test_a_size_far_from_the_models_own_is_told(pipe, capsys):
    for size in (None, 32, 64, 128):
        warn_unsuitable(pipe, ["a red star"], size)
    assert capsys.readouterr().out == ""
    for size in (16, 256):
        warn_unsuitable(pipe, ["a red star"], size)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"--size {size}" in said and "64 pixels" in said
