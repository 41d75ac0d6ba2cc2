"""Make untrusted text (errors, rewards, prompts) safe for a log line or a terminal, and log each message once."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

_LONGEST = 2000
# Controls (line ends and terminal escapes among them), what reorders or hides text, and halves of surrogate pairs.
_HIDING = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


def one_line(text: str, most: int = _LONGEST) -> str:
    r"""The text on one line, cut to `most`; what hides or steers is written out, a line feed as `\n`."""
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
    """A `repr` of bounded length and depth, whatever the object's `__repr__` does."""
    try:
        return one_line(_short.repr(value), 80)
    except Exception:
        return f"an object of type {type(value).__name__}"


def describe_invalid(error: Any, most: int = 3) -> str:
    """The first problems of a pydantic ValidationError on one line, each as ``name: what is wrong; found ...``."""
    problems = error.errors(include_url=False)
    texts = []
    for problem in problems[:most]:
        name, text = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        texts.append(f"`{name}`: {text}; found {brief(problem['input'])}" if name else text)
    return one_line("; ".join(texts)) + (f"; and {len(problems) - most} more" if len(problems) > most else "")


def first_of(names: Iterable[Any], most: int) -> str:
    """`a, b and 3 more`."""
    known = list(map(str, names))
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


class Once:
    """Whether a message is new.

    The text of an exception may differ each time, by an address or a step. After `most` different ones nothing is new
    any more, so that neither the log nor the memory of a long run fills with them.
    """

    def __init__(self, most: int = 100) -> None:
        self._most = most
        self._logged: set[str] = set()

    def new(self, text: str) -> bool:
        """Whether to log it now; the same text is not new again."""
        if text in self._logged or len(self._logged) >= self._most:
            return False
        self._logged.add(text)
        return True


# CSI (colours, cursor), OSC (titles, links) up to its end, and other two-character escapes, in 7- and 8-bit form.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?|\x1b[ -/]*[0-~]"
)
_HIDDEN_CHARACTERS = {"Cc", "Cf", "Cs", "Co", "Cn"}


def plain_text(text: str) -> str:
    """The text on one line without escape sequences, control, formatting (bidirectional) and unassigned characters."""
    kept = _ESCAPES.sub("", text)
    shown = (" " if one.isspace() else "" if unicodedata.category(one) in _HIDDEN_CHARACTERS else one for one in kept)
    return " ".join("".join(shown).split())
