"""The guard's files in a checkpoint: whatever lies there, it is taken up whole and sound, or not at all."""

import dataclasses
import functools
import io
import pickle
import zipfile

import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.callback.state import FILE_NAME, Memory, load_memory, save_memory
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide
from passk_guard.mitigation import FloorState
from tests.fuzz.strategies import JSON_VALUE, NUMBER, SCALAR, damaged, replaced, scratch
from tests.helpers.populations import draw, population
from tests.mitigation.test_gradient_guard import Engine, guard

TENSOR = st.one_of(
    st.sampled_from([torch.zeros(0), torch.ones(3), torch.tensor(float("nan")), torch.eye(6), torch.zeros(3, 3)]),
    st.sampled_from([torch.eye(6) * float("inf"), torch.full((3,), 8), torch.ones(2, dtype=torch.complex64)]),
)
LEAF = st.one_of(SCALAR, NUMBER, JSON_VALUE, TENSOR)
RANK_FILE = "passk_guard_rank0.pt"


class Ran(Exception):
    """Code of a file was run."""


def fail(*_):
    raise Ran


class Evil:
    def __reduce__(self):
        return fail, ()


def memory():
    probe = draw(population(-0.5), 3, 8, torch.Generator().manual_seed(0))
    probe = dataclasses.replace(probe, prompt_keys=("a", "b", "c"))
    reused = dataclasses.replace(probe, misses=torch.ones(3, 8, dtype=torch.float64))
    return Memory(
        DecisionState("conflict", "clear", 1),
        (probe, reused),
        2,
        15,
        FloorState(0.4, 3.0),
        RunEvidence((Check(1.0, 2.0, 9.0), Check(-0.5, 1.0, 3.0)), 4),
        (3, 5),
    )


@functools.cache
def files():
    """The two files of a checkpoint, as bytes."""
    with scratch() as folder:
        save_memory(memory(), folder)
        steps = guard(Engine([1.0, 1.0]))
        steps.harvest(None, [[4.0, 0.5]])
        steps.save(folder)
        return {name: (folder / name).read_bytes() for name in (FILE_NAME, RANK_FILE)}


def saved(folder):
    """Put them there."""
    for name, content in files().items():
        (folder / name).write_bytes(content)


def resumed(folder):
    """Take both files up; what is taken must serve the next refresh and the next step."""
    found = load_memory(folder)
    if found is not None:
        assert found.step >= -1
        assert found.failures >= 0
        assert 0 <= found.evidence.p_value <= 1
        assert found.floor.floor >= 0
        probe = draw(population(-0.5), 4, 8, torch.Generator().manual_seed(1))
        grown = found.with_refresh(probe, 3, 20)
        estimate = estimate_pooled(grown.pooled(3), 4)
        decide(found.decision, found.evidence, estimate, Check(1.0, 1.0, 9.0), DecisionRule(2, 3, 0.05))
    told = []
    engine = Engine([1.0, -2.0])
    steps = guard(engine, told)
    reason = steps.load(folder)
    assert reason is None or reason
    assert reason is None or steps.protected is None
    engine.before_step()
    assert engine.parts[0].isfinite().all()
    metrics = steps.step_metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    return found, reason


def test_what_was_saved_is_taken_up():
    with scratch() as folder:
        saved(folder)
        found, reason = resumed(folder)
        assert reason is None
        whole = memory()
        assert (found.decision, found.failures, found.step, found.floor, found.evidence) == (
            (whole.decision, whole.failures, whole.step, whole.floor, whole.evidence)
        )
        assert [p.reused for p in found.history] == [False, True]
        assert found.taken == (3, 5)


def test_a_checkpoint_of_an_earlier_version_keeps_what_its_evidence_has_spent():
    """It kept scores, which are of no use now; a CONFLICT that stands goes on, and so does the count of checks."""
    with scratch() as folder:
        saved(folder)
        content = torch.load(folder / FILE_NAME, weights_only=True)
        content["evidence"] = {"scores": (1.0, -0.4, 3.0), "before": 4}
        torch.save(content, folder / FILE_NAME)
        found, _ = resumed(folder)
        assert found.evidence == RunEvidence((), 7)
        assert found.decision == memory().decision


@given(st.data())
def test_bytes(data):
    with scratch() as folder:
        for name, content in files().items():
            (folder / name).write_bytes(data.draw(st.one_of(damaged(content), st.binary(max_size=60))))
        resumed(folder)


@given(st.data())
def test_values_inside_a_sound_file(data):
    with scratch() as folder:
        saved(folder)
        for name in (FILE_NAME, RANK_FILE):
            content = torch.load(folder / name, weights_only=True)
            changed = data.draw(st.one_of(replaced(content, LEAF), LEAF))
            try:
                torch.save(changed, folder / name)
            except Exception:  # what cannot be saved cannot lie there
                return
        resumed(folder)


def test_a_pickle_that_runs_code_runs_none(tmp_path):
    plain = pickle.dumps({"format": 1, "decision": Evil()})
    zipped = io.BytesIO()
    torch.save({"format": 1, "decision": Evil()}, zipped)
    bare = io.BytesIO()
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
    legacy = io.BytesIO()
    torch.save({"format": 1, "decision": Evil()}, legacy, _use_new_zipfile_serialization=False)
    for content in (plain, zipped.getvalue(), bare.getvalue(), legacy.getvalue()):
        for name in (FILE_NAME, RANK_FILE):
            (tmp_path / name).write_bytes(content)
        found, reason = resumed(tmp_path)
        assert found is None
        assert reason


@given(st.integers(0, 3), st.sampled_from([torch.ones(3), torch.ones(1, 2), torch.tensor([float("nan"), 1.0])]))
def test_a_direction_of_another_model(count, part):
    with scratch() as folder:
        saved(folder)
        content = torch.load(folder / RANK_FILE, weights_only=True)
        content |= {"protected": [part] * count, "on_cpu": [True] * count}
        torch.save(content, folder / RANK_FILE)
        resumed(folder)
