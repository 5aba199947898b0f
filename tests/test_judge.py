"""Tests of what eval_judge.py asks: a vision-language model in this process or over HTTP, detectors, distances."""
import base64
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_judge
import flow.cli
import flow.judge
from flow.judge import http_judge, local_judge, read_answer
from tests.helpers import CPU, refuses

OVERALL = eval_judge.SINGLE["overall"]  # tiny/judge knows the words of eval_judge.py's questions only; it has commas


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


def test_each_picture_can_have_another_question(folders):
    """In a batch the answers are those of each question alone, though the longer one pads the shorter."""
    ask, files = local_judge("tiny/judge", CPU), [[f"{folders[0]}/0000{i}.png"] for i in range(2)]
    questions = [eval_judge.SINGLE["artifacts"], OVERALL]
    alone = [ask(question, [file])[0] for question, file in zip(questions, files)]
    for one, other in zip(ask(questions, files), alone):
        assert read_answer(one, "yes", "no") == pytest.approx(read_answer(other, "yes", "no"), abs=1e-4)


def test_frechet_distance_of_known_gaussians():
    g = np.random.default_rng(0)
    a = g.normal(size=(4000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # zero mean and unit covariance, exactly
    b = a * [1, 2, 3] + [0, 0, 2]
    ours = eval_judge.judge.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert ours == pytest.approx(2**2 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-9)  # |dm|^2 + sum (s1 - s2)^2
    turn, _ = np.linalg.qr(g.normal(size=(3, 3)))
    turned = eval_judge.judge.frechet_distance(torch.from_numpy(a @ turn), torch.from_numpy(b @ turn))
    assert turned == pytest.approx(ours, rel=1e-9)


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


# ---------------------------------------------------------------- over HTTP

def test_a_request_is_what_servers_expect(server, folders, monkeypatch):
    url, _, asked = server
    file = f"{folders[0]}/00000.png"
    ask = http_judge(url, "a/model")
    assert ask(["one?", "two?"], [[file], [file, file]])[0] == [("Yes", math.log(0.6)), ("no", math.log(0.3))]
    (headers, one), (_, two) = sorted(asked, key=lambda request: len(str(request[1])))
    assert headers["Authorization"] == "Bearer none"  # a local server needs no key
    assert {k: v for k, v in one.items() if k != "messages"} == {
        "model": "a/model", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    picture, question = one["messages"][0]["content"]
    sent = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert sent == Path(file).read_bytes() and question == {"type": "text", "text": "one?"}
    assert [part["text"] for part in two["messages"][0]["content"] if part["type"] == "text"] == [
        "Picture A:", "Picture B:", "two?"]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    http_judge(url, "a/model")("one?", [[file]])
    assert asked[-1][0]["Authorization"] == "Bearer secret"


def test_a_busy_server_is_asked_again(server, folders, capsys):
    url, replies, asked = server
    replies += [(503, {}), (429, {}), (500, {})]
    assert http_judge(url, "m", retries=3)("?", [[f"{folders[0]}/00000.png"]])[0][0][0] == "Yes"
    assert len(asked) == 4 and not capsys.readouterr().err


def test_failed_answers_are_empty_and_reported_once(server, folders, capsys):
    url, replies, asked = server
    files = [[f"{folders[0]}/00000.png"]] * 6
    word = {"choices": [{"message": {"content": "No way"}}]}
    replies += [(200, word), (400, {"error": {"message": "too large"}}), (200, {}), (500, {}), (500, {})]
    ask = http_judge(url, "m", retries=0, concurrency=1)
    said = ask("?", files)
    assert said[0] == [("No", 0.0)] and said[1:5] == [[]] * 4 and said[5]  # a server without logprobs gives its word
    assert all(math.isnan(read_answer(top, "yes", "no")) for top in said[1:5])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith(f"warning: --judge {url}: ") for line in warnings)
    assert "too large" in warnings[0] and "500" in warnings[2]
    replies += [(500, {})]
    assert ask("?", files[:1]) == [[]]  # a later batch may fail as a whole
    assert not capsys.readouterr().err


@pytest.mark.parametrize("status, words", [
    (401, ["401", "OPENAI_API_KEY"]),
    (403, ["403", "OPENAI_API_KEY"]),
    (404, ["404", "a/model"]),
])
def test_a_server_that_refuses(server, folders, capsys, status, words):
    url, replies, asked = server
    replies += [(status, {"error": {"message": "no"}})] * 99
    ask = http_judge(url, "a/model", concurrency=2)
    refuses(capsys, lambda: ask("?", [[f"{folders[0]}/00000.png"]] * 40), f"--judge {url}", *words)
    assert len(asked) <= 4  # two at a time; the rest is not asked


def test_no_url_no_package(capsys, monkeypatch):
    refuses(capsys, lambda: http_judge("http://HOST:PORT/v1", "m"), "--judge http://HOST:PORT/v1", "no URL")
    monkeypatch.setitem(sys.modules, "openai", None)
    refuses(capsys, lambda: http_judge("http://127.0.0.1:9/v1", "m"), "--judge", "pip install openai")


def test_a_server_that_answers_nothing(server, folders, capsys):
    url, replies, _ = server
    replies += [(200, {})] * 2
    ask = http_judge(url, "m")
    with pytest.raises(SystemExit), flow.cli.one_line_errors():
        ask("?", [[f"{folders[0]}/00000.png"]] * 2)
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning") and error.startswith(f"error: --judge {url}: no request has succeeded")
