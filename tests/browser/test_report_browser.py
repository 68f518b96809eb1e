"""The page of a report in a real browser: it works offline, stays inert, and can be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from modeldiff.report_text import visible
from tests.browser.steps import POOR_CONTRAST
from tests.report_sample import HOSTILE, hostile, sample, without_behaviour

pytestmark = pytest.mark.browser
REPORTS = {"sample": sample, "without_behaviour": without_behaviour, "hostile": hostile}
N_PLOTS = {"sample": 11, "without_behaviour": 2, "hostile": 11}

COLOURS = """canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""


@dataclass
class Opened:
    """A page and everything it did that it should not."""

    page: Any
    trouble: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, make in REPORTS.items():
        (folder / f"{name}.html").write_text(make().to_html(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in REPORTS}


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Opened]:
    """Open a file, wait for its plots, and fail at the end if it erred or reached out."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page = context.new_page()
    result, trouble = Opened(page), []
    result.trouble = trouble

    def dialog(box: Any) -> None:
        trouble.append(f"dialog: {box.message}")
        box.dismiss()

    page.on("dialog", dialog)
    page.on("pageerror", lambda error: trouble.append(f"page error: {error}"))
    page.on("console", lambda m: m.type in ("error", "warning") and trouble.append(m.text))
    page.on("request", lambda r: r.url != path.as_uri() and trouble.append(f"asked for {r.url}"))
    page.goto(path.as_uri())
    if options.get("java_script_enabled", True):
        n_plots = page.locator("script[data-plot]").count()
        page.wait_for_function(
            "n => window.Bokeh && Bokeh.documents.length === n"
            " && Bokeh.documents.every(d => d.is_idle)",
            arg=n_plots,
        )
    yield result
    context.close()
    requests = [entry for entry in trouble if not entry.startswith("asked for data:")]
    assert requests == []


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 420)])
def test_the_page_draws_its_plots_and_can_be_read(browser, pages, shots, name, scheme, width):
    size = {"width": width, "height": 900}
    with opened(browser, pages[name], color_scheme=scheme, viewport=size) as result:
        page = result.page
        plots = page.locator(".canvas")
        assert plots.count() == N_PLOTS[name]
        for plot in plots.all():
            assert plot.locator("canvas").first.evaluate(COLOURS) > 10
            assert plot.get_attribute("aria-label")
        shots.take(page, f"report_{name}_{scheme}_{width}.png", full_page=True)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate(POOR_CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_plots_follow_the_theme_when_it_changes(browser, pages):
    paper = (
        "() => new Set(Bokeh.documents.map(d => d.roots()[0].border_fill_color)).values().toArray()"
    )
    with opened(browser, pages["sample"], color_scheme="light") as result:
        assert result.page.evaluate(paper) == ["#ffffff"]
        result.page.emulate_media(color_scheme="dark")
        result.page.wait_for_timeout(200)
        assert result.page.evaluate(paper) == ["#14171b"]


def test_hostile_text_stays_text(browser, pages):
    with opened(browser, pages["hostile"]) as result:
        page = result.page
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        text = page.locator("body").inner_text()
        for payload in HOSTILE:
            assert visible(payload) in text
        assert page.evaluate("window.hit") is None
        assert page.locator("img, svg, iframe, a, object").count() == 0
        assert page.evaluate("document.title").startswith("<script>window.hit=1</script>")


def test_hostile_text_stays_text_in_what_appears_on_hovering(browser, pages):
    with opened(browser, pages["hostile"]) as result:
        page = result.page
        shown = set()
        for target in ("plot-rate", "plot-js"):
            host = page.locator(f"#{target}")
            host.scroll_into_view_if_needed()
            for x, y in mark_positions(page, target):
                page.mouse.move(x, y)
                page.mouse.move(x + 1, y)
                tooltip = page.locator(".bk-tooltip-content:visible").first
                tooltip.wait_for()
                shown.add(tooltip.inner_text())
        assert any("<script>" in text for text in shown)
        assert len(shown) >= 6
        assert page.evaluate("window.hit") is None
        token = page.locator(".t").first
        assert "<script>" in token.get_attribute("title")


def mark_positions(page: Any, target: str) -> list[tuple[float, float]]:
    """Where on the screen the markers of an interval plot are."""
    return page.evaluate(
        """target => {
          const host = document.getElementById(target);
          const view = [...Bokeh.index].find(v => host.contains(v.el));
          const box = view.canvas_view.el.getBoundingClientRect();
          const {x_scale, y_scale} = view.frame;
          const {data} = view.model.renderers.find(r => r.glyph.type === "Scatter").data_source;
          return [...data.value].map((x, i) =>
            [box.left + x_scale.compute(x), box.top + y_scale.compute(data.label[i])]);
        }""",
        target,
    )


def test_without_javascript_the_numbers_are_still_there(browser, pages):
    with opened(browser, pages["sample"], java_script_enabled=False) as result:
        page = result.page
        assert page.get_by_text("This plot needs JavaScript").first.is_visible()
        assert page.get_by_text("53.5 to 68.5").first.is_visible()


def test_headings_and_tables_can_be_navigated(browser, pages):
    with opened(browser, pages["sample"]) as result:
        page = result.page
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("main").count() == 1
        rows = page.locator(".scroll").first.get_by_role("rowheader")
        assert rows.all_inner_texts()[:2] == ["base", "finetuned"]
        assert page.locator("th:not([scope])").count() == 0
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
        )
        assert all(b - a <= 1 for a, b in pairwise(levels))


def test_paper_gets_whole_plots_on_white(browser, pages, shots):
    with opened(browser, pages["sample"], color_scheme="dark") as result:
        page = result.page
        assert page.pdf(path=shots.folder and shots.folder / "report_sample.pdf", format="A4")
        assert page.locator(".paper").count() == 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        pictures = page.locator(".canvas > .paper").all()
        assert len(pictures) == N_PLOTS["sample"]
        for picture in pictures:
            corner = "c => [...c.getContext('2d').getImageData(4, 4, 1, 1).data]"
            assert picture.evaluate(corner) == [255, 255, 255, 255]
            assert picture.evaluate("c => c.offsetWidth <= c.parentElement.offsetWidth")
            assert picture.evaluate("c => !c.previousElementSibling.checkVisibility()")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator(".paper").count() == 0
