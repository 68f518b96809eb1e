"""A stand-in for an NDIF server, in a process of its own, that speaks nnsight 0.8.1's protocol.

Requests and answers go through nnsight's own `RequestModel` and `ResponseModel`, models through its
`Remotable`; the web server is tornado, which Jupyter brings. The package is not importable in the
process: what a job needs must travel with it. ``--trouble`` makes it fail on purpose.

Start one with `serving`; run as a program it prints its port.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import argparse
import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import contextmanager
from pathlib import Path

KEY = "loopback-key-0123456789"


# ------------------------------------------------------------ for tests


@contextmanager
def serving(folder, models, *options, key=KEY):
    """Serve models that lie in a folder, as "org/name"; yields the address."""
    program = folder / "ndif_server_of_its_own.py"
    program.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-I", str(program), "--key", key, *options]
    for model in models:
        command += ["--model", model]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings.pop("NDIF_API_KEY", None)
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("PORT "), (folder / "server.log").read_text()
        yield f"http://127.0.0.1:{line.split()[1]}"
    finally:
        server.terminate()
        server.wait(20)


def requests_seen(address):
    """What the server was asked: one record a request, with the whole decompressed blob."""
    import httpx

    return httpx.get(f"{address}/_log").json()


def fetches(address):
    """Downloads of results: the byte that each began with, and the size."""
    import httpx

    return [tuple(each) for each in httpx.get(f"{address}/_fetched").json()]


def trouble(address, **kinds):
    """Make answers fail: lists for ``post``, ``poll`` (a status or "drop"), ``slow`` (seconds),
    ``blob`` (true breaks off half-way, "whole" knows no ranges, or a status), ``lag`` (seconds
    after each line printed), ``mute`` ("all", or what is logged instead), ``env`` (a version).

    Without any, end what trouble is left.
    """
    import httpx

    httpx.post(f"{address}/_trouble", json=kinds).raise_for_status()


# ------------------------------------------------------------ the server


class State:
    def __init__(self, models, key):
        self.models, self.key = models, key
        self.status, self.blobs, self.log, self.trouble = {}, {}, [], {}
        self.fetched = []
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def next_trouble(self, where):
        waiting = self.trouble.get(where) or []
        return waiting.pop(0) if waiting else None


class Printed(io.StringIO):
    """What a job prints becomes its status, as at NDIF; blank lines do not."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def write(self, text):
        if text.strip():
            self.log(text)
        return len(text)


def run_job(model, env, blob, compress, log):
    import torch
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.globals import BLOCKS, SOURCES
    from nnsight.tracing.tracer import _saves, dec, inc

    SOURCES.clear()  # both are keyed by the client's file names and never emptied
    BLOCKS.clear()
    model._remoteable_set_env(env)
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress)
    frame = tracer.info.frame
    inc()
    try:
        with contextlib.redirect_stdout(Printed(log)):
            tracer.execute(tracer.info.code)
        saved = {k: v for k, v in dict(frame.f_locals).items() if id(v) in _saves()}
    finally:
        dec()
    buffer = io.BytesIO()
    torch.save(saved, buffer)  # noqa: TID251  the protocol's own form
    out = buffer.getvalue()
    return zstandard.ZstdCompressor().compress(out) if compress else out


def application(state):
    import tornado.web
    from nnsight.ndif import get_local_env
    from nnsight.schema.request import RequestModel
    from nnsight.schema.response import ResponseModel, Status

    versions = get_local_env()

    class Base(tornado.web.RequestHandler):
        def troubled(self, where):
            """Fail as the test asked; True if it did."""
            kind = state.next_trouble(where)
            if kind is None:
                return False
            if kind == "drop":
                self.request.connection.stream.close()
            else:
                self.set_status(kind)
                self.finish({"detail": f"trouble {kind}"})
            return True

        def known(self):
            if self.request.headers.get("ndif-api-key") == state.key:
                return True
            self.set_status(401)
            self.finish({"detail": "Missing or invalid API key."})
            return False

    class Request(Base):
        def post(self):
            blob = self.request.files["blob"][0]["body"]
            request = RequestModel.model_validate_json(self.get_body_argument("data"))
            state.log.append(seen(request, blob, self.request.headers))
            if self.troubled("post") or not self.known():
                return
            if request.model_key not in state.models:
                self.set_status(404)
                self.finish({"detail": f"Model {request.model_key} is not deployed."})
                return
            job = str(uuid.uuid4())
            received = ResponseModel(id=job, status=Status.RECEIVED, description="received")
            state.status[job] = received
            self.finish(received.model_dump_json())
            root = f"{self.request.protocol}://{self.request.host}"
            self.waiting = asyncio.get_event_loop().create_task(self.run(request, job, blob, root))

        async def run(self, request, job, blob, root):
            loop = asyncio.get_event_loop()
            state.status[job] = ResponseModel(id=job, status=Status.RUNNING, description="running")
            await asyncio.sleep(state.next_trouble("slow") or 0)
            model = state.models[request.model_key]
            lag, mute = state.next_trouble("lag") or 0, state.next_trouble("mute")

            def log(text):
                if mute != "all":
                    state.status[job] = ResponseModel(
                        id=job, status=Status.LOG, description=mute or text
                    )
                time.sleep(lag)  # so that there is time to ask in between

            try:
                state.blobs[job] = await loop.run_in_executor(
                    state.pool, run_job, model, request.env, blob, request.compress, log
                )
            except BaseException as error:  # noqa: BLE001  whatever the job raised
                text = "".join(traceback.format_exception(error))
                state.status[job] = ResponseModel(id=job, status=Status.ERROR, description=text)
                return
            state.status[job] = ResponseModel(
                id=job, status=Status.COMPLETED, description="done", data=f"{root}/blob/{job}"
            )

    class Response(Base):
        def get(self, job):
            if self.troubled("poll") or not self.known():
                return
            if job not in state.status:
                self.set_status(404)
                self.finish({"detail": "no such job"})
                return
            self.finish(state.status[job].model_dump_json())

    class Blob(Base):
        async def get(self, job):
            content = state.blobs[job]
            assert "ndif-api-key" not in self.request.headers, "a presigned url needs no key"
            tag, kind = f'"{job}"', state.next_trouble("blob")
            wanted = self.request.headers.get("range", "")
            begin = 0
            if wanted and self.request.headers.get("if-range") == tag and kind != "whole":
                begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.set_status(206)
                last = len(content) - 1
                self.set_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
            state.fetched.append((begin, len(content)))
            if isinstance(kind, int) and kind > 1:
                self.set_status(kind)
                self.finish()
                return
            rest = content[begin:]
            self.set_header("Content-Length", str(len(rest)))
            self.set_header("Etag", tag)
            if kind and kind != "whole":  # half of it, then nothing
                self.write(rest[: len(rest) // 2])
                await self.flush()
                self.request.connection.stream.close()
                return
            self.finish(rest)

    class Deployed(Base):
        def get(self):
            found = {}
            for key in state.models:
                named = json.loads(key.split(":", 1)[1])
                found[key] = {"model_key": key, "repo_id": named["repo_id"],
                              "application_state": "RUNNING"}  # fmt: skip
            self.finish({"deployments": found})

    class Environment(Base):
        def get(self):
            other = state.next_trouble("env")
            packages = {**versions["packages"], **({"nnsight": other} if other else {})}
            self.finish({**versions, "packages": packages})

    class Log(Base):
        def get(self):
            self.finish(json.dumps(state.log))

    class Fetched(Base):
        def get(self):
            self.finish(json.dumps(state.fetched))

    class Trouble(Base):
        def post(self):
            state.trouble = json.loads(self.request.body)

    return tornado.web.Application(
        [
            (r"/request", Request),
            (r"/response/(.*)", Response),
            (r"/blob/(.*)", Blob),
            (r"/status", Deployed),
            (r"/env", Environment),
            (r"/_log", Log),
            (r"/_fetched", Fetched),
            (r"/_trouble", Trouble),
        ]
    )


def seen(request, blob, headers):
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress(blob) if request.compress else blob
    return {
        "model_key": request.model_key,
        "session_id": request.session_id,
        "env": request.env,
        "bytes": len(blob),
        "payload": raw.decode("latin-1"),
        "headers": {name: headers.get(name) for name in ("nnsight-version", "python-version")},
        "with_key": "ndif-api-key" in headers,
    }


async def main(options):
    import nnsight.modeling.huggingface as hub
    import torch
    import tornado.httpserver
    import tornado.netutil
    from nnsight.modeling.mixins.remotable import Remotable
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    models = {}
    for path in options.model:
        hub._ID_CACHE[path] = path
        named = json.dumps({"repo_id": path, "revision": None, "task": "text-generation"})
        key = f"nnsight.modeling.transformers.TransformersModel:{named}"
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = Remotable.from_model_key(
            key, tokenizer=tokenizer, dispatch=True, dtype=torch.float32
        )
        model._module.requires_grad_(False).eval()
        models[key] = model
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server = tornado.httpserver.HTTPServer(
        application(State(models, options.key)), max_buffer_size=1 << 30
    )
    server.add_sockets(sockets)
    sys.stdout.write(f"PORT {sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.modules["modeldiff"] = None  # pyright: ignore[reportArgumentType]  not installed here
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--key", default=KEY)
    asyncio.run(main(parser.parse_args()))
