"""The journal as it lies on the disk: growing, cut off, begun again, damaged."""

import json

import pytest

from passk_guard.reporting import JOURNAL_NAME
from passk_guard.reporting.journal import read_journal
from passk_guard.utils.errors import GuardError
from tests.helpers.journals import write_run


def line(event, step, **fields):
    return json.dumps({"event": event, "step": step, **fields})


def written(folder, *lines, end="\n"):
    (folder / JOURNAL_NAME).write_text("\n".join(lines) + end)
    return folder


def steps(journal):
    return [(e["event"], e["step"]) for e in journal.events]


def test_every_prefix_of_a_growing_file_reads_up_to_its_last_whole_line(tmp_path):
    content = (write_run(tmp_path / "whole", guarded=True) / JOURNAL_NAME).read_bytes()[:3000]
    whole = [json.loads(part) for part in content.split(b"\n")[:-1]]
    folder = tmp_path / "growing"
    folder.mkdir()
    for length in range(content.index(b"\n") + 1, len(content), 7):
        (folder / JOURNAL_NAME).write_bytes(content[:length])
        journal = read_journal(folder)
        complete = content[:length].count(b"\n")
        rest = content[:length].rsplit(b"\n", 1)[1]
        assert journal.events[:complete] == whole[:complete]
        assert journal.unfinished == (bool(rest) and not rest.endswith(b"}"))
        assert len(journal.events) == complete + (bool(rest) and not journal.unfinished)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{broken", "line 2: not JSON"),
        (b"\xff\xfe", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1, 2]", r"line 2: expected an event as the guard writes it \(line: "),
        ('{"event": "refresh"}', r"line 2: .* \(step: Field required\)"),
        ('{"event": "refresh", "step": true}', r"line 2: .* \(step: "),
        ('{"event": "refresh", "step": -1}', r"line 2: .* \(step: "),
        ('{"event": "refresh", "step": 1e400}', r"line 2: .* \(step: "),
        ('{"event": 3, "step": 1}', r"line 2: .* \(event: "),
        ('{"event": "failed_refresh", "step": 1, "reason": [["x"]]}', r"line 2: .* \(reason: "),
        ('{"event": "start", "step": 1, "settings": {"k": [[8]]}}', r"line 2: .* \(settings.k"),
    ],
)
def test_a_malformed_line_is_named_and_left_out_at_the_end(bad, words, tmp_path):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    whole = line("refresh", 0).encode() + b"\n"
    (tmp_path / JOURNAL_NAME).write_bytes(whole + bad + b"\n" + whole)
    with pytest.raises(GuardError, match=words):
        read_journal(tmp_path)
    (tmp_path / JOURNAL_NAME).write_bytes(whole + bad)
    journal = read_journal(tmp_path)
    assert journal.unfinished
    assert steps(journal) == [("refresh", 0)]


def test_nothing_to_read(tmp_path):
    with pytest.raises(GuardError, match=r"found no .*nowhere"):
        read_journal(tmp_path / "nowhere")
    with pytest.raises(GuardError, match=r"Expected `passk_guard.jsonl` in .*; found none"):
        read_journal(tmp_path)
    for content in ("", "\n\n", '{"event": "ref', '{"event": "novelty", "step": 0}\n'):
        (tmp_path / JOURNAL_NAME).write_text(content)
        if "novelty" in content:
            assert read_journal(tmp_path).events == []
            continue
        with pytest.raises(GuardError, match="found none yet"):
            read_journal(tmp_path)


def test_a_file_may_be_named_itself(tmp_path):
    folder = written(tmp_path, line("refresh", 0))
    assert steps(read_journal(folder / JOURNAL_NAME)) == [("refresh", 0)]


def test_unknown_events_are_ignored_and_an_earlier_name_is_read(tmp_path):
    failed = {"step": 5, "reason": "r", "streak": 1}
    journal = read_journal(written(tmp_path, line("refresh", 0), line("novelty", 3, x=1), line("void", **failed)))
    assert journal.events == [{"event": "refresh", "step": 0}, {"event": "failed_refresh"} | failed]


def test_a_resumed_run_replaces_what_it_took_again(tmp_path):
    first = [line("refresh", 0, n=1), line("steps", 5), line("refresh", 5, n=1), line("state", 5), line("steps", 9)]
    again = [line("refresh", 5, n=2), line("steps", 9, n=2), line("refresh", 10, n=2)]
    journal = read_journal(written(tmp_path, *first, *again))
    assert steps(journal) == [("refresh", 0), ("steps", 5), ("refresh", 5), ("steps", 9), ("refresh", 10)]
    assert [e.get("n") for e in journal.of("refresh")] == [1, 2, 2]
    assert journal.restarts == [5]


@pytest.mark.parametrize(
    ("lines", "kept", "restarts"),
    [
        ([line("refresh", 0), line("failed_refresh", 5), line("refresh", 5)], [0, 5], [5]),
        ([line("refresh", 0), line("refresh", 5), line("refresh", 10), line("refresh", 0)], [0], [0]),
    ],
    ids=["resumed at its last refresh", "begun anew in the same folder"],
)
def test_a_run_replaces_what_it_measures_again(lines, kept, restarts, tmp_path):
    journal = read_journal(written(tmp_path, *lines))
    assert steps(journal) == [("refresh", step) for step in kept]
    assert journal.restarts == restarts


def test_the_settings_of_the_newest_start(tmp_path):
    lines = [line("start", 0, settings={"k": 4}), line("refresh", 0), line("start", 0, settings={"k": 8})]
    assert read_journal(written(tmp_path, *lines, line("refresh", 5))).settings == {"k": 8}
    assert read_journal(written(tmp_path, line("refresh", 5))).settings == {}
