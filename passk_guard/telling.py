"""Words from elsewhere in lines of ours: the text of an error, a reward or a prompt, with nothing hidden in it."""

from __future__ import annotations

import re
import reprlib
from typing import Any

_LONGEST = 2000
# Controls (line ends and terminal escapes among them), what reorders or hides text, and halves of surrogate pairs.
_HIDING = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


def one_line(text: str, most: int = _LONGEST) -> str:
    r"""The text, cut to `most`; what hides or steers is written out, a line feed as `\n`, an escape as `\x1b`.

    A line of a log or of a terminal stays one line, whatever is put into it.
    """
    cut = text if len(text) <= most else text[:most] + "…"
    return _HIDING.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), cut)


def describe_error(error: BaseException) -> str:
    """`ValueError: its text` on one line, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as failure:
        text = f"(its text raises {type(failure).__name__})"
    return one_line(f"{type(error).__name__}: {text}")


def brief(value: Any) -> str:
    """A `repr` of bounded length and depth, whatever the object's own does."""
    try:
        return one_line(_short.repr(value), 80)
    except Exception:
        return f"an object of type {type(value).__name__}"
