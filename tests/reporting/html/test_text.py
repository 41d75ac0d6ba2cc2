"""Numbers and untrusted text as a page shows them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.reporting.html.text import label, told_apart, visible, write_number

NAN = float("nan")
CHAT = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nSolve: {}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("value", "gap", "text"),
    [
        (-0.3, 0.1, "−0.3"),
        (0.25, 0.05, "0.25"),
        (-0.0001, 0.1, "0.0"),
        (12345.0, 1000, "12345"),
        (None, None, "–"),
        (NAN, 1, "–"),
        (0.123456, None, "0.1235"),
        (2e7, 1e6, "2e+07"),
    ],
)
def test_numbers_as_they_are_read(value, gap, text):
    assert write_number(value, gap) == text


def test_what_hides_is_shown():
    assert visible("a\x1b[31mb\x00c\x7f") == "a␛[31mb␀c␡"
    assert visible("\u202eabc\u2066") == "⟨U+202E⟩abc⟨U+2066⟩"
    assert visible("\ud800") == "\ufffd"
    assert visible("a\r\nb\tc") == "a\nb\tc"


@given(st.text(st.characters(), max_size=30))
def test_a_label_is_one_line_without_markup(text):
    found = label(text)
    assert not set("<>\n\r\x1b\u202e") & set(found)
    found.encode("utf-8")


@pytest.mark.parametrize(
    ("texts", "apart"),
    [
        ([CHAT.format("2 + 2"), CHAT.format("3 + 4")], ["…2 + 2…", "…3 + 4…"]),
        (["<s>[INST] one [/INST]", "<s>[INST] two [/INST]"], ["one", "two"]),
        (["12 + 3 =", "12 + 4 ="], ["12 + 3 =", "12 + 4 ="]),
        (["the same long words", "the same long words and more"], ["…words", "…words and more"]),
        (["only one"], ["only one"]),
        (["user: How many apples?", "user: How many pears?"], ["…apples?", "…pears?"]),
        ([], []),
    ],
)
def test_prompts_are_told_apart(texts, apart):
    assert told_apart(texts) == apart


@given(st.lists(st.text("ab <|>", max_size=40), max_size=5))
def test_different_prompts_stay_different(texts):
    plain = {text.strip() for text in texts}
    assert len(set(told_apart(sorted(plain)))) == len(plain) or any("<" in text for text in plain)
