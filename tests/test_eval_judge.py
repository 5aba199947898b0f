"""Tests of eval_judge.py: folders compared by rewards, judge, detector and distance; its report."""
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
import world
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval_judge
import flow.pictures
import sample
from flow.pictures import to_image
from flow.rewards import load_reward
from tests.helpers import CPU, answer, refuses, renders, sample_rows, serve

PICKSCORE = ("tiny/pickscore",)
OVERALL = eval_judge.SINGLE["overall"]  # tiny/judge knows the words of eval_judge.py's questions only; it has commas


@pytest.fixture(scope="session")
def base_and_lora(run, tmp_path_factory) -> tuple[str, str]:
    """Two folders of 16 pictures, of the base and of a trained LoRA, with the same prompts and noise."""
    root = tmp_path_factory.mktemp("pictures")
    for name, lora in (("base", None), ("lora", str(run / "lora"))):
        sample.main(sample.Args(steps=4, lora=lora, out=str(root / name), reward="tiny/pickscore"))
    return f"{root}/base", f"{root}/lora"


def compare(*dirs, out, **changes) -> dict:
    """The report on some folders, without the slow metrics that `changes` does not ask for."""
    args = {"dirs": dirs, "reward": (), "forensic": (), "judge": None, "judge_model": "tiny", "out": str(out)} | changes
    eval_judge.main(eval_judge.Args(**args))
    return json.loads((Path(out) / "report.json").read_text(), parse_constant=pytest.fail)


def render_folder(folder, n=16, flaw=None, strength=0.0, seed=3) -> str:
    """Write a folder of renders as sample.py would, flawed at that strength."""
    index = torch.arange(n) * 7 % 64
    pictures = world.render(world.scene(index, torch.Generator().manual_seed(seed)))
    if flaw:
        pictures = world.degrade(pictures, flaw, torch.full((n,), strength), torch.Generator().manual_seed(seed + 1))
    flow.pictures.save_samples(str(folder), pictures, [{"prompt": world.CAPTIONS[i], "seed": seed} for i in index])
    return str(folder)


def test_eval_judge_compares_folders(base_and_lora, tmp_path, capsys):
    base, lora = base_and_lora
    report = compare(base, lora, real=base, reward=PICKSCORE, forensic=("tiny/forensic",), judge="tiny/judge",
                     out=tmp_path / "report")
    assert sorted(p.name for p in Path(base).glob("0*.png")) == [f"{i:05d}.png" for i in range(16)]
    rows = [row["reward"] for row in sample_rows(lora)]
    mine = report["metrics"]["reward/pickscore"][lora]
    assert mine["mean"] == pytest.approx(np.mean(rows), abs=2e-3) and mine["lo"] < mine["mean"] < mine["hi"]
    assert report["n"] == mine["n"] == 16
    difference = mine["mean"] - report["metrics"]["reward/pickscore"][base]["mean"]
    assert mine["diff"]["mean"] == pytest.approx(difference, abs=1e-6)
    distance = report["metrics"]["fd/embed"]
    assert abs(distance[base]["mean"]) < 1e-3 < distance[lora]["mean"]
    judged = [f"judge/{d}" for d in eval_judge.SINGLE]
    assert set(report["metrics"]) == {"reward/pickscore", "forensic/forensic", "fd/embed", *judged}
    verdict = report["pairs"]["judge/quality"][f"{base} vs {lora}"]
    assert verdict["win"] + verdict["tie"] + verdict["loss"] == 16 and verdict["nan"] == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[0] == f"| metric | {base} | {lora} |"
    assert f"{mine['mean']:.4f} [{mine['lo']:.4f}, {mine['hi']:.4f}]" in table[2]


def test_bootstrap_interval_of_known_coverage():
    """One picture a prompt: the interval is that of the mean, 1.96 standard errors to either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = eval_judge.summary(torch.cat([values, torch.tensor([math.nan])]), [str(i) for i in range(401)], 4000)
    se = values.std().item() / 20
    assert s["n"] == 400 and s["nan"] == 1 and s["mean"] == pytest.approx(values.mean().item())
    np.testing.assert_allclose([s["mean"] - s["lo"], s["hi"] - s["mean"]], 1.96 * se, rtol=0.1)
    two = eval_judge.summary(values, ["a"] * 200 + ["b"] * 200, 4000)  # two prompts: the interval spans their means
    assert sorted([values[:200].mean().item(), values[200:].mean().item()]) == pytest.approx([two["lo"], two["hi"]])
    # mean and interval weigh pictures alike
    uneven = eval_judge.summary(torch.tensor([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"], 4000)
    assert (uneven["mean"], uneven["lo"], uneven["hi"]) == pytest.approx((0.9, 0.0, 1.0))
    one = eval_judge.summary(values, ["a"] * 400, 4000)  # one prompt: over its pictures
    np.testing.assert_allclose([one["mean"] - one["lo"], one["hi"] - one["mean"]], 1.96 * se, rtol=0.1)


@pytest.mark.parametrize("flaw", world.FLAWS)
def test_judge_prefers_the_clean_picture(tmp_path, flaw):
    dirs = [render_folder(tmp_path / "clean", n=8)]
    dirs += [render_folder(tmp_path / f"{strength}", 8, flaw, strength) for strength in (0.35, 0.7, 1.0)]
    report = compare(*dirs, judge="tiny/judge", out=tmp_path / "report")
    pairs = report["pairs"]["judge/quality"]
    assert all(pairs[f"{dirs[0]} vs {d}"]["win"] == 8 for d in dirs[2:])
    margins = [pairs[f"{dirs[0]} vs {d}"]["margin"] for d in dirs[1:]]
    assert 0 < margins[0] < margins[1] < margins[2]
    assert all(pairs[f"{a} vs {b}"]["rate"] >= 0.75 for a, b in zip(dirs[1:], dirs[2:]))  # the weaker flaw is preferred
    overall = [report["metrics"]["judge/overall"][d]["mean"] for d in dirs]
    assert overall[0] > 0.7 and max(overall[2:]) < 0.3
    flaws_told_by = {
        "over-sharpening": ["sharpening"],
        "oversaturation": ["saturation"],
        "unnatural lighting": ["light", "contrast"],
    }
    own = next((d for d, flaws in flaws_told_by.items() if flaw in flaws), "artifacts")
    said = [report["metrics"][f"judge/{own}"][d]["mean"] for d in dirs]
    assert said[0] < 0.3 and min(said[2:]) > 0.7


def test_identical_pictures_tie_and_swapped_folders_mirror(base_and_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_judge, "SINGLE", {"overall": eval_judge.SINGLE["overall"]})
    base, lora = base_and_lora
    copy = str(shutil.copytree(base, tmp_path / "copy"))
    same = compare(base, copy, reward=PICKSCORE, judge="tiny/judge", out=tmp_path / "same")
    verdict = same["pairs"]["judge/quality"][f"{base} vs {copy}"]
    assert verdict["tie"] == 16 and verdict["rate"] == 0.5 and verdict["margin"] == 0
    there = compare(base, lora, reward=PICKSCORE, judge="tiny/judge", out=tmp_path / "there")
    back = compare(lora, base, reward=PICKSCORE, judge="tiny/judge", out=tmp_path / "back")
    one, two = there["pairs"]["judge/quality"][f"{base} vs {lora}"], back["pairs"]["judge/quality"][f"{lora} vs {base}"]
    assert (one["win"], one["tie"], one["loss"], one["margin"]) == (two["loss"], two["tie"], two["win"], -two["margin"])
    assert one["rate"] == pytest.approx(1 - two["rate"], abs=1e-12)
    assert one["lo"] == pytest.approx(1 - two["hi"], abs=1e-12)
    for name in there["metrics"]:
        for d in (base, lora):
            ours, mirrored = ({k: r["metrics"][name][d][k] for k in ("mean", "lo", "hi")} for r in (there, back))
            assert ours == mirrored


@pytest.fixture(scope="module")
def judge_server():
    """(url, faults, asked): a server of tiny/judge. For a picture whose hash is in `faults`, it makes that fault
    instead of an answer. Each request's model goes to `asked`."""
    model = AutoModelForImageTextToText.from_pretrained("tiny/judge", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained("tiny/judge")
    faults, asked, lock = {}, [], Lock()
    bodies = {"garbage": b"<html>", "empty": b"{}", "words": json.dumps(answer({"Well": 0.99})).encode()}

    def reply(path, headers, request):
        assert path == "/v1/chat/completions"
        (message,), files = request["messages"], []
        for part in message["content"]:
            if part["type"] == "image_url":
                files.append(base64.b64decode(part.pop("image_url")["url"].removeprefix("data:image/png;base64,")))
                part |= {"type": "image", "image": Image.open(io.BytesIO(files[-1])).convert("RGB")}
        asked.append(request["model"])
        sent = [Image.open(io.BytesIO(file)) for file in files]
        hashes = [hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() for image in sent]
        fault = next((faults[h] for h in hashes if h in faults), None)
        if fault in ("hang", "cut"):
            time.sleep(2 if fault == "hang" else 0)
            return None
        if fault:
            return (500, b"") if fault == "500" else (200, bodies[fault])
        with lock, torch.no_grad():
            inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True,
                                                   return_dict=True, return_tensors="pt")
            top = model(**inputs).logits[0, -1].softmax(0).topk(20)
        words = [processor.tokenizer.decode([i]) for i in top.indices.tolist()]
        return 200, json.dumps(answer(dict(zip(words, top.values.tolist())))).encode()
    with serve(reply) as url:
        yield url, faults, asked


def test_judge_over_http_is_the_judge_in_process(base_and_lora, judge_server, tmp_path):
    url, _, asked = judge_server

    def judged(judge: str) -> dict:
        out = tmp_path / ("http" if judge == url else "local")
        return compare(*base_and_lora, reward=PICKSCORE, judge=judge, out=out)
    there, here = judged(url), judged("tiny/judge")
    for name, verdict in here["pairs"]["judge/quality"].items():
        assert verdict == pytest.approx(there["pairs"]["judge/quality"][name], abs=1e-4)
    for name in here["metrics"]:
        for d in base_and_lora:
            assert here["metrics"][name][d]["mean"] == pytest.approx(there["metrics"][name][d]["mean"], abs=1e-4)
    assert set(asked) == {"tiny"}
    before = len(asked)
    assert judged(url) == there and len(asked) == before  # all is known
    scores = (tmp_path / "http/scores.jsonl").read_text().splitlines()
    # killed while it wrote
    (tmp_path / "http/scores.jsonl").write_text("\n".join(scores[:-3]) + "\n" + scores[-3][:20])
    for _ in range(2):  # the second time it finds all that the first has added
        assert judged(url) == there
        assert len(asked) == before + 3


def test_faults_of_the_server_are_counted(base_and_lora, judge_server, tmp_path, monkeypatch, capsys):
    url, faults, asked = judge_server
    monkeypatch.setattr(eval_judge, "SINGLE", {"overall": eval_judge.SINGLE["overall"]})
    rows = flow.pictures.read_folder(base_and_lora[1])
    try:
        kinds = ("garbage", "empty", "words", "500", "hang", "cut")
        faults.update({row["hash"]: fault for row, fault in zip(rows, kinds)})
        report = compare(*base_and_lora, judge=url, judge_retries=0, judge_timeout=1.0, judge_concurrency=4,
                         out=tmp_path / "report")
    finally:
        faults.clear()
    verdict = report["pairs"]["judge/quality"][f"{base_and_lora[0]} vs {base_and_lora[1]}"]
    assert verdict["nan"] == 6 and verdict["win"] + verdict["tie"] + verdict["loss"] == 10
    for name in eval_judge.SINGLE:
        said = [report["metrics"][f"judge/{name}"][d] for d in base_and_lora]
        assert [(m["n"], m["nan"]) for m in said] == [(16, 0), (10, 6)] and 0 <= said[1]["mean"] <= 1
    captured = capsys.readouterr()
    assert captured.out.count("6 of 16 not read") == len(eval_judge.SINGLE) and "500" in captured.err
    before = len(asked)
    whole = compare(*base_and_lora, judge=url, out=tmp_path / "report")  # what failed is asked again, and only that
    assert len(asked) == before + 6 + 2 * 6
    assert whole["pairs"]["judge/quality"][f"{base_and_lora[0]} vs {base_and_lora[1]}"]["nan"] == 0
    assert all(m["nan"] == 0 for scores in whole["metrics"].values() for m in scores.values())


def test_answers_without_probabilities_are_counted(folders, tmp_path, capsys):
    """Also those of an earlier run; not those with probabilities or those that are not read."""
    def reply(path, headers, request):
        question = request["messages"][0]["content"][-1]["text"]
        if question == OVERALL:
            return 200, json.dumps(answer({"yes": 1.0, "I": 1e-12})).encode()  # certain, but with probabilities
        said = "A" if question == eval_judge.PAIR else "Well" if "artifacts" in question else "No"
        return 200, json.dumps({"choices": [{"message": {"content": said}}]}).encode()
    with serve(reply) as url:
        for _ in range(2):
            report = compare(*folders, judge=url, out=tmp_path / "out")
            # 6 pictures and 5 questions, of which "artifacts" has no answer, and 3 pairs in both orders
            assert "\nanswers without probabilities: 24 of 30" in capsys.readouterr().out
    means = {name: m[folders[0]]["mean"] for name, m in report["metrics"].items()}
    assert means["judge/oversaturation"] == pytest.approx(0, abs=1e-6)
    assert means["judge/overall"] == pytest.approx(1, abs=1e-6)
    assert means["judge/artifacts"] is None and report["unread"]["judge/artifacts"] == ", such as `'Well'`"


def test_an_answer_that_is_not_read_is_shown(tmp_path, capsys):
    """Beside the number, if there are more than a tenth of such answers."""
    dirs, unread = [render_folder(tmp_path / name, 20, name, 1.0) for name in ("blur", "noise")], set()
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(dirs[0]).glob("0*.png"))]

    def reply(path, headers, request):
        *parts, question = request["messages"][0]["content"]
        urls = [part["image_url"]["url"].partition(",")[2] for part in parts if part["type"] == "image_url"]
        if {hashlib.sha256(base64.b64decode(url)).hexdigest() for url in urls} & unread:
            said = json.dumps(answer({"I|you": 0.9, "it": 0.1})).encode()
            return (400, b"") if question["text"] == OVERALL else (200, said)
        return 200, json.dumps(answer({"A": 0.6} if question["text"] == eval_judge.PAIR else {"yes": 0.6})).encode()
    with serve(reply) as url:
        unread |= set(hashes[:2])
        compare(*dirs, judge=url, out=tmp_path / "two")
        text = capsys.readouterr().out
        assert text.count("(2 of 20 not read)") == 5 and "such as" not in text and "| 0 | 18 | 0 | 2 |" in text
        unread |= {hashes[2]}
        compare(*dirs, judge=url, out=tmp_path / "three")
        text = capsys.readouterr().out
        assert text.count("(3 of 20 not read, such as `'I\\|you'`)") == 4
        assert "(3 of 20 not read, as no answer came)" in text and "| 0 | 17 | 0 | 3, such as `'I\\|you'` |" in text


def test_judge_extra(folders, server, tmp_path, capsys):
    """It goes into each request; with another one the server is asked again."""
    url, _, asked = server
    for extra, count in ((None, 36), ('{"max_tokens": 9}', 72), ('{"max_tokens": 9}', 78)):  # pairs are not read here
        compare(*folders, judge=url, judge_extra=extra, out=tmp_path / "out")
        assert len(asked) == count and asked[-1][1]["max_tokens"] == (9 if extra else 1)
    refuses(capsys, lambda: compare(*folders, judge="tiny/judge", judge_extra="{}", out=tmp_path / "out"),
            "--judge-extra", "--judge http://HOST:PORT/v1")
    refuses(capsys, lambda: compare(*folders, judge=url, judge_extra="[1]", out=tmp_path / "out"), "--judge-extra [1]")


@pytest.mark.parametrize("encoding, sign", [("ascii", "^"), ("cp1252", "^"), ("cp437", "^"), ("utf-8", "↑")])
def test_the_table_is_printed_by_any_terminal(tmp_path, monkeypatch, encoding, sign):
    (tmp_path / "bright.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    folder = render_folder(tmp_path / "ł", n=4)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    compare(folder, reward=(f"{tmp_path}/bright.py:f",), out=tmp_path / "out")
    out.flush()
    name = folder if encoding == "utf-8" else folder.replace("ł", "?")
    printed = out.buffer.getvalue().decode(encoding)
    assert f"| metric | {name} |" in printed and f"| reward/bright.py:f {sign} |" in printed


def test_a_real_server(folders, tmp_path):
    """`transformers serve` answers in words, those of the judge in this process."""
    pytest.importorskip("uvicorn", reason="needs pip install transformers[serving]")
    pytest.importorskip("fastapi", reason="needs pip install transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", "tiny/judge",
               "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(120):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
            there = compare(*folders, judge=f"{url}/v1", judge_model="tiny/judge", out=tmp_path / "there")
        finally:
            process.terminate()
    here = compare(*folders, judge="tiny/judge", out=tmp_path / "here")
    verdict, same = there["pairs"]["judge/quality"], here["pairs"]["judge/quality"]
    for name in verdict:
        assert [verdict[name][k] for k in ("win", "tie", "loss", "nan")] == [
            same[name][k] for k in ("win", "tie", "loss", "nan")]
    for name in eval_judge.SINGLE:
        for folder in folders:
            assert there["metrics"][f"judge/{name}"][folder]["nan"] == 0


def test_forensic_tells_renders_from_samples(tmp_path):
    """The samples are of a base and of prompts that the detector was not trained on."""
    sample.main(sample.Args(steps=12, n=6, seed=500, out=str(tmp_path / "base")))
    score = eval_judge.judge.load_forensic("tiny/forensic", None, CPU)
    dirs = (render_folder(tmp_path / "renders", n=96), str(tmp_path / "base"))
    real, drawn = (score([row["file"] for row in flow.pictures.read_folder(folder)]) for folder in dirs)
    auc = (real[:, None] > drawn[None]).float().mean().item()  # P(a render scores above a sample)
    assert auc >= 0.9 and 0 <= min(real.min(), drawn.min()) and max(real.max(), drawn.max()) <= 1


def test_common_pictures_are_compared(base_and_lora, tmp_path, capsys):
    base, lora = base_and_lora

    def copied(name: str, keep) -> str:
        """A copy of a folder with some of the lines of samples.jsonl."""
        jsonl = shutil.copytree(lora, tmp_path / name) / "samples.jsonl"
        jsonl.write_text("".join(line + "\n" for line in keep(jsonl.read_text().splitlines())))
        return str(jsonl.parent)

    # half of them, in another order: the common ones are compared
    fewer = copied("fewer", lambda rows: rows[::-2])
    report = compare(base, fewer, reward=PICKSCORE, out=tmp_path / "report")
    assert report["n"] == 8 and "8 of the 16 pictures in " + base in capsys.readouterr().out
    # the same pictures in another order: each is paired with itself
    turned = copied("turned", lambda rows: rows[::-1])
    report = compare(lora, turned, reward=PICKSCORE, judge="tiny/judge", out=tmp_path / "turned")
    verdict = report["pairs"]["judge/quality"][f"{lora} vs {turned}"]
    diff = report["metrics"]["reward/pickscore"][turned]["diff"]
    assert verdict["tie"] == 16 and verdict["margin"] == 0 and diff == {"mean": 0, "lo": 0, "hi": 0}
    # no interval of a single picture
    single = copied("single", lambda rows: rows[:1])
    one = compare(base, single, reward=PICKSCORE, judge="tiny/judge", out=tmp_path / "one")
    assert one["metrics"]["reward/pickscore"][base]["lo"] is None
    assert one["pairs"]["judge/quality"].popitem()[1]["lo"] is None


def test_a_report_of_odd_names(tmp_path):
    """Prompts that matplotlib would read as mathematics, two folders of the same name, a sum of rewards."""
    dirs = [render_folder(tmp_path / side / "same", n=4, seed=seed) for side, seed in (("a", 3), ("b", 3))]
    for d in dirs:
        jsonl = Path(d) / "samples.jsonl"
        jsonl.write_text("".join(json.dumps({**json.loads(line), "prompt": f"cost is $\\foo$ {i}"}) + "\n"
                                 for i, line in enumerate(jsonl.read_text().splitlines())))
    report = compare(*dirs, reward=("tiny/pickscore:0.5,tiny/hps:0.5",), out=tmp_path / "report")
    assert list(report["metrics"]) == ["reward/pickscore:0.5,hps:0.5"] and (tmp_path / "report/report.png").exists()


def test_folders_of_odd_names(tmp_path, recwarn):
    """Which matplotlib would read as mathematics, its font lacks, or would end a cell of the table."""
    names = "cost $\\foo$", "日本", "a | b|c"
    dirs = [plain_folder(tmp_path / name, ["0.png"]) for name in names]
    compare(*dirs, forensic=("tiny/forensic",), out=tmp_path / "out")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    html = (tmp_path / "out/report.html").read_text("utf-8")
    text = json.loads(re.search(r'id="report">(.*?)</script>', html)[1])["text"]
    escaped = dirs[2].replace("|", "\\|")
    assert text.startswith(f"| metric | {dirs[0]} | {dirs[1]} | {escaped} |\n")
    assert f'<th scope="col">{dirs[2]}</th></tr>' in in_browser(tmp_path / "out/report.html")


def test_a_sums_parts_have_a_mean_and_a_deviation(folders, tmp_path, capsys):
    """Each is scored once; the sum is theirs, and so are the scores that are kept."""
    report = compare(*folders, reward=("tiny/pickscore:0.5,tiny/hps:2",), out=tmp_path / "report")
    table = capsys.readouterr().out
    alone = compare(*folders, reward=("tiny/pickscore", "tiny/hps"), out=tmp_path / "report")["metrics"]
    (summed,) = report["metrics"].values()
    for d in folders:
        parts, means = summed[d]["parts"], [alone[f"reward/{name}"][d]["mean"] for name in ("pickscore", "hps")]
        assert [parts["pickscore"]["mean"], parts["hps"]["mean"]] == pytest.approx(means)
        assert summed[d]["mean"] == pytest.approx(0.5 * means[0] + 2 * means[1])
        rows = sample_rows(d)
        pictures = flow.pictures.load_pictures([f"{d}/{row['file']}" for row in rows])
        scores = load_reward("tiny/hps", CPU)(pictures, [row["prompt"] for row in rows])
        assert parts["hps"]["std"] == pytest.approx(scores.std().item(), rel=1e-4)
    hps = [summed[d]["parts"]["hps"] for d in folders]
    cells = [f"{part['mean']:.4f} (deviation {part['std']:.4f})" for part in hps]
    assert "| of it: hps | " + " | ".join(cells) + " |" in table and "| of it: pickscore | " in table
    assert len(eval_judge.read_scores(tmp_path / "report/scores.jsonl")) == 2 * 2 * 3


# ---------------------------------------------------------------- pictures of others

def plain_folder(folder, names: list[str], shade: float = 1.0) -> str:
    """Write renders under these names, as another program would. Picture k of any folder shows the same."""
    folder.mkdir(parents=True)
    for name, picture in zip(names, renders(len(names)) * shade):
        to_image(picture).save(folder / name)
    return str(folder)


def prompts_reward(tmp_path) -> tuple[str]:
    """A reward that is the number at the end of a prompt."""
    (tmp_path / "number.py").write_text(
        "import torch\ndef f(images, prompts):\n    return torch.tensor([float(p.split()[-1]) for p in prompts])\n")
    return (f"{tmp_path}/number.py:f",)


def test_folders_of_others_are_paired_by_name(tmp_path, capsys):
    """Of several formats; what only one has is left out. Without prompts, what needs none is measured."""
    a = plain_folder(tmp_path / "a", [f"x{i}.png" for i in range(10)])
    b = plain_folder(tmp_path / "b", [f"x{i}.bmp" for i in range(9)], 0.7)
    report = compare(a, b, judge="tiny/judge", forensic=("tiny/forensic",), real=a, out=tmp_path / "out")
    assert report["n"] == 9 and "9 of the 10 pictures in " + a in capsys.readouterr().out and report["note"] == ""
    same = plain_folder(tmp_path / "same", [f"x{i}.tif" for i in range(10)])
    report = compare(a, same, judge="tiny/judge", real=a, out=tmp_path / "same-out")
    assert report["pairs"]["judge/quality"][f"{a} vs {same}"]["tie"] == 10
    assert report["metrics"]["fd/embed"][same]["mean"] == pytest.approx(0, abs=1e-3)
    assert "n 10, 10 real |" in capsys.readouterr().out
    for out, real in ((f"{a}/.", None), (b, b)):  # the next run would read report.png as a picture
        refuses(capsys, lambda: compare(a, same, out=out, real=real), "--out", "holds pictures")
    apart = plain_folder(tmp_path / "apart", ["y.png"])
    refuses(capsys, lambda: compare(a, apart, judge="tiny/judge", out=tmp_path / "no"), apart[:-5], "no name",
            "one name")


def test_prompts_of_folders_of_others(tmp_path, capsys):
    """A prompt for each name in natural order, also of a name that one folder lacks."""
    a = plain_folder(tmp_path / "a", [f"ComfyUI_{i}_.png" for i in range(12)])
    b = plain_folder(tmp_path / "b", [f"ComfyUI_{i}_.png" for i in range(11)])
    reward = prompts_reward(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"number {i}\n" for i in range(12)))
    report = compare(b, a, reward=reward, prompts=str(prompts), out=tmp_path / "out")
    assert report["metrics"]["reward/number.py:f"][a] | {"diff": 0, "lo": 0, "hi": 0} == {
        "mean": 5, "n": 11, "nan": 0, "diff": 0, "lo": 0, "hi": 0}  # not in the order 0, 1, 10, 11, 2
    refuses(capsys, lambda: compare(a, b, reward=reward, out=tmp_path / "no"), "--reward", "needs prompts", "--prompts")
    refuses(capsys, lambda: compare(a, b, reward=("vlm:tiny/judge",), out=tmp_path / "no"), "--reward", "needs prompts")
    prompts.write_text("number 1\n")
    refuses(capsys, lambda: compare(a, b, reward=reward, prompts=str(prompts), out=tmp_path / "no"),
            f"--prompts {prompts}", "1 prompts for 12 names")
    assert not (tmp_path / "no").exists()
    asks = compare(a, b, reward=("vlm:tiny/judge",), vlm_question=OVERALL, out=tmp_path / "asks")
    assert asks["metrics"]["reward/judge"][a]["n"] == 11  # this question has no {prompt}


def test_a_folder_of_sample_beside_one_of_others(folders, tmp_path, capsys):
    """Names tell the pairs, and the prompts are sample.py's."""
    a, b = folders
    plain = str(shutil.copytree(a, tmp_path / "plain"))
    os.remove(f"{plain}/samples.jsonl")  # its grid.png has no pair
    for dirs in ((a, plain), (plain, a), (a, plain, b)):
        report = compare(*dirs, reward=PICKSCORE, out=tmp_path / str(len(os.listdir(tmp_path))))
        scores = report["metrics"]["reward/pickscore"]
        assert report["n"] == 3 and scores[plain]["mean"] == pytest.approx(scores[a]["mean"], abs=1e-6)
    refuses(capsys, lambda: compare(a, plain, reward=PICKSCORE, prompts="tiny/eval_prompts.txt", out=tmp_path / "no"),
            "--prompts")
    other = shutil.copytree(a, tmp_path / "other")
    (other / "samples.jsonl").write_text((other / "samples.jsonl").read_text().replace("red", "blue"))
    refuses(capsys, lambda: compare(a, plain, str(other), out=tmp_path / "no", reward=PICKSCORE), "another prompt")


def test_fewer_than_half_of_the_pictures_pair(tmp_path, capsys):
    """The table says so first; three pairs have no interval, but the table has their number."""
    few, many = render_folder(tmp_path / "few", n=3), render_folder(tmp_path / "many", n=7)
    report = compare(few, many, judge="tiny/judge", out=tmp_path / "out")
    assert report["note"].startswith("Only 3 of up to 7 pictures")
    printed = capsys.readouterr().out.splitlines()
    table = printed[printed.index(report["note"]):]
    assert table[2].startswith("| metric") and not [line for line in table if "[" in line]
    assert "n 3 |" in table[4] and "n 3 |" in table[-1]
    scores = [*report["metrics"]["judge/overall"].values(), *report["pairs"]["judge/quality"].values()]
    assert all(score["lo"] is None and score["n"] == 3 for score in scores)
    eight = render_folder(tmp_path / "eight", n=8)
    assert compare(eight, many, judge="tiny/judge", out=tmp_path / "seven")["note"] == ""
    assert [eval_judge.summary(torch.arange(n), [str(i) for i in range(n)], 10)["lo"] is None for n in (7, 8)] == [
        True, False]


def test_a_report_is_named_after_its_folders_and_kept(folders, tmp_path, capsys, monkeypatch):
    a, b = folders
    reward = bright(tmp_path)
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(b, tmp_path / "c")
    for dirs in ((a, b), (b, a), (a, b)):
        eval_judge.main(eval_judge.Args(dirs=dirs, reward=reward, forensic=(), judge=None))
    assert sorted(os.listdir("runs")) == ["eval-a-b", "eval-b-a"]
    assert sorted(os.listdir("runs/eval-a-b")) == ["report.html", "report.json", "report.png", "scores.jsonl"]
    refuses(capsys, lambda: compare(a, str(other), reward=reward, out="runs/eval-a-b"), "report.json", a, b, "--out",
            unchanged=tmp_path / "runs")
    compare(f"{a}/", os.path.relpath(b), reward=reward, out="runs/eval-a-b")  # the same folders, written otherwise
    (tmp_path / "runs/eval-b-a/report.html").write_text("<html>mine</html>")
    refuses(capsys, lambda: compare(b, a, reward=reward, out="runs/eval-b-a"), "report.html", "not written by",
            unchanged=tmp_path / "runs")
    long = [str(shutil.copytree(a, tmp_path / (letter * 200))) for letter in "xy"]
    eval_judge.main(eval_judge.Args(dirs=tuple(long), reward=reward, forensic=(), judge=None))


# ---------------------------------------------------------------- report.html

EVIL = ["</script><script>document.title = 'broken'</script>", "\"quotes\" & 'more' <b>bold</b>", "{{report}} <!-- x"]


def in_browser(file: Path, script: str = "") -> str:
    """The page as Chromium shows it, after a script that acts as a user does."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no chromium")
    page = file.with_name("acted.html")
    page.write_text(file.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent}/chrome",
               "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """A report.html of three pairs with prompts and a folder that could break it. By the reward, the right pictures are
    better by 0, 0.2 and 0.1."""
    root = tmp_path_factory.mktemp("gallery")
    rows = [{"prompt": prompt, "seed": 0} for prompt in EVIL]
    for name, gains in (("a & <b>", (0, 0, 0)), ("b", (0, 0.2, 0.1))):
        shades = 0.2 + torch.tensor(gains).view(3, 1, 1, 1)
        flow.pictures.save_samples(str(root / name), torch.ones(3, 3, 64, 64) * shades, rows)
    compare(f"{root}/a & <b>", f"{root}/b", reward=bright(root), judge="tiny/judge", out=root / "out")
    return root / "out/report.html"


def test_the_page_stands_alone(gallery):
    """One file, without a word of another, whose JSON cannot end its element."""
    html = gallery.read_text("utf-8")
    assert not re.search(r"""(?:src|href)=|url\(|@import|https?://""", html) and html.count("data:image/png") == 6
    assert html.count("</script>") == 2 and "broken'</script>" not in html
    content = json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html)[1])
    assert [prompt for _, prompt in content["pairs"]] == EVIL
    picture = Image.open(io.BytesIO(base64.b64decode(content["pictures"][1][1].split(",")[1])))
    assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (102, 102, 102)


def test_the_page_in_a_browser(gallery):
    """The table, the pairs, sorting and the slider."""
    dom = in_browser(gallery)
    assert "<title>Folders of pictures compared</title>" in dom  # no prompt has run
    assert "&lt;/script&gt;&lt;script&gt;document.title" in dom and "&lt;b&gt;bold&lt;/b&gt;" in dom
    shown = re.findall(r'<article data-pair="(\d)"', dom)
    table = re.findall(r"<th scope=\"row\">(.*?)</th>", dom)
    assert shown == ["0", "1", "2"] and table[0] == "reward/bright.py:f ↑"
    assert {"judge/overall ↑", "judge/artifacts ↓"} < {*table}
    assert dom.count("n 3") >= 12 and 'class="sides"' in dom and dom.count("<img") == 12 and "The judge prefers" in dom
    act = "const set = (id, value) => { get(id).value = value; document.forms[0].dispatchEvent(new Event('change')); };"
    by_reward = in_browser(gallery, act + "set('sort', 'reward/bright.py:f ↑')")
    assert re.findall(r'<article data-pair="(\d)"', by_reward) == ["1", "2", "0"]
    lowest = in_browser(gallery, act + "get('up').checked = true; set('sort', 'reward/bright.py:f ↑')")
    assert re.findall(r'<article data-pair="(\d)"', lowest) == ["0", "2", "1"]
    slid = in_browser(gallery, act + """get('slider').checked = true; set('right', '1');
        const range = document.querySelector('input[type=range]');
        range.value = 20; range.dispatchEvent(new Event('input'));""")
    assert 'class="slider"' in slid and slid.count("--at: 20%") == 1
    assert "left of the line" in slid and 'type="range"' in slid


def test_the_page_sorts_by_where_the_judges_disagree(gallery):
    """Pair 0: reward, detector and judge agree. 1: reward against detector. 2: they agree, the judge is undecided."""
    html = gallery.read_text("utf-8")
    start = html.index('id="report">') + len('id="report">')
    content = json.loads(html[start:html.index("</script>", start)])
    left, right = content["dirs"]
    content["scores"] = {"reward/x ↑": [[0, 0, 0], [1, 1, 1]], "fake ↓": [[1, 0, 0], [0, 1, 0]],
                         "judge/overall ↑": [[None, 0, 0], [0, 0, 0]]}
    content["margins"] = {f"{left} vs {right}": [-1, None, -1], f"{right} vs {left}": [1, 1, -1]}
    page = gallery.with_name("votes.html")
    content = json.dumps(content).replace("<", "\\u003c")
    page.write_text(html[:start] + content + html[html.index("</script>", start):], "utf-8")
    dom = in_browser(page, "get('sort').value = 'disagreement'; show()")
    assert re.findall(r'<article data-pair="(\d)"', dom) == ["1", "2", "0"]
    said = re.findall(r"<p>(.*?)</p>", dom)[-3:]
    assert said[0] == "An answer of the judge was not read" and "Tie" in said[1] and "not read" in dom
    assert re.fullmatch("The judge prefers .*b, margin 1.00", said[2])


def test_the_page_of_128_pairs_of_large_pictures(tmp_path):
    """Noise, which compresses worst: below 20 MB, and each picture is still to be seen."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", compress_level=1)
    html = flow.pictures.page({}, [[f"{tmp_path}/x.png"] * 128] * 2)
    content = json.loads(re.search(r'id="report">(.*?)</script>', html)[1])
    picture = Image.open(io.BytesIO(base64.b64decode(content["pictures"][0][0].split(",")[1])))
    assert len(html) < 20e6 and 256 <= picture.width <= 400 and picture.format == "JPEG"
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    many = flow.pictures.page({}, [[f"{tmp_path}/small.png"] * 300] * 2)
    assert many.count("data:image/png") == 2 * 256  # the first ones
    few = flow.pictures.page({}, [[f"{tmp_path}/x.png"]] * 2)
    assert max(map(len, json.loads(re.search(r'id="report">(.*?)</script>', few)[1])["pictures"][0])) > 500_000


# ---------------------------------------------------------------- errors and files

def bright(tmp_path) -> tuple[str]:
    """A reward that loads at once, as the value of --reward."""
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
        (dict(forensic=("tiny/forensic", "no-detector")), ["--forensic no-detector", "no such folder"]),
        (dict(real=folders[0], embed="no-network"), ["--embed no-network", "no such folder"]),
        (dict(real=""), ["--real ''"]),
        (dict(out=""), ["--out ''"]),
        (dict(judge_timeout=math.inf), ["--judge-timeout inf"]),
        (dict(judge_timeout=math.nan), ["--judge-timeout nan"]),
    ]:
        args = {"out": tmp_path / "out", "reward": bright(tmp_path), **changes}
        refuses(capsys, lambda: compare(*folders, **args), *words)
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_refused_and_kept(folders, tmp_path, capsys, monkeypatch):
    """They are found in --out before anything is loaded or asked."""
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
        ("report.html", None),
        ("report.html", b"<html></html>"),
    ]):
        file = tmp_path / f"out{i}" / name
        file.parent.mkdir()
        file.mkdir() if content is None else file.write_bytes(content)
        refuses(capsys, lambda: compare(*folders, out=file.parent, reward=bright(tmp_path)), str(file), "--out")
        assert [*file.parent.iterdir()] == [file] and (file.is_dir() or file.read_bytes() == content)


def test_a_report_written_again(folders, tmp_path):
    """It replaces its own files. A line that a kill has cut at any place does not count as another program's."""
    args = {"out": tmp_path / "out", "reward": bright(tmp_path)}
    first = compare(*folders, **args)
    scores = (tmp_path / "out" / "scores.jsonl").read_text()
    line = scores.splitlines()[-1]
    for cut in range(len(line) + 1):
        (tmp_path / "out" / "scores.jsonl").write_text(scores + line[:cut] + "\n\n" + line[:cut])
        assert len(eval_judge.read_scores(tmp_path / "out" / "scores.jsonl")) == 6
    assert compare(*folders, **args) == first
    assert not (tmp_path / "out" / ".report.tmp").exists()


def test_nan_is_null_in_the_report(folders, tmp_path, monkeypatch, capsys):
    """The report is JSON that any reader accepts."""
    monkeypatch.setattr(eval_judge.judge, "load_embed", lambda *args: None)
    monkeypatch.setattr(eval_judge.judge, "embed_images", lambda embed, images: torch.zeros(1, 2))
    monkeypatch.setattr(eval_judge.judge, "frechet_distance", lambda a, b: math.nan)
    report = compare(*folders, real=folders[0], out=tmp_path / "out")
    assert all(m["mean"] is None for m in report["metrics"]["fd/embed"].values())
    assert "nan" not in capsys.readouterr().out


def test_a_score_is_kept_with_its_device_and_libraries(monkeypatch):
    """A score of another device or library version is another score; a server's does not depend on them."""
    cpu, gpu = CPU, torch.device("cuda")
    assert eval_judge.identity("tiny/judge", cpu) != eval_judge.identity("tiny/judge", gpu)
    assert "bfloat16" in eval_judge.identity("tiny/judge", gpu)
    before, url = eval_judge.identity("tiny/judge", cpu), "http://127.0.0.1:9/v1"
    assert eval_judge.identity(url, cpu) == eval_judge.identity(url, gpu) == url
    monkeypatch.setattr(eval_judge, "version", lambda library: "0")
    assert eval_judge.identity("tiny/judge", cpu) != before


def test_a_vlm_reward_in_a_report(folders, server, tmp_path):
    """Named by its model; asked again for another question. Its identity includes its folder's weights."""
    url, _, asked = server
    specs = f"vlm:m@{url}", "vlm:tiny/judge:0.5"
    report = compare(*folders, reward=specs, vlm_question=OVERALL, out=tmp_path / "out")
    assert list(report["metrics"]) == ["reward/m", "reward/judge:0.5"] and len(asked) == 6
    assert report["metrics"]["reward/m"][folders[0]]["mean"] == pytest.approx(0.6 / 0.9)
    for question in (OVERALL, "Good, or not?"):
        compare(*folders, reward=specs[:1], vlm_question=question, out=tmp_path / "out")
    assert len(asked) == 12
    (tmp_path / "model").mkdir()
    before = eval_judge.identity(f"tiny/hps:0.5,vlm:{tmp_path}/model", CPU)
    (tmp_path / "model" / "weights").write_text("1")
    assert eval_judge.identity(f"tiny/hps:0.5,vlm:{tmp_path}/model", CPU) != before
