"""The whole workbench in Notebook 7 and in Voila: every panel opens, two of them are used."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.browser import labdriver
from tests.browser.conftest import missing
from tests.browser.labdriver import VOILA_ICONS, Lab
from tests.browser.steps import IDLE, LOAD, OPEN, use_two_panels

pytestmark = pytest.mark.browser

# what front-ends complain of while they start, with any notebook at all
OWN_DEFECTS = (
    "page error: Cannot read properties of undefined (reading 'schema')",  # Notebook's shortcuts
    "console: Error: The getter for the shared module is not a function",  # Voila's extensions
)


@pytest.fixture
def frontend(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Lab]]:
    """Start a front-end by name; its page must not have complained."""
    with ExitStack() as stack:
        started: list[Lab] = []

        def start(app: str) -> Lab:
            if not labdriver.installed(app):
                missing(f"{app} is not installed: pip install -e '.[dev]'")
            folder = tmp_path_factory.mktemp(app)
            server = stack.enter_context(labdriver.serving(folder, app))
            context = browser.new_context(viewport={"width": 1280, "height": 1700})
            stack.callback(context.close)
            context.set_default_timeout(60_000)
            started.append(Lab(server, context.new_page()))
            started[-1].watch()
            return started[-1]

        yield start
        for each in started:
            assert [line for line in each.trouble if not line.startswith(OWN_DEFECTS)] == []


def test_the_workbench_in_notebook_7(frontend, shots):
    notebook7 = frontend("notebook")
    book = notebook7.visit([LOAD, OPEN])
    book.run()
    out = book.output(1)
    answers = use_two_panels(out)
    assert answers == book.eval(
        "[said.text for said in wb.panels['Compare'].run_shown.said.values()]"
    )
    book.until(f"wb.state.token == 3 and {IDLE}")
    shots.take(out, "notebook7.png")
    book.exec("wb.close()")
    assert book.eval("len(_instances)") == book.eval("before")


def test_the_workbench_in_voila(frontend, shots):
    voila = frontend("voila")
    voila.allowed = (VOILA_ICONS,)
    body = voila.render([LOAD, OPEN])
    body.get_by_role("tab", name="Compare").wait_for()
    answers = use_two_panels(body)
    assert all(answers)
    assert answers[0] != answers[1]
    shots.take(body, "voila.png")
