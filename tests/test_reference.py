"""Tests of normguard.reference(): inside it a model is its frozen base, whatever it is wrapped in."""
import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model

from flow.lora import add_lora
from normguard import norm_hinge, reference


@pytest.fixture()
def lora_model():
    """tiny/sd3's transformer with a LoRA that changes its output, and an input."""
    model = SD3Transformer2DModel.from_pretrained("tiny/sd3", subfolder="transformer", dtype=torch.float32)
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(2, 16, 8, 8, generator=g),
        timestep=torch.tensor([900.0, 300.0]),
        return_dict=False,
        encoder_hidden_states=torch.randn(2, 16, 96, generator=g),
        pooled_projections=torch.randn(2, 80, generator=g),
    )
    base = model(**inputs)[0]
    params = add_lora(model, rank=4, seed=0)
    for p in params:
        torch.nn.init.normal_(p, std=0.1, generator=g)
    return model, inputs, base.detach(), params


def test_reference_is_the_base_and_puts_everything_back(lora_model):
    model, inputs, base, params = lora_model
    model.train()
    model.transformer_blocks[0].eval()  # a mode that differs inside the model must come back too
    tuned = model(**inputs)[0]
    assert not torch.equal(tuned, base)

    def state():
        modes = [(m, m.training) for m in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], model.active_adapters()
    before = state()
    with pytest.raises(RuntimeError, match="inside"):
        with reference(model):
            with reference(model):
                assert torch.equal(model(**inputs)[0], base)
            out = model(**inputs)[0]  # the inner exit does not switch the adapter on
            assert torch.equal(out, base) and not out.requires_grad and not model.training
            raise RuntimeError("inside")
    assert torch.equal(model(**inputs)[0], tuned) and torch.is_grad_enabled()
    assert before == state()
    model(**inputs)[0].sum().backward()
    assert all(p.grad is not None for p in params)


def test_the_reference_records_no_gradient_of_its_input():
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.ones(2, 3, requires_grad=True)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    with reference(model):
        v_ref = model(x)
    assert not v_ref.requires_grad and model(x).requires_grad


def test_reference_keeps_the_second_adapter_active(lora_model):
    model, inputs, base, _ = lora_model
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False), adapter_name="old")
    model.set_adapter("old")
    tuned = model(**inputs)[0]
    with reference(model):
        assert torch.equal(model(**inputs)[0], base)
    assert model.active_adapters() == ["old"] and torch.equal(model(**inputs)[0], tuned)


def test_reference_works_for_peft_models():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    x = torch.randn(3, 4)
    base = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5))
    with reference(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base) and model.training


def test_reference_refuses_a_model_without_adapter():
    with pytest.raises(ValueError, match="no adapter"):
        with reference(torch.nn.Linear(2, 2)):
            pass


@pytest.fixture(params=["bare", "ddp", "compiled", "accelerate", "accelerate-bf16"])
def wrap(request, tmp_path):
    """A function that wraps a model as other people's trainers do."""
    wrappers = {
        "bare": lambda model: model,
        "ddp": torch.nn.parallel.DistributedDataParallel,
        "compiled": functools.partial(torch.compile, backend="eager"),
        "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
        "accelerate-bf16": lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
    }
    if "ddp" in request.param:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield wrappers[request.param]
    if "ddp" in request.param:
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_sees_through_wrappers(wrap, dtype):
    """Between a forward pass and its backward pass, through DDP, torch.compile or accelerate, on a base in fp32 or
    bf16: inside is the base, the gradient does not change, and an exception inside changes nothing."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)
    base = wrap(copy.deepcopy(net).eval())(x).detach()
    lora = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model, params = wrap(lora), [p for p in lora.parameters() if p.requires_grad]

    def step(inside):
        v = model(x)
        v_ref = base
        if inside:
            with pytest.raises(RuntimeError, match="inside"):
                with reference(model):
                    v_ref = model(x)
                    raise RuntimeError("inside")
        assert torch.equal(v_ref, base) and not v_ref.requires_grad
        (v.float().mean() + norm_hinge(v, v_ref, margin=-1).mean()).backward()
        gradients = [p.grad.clone() for p in params]
        lora.zero_grad()
        return v, *gradients

    for _ in range(2):  # DDP and dynamo treat a second step differently
        for ours, theirs in zip(step(inside=True), step(inside=False), strict=True):
            assert torch.equal(ours, theirs)
    assert model.training and all(m.training for m in lora.modules()) and all(p.requires_grad for p in params)
    with reference(Accelerator(cpu=True).unwrap_model(model)):  # inside its wrapper, the model is the base as well
        assert torch.equal(model(x), base)


def test_reference_turns_off_whole_trained_copies_too():
    """peft's modules_to_save: a layer that is trained whole beside its frozen original."""
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    base = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    torch.nn.init.normal_(model.base_model.model[1].modules_to_save["default"].weight)
    with reference(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)


def two_adapters() -> tuple[torch.nn.Module, torch.Tensor]:
    """A PeftModel with a frozen style LoRA and a trained one, both active, and the base's output with the style."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), "style")
    styled = model(x).detach()
    model.add_adapter("default", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["style", "default"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)
    return model, x, styled


def test_reference_keeps_what_was_there_before_rl():
    model, x, styled = two_adapters()
    tuned = model(x)
    with reference(model, keep=("style",)):
        assert torch.equal(model(x), styled)
    assert torch.equal(model(x), tuned) and not torch.equal(tuned, styled)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    with pytest.raises(ValueError, match=r"style \(frozen\) and default \(trained\).*keep=\('style',\)"):
        with reference(model):
            pass
    for keep, words in (("styl", "there is no adapter styl"), (("default",), "default trains")):
        with pytest.raises(ValueError, match=words), reference(model, keep=keep):
            pass
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    model.base_model.set_adapter(["style", "other", "default"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)
    with pytest.raises(ValueError, match="other, style"), reference(model, keep=("style",)):
        pass
    model.base_model.set_adapter("default")  # alone, it is switched off as ever
    with reference(model):
        assert not torch.equal(model(x), styled)


@pytest.mark.parametrize("moved", ["a LoRA's bias", "a base weight"])
def test_reference_warns_once_of_a_base_that_trains(moved, recwarn):
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], bias="none" if "base" in moved else "lora_only"))
    if "base" in moved:
        model.base_model.model[1].weight.requires_grad_()
    for _ in range(2):
        with reference(model):
            model(x)
    said = [str(w.message) for w in recwarn if "not the frozen base" in str(w.message)]
    name = "1.weight" if "base" in moved else "0.base_layer.bias"
    assert len(said) == 1 and name in said[0]


def test_reference_does_not_warn_of_a_frozen_base(lora_model, recwarn):
    with reference(lora_model[0]):
        pass
    assert not [w for w in recwarn if "reference" in str(w.message)]


def test_reference_refuses_a_merged_adapter(lora_model):
    model, inputs, base, _ = lora_model
    tuned = model(**inputs)[0]
    model.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        with reference(model):
            pass
    torch.testing.assert_close(model(**inputs)[0], tuned)  # left as it was
    model.unfuse_lora()
    with reference(model):
        torch.testing.assert_close(model(**inputs)[0], base)
