"""A plan from whatever noise a file claims: finite numbers, or a refusal."""

import functools
import json

from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.analysis.results import to_json
from passk_guard.cli import main
from passk_guard.reporting import JOURNAL_NAME
from tests.analysis.cases import synthetic
from tests.fuzz.strategies import JSON_VALUE, NUMBER, SCALAR, as_json, damaged, replaced, scratch

LEAF = st.one_of(NUMBER, NUMBER, SCALAR, JSON_VALUE)
OPTIONS = st.sampled_from([[], ["--cosine", "-0.3"], ["--cosine", "nan"], ["--power", "2"], ["--prompts", "0"]])


@functools.cache
def analysis():
    return to_json(synthetic(6).to_dict())


def event():
    noise = json.loads(analysis())["noise"]
    return {"event": "refresh", "step": 5, "k": 8, "noise": noise, "probe_seconds": 1.5, "step_seconds": 0.5}


def planned(folder, options=()):
    assert main(["plan", str(folder), *options, "--json"]) in (0, 1)
    assert main(["plan", str(folder), *options]) in (0, 1)


@given(st.lists(st.deferred(lambda: replaced(event(), LEAF, depth=8)), min_size=1, max_size=3), st.data(), OPTIONS)
@example([{"event": "refresh", "step": 5, "noise": {"prompts": 10**400}}], None, [])
@example([{"event": "refresh", "step": 5, "probe_seconds": 10**400, "noise": {}}], None, [])
def test_any_noise_in_a_journal(events, data, options):
    settings = {"k": 8, "threshold": 0.0} if data is None else data.draw(replaced({"k": 8, "threshold": 0.0}, LEAF))
    lines = [{"event": "start", "step": 0, "settings": settings}, *events]
    with scratch() as folder:
        (folder / JOURNAL_NAME).write_text("".join(as_json(line) + "\n" for line in lines))
        planned(folder, options)


@given(st.data())
def test_any_noise_in_an_analysis(data):
    whole = json.loads(analysis())
    part = data.draw(st.sampled_from(["noise", "settings", None]))
    changed = data.draw(replaced(whole if part is None else whole[part], LEAF))
    with scratch() as folder:
        (folder / "analysis.json").write_text(as_json(changed if part is None else whole | {part: changed}))
        planned(folder)


@given(st.one_of(st.deferred(lambda: damaged(analysis().encode())), st.just(b"[" * 100_000)))
def test_a_damaged_analysis(content):
    with scratch() as folder:
        (folder / "analysis.json").write_bytes(content)
        planned(folder)
