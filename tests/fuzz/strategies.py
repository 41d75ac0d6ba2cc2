"""Odd numbers, texts, objects and damaged bytes, as files, users and other programs may pass them."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

ANY_TEXT = st.text(max_size=30)  # surrogates and control characters included
ODD_TEXT = st.sampled_from(
    ["", " ", "\x00", "\ud800", "\x1b[31mred\x1b[0m", "a\nb", "[bold]x[/]", "</script><img onerror=x>", "%s{0}", "../x"]
)
ODD_FLOAT = st.sampled_from(
    [0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.7e308, -1e300, 0.5, 1.0]
)
ODD_INT = st.sampled_from([-(2**63) - 1, -1, 0, 1, 2, 2**31, 2**53, 2**63, 10**30, 10**400])
NUMBER = st.one_of(ODD_FLOAT, ODD_INT, st.integers(-5, 40), st.floats())
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, ANY_TEXT, ODD_TEXT)
JSON_VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(ANY_TEXT, ODD_TEXT), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def damaged(draw, content: bytes):
    """Bytes of a good file with a part cut off, overwritten, doubled or put elsewhere."""
    if not content:
        return draw(st.binary(max_size=20))
    start = draw(st.integers(0, len(content) - 1))
    end = draw(st.integers(start, min(len(content), start + 200)))
    put = draw(st.one_of(st.just(b""), st.binary(max_size=20), st.just(content[start:end] * 2), st.just(content[:80])))
    return content[:start] + put + content[end:]


@st.composite
def replaced(draw, value, leaves=JSON_VALUE, depth=6):
    """A copy of nested dicts and lists in which one value, at any depth, is another one or missing."""
    if depth and isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: draw(replaced(value[key], leaves, depth - 1))}
    if depth and isinstance(value, list) and value and draw(st.integers(0, 5)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(replaced(value[i], leaves, depth - 1)), *value[i + 1 :]]
    return draw(leaves)


@contextmanager
def scratch():
    """A folder for one example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def as_json(value) -> str:
    """JSON as Python reads it: NaN, infinities and halves of surrogate pairs included."""
    return json.dumps(value)
