"""A mitigation that does nothing has the interface of one that does."""

from pathlib import Path

import pytest

from passk_guard import GuardConfig
from passk_guard.callback.mitigator import Mitigator, NoMitigation
from passk_guard.callback.state import Memory


def off():
    return Mitigator(None, GuardConfig(mitigation="off"), None, pytest.fail)


@pytest.mark.parametrize("make", [NoMitigation, off])
def test_observing_does_nothing(make, tmp_path):
    mitigation, memory = make(), Memory(step=3)
    mitigation.resume(Path("nowhere"), memory)
    mitigation.apply(memory)
    mitigation.leave_unguarded()
    mitigation.save(tmp_path)
    assert mitigation.react(None, None, memory) is memory
    assert (mitigation.refresh_metrics(memory), mitigation.step_metrics()) == ({}, {})
    assert (mitigation.action(memory), mitigation.remark) == ("observe", None)
    assert (mitigation.steps, mitigation.floor) == (None, None)
    assert not list(tmp_path.iterdir())
    mitigation.remove()
    assert mitigation.bound == isinstance(mitigation, Mitigator)
