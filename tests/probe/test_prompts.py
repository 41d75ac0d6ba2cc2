"""Held-out prompts: their forms, their identity, the draw, and the overlap with training."""

import json
import warnings
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.probe.prompts import ProbeSet, prompt_key
from passk_guard.utils.errors import GuardError
from tests.helpers.tiny import tiny_chat_rows, tiny_rows


def write(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_source_gives_the_same_probe(tmp_path):
    rows = tiny_rows(5)
    path = write(tmp_path / "probe.jsonl", [json.dumps(row) for row in rows] + ["", ""])
    probe = ProbeSet.of(rows)
    for source in (path, str(path), Dataset.from_list(rows), tuple(rows), probe):
        assert ProbeSet.of(source).rows == probe.rows
    assert len(probe) == 5
    assert probe[2] == rows[2]


def test_conversational_prompts_survive_arrow():
    rows = tiny_chat_rows(4)
    assert ProbeSet.of(Dataset.from_list(rows)).rows == ProbeSet.of(rows).rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least 3 different prompts.*found 0 in 0 rows"),
        ([{"prompt": "a"}], "found 1 in 1 rows"),
        ([{"prompt": "a"}, {"prompt": " A "}], "found 1 in 2 rows"),
        (["a", "b"], "found str in row 0"),
        ([{"prompt": "a"}, {"question": "b"}], r"found only \['question'\] in row 1"),
        ([{"prompt": "a"}, {"prompt": "  "}], "found '  ' in row 1"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user"}]}], "`role` and `content`; found .* in row 1"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": [{"role": "user", "content": "c"}]}], "one kind"),
    ],
)
def test_malformed_rows_are_refused(rows, message):
    with pytest.raises(GuardError, match=message):
        ProbeSet.of(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "malformed JSON in probe.jsonl, line 3"),
        ('["prompt"]', "found list in probe.jsonl, line 3"),
        ('{"text": "x"}', r"only \['text'\] in probe.jsonl, line 3"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "probe.jsonl", ['{"prompt": "a"}', "", line])
    with pytest.raises(GuardError, match=message):
        ProbeSet.from_jsonl(path)


def test_sources_that_are_no_probe(tmp_path):
    with pytest.raises(GuardError, match="found no file"):
        ProbeSet.of(tmp_path / "missing.jsonl")
    with pytest.raises(GuardError, match=r"splits \['train'\]"):
        ProbeSet.of({"train": tiny_rows(4)})
    with pytest.raises(GuardError, match=r"take\(256\)"):
        ProbeSet.of(Dataset.from_list(tiny_rows(4)).to_iterable_dataset())
    with pytest.raises(GuardError, match="found int"):
        ProbeSet.of(3)


def test_repeated_prompts_are_dropped_with_a_warning():
    rows = tiny_rows(3)
    with pytest.warns(UserWarning, match="dropped 1 of 4 probe prompts"):
        assert ProbeSet.of([*rows, rows[1]]).rows == tuple(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProbeSet.of(rows)


@pytest.mark.parametrize("other", ["What  is 2?", "what is 2?", " What\nis\t2? ", "What is ２?"])
def test_the_key_ignores_case_space_and_unicode_form(other):
    assert prompt_key(other) == prompt_key("What is 2?")
    chats = [[{"role": "user", "content": text}] for text in (other, "What is 2?")]
    assert prompt_key(chats[0]) == prompt_key(chats[1])


def test_the_key_tells_prompts_apart():
    message = {"role": "user", "content": "2"}
    prompts = ["2", "3", [message], [{**message, "role": "system"}], [message, message], [{**message, "content": "3"}]]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)
    assert prompt_key([{**message, "name": "x"}]) == prompt_key([message])
    parts = [{"role": "user", "content": [{"type": "text", "text": "Two"}]}]
    padded = [{"role": "user", "content": [{"type": "text", "text": " two", "image": None}]}]
    assert prompt_key(parts) == prompt_key(padded)


def test_overlap_is_found_whatever_the_spelling():
    probe = ProbeSet.of([{"prompt": p} for p in ("one", "two words", "three", "FOUR")])
    training = [{"prompt": p} for p in ("Two  Words\n", "five", "four", "two words")]
    assert probe.overlap(training) == [1, 3]
    assert probe.overlap(Dataset.from_list(training)) == [1, 3]
    assert probe.overlap([{"prompt": "none"}]) == []


def test_overlap_of_conversations_and_what_cannot_be_checked():
    rows = tiny_chat_rows(6)
    dataset = Dataset.from_list(rows[3:])
    assert ProbeSet.of(rows).overlap(dataset) == [3, 4, 5]
    assert ProbeSet.of(rows).overlap(dataset.to_iterable_dataset()) is None
    assert ProbeSet.of(rows).overlap(Dataset.from_list([{"text": "x"}])) is None
    assert ProbeSet.of(rows).overlap([{"prompt": None}, *rows[:1]]) == [0]


def test_overlap_reads_the_prompt_column_only():
    class Watched:
        column_names = ("prompt", "image")
        asked = None

        def __len__(self):
            return 1

        def select_columns(self, names):
            Watched.asked = names
            return Dataset.from_list([{"prompt": "a"}])

        iter = None

    assert ProbeSet.of([{"prompt": p} for p in "abc"]).overlap(Watched()) == [0]
    assert Watched.asked == ["prompt"]


@given(st.integers(3, 40), st.integers(1, 50), st.integers(0, 200), st.integers(0, 2**63))
def test_draw_is_pure_and_never_repeats_a_prompt(count, size, refresh, seed):
    probe = ProbeSet.of([{"prompt": str(i)} for i in range(count)])
    drawn = probe.draw(refresh, size, seed)
    assert drawn == ProbeSet.of([{"prompt": str(i)} for i in range(count)]).draw(refresh, size, seed)
    assert len(drawn) == len(set(drawn)) == min(size, count)
    assert set(drawn) <= set(range(count))


@given(st.integers(3, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 2**32))
def test_every_prompt_is_used_before_a_new_walk(count, size, walk, seed):
    probe = ProbeSet.of([{"prompt": str(i)} for i in range(count)])
    per_walk = -(-count // min(size, count))
    seen = Counter(i for r in range(walk * per_walk, (walk + 1) * per_walk) for i in probe.draw(r, size, seed))
    assert set(seen) == set(range(count))
    assert max(seen.values()) <= 2
    assert sum(seen.values()) - count < min(size, count)  # only the last refresh is filled up


def test_draw_differs_by_seed_and_walk_but_not_by_run():
    probe = ProbeSet.of(tiny_rows(20))
    assert probe.draw(0, 10, 0) != probe.draw(0, 10, 1)
    assert probe.draw(0, 10, 0) != probe.draw(2, 10, 0)
    assert probe.draw(0, 4, 7) == [11, 1, 3, 5]


def test_misuse_of_a_probe():
    with pytest.raises(GuardError, match="refresh >= 0 and size >= 1"):
        ProbeSet.of(tiny_rows(4)).draw(-1, 4, 0)
    probe = ProbeSet.of([*tiny_rows(3), {"prompt": "no answer"}])
    probe.require_columns(["prompt"])
    with pytest.raises(GuardError, match=r"column `answer`.*missing in 1 of 4"):
        probe.require_columns(["prompt", "answer"])
