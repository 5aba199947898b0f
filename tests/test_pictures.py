"""Tests of picture files and grids."""
import torch

from flow import pictures


def test_captions_stand_below_their_pictures():
    sheet = pictures.grid(torch.zeros(3, 3, 64, 64), 2, ["a red star", "", "a blue ring"])
    plain = pictures.grid(torch.zeros(3, 3, 64, 64), 2)
    assert sheet.width == plain.width and sheet.height > plain.height
    high = sheet.height // 2
    strips = [sheet.crop((x, y + 64, x + 64, y + high)).convert("L") for x, y in ((0, 0), (64, 0), (0, high))]
    assert [strip.getextrema()[0] < 100 for strip in strips] == [True, False, True]
