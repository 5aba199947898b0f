"""Tests of picture files and grids."""
import json

import numpy as np
import torch

from flow import pictures


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
             "c": ([None, 1, 2], [None, 3, 4]), "d": ([None] * 3, [None] * 3)}
    lines = [{"step": i + 1, "loss": 1.0, "reward": 1.0, "reward_std": 2.0,
              **{f"reward/{name}": mean[i] for name, (mean, _) in parts.items()},
              **{f"reward/{name}_std": std[i] for name, (_, std) in parts.items()}} for i in range(3)]
    for rows in (lines, [{"step": 1, "reward": 1.0, "reward_std": 2.0}]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        pictures.plot_curves(tmp_path)
    (axis,) = [axis for axis in drawn[0].axes if axis.get_title().startswith("parts of the reward")]
    curves = {line.get_label(): line.get_xydata() for line in axis.lines}
    names = "reward/A: from 5, unit 0.01", "reward/f.py:b_std: from 100, unit 1", "reward/c: from 1, unit 3"
    assert (*curves,) == names
    expected = [[1, 0], [2, 200], [3, 100]], [[1, 0], [2, 0], [3, 0]], [[2, 0], [3, 1 / 3]]
    for curve, points in zip(curves.values(), expected):
        np.testing.assert_allclose(curve, points)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-1, 202)
    assert not any("parts" in axis.get_title() for axis in drawn[1].axes)
