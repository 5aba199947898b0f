"""Tests of what eval_judge.py asks: a vision-language model in this process or over HTTP, detectors, distances."""
import base64
import io
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_judge
import flow.judge
from flow.judge import CERTAIN, http_judge, local_judge, read_answer
from tests.helpers import CPU, refuses, serve

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


def test_a_judge_in_this_process_is_never_without_probabilities(folders):
    """Also where it is so sure that a probability is rounded to 1."""
    ask = local_judge("tiny/judge", CPU)
    with torch.no_grad():
        ask.model.get_output_embeddings().weight *= 1e4
    top, = ask(OVERALL, [[f"{folders[0]}/00000.png"]])
    assert CERTAIN - 1 < abs(read_answer(top, "yes", "no")) != CERTAIN


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
    assert flow.judge.real_labels("x", {0: 0, 1: 1}, "1") == [1]  # labels that are numbers
    refuses(capsys, lambda: flow.judge.real_labels("x", {0: "fake", 1: "real"}, "typo"),
            "--real-label typo", "fake, real")
    for labels in (
        {0: "LABEL_0", 1: "LABEL_1"},
        {0: "real", 1: "cat"},
        {0: "ai", 1: "fake"},
        {0: "real fake", 1: "fake"},
        {0: 0, 1: 1},
    ):
        refuses(capsys, lambda: flow.judge.real_labels("x", labels, None),
                "--forensic x", str(labels[0]), str(labels[1]), "--real-label")


def save_detector(folder, labels: list[str], **config) -> str:
    """A detector of random weights with these labels."""
    ids = dict(enumerate(labels))
    net = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label=ids, label2id={label: i for i, label in ids.items()}, **config))
    with torch.no_grad():
        net.classifier.weight *= 50
        net.classifier.bias -= net(torch.zeros(1, 3, 32, 32)).logits[0]  # so that scores are not all near 0 or 1
    net.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("labels, config, real_label, expected", [
    (["artificial", "human"], {}, None, lambda p: p["human"]),
    (["real"], {}, None, lambda p: p["real"]),
    (["fake"], {}, None, lambda p: 1 - p["fake"]),
    (["LABEL_0"], {}, "LABEL_0", lambda p: p["LABEL_0"]),
    (["real"], {"problem_type": "regression"}, None, lambda p: p["real"]),
    (["fake", "real"], {"problem_type": "multi_label_classification"}, None, lambda p: p["real"]),
    (["real", "ai", "blurred"], {"problem_type": "multi_label_classification"}, None, lambda p: p["real"]),
    (["real", "fake", "natural"], {"problem_type": "multi_label_classification"}, None,
     lambda p: max(p["real"], p["natural"])),
    (["a", "b"], {"problem_type": "multi_label_classification"}, "b", lambda p: p["b"]),
    (["real", "fake", "LABEL_2", "drawing"], {}, None, lambda p: p["real"]),
    (["human", "ai generated", "fake", "natural"], {}, None, lambda p: p["human"] + p["natural"]),
])
def test_detectors_are_read_as_their_own_library_does(folders, tmp_path, labels, config, real_label, expected):
    torch.manual_seed(0)
    detector = save_detector(tmp_path / "detector", labels, **config)
    pipe = transformers.pipeline("image-classification", detector, dtype=torch.float32, device="cpu")
    files = [f"{folder}/0000{i}.png" for folder in folders for i in range(3)]
    said = [{one["label"]: one["score"] for one in pipe(file, top_k=9)} for file in files]
    ours = flow.judge.load_forensic(detector, real_label, CPU)(files)
    torch.testing.assert_close(ours, torch.tensor(list(map(expected, said))), rtol=0, atol=1e-6)
    assert 0.05 < ours.mean() < 0.95 or config.get("problem_type") == "regression"
    assert ours.std() > 1e-3


@pytest.mark.parametrize("labels, real_label", [
    (["LABEL_0"], None), (["LABEL_0"], "LABEL_1"), (["a", "b", "c"], None), (["real", "LABEL_1"], None),
    (["not real"], None), (["real", "not fake"], None)])
def test_unknown_labels_are_refused(tmp_path, capsys, labels, real_label):
    detector = save_detector(tmp_path / "detector", labels)
    refuses(capsys, lambda: flow.judge.load_forensic(detector, real_label, CPU), f"--forensic {detector}", labels[0],
            "--real-label")


def test_random_weights_are_refused(tmp_path, capsys):
    """A detector without a head, or a network whose features are random or missing, gives no number."""
    detector = save_detector(tmp_path / "detector", ["fake", "real"])
    refuses(capsys, lambda: flow.judge.load_forensic("tiny/pickscore", "LABEL_1", CPU), "--forensic tiny/pickscore",
            "lacks weights", "classifier")
    refuses(capsys, lambda: flow.judge.load_embed(detector, CPU), f"--embed {detector}", "lacks weights", "pooler")
    refuses(capsys, lambda: flow.judge.load_embed("tiny/judge", CPU), "--embed tiny/judge", "cannot be loaded")
    headless = shutil.copytree("tiny/judge", tmp_path / "judge")
    weights = load_file(headless / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "lm_head" not in name and "embed_tokens" not in name},
              headless / "model.safetensors", {"format": "pt"})
    refuses(capsys, lambda: local_judge(str(headless), CPU), f"--judge {headless}", "lacks weights")


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
    for fault, words in [
        ((200, {}), ["{}"]),
        ((200, b""), ["nothing"]),
        ((200, b"[" * 100_000), ["[[[["]),
        ((200, {"error": {"type": "overload", "message": "all workers are busy"}}), ["all workers are busy"]),
        ((200, {"object": "error", "message": "no such template"}), ["no such template"]),
        ((200, {"detail": [{"loc": ["body"], "msg": "field required"}]}), ["field required"]),
        ((200, b"<!doctype html><title>Open WebUI</title><script>if (a<b) {}</script>", {"Content-Type": "text/html"}),
         ["an HTML page: Open WebUI;", "/v1"]),
        ((200, b'{"choices": [{"message": {"con'), ['{"choices": [{"message"']),
        ((200, b'{"choices": []}', {"Content-Length": 99}), ["a reply broke off"]),
        ((404, {"detail": "Not Found"}), ["status 404: Not Found", "/v1"]),
        ((404, {"error": {"message": "The model `a/model` does not exist."}}), ["404", "`a/model` does not exist"]),
        ((400, {"error": "top_logprobs must be at most 5"}), ["status 400: top_logprobs must be at most 5"]),
        ((403, b"<html><body><h1>403 Forbidden</h1><hr>nginx</body></html>"), ["403", "403 Forbidden nginx"]),
        ((429, {}, {"retry-after-ms": None, "Retry-After": "86400"}), ["status 429"]),  # it does not wait for a day
    ]:
        replies[:] = [fault] * 3  # two pictures, and the question without one
        ask = http_judge(url, "a/model", retries=0 if "Content-Length" in str(fault) else 3)
        refuses(capsys, lambda: ask("?", [[f"{folders[0]}/00000.png"]] * 2), f"--judge {url}", "a/model", *words)
    for seconds, words in ((1, "no reply in 0.3 s"), (0, "a reply broke off")):
        with serve(lambda *args: time.sleep(seconds)) as hung:
            ask = http_judge(hung, "m", retries=0, timeout=0.3)
            refuses(capsys, lambda: ask("?", [[f"{folders[0]}/00000.png"]]), f"--judge {hung}", words)
    dead = "http://127.0.0.1:9/v1"
    refuses(capsys, lambda: http_judge(dead, "m", retries=0)("?", [[f"{folders[0]}/00000.png"]]), dead,
            "cannot be reached (Connection refused)")


def test_a_key_that_cannot_be_sent(server, folders, capsys, monkeypatch):
    url, _, asked = server
    for key in ("one\ntwo", "caf\u00e9"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        refuses(capsys, lambda: http_judge(url, "m"), f"--judge {url}", "OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "a key \n")  # as a file of it ends
    http_judge(url, "m")("?", [[f"{folders[0]}/00000.png"]])
    assert asked[-1][0]["Authorization"] == "Bearer a key"


def test_one_refusal_is_not_the_end(server, folders, capsys):
    """It is counted as failed, at the start and later, and said once for all threads and requests."""
    url, replies, asked = server
    moderated = {"error": {"message": "flagged by the content filter, request req_%s"}}
    replies += [(403, json.loads(json.dumps(moderated) % f"{i}a7f90{i}")) for i in range(3)]
    ask = http_judge(url, "m", concurrency=4)
    answers = ask("?", [[f"{folders[0]}/00000.png"]] * 20)
    replies += [(403, json.loads(json.dumps(moderated) % "99f0a"))]
    answers += ask("?", [[f"{folders[0]}/00000.png"]])
    # 20 pictures, the question without a picture after the first three, and one picture
    assert len(asked) == 22 and sum(top == [] for top in answers) == 4 and answers[-1] == []
    warning, = capsys.readouterr().err.splitlines()
    assert "status 403: flagged by the content filter" in warning
    replies += [(403, moderated)]  # the only one that a second run still asks
    assert http_judge(url, "m")("?", [[f"{folders[0]}/00000.png"]]) == [[]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("headers, seconds", [
    ({}, (0.2, 1.5)),  # the server does not say how long
    ({"Retry-After": "1"}, (1, 2)),
    ({"Retry-After": "-5"}, (0.2, 1.5)),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, (0.2, 1.5)),
    ({"Retry-After": "soon"}, (0.2, 1.5)),
])
def test_a_wait_is_said_on_the_bar(server, folders, monkeypatch, headers, seconds):
    url, replies, asked = server
    replies += [(429 if len(headers) % 2 else 503, {}, {"retry-after-ms": None, **headers})]
    monkeypatch.setattr(sys, "stderr", Terminal())
    start = time.monotonic()
    assert http_judge(url, "m")("?", [[f"{folders[0]}/00000.png"]])[0]
    assert seconds[0] < time.monotonic() - start < seconds[1] and len(asked) == 2
    assert "waiting" in sys.stderr.getvalue() and f"(status {429 if headers else 503})" in sys.stderr.getvalue()


def token(text: str | None, p: float | None, top: dict[str, float] | None = None, **more) -> dict:
    """A token of a reply with its probability p, and those of the tokens in its place; None for null, p > 1 for an odd
    log-probability."""
    def log(p):
        return p if p is None or not 0 < p <= 1 else math.log(p)
    top = None if top is None else [{"token": word, "logprob": log(q)} for word, q in top.items()]
    return {"token": text, "logprob": log(p), "top_logprobs": top, **more}


def reply(content, *tokens: dict, finish_reason="length", **message) -> dict:
    """A server's reply: its text, and its tokens (none: without probabilities)."""
    logprobs = {"logprobs": {"content": [*tokens]}} if tokens else {}
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason, **logprobs}]}


def spoken(*texts: str) -> list[dict]:
    """Tokens that are followed by "No" with 90 %, against 5 % for a "Yes" in each one's place."""
    return [token(text, 0.9, {text: 0.9, "Yes": 0.05}) for text in texts]


NO = 0.05 / 0.95
FORMS = {  # name: (reply, P(yes)), where the token has probabilities
    "OpenAI": (reply("Yes", token("Yes", 0.9, {"Yes": 0.9, "No": 0.08, "yes": 0.01})), 0.91 / 0.99),
    "LMDeploy": (reply("Yes", token("Yes", 0.9, {"No": 0.08, "yes": 0.01})), 0.91 / 0.99),
    "LMDeploy, no": (reply("No", token("No", 0.9, {"Yes": 0.08})), 0.08 / 0.98),
    "LMDeploy, another spelling listed": (
        reply("Yes", token("Yes", 0.8, {" Yes": 0.1, "No": 0.08})), 0.9 / 0.98),
    "one token in several spellings": (
        reply("YES", token("YES", 0.3, {"YES": 0.3, " yes": 0.2, "Yes.": 0.1, "no": 0.2, " NO": 0.1, "\nNo": 0.05})),
        0.6 / 0.95),
    "raw, of byte-level BPE": (reply("yes", token("Ġyes", 0.7, {"Ġyes": 0.7, "ĊNo": 0.2, "yes": 0.05})), 0.75 / 0.95),
    "raw, of sentencepiece": (reply("Yes", token("▁Yes", 0.7, {"No": 0.2})), 0.7 / 0.9),
    "raw in the list alone": (reply("yes", token("yes", 0.45, {"▁yes": 0.45, "▁no": 0.45})), 0.5),
    "bytes": (reply("Yes", {**token("token_id:9", 0.7, {}, bytes=[89, 101, 115]), "top_logprobs": [
        token("token_id:3", 0.2, bytes=[78, 111])]}), 0.7 / 0.9),
    "no text": (reply(None, token("Yes", 0.9, {"Yes": 0.9, "No": 0.1}), finish_reason="stop"), 0.9),
    "-inf": (reply("Yes", token("Yes", 0.9, {"Yes": 0.9, "No": -math.inf, "I": 0.04})), 0.9 / 0.94),
    "-9999": (reply("Yes", token("Yes", 0.9, {"Yes": 0.9, "No": -9999.0})), 0.9),
    "its own is null": (reply("Yes", token("Yes", None, {"Yes": 0.9, "No": 0.1})), 0.9),
    "as good as certain": (reply("Yes", token("Yes", 1.0, {"Yes": 1.0, "I": 1e-12})), 1.0),
    "after thinking": (reply("<think>\nYes?\n</think>\n\nNo", *spoken("<think>", "\n", "Yes", "?", "\n", "</think>",
                                                                    "\n\n", "No", ".")), NO),
    "after thinking, in pieces": (reply("a</think>No", *spoken("a", "</", "think", ">", "No")), NO),
    "after another's thinking": (reply("[THINK]Yes[/THINK]No", *spoken("[THINK]", "Yes", "[/THINK]", "No")), NO),
    "reasoning apart, its tokens listed": (
        reply("No", *spoken("Well", " no", " Yes", "?", "No"), reasoning_content="Well no Yes?"), NO),
    "reasoning apart": (reply("\n\nNo", *spoken("\n\n", "No"), reasoning="Okay"), NO),
    "in bold": (reply("**No**", *spoken("**", "No", "**")), NO),
    "the chosen token twice": (reply("Yes", {**token("Yes", 0.6), "top_logprobs": [
        {"token": word, "logprob": math.log(p)} for word, p in (("No", 0.3), ("Yes", 0.6), ("Yes", 0.6))]}), 0.6 / 0.9),
}
CERTAINTIES = {  # name: (reply, whether it is yes), where only the text is known
    "top_logprobs empty": (reply("Yes", token("Yes", 0.9, {})), True),
    "top_logprobs null": (reply("No", token("No", 0.9)), False),
    "no logprobs": (reply(" no."), False),
    "a sentence": (reply("**Yes**, it is."), True),
    "NaN": (reply("Yes", token("Yes", math.nan, {"Yes": math.nan, "No": 0.1})), True),
    "above 0": (reply("Yes", token("Yes", 0.9, {"Yes": 3.5, "No": 1.2})), True),
    "after temperature 0": (reply("Yes", token("Yes", 1.0, {"Yes": 1.0, "No": -math.inf, "I": -9999.0})), True),
    "the chosen token alone": (reply("No", token("No", 1.0, {"No": 1.0})), False),
    "all 0": (reply("Yes", token("Yes", 1.0, {"Yes": 1.0, "No": 1.0})), True),
    "its own is unknown": (reply("Yes", token("Yes", -9999.0, {"No": 0.05})), True),
    "its own is null": (reply("Yes", token("Yes", None, {"No": 0.05})), True),
    "another API's logprobs": ({"choices": [{**reply("Yes")["choices"][0], "logprobs": {"tokens": ["Yes"]}}]}, True),
    "logprobs null": ({"choices": [{**reply("No")["choices"][0], "logprobs": None}]}, False),
    "logprobs without content": ({"choices": [{**reply("No")["choices"][0], "logprobs": {"content": None}}]}, False),
    "logprobs empty": ({"choices": [{**reply("No")["choices"][0], "logprobs": {"content": []}}]}, False),
    "parts": (reply([{"type": "thinking", "thinking": [{"text": "Yes"}]}, {"type": "text", "text": "No"}]), False),
    "after thinking": (reply("<think>Yes?</think> No"), False),
    "reasoning apart": (reply("Yes", reasoning_content="No?"), True),
    "reasoning apart, its tokens alone listed": (reply("No", *spoken("Yes", " then"), reasoning="Yes then"), False),
    "in a tag": (reply("<answer>No</answer>"), False),
    **{f"after <{name}>": (reply(f"<{name}>Yes</{name}>No"), False)
       for name in ("reason", "analysis", "reflection", "scratchpad", "seed:think")},
    "OpenThinker": (reply("<|begin_of_thought|>Yes<|end_of_thought|>\n<|begin_of_solution|>No"), False),
    "Gemma": (reply("<|channel>thought\nYes<channel|>No"), False),
    "before a special token": (reply("Yes<|im_end|>"), True),
    "gpt-oss": (reply("<|channel|>analysis<|message|>No<|end|><|start|>assistant<|channel|>final<|message|>Yes"), True),
}
THOUGHTS = {  # name: (reply, the answer as it came)
    "<think>": (reply("<think>", token("<think>", 0.98, {"<think>": 0.98, "Yes": 0.02})), "<think>"),
    "its first letter": (reply("<", *spoken("<")), "<"),
    "text": (reply("<think>\nOkay, so"), "<think> Okay, so"),
    "reasoning_content": (reply("", reasoning_content="Yes"), "<think>Yes"),
    "reasoning": (reply(None, *spoken("Yes"), reasoning="Yes"), "<think>Yes"),
    "thought to the end": (reply("<think>Yes</think>\n"), "<think>Yes</think>"),
    "hidden": (reply(""), '{"content": ""}'),
    "Kimi": (reply("◁think▷So"), "◁think▷So"),
    "gpt-oss": (reply("<|channel|>"), "<|channel|>"),
    "Gemma": (reply("<|channel>"), "<|channel>"),
}


def margin_of(server, folders, body) -> float:
    """The judge's margin of yes and no where the server replies with this body."""
    url, replies, _ = server
    replies += [(200, body)]
    top, = http_judge(url, "m")("?", [[f"{folders[0]}/00000.png"]])
    return read_answer(top, "yes", "no")


@pytest.mark.parametrize("name", FORMS)
def test_the_probability_of_an_answer(server, folders, capsys, name):
    body, p = FORMS[name]
    margin = margin_of(server, folders, body)
    assert 1 / (1 + math.exp(-margin)) == pytest.approx(p, abs=1e-6) and abs(margin) != CERTAIN
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", CERTAINTIES)
def test_an_answer_without_probabilities_is_certain(server, folders, capsys, name):
    body, is_yes = CERTAINTIES[name]
    assert margin_of(server, folders, body) == (CERTAIN if is_yes else -CERTAIN)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", THOUGHTS)
def test_a_model_that_thinks_first(server, folders, capsys, name):
    """Where nothing else came, it is the end; else it is counted. Either says it once, with what to do."""
    url, replies, _ = server
    body, came = THOUGHTS[name]
    replies += [(200, body)] * 3
    files = [[f"{folders[0]}/00000.png"]] * 2
    words = [f"--judge {url}", f"the model thinks first ({came})", "--judge-extra", '"max_tokens": 2000}\'']
    refuses(capsys, lambda: http_judge(url, "m")("?", files), *words)
    ask = http_judge(url, "m")
    ask("?", files)
    replies += [(200, body)] * 2
    assert [top[0][0] for top in ask("?", files)] == [came] * 2
    replies += [(200, body)]
    assert all(math.isnan(read_answer(top, "yes", "no")) for top in ask("?", files[:1]))
    warning, = capsys.readouterr().err.splitlines()
    assert all(word in warning for word in words)


def test_an_answer_without_a_text(server, folders, capsys):
    url, replies, _ = server
    for message in (dict(refusal="I cannot see it"), dict(tool_calls=[{"function": {"name": "look"}}]), {}):
        replies += [(200, reply(None, finish_reason="stop", **message))] * 2
        refuses(capsys, lambda: http_judge(url, "m")("?", [[f"{folders[0]}/00000.png"]]), "the answer has no text",
                json.dumps({"content": None, **message}))


def test_more_for_each_request(server, folders, capsys):
    """--judge-extra goes into the request as it is, in place of what is there."""
    url, _, asked = server
    extra = {"max_tokens": 500, "chat_template_kwargs": {"enable_thinking": False}, "top_logprobs": None}
    http_judge(url, "m", extra=json.dumps(extra))("?", [[f"{folders[0]}/00000.png"]])
    request = asked[-1][1]
    assert extra.items() <= request.items() and request["temperature"] == 0
    for wrong in ("max_tokens=5", "[1]", '[["a", 1]]', "3", '"a"'):
        refuses(capsys, lambda: http_judge(url, "m", extra=wrong), f"--judge-extra {wrong}", "JSON object")


def test_pictures_are_sent_as_what_they_are(server, tmp_path):
    """By content, not by name; what servers do not take is sent as PNG."""
    url, _, asked = server
    picture = Image.effect_mandelbrot((32, 24), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    for kind, sent in dict(PNG="png", JPEG="jpeg", WEBP="webp", BMP="png", TIFF="png", GIF="png").items():
        picture.save(tmp_path / "picture.jpg", kind)
        http_judge(url, "m")("?", [[str(tmp_path / "picture.jpg")]])
        head, _, data = asked[-1][1]["messages"][0]["content"][0]["image_url"]["url"].partition(",")
        content = base64.b64decode(data)
        assert head == f"data:image/{sent};base64" and Image.open(io.BytesIO(content)).format == sent.upper()
        assert (content == (tmp_path / "picture.jpg").read_bytes()) == (kind in ("PNG", "JPEG", "WEBP"))
    for kind in ("PNG", "WEBP"):  # an animated one as its first frame
        picture.save(tmp_path / "picture.jpg", kind, save_all=True, append_images=[picture.rotate(90)], lossless=True)
        http_judge(url, "m")("?", [[str(tmp_path / "picture.jpg")]])
        content = base64.b64decode(asked[-1][1]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
        sent = Image.open(io.BytesIO(content))
        assert not getattr(sent, "is_animated", False) and np.array_equal(sent, picture)
    picture.quantize(8).save(tmp_path / "picture.jpg", "PNG")
    http_judge(url, "m")("?", [[str(tmp_path / "picture.jpg")]])
    content = base64.b64decode(asked[-1][1]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).mode == "RGB"
