"""The probe gradient and the edit of the native engine by itself: values, and what they leave alone."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from passk_guard.mitigation.engines.native import NativeEngine
from passk_guard.mitigation.engines.protocol import local_inner_products
from passk_guard.utils.errors import GuardError
from tests.mitigation.engines import oracle

MODELS = ["llama", "qwen2", "tied", "lora", "unused"]


def holder(model):
    """What the engine needs of a trainer."""
    return SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, model_wrapped=model)


def built(name="llama", dtype="float64"):
    recipe = oracle.Recipe(model=name, dtype=dtype)
    model = oracle.build_model(recipe)
    return recipe, model, NativeEngine(holder(model), model)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_gradient_of_the_loss(name, checkpointing):
    recipe, model, engine = built(name)
    expected = oracle.full_probe_gradient(model, recipe)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with torch.no_grad():  # whatever mode the caller is in
        found = engine.probe_gradient(oracle.probe_batches(recipe, 0), oracle.probe_loss, torch.float64)
    assert len(found) == len(expected)
    for gradient, (parameter, value) in zip(found, expected.items(), strict=True):
        assert (gradient - value).norm() <= 1e-12 * max(1e-3, value.norm()), parameter


def test_its_dtype_is_float32_unless_asked():
    recipe, model, engine = built(dtype="float32")
    batches = oracle.probe_batches(recipe, 0)
    wide = engine.probe_gradient(batches, oracle.probe_loss)
    narrow = engine.probe_gradient(batches, oracle.probe_loss, torch.bfloat16)
    expected = oracle.full_probe_gradient(model, recipe)
    for w, n, value in zip(wide, narrow, expected.values(), strict=True):
        assert (w.dtype, n.dtype, w.requires_grad) == (torch.float32, torch.bfloat16, False)
        assert (w - value).norm() <= 1e-6 * value.norm()
        assert torch.equal(n, w.bfloat16())


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_parameters_and_hooks_are_as_before(fails):
    recipe, model, engine = built("tied")
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
        parameter.register_post_accumulate_grad_hook(lambda _: pytest.fail("an optimizer ran in the probe's backward"))
    before = [(p, p.grad, p.grad is not None and p.grad._version, p._version) for p in parameters]

    def loss(module, batch):
        value = oracle.probe_loss(module, batch)
        assert module is model
        assert module.lm_head.weight is module.get_input_embeddings().weight, "tied parameters stay one"
        if fails:
            raise ValueError("broken")
        return value

    if fails:
        with pytest.raises(ValueError, match="broken"):
            engine.probe_gradient(oracle.probe_batches(recipe, 0), loss)
    else:
        engine.probe_gradient(oracle.probe_batches(recipe, 0), loss)
    after = [(p, p.grad, p.grad is not None and p.grad._version, p._version) for p in model.parameters()]
    for one, other in zip(before, after, strict=True):
        assert one[0] is other[0]
        assert one[1] is other[1]
        assert one[2:] == other[2:]


def test_hooks_that_change_a_gradient_act_on_the_probe_too():
    """Some freeze rows of the embedding that way; the edit must not move them."""
    recipe, model, engine = built()
    embedding = model.get_input_embeddings().weight
    embedding.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) % 2)[:, None])
    probe = engine.probe_gradient(oracle.probe_batches(recipe, 0), oracle.probe_loss, torch.float64)
    found = next(part for part, p in zip(probe, engine._parameters, strict=True) if p is embedding)
    assert not found[::2].any()
    assert found[1::2].any()


def test_frozen_parameters_are_no_part():
    recipe, model, _ = built()
    model.get_input_embeddings().weight.requires_grad_(False)
    engine = NativeEngine(holder(model), model)
    probe = engine.probe_gradient(oracle.probe_batches(recipe, 0), oracle.probe_loss)
    assert len(probe) == len(engine.gradient()) == len(list(model.parameters())) - 1
    assert model.get_input_embeddings().weight.grad is None


def test_the_edit_is_an_axpy_in_place():
    _, model, engine = built()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    direction = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    before = [p.grad.clone() for p in model.parameters()]
    same = [p.grad for p in model.parameters()]
    assert all(part.data_ptr() == grad.data_ptr() for part, grad in zip(engine.gradient(), same, strict=True))
    engine.add_(direction, 0.25)
    for parameter, grad, old, part in zip(model.parameters(), same, before, direction, strict=True):
        assert parameter.grad is grad
        assert torch.allclose(grad, old + 0.25 * part.double(), rtol=1e-6)


def test_a_coefficient_of_zero_touches_nothing():
    _, model, engine = built()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -0.0)
    versions = [p.grad._version for p in model.parameters()]
    engine.add_([torch.full_like(p, torch.nan) for p in model.parameters()], 0.0)
    assert versions == [p.grad._version for p in model.parameters()]
    assert all(torch.signbit(p.grad).all() for p in model.parameters())


def test_a_missing_gradient_counts_as_zero_and_is_created_where_it_must():
    _, model, engine = built("unused")
    parameters = list(model.parameters())
    direction = [torch.zeros_like(p) for p in parameters]
    direction[1] += 1.0
    assert not any(part.any() for part in engine.gradient())
    engine.add_(direction, 2.0)
    assert torch.equal(parameters[1].grad, 2.0 * direction[1])
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 1), "weight decay acts on any gradient"


def test_before_step_comes_with_the_last_micro_batch_only():
    _, model, engine = built()
    accelerator, calls = engine._accelerator, []
    engine.install(lambda: calls.append([p.grad is not None for p in model.parameters()]))
    with pytest.raises(GuardError, match="remove"):
        engine.install(lambda: None)
    for last in (False, True, False, True):
        accelerator.gradient_state._set_sync_gradients(last)
        accelerator.backward(oracle.training_loss(model, {"input_ids": oracle.tokens(0)}))
    assert [all(call) for call in calls] == [True, True], "the gradient is there when it is called"
    engine.remove()
    accelerator.backward(oracle.training_loss(model, {"input_ids": oracle.tokens(0)}))
    assert len(calls) == 2
    engine.install(lambda: calls.append(None))
    accelerator.backward(oracle.training_loss(model, {"input_ids": oracle.tokens(0)}))
    assert len(calls) == 3
    engine.remove()


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_inner_products_are_float64(scale, monkeypatch):
    monkeypatch.setattr("passk_guard.mitigation.engines.protocol._CPU_SLICE", 100)
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 40), (), (7,), (0,), (3, 5)]
    a = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    b = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    a[0] = a[0].T.contiguous().T
    pairs = [(a, b), (a[1:3], a[1:3]), (a, a), ([], []), (b, a)]
    found = local_inner_products(pairs, torch.device("cpu"))
    x, y, some = oracle.flat(a), oracle.flat(b), oracle.flat(a[1:3])
    assert found.dtype == torch.float64
    expected = [float(x @ y), float(some @ some), float(x @ x), 0.0, float(x @ y)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="equal shapes"):
        local_inner_products([(a[:1], b[1:2])], torch.device("cpu"))
    with pytest.raises(ValueError, match="2 and 1 of them"):
        local_inner_products([(a[:2], b[:1])], torch.device("cpu"))
