import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import labdriver
from tests.browser.labdriver import Bare, Lab, Notebook, Shots
from tests.browser.steps import unreadable
from tests.browser.warm_kernel import warm_kernels

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
OFFLINE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


def missing(what: str) -> None:
    """Skip on a laptop; fail where the browser is part of what must pass."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium that can reach nothing but this machine."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install playwright")
        return
    if not CHROMIUM.exists():
        missing(f"no browser at {CHROMIUM}: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=OFFLINE)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def shots() -> Shots:
    """Screenshots go to the folder MODELDIFF_SHOTS, to be looked at; without it none is taken."""
    if "MODELDIFF_SHOTS" not in os.environ:
        return Shots(None)
    folder = Path(os.environ["MODELDIFF_SHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    return Shots(folder)


@pytest.fixture(scope="session")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a server of its own, in one page."""
    if not labdriver.installed("lab"):
        missing("JupyterLab is not installed: pip install -e '.[lab]'")
    folder = tmp_path_factory.mktemp("lab")
    with warm_kernels(folder / "data") as kernel, labdriver.serving(folder) as server:
        context = browser.new_context(viewport={"width": 1280, "height": 1700})
        context.set_default_timeout(20_000)
        one = Lab(server, context.new_page(), kernel=kernel)
        one.watch()
        one.start()
        yield one
        context.close()


@pytest.fixture
def notebook(lab: Lab) -> Iterator[Callable[..., Notebook]]:
    """Open notebooks of code cells; they are closed, and the page must not have complained."""
    opened: list[Notebook] = []
    lab.trouble.clear()
    lab.expected = ()

    def make(*cells: str, run: bool = True) -> Notebook:
        opened.append(lab.open(list(cells)))
        if run:
            opened[-1].run()
        return opened[-1]

    yield make
    for theme in ("dark", "light"):  # whatever a test leaves is drawn in both
        lab.theme(theme)
        poor = [found for each in opened for found in unreadable(each)]
        assert poor == [], theme
    for each in opened:
        each.dispose()
    assert lab.trouble == []


@pytest.fixture
def bare(browser: Any) -> Iterator[Bare]:
    """A page without Jupyter that mounts the front-end's modules on models of our own."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = Bare(context.new_page())
    page.start()
    yield page
    context.close()
    assert page.trouble == []
