"""Tests of a run's random draws and of group advantages."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import flow.draws
import train_awm
from tests.helpers import generator


def test_advantages():
    reward = np.random.default_rng(0).normal(size=(3, 4)) ** 5  # heavy tails, so that some are clipped
    expected = np.clip((reward - reward.mean(1, keepdims=True)) / reward.std(), -1.5, 1.5) / 1.5
    ours = flow.draws.group_advantages(torch.from_numpy(reward.flatten()), group=4, clip=1.5)
    np.testing.assert_allclose(ours.numpy(), expected.flatten(), rtol=1e-9)
    assert (abs(expected) == 1).any()


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e5, 1e12])
def test_advantages_do_not_depend_on_the_rewards_scale(scale):
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0))
    one, other = (flow.draws.group_advantages(r, group=4, clip=5) for r in (reward, scale * reward))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert flow.draws.zero_std_share(scale * reward, group=4) == 0


@pytest.mark.parametrize("level", [0.0, 1e-9, 0.7, -3e4])
def test_rewards_that_are_equal_to_rounding_have_no_advantage(level):
    """All rewards, or those of one prompt of two."""
    equal = level * (1 + 1e-7 * torch.randn(8, generator=torch.Generator().manual_seed(0)))
    assert (flow.draws.group_advantages(equal, group=4, clip=5) == 0).all()
    assert flow.draws.zero_std_share(equal, group=4) == 1
    equal[4:] += (abs(level) or 1) * torch.tensor([0.0, 0.1, 0.2, 0.3])
    adv = flow.draws.group_advantages(equal, group=4, clip=5)
    assert (adv[:4] == 0).all() and (adv[4:] != 0).all()
    assert flow.draws.zero_std_share(equal, group=4) == 0.5


def test_stratified_timesteps():
    k = flow.draws.stratified_steps(4000, 6, 12, torch.Generator().manual_seed(0))
    # the official "discrete" ones for 14 steps and 6 moments
    expected = [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]
    assert [set(column.tolist()) for column in k.T] == expected


def test_each_pass_over_the_prompts_has_another_order():
    args = train_awm.Args(seed=5, epochs=21, groups=5, eval_n=100)
    captions = Path("tiny/prompts.txt").read_text().splitlines()
    held_out = Path("tiny/eval_prompts.txt").read_text().splitlines()
    prompts, eval_prompts = [[row["prompt"] for row in rows] for rows in flow.draws.draw_prompts(args)]
    order = torch.cat([torch.randperm(len(captions), generator=generator(5, 0, i)) for i in range(3)])
    assert len(captions) == 48 and prompts == [captions[i] for i in order[:105]] and prompts[:48] != prompts[48:96]
    assert eval_prompts == list(itertools.islice(itertools.cycle(held_out), 100))


def test_local_batches_hold_each_row_of_an_update_once(monkeypatch):
    picture, update = torch.tensor([3, 0, 5, 2, 1, 4]).repeat_interleave(2), torch.arange(2, 11)
    for owns in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        batches = []
        for own in owns:
            monkeypatch.setattr(flow.draws, "local_slice", lambda n: own)
            batches.append(flow.draws.local_batches(update, picture, 6, 4))
        assert sorted(row for own in batches for b in own for row in b.tolist()) == update.tolist()
        for own, parts in zip(owns, batches):
            assert all(own.start <= picture[row] < own.stop for b in parts for row in b) and max(map(len, parts)) <= 4
    monkeypatch.setattr(flow.draws, "local_slice", lambda n: slice(6, 8))
    assert flow.draws.local_batches(update, picture, 8, 4) == []
