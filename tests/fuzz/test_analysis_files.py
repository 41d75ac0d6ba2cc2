"""The files of an analysis as anything may have left them: what is read can be drawn, printed and written again."""

import functools
import io
import json

from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.analysis import Analysis, Settings
from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.results import to_json
from passk_guard.analysis.store import PromptRollouts, RolloutStore, check_folder
from passk_guard.analysis.words import print_analysis
from passk_guard.utils.errors import GuardError
from tests.analysis.cases import synthetic
from tests.fuzz.strategies import ANY_TEXT, JSON_VALUE, NUMBER, ODD_TEXT, SCALAR, as_json, damaged, replaced, scratch

LEAF = st.one_of(SCALAR, NUMBER, ODD_TEXT, JSON_VALUE, st.just([]), st.just({}))
KEPT = PromptRollouts(0, [1, 2], [[3], [4, 5]], ["a", [{"role": "assistant", "content": "b"}]])


@functools.cache
def good():
    return to_json(synthetic(6).to_dict())


def read(data):
    """The analysis, drawn and printed and written once more; None where it is refused."""
    try:
        analysis = Analysis.from_dict(data)
    except GuardError:
        return None
    assert Analysis.from_dict(json.loads(to_json(analysis.to_dict()))) == analysis
    assert analysis_page(analysis.to_dict()).startswith("<!DOCTYPE html>")
    print_analysis(analysis, io.StringIO())
    return analysis


@given(st.data())
def test_one_value_of_another_kind(data):
    read(data.draw(replaced(json.loads(good()), LEAF, depth=8)))


@given(
    st.lists(st.tuples(st.sampled_from(["text", "reason", "name", "verifier", "note", "remark"]), ODD_TEXT), max_size=4)
)
def test_any_texts(changes):
    """Texts are texts: whatever they hold, the analysis is read."""
    whole = json.loads(good())
    for name, text in changes:
        for holder in (whole, whole["model"], *whole["prompts"], *whole["at_k"], *whole["predictions"]):
            if name in holder:
                holder[name] = text
    assert read(whole) is not None


@given(st.one_of(JSON_VALUE, st.none()))
@example({"version": 1})
@example([])
def test_what_is_no_analysis(data):
    assert read(data) is None


@given(st.one_of(st.deferred(lambda: damaged(good().encode())), st.binary(max_size=40), st.just(b"[" * 100_000)))
def test_a_folder_with_anything_in_its_place(content):
    with scratch() as folder:
        (folder / "analysis.json").write_bytes(content)
        (folder / "analysis.html").write_bytes(content)
        try:
            check_folder(folder, "f", Settings().to_dict(), force=False)
        except GuardError:
            return
    raise AssertionError("accepted")


@given(st.lists(st.one_of(replaced(vars(KEPT), LEAF), JSON_VALUE), max_size=4), st.one_of(st.just(b""), st.binary()))
def test_lines_of_kept_completions(lines, rest):
    content = "".join(as_json(line) + "\n" for line in lines).encode() + rest
    store_reads(content)


@given(damaged((as_json(vars(KEPT)) + "\n").encode() * 3))
@example(b"[" * 100_000 + b"\n")
def test_damaged_completions(content):
    store_reads(content)


def store_reads(content):
    with scratch() as folder:
        store = RolloutStore(folder)
        (folder / "rank0.jsonl").write_bytes(content)
        (folder / "settings.json").write_bytes(content)
        try:
            store.prepare({"seed": 1})
        except GuardError:
            pass
        else:
            return
        try:
            kept = store.read()
        except GuardError:
            return
        for place, one in kept.items():
            assert type(place) is int
            assert all(type(token) is int for ids in (one.prompt_ids, *one.completion_ids) for token in ids)
            assert len(one.completion_ids) == len(one.completions)
        store.append([KEPT])
        assert RolloutStore(folder).read()[0] == KEPT


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(Settings.model_fields)), ANY_TEXT),
        st.one_of(SCALAR, NUMBER, JSON_VALUE, st.lists(NUMBER, max_size=3)),
        max_size=3,
    )
)
@example({"ks": ["a"]})
@example({"batch_size": 0})
@example({"seed": 10**400})
def test_any_settings(given_settings):
    try:
        settings = Settings(**given_settings)
    except GuardError:
        return
    except TypeError:
        assert not given_settings.keys() <= Settings.model_fields.keys()
        return
    assert all(1 <= k <= settings.num_samples for k in settings.ks)
    to_json(settings.to_dict())
