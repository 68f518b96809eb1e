"""What a person does in the workbench, in whichever front-end shows it."""

import re
from typing import Any

LOAD = """
import modeldiff as md
from ipywidgets.widgets.widget import _instances
from modeldiff_widgets import Workbench
pair = md.ModelPair.load("organism:em-rank1")
before = len(_instances)
"""
OPEN = "wb = Workbench(pair)\nwb"
TABS = (
    "Compare", "Behaviour", "Tokens", "Steer and ablate", "Layer map", "Patch map", "Directions",
    "Lens", "LoRA lab", "Checkpoints", "Latents", "Training", "Chat", "CAFT",
)  # fmt: skip
IDLE = "not wb.jobs.current and not wb.jobs.n_waiting and wb.bar.error == ['', '']"
_TOO_WIDE = """e => [...e.querySelectorAll('.mdw *')].filter(c => c.checkVisibility()
  && !c.closest('.mdw-scroll, .mdw-code, .mdw-bokeh')
  && c.getBoundingClientRect().right > e.getBoundingClientRect().right + 1)
  .map(c => c.className)"""
_UNNAMED = """e => [...e.querySelectorAll(
  '.mdw :is(button, input, select, textarea, [role=slider], [role=tab])')]
  .filter(c => c.checkVisibility() && !c.textContent.trim() && !c.title && !c.ariaLabel
    && !c.getAttribute('aria-labelledby') && ![...c.labels ?? []].some(l => l.textContent.trim())
    && !c.placeholder && !c.matches('[role=slider]'))
  .map(c => c.outerHTML.slice(0, 120))"""

# every piece of text against the colours that lie under it, as WCAG 2 computes contrast
POOR_CONTRAST = """(root = document.body) => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    return text.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  const light = rgb => rgb.map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  const walker = document.createTreeWalker(root ?? document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest('option, style, :disabled')) continue;
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(e);
    const paper = chain.map(e => parse(getComputedStyle(e).backgroundColor))
      .reduce((below, colour) => over(colour, below), [255, 255, 255]);
    const ink = over(parse(getComputedStyle(element).color), paper);
    const [a, b] = [light(paper), light(ink)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const words = walker.currentNode.data.slice(0, 40);
    const needed = element.closest("[aria-hidden=true]") ? 3 : 4.5;
    if (ratio < needed) poor.push([ratio.toFixed(2), element.className, words]);
  }
  return poor;
}"""


def go_to(out: Any, title: str) -> None:
    """Bring a panel to the front; nothing in it may stick out or be without a name."""
    tab = out.get_by_role("tab", name=title, exact=True)
    tab.click()
    tab.and_(out.locator(".lm-mod-current")).wait_for()
    in_place(out, title)


def in_place(out: Any, title: str = "") -> None:
    """Nothing may stick out or be without a name."""
    assert out.evaluate(_TOO_WIDE) == [], title
    assert out.evaluate(_UNNAMED) == [], title


def unreadable(book: Any) -> list[Any]:
    """Texts of a notebook's panels and pins whose contrast is too low."""
    several = book.panel.locator(".mdw-frame, .mdw-static").all()
    return [found for each in several for found in each.evaluate(POOR_CONTRAST)]


def press(out: Any, name: str) -> None:
    """Click a button of the panel in front."""
    out.get_by_role("button", name=re.compile(rf"(^|\W){name}$")).first.click()


def finished(out: Any, label: str) -> None:
    """Wait until the job bar says that this job is done."""
    out.get_by_role("status").get_by_text(f"done: {label}", exact=True).wait_for(timeout=30_000)


def use_two_panels(out: Any) -> list[str]:
    """Open every panel, let both models answer, read the answer token by token; the answers."""
    for title in TABS:
        go_to(out, title)
    go_to(out, "Compare")
    press(out, "Generate")
    finished(out, "compare")
    answers = out.locator(".mdw-answers .words")
    assert answers.count() == 2
    go_to(out, "Tokens")
    press(out, "Compare tokens")
    finished(out, "compare tokens")
    token = out.locator(".mdw-pair:visible .t").nth(3)
    token.click()
    out.get_by_text("fine-tuned says").wait_for()
    assert out.get_by_role("alert").count() == 0
    return answers.all_text_contents()
