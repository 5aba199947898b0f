"""Tests of the budget and the bench: what fake tensors say against what real ones take, on small models."""
import functools
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flow.cost import bench, budget, count, shapes
from flow.lora import merged
from normguard import reference
from tests.helpers import CPU

FLAGS = budget.Args(model="tiny/sd3", size=64, reward="tiny/pickscore", batch=8, rank=8)


@functools.cache
def counted(model: str, dtype: torch.dtype) -> dict:
    """What fake tensors say of a model."""
    return count.count(replace(FLAGS, model=model), dtype)


@functools.cache
def real_pipeline(model: str, dtype: torch.dtype, guided: float | None = None):
    """A real pipeline of random weights with a LoRA, ready for the phases, also with --guard-guidance."""
    pipe = shapes.blank_pipeline(model, CPU, 64, dtype=dtype)
    shapes.encode(pipe, guard_guidance=guided)
    shapes.blank_lora(pipe, FLAGS.rank)
    return pipe


def allocated(run) -> int:
    """The most bytes that PyTorch's allocator has handed out at once during run(), as its profiler tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def flops_of(run) -> int:
    """What PyTorch's own counter says, which is given the formula of attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------- estimated against real

def test_estimates_are_what_a_real_pipeline_takes():
    found, pipe = counted("tiny/sd3", torch.float32), real_pipeline("tiny/sd3", torch.float32)
    lora = [p for key, p in pipe.transformer.named_parameters() if "lora_" in key]
    weights = sum(p.numel() * p.element_size() for key, p in pipe.transformer.named_parameters() if "lora_" not in key)
    buffers = sum(b.numel() * b.element_size() for b in pipe.transformer.buffers())
    assert found["base"]["none"][0] == pytest.approx(weights + buffers, rel=0.01)
    assert found["lora"] == sum(4 * p.numel() for p in lora) > 0
    n = 4  # counted for 1 and 8
    with reference(pipe.transformer):
        real = {"rollout": allocated(lambda: count.rollout_step(pipe, n))}
    with merged(pipe.transformer):
        assert 0.9 < allocated(lambda: count.rollout_step(pipe, n)) / real["rollout"] <= 1
    for on in (False, True):
        with count.checkpointing(pipe, on):
            real[f"update {on}"] = allocated(lambda: count.update(pipe, n))
    assert {phase: budget.at(found[phase], n) for phase in real} == pytest.approx(real, rel=0.07), n
    assert found["update True"][8] < found["update False"][8]


@pytest.mark.parametrize("name, dtype, on, guided, tolerance", [
    ("tiny/sd3", torch.bfloat16, False, None, 0.1),  # as on a GPU; a CPU's kernels for bf16 have scratch space
    ("tiny/sd3", torch.float32, True, 3.0, 0.05),
    ("tiny/flux", torch.float32, True, None, 0.05),
    ("z_image", torch.float32, False, None, 0.05)])
def test_an_update_takes_as_much_on_real_tensors(name, dtype, on, guided, tolerance, family):
    model = family(name)
    fake = shapes.blank_pipeline(model, CPU, 64, fake=True, dtype=dtype)
    shapes.encode(fake, guard_guidance=guided)
    shapes.blank_lora(fake, FLAGS.rank)
    real = real_pipeline(model, dtype, guided)
    with count.as_on_cuda(), count.checkpointing(fake, on), count.checkpointing(real, on):
        estimated, flops = count.metered(lambda: count.update(fake, 8, guided=guided))
        assert estimated == pytest.approx(allocated(lambda: count.update(real, 8, guided=guided)), rel=tolerance)
        assert flops == flops_of(lambda: count.update(real, 8, guided=guided))


def test_flops_are_those_that_pytorch_counts_on_a_real_pipeline():
    found, pipe = counted("tiny/sd3", torch.float32)["flops"], real_pipeline("tiny/sd3", torch.float32)
    with merged(pipe.transformer):
        assert found["step"] == flops_of(lambda: count.rollout_step(pipe, 2)) / 2
    assert found["row"] == found["step"] == flops_of(lambda: count.reference_pass(pipe, 1))
    assert found["update False"] == flops_of(lambda: count.update(pipe, 1)) - found["row"]
    assert 2 * found["row"] < found["update False"] < found["update True"] < 4.5 * found["row"]


def test_attention_is_counted():
    q = torch.randn(1, 2, 16, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count.metered(lambda: attention(q, q, q))[1] == 2 * 2 * (2 * 16 * 16 * 8)


def test_the_meter_counts_what_lives_at_once():
    def run():
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # a view takes nothing; 4000 more
        del a
        b = b * 2  # two of them live
        del b
        torch.zeros(1500)
    assert count.metered(run)[0] == 8000


# ---------------------------------------------------------------- published models

@pytest.mark.parametrize("model, parameters", [
    ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520),
    ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
    ("Tongyi-MAI/Z-Image", 6_154_908_736),
    ("Qwen/Qwen-Image", 20_430_401_088),
    ("black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576)])
def test_published_models_have_their_published_number_of_parameters(model, parameters):
    assert model in shapes.PUBLISHED
    name, config = shapes.read_configs(model)[1]["transformer"]
    with torch.device("meta"):
        transformer = getattr(shapes.diffusers, name).from_config(config)
    assert sum(p.numel() for p in transformer.parameters()) == parameters


# ---------------------------------------------------------------- what follows from the numbers

LARGE = {  # invented: a base of 10 GB, half a GB a picture with checkpointing and 4 GB without
    "parameters": 5e9, "vae": 0, "reward": 0, "score": 0, "decode": 0, "text": 4 * budget.GB, "encode": budget.GB,
    "together": 16, "lora": budget.GB / 10, "merged": 0, "rollout": {1: 0, 2: budget.GB / 10},
    "base": {"none": (10 * budget.GB, 0), "int8": (5 * budget.GB, 0), "nf4": (3 * budget.GB, 0)},
    "update False": {1: 4 * budget.GB, 2: 8 * budget.GB}, "update True": {1: budget.GB / 2, 2: budget.GB},
    "flops": {"step": 1e12, "row": 1e12, "update False": 2e12, "update True": 3e12, "decode": 0, "score": 0}}


def test_a_larger_card_or_a_smaller_base_never_fits_less():
    args = budget.Args()
    for on in (True, False):
        by_kind = []
        for kind in ("none", "int8", "nf4"):
            its = replace(args, quantize=kind, checkpointing=on)
            most = [budget.largest(its, LARGE, card) for card in (4, *budget.CARDS)]
            assert most == sorted(most) and most[0] == 0 < most[-1]
            by_kind.append(most)
        assert by_kind[0] <= by_kind[1] <= by_kind[2] and by_kind[0] != by_kind[2]
    assert budget.largest(args, LARGE, 24) == 16  # 10 + 0.3 + 8 + 1 of 24; 32 would take 27.3
    assert budget.largest(replace(args, checkpointing=False), LARGE, 24) == 2


def test_peaks_grow_with_the_batch_and_the_method():
    args = budget.Args()
    updates = [budget.peaks(replace(args, batch=n), LARGE)["update"] for n in budget.BATCHES]
    assert all(a < b for a, b in zip(updates, updates[1:]))
    assert updates[2] == pytest.approx(10 + 0.3 + 2)
    assert budget.peaks(replace(args, method="nft", batch=4), LARGE)["update"] == pytest.approx(10 + 0.4 + 2)
    assert budget.peaks(replace(args, method="dpo", batch=5), LARGE)["update"] == pytest.approx(10 + 0.3 + 2)
    assert budget.peaks(args, LARGE)["encode"] == pytest.approx(5)
    assert "encode takes 5.0 GB" in budget.verdict(args, LARGE, 4)


def test_work_and_hours_follow_the_recipe():
    args = budget.Args(steps=10, timesteps=5, group=24, groups=10, epochs=3, tflops=100)
    assert sum(budget.tflop(args, LARGE).values()) == 10 + 5 * 1 + 5 * 3
    assert sum(budget.tflop(replace(args, method="nft"), LARGE).values()) == 10 + 5 * 2 + 5 * 3
    assert sum(budget.tflop(replace(args, method="dpo", pairs=6), LARGE).values()) == 10 + 2.5 * 1 + 2.5 * 3
    assert budget.hours(args, LARGE) == pytest.approx(30 * 3 * 240 / 100 / 3600)
    assert budget.hours(replace(args, gpus=4), LARGE) == pytest.approx(budget.hours(args, LARGE) / 4)


def test_a_quantized_base_is_smaller_by_what_is_quantized():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Conv2d(3, 8, 3)).to(torch.bfloat16)
    rest = 2 * (32 + 3 * 8 * 9 + 8)
    assert count.linear_bytes(model, "none") == (2 * 64 * 32 + rest, 0)
    assert count.linear_bytes(model, "int8") == (64 * 32 + 4 * 32 + rest, 2 * 64 * 32)
    assert count.linear_bytes(model, "nf4") == (64 * 32 // 2 + 64 * 32 // 64 * 4 + rest, 2 * 64 * 32)


# ---------------------------------------------------------------- the scripts

def test_the_budget_is_a_text_table(monkeypatch, capsys):
    monkeypatch.setattr(budget, "count", lambda args: LARGE)
    budget.main(budget.Args(batch=16))
    said = capsys.readouterr().out
    assert "estimated" in said and "an assumption" in said and " 24 GB      16 / 2" in said
    budget.main(budget.Args(table=True))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 2 * 5 and len({line.count("|") for line in table}) == 1


def test_the_bench_measures_each_phase_next_to_its_estimate(monkeypatch, capsys):
    monkeypatch.setattr(bench, "count", lambda flags, dtype: counted("tiny/sd3", dtype))
    monkeypatch.setattr(bench, "decode_step", lambda pipe, n: None)  # 256 pictures take seconds
    bench.main(bench.Args(model="tiny/sd3", size=64, reward="tiny/pickscore", batch=8, rank=8, repeat=1, json=True))
    rows = {row["phase"]: row for row in json.loads(capsys.readouterr().out)["phases"]}
    assert list(rows) == ["update", "reference", "rollout", "decode", "reward"]
    for phase in ("update", "rollout"):
        assert rows[phase]["peak_gb"] == pytest.approx(rows[phase]["estimated_gb"], rel=0.05)
    update = rows["update"]
    assert update["pictures_per_s"] == pytest.approx(8 / update["seconds"]) and update["tflop_per_s"] > 0


def test_half_a_picture_costs_less():
    """--size 64x32 costs fewer FLOPs than 64, more than half of them where there is text."""
    whole, wide = counted("tiny/sd3", torch.float32), count.count(replace(FLAGS, size="64x32"))
    for part in ("step", "row", "update True", "decode"):
        assert 0.4 < wide["flops"][part] / whole["flops"][part] < 0.9, part
    assert "--size 64x32" in budget.report(replace(FLAGS, size="64x32"), wide)
