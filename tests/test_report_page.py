import ast
import base64
import hashlib
import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modeldiff
from modeldiff.report import Finding, Table
from modeldiff.report_html import _facts
from modeldiff.report_text import grid, number, visible
from tests.report_sample import (
    HOSTILE,
    bare,
    behaviour,
    controls,
    hostile,
    sample,
    with_table,
    without_behaviour,
)

REPORTS = [sample, without_behaviour, hostile]


@cache
def html_of(make) -> str:
    return make().to_html()


@cache
def outline_of(make) -> "Outline":
    return Outline(html_of(make))


class Outline(HTMLParser):
    """Tags, attributes and text of a page; scripts and styles apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._open = tag, dict(attrs)

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is None:
            self.words.append(data)
        elif self._open[0] == "style":
            self.styles.append(data)
        else:
            self.scripts.append((self._open[1], data))

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def plots(self) -> dict[str, str]:
        return {str(a["data-plot"]): text for a, text in self.scripts if "data-plot" in a}


@given(st.text(st.characters()))
def test_visible_leaves_nothing_that_hides(text):
    shown = visible(text)
    left = [c for c in shown if not c.isprintable() and c not in "\n\t"]
    assert all(c.isspace() for c in left)  # no-break and other wide spaces
    assert not set(shown) & set("\u202e\u2066\u200b\u200d\ufeff\x00\x1b\r\u2028\ud800")
    if text.isprintable():
        assert shown == text


@given(st.floats(-1e12, 1e12))
def test_numbers_are_shown_to_three_digits(value):
    shown = float(number(value).replace("−", "-").replace(",", ""))
    assert shown == pytest.approx(value, rel=5.1e-3)


def test_intervals_stand_beside_their_numbers_and_ranges_alone():
    frame = pd.DataFrame(
        {"kl_to_base": [0.5], "kl_low": [0.4], "kl_high": [0.6], "kl_after_ablation": [0.1],
         "random_low": [0.3], "random_high": [math.nan], "rate": [0.5], "rate_low": ["a"],
         "rate_high": ["b"]}
    )  # fmt: skip
    shown = grid(frame)
    assert [cell.text for cell in shown.rows[0]] == [
        "0.5",
        "0.4 to 0.6",
        "0.1",
        "",
        "50.0\xa0%",
        "a",
        "b",
    ]
    assert [cell.kind for cell in shown.rows[0]][:4] == ["number", "interval", "number", "interval"]


def test_long_tables_are_cut_and_say_so():
    html = with_table(pd.DataFrame({"x": np.arange(1234)})).to_html()
    assert "The first 200 of 1,234 rows" in html
    assert ">199<" in html
    assert ">200<" not in html


@pytest.fixture(scope="module")
def page():
    return outline_of(sample)


@pytest.mark.parametrize("make", REPORTS)
def test_a_page_loads_nothing(make):
    outline = outline_of(make)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction"}
    found = [(tag, value) for tag, name, value in outline.attributes if name in loading]
    assert found == [("link", "data:,")]
    for style in outline.styles:
        assert "@import" not in style
        assert "url(" not in style
    assert all("type" in a or not a for a, _ in outline.scripts)


@pytest.mark.parametrize("make", REPORTS)
def test_only_our_own_scripts_may_run(make):
    outline = outline_of(make)
    policy = next(
        v for tag, name, v in outline.attributes if name == "content" and "script-src" in v
    )
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    running = [text for attributes, text in outline.scripts if not attributes]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in running]
    assert hashes == allowed
    assert len(running) == 2
    assert "default-src 'none'" in policy


def test_hostile_text_adds_no_tag_and_no_attribute():
    ours, theirs = outline_of(sample), outline_of(hostile)
    assert set(theirs.tags) <= set(ours.tags) | {"table"}
    assert {"img", "svg", "a", "iframe"}.isdisjoint(theirs.tags)
    names = {name for _, name, _ in ours.attributes}
    assert {name for _, name, _ in theirs.attributes} <= names
    assert not any(name.startswith("on") for name in names)
    executable = [text for attributes, text in theirs.scripts if not attributes]
    assert not any("window.hit" in text for text in executable)


def test_hostile_text_is_shown_in_full_and_nothing_of_it_hides():
    html, text = html_of(hostile), outline_of(hostile).text
    for payload in HOSTILE:
        assert text.count(visible(payload)) > 10, payload
    assert "49" not in Outline(bare(title="{{ 7*7 }}").to_html()).text
    assert not set(html) & set("\u202e\u2066\u200b\ufeff\x00\x07\x1b\u2028")


def test_drawn_text_is_never_taken_for_mathematics():
    for item in outline_of(hostile).plots.values():
        assert "$$" not in item
        assert "\\\\(" not in item


def test_every_field_reaches_the_page(page):
    report = sample()
    for finding in report.findings:
        assert finding.claim in page.text
        assert finding.evidence in page.text
    for table in report.tables.values():
        assert table.title in page.text
        assert table.caption in page.text
    for name, value in (*_facts(report.pair), *_facts(report.settings), *report.versions.items()):
        assert name in page.text
        assert value in page.text
    for direction in report.directions:
        assert direction.content_key in page.text
    for caveat in report.caveats:
        assert caveat in page.text
    assert report.settings["python"] in page.text
    assert "64.3 s" in page.text
    for word in ("✓ Shown", "✗ Does not hold", "? Undecided", "61.3\xa0%", "53.5 to 68.5"):
        assert word in " ".join(page.text.split(" "))


def plotted(page: Outline, target: str) -> dict[str, list]:
    """Columns of the first data source of a plot."""
    found: list[dict[str, list]] = []

    def walk(value):
        if isinstance(value, dict):
            if value.get("name") == "ColumnDataSource":
                found.append(dict(value["attributes"]["data"]["entries"]))
            for entry in value.values():
                walk(entry)
        elif isinstance(value, list):
            for entry in value:
                walk(entry)

    walk(json.loads(page.plots[target]))
    return found[0]


def test_plots_show_the_numbers_of_the_tables(page):
    drawn = plotted(page, "plot-rate")
    frame = behaviour()
    assert drawn["value"] == (100 * frame["rate"]).tolist()
    assert drawn["low"] == (100 * frame["rate_low"]).tolist()
    assert drawn["colour"][:3] == ["#0072B2", "#D55E00", "#009E73"]
    dots = plotted(page, "plot-controls")
    assert sorted(dots["x"]) == sorted(100 * controls()["rate"])
    item = page.plots["plot-rate"]
    assert f'"left": {100 * controls()["rate"].min()}' in item
    assert f'"right": {100 * controls()["rate"].max()}' in item


def test_axes_have_units_and_divergences_a_direction(page):
    labels = {
        target: re.findall(r'"axis_label": "([^"]+)"', item) for target, item in page.plots.items()
    }
    assert json.loads(f'"{labels["plot-kl_ft_base"][0]}"') == "KL(finetuned ‖ base), nats per token"
    assert any("% of answers" in label for label in labels["plot-rate"])
    assert all(labels.values())


def test_axes_of_cosines_and_distances_start_at_zero(page):
    """A split-half cosine that falls from 1.00 to 0.98 must not look like a collapse."""
    starts = {
        target: float(re.findall(r'"start": (-?[\d.]+)', page.plots[target])[-1])
        for target in ("plot-stability", "plot-ablation", "plot-difference")
    }
    assert all(-0.05 <= start <= 0 for start in starts.values()), starts


def test_columns_and_rows_that_are_missing_are_left_out():
    thin = behaviour()[["cell", "rate"]]
    one = behaviour().assign(rate=math.nan, rate_low=math.nan, rate_high=math.nan)
    for frame in (thin, one, behaviour()[:0]):
        html = bare(tables={"behaviour": Table(frame, "t", "c")}).to_html()
        assert "plot-rate" not in html
    assert "plot-coherent" in html or len(frame) == 0


def test_a_report_without_plots_needs_no_scripts():
    html = bare(findings=(Finding("c", None, "e"),)).to_html()
    assert len(html) < 20_000
    assert "<script" not in html
    assert "script-src 'none'" in html.replace("&#39;", "'")


def test_an_interrupted_audit_says_so():
    assert "Interrupted." in html_of(without_behaviour)
    assert "(interrupted)" in without_behaviour()._repr_html_()
    assert "Interrupted." not in html_of(sample)


def test_notebooks_get_a_small_page_without_scripts():
    for make in REPORTS:
        outline = Outline(make()._repr_html_())
        assert not {"script", "style", "img", "svg", "iframe"} & set(outline.tags)
    small = sample()._repr_html_()
    assert len(small) < 10_000
    assert "One direction carries it" in small
    assert "61.3\xa0%" in small


def test_the_same_report_gives_the_same_page():
    assert sample().to_html() == html_of(sample)


def test_plotting_and_templates_are_loaded_only_for_pages():
    package = Path(modeldiff.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "bokeh" for name in names):
                users.add(path.name)
    assert users == {"report_html.py", "report_figures.py", "report_plots.py"}
    for name in ("report.py", "report_files.py", "report_compare.py", "report_text.py"):
        top = ast.parse((package / name).read_text("utf-8")).body
        modules = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert not modules & {"modeldiff.report_html", "modeldiff.report_plots", "jinja2"}
