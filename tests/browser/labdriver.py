"""JupyterLab in a browser, for tests: one server and one page, a notebook of its own per test.

Everything is isolated: settings, data, run-time files and the IPython folder lie in a temporary
folder, the port and the token are random, and the server dies with the process that started it.
"""

import ast
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.browser.warm_kernel import die_with_parent

SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {
        "windowingMode": "none", "autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}  # fmt: skip
APPS = {
    "lab": ("jupyterlab", "LabApp", "lab"),
    "notebook": ("notebook", "JupyterNotebookApp", "tree"),
    "voila": ("voila", "Voila", ""),
}
"""Front-ends by name: module, class of its options, and first page."""
VOILA_ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/fontawesome-free@"
"""What Voila's own template asks for: the icons of buttons."""
NOISE = ("Failed to load resource", "willReadFrequently", "favicon", "debugger state")
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}

PAGE: dict[str, Any] = {
    "exposeAppInBrowser": True,  # Notebook 7 forgets its option
    # removes itself twice where the theme changes twice in 200 ms
    "disabledExtensions": {"@jupyterlab/apputils-extension:splash": True},
}
_OPEN = """async ([path, kernel]) => {
  const widget = await jupyterapp.commands.execute("docmanager:open",
    {path, factory: "Notebook", kernel: {name: kernel}});
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
  await widget.revealed;
  window.mdNotebooks = {...(window.mdNotebooks ?? {}), [path]: widget};
  return widget.id;
}"""
_TAKE = """async path => {
  const widget = jupyterapp.shell.currentWidget;
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
  window.mdNotebooks = {[path]: widget};
  return widget.id;
}"""
_RUN = """async ([path, only]) => {
  const widget = mdNotebooks[path];
  const {kernel} = widget.sessionContext.session;
  for (const cell of widget.content.widgets) {
    const i = widget.content.widgets.indexOf(cell);
    if (cell.model.type !== "code" || (only !== null && only !== i)) continue;
    widget.content.activeCellIndex = i;
    await jupyterapp.commands.execute("notebook:run-cell");
    await kernel.requestKernelInfo();
  }
  return widget.content.widgets.flatMap(cell => cell.model.outputs?.toJSON?.() ?? [])
    .filter(output => output.output_type === "error").map(output => output.traceback.join("\\n"));
}"""
_ASK = """async ([path, code, expression]) => {
  const {kernel} = mdNotebooks[path].sessionContext.session;
  const future = kernel.requestExecute({code, silent: false, store_history: false,
    stop_on_error: false, user_expressions: expression ? {answer: expression} : {}});
  const {content} = await future.done;
  if (content.status === "error") return {error: content.traceback.join("\\n")};
  return content.user_expressions?.answer ?? {};
}"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running Jupyter server."""

    url: str
    token: str
    root: Path
    process: Any


def installed(app: str) -> bool:
    """Whether a front-end can be started here."""
    return find_spec(APPS[app][0]) is not None


@contextmanager
def serving(folder: Path, app: str = "lab") -> Iterator[Server]:
    """Start a server whose every file lies below a folder; end it and its kernels."""
    first = APPS[app][2]
    root, settings = folder / "notebooks", folder / "settings"
    root.mkdir(parents=True)
    for name, values in SETTINGS.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    page = folder / "config" / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps(PAGE))
    isolated = {
        f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    environment = {
        **os.environ, **isolated, "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", APPS[app][0], *_options(app, port, token, root)]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent
    )
    probe = "" if app == "voila" else "api/status"
    try:
        _await(f"http://127.0.0.1:{port}/{probe}?token={token}", process, folder / "server.log")
        yield Server(f"http://127.0.0.1:{port}/{first}", token, root, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _options(app: str, port: int, token: str, root: Path) -> list[str]:
    """The command line of a front-end."""
    if app == "voila":
        return [
            "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", f"--token={token}",
            "--Voila.port_retries=0", f"--Voila.root_dir={root}", str(root),
        ]  # fmt: skip
    return [
        "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
        f"--{APPS[app][1]}.expose_app_in_browser=True",
        f"--{APPS[app][1]}.extension_manager=readonly",
    ]  # fmt: skip


def _await(url: str, process: Any, log: Path, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"no answer from the server: {log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True)
class Shots:
    """Pictures to look at; they take long, so that none is taken where nobody wants them."""

    folder: Path | None

    @property
    def wanted(self) -> bool:
        """Whether somebody named a folder for them."""
        return self.folder is not None

    def take(self, what: Any, name: str, **options: Any) -> None:
        """Take an element or a page."""
        if self.folder is not None:
            what.screenshot(path=self.folder / name, **options)


@dataclass
class Lab:
    """The one page of a server, and everything it did that it should not."""

    server: Server
    page: Any
    trouble: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()
    """Beginnings of addresses elsewhere that a front-end itself asks for."""
    expected: tuple[str, ...] = ()
    """Complaints of the console that a test provokes."""
    seen: list[str] = field(default_factory=list)
    """Those of them that came."""
    kernel: str = "python3"
    """What runs its notebooks."""

    def watch(self) -> None:
        """Note page errors, complaints of the console and requests that leave this machine."""
        self.page.on("pageerror", lambda error: self.trouble.append(f"page error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.on("dialog", self._dialog)

    def start(self, *, reset: bool = True) -> None:
        """Load the page and wait until its app is there; at first with an empty workspace."""
        self.page.goto(f"{self.server.url}?token={self.server.token}{'&reset' * reset}")
        self.page.wait_for_function(
            "() => window.jupyterapp && document.querySelector('#jp-main-dock-panel, #main')"
        )
        self.page.evaluate("() => jupyterapp.restored")
        self.page.evaluate("() => jupyterapp.shell.collapseLeft?.()")

    def theme(self, name: str) -> None:
        """Switch to "light" or "dark"."""
        wanted = "true" if name == "light" else "false"
        self.page.evaluate(
            "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[name]
        )
        self.page.wait_for_function("w => document.body.dataset.jpThemeLight === w", arg=wanted)

    def open(self, cells: list[str], name: str = "") -> "Notebook":
        """Write a notebook of code cells, open it and wait for its kernel."""
        path = f"{name or 'test'}_{secrets.token_hex(4)}.ipynb"
        write_notebook(self.server.root / path, cells)
        return self.attach(path)

    def attach(self, path: str) -> "Notebook":
        """Open a notebook that is there."""
        identity = self.page.evaluate(_OPEN, [path, self.kernel])
        return Notebook(self, path, identity)

    def visit(self, cells: list[str]) -> "Notebook":
        """Open a notebook of code cells as a page of its own, as Notebook 7 does."""
        path = f"test_{secrets.token_hex(4)}.ipynb"
        write_notebook(self.server.root / path, cells)
        home = self.server.url.rsplit("/", 1)[0]
        self.page.goto(f"{home}/notebooks/{path}?token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        return Notebook(self, path, self.page.evaluate(_TAKE, path))

    def render(self, cells: list[str]) -> Any:
        """Let Voila run a notebook of code cells; returns the page's body."""
        path = f"test_{secrets.token_hex(4)}.ipynb"
        write_notebook(self.server.root / path, cells)
        self.page.goto(f"{self.server.url}voila/render/{path}?token={self.server.token}")
        return self.page.locator("body")

    def _console(self, message: Any) -> None:
        if message.type != "error" or any(noise in message.text for noise in NOISE):
            return
        provoked = any(words in message.text for words in self.expected)
        (self.seen if provoked else self.trouble).append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        local = ("http://127.0.0.1:", "ws://127.0.0.1:", "blob:", "data:", "about:")
        if not request.url.startswith((*local, *self.allowed)):
            self.trouble.append(f"asked for {request.url}")

    def _dialog(self, dialog: Any) -> None:
        self.trouble.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@dataclass
class Notebook:
    """A notebook that is open in a `Lab`."""

    lab: Lab
    path: str
    identity: str

    @property
    def panel(self) -> Any:
        """The notebook's part of the page."""
        return self.lab.page.locator(f"[id='{self.identity}']")

    def run(self, only: int | None = None) -> None:
        """Run all cells, or one; an error in a cell is an error here."""
        errors = self.lab.page.evaluate(_RUN, [self.path, only])
        if errors:
            raise AssertionError("\n".join(errors))

    def output(self, index: int) -> Any:
        """What a cell printed and showed."""
        return self.panel.locator(".jp-Cell").nth(index).locator(".jp-Cell-outputArea")

    def eval(self, expression: str) -> Any:
        """Evaluate in the kernel; the value must be JSON-able."""
        code = f"__import__('json').dumps({expression})"
        answer = self.lab.page.evaluate(_ASK, [self.path, "", code])
        if "error" in answer or answer.get("status") == "error":
            raise AssertionError(f"{expression}: {answer}")
        return json.loads(ast.literal_eval(answer["data"]["text/plain"]))

    def exec(self, code: str) -> None:
        """Run code in the kernel outside of any cell."""
        answer = self.lab.page.evaluate(_ASK, [self.path, code, ""])
        if "error" in answer:
            raise AssertionError(answer["error"])

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Evaluate in the kernel again and again until the value is true; returns it."""
        end = time.monotonic() + seconds
        while not (value := self.eval(expression)):
            if time.monotonic() > end:
                raise AssertionError(f"{expression} is still {value!r} after {seconds} s")
            self.lab.page.wait_for_timeout(50)
        return value

    def shoot(self, shots: "Shots", name: str, index: int = 0, *, high: int = 0) -> None:
        """Take a cell's output in both themes, on a page so high that all of it is seen."""
        if not shots.wanted:
            return
        page, size = self.lab.page, self.lab.page.viewport_size
        page.set_viewport_size({**size, "height": max(high, size["height"])})
        page.mouse.move(0, 0)
        for theme in THEMES:
            self.lab.theme(theme)
            page.wait_for_timeout(900)
            shots.take(self.output(index), f"{name}_{theme}.png")
        self.lab.theme("light")
        page.set_viewport_size(size)

    @contextmanager
    def narrow(self, width: int) -> Iterator[None]:
        """Look at it on a narrow page."""
        size = self.lab.page.viewport_size
        self._resize({**size, "width": width})
        yield
        self._resize(size)

    def _resize(self, size: dict[str, int]) -> None:
        page = self.lab.page
        page.set_viewport_size(size)
        page.wait_for_function(
            "([id, most]) => document.getElementById(id).clientWidth <= most",
            arg=[self.identity, size["width"]],
        )

    def save(self) -> dict[str, Any]:
        """Write the file and return what it holds."""
        self.lab.page.evaluate("path => mdNotebooks[path].context.save()", self.path)
        return json.loads((self.lab.server.root / self.path).read_text(encoding="utf-8"))

    def reopened(self, *, kernel: bool = True) -> "Notebook":
        """Save it, load the page again and open it; with the kernel that it had, or a new one."""
        self.save()
        page, path = self.lab.page, self.path
        if not kernel:
            page.evaluate("path => mdNotebooks[path].sessionContext.shutdown()", path)
        self.lab.start(reset=False)
        again = self.lab.attach(path)
        self.identity = again.identity
        return again

    def restart(self) -> None:
        """Restart its kernel."""
        self.lab.page.evaluate(
            "path => mdNotebooks[path].sessionContext.session.kernel.restart()", self.path
        )

    def dispose(self) -> None:
        """Close it and end its kernel."""
        self.lab.page.evaluate(
            """async path => {
              const widget = mdNotebooks[path];
              delete mdNotebooks[path];
              await widget.sessionContext.shutdown();
              widget.dispose();
            }""",
            self.path,
        )


def write_notebook(path: Path, cells: list[str]) -> None:
    """Write a notebook of code cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    found = [
        {"cell_type": "code", "id": f"cell{i}", "metadata": {}, "execution_count": None,
         "outputs": [], "source": source}
        for i, source in enumerate(cells)
    ]  # fmt: skip
    path.write_text(
        json.dumps(
            {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
        )
    )


# a model as anywidget gives it to a module, on a page without Jupyter
_FAKE = """
window.mdModels = {}; window.mdModules = {}; window.mdSent = [];
window.mdModel = (name, state) => {
  const listeners = [];
  const fire = (event, ...values) => listeners.filter(l => l[0] === event)
    .forEach(l => l[1](...values));
  const split = events => events.split(" ");
  return mdModels[name] = {
    state, get: key => state[key],
    set: (key, value) => { state[key] = value; fire(`change:${key}`, null, value); },
    save_changes: () => {}, send: content => mdSent.push([name, content]),
    on: (events, callback) => split(events).forEach(e => listeners.push([e, callback])),
    off: (events, callback) => split(events).forEach(e => {
      const at = listeners.findIndex(l => l[0] === e && l[1] === callback);
      if (at >= 0) listeners.splice(at, 1);
    }),
    receive: (content, buffers = []) => fire("msg:custom", content, buffers),
    get listening() { return listeners.length; },
  };
};
window.mdMount = async (name, source, state) => {
  const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
  const module = (await import(url)).default;
  const model = mdModel(name, state);
  const el = document.createElement("div");
  el.id = name;
  document.body.append(el);
  await module.initialize?.({model});
  mdModules[name] = {dispose: await module.render({model, el}), module, model, el};
};
"""


@dataclass
class Bare:
    """A page that holds modules of the front-end and nothing else."""

    page: Any
    trouble: list[str] = field(default_factory=list)

    def start(self, dark: bool = False) -> None:
        """Make the page empty."""
        self.page.on("pageerror", lambda error: self.trouble.append(f"page error: {error}"))
        self.page.on("dialog", lambda box: (self.trouble.append(box.message), box.dismiss()))
        self.page.on("console", lambda m: m.type == "error" and self.trouble.append(m.text))
        self.page.on("request", lambda r: r.url.startswith("http") and self.trouble.append(r.url))
        self.page.set_content("<!doctype html><body style='margin:16px'></body>")
        self.page.evaluate(f"() => {{{_FAKE}}}")

    def mount(self, name: str, module: Path, css: str, state: dict[str, Any]) -> Any:
        """Render a module with a model of this state; returns its element."""
        self.page.add_style_tag(content=css)
        source = module.read_text(encoding="utf-8")
        self.page.evaluate("a => mdMount(...a)", [name, source, state])
        return self.page.locator(f"#{name}")

    def set(self, name: str, key: str, value: Any) -> None:
        """Change a trait of a model, as the kernel would."""
        self.page.evaluate("([n, k, v]) => mdModels[n].set(k, v)", [name, key, value])

    def receive(self, name: str, content: Any) -> None:
        """Let a model receive a message of the kernel."""
        self.page.evaluate("([n, c]) => mdModels[n].receive(c)", [name, content])

    def sent(self) -> list[Any]:
        """What all models sent to the kernel."""
        return self.page.evaluate("mdSent")
