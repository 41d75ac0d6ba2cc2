"""The guard before a step, on an engine of two numbers."""

from pathlib import Path

import pytest
import torch

from passk_guard.callback.state import load_memory
from passk_guard.mitigation import projection_coefficient
from passk_guard.mitigation.engines.protocol import local_inner_products
from passk_guard.mitigation.gradient_guard import StepGuard
from passk_guard.utils.ranks import Ranks


class Engine:
    """Holds one gradient, multiplied by a loss scale as fp16 training does."""

    name = "toy"

    def __init__(self, gradient, scale=1.0):
        self.parts = [torch.tensor(gradient) * scale]
        self.scale = scale

    def install(self, before_step):
        self.before_step = before_step

    def remove(self):
        self.before_step = None

    def gradient(self):
        return self.parts

    def loss_scale(self):
        return self.scale

    def inner_products(self, pairs):
        return [sum(float(a.double() @ b.double()) for a, b in zip(x, y, strict=True)) for x, y in pairs]

    def add_(self, direction, coefficient):
        for part, step in zip(self.parts, direction, strict=True):
            part.add_(step, alpha=coefficient)

    def probe_gradient(self, batches, loss, dtype=None):
        return [torch.tensor(batch, dtype=dtype) for batch in batches]


def guard(engine, reported=None, **settings):
    options = {"gamma": 0.2, "average": 0.0, "dtype": torch.float32} | settings
    made = StepGuard(
        engine, Ranks(torch.device("cpu")), **options, on_failure=([] if reported is None else reported).append
    )
    made.install()
    made.open = True
    return made


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_loss_scale_changes_nothing_but_the_scale(scale):
    engine = Engine([1.0, -2.0], scale)
    made = guard(engine)
    made.protected = [torch.tensor([0.0, 3.0])]
    engine.before_step()
    coefficient = projection_coefficient(-6.0, 5.0, 9.0, 0.2)
    assert torch.allclose(engine.parts[0] / scale, torch.tensor([1.0, -2.0 + 3.0 * coefficient]))
    metrics = made.step_metrics()
    assert metrics["coefficient"] == pytest.approx(coefficient)
    assert metrics["grad_norm_before"] == pytest.approx(5**0.5)
    assert metrics["grad_norm_after"] == pytest.approx(float(engine.parts[0].norm()) / scale)
    assert metrics["train_cosine"] == pytest.approx(-6 / (3 * 5**0.5))
    assert made.step_metrics() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_bit_for_bit_those_of_whole_vectors_in_float64(dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(300, 1000), (), (7,), (0,), (513, 3)]
    direction = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    engine = Engine(0.0)
    engine.inner_products = lambda pairs: local_inner_products(pairs, torch.device("cpu")).tolist()
    engine.probe_gradient = lambda *_: direction
    made = guard(engine)
    made.harvest(None, [])
    changed = 0
    for number in range(6):
        noise = [torch.randn(shape, generator=generator) for shape in shapes]
        gradient = [x + (number - 2) * 0.2 * y.float() for x, y in zip(noise, direction, strict=True)]
        engine.parts = [x.clone() for x in gradient]
        engine.before_step()
        g, p = (torch.cat([x.flatten() for x in parts]).double() for parts in (gradient, direction))
        coefficient = projection_coefficient(float(g @ p), float(g @ g), float(p @ p), 0.2)
        changed += coefficient > 0
        for found, before, part in zip(engine.parts, gradient, direction, strict=True):
            assert torch.equal(found, before.add(part, alpha=coefficient) if coefficient else before)
    assert 0 < changed < 6


def test_the_norm_of_an_average_is_that_of_the_average():
    engine = Engine([1.0, -2.0])
    made = guard(engine, average=0.5)
    for direction in ([4.0, 0.0], [0.0, 8.0]):
        made.harvest(None, [direction])
    engine.before_step()
    assert made.step_metrics()["train_cosine"] == pytest.approx(-6 / (20 * 5) ** 0.5)


def test_closed_or_empty_it_does_nothing():
    engine = Engine([1.0, -2.0])
    made = guard(engine)
    engine.before_step()
    made.protected, made.open = [torch.tensor([0.0, 3.0])], False
    engine.before_step()
    assert engine.parts[0].tolist() == [1.0, -2.0]
    assert made.step_metrics() == {}


def test_the_average_over_refreshes():
    made = guard(Engine([1.0, 1.0]), average=0.75)
    made.harvest(None, [[4.0, 0.0]])
    assert made.protected[0].tolist() == [4.0, 0.0]
    made.harvest(None, [[0.0, 8.0]])
    assert made.protected[0].tolist() == [3.0, 2.0]


def test_half_precision_keeps_the_direction_in_half_the_memory():
    made = guard(Engine([1.0, 1.0]), dtype=torch.bfloat16)
    made.harvest(None, [[4.0, 0.5]])
    assert made.protected[0].dtype == torch.bfloat16


def test_a_gradient_that_is_not_finite_is_reported_once():
    engine, reported = Engine([1.0, float("inf")]), []
    made = guard(engine, reported)
    made.protected = [torch.tensor([0.0, 3.0])]
    engine.before_step()
    engine.before_step()
    assert len(reported) == 1
    assert engine.parts[0].tolist() == [1.0, float("inf")]


def test_a_checkpoint_holds_it(tmp_path):
    made = guard(Engine([1.0, 1.0]))
    made.harvest(None, [[4.0, 0.5]])
    made.save(tmp_path)
    again = guard(Engine([1.0, 1.0]))
    again.open = False
    assert again.load(tmp_path) is None
    assert again.open
    assert again.protected[0].tolist() == [4.0, 0.5]
    other = Engine([1.0, 1.0])
    other.name = "zero2"
    assert "this run has 1 of zero2" in guard(other).load(tmp_path)
    content = torch.load(tmp_path / "passk_guard_rank0.pt", weights_only=True)
    torch.save(content | {"ranks": 4}, tmp_path / "passk_guard_rank0.pt")
    assert "saved on 4 ranks of toy" in again.load(tmp_path)
    for wrong in ({"open": 1}, {"protected": [torch.ones(2, dtype=torch.int64)]}, {"on_cpu": []}, {"norm_sq": -1.0}):
        torch.save(content | wrong, tmp_path / "passk_guard_rank0.pt")
        assert "cannot be read" in guard(Engine([1.0, 1.0])).load(tmp_path)
    assert "no protected direction" in guard(Engine([1.0])).load(tmp_path / "elsewhere")
    assert not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_of_an_earlier_version_is_taken_up():
    engine = Engine([1.0, 1.0])
    engine.name = "plain"
    made = guard(engine)
    assert made.load(Path(__file__).parents[1] / "data" / "earlier") is None
    assert len(made.protected) == 27
    assert not made.open


def test_an_engine_that_breaks_does_not_break_training():
    engine, reported = Engine([1.0, -2.0]), []
    made = guard(engine, reported)
    made.protected = [torch.tensor([0.0, 3.0])]
    engine.inner_products = None
    engine.before_step()
    engine.before_step()
    assert not made.open
    assert len(reported) == 1
    assert "TypeError" in reported[0]
    assert engine.parts[0].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_reported_and_not_raised(damage, tmp_path):
    made = guard(Engine([1.0, 1.0]))
    for name in ("passk_guard_rank0.pt", "passk_guard.pt"):
        (tmp_path / name).write_bytes(damage)
    assert "cannot be read" in made.load(tmp_path)
    assert made.protected is None
    assert load_memory(tmp_path) is None
