"""Probe prompts from files, lists and datasets: a set of different prompts, or an error that names the row."""

import warnings

from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.probe.prompts import ProbeSet, prompt_key
from passk_guard.utils.errors import GuardError
from tests.fuzz.strategies import ANY_TEXT, JSON_VALUE, ODD_TEXT, SCALAR, as_json, damaged, scratch

MESSAGE = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "system"]), SCALAR), "content": st.one_of(ANY_TEXT, JSON_VALUE)},
    optional={"name": SCALAR},
)
PROMPT = st.one_of(ANY_TEXT, ODD_TEXT, st.lists(MESSAGE, max_size=3), JSON_VALUE)
GOOD_ROWS = st.lists(st.fixed_dictionaries({"prompt": PROMPT, "answer": SCALAR}), min_size=3, max_size=8)
ROW = st.one_of(st.fixed_dictionaries({"prompt": PROMPT}, optional={"answer": JSON_VALUE}), JSON_VALUE)
GOOD = b"".join(b'{"prompt": "What is %d + %d?", "answer": "%d"}\n' % (i, i, 2 * i) for i in range(6))


def taken(source):
    """Check the probe, if it is not refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = ProbeSet.of(source)
        probe.require_columns(["answer"])
    except GuardError:
        return
    keys = [probe.key(i) for i in range(len(probe))]
    assert len(set(keys)) == len(probe) >= 3
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
    assert sorted(probe.draw(0, len(probe), 7)) == list(range(len(probe)))
    assert probe.overlap(list(probe.rows)) == list(range(len(probe)))


@given(st.one_of(GOOD_ROWS, st.lists(ROW, max_size=8)))
@example([{"prompt": str(i), 1: "x", None: "y"} for i in range(3)])
@example([{1: "x", None: "y"}])
def test_rows_from_a_list_and_a_file(rows):
    taken(rows)
    with scratch() as folder:
        path = folder / "probe.jsonl"
        path.write_text("\n".join(map(as_json, rows)))
        taken(path)


@given(st.one_of(damaged(GOOD), st.binary(max_size=80)))
@example(GOOD + b"\xff\xfe\n")
@example(GOOD.decode().encode("utf-16"))
def test_a_file_of_anything(content):
    with scratch() as folder:
        path = folder / "probe.jsonl"
        path.write_bytes(content)
        taken(path)


@given(st.one_of(JSON_VALUE, st.binary(), st.sets(st.integers()), st.sampled_from([object(), range(3)])))
def test_what_is_no_probe_at_all(source):
    taken(source)


@given(ANY_TEXT, ANY_TEXT)
def test_equal_up_to_case_and_white_space_is_one_prompt(text, other):
    assert prompt_key(f" {text}\t{text.lower()} ") == prompt_key(f"{text} {text.lower()}")
    if text.isascii() and other.isascii() and text.lower().split() != other.lower().split():
        assert prompt_key(text) != prompt_key(other)
