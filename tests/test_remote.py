"""Remote pairs without a server: what is packed, what is kept, and what every trouble says."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import io
import json
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from functools import cache
from types import SimpleNamespace

import httpx
import pytest
import torch
import zstandard

from modeldiff import patch_runs, remote_jobs, remote_patching, tracing
from modeldiff._progress import watched
from modeldiff.batching import make_batch
from modeldiff.directions import Direction
from modeldiff.divergence import unembedding
from modeldiff.editing import Editor, Group
from modeldiff.errors import Cancelled, InterventionError, MismatchError, RemoteError
from modeldiff.interventions import Ablate, Cell, Plan, Replace, Steer
from modeldiff.logit_lens import logit_lens
from modeldiff.models import ModelPair
from modeldiff.patch_runs import Metric
from modeldiff.patching import logit_difference
from modeldiff.remote_generation import Heard, _sampler
from modeldiff.remote_http import Line
from modeldiff.remote_jobs import Server, run_job
from modeldiff.remote_kept import content_key
from modeldiff.remote_lenses import last_logprobs, likeliest, tokens_compared
from modeldiff.sampling import Sampler, noise
from modeldiff.sites import Site
from tests.families import WIDTH, model, peft_model, tokenizer

KEY = "a-key-that-no-one-may-see"
HOST = "https://models.example"
TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("remote")
    model("llama").save_pretrained(at / "base")
    tokenizer().save_pretrained(at / "base")
    peft_model().save_pretrained(at / "adapters")
    return at


@pytest.fixture
def pair(folder, tmp_path):
    server = Server(HOST, tries=3, pause=0.0, keep=tmp_path)
    return ModelPair.load(folder / "base", adapter=folder / "adapters" / "tuned", remote=server)


def direction(seed=0, site="resid_post.1"):
    return Direction.of(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), site, "d"
    )


class Web:
    """Answers requests from a list; each answer is (status, body), an exception or a function."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.asked = list(answers), []
        monkeypatch.setattr(httpx, "request", self.request)
        monkeypatch.setattr(httpx, "stream", self.stream)
        monkeypatch.setattr(httpx, "get", self.get)
        monkeypatch.setenv("NDIF_API_KEY", KEY)
        remote_jobs._CHECKED.clear()
        self.env = {"packages": {"nnsight": "0.8.1"}}

    def get(self, url, **options):
        body = self.env if url.endswith("/env") else {"deployments": {"x": {"repo_id": "org/it"}}}
        return httpx.Response(200, json=body)

    def request(self, method, url, **options):
        self.asked.append((method, url, options))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        status, body, *headers = answer
        return httpx.Response(
            status,
            headers=headers[0] if headers else None,
            **({"json": body} if isinstance(body, dict) else {"content": body}),
        )

    @contextmanager
    def stream(self, method, url, **options):
        yield self.request(method, url, **options)

    def sent(self):
        return [url for method, url, _ in self.asked if method == "POST"]


RECEIVED = (200, {"id": "job", "status": "RECEIVED"})
RUNNING = (200, {"id": "job", "status": "RUNNING"})
DONE = (200, {"id": "job", "status": "COMPLETED", "data": "https://store.example/blob?signature=x"})


def result(value):
    buffer = io.BytesIO()
    torch.save({"found": value}, buffer)  # noqa: TID251  the protocol's own form
    return 200, zstandard.ZstdCompressor().compress(buffer.getvalue())


def packed():
    return tracing.Packed('Model:{"repo_id": "org/asked"}', "{}", b"blob")


def do(server, asked="what", cancel=None):
    return run_job(server, asked, packed, cancel)


# ------------------------------------------------------------ what is packed


def payloads(pair, monkeypatch, call):
    """The decompressed payloads of the jobs that a call would send."""
    sent = []

    def refuse(server, asked, pack, cancel, log):
        sent.append(pack())
        raise RemoteError("not sent")

    monkeypatch.setattr("modeldiff.remote_runs.run_job", refuse)
    with pytest.raises(RemoteError, match="not sent"):
        call(pair)
    return [(one, zstandard.ZstdDecompressor().decompress(one.blob)) for one in sent]


def patched(pair, metric):
    (text,) = pair.texts(TEXTS[:1])
    values = torch.zeros(text.n_tokens, WIDTH)
    own = patch_runs.Trace("finetuned", text, {"resid_post.1": values}, {})
    cells = [patch_runs.Cell(patch_runs.Component("resid_post", 1), (0,), values + 1)]
    return remote_patching.scores(pair.sides, own, cells, metric)


CALLS = {
    "run": lambda pair: pair.run(TEXTS, do=Steer(direction()) + Ablate(direction(1))),
    "capture": lambda pair: pair.capture(TEXTS, ["resid_post.1", "lora.1.mlp.down_proj"]),
    "outputs": lambda pair: pair.output_diff(TEXTS),
    "generate": lambda pair: pair.generate(TEXTS, do=Steer(direction()), max_new_tokens=3,
                                           cancel=threading.Event(),
                                           on_step=lambda got: None),
    "lens": lambda pair: logit_lens(pair.sides, direction()),
    "tokens": lambda pair: tokens_compared(pair.sides, Cell("finetuned"), Cell("base"),
                                           torch.zeros(2, WIDTH), torch.zeros(2, WIDTH),
                                           torch.tensor([1, 2]), 3, 1 << 20),
    "likeliest": lambda pair: likeliest(pair.sides, torch.zeros(1, WIDTH), "finetuned"),
    "patchscope": lambda pair: last_logprobs(pair.sides, make_batch(pair.texts(["why"]), 0),
                                             "finetuned", Plan()),
    "patch": lambda pair: patched(pair, logit_difference(1, 2)),
    "patch of one's own": lambda pair: patched(pair, Metric("own", lambda x: x[:, 0, 0])),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_payload_is_source_and_tensors_and_tells_nothing_of_this_machine(
    pair, folder, monkeypatch, name
):
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    ((job, raw),) = payloads(pair, monkeypatch, CALLS[name])
    ids = [str(folder / "base"), str(folder / "adapters" / "tuned")]  # here hub ids are folders
    for known in ids:
        raw = raw.replace(known.encode(), b"org/id")
    places = [str(folder), sys.prefix, str(remote_jobs.__file__).rsplit("/", 2)[0]]
    for secret in (KEY, "_thread", "ipywidgets", "threading", *places):
        assert secret.encode() not in raw, secret
    assert b"def _visited" in raw or b"def _chosen" in raw
    routed = json.loads(job.metadata)
    assert routed["env"]["peft"] == ids[1]
    assert KEY not in repr(job)
    assert KEY not in repr(pair.sides)


def test_the_base_travels_without_the_adapter(pair, monkeypatch):
    ((job, _),) = payloads(pair, monkeypatch, lambda pair: pair.run(TEXTS, side="base"))
    assert "peft" not in json.loads(job.metadata)["env"]


def test_nothing_is_loaded_and_nothing_is_silently_run_here(pair):
    assert {p.device.type for root in pair.sides.roots for p in root.parameters()} == {"meta"}
    assert pair.digests["base"] != pair.digests["finetuned"]
    assert [str(site) for site in pair.sides.lora] == [f"lora.{i}.mlp.down_proj" for i in (1, 2)]
    with pytest.raises(RemoteError, match="on a server"), pair.sides.on("base"):
        pass
    with pytest.raises(RemoteError, match="on a server"):
        unembedding(pair.sides.roots[0], pair.sides.site_map)
    with pytest.raises(RemoteError, match="a graph cannot travel"):
        pair.run(TEXTS, grad=True)


def test_logits_beyond_reason_do_not_travel(pair, monkeypatch):
    monkeypatch.setattr("modeldiff.remote_runs.LARGEST", 1000)
    with pytest.raises(RemoteError, match="logits=False"):
        pair.run(TEXTS)


def test_what_a_request_cannot_say_is_refused_at_load(folder):
    tuned = folder / "adapters" / "tuned"
    with pytest.raises(MismatchError, match="takes one adapter"):
        ModelPair.load(folder / "base", adapter={"a": tuned}, remote=HOST)
    with pytest.raises(MismatchError, match="by repository alone"):
        ModelPair.load(folder / "base", adapter=tuned, revision="abc", remote=HOST)
    with pytest.raises(RemoteError, match="begins with"):
        ModelPair.load(folder / "base", adapter=tuned, remote="localhost:1")


@cache
def cached():
    return 1


cached.__module__ = "modeldiff.somewhere"


def test_classes_of_the_package_cannot_travel():
    buffer = io.BytesIO()
    with pytest.raises(RemoteError, match="cannot travel"):
        tracing._Pickler(buffer, protocol=4).dump({"site": Site("resid_post", 1)})
    for named in (Site.parse, cached):  # a mere name that no server knows
        with pytest.raises(RemoteError, match="cannot travel"):
            tracing._Pickler(io.BytesIO(), protocol=4).dump({"call": named})


def test_source_that_changed_under_a_running_python_does_not_travel(monkeypatch):
    """An upgrade below a kernel that runs: the lines at the old place are of something else."""
    load, arguments = object(), ("def something_else(x):\n    return x", "n", (), {}, None, "", 1)
    monkeypatch.setattr(
        tracing.CustomCloudPickler, "_dynamic_function_reduce",
        lambda self, func: (load, arguments),
    )  # fmt: skip
    with pytest.raises(RemoteError, match="Restart Python"):
        tracing._Pickler(io.BytesIO(), protocol=4)._dynamic_function_reduce(content_key)


def test_a_copied_tensor_must_be_of_the_same_batch(pair):
    batch = make_batch(pair.texts(TEXTS), 0)
    plan = Plan((Replace("resid_post.1", torch.zeros(3, 99, WIDTH)),))
    editor = Editor(batch, (Group((0, 3), plan, pair.sides.shape("base")),))
    with pytest.raises(InterventionError, match="same batch"):
        editor.program(pair.sides.site_map)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_travelling_sampler_draws_the_same_tokens(temperature):
    uniform = torch.stack([noise(0, [row], 0, 4) for row in range(5)])
    here, there = Sampler(uniform, temperature), _sampler(uniform, temperature, 7)
    for step in range(4):
        ids, scores = torch.zeros(5, 7 + step), torch.randn(5, 300)
        assert torch.equal(here(ids, scores), there(ids, scores))
    with pytest.raises(ValueError, match="NaN at generated token 1"):
        there(torch.zeros(5, 8), torch.full((5, 300), torch.nan))


# ------------------------------------------------------------ one job


def test_a_job_is_sent_asked_after_and_fetched(monkeypatch, tmp_path):
    web = Web(monkeypatch, RECEIVED, (404, {}), RUNNING, DONE, result({"h": torch.arange(3.0)}))
    told = []
    server = Server(HOST, keep=tmp_path, status=told.append)
    assert torch.equal(do(server)["h"], torch.arange(3.0))
    assert told == ["RECEIVED", "RUNNING", "COMPLETED"]
    methods = [(method, url.partition("?")[0]) for method, url, _ in web.asked]
    assert methods[0] == ("POST", f"{HOST}/request")
    assert methods[1:4] == [("GET", f"{HOST}/response/job")] * 3
    assert methods[4] == ("GET", "https://store.example/blob")
    headers = web.asked[0][2]["headers"]
    assert (headers["ndif-api-key"], headers["nnsight-version"]) == (KEY, "0.8.1")
    names = {name.lower() for name in web.asked[4][2]["headers"]}
    assert names == {"accept-encoding"}, "the key must not go to where the result lies"


def test_a_finished_job_is_not_run_again(monkeypatch, tmp_path):
    value = {"n": 3, "by": {7: {"x": (torch.ones(2), 1.5)}}, "none": None, "empty": {}}
    Web(monkeypatch, RECEIVED, DONE, result(value))
    server = Server(HOST, keep=tmp_path)
    first, second = do(server), do(server)
    assert first["by"][7]["x"][1] == second["by"][7]["x"][1] == 1.5
    assert torch.equal(second["by"][7]["x"][0], torch.ones(2))
    assert (second["n"], second["none"], second["empty"]) == (3, None, {})
    (file,) = (tmp_path / "jobs").iterdir()  # and no note of a job under way
    file.write_bytes(b"damaged")
    Web(monkeypatch, RECEIVED, DONE, result({"n": 4}))
    assert do(server)["n"] == 4


def test_keys_are_made_of_content():
    a = {"x": torch.arange(3.0), "y": [1, ("a", None)]}
    assert content_key(a) == content_key({"x": torch.arange(3.0), "y": [1, ("a", None)]})
    others = [
        {"x": torch.arange(3.0), "y": [1, ("b", None)]},
        {"x": torch.arange(3), "y": [1, ("a", None)]},
        {"x": torch.arange(3.0)[None], "y": [1, ("a", None)]},
        {"x": torch.tensor([0.0, 1.0, 2.5]), "y": [1, ("a", None)]},
    ]
    assert len({content_key(each) for each in (a, *others)}) == 5


@pytest.mark.parametrize(
    "trouble",
    [
        [(503, {"detail": "busy"}), (502, b"<html>"), RECEIVED, DONE],
        [httpx.ConnectError("no"), RECEIVED, DONE],
        [RECEIVED, httpx.ReadError("gone"), (500, {}), RUNNING, DONE],
        [RECEIVED, DONE, httpx.RemoteProtocolError("peer closed"), httpx.ReadTimeout("slow")],
    ],
)
def test_what_passes_is_tried_again(monkeypatch, tmp_path, trouble):
    web = Web(monkeypatch, *trouble, result({"n": 1}))
    assert do(Server(HOST, tries=3, pause=0.0, keep=tmp_path))["n"] == 1
    assert web.answers == []


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(401, {"detail": "Missing or invalid API key."})], "refused the key .401: Missing"),
        ([(404, {"detail": "not deployed"})], "does not run org/asked .404.*It runs org/it"),
        ([(413, b"too large")], "too large"),
        ([(400, {"detail": "bad request"})], "answered 400: bad request"),
        ([(503, {"detail": "busy"})] * 3, "answered 503: busy"),
        ([httpx.ConnectError("no")] * 3, "no answer from .* in 3 tries .ConnectError"),
        ([(200, b"<html>welcome</html>")], "Is there an NDIF server"),
        ([RECEIVED, (200, {"id": "job", "status": "ERROR", "description": "x\nValueError: bad"})],
         "failed on .*ValueError: bad"),
        ([RECEIVED, (200, {"id": "job", "status": "ERROR",
                           "description": "UnknownPersistentIdError: Module:model.x"})],
         "another nnsight"),
        ([RECEIVED, (200, {"id": "job", "status": "ERROR",
                           "description": "OutOfMemoryError: CUDA out of memory."})],
         "smaller max_tokens"),
        ([RECEIVED, DONE, (200, b"no result")], "cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_pass_says_what_to_do(monkeypatch, tmp_path, answers, says):
    Web(monkeypatch, *answers)
    with pytest.raises(RemoteError, match=f"(?s){says}") as caught:
        do(Server(HOST, tries=3, pause=0.0, keep=tmp_path))
    assert KEY not in str(caught.value)
    assert "signature" not in str(caught.value)


def test_another_version_is_refused_before_anything_is_sent(monkeypatch, tmp_path):
    web = Web(monkeypatch)
    web.env = {"packages": {"nnsight": "0.6.3"}}
    with pytest.raises(RemoteError, match=r"runs nnsight 0\.6\.3, this is 0\.8\.1"):
        do(Server(HOST, keep=tmp_path))
    assert web.asked == []


def test_no_key_is_said_at_once_and_none_goes_over_the_open_net(monkeypatch, tmp_path):
    Web(monkeypatch, RECEIVED, DONE, result({"n": 1}))
    monkeypatch.setattr(
        tracing, "CONFIG", SimpleNamespace(API=SimpleNamespace(HOST=HOST, APIKEY=None))
    )
    monkeypatch.delenv("NDIF_API_KEY")
    with pytest.raises(RemoteError, match="NDIF_API_KEY"):
        do(Server(keep=tmp_path))
    web = Web(monkeypatch, RECEIVED, DONE, result({"n": 1}))
    do(Server("http://far.example", keep=tmp_path))
    assert "ndif-api-key" not in web.asked[0][2]["headers"]


def test_a_wait_can_be_cancelled_and_has_an_end(monkeypatch, tmp_path):
    cancel = threading.Event()
    Web(monkeypatch, RECEIVED, *[RUNNING] * 9)
    server = Server(HOST, keep=tmp_path, status=lambda status: status == "RUNNING" and cancel.set())
    with pytest.raises(Cancelled):
        do(server, cancel=cancel)
    Web(monkeypatch, RECEIVED, *[RUNNING] * 9)
    with pytest.raises(RemoteError, match=r"did not end in 0\.05 s; it was last RUNNING"):
        do(Server(HOST, keep=tmp_path, job_seconds=0.05))


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_says_when_to_come_back(monkeypatch, tmp_path, status):
    """In seconds or as a date by its own clock, which may be years off."""
    slept = []
    monkeypatch.setattr("modeldiff.remote_http.time.sleep", slept.append)
    monkeypatch.setattr("modeldiff.remote_http.time.monotonic", lambda: sum(slept))
    dates = {"retry-after": "Mon, 01 Jan 2018 00:00:40 GMT",
             "date": "Mon, 01 Jan 2018 00:00:10 GMT"}  # fmt: skip
    busy = (status, {"detail": "busy"})
    Web(monkeypatch, (*busy, {"retry-after": "7"}), (*busy, dates), RECEIVED, DONE,
        result({"n": 1}))  # fmt: skip
    assert do(Server(HOST, tries=3, pause=0.5, keep=tmp_path))["n"] == 1
    assert slept[:2] == pytest.approx([7.0, 30.0])
    web = Web(monkeypatch, (*busy, {"retry-after": "86400"}))
    with pytest.raises(RemoteError, match="asked again in 86400 s"):
        do(Server(HOST, keep=tmp_path / "other"))
    assert len(web.asked) == 1, "and nobody sits a day in front of it"


def test_a_job_under_way_is_asked_after_and_not_sent_again(monkeypatch, tmp_path):
    server = Server(HOST, tries=2, pause=0.0, keep=tmp_path)
    web = Web(monkeypatch, RECEIVED, RUNNING, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        do(server)
    web.answers = [RUNNING, DONE, result({"n": 1})]
    assert do(server)["n"] == 1
    assert len(web.sent()) == 1
    assert [path.suffix for path in (tmp_path / "jobs").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "lost",
    [
        [(404, {})],
        [(200, {"id": "job", "status": "ERROR", "description": "the server was restarted"})],
        [DONE, (404, b"")],
    ],
)
def test_a_job_that_got_lost_is_sent_anew(monkeypatch, tmp_path, lost):
    server = Server(HOST, tries=2, pause=0.0, keep=tmp_path)
    web = Web(monkeypatch, RECEIVED, httpx.ConnectError("no"), httpx.ConnectError("no"))
    with pytest.raises(RemoteError, match="goes on from there"):
        do(server)
    web.answers = [*lost, RECEIVED, DONE, result({"n": 1})]
    assert do(server)["n"] == 1
    assert len(web.sent()) == 2


def test_a_server_that_hangs_can_be_left_at_once(monkeypatch, tmp_path):
    """Although the request has a minute."""
    hangs, said, cancel = threading.Event(), [], threading.Event()
    web = Web(monkeypatch, RECEIVED, RUNNING)
    request = web.request

    def slow(method, url, **options):
        if not web.answers:
            cancel.set()
            hangs.wait(20)
            raise httpx.ReadTimeout("after a minute")
        return request(method, url, **options)

    monkeypatch.setattr(httpx, "request", slow)
    start = time.monotonic()
    with watched(said.append, cancel), pytest.raises(Cancelled, match="stopped waiting"):
        do(Server(HOST, keep=tmp_path))
    assert time.monotonic() - start < 5
    assert said == ["sending", "received", "running", "left"]
    web.answers = [DONE, result({"n": 1})]
    monkeypatch.setattr(httpx, "request", request)
    said.clear()
    with watched(said.append):
        assert do(Server(HOST, keep=tmp_path))["n"] == do(Server(HOST, keep=tmp_path))["n"] == 1
    hangs.set()
    assert said == ["sending", "completed", "kept"]
    assert len(web.sent()) == 1


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("https://models.example/", True),
        ("https://models.example:8443/behind/a/path/", True),
        ("http://[::1]:5001", True),
        ("http://localhost:5001", True),
        ("models.example", False),
        ("localhost:1", False),
        ("ftp://models.example", False),
        ("https://", False),
        ("https://models.example:port", False),
        ("https://me:secret@models.example", False),
        ("https://models.example/?key=secret", False),
        ("https://models.example\n", False),
        ("http://[::1", False),
    ],
)
def test_addresses(monkeypatch, tmp_path, host, good):
    if not good:
        with pytest.raises(RemoteError, match="write True for NDIF") as caught:
            Server.of(host)
        assert "me:secret" not in str(caught.value)
        return
    web = Web(monkeypatch, RECEIVED, DONE, result({"n": 1}))
    do(Server(Server.of(host).host, keep=tmp_path))
    assert web.asked[0][1] == host.rstrip("/") + "/request"
    assert web.asked[0][2]["headers"]["ndif-api-key"] == KEY
    near = "localhost" in host or "::1" in host
    assert web.asked[0][2]["trust_env"] is not near, "no proxy hears the key of this machine"


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "caf\u00e9"])
def test_keys_that_no_request_can_carry(monkeypatch, tmp_path, key):
    web = Web(monkeypatch)
    monkeypatch.setenv("NDIF_API_KEY", key)
    with pytest.raises(RemoteError, match="copy it again") as caught:
        do(Server(HOST, keep=tmp_path))
    assert key not in str(caught.value)
    assert web.asked == []
    monkeypatch.setenv("NDIF_API_KEY", f" {KEY}\n")  # as a file that was read gives it
    web.answers = [RECEIVED, DONE, result({"n": 1})]
    do(Server(HOST, keep=tmp_path))
    assert web.asked[0][2]["headers"]["ndif-api-key"] == KEY


def test_the_key_follows_no_redirection(monkeypatch, tmp_path):
    web = Web(monkeypatch, (307, b"", {"location": "https://elsewhere.example/x?token=secret"}))
    with pytest.raises(RemoteError, match=r"sends requests on to 'https://elsewhere\.example/x'"):
        do(Server("http://models.example", keep=tmp_path))
    assert len(web.asked) == 1


def test_a_download_goes_on_where_it_broke(monkeypatch, tmp_path):
    whole = result({"x": torch.randn(40_000)})[1]
    monkeypatch.setattr("modeldiff.remote_http._STEP", 1 << 10)

    class Broken(httpx.SyncByteStream):
        def __init__(self, content):
            self.content = content

        def __iter__(self):
            yield self.content
            raise httpx.ReadError("gone")

    def serve(cuts, tag='"v1"', honest=True):
        asked = []

        @contextmanager
        def stream(method, url, headers, **options):
            start = int(headers.get("range", "bytes=0-")[6:-1])
            asked.append((start, headers.get("if-range")))
            start = start if honest else 0
            status = 206 if start else 200
            answer = {"etag": tag, "content-range": f"bytes {start}-/*"} if start else {"etag": tag}
            stop = cuts.pop(0) if cuts else None
            rest = whole[start:stop]
            body = {"content": rest} if stop is None else {"stream": Broken(rest)}
            yield httpx.Response(status, headers=answer, **body)

        monkeypatch.setattr(httpx, "stream", stream)
        return asked

    line = Line(HOST, 2, 0.0, 1.0)
    asked = serve([30_000, 60_000, 90_000, 120_000])
    assert line.fetched("https://store.example/x") == whole
    assert asked == [(0, None), *((n, '"v1"') for n in (30_000, 60_000, 90_000, 120_000))]
    serve([30_000], honest=False)  # a server that begins anew
    assert line.fetched("https://store.example/x") == whole
    asked = serve([30_000], tag="")  # one that cannot name its versions
    assert line.fetched("https://store.example/x") == whole
    assert asked == [(0, None), (0, None)]
    serve([10, 10, 10])
    with pytest.raises(RemoteError, match="without sending the job again"):
        line.fetched("https://store.example/x")


def test_lines_that_a_job_prints_are_taken_as_they_come():
    """Each holds all tokens so far: any of them may be missing, cut, foreign, or a lie."""
    ids = torch.tensor([[5, 6, 7], [9, 2, 0], [4, 4, 4]])
    uniform, got, printed = torch.rand(3, 3), [], io.StringIO()
    say = _sampler(uniform, 0, 2, aloud=True)
    with redirect_stdout(printed):
        for step in range(3):
            scores = torch.zeros(3, 20).scatter_(1, ids[:, [step]], 9.0)
            say(torch.cat([torch.ones(3, 2, dtype=torch.long), ids[:, :step]], 1), scores)
    lines = printed.getvalue().splitlines()
    assert len(lines) == 3
    heard = Heard(3, 3, lambda step, new: got.append((step, new.tolist())))
    foreign = "modeldiff-tokens 1 x 3", "modeldiff-tokens 1 2", "else 5 9 4", "", "modeldiff-tokens"
    for line in (*foreign, lines[0], lines[0], lines[2], lines[1]):
        heard.line(line)
    assert got == [(step, ids[:, step].tolist()) for step in range(3)]
    heard.check(ids, [2])
    heard.check(torch.tensor([[5, 6, 7], [9, 2, 3], [4, 4, 4]]), [2])  # after its end
    for other in (torch.tensor([[5, 6, 7], [9, 3, 0], [4, 4, 4]]), ids[:, :2]):
        with pytest.raises(RemoteError, match="other tokens than it returned"):
            heard.check(other, [2])


def test_no_code_of_a_server_runs_here():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the server's code ran",)

    buffer = io.BytesIO()
    torch.save({"found": {"x": Trap()}}, buffer)  # noqa: TID251
    with pytest.raises(RemoteError, match="cannot be read"):
        tracing.unpacked(zstandard.ZstdCompressor().compress(buffer.getvalue()))
