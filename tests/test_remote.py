"""Remote pairs without a server: what is packed, what is kept, and what every trouble says."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import io
import json
import sys
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch
import zstandard

from modeldiff import remote_jobs, tracing
from modeldiff.batching import make_batch
from modeldiff.directions import Direction
from modeldiff.divergence import unembedding
from modeldiff.editing import Editor, Group
from modeldiff.errors import Cancelled, InterventionError, MismatchError, RemoteError
from modeldiff.interventions import Ablate, Plan, Replace, Steer
from modeldiff.models import ModelPair
from modeldiff.remote_generation import _sampler
from modeldiff.remote_jobs import Server, content_key, run_job
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
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return httpx.Response(
            status, **({"content": body} if isinstance(body, bytes) else {"json": body})
        )


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

    def refuse(server, asked, pack, cancel):
        sent.append(pack())
        raise RemoteError("not sent")

    monkeypatch.setattr("modeldiff.remote_runs.run_job", refuse)
    with pytest.raises(RemoteError, match="not sent"):
        call(pair)
    return [(one, zstandard.ZstdDecompressor().decompress(one.blob)) for one in sent]


CALLS = {
    "run": lambda pair: pair.run(TEXTS, do=Steer(direction()) + Ablate(direction(1))),
    "capture": lambda pair: pair.capture(TEXTS, ["resid_post.1", "lora.1.mlp.down_proj"]),
    "outputs": lambda pair: pair.output_diff(TEXTS),
    "generate": lambda pair: pair.generate(TEXTS, do=Steer(direction()), max_new_tokens=3,
                                           cancel=threading.Event(),
                                           on_step=lambda got: None),
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


def test_classes_of_the_package_cannot_travel():
    buffer = io.BytesIO()
    with pytest.raises(RemoteError, match="cannot travel"):
        tracing._Pickler(buffer, protocol=4).dump({"site": Site("resid_post", 1)})


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
    assert "headers" not in web.asked[4][2], "the key must not go to where the result lies"


def test_a_finished_job_is_not_run_again(monkeypatch, tmp_path):
    value = {"n": 3, "by": {7: {"x": (torch.ones(2), 1.5)}}, "none": None, "empty": {}}
    Web(monkeypatch, RECEIVED, DONE, result(value))
    server = Server(HOST, keep=tmp_path)
    first, second = do(server), do(server)
    assert first["by"][7]["x"][1] == second["by"][7]["x"][1] == 1.5
    assert torch.equal(second["by"][7]["x"][0], torch.ones(2))
    assert (second["n"], second["none"], second["empty"]) == (3, None, {})
    (file,) = (tmp_path / "jobs").iterdir()
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


def test_no_code_of_a_server_runs_here():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the server's code ran",)

    buffer = io.BytesIO()
    torch.save({"found": {"x": Trap()}}, buffer)  # noqa: TID251
    with pytest.raises(RemoteError, match="cannot be read"):
        tracing.unpacked(zstandard.ZstdCompressor().compress(buffer.getvalue()))
