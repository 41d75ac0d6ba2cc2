"""A run that is killed (SIGKILL) at drawn moments and resumed is the run that nobody interrupted, in one process."""

import random
from functools import partial

import pytest

from passk_guard.callback.state import load_memory
from passk_guard.reporting import Journal
from passk_guard.reporting.journal import read_journal
from tests.helpers.killing import PLACES, UNGUARDED, Kill, attempt, draws, killed_and_resumed
from tests.helpers.resume_cases import STEPS, events, put_to_work, raw_lines, ready, run, same_steps, same_weights

FORKS = pytest.mark.filterwarnings("ignore:This process")  # of os.fork where threads are about


@pytest.fixture(autouse=True)
def imported(request):
    if request.node.get_closest_marker("resume"):
        ready()


@FORKS
@pytest.mark.resume
def test_killed_in_the_middle_of_a_journal_line(tmp_path):
    train = partial(run, "lm", "plain", "project", max_steps=5)
    (whole,) = attempt(train, tmp_path / "whole", 1)
    (cut,), begins = killed_and_resumed(
        train, tmp_path / "cut", 1, [lambda step: Kill(3, "in a line of the journal")], 5
    )
    assert begins == [0, 2]
    assert same_weights(whole, cut)
    assert cut["memory"] == whole["memory"]
    assert events(tmp_path / "cut") == events(tmp_path / "whole")
    assert [line["event"] for line in raw_lines(tmp_path / "cut")].count("start") == 2


@FORKS
@pytest.mark.resume
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("lm", mode) for mode in ("unguarded", "alert", "gated")),
        *(("grpo", mode) for mode in ("unguarded", "observe", "both", "batch_reweight")),
        *(pytest.param("lm", mode, marks=pytest.mark.nightly) for mode in ("observe", "project")),
        *(pytest.param("grpo", mode, marks=pytest.mark.nightly) for mode in ("reweight", "batch")),
    ],
)
def test_a_killed_run_is_the_uninterrupted_one(kind, mode, tmp_path):
    train = partial(run, kind, "plain", mode)
    (whole,) = attempt(train, tmp_path / "whole", 1)
    generator = random.Random(f"{kind}/{mode}")
    kills = draws(generator.random(), 2, STEPS, UNGUARDED if mode == "unguarded" else PLACES)
    # First between two refreshes, where the gate is open and stands in the checkpoint alone.
    kills.insert(0, lambda step: Kill(4, "step begins"))
    # And once wherever it happens to be.
    kills.insert(1, lambda step: generator.uniform(0.1, 0.9) * whole["computed"] * (1 - step / STEPS))
    (cut,), begins = killed_and_resumed(train, tmp_path / "cut", 1, kills, STEPS)
    assert len(set(begins)) > 1, "some attempt must have gone on from a checkpoint"
    assert same_weights(whole, cut)
    assert whole["rng"].equal(cut["rng"])
    assert cut["memory"] == whole["memory"]
    assert same_steps(whole, cut)
    put_to_work(mode, whole)
    if mode == "unguarded":
        return
    found = events(tmp_path / "whole")
    assert events(tmp_path / "cut") == found
    assert len(raw_lines(tmp_path / "cut")) > len(found)
    if mode == "alert":
        assert "state" in [event["event"] for event in found]


LIMITS = {
    "within the batch that TRL generated for several steps": {"steps_per_generation": 4, "save_steps": 3},
    "beyond the first epoch of TRL's sampler": {"prompts": 12, "save_steps": 4},
}


@FORKS
@pytest.mark.resume
@pytest.mark.parametrize("where", LIMITS)
def test_where_the_trainer_itself_does_not_resume_exactly(where, tmp_path):
    """The guard then goes on as it was: its state, its prompts, its first refresh; and it still changes nothing."""
    found = {}
    for mode in ("unguarded", "observe"):
        train = partial(run, "grpo", "plain", mode, guard={"refresh_steps": 1}, max_steps=6, **LIMITS[where])
        (whole,) = attempt(train, tmp_path / mode / "whole", 1)
        kill = Kill(LIMITS[where]["save_steps"], "step begins")
        (cut,), begins = killed_and_resumed(train, tmp_path / mode / "cut", 1, [lambda step, kill=kill: kill], 6)
        assert begins == [0, kill.step]
        found[mode] = whole, cut
    (whole, cut), (watched, watched_cut) = found["unguarded"], found["observe"]
    assert not same_weights(whole, cut), "TRL resumes this exactly now: the documents may promise it"
    assert same_weights(whole, watched)
    assert same_weights(cut, watched_cut)
    whole, cut = (events(tmp_path / "observe" / folder) for folder in ("whole", "cut"))
    first = [event for event in whole if event["step"] <= kill.step]
    assert cut[: len(first)] == first
    newest = [event for event in first if event["event"] == "refresh"][-1]
    assert (newest["step"], newest["refreshes"]) == (kill.step, 3), "pooled with refreshes from before the kill"
    steps = [[event["step"] for event in events if event["event"] == "refresh"] for events in (cut, whole)]
    assert steps[0] == steps[1], "of other weights, so the verdicts may differ"
    drawn = [list(probe[3]) for probe in watched["memory"]["history"]]
    assert [list(probe[3]) for probe in watched_cut["memory"]["history"]] == drawn


@FORKS
@pytest.mark.resume
def test_killed_while_the_guard_writes_into_the_checkpoint(tmp_path):
    """What the trainer has written is whole, the guard's memory is not there: it says so, and training goes on."""
    train = partial(run, "lm", "plain", "project", max_steps=4)
    assert attempt(train, tmp_path, 1, kill=Kill(4, "while the memory is written")) is None
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert load_memory(tmp_path / "checkpoint-4") is None
    (found,) = attempt(
        partial(run, "lm", "plain", "project", max_steps=7), tmp_path, 1, resume=tmp_path / "checkpoint-4"
    )
    said = (tmp_path / "said.rank0").read_text()
    assert "step 4: resumed without the guard's memory, starting afresh" in said
    assert "step 4: no protected direction from before" in said
    assert found["memory"]["step"] == 6


def written(folder, *events):
    journal = Journal(folder / "passk_guard.jsonl")
    for event, step, n in events:
        journal.write(event, step, n=n)


def told(folder):
    journal = read_journal(folder)
    return [(e["event"], e["step"], e["n"]) for e in journal.events], list(journal.restarts)


def test_a_start_takes_the_place_of_what_a_killed_run_left_behind(tmp_path):
    """Even where the resumed run never says anything of the same steps."""
    first = [("start", 0, 0), ("refresh", 0, 0), ("steps", 4, 0), ("refresh", 4, 0), ("state", 4, 0), ("steps", 5, 0)]
    written(tmp_path, *first, ("refresh", 6, 0), ("start", 4, 1), ("refresh", 10, 1))
    assert told(tmp_path) == ([("refresh", 0, 0), ("steps", 4, 0), ("refresh", 10, 1)], [4])


def test_a_run_killed_at_once_and_resumed_from_an_earlier_checkpoint(tmp_path):
    first = [("start", 0, 0), ("refresh", 0, 0), ("refresh", 2, 0), ("refresh", 4, 0)]
    written(tmp_path, *first, ("start", 4, 1), ("start", 2, 2), ("steps", 3, 2))
    assert told(tmp_path) == ([("refresh", 0, 0), ("steps", 3, 2)], [4, 2])
