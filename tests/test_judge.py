"""Tests of the judge over HTTP, of a vision-language model as a reward, and of what rewards and eval_judge.py refuse.

The server here gives made-up answers; the one in test_normguard.py has tiny/judge behind it.
"""
import base64
import io
import json
import math
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image

import eval_judge
import flow.cli
from flow.judge import http_judge, local_judge, read_answer
from flow.pictures import save_samples, to_image
from flow.rewards import VLM_QUESTION, load_reward, reward_model, short_reward, split_reward

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))
import world  # noqa: E402

CPU = torch.device("cpu")
OVERALL = eval_judge.SINGLE["overall"]  # tiny/judge knows the words of eval_judge.py's questions only; it has commas


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Defaults like tiny/sd3 are relative to the repository; no key."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def refuses(capsys, call, *words):
    """One line on stderr that has these words, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, flow.cli.one_line_errors():
        call()
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert end.value.code == 2 and len(error) == 1, error
    for word in words:
        assert word in error[0], error[0]


def pictures(n: int = 3) -> torch.Tensor:
    """Renders (n, 3, 64, 64)."""
    return world.render(world.scene(torch.arange(n) * 7 % 64, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two folders of three pictures as sample.py writes them."""
    root, rows = tmp_path_factory.mktemp("folders"), [{"prompt": world.CAPTIONS[i], "seed": 0} for i in range(3)]
    for name, shade in (("a", 1.0), ("b", 0.7)):
        save_samples(str(root / name), pictures() * shade, rows)
    return f"{root}/a", f"{root}/b"


@pytest.fixture
def server():
    """(url, replies, asked): a server that gives the next of `replies`, (status, body), and 60 % yes when out of them;
    each request goes to `asked` as (its headers, its body)."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            asked.append((self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, body = replies.pop(0) if replies else (200, answer(Yes=0.6, no=0.3))
            body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", replies, asked
    http.shutdown()
    http.server_close()


def answer(**probs) -> dict:
    """A reply whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in probs.items()]
    content = [{**top[0], "top_logprobs": top}]
    return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}]}


# ---------------------------------------------------------------- the judge over HTTP

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


def test_failed_answers_are_empty_and_told_once(server, folders, capsys):
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


def test_no_server_no_url_no_package(folders, capsys, monkeypatch):
    files = [[f"{folders[0]}/00000.png"]]
    url = "http://127.0.0.1:9/v1"
    refuses(capsys, lambda: http_judge(url, "m", retries=0)("?", files), f"--judge {url}", "cannot be reached")
    refuses(capsys, lambda: http_judge("http://HOST:PORT/v1", "m"), "--judge http://HOST:PORT/v1", "no URL")
    monkeypatch.setitem(sys.modules, "openai", None)
    refuses(capsys, lambda: http_judge(url, "m"), "--judge", "pip install openai")


def test_a_server_that_answers_nothing(server, folders, capsys):
    url, replies, _ = server
    replies += [(200, {})] * 2
    ask = http_judge(url, "m")
    with pytest.raises(SystemExit), flow.cli.one_line_errors():
        ask("?", [[f"{folders[0]}/00000.png"]] * 2)
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning") and error.startswith(f"error: --judge {url}: no request has succeeded")


# ---------------------------------------------------------------- a vision-language model as a reward

def test_a_vlm_reward_is_the_judge(folders):
    """P(yes) of each picture; in a sum, with a weight, on video frames."""
    x, prompts = pictures(), world.CAPTIONS[:3]
    files = [[f"{folders[0]}/0000{i}.png"] for i in range(3)]
    answers = local_judge("tiny/judge", CPU)(OVERALL, files)
    p = torch.tensor([read_answer(top, "yes", "no") for top in answers]).sigmoid()
    assert 0 < p.min() and p.max() < 1 and p.std() > 0
    judge = load_reward("vlm:tiny/judge", CPU, question=OVERALL)
    torch.testing.assert_close(judge(x, prompts), p)
    pick = load_reward("tiny/pickscore", CPU)(x, prompts)
    both = load_reward("tiny/pickscore:0.5,vlm:tiny/judge:2", CPU, question=OVERALL)
    torch.testing.assert_close(both(x, prompts), 0.5 * pick + 2 * p)
    torch.testing.assert_close(judge(x[None], prompts[:1]), p.mean()[None])


def test_a_question_of_its_own_for_each_picture(folders):
    """In a batch as alone, though the longer question pads the shorter one."""
    ask, files = local_judge("tiny/judge", CPU), [[f"{folders[0]}/0000{i}.png"] for i in range(2)]
    questions = [eval_judge.SINGLE["artifacts"], OVERALL]
    alone = [ask(question, [file])[0] for question, file in zip(questions, files)]
    for one, other in zip(ask(questions, files), alone):
        assert read_answer(one, "yes", "no") == pytest.approx(read_answer(other, "yes", "no"), abs=1e-4)


@pytest.mark.parametrize("question", [None, "{prompt}: is it there, or not?"])
def test_a_vlm_reward_over_http(server, question):
    """The model's name on the server may have a colon; the question has the prompt, whatever is in it."""
    url, _, asked = server
    prompts = ["a red star", "a {blue} ring, 1:2", "50 % [moon]"]
    reward = load_reward(f"vlm:qwen2.5vl:7b@{url}:0.5", CPU, question=question)
    torch.testing.assert_close(reward(pictures(), prompts), torch.full((3,), 0.5 * 0.6 / 0.9))
    assert {request["model"] for _, request in asked} == {"qwen2.5vl:7b"}
    content = [request["messages"][0]["content"] for _, request in asked]
    asked_for = {(question or VLM_QUESTION).replace("{prompt}", prompt) for prompt in prompts}
    assert {parts[1]["text"] for parts in content} == asked_for
    urls = {parts[0]["image_url"]["url"].partition("base64,")[2] for parts in content}
    sent = {Image.open(io.BytesIO(base64.b64decode(url))).convert("RGB").tobytes() for url in urls}
    assert sent == {to_image(picture).tobytes() for picture in pictures()}


def test_a_vlm_reward_without_an_answer(server, capsys):
    url, replies, _ = server
    reward = load_reward(f"vlm:m@{url}", CPU)
    replies += [(200, answer(Well=1.0))]
    refuses(capsys, lambda: reward(pictures(1), ["a red star"]), "--reward vlm:m", "neither yes nor no", "a red star")
    replies += [(404, {})]
    refuses(capsys, lambda: reward(pictures(1), ["a red star"]), f"--reward vlm: {url}", "404")


def test_vlm_specs_that_are_refused(capsys):
    for spec, words in [
        ("vlm:", ["vlm:MODEL"]),
        ("vlm:http://localhost:8000/v1", ["vlm:MODEL@http://HOST:PORT/v1"]),
        ("vlm:m@localhost:8000/v1", ["vlm:MODEL@http://HOST:PORT/v1"]),
        ("vlm:m@http://localhost:8000", ["vlm:MODEL@http://HOST:PORT/v1"]),  # 8000 would be a weight
        ("vlm:tiny/judge[Good?]", ["--vlm-question"]),
        ("tiny/hps,vlm:m@http://localhost:8000/v1[Good, or not?]:2", ["--vlm-question"]),
        ("vlm:tiny/judge:nan", ["weight"]),
        ("vlm:no/such/model", ["no/such/model", "no such folder"]),
        ("vlm:tiny/hps", ["tiny/hps", "cannot be loaded"]),
    ]:
        refuses(capsys, lambda: load_reward(spec, CPU), "--reward", *words)
    refuses(capsys, lambda: load_reward("vlm:tiny/judge", CPU, differentiable=True), "--reward", "gradient")


@pytest.mark.parametrize("spec, parts, short", [
    ("pickscore", [("pickscore", 1.0, "yuvalkirstain/PickScore_v1")], "pickscore"),
    ("runs/clip/:0.5,a/b", [("runs/clip/", 0.5, "runs/clip/"), ("a/b", 1.0, "a/b")], "clip:0.5,b"),
    ("dir/f.py:nan:-1e-1", [("dir/f.py:nan", -0.1, "dir/f.py")], "f.py:nan:-0.1"),
    ("f.py:nan", [("f.py:nan", 1.0, "f.py")], "f.py:nan"),
    ("vlm:a/b@http://h:8000/v1", [("vlm:a/b@http://h:8000/v1", 1.0, "a/b")], "b"),
    ("vlm:q:7b@http://h:8000/v1:2", [("vlm:q:7b@http://h:8000/v1", 2.0, "q:7b")], "q:7b:2"),
    ("vlm:m@http://h:8000", [("vlm:m@http://h:8000", 1.0, "m")], "m"),
])
def test_what_a_reward_is_made_of(spec, parts, short):
    """A port, or a function that is called like a number, is no weight."""
    assert [(name, weight, reward_model(name)) for name, weight in split_reward(spec)] == parts
    assert short_reward(spec) == short


# ---------------------------------------------------------------- rewards

CODE = """import sys
def quits(images, prompts):
    sys.exit(0)
def nan(images, prompts):
    return images.mean((1, 2, 3))
number = 3
"""


def test_reward_functions(tmp_path, capsys):
    (tmp_path / "f.py").write_text(CODE)
    (tmp_path / "quits.py").write_text("raise SystemExit\n")
    quits = load_reward(f"{tmp_path}/f.py:quits", CPU)
    refuses(capsys, lambda: quits(pictures(), ["a"] * 3), "--reward", "SystemExit", "f.py:3")
    named_nan = load_reward(f"{tmp_path}/f.py:nan,{tmp_path}/f.py:nan:2", CPU)
    torch.testing.assert_close(named_nan(pictures(), ["a"] * 3), 3 * pictures().mean((1, 2, 3)))
    for spec, words in [
        (f"{tmp_path}/f.py:nan:nan", ["weight"]),
        (f"{tmp_path}/f.py:number", ["there is no function number"]),
        (f"{tmp_path}/f.py:0.5", ["0.5"]),
        (f"{tmp_path}/quits.py:f", ["SystemExit"]),
        ("", ["--reward ''", "pickscore"]),
        (":0.5", ["--reward ':0.5'"]),
        ("tiny/pickscore,", ["--reward 'tiny/pickscore,'", "missing"]),
    ]:
        refuses(capsys, lambda: load_reward(spec, CPU), "--reward", *words)


# ---------------------------------------------------------------- eval_judge.py

def compare(*dirs, out, **changes) -> dict:
    """A report."""
    args = {"dirs": dirs, "reward": (), "forensic": (), "judge": None, "out": str(out), **changes}
    eval_judge.main(eval_judge.Args(**args))
    return json.loads((Path(out) / "report.json").read_text(), parse_constant=pytest.fail)


def bright(tmp_path) -> tuple[str]:
    """A reward that loads at once."""
    (tmp_path / "bright.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    return (f"{tmp_path}/bright.py:f",)


def test_the_same_folder_twice(folders, tmp_path, capsys):
    a, _ = folders
    (tmp_path / "link").symlink_to(a)
    for again in (a, f"{a}/", f"{a}/../a", str(tmp_path / "link"), os.path.relpath(a)):
        refuses(capsys, lambda: compare(a, again, out=tmp_path / "out", reward=bright(tmp_path)), a, again, "twice")
    assert not (tmp_path / "out").exists()


def test_flags_are_refused_before_anything_is_loaded(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_judge, "load_reward", lambda *args: pytest.fail("a reward was loaded"))
    for changes, words in [
        (dict(judge="httpfoo"), ["--judge httpfoo", "no such folder", "http://HOST:PORT/v1"]),
        (dict(judge="http:/localhost/v1"), ["--judge http:/localhost/v1", "http://HOST:PORT/v1"]),
        (dict(judge=""), ["--judge ''"]),
        (dict(reward=("",)), ["--reward ''"]),
        (dict(forensic=("tiny/forensic", "")), ["--forensic ''"]),
        (dict(real=""), ["--real ''"]),
        (dict(out=""), ["--out ''"]),
        (dict(judge_timeout=math.inf), ["--judge-timeout inf"]),
        (dict(judge_timeout=math.nan), ["--judge-timeout nan"]),
    ]:
        args = {"out": tmp_path / "out", "reward": bright(tmp_path), **changes}
        refuses(capsys, lambda: compare(*folders, **args), *words)
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_refused_and_kept(folders, tmp_path, capsys, monkeypatch):
    """In --out, before anything is loaded or asked."""
    monkeypatch.setattr(eval_judge, "load_reward", lambda *args: pytest.fail("a reward was loaded"))
    key = "0" * 32
    for i, (name, content) in enumerate([
        ("scores.jsonl", None),  # a folder
        ("scores.jsonl", b"my scores\n"),
        ("scores.jsonl", b'{"prompt": "a red star", "seed": 0}\n'),
        ("scores.jsonl", b'{"%s": "good"}\n' % key.encode()),
        ("scores.jsonl", b"[1, 2]\n"),
        ("scores.jsonl", b"\x89PNG\r\n"),
        ("report.json", None),
        ("report.json", b'{"title": "mine"}'),
        ("report.json", b"[]"),
        ("report.json", b""),
        ("report.png", None),
        ("report.png", b"a picture"),
    ]):
        file = tmp_path / f"out{i}" / name
        file.parent.mkdir()
        file.mkdir() if content is None else file.write_bytes(content)
        refuses(capsys, lambda: compare(*folders, out=file.parent, reward=bright(tmp_path)), str(file), "--out")
        assert [*file.parent.iterdir()] == [file] and (file.is_dir() or file.read_bytes() == content)


def test_a_report_written_again(folders, tmp_path):
    """Over its own files; a line that a kill has cut short at any place is no line of others."""
    args = {"out": tmp_path / "out", "reward": bright(tmp_path)}
    first = compare(*folders, **args)
    scores = (tmp_path / "out" / "scores.jsonl").read_text()
    line = scores.splitlines()[-1]
    for cut in range(len(line) + 1):
        (tmp_path / "out" / "scores.jsonl").write_text(scores + line[:cut] + "\n\n" + line[:cut])
        assert len(eval_judge.read_scores(tmp_path / "out" / "scores.jsonl")[1]) == 6
    assert compare(*folders, **args) == first
    assert not (tmp_path / "out" / ".report.tmp").exists()


def test_nan_is_null_in_the_report(folders, tmp_path, monkeypatch, capsys):
    """The report is JSON that any reader takes."""
    monkeypatch.setattr(eval_judge, "load_embed", lambda *args: None)
    monkeypatch.setattr(eval_judge, "embed_images", lambda embed, images: torch.zeros(1, 2))
    monkeypatch.setattr(eval_judge, "frechet_distance", lambda a, b: math.nan)
    report = compare(*folders, real=folders[0], out=tmp_path / "out")
    assert all(m["mean"] is None for m in report["metrics"]["fd/embed"].values())
    assert "nan" not in capsys.readouterr().out


def test_a_score_is_kept_with_its_device_and_libraries(monkeypatch):
    """What another device or library computes is another score; a server's is the server's."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert eval_judge.identity("tiny/judge", cpu) != eval_judge.identity("tiny/judge", gpu)
    assert "bfloat16" in eval_judge.identity("tiny/judge", gpu)
    before, url = eval_judge.identity("tiny/judge", cpu), "http://127.0.0.1:9/v1"
    assert eval_judge.identity(url, cpu) == eval_judge.identity(url, gpu) == url
    monkeypatch.setattr(eval_judge, "version", lambda library: "0")
    assert eval_judge.identity("tiny/judge", cpu) != before


def test_a_vlm_reward_in_a_report(folders, server, tmp_path):
    """Named by its model; asked again for another question; its folder's weights are part of its identity."""
    url, _, asked = server
    specs = f"vlm:m@{url}", "vlm:tiny/judge:0.5"
    report = compare(*folders, reward=specs, vlm_question=OVERALL, out=tmp_path / "out")
    assert list(report["metrics"]) == ["reward/m", "reward/judge:0.5"] and len(asked) == 6
    assert report["metrics"]["reward/m"][folders[0]]["mean"] == pytest.approx(0.6 / 0.9)
    for question in (OVERALL, "Good, or not?"):
        compare(*folders, reward=specs[:1], vlm_question=question, out=tmp_path / "out")
    assert len(asked) == 12
    (tmp_path / "model").mkdir()
    before = eval_judge.identity(f"tiny/hps:0.5,vlm:{tmp_path}/model", torch.device("cpu"))
    (tmp_path / "model" / "weights").write_text("1")
    assert eval_judge.identity(f"tiny/hps:0.5,vlm:{tmp_path}/model", torch.device("cpu")) != before
