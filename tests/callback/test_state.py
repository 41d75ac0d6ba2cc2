"""What the guard keeps in a checkpoint: of this version and of earlier ones."""

from pathlib import Path

import pytest
import torch

from passk_guard.callback.state import FILE_NAME, load_memory
from passk_guard.estimation.evidence import RunEvidence
from passk_guard.estimation.verdict import DecisionState
from passk_guard.mitigation import FloorState

EARLIER = Path(__file__).parents[1] / "data" / "earlier"


def test_a_checkpoint_of_an_earlier_version_is_read_as_it_was_written():
    written, memory = torch.load(EARLIER / FILE_NAME, weights_only=True), load_memory(EARLIER)
    assert memory.decision == DecisionState("conflict", "clear", 1)
    assert (memory.failures, memory.step, memory.taken) == (0, 6, (2,))
    assert memory.floor == FloorState(0.2311139950309693, 50.7040250849819)
    assert memory.evidence == RunEvidence((), 3), "of the scores of that version, their number is spent"
    [probe], [saved] = memory.history, written["history"]
    assert not probe.reused
    assert list(probe.prompt_keys) == saved["prompt_keys"]
    for name in ("gram", "num_samples", "num_correct"):
        assert torch.equal(getattr(probe, name), saved[name])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"voids": 3}, {"failures": 3}),
        ({"floor": None}, {"floor": FloorState()}),
        ({"evidence": None}, {"evidence": RunEvidence()}),
        ({"taken": None}, {"taken": (0,)}),
        ({}, {"pass_tokens": 0}),
    ],
)
def test_what_the_first_versions_did_not_write(tmp_path, changed, found):
    content = torch.load(EARLIER / FILE_NAME, weights_only=True) | changed
    torch.save({name: value for name, value in content.items() if value is not None}, tmp_path / FILE_NAME)
    memory = load_memory(tmp_path)
    assert {name: getattr(memory, name) for name in found} == found


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"decision": {"verdict": "guilty", "candidate": None, "streak": 0}},
        {"voids": "3"},
        {"voids": -1},
        {"voids": True},
        {"step": 1.0},
        {"floor": {"floor": float("nan"), "precision": 1.0}},
        {"evidence": {"checks": ({"value": 1.0, "variance": 0.0, "count": 3.0},), "before": 0}},
        {"history": []},
        {"history": [{"gram": [[1.0]], "num_samples": 8, "num_correct": 4, "prompt_keys": ["a"]}]},
        {"taken": [1, 2]},
    ],
)
def test_what_was_never_written_is_no_memory(tmp_path, changed):
    torch.save(torch.load(EARLIER / FILE_NAME, weights_only=True) | changed, tmp_path / FILE_NAME)
    assert load_memory(tmp_path) is None
