"""Tests of prompts: read from files, encoded once, kept on disk; what a model was not made for is told."""
import json
import sys
from datetime import datetime

import pytest
import torch
from torch.utils._pytree import tree_leaves

import train_awm
from flow import prompts
from flow.pipeline import draw_noise, encode_prompts, integrate, load_pipeline, schedule, velocity
from flow.prompts import warn_unsuitable
from flow.rewards import load_reward
from tests.helpers import CPU, PROMPTS, refuses

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
    reward.check_prompts([{"prompt": "a red star"}] * 3)
    assert capsys.readouterr().out == ""
    longest = reward.models[0].config.text_config.max_position_embeddings
    reward.check_prompts([{"prompt": text} for text in ("a red star", "very " * longest, "very " * longest)])
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


# ---------------------------------------------------------------- files

STAR = {"prompt": "a red star", "metadata": {}}
RING = {"prompt": "a blue ring, and 3 more", "metadata": {}}
TAGGED = [{"prompt": "a red star", "metadata": {"tag": "color", "include": [{"class": "star", "count": 1}]}},
          {"prompt": "a blue ring", "metadata": {"tag": "count", "include": []}}]
GENEVAL = b"""{"tag": "color", "include": [{"class": "star", "count": 1}], "prompt": "a red star"}
{"tag": "count", "include": [], "prompt": "a blue ring"}
"""


def read(tmp_path, name: str, content: bytes) -> list[dict]:
    (tmp_path / name).write_bytes(content)
    return prompts.read_prompts(f"{tmp_path}/{name}", "--prompts")


@pytest.mark.parametrize("content", [
    "a red star\nUN CAFÉ\n".encode(),
    b"\xef\xbb\xbf" + "a red star\r\n\r\nUN CAFÉ".encode(),
    "a red star\nUN CAFÉ\n".encode("utf-16"),
    b"\xfe\xff" + "a red star\r\nUN CAFÉ\n".encode("utf-16-be"),
    "a red star\rUN CAFÉ\r".encode(),  # as old programs on a Mac
])
def test_encodings_and_line_ends_of_a_text_file(tmp_path, content):
    assert read(tmp_path, "p.txt", content) == [STAR, {"prompt": "UN CAFÉ", "metadata": {}}]


def test_a_text_file_is_split_at_line_ends_only(tmp_path):
    line = "a\u2028red\x0c star \x85 of\u2029 paper\x1ccut"
    assert [row["prompt"] for row in read(tmp_path, "p.txt", f"{line}\na".encode())] == [line, "a"]


@pytest.mark.parametrize("name", ["evaluation_metadata.jsonl", "metadata.json", "p.txt", "p.csv", "p.ndjson", "p"])
def test_json_in_every_line(tmp_path, name):
    """As GenEval's evaluation_metadata.jsonl and flow_grpo's train_metadata.jsonl, by whatever name and encoding."""
    text = GENEVAL.decode().replace("\n", "\r\n")
    for content in (GENEVAL, b"\xef\xbb\xbf" + GENEVAL, text.encode("utf-16")):
        assert read(tmp_path, name, content) == TAGGED


def test_a_json_list(tmp_path):
    rows = [json.loads(line) for line in GENEVAL.splitlines()]
    for name in ("p.json", "p.txt"):
        assert read(tmp_path, name, json.dumps(rows, indent=1).encode()) == TAGGED
        assert read(tmp_path, name, b'["a red star", "a blue ring, and 3 more"]') == [STAR, RING]
    assert read(tmp_path, "p.jsonl", b'"a red star"\n"a blue ring, and 3 more"\n') == [STAR, RING]
    one = b'{"prompt": "a cat",\n "n": NaN}'
    assert read(tmp_path, "p.json", one) == [{"prompt": "a cat", "metadata": {"n": None}}]


def test_tables(tmp_path):
    """DrawBench's (Prompts), PartiPrompts' (tabs, quotes that are part of a cell), a Hugging Face export (an index)."""
    bench = b'Prompts,Category\r\n"a red star, and\r\na ""ring""",Colors\r\na cat,Counting\r\n'
    assert read(tmp_path, "DrawBench.csv", bench) == [
        {"prompt": 'a red star, and\r\na "ring"', "metadata": {"Category": "Colors"}},
        {"prompt": "a cat", "metadata": {"Category": "Counting"}}]
    parti = b'Prompt\tCategory\tNote\n"Hi" on a wall, in red\tArts\t\na cat\tAnimals\tone, two\n'
    for name in ("PartiPrompts.tsv", "PartiPrompts.csv", "parti.txt"):
        assert read(tmp_path, name, parti) == [
            {"prompt": '"Hi" on a wall, in red', "metadata": {"Category": "Arts", "Note": ""}},
            {"prompt": "a cat", "metadata": {"Category": "Animals", "Note": "one, two"}}]
    swallowing = b'Prompt\tn\n"a cat\t1\na dog"\t2\n'
    assert [row["prompt"] for row in read(tmp_path, "p.tsv", swallowing)] == ['"a cat', 'a dog"']
    assert read(tmp_path, "p.csv", b",caption,url\n0,a cat,x\n1,a dog,y\n") == [
        {"prompt": "a cat", "metadata": {"": "0", "url": "x"}}, {"prompt": "a dog", "metadata": {"": "1", "url": "y"}}]
    for header in (b"text,prompt", b'"text","prompt"'):
        assert read(tmp_path, "p.txt", header + b"\nHELLO,a sign\n") == [
            {"prompt": "a sign", "metadata": {"text": "HELLO"}}]
    assert read(tmp_path, "p.txt", b"prompt\na cat\n") == [{"prompt": "a cat", "metadata": {}}]
    assert [row["prompt"] for row in read(tmp_path, "p.txt", b"text\na cat\n")] == ["text", "a cat"]
    assert read(tmp_path, "p.csv", "\ufeffprompt;n\r\na cat;1\r\n;\r\n".encode()) == [
        {"prompt": "a cat", "metadata": {"n": "1"}}]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rows = [{"caption": "a cat", "n": 1, "image": {"bytes": b"PNG"}, "at": datetime(2024, 1, 2)}, {"caption": "a dog"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("p.parquet", "p.txt"):
        assert read(tmp_path, name, (tmp_path / "t.parquet").read_bytes()) == [
            {"prompt": "a cat", "metadata": {"n": 1, "image": {"bytes": None}, "at": "2024-01-02 00:00:00"}},
            {"prompt": "a dog", "metadata": {"n": None, "image": None, "at": None}}]


def test_parquet_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(capsys, lambda: read(tmp_path, "p.parquet", b"PAR1"), "p.parquet", "pip install pyarrow")


@pytest.mark.parametrize("name, content, words", [
    ("p.txt", b"a\0red star\n", "NULs"),
    ("p.txt", "a red star\n".encode("utf-16-le"), "NULs"),
    ("p.txt", "a red star\n".encode("utf-32"), "NULs"),
    ("p.txt", "un café\n".encode("latin-1"), "cannot be read"),
    ("p.txt", "un café\n".encode("shift-jis", "replace") + b"\x81", "cannot be read"),
    ("p.txt", b"\x89PNG\r\n\x1a\n", "cannot be read"),
    ("p.txt", "un café\n".encode("latin-1"), "iconv"),
    ("p.json", b'{"annotations": [\n{"caption": "a cat"}]}', "JSON is a list of objects"),
    ("p.json", b'{"prompt": {"0": "a cat",\n"1": "a dog"}}', "a list of JSON objects"),
    ("p.csv", b"prompt,prompt\na cat,a dog\n", "two columns have one name"),
    ("p.txt", b"a red star\na \x1b[31mred star\n", "row 2 has no text"),
    ("p.txt", GENEVAL + b'{"prompt": "cut sho', "row 3 is no JSON object"),
    ("p.jsonl", b"a red star\n", "row 1 is no JSON object"),
    ("p.json", b'{"prompt": ', "row 1 is no JSON object"),
    ("p.json", b"[1]", "row 1 has no text"),
    ("p.json", b"[]", "no prompt"),
    ("p.jsonl", b'{"prompt": ["a"]}\n', "row 1 has no text"),
    ("p.jsonl", b'{"prompt": "\\ud83d"}\n', "row 1 has no text"),
    ("p.jsonl", b'{"prompt": "a"}\n{"tag": "b"}\n', "row 2 has no text"),
    ("p.jsonl", b'{"tag": "a", "question": "b"}\n', "rename one of tag, question"),
    ("p.csv", b"id,sentence\n1,a cat\n", "rename one of id, sentence"),
    ("p.csv", b"prompt\na red cat, sitting\n", "more cells than the header"),
    ("p.csv", b"prompt,n\n,1\n", "row 1 has no text"),
    ("p.csv", b'prompt,n\n"a cat,1\n', "cannot be read"),
    ("p.parquet", b"a red star\n", "cannot be read"),
    ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    ("p.txt", b"\n<!DOCTYPE html>\n<html>404</html>\n", "web page"),
    ("p.yaml", b"- prompt: a red star\n", "name it .txt"),
])
def test_what_is_no_list_of_prompts_is_refused(tmp_path, capsys, name, content, words):
    refuses(capsys, lambda: read(tmp_path, name, content), f"--prompts {tmp_path}/{name}", words)


def test_prompts_that_repeat_are_kept_and_counted(tmp_path, capsys):
    assert read(tmp_path, "p.txt", b"a red star\na ring\na red star\na red star\n")[::2] == [STAR, STAR]
    assert "2 of 4 prompts repeat" in capsys.readouterr().out
    read(tmp_path, "p.txt", b"a red star\na ring\n")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("n, held_out", [(2, 1), (19, 1), (30, 3), (1000, 64)])
def test_without_held_out_prompts_the_last_tenth_is_held_out(tmp_path, capsys, n, held_out):
    """Of the distinct prompts: one that comes twice is in one part only."""
    lines = [f"prompt {i}" for i in range(n)] + [f"prompt {n - 1}", "prompt 0"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    train, evaluated = prompts.read_split(train_awm.Args(prompts=f"{tmp_path}/p.txt"))
    assert [row["prompt"] for row in train] == lines[:n - held_out] + ["prompt 0"]
    assert [row["prompt"] for row in evaluated] == lines[n - held_out:n + 1]
    assert f"the last {held_out} of {n} prompts are held out" in capsys.readouterr().out


def test_given_or_default_held_out_prompts_take_nothing_from_training(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    for args in (train_awm.Args(), train_awm.Args(prompts=f"{tmp_path}/p.txt", eval_prompts="tiny/eval_prompts.txt")):
        train, evaluated = prompts.read_split(args)
        assert train == prompts.read_prompts(args.prompts, "") and len(evaluated) == 16
    assert capsys.readouterr().out == ""
    (tmp_path / "p.txt").write_text("a cat\na cat\n")
    refuses(capsys, lambda: prompts.read_split(train_awm.Args(prompts=f"{tmp_path}/p.txt")), "give --eval-prompts")


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
