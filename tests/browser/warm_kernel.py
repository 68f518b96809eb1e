"""Kernels that are there at once: each is forked from one process that has imported everything.

To Jupyter a kernel is the process ``warm_kernel.py start``. It asks ``warm_kernel.py serve`` for a
fork, and either ends when the other does. What a fork changes no other kernel sees. This file runs
by its path and imports only what every Python brings, as starting it is what costs time.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "warm"
_PR_SET_PDEATHSIG = 1
_SMALL = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"  # no thread before a fork


@contextmanager
def warm_kernels(folder: Path) -> Iterator[str]:
    """Offer them to a server whose data lies in a folder; the name of their specification."""
    spec = folder / "kernels" / NAME / "kernel.json"
    spec.parent.mkdir(parents=True)
    place = str(folder / "warm.sock")
    argv = [sys.executable, "-S", __file__, "start", place, "{connection_file}"]
    spec.write_text(
        json.dumps({"argv": argv, "display_name": NAME, "language": "python",
                    "interrupt_mode": "message"})
    )  # fmt: skip
    environment = {**os.environ, **dict.fromkeys(_SMALL, "1"), "HF_HUB_OFFLINE": "1",
                   "IPYTHONDIR": str(folder / "ipython")}  # fmt: skip
    with (folder / "warm.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", place],
            env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        yield NAME
    finally:
        server.kill()
        server.wait()


def die_with_parent() -> None:
    """Let the kernel of the system end this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(place: str, connection: str) -> None:
    """Be a kernel to Jupyter: a fork does the work, and both end together."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        line.sendall(json.dumps([connection, os.getcwd()]).encode() + b"\n")
        line.recv(1)


def serve(place: str) -> None:
    """Import everything, then fork whenever somebody asks."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen(16)  # whoever asks early waits in line
        _import_everything()
        while True:
            line, _ = door.accept()
            _forget_the_ended()
            if os.fork() == 0:
                door.close()
                _be_a_kernel(line)
            line.close()


def _forget_the_ended() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _import_everything() -> None:
    from importlib import import_module

    for name in ("bokeh.plotting", "ipykernel.kernelapp", "modeldiff_widgets", "peft"):
        import_module(name)
    import modeldiff as md

    md.ModelPair.load("organism:em-rank1").generate(["I"], max_new_tokens=1)


def _be_a_kernel(line: socket.socket) -> None:
    from ipykernel.kernelapp import IPKernelApp

    die_with_parent()
    connection, folder = json.loads(line.makefile("r").readline())
    os.chdir(folder)
    threading.Thread(target=_follow, args=[line], daemon=True).start()
    sys.argv = ["ipykernel_launcher", "-f", connection]
    IPKernelApp.launch_instance(sys.argv[1:])
    os._exit(0)


def _follow(line: socket.socket) -> None:
    line.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    {"start": start, "serve": serve}[sys.argv[1]](*sys.argv[2:])
