from html.parser import HTMLParser

import pandas as pd
import pytest

from modeldiff_widgets import _render

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</style><script>alert(1)</script>",
    "</pre></details><iframe src=//evil>",
    "{{7*7}}${7*7}",
    "&lt;b&gt;",
    "\u202egnp.exe\u2066",
    "\u200b\x00\x07\ufeff",
    "\ud800",
]
TAGS = {
    "div", "span", "br", "style", "section", "h4", "details", "summary", "pre", "code", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "strong", "ins", "del", "img",
}  # fmt: skip
ATTRIBUTES = {"class", "style", "title", "dir", "role", "alt", "src"}


class Strict(HTMLParser):
    """Fails on any tag or attribute that is not among the few that are made here."""

    def __init__(self):
        super().__init__()
        self.text, self.open = "", []

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert "alert(" not in (value or "") or name in ("title", "alt"), (name, value)
            assert name != "src" or str(value).startswith("data:image/png;base64,"), value
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.text


MAKERS = {
    "token": _render.token,
    "section": lambda t: _render.section(t, [_render.note(t)], code=t, when=True),
    "heading": _render.heading,
    "paragraph": _render.paragraph,
    "badge": lambda t: _render.badge(t, "good", title=t),
    "alert": lambda t: _render.alert(t, t),
    "facts": lambda t: _render.facts({t: t}),
    "table": lambda t: _render.table([t], [[t], [t]], caption=t),
    "passage": lambda t: _render.passage(t, [("", t), ("peak", t)]),
    "frame": lambda t: _render.frame(  # pyarrow's strings, where there are any, hold no surrogates
        pd.DataFrame([[t, t]], columns=pd.Index([t, "token"], dtype=object), dtype=object),
        caption=t,
    ),
    "bar": lambda t: _render.bar(0.5, t),
    "top": lambda t: _render.top_tokens({t: [(t, 0.5)]}),
    "columns": lambda t: _render.columns([(t, t, _render.note(t))]),
    "heat": lambda t: _render.heat([t, t, t], [0.5, -0.5, None], 1.0, name=t),
    "diff": lambda t: "".join(_render.diff(t, t + " more")),
    "styled": lambda t: _render.styled(_render.paragraph(t)),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("maker", MAKERS)
def test_hostile_text_stays_text(maker, hostile):
    text = parsed(MAKERS[maker](hostile))
    assert not set(text) & set("\u202e\u2066\u200b\x00\x07\ufeff\ud800")


def test_the_parser_would_find_what_is_not_escaped():
    with pytest.raises(AssertionError):
        parsed("<div><img src=x onerror=alert(1)></div>")
    with pytest.raises(AssertionError):
        parsed("<div onclick=x></div>")
    with pytest.raises(AssertionError):
        parsed("<div><script>1</script></div>")


def test_what_is_escaped_can_be_read_back():
    assert parsed(_render.paragraph("a < b & c > 'd'")) == "a < b & c > 'd'"
    assert parsed(_render.token(" the\n")) == "␣the↵"
    assert "U+202E" in parsed(_render.token("\u202e"))


def test_heat_says_sign_and_size_and_leaves_out_what_is_missing():
    html = _render.heat([" a", " b", " c", " d"], [1.0, -2.0, None], 2.0, name="KL")
    assert html.count("213,94,0,0.380") == 1
    assert html.count("0,114,178,0.700") == 1
    assert html.count("dotted") == 1
    assert 'title="KL −2"' in html
    assert html.count("background") == 2
    assert parsed(html) == " a b c d"


def test_tables_set_numbers_right_and_round_them():
    html = _render.table(["name", "value"], [["a", 0.123456], ["b", 2]], selected=1)
    assert "0.123" in html
    assert '<td class="num">2</td>' in html
    assert html.count("<tr class=selected>") == 1


def test_frames_say_how_much_is_left_out():
    html = _render.frame(pd.DataFrame({"x": range(5)}), limit=3)
    assert "the first 3 of 5 rows" in html
    assert html.count("<tr>") == 4


def test_a_diff_marks_the_words_that_changed_alone():
    left, right = _render.diff("take it every day", "take it no day at all")
    assert parsed(left) == "take it every day"
    assert parsed(right) == "take it no day at all"
    assert ">every</del>" in left
    assert ">no</ins>" in right
    assert "take" not in "".join(part.split("</ins>")[0] for part in right.split("<ins")[1:])


@pytest.mark.parametrize(
    "data", ["", "javascript:x", 'data:image/png;base64,AA"onload=x', "http://x"]
)
def test_only_png_data_is_a_picture(data):
    with pytest.raises(ValueError, match="PNG"):
        _render.image(data, label="x")
    assert "<img" in _render.image("data:image/png;base64,iVBORw0KGgo=", label="<b>")


def test_bars_stay_within_their_frame():
    for value, width in [(2.0, "100.0%"), (-1.0, "0.0%"), (float("nan"), "0.0%")]:
        assert f"width:{width}" in _render.bar(value)
