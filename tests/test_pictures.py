"""Tests of picture files, grids, folders of pictures, and the curves of a run."""
import base64
import json
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from flow import judge, pictures
from flow.cli import InputError
from tests.helpers import CPU, refuses


def test_captions_stand_below_their_pictures():
    sheet = pictures.grid(torch.zeros(3, 3, 64, 64), 2, ["a red star", "", "a blue ring"])
    plain = pictures.grid(torch.zeros(3, 3, 64, 64), 2)
    assert sheet.width == plain.width and sheet.height > plain.height
    high = sheet.height // 2
    strips = [sheet.crop((x, y + 64, x + 64, y + high)).convert("L") for x, y in ((0, 0), (64, 0), (0, high))]
    assert [strip.getextrema()[0] < 100 for strip in strips] == [True, False, True]


def test_the_parts_of_a_sum_are_drawn_in_units_of_their_deviation(tmp_path, monkeypatch):
    """Parts of any scale are as high; a constant one and one that is not always a number are drawn, too."""
    drawn, honest = [], pictures.png
    monkeypatch.setattr(pictures, "png", lambda figure: drawn.append(figure) or honest(figure))
    parts = {"A": ([5, 7, 6], [0.01, 0.02, 0.01]), "f.py:b_std": ([100, 100, 100], [0, 0, 0]),
             "$\\foo$": ([None, 1, 2], [None, 3, 4]), "d": ([None] * 3, [None] * 3)}
    lines = [{"step": i + 1, "loss": 1.0, "reward": 1.0, "reward_std": 2.0,
              **{f"reward/{name}": mean[i] for name, (mean, _) in parts.items()},
              **{f"reward/{name}_std": std[i] for name, (_, std) in parts.items()}} for i in range(3)]
    for rows in (lines, [{"step": 1, "reward": 1.0, "reward_std": 2.0}]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        pictures.plot_curves(tmp_path)
    (axis,) = [axis for axis in drawn[0].axes if axis.get_title().startswith("parts of the reward")]
    curves = {line.get_label(): line.get_xydata() for line in axis.lines}
    names = "reward/A: from 5, unit 0.01", "reward/f.py:b_std: from 100, unit 1", "reward/$\\foo$: from 1, unit 3"
    assert (*curves,) == names
    expected = [[1, 0], [2, 200], [3, 100]], [[1, 0], [2, 0], [3, 0]], [[2, 0], [3, 1 / 3]]
    for curve, points in zip(curves.values(), expected):
        np.testing.assert_allclose(sorted(curve.tolist()), points)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-1, 202)
    assert not any("parts" in axis.get_title() for axis in drawn[1].axes)


# ---------------------------------------------------------------- pictures as people see them

GRAY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
OPAQUE = np.full((20, 30, 1), 255, np.uint8)
HALF = np.full((20, 30, 1), 128, np.uint8)


def turned(picture: Image.Image, file, orientation: int = 6, **options):
    """Save a picture as a camera held upright does: turned, with an EXIF that says so."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
            2: Image.Transpose.FLIP_LEFT_RIGHT}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.transpose(back).save(file, exif=exif, **options)


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, 2)


def on_white(alpha: float, colour: np.ndarray = COLOUR) -> np.ndarray:
    return (colour * alpha + 255 * (1 - alpha)).round()


KINDS = {  # name: (save(file), suffix, what people see)
    "RGB": (lambda f: Image.fromarray(COLOUR).save(f), ".png", COLOUR),
    "L": (lambda f: Image.fromarray(GRAY).save(f), ".png", rgb(GRAY)),
    "1 bit": (lambda f: Image.fromarray(GRAY > 127).save(f), ".png", rgb((GRAY > 127) * 255)),
    "16 bits": (lambda f: Image.fromarray(GRAY.astype(np.uint16) * 257).save(f), ".png", rgb(GRAY)),
    "16 bits, upper 8": (lambda f: Image.fromarray(GRAY.astype(np.uint16) << 8).save(f), ".png", rgb(GRAY)),
    "16 bits, tiff": (lambda f: Image.fromarray(GRAY.astype(">u2") * 257).save(f), ".tif", rgb(GRAY)),
    "16 bits, dark": (lambda f: Image.fromarray(GRAY.astype(np.uint16) // 2).save(f), ".png", 0 * COLOUR),
    "32 bits": (lambda f: Image.fromarray(GRAY.astype(np.int32) * 257).save(f), ".tiff", rgb(GRAY)),
    "32 bits, to 255": (lambda f: Image.fromarray(GRAY.astype(np.int32)).save(f), ".tiff", rgb(GRAY)),
    "float to 1": (lambda f: Image.fromarray(GRAY.astype(np.float32) / 255).save(f), ".tif", rgb(GRAY)),
    "float to 255": (lambda f: Image.fromarray(GRAY.astype(np.float32)).save(f), ".tif", rgb(GRAY)),
    "float to 65535": (lambda f: Image.fromarray(GRAY.astype(np.float32) * 257).save(f), ".tif", rgb(GRAY)),
    "float to 1, rounded": (lambda f: Image.fromarray(GRAY.astype(np.float32) / 254.9999 - 1e-6).save(f), ".tif",
                            rgb(GRAY)),
    "palette": (lambda f: Image.fromarray(COLOUR // 64 * 64).quantize(256).save(f), ".png", COLOUR // 64 * 64),
    "gif": (lambda f: Image.fromarray(GRAY).save(f), ".gif", rgb(GRAY)),
    "animated gif": (lambda f: Image.fromarray(GRAY).save(
        f, save_all=True, append_images=[Image.fromarray(255 - GRAY)]), ".gif", rgb(GRAY)),
    "animated webp": (lambda f: Image.fromarray(COLOUR).save(
        f, save_all=True, append_images=[Image.fromarray(255 - COLOUR)], lossless=True), ".webp", COLOUR),
    "CMYK": (lambda f: Image.merge("CMYK", [*Image.fromarray(255 - COLOUR).split(), Image.new("L", (30, 20))]).save(f),
             ".tif", COLOUR),
    "RGBA, opaque": (lambda f: Image.fromarray(np.dstack([COLOUR, OPAQUE])).save(f), ".png", COLOUR),
    "RGBA": (lambda f: Image.fromarray(np.dstack([COLOUR, HALF])).save(f), ".png", on_white(128 / 255)),
    "RGBA, webp": (lambda f: Image.fromarray(np.dstack([COLOUR, HALF])).save(f, lossless=True), ".webp",
                   on_white(128 / 255)),
    "RGBA, clear": (lambda f: Image.fromarray(np.dstack([COLOUR, 0 * HALF])).save(f), ".png", 0 * COLOUR + 255),
    "LA": (lambda f: Image.fromarray(np.dstack([GRAY, HALF])).save(f), ".png", on_white(128 / 255, rgb(GRAY))),
    "a clear colour": (lambda f: Image.fromarray(GRAY).save(f, transparency=int(GRAY[3, 4])), ".png",
                       rgb(np.where(GRAY == GRAY[3, 4], 255, GRAY))),
    "a clear colour of 16 bits": (lambda f: Image.fromarray(GRAY.astype(np.uint16) * 257).save(
        f, transparency=int(GRAY[3, 4]) * 257), ".png", rgb(np.where(GRAY == GRAY[3, 4], 255, GRAY))),
    "a clear colour of a palette": (lambda f: Image.fromarray(GRAY).convert("P").save(
        f, transparency=bytes([0] * 256)), ".png", 0 * COLOUR + 255),
    "EXIF 6": (lambda f: turned(Image.fromarray(COLOUR), f), ".png", COLOUR),
    "EXIF 3": (lambda f: turned(Image.fromarray(COLOUR), f, 3), ".tif", COLOUR),
    "EXIF 8": (lambda f: turned(Image.fromarray(COLOUR), f, 8, lossless=True), ".webp", COLOUR),
    "EXIF 2": (lambda f: turned(Image.fromarray(COLOUR), f, 2), ".png", COLOUR),
    "EXIF 6, 16 bits": (lambda f: turned(Image.fromarray(GRAY.astype(np.uint16) * 257), f), ".png", rgb(GRAY)),
    "EXIF 6, alpha": (lambda f: turned(Image.fromarray(np.dstack([COLOUR, HALF])), f), ".png", on_white(128 / 255)),
    "bmp": (lambda f: Image.fromarray(COLOUR).save(f), ".bmp", COLOUR),
    "upper case": (lambda f: Image.fromarray(COLOUR).save(f), ".PNG", COLOUR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_read_as_people_see_it(kind, tmp_path):
    """Everywhere alike: opened, as a tensor, in a folder's row, and as a server gets it."""
    save, suffix, seen = KINDS[kind]
    file = str(tmp_path / f"x{suffix}")
    save(file)
    picture = pictures.open_picture(file)
    assert picture.mode == "RGB" and picture.size == (30, 20)
    assert abs(np.asarray(picture).astype(int) - seen).max() <= (1 if "RGBA" in kind or "alpha" in kind else 0)
    assert torch.equal(pictures.load_pictures([file])[0], torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    assert [row["size"] for row in pictures.read_folder(str(tmp_path))] == [(30, 20)]
    sent = tmp_path / "sent"
    sent.write_bytes(base64.b64decode(judge.data_url(file).split(",")[1]))
    with Image.open(sent) as opened:  # needs nothing but 8-bit RGB
        assert opened.mode in ("L", "RGB") and np.array_equal(opened.convert("RGB"), picture)
        assert judge.data_url(file).startswith(f"data:image/{opened.format.lower()};")


def test_a_16_bit_picture_of_colours(tmp_path):
    """By hand: Pillow does not write it."""
    deep = COLOUR.astype(int) * 256 + np.random.default_rng(2).integers(0, 256, COLOUR.shape)
    rows = b"".join(b"\0" + row.tobytes() for row in deep.astype(">u2"))
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "x.png").write_bytes(content)
    assert np.array_equal(pictures.open_picture(tmp_path / "x.png"), COLOUR)


def test_jpeg_is_sent_as_jpeg(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.jpg")
    assert judge.data_url(f"{tmp_path}/x.jpg").startswith("data:image/jpeg;base64,")
    turned(Image.fromarray(COLOUR), tmp_path / "y.jpg")
    assert judge.data_url(f"{tmp_path}/y.jpg").startswith("data:image/png;base64,")


def test_a_twin_has_the_distance_0(tmp_path):
    """A folder against the same pictures turned by EXIF, with 16 bits, with alpha: also for the detector."""
    rng = np.random.default_rng(0)
    grays = [rng.integers(0, 256, (64, 64), dtype=np.uint8) for _ in range(4)]
    twins = {
        "plain": lambda x, f: Image.fromarray(x).save(f),
        "turned": lambda x, f: turned(Image.fromarray(x), f),
        "deep": lambda x, f: Image.fromarray(x.astype(np.uint16) * 257).save(f),
        "alpha": lambda x, f: Image.fromarray(np.dstack([x, 0 * x + 255])).save(f),
    }
    embed, detector = judge.load_embed("tiny/embed", CPU), judge.load_forensic("tiny/forensic", None, CPU)
    features, real = {}, {}
    for name, save in twins.items():
        (tmp_path / name).mkdir()
        files = [str(tmp_path / name / f"{i}.png") for i in range(4)]
        for gray, file in zip(grays, files):
            save(gray, file)
        features[name] = judge.embed_images(embed, pictures.load_pictures(files))
        real[name] = detector(files)
    for name in twins:
        assert abs(judge.frechet_distance(features[name], features["plain"])) < 1e-3
        assert torch.equal(real[name], real["plain"])


@pytest.mark.parametrize("content, word", [
    (lambda f: f.write_bytes(b""), "cannot be read"),
    (lambda f: f.write_text("<html>"), "cannot be read"),
    (lambda f: (Image.fromarray(COLOUR).save(f), f.write_bytes(f.read_bytes()[:-400])), "cannot be read"),
    (lambda f: Image.fromarray(GRAY.astype(np.float32) - 1).save(f, "TIFF"), "numbers"),
    (lambda f: Image.fromarray(GRAY.astype(np.float32) / 200).save(f, "TIFF"), "numbers, 0 to 1.2"),
    (lambda f: Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(f, "TIFF"), "numbers"),
    (lambda f: Image.fromarray(GRAY.astype(np.int32) * 1000).save(f, "TIFF"), "numbers"),
    (lambda f: Image.new("1", (10_000, 10_000)).save(f), "pixels"),
    (lambda f: Image.new("1", (20_000, 10_000)).save(f), "pixels"),
])
def test_a_broken_or_huge_picture_is_one_line(content, word, tmp_path, capsys, recwarn):
    content(tmp_path / "broken.png")
    recwarn.clear()
    refuses(capsys, lambda: pictures.read_folder(str(tmp_path)), "broken.png", word)
    assert not recwarn.list


def test_what_else_is_in_a_folder_is_counted(tmp_path, capsys):
    for name in ("10.png", "9.jpg", "b.webp"):
        Image.fromarray(COLOUR).save(tmp_path / name)
    Image.fromarray(np.dstack([COLOUR, HALF])).save(tmp_path / "a.png")
    for name in ("._9.png", ".DS_Store", "Thumbs.db", "x.heic", "notes.txt", "more.txt", "README"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "old.png").mkdir()
    rows = pictures.read_folder(str(tmp_path))
    assert [row["name"] for row in rows] == ["9", "10", "a", "b"]
    (line,) = capsys.readouterr().out.splitlines()
    for words in ("4 pictures", "2 not read (hidden)", "1 not read (.db)", "1 not read (.heic)", "2 not read (.txt)",
                  "1 not read (no suffix)", "1 not read (subfolder)", "1 with alpha, put on white"):
        assert words in line
    Image.fromarray(COLOUR).save(tmp_path / "9.png")
    with pytest.raises(InputError, match="9.jpg and 9.png have one name"):
        pictures.read_folder(str(tmp_path))


def test_equal_pixels_of_another_size_are_another_picture(tmp_path):
    for name, size in (("wide", (8, 4)), ("high", (4, 8))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    assert len({row["hash"] for row in pictures.read_folder(str(tmp_path))}) == 2


def test_a_seed_may_be_anything(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "0.png")
    line = json.dumps({"file": "0.png", "prompt": "a red star", "seed": [0, {}]}) + "\n"
    (tmp_path / "samples.jsonl").write_text(line * 2)
    assert [row["key"] for row in pictures.read_folder(str(tmp_path))] == [
        ("a red star", "[0, {}]", 1), ("a red star", "[0, {}]", 2)]


def test_a_folder_of_folders_says_so(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no picture.*1 not read .subfolder"):
        pictures.read_folder(str(tmp_path))


# ---------------------------------------------------------------- curves.png

def panels_of(out, monkeypatch) -> dict[str, list[str]]:
    """Draw a run's curves: the labels in the legend by title."""
    drawn = []
    monkeypatch.setattr(pictures, "png", lambda figure: drawn.append(figure) or b"")
    pictures.plot_curves(out, 3.0)
    assert isinstance(drawn[0], Figure)
    return {axis.get_title(): [text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn[0].axes}


def log_run(out, epochs: int, evaluated: bool = True):
    """A metrics.jsonl of a step and an evaluation per epoch. No row was at the highest noise level."""
    step = {"loss": 1.0, "reward": 0.5, "norm_ratio": 1.1, "active": 0.3, "norm_ratio_by_t": [1.0, 1.1, None]}
    held_out = {"eval_reward": 0.6, "eval_norm_ratio": 1.1, "eval_norm_ratio_steps": [1.0] * 14}
    rows = [{"step": k, "epoch": k, **row} for k in range(1, epochs + 1) for row in [step, held_out][:1 + evaluated]]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_of_a_long_run(tmp_path, monkeypatch):
    """The legend has few of 1000 evaluations, from the first to the last."""
    log_run(tmp_path, 1000)
    pictures.plot_curves(tmp_path)
    start = time.process_time()
    pictures.plot_curves(tmp_path)
    assert time.process_time() - start < 2  # 0.5 s; 4.4 s with a curve for each evaluation
    legend = panels_of(tmp_path, monkeypatch)["norm ratio along the trajectory (8 of 1000)"]
    assert len(legend) == 8 and legend[0] == "epoch 1" and legend[-1] == "epoch 1000"
    log_run(tmp_path, 3)
    legends = panels_of(tmp_path, monkeypatch)
    assert legends["norm ratio along the trajectory (3 of 3)"] == ["epoch 1", "epoch 2", "epoch 3"]
    assert legends["norm ratio by noise level, training"] == ["t 0.0 to 0.3", "t 0.3 to 0.7"]
    assert legends["norm ratio to the reference"] == ["norm_ratio (conditional)", "eval_norm_ratio (guidance 3)"]


def test_curves_without_evaluations_have_no_empty_panel(tmp_path, monkeypatch):
    log_run(tmp_path, 1, evaluated=False)
    legends = panels_of(tmp_path, monkeypatch)
    assert list(legends) == ["reward", "norm ratio to the reference", "guard: fraction of samples over the reference",
                             "norm ratio by noise level, training"]
    assert legends["reward"] == ["reward"]


def test_a_single_step_is_seen(tmp_path):
    """A curve of one point has a marker: the panel is not white."""
    log_run(tmp_path, 1, evaluated=False)
    pictures.plot_curves(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    middle = sheet[sheet.shape[0] // 4:sheet.shape[0] // 5 * 4, :sheet.shape[1] // 4]  # below the legend
    assert (abs(middle - [68, 1, 84]).max(-1) < 40).sum() > 5  # viridis' first colour
