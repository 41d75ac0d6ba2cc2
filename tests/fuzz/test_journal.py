"""The journal as anything may have left it: it reads, and draws, or says which line is to blame."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.cli import main
from passk_guard.reporting import Journal
from passk_guard.reporting.journal import JOURNAL_NAME, read_journal
from passk_guard.reporting.run_report import report
from passk_guard.utils.errors import GuardError
from tests.fuzz.strategies import ANY_TEXT, JSON_VALUE, NUMBER, SCALAR, as_json, damaged, scratch
from tests.helpers.hostile import HOSTILE
from tests.helpers.journals import write_run

NAMES = st.one_of(
    st.sampled_from(
        ["status", "verdict", "reason", "confidence", "threshold", "held_out", "remark", "streak", "alert"]
    ),
    st.sampled_from(["cosine", "cosine_ci_low", "cosine_ci_high", "pass_at_1", "pass_at_1_se", "pass_at_8", "k_star"]),
    st.sampled_from(["pass_at_8_se", "pass_at_999999", "frac_negative_pairs", "agreement", "to", "from", "message"]),
    st.sampled_from(["settings", "train_cosine", "coefficient", "mitigated", "mitigation_seconds", "probe_seconds"]),
    st.sampled_from(["k", "prompts", "informative", "refreshes", "floor"]),
)
EVENTS = st.builds(
    lambda event, step, fields: fields | {"event": event, "step": step},
    st.one_of(st.sampled_from(["start", "refresh", "failed_refresh", "failed_refresh", "state", "steps"]), ANY_TEXT),
    st.one_of(st.integers(0, 60), st.integers(0, 60), NUMBER),
    st.dictionaries(NAMES, st.one_of(NUMBER, SCALAR, JSON_VALUE, st.just(HOSTILE)), max_size=6),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"), guarded=True, settings={"k": 8, "failed_refresh_alert": 3})
    return (folder / JOURNAL_NAME).read_bytes()


def drawn(content, other=None):
    """The page of a journal, or None where it is refused; the command comes to the same."""
    with scratch() as folder:
        (folder / JOURNAL_NAME).write_bytes(content)
        given_runs = [folder]
        if other is not None:
            (folder / "b").mkdir()
            (folder / "b" / JOURNAL_NAME).write_bytes(other)
            given_runs.append(folder / "b")
        try:
            page = report(*given_runs).save(folder / "page.html").read_text()
        except GuardError:
            page = None
        assert main(["report", *map(str, given_runs)]) == int(page is None)
    if page is not None:
        assert not re.search(r'(?:x|y|x1|y1|width|height|cx|cy|d)="[^"]*(?:nan|inf)', page)
    return page


@given(st.lists(EVENTS, min_size=1, max_size=6))
@example([{"event": "refresh", "step": 10**400, "cosine": 0.1}])
@example([{"event": "refresh", "step": 0, "cosine": 1.7e308}, {"event": "refresh", "step": 5, "cosine": -1.7e308}])
@example([{"event": "steps", "step": s, "floor": v} for s, v in ((0, -1.7e308), (1, 1.7e308))])
@example([{"event": "steps", "step": s, "coefficient": v} for s, v in ((0, 0.0), (1, 5e-324))])
@example([{"event": "refresh", "step": s, "pass_at_1": v, "pass_at_1_se": v} for s, v in ((0, 1.7e308), (1, -1e308))])
@example(
    [
        {"event": "start", "step": 0, "settings": {"threshold": 1e300, "failed_refresh_alert": "x"}},
        {"event": "failed_refresh", "step": 0},
    ]
)
@example([{"event": "state", "step": 3, "to": {}, "message": []}])
def test_whole_lines_of_anything(events):
    drawn("".join(as_json(event) + "\n" for event in events).encode())


@given(st.data())
def test_a_good_journal_damaged(good, data):
    drawn(data.draw(damaged(good)))


@given(st.binary(max_size=60))
@example(b'{"event": "refresh", "step": 0}\n' + b"[" * 100_000 + b"\n")
@example(b'{"event": "refresh", "step": 0, "reason": ' + b"[" * 900 + b"]" * 900 + b"}\n")
@example(b'{"event": "start", "step": 0, "settings": {"k": ' + b"[" * 900 + b"]" * 900 + b"}}\n{\n")
def test_bytes(content):
    drawn(content)
    drawn(b'{"event": "refresh", "step": 0}\n' + content)


@given(st.lists(EVENTS, min_size=1, max_size=3), st.data())
def test_two_runs(good, events, data):
    drawn("".join(as_json(event) + "\n" for event in events).encode(), data.draw(damaged(good)))


@given(st.binary(max_size=40), st.lists(EVENTS, min_size=1, max_size=4))
def test_what_is_written_after_a_torn_line_reads_back(left, events):
    """Whatever a crash left after the last line feed, the next events stand on lines of their own."""
    left = b'{"event": "refresh", "step": 0}\n' + left.replace(b"\n", b"")
    with scratch() as folder:
        path = folder / JOURNAL_NAME
        path.write_bytes(left)
        journal = Journal(path)
        for event in events:
            journal.write("steps", 1, **{f"x_{name}": value for name, value in event.items()})
        lines = path.read_bytes().splitlines()
        assert len(lines) == 1 + len(events)
        assert [json.loads(line)["event"] for line in lines] == ["refresh"] + ["steps"] * len(events)
        assert len(read_journal(folder).of("steps")) in (1, len(events))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_steps_only_rise(steps, starts):
    """Two runs that wrote into one file, or one that was killed: what is kept is one run."""
    lines = [
        as_json({"event": "start" if s else "refresh", "step": step}) for step, s in zip(steps, starts, strict=False)
    ]
    with scratch() as folder:
        (folder / JOURNAL_NAME).write_text("\n".join(lines) + "\n")
        kept = [event["step"] for event in read_journal(folder).events]
    assert kept == sorted(set(kept))
