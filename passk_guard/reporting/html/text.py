"""Numbers and untrusted text as a page shows them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

# Controls (terminal escapes among them) do nothing in HTML but hide, and bidirectional overrides reorder what is read.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_HIDDEN = re.compile("[\u0080-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Of chat templates: <|im_start|>, <s>, <start_of_turn>, [INST], <｜User｜>.
_SPECIAL = re.compile(r"<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\]")
_LARGEST = 1e300
_WORTH_FOLDING = 8  # characters that all prompts share at one end


def visible(value: Any) -> Any:
    """Text without anything that hides, for all that the templates print; `Markup` comes back as it is.

    Control characters become their visible pictures, bidirectional overrides their code points, and halves of
    surrogate pairs, which no UTF-8 file can hold, U+FFFD.
    """
    if hasattr(value, "__html__"):
        return value
    text = str(value).replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: chr(0x2421 if match[0] == "\x7f" else 0x2400 + ord(match[0])), text)
    text = _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _LONE_SURROGATE.sub("\ufffd", text)


def label(text: str, most: int = 80) -> str:
    """One line of text for a plotly figure, which reads a part of HTML in titles, names and hover texts."""
    flat = " ".join(str(visible(text)).split())
    return html.escape(flat if len(flat) <= most else flat[: most - 1].rstrip() + "…", quote=False)


def told_apart(texts: Sequence[str]) -> list[str]:
    """The texts without the special tokens of chat templates, and without the beginning and the end they all share.

    On a pretrained model every prompt begins with the same turns of the template, and often with the same instruction.
    What was left out at an end is written as "…". A text of which nothing would remain stays whole.
    """
    plain = [" ".join(_SPECIAL.sub(" ", text).split()) if _SPECIAL.search(text) else text.strip() for text in texts]
    several = sorted(set(plain))
    if len(several) < 2:
        return plain
    start, end = _shared(several), _shared([text[::-1] for text in several])
    if start + end >= min(map(len, several)):
        end = 0
    if start >= min(map(len, several)):
        start = 0
    return [("…" if start else "") + text[start : len(text) - end] + ("…" if end else "") for text in plain]


def _shared(texts: Sequence[str]) -> int:
    """Length of what all texts begin with, up to its last word's end; 0 where it is not worth folding."""
    first, last = min(texts), max(texts)
    found = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    whole = found - len(re.split(r"\s", first[:found])[-1])
    return whole if whole >= _WORTH_FOLDING else 0


def write_number(value: float | None, gap: float | None = None) -> str:
    """A number as it is read: a true minus sign, and as many digits as tell it from others `gap` apart.

    Without `gap`, four significant digits; a dash for None and NaN.
    """
    if not is_number(value):
        return "–"
    if gap is None:
        text = f"{value:.4g}"
    elif max(abs(value), gap) >= 1e6 or gap < 1e-4:
        text = f"{value:.3g}"
    else:
        text = f"{value:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a number that a chart can place: finite, and not so large that a range of two would not be."""
    return value is not None and abs(value) <= _LARGEST  # False of NaN; whole numbers may be beyond any float
