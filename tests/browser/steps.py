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
    && !c.getAttribute('aria-labelledby') && !c.labels?.length && !c.placeholder
    && !c.closest('.mdw-field, [title]'))
  .map(c => c.outerHTML.slice(0, 120))"""


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
