"""The order of modules that ZeRO-3 recorded in a probe is forgotten, and nothing else is asked of any engine."""

from types import SimpleNamespace

import pytest
from torch import nn

from passk_guard.mitigation.engines import untraced


class Coordinator:
    def __init__(self, *, order=True):
        self.order = order

    def is_invalid_trace(self):
        return not self.order

    def _invalidate_trace(self):
        assert self.order, "DeepSpeed raises where there is none"
        self.order = False


def engine(coordinator):
    sharder = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    return SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=sharder))


def test_what_the_body_recorded_is_forgotten_also_when_it_raises():
    coordinator = Coordinator(order=False)

    def probe():
        with untraced(engine(coordinator)):
            coordinator.order = True
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe()
    assert not coordinator.order


@pytest.mark.parametrize(
    "wrapped", [engine(Coordinator(order=False)), nn.Linear(1, 1), SimpleNamespace(optimizer=None)]
)
def test_without_such_an_order_nothing_is_done(wrapped):
    with untraced(wrapped):
        pass
