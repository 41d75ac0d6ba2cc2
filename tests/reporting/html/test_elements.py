"""Text is never markup, whatever it holds."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.reporting.html import (
    Column,
    Distribution,
    Html,
    Level,
    Points,
    Section,
    Series,
    Upright,
    bullets,
    callout,
    escape,
    facts,
    heat_map,
    histogram,
    in_a_frame,
    join,
    line_chart,
    page_kind,
    paragraph,
    render_page,
    scatter,
    table,
    tag,
)
from passk_guard.utils.errors import GuardError
from tests.helpers.journals import HOSTILE


class Elements(HTMLParser):
    """Names of the elements, names of their attributes, and all text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.names, self.attributes, self.text = [], set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def everything(text):
    """Every component with the text wherever it takes text."""
    xs, ys = [0.0, 1.0, 2.0], [0.5, None, 1.0]
    mark, level = Upright(1.0, text, title=text), Level(0.2, text)
    axes = {"x_label": text, "alt": text, "title": text}
    return [
        paragraph(text),
        callout(text),
        facts({text: text}),
        bullets([text]),
        line_chart([Series(text, xs, ys)], markers=[mark], levels=[level], y_label=text, **axes),
        scatter([Points(text, xs, ys, [text] * 3)], [mark], levels=[level], y_label=text, **axes),
        histogram([Distribution(text, ys)], [mark], y_label=text, **axes),
        heat_map([[1.0, -1.0]], alt=text, title=text, x_label=text, y_label=text, caption=text),
        table([Column(text), Column(text, "number")], [(text, 1.0), (None, None)], caption=text),
    ]


def page(text):
    return render_page(text, [Section(text, join(everything(text)), text)] * 3, kind="test")


def test_hostile_text_adds_no_element_and_no_attribute():
    plain, hostile = Elements(page("harmless" + "x" * len(HOSTILE))), Elements(page(HOSTILE))
    assert hostile.names == plain.names
    assert hostile.attributes == plain.attributes
    assert "<script>document.title='broken'</script>" in hostile.text


@given(st.text(st.characters(), max_size=30))
def test_any_text_stays_text(text):
    held = Elements(tag("p", text))
    assert held.names == ["p"]
    assert held.attributes == set()
    kept = [ch for ch in text if ch.isprintable() and ch not in "⟨⟩"]
    remaining = iter(held.text)
    assert all(ch in remaining for ch in kept), "a printable character was lost"
    inside = re.fullmatch(r'<i title="([^"<>]*)"></i>', tag("i", title=text))
    assert inside, "an attribute that closes early"
    tag("p", text).encode("utf-8")


def test_what_hides_is_shown():
    assert escape("a\x1b[31mb\x00c\x7f") == "a␛[31mb␀c␡"
    assert escape("\u202eabc\u2066") == "⟨U+202E⟩abc⟨U+2066⟩"
    assert escape("\ud800") == "\ufffd"
    assert escape("a\r\nb\tc") == "a\nb\tc"


def test_markup_that_went_through_a_string_is_escaped_again():
    made = tag("b", "x")
    assert tag("p", made) == "<p><b>x</b></p>"
    assert tag("p", f"{made}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"
    assert tag("p", made + "<i>") == "<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>"
    assert type(join([made, "<"])) is Html


def test_a_section_takes_no_plain_text():
    with pytest.raises(GuardError, match=r"found str in section 'Here'. Pass text through `paragraph`"):
        Section("Here", "<p>text</p>")


def test_the_policy_names_what_the_page_holds():
    import base64
    import hashlib

    text = page("x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#x27;", "'")
    for name in ("script", "style"):
        held = re.search(rf"<{name}>(.*?)</{name}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert " style=" not in text, "inline styles are not allowed by the policy"
    assert not re.search(r'(?:src|href)="(?!#|data:)', text), "something from elsewhere"


def test_the_kind_of_a_page_cannot_be_forged_by_text():
    mark = '<meta name="passk-guard-page" content="other">'
    assert page_kind(page("x"), "test")
    assert not page_kind(page(mark), "other")
    assert not page_kind(mark, "other")


def test_a_frame_holds_the_whole_page():
    text = page(HOSTILE)
    inner = dict(_first_attributes(in_a_frame(text)))
    assert inner["srcdoc"] == text
    assert inner["sandbox"] == "allow-scripts"


def _first_attributes(markup):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(attrs)

    Reader().feed(markup)
    return found
