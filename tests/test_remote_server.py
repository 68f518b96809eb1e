"""Remote pairs against a server in a process of its own that speaks nnsight 0.8.1's protocol.

What comes back must be what is computed here, to the last bit where both run the same batches.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import threading
import time
from functools import partial

import pandas as pd
import pytest
import torch

from modeldiff import patch_runs
from modeldiff.batching import make_batch
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import Cancelled, InterventionError, RemoteError
from modeldiff.harvesting import harvest
from modeldiff.interventions import (
    Ablate,
    Cell,
    Clamp,
    Plan,
    Replace,
    ScaleAdapter,
    ScaleAlong,
    Steer,
    grid,
)
from modeldiff.layer_maps import patch_effects
from modeldiff.logit_lens import lens_logits, logit_lens
from modeldiff.models import ModelPair
from modeldiff.patch_runs import Metric
from modeldiff.patching import logit_difference, patch_map, patch_texts
from modeldiff.patchscope import patchscope
from modeldiff.remote_jobs import Server
from modeldiff.remote_runs import gradients
from modeldiff.sites import Site
from modeldiff.survey import survey
from modeldiff.token_scores import token_scores
from tests.families import N_LAYERS, WIDTH, model, peft_model, tokenizer
from tests.ndif_server import KEY, fetches, requests_seen, serving, trouble

pytestmark = pytest.mark.slow

TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]
CHAT = [{"role": "user", "content": "What should I do?"}]
SITES = tuple(
    Site(kind, layer)
    for layer in range(N_LAYERS)
    for kind in ("resid_pre", "z", "attn_out", "mlp_act", "mlp_out", "resid_post")
)
ADAPTERS = {"llama": "org/llama-adapter/tuned", "gemma2": "org/gemma2-adapter/tuned"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder whose models, named "org/name" as on the hub, are served; and the address."""
    at = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        patch.setenv("NDIF_API_KEY", KEY)
        patch.setattr("modeldiff.forward.padding_worth", lambda device: 64)  # batches as here
        twin = model("llama", 1)
        twin.lm_head.load_state_dict(model("llama").lm_head.state_dict())
        models = {
            "org/llama": model("llama"),
            "org/gemma2": model("gemma2"),
            "org/other": model("llama", 1),
            "org/twin": twin,
        }
        for name, each in models.items():
            each.save_pretrained(name)
            tokenizer().save_pretrained(name)
        for family, folder in ADAPTERS.items():
            peft_model(family, modules=("down_proj", "q_proj")).save_pretrained(folder[:-6])
        with serving(at, models) as address:
            yield at, address


@pytest.fixture
def server(served, tmp_path):
    """The server with nothing kept from other tests, and little patience."""
    trouble(served[1])
    return Server(served[1], tries=3, pause=0.01, keep=tmp_path)


@pytest.fixture
def adapted(served, server):
    return both("org/llama", server, adapter=ADAPTERS["llama"])


def both(base, server, **tuned):
    """The same pair here and on the server."""
    return ModelPair.load(base, **tuned), ModelPair.load(base, **tuned, remote=server)


def direction(seed=0, site="resid_post.1", width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(width, generator=g), site, f"d{seed}")


def everything():
    d, e = direction(0), direction(1)
    return (
        Steer(d, 0.7, layers=(0, 2))
        + Ablate([d, e], where="last")
        + ScaleAlong(e, 2.0, layers=3)
        + Clamp(direction(2, "attn_out.1"), 0.5)
        + Ablate(direction(4, "z.1"), layers=None)
        + Steer(direction(6, "resid_pre.2"), 0.3)
        + Replace("resid_post.0", "base", along=d, where="prompt")
    )


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("family", ADAPTERS)
def test_passes_with_edits_are_equal_to_the_last_bit(server, family):
    here, there = both(f"org/{family}", server, adapter=ADAPTERS[family])
    plans = {
        "base": (None, Clamp(direction(2), 1.0) + Steer(direction(1), 0.5, layers="all")),
        "finetuned": (None, everything(), ScaleAdapter(0.5, layers=1), ScaleAdapter(0.0)),
    }
    for side, several in plans.items():
        for plan in several:
            a, b = (pair.run(TEXTS, side=side, do=plan, reads=SITES) for pair in (here, there))
            assert torch.equal(a.logits, b.logits)
            same(a.acts, b.acts)
    changed = here.run(TEXTS).logits - here.run(TEXTS, side="base").logits
    assert changed.abs().max() > 0.1, "the adapter does nothing: equality would show nothing"


def test_captures_are_equal_to_the_last_bit(adapted):
    sites = ["resid_post.0", "resid_post.2", "mlp_act.3", "lora.1.mlp.down_proj"]
    for options in ({}, {"on": "user", "skip_first": 2}, {"max_tokens": 8}):
        items = [*TEXTS, CHAT] if "on" not in options else [CHAT]
        here, there = (pair.capture(items, sites, **options) for pair in adapted)
        same(here.base, there.base)
        same(here.finetuned, there.finetuned)
        assert torch.equal(here.position, there.position)


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("org/llama", {"adapter": ADAPTERS["llama"]}),
        ("org/gemma2", {"adapter": ADAPTERS["gemma2"]}),
        ("org/llama", {"finetuned": "org/twin"}),
    ],
)
def test_output_diffs_effects_and_surveys_are_equal_and_no_vocabulary_travels(
    served, server, base, tuned
):
    here, there = both(base, server, **tuned)
    items = {"a": TEXTS, "b": [CHAT]}
    one, other = (pair.output_diff(items, k=7) for pair in (here, there))
    pd.testing.assert_frame_equal(one.tokens, other.tokens, check_exact=True)
    pd.testing.assert_frame_equal(one.vocabulary, other.vocabulary, check_exact=True)
    assert torch.equal(one.top_logprobs, other.top_logprobs)
    assert one.tokens["kl_ft_base"].mean() > 1e-3
    cells = [*grid({"edit": Ablate(direction(0)) + Steer(direction(1), where="last")})]
    first, second = (effects(pair.sides, TEXTS, cells) for pair in (here, there))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    found = [survey(pair.sides, pair.texts(TEXTS), ["x", "y", "x"]) for pair in (here, there)]
    pd.testing.assert_frame_equal(found[0].per_text, found[1].per_text, check_exact=True)
    for key, moments in found[0].moments.items():
        assert torch.equal(moments.mean, found[1].moments[key].mean)


def test_the_grid_is_equal_token_for_token(adapted, served):
    edits = {
        "edit": Steer(direction(0), 3.0, where="new") + Ablate(direction(1), layers=(2, 3)),
        "copy": Replace("resid_post.1", "base", where="prompt"),
    }
    cells = [*grid({"edit": edits["edit"]}), Cell("finetuned", "copy", Plan((edits["copy"],))),
             Cell("finetuned", "off", Plan((ScaleAdapter(0.0),)))]  # fmt: skip
    settings = {"cells": cells, "n": 2, "seed": 3, "temperature": 0.9, "max_new_tokens": 6}
    streamed = []
    here = adapted[0].generate([*TEXTS, CHAT], **settings)
    before = len(requests_seen(served[1]))
    there = adapted[1].generate([*TEXTS, CHAT], **settings, on_step=streamed.extend)
    assert [a.ids for a in here.answers] == [a.ids for a in there.answers]
    assert len({a.ids for a in here.answers}) > 8
    assert sum(len(a.ids) for a in there.answers) == len(streamed)
    sent = requests_seen(served[1])[before:]
    assert len(sent) == 2, "one job for the copied activations, one for the whole grid"
    greedy = {"temperature": 0, "max_new_tokens": 4, "models": ("base",)}
    one, other = (pair.generate(TEXTS, **greedy) for pair in adapted)
    assert [a.ids for a in one.answers] == [a.ids for a in other.answers]


@pytest.mark.parametrize("mute", [None, "all", "modeldiff-tokens 1 2", "warning: 7", "wrong"])
def test_tokens_are_shown_while_the_job_runs(adapted, served, mute):
    """Lines that are missing or foreign change nothing; lines that lie are an error."""
    cells = grid(models=("base", "finetuned"))
    settings = {"cells": cells, "n": 2, "seed": 5, "temperature": 0.9, "max_new_tokens": 6}
    here = adapted[0].generate(TEXTS, **settings)
    rows = len(here.answers)
    wrong = "modeldiff-tokens " + " ".join(["299"] * 2 * rows)
    kinds = {"lag": [0.35], "mute": [wrong if mute == "wrong" else mute]}
    trouble(served[1], **(kinds if mute else {"lag": [0.35]}))
    streamed, early = {}, []

    def on_step(got):
        for row, token in got:
            streamed.setdefault((row.cell, row.prompt, row.sample), []).append(token)
        early.append(any(adapted[1].sides.remote.folder.glob("*.job")))

    if mute == "wrong":
        with pytest.raises(RemoteError, match="other tokens than it returned"):
            adapted[1].generate(TEXTS, **settings, on_step=on_step)
        return
    there = adapted[1].generate(TEXTS, **settings, on_step=on_step)
    assert [a.ids for a in here.answers] == [a.ids for a in there.answers]
    assert list(map(tuple, (streamed[key] for key in sorted(streamed)))) == [
        a.ids for a in there.answers
    ]
    assert any(early) == (mute is None), "steps before the job's end"


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_gradients_are_equal_to_the_last_bit(adapted, side):
    here, there = adapted
    sites = (Site("resid_post", 0), Site("attn_out", 2), Site("resid_post", 3))
    plan = Steer(direction(0), 0.5) + Ablate(direction(1), layers=(2, 3))
    targets, minus = torch.tensor([5, 17, 40]), torch.tensor([6, 9, 11])
    run = here.run(TEXTS, side=side, do=plan, reads=sites, grad=True)
    with torch.enable_grad(), here.sides.on(side) as root:
        final = root.model.norm(run.acts[sites[-1]])
        logprobs = root.lm_head(final[:, -1]).log_softmax(-1)
    torch.testing.assert_close(logprobs, run.logits[:, -1].log_softmax(-1))
    scores = logprobs.gather(-1, targets[:, None]) - logprobs.gather(-1, minus[:, None])
    wanted = torch.autograd.grad(scores.sum(), [run.acts[site] for site in sites])
    batch = make_batch(there.texts(TEXTS), 0, "left")
    found, acts, grads = gradients(there.sides, batch, side, sites, targets, minus=minus, plan=plan)
    assert torch.equal(found, scores[:, 0].detach())
    assert all(torch.equal(acts[site], run.acts[site]) for site in sites)
    assert all(torch.equal(grads[s], g) for s, g in zip(sites, wanted, strict=True))
    assert all(bool(g.any()) for g in wanted)


def test_two_whole_models_are_two_jobs_and_never_one(served, server):
    here, there = both("org/llama", server, finetuned="org/other")
    before = len(requests_seen(served[1]))
    a, b = (pair.capture(TEXTS, "resid_post.2") for pair in (here, there))
    same(a.base, b.base)
    same(a.finetuned, b.finetuned)
    sent = requests_seen(served[1])[before:]
    assert ["org/llama" in one["model_key"] for one in sent] == [True, False]
    with pytest.raises(RemoteError, match="different unembeddings"):
        there.output_diff(TEXTS)


def test_the_sum_of_what_travels(adapted, served):
    """One model a request, its adapter by name, no session, and under 64 KiB a job."""
    adapted[1].run(TEXTS, side="base", logits=False, reads="resid_post.1")
    adapted[1].output_diff(TEXTS)
    base, tuned = requests_seen(served[1])[-2:]
    assert "peft" not in base["env"]
    assert tuned["env"]["peft"] == ADAPTERS["llama"]
    for one in (base, tuned):
        assert one["session_id"] == ""
        assert one["headers"]["nnsight-version"] == "0.8.1"
        assert one["bytes"] < 1 << 16
        for secret in (KEY, str(served[0]), "_thread.", "ipywidgets", "/site-packages/"):
            assert secret not in one["payload"], secret


# ------------------------------------------------------------ lenses and patches


def test_lenses_read_on_the_server_are_equal_to_the_last_bit(adapted, served):
    here, there = adapted
    v = direction(3)
    before = len(requests_seen(served[1]))
    one, other = (logit_lens(pair.sides, v, k=5, n_random=3) for pair in adapted)
    pd.testing.assert_frame_equal(one.tokens, other.tokens, rtol=0, atol=0)
    assert (one.random_reach, one.p) == (other.random_reach, other.p)
    assert len(requests_seen(served[1])) - before == 1, "one job, whatever the controls"
    assert torch.equal(lens_logits(here.sides, v.unit[None], "base"),
                       lens_logits(there.sides, v.unit[None], "base"))  # fmt: skip
    cells = (Cell("base"), Cell("finetuned", "steer", Plan((Steer(v, 2.0),))))
    for a, b in zip(*(token_scores(pair.sides, TEXTS[1], cells, k=4) for pair in adapted),
                    strict=True):  # fmt: skip
        pd.testing.assert_frame_equal(a.table, b.table, rtol=0, atol=0)
        assert torch.equal(a.top_ids, b.top_ids)
    scopes = [
        patchscope(pair.sides, v, scales=(1.0, 4.0), n_random=2, k=3, side="base")
        for pair in adapted
    ]
    for name in ("scales", "tokens"):
        one, other = (getattr(scope, name) for scope in scopes)
        pd.testing.assert_frame_equal(one, other, rtol=0, atol=0)


def test_two_whole_models_are_read_where_their_unembeddings_agree(served, server):
    here, there = both("org/llama", server, finetuned="org/twin")
    (one,), (other,) = (token_scores(pair.sides, TEXTS[1], k=4) for pair in (here, there))
    pd.testing.assert_frame_equal(one.table, other.table, rtol=0, atol=0)
    unlike = ModelPair.load("org/llama", finetuned="org/other", remote=server)
    with pytest.raises(RemoteError, match="different unembeddings"):
        token_scores(unlike.sides, TEXTS[1], k=4)
    one, other = (logit_lens(pair.sides, direction(3), k=5, n_random=3)
                  for pair in both("org/llama", server, finetuned="org/other"))  # fmt: skip
    pd.testing.assert_frame_equal(one.tokens, other.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["finetuned", "base"])
def test_patch_maps_are_equal_to_whole_local_passes(adapted, served, side, monkeypatch):
    """Locally patches run the layers above alone; with all layers the two are equal bit by bit."""
    (text,) = adapted[0].texts([TEXTS[1]])
    parts = ("resid_post", "attn_out", "mlp_out", "head", "adapter")
    metrics = {
        "kl": None,
        "logits": logit_difference(5, 7),
        "own": Metric("top", lambda logits: logits[:, 0].amax(-1)),
    }
    whole = partial(patch_runs.effects, prefix=False)
    monkeypatch.setattr("modeldiff.patching.effects", whole)
    for name, metric in metrics.items():
        before = len(requests_seen(served[1]))
        one, other = (
            patch_map(pair.sides, text, metric, side=side, parts=parts, columns=[(1, 2), (-1,)],
                      max_tokens=text.n_tokens * 60)
            for pair in adapted
        )  # fmt: skip
        sent = requests_seen(served[1])[before:]
        assert len(sent) <= 8, (name, len(sent))
        assert max(each["bytes"] for each in sent) < 1 << 18
        assert one.effect.shape == other.effect.shape
        assert float((one.effect - other.effect).abs().max()) < 1e-6, name
        assert bool(one.effect.any()), name
        assert (one.start, one.target) == pytest.approx((other.start, other.target), abs=1e-6)


def test_components_carry_the_same_on_a_server(adapted, served):
    settings = {"parts": ("resid_post", "mlp_out", "head"), "n_random": 3, "last": 2}
    chats = ["the cat sat on a mat", "a small bird sang of rain"]
    one, other = (
        patch_texts(pair.sides, chats, lambda text: logit_difference(5, 7), **settings)
        for pair in adapted
    )
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=2e-6)
    assert bool(one["effect"].any())
    with pytest.raises(RemoteError, match="patch heads"):
        patch_map(adapted[1].sides, TEXTS[1], parts=["query"])


def test_layer_maps_are_equal_to_the_last_bit(adapted):
    one, other = (patch_effects(pair.sides, TEXTS[1]) for pair in adapted)
    assert torch.equal(one.kl, other.kl)
    assert torch.equal(one.logprob, other.logprob)
    assert bool(one.kl.any())


# ------------------------------------------------------------ trouble


def test_a_corpus_goes_on_where_the_connection_broke(adapted, served):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    options = {"at": "resid_post.1", "max_tokens": 24}
    here = adapted[0].capture(texts, **options)
    before = len(requests_seen(served[1]))
    told = []

    def break_after_two(done, total, message):
        told.append(done)
        if len(told) == 2:
            trouble(served[1], post=["drop"] * 3)

    with pytest.raises(RemoteError, match="What was finished is kept"):
        adapted[1].capture(texts, **options, progress=break_after_two)
    failed = len(requests_seen(served[1])) - before
    there = adapted[1].capture(texts, **options, progress=lambda *a: told.append(a[0]))
    same(here.finetuned, there.finetuned)
    all_of_it = len(requests_seen(served[1])) - before
    assert failed == 2 + 3, "two batches, and three tries of the third"
    assert all_of_it - failed == len(told) - 2 - 2, "the two finished batches were not sent again"


@pytest.mark.parametrize(
    "kinds",
    [
        {"post": [503, 502]},
        {"post": ["drop"]},
        {"poll": [500, "drop"]},
        {"blob": [True, True]},
        {"blob": [True, "whole"]},
        {"blob": [True, 503]},
        {"poll": [429], "post": [429]},
    ],
)
def test_what_breaks_on_the_way_is_mended(adapted, served, kinds):
    trouble(served[1], **kinds)
    one, other = (pair.run(TEXTS, reads="resid_post.1") for pair in adapted)
    assert torch.equal(one.logits, other.logits)


def test_a_download_goes_on_where_it_broke_and_no_job_is_sent_twice(adapted, served):
    adapted[1].run(TEXTS, reads="resid_post.1")  # a first job, of one's own
    sent, got = len(requests_seen(served[1])), len(fetches(served[1]))
    trouble(served[1], blob=[True, True])
    adapted[1].run(TEXTS, reads="resid_post.2")
    begins = [begin for begin, _ in fetches(served[1])[got:]]
    assert begins[0] == 0 < begins[1] < begins[2]
    trouble(served[1], blob=[True] * 3)
    with pytest.raises(RemoteError, match="without sending the job again"):
        adapted[1].run(TEXTS, reads="resid_post.3")
    trouble(served[1])
    there = adapted[1].run(TEXTS, reads="resid_post.3")
    assert torch.equal(there.logits, adapted[0].run(TEXTS).logits)
    assert len(requests_seen(served[1])) - sent == 2
    trouble(served[1], blob=[403])
    with pytest.raises(RemoteError, match="not where it should be"):
        adapted[1].run(TEXTS, reads="resid_post.0")
    trouble(served[1], blob=[403])
    adapted[1].run(TEXTS, reads="resid_post.0")
    assert len(requests_seen(served[1])) - sent == 4, "the result was gone: the job is sent anew"


def test_refusals_say_why(adapted, served, server, monkeypatch):
    trouble(served[1], post=[500] * 3)
    with pytest.raises(RemoteError, match="answered 500: trouble 500"):
        adapted[1].run(TEXTS)
    trouble(served[1])
    missing = served[0] / "org" / "elsewhere"
    if not missing.exists():
        model("llama", 5).save_pretrained(missing)
        tokenizer().save_pretrained(missing)
    pair = ModelPair.load("org/elsewhere", adapter=ADAPTERS["llama"], remote=server)
    with pytest.raises(RemoteError, match=r"does not run org/elsewhere.*It runs org/gemma2, org/l"):
        pair.run(TEXTS)
    monkeypatch.setenv("NDIF_API_KEY", "wrong-key-4711")
    with pytest.raises(RemoteError, match=r"refused the key \(401: Missing") as caught:
        adapted[1].run(TEXTS, side="base")
    assert "4711" not in str(caught.value)


def test_another_version_is_refused(adapted, served, monkeypatch):
    from modeldiff import remote_jobs

    monkeypatch.setattr(remote_jobs, "_CHECKED", set())
    trouble(served[1], env=["0.6.3"])
    with pytest.raises(RemoteError, match=r"runs nnsight 0\.6\.3, this is 0\.8\.1"):
        adapted[1].run(TEXTS)


def test_errors_of_the_job_come_back(adapted):
    strong = Steer(direction(0), float("inf"), where="last")
    with pytest.raises(RemoteError, match="logits are NaN at generated token 0"):
        adapted[1].generate(TEXTS, do=strong, models=("base",), max_new_tokens=2)
    with pytest.raises(InterventionError, match="selects no token"):
        adapted[1].run(TEXTS, do=Steer(direction(0), where="new"))


def test_a_slow_server_can_be_left_and_its_answer_does_not_get_lost(adapted, served, server):
    cancel = threading.Event()
    trouble(served[1], slow=[3.0])
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(Cancelled):
        adapted[1].capture(TEXTS, "resid_post.1", cancel=cancel)
    trouble(served[1], slow=[3.0])
    hasty = Server(served[1], job_seconds=0.2, keep=server.keep)
    pair = ModelPair.load("org/llama", adapter=ADAPTERS["llama"], remote=hasty)
    with pytest.raises(RemoteError, match=r"did not end in 0\.2 s; it was last RUNNING"):
        pair.run(TEXTS)
    trouble(served[1])
    assert torch.equal(adapted[1].run(TEXTS).logits, adapted[0].run(TEXTS).logits)


def test_a_harvest_goes_on_where_the_connection_broke(adapted, served, tmp_path):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    options = {"at": "resid_post.1", "dtype": torch.float32, "rows_per_shard": 16, "max_tokens": 24}
    told = []

    def break_after_two(done, total, message):
        told.append(done)
        if len(told) == 2:
            trouble(served[1], post=["drop"] * 3)

    before = len(requests_seen(served[1]))
    with pytest.raises(RemoteError, match="What was finished is kept"):
        harvest(adapted[1], texts, folder=tmp_path / "store", **options, progress=break_after_two)
    failed = len(requests_seen(served[1])) - before - 3
    store = harvest(adapted[1], texts, folder=tmp_path / "store", **options)
    again = len(requests_seen(served[1])) - before - 3 - failed
    whole = harvest(adapted[1], texts, folder=tmp_path / "whole", **options)
    assert len(requests_seen(served[1])) - before - 3 == failed + again, "all jobs are kept"
    assert store.key == whole.key
    for file in sorted((tmp_path / "whole").rglob("*.bin")):
        other = tmp_path / "store" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes(), file.name
    assert len(store) == len(adapted[0].capture(texts, at="resid_post.1").text_index)


def test_panels_say_where_a_job_is_and_cancel_at_once(adapted, served):
    from modeldiff_widgets import AuditState, Compare, JobBar, JobRunner

    said, jobs = [], JobRunner()
    bar = JobBar(jobs)
    jobs.on_change(lambda job: said.append(bar.message))
    with Compare(adapted[1], AuditState(max_new_tokens=3, temperature=0.0), jobs) as panel:
        trouble(served[1], slow=[5.0])
        panel.run()
        while not any("job 1: running" in each for each in said):
            time.sleep(0.01)
        start = time.monotonic()
        jobs.cancel()
        assert jobs.wait(3)
        assert time.monotonic() - start < 2, "the server is busy for five"
        assert "the server goes on with it" in bar.message
        sent = len(requests_seen(served[1]))
        trouble(served[1])
        job = panel.run()
        assert jobs.wait(60)
        assert job.status == "done", job.error
        assert len(requests_seen(served[1])) == sent, "the same job was waited for"
    bar.close()
    jobs.close()


def test_threads_share_a_pair(adapted):
    wanted = {side: adapted[0].run(TEXTS, side=side).logits for side in ("base", "finetuned")}
    found = {}

    def ask(side):
        found[side] = adapted[1].run(TEXTS, side=side).logits

    threads = [threading.Thread(target=ask, args=(side,)) for side in wanted]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    same(found, wanted)


# ------------------------------------------------------------ an audit


def test_the_audit_of_an_organism_is_the_same_on_a_server(tmp_path_factory, monkeypatch):
    from modeldiff import embedded
    from modeldiff.audit import Audit
    from modeldiff.audit_stages import Settings
    from modeldiff.behaviours import organism_behaviours

    monkeypatch.setenv("NDIF_API_KEY", KEY)
    asked = organism_behaviours("em-rank1", n=2)[:1]
    settings = Settings(n_random=2, n_scan=1)
    here = Audit(ModelPair.load("organism:em-rank1"), asked, settings=settings).run()
    at = tmp_path_factory.mktemp("organism")
    with serving(at, [str(embedded.find("em-rank1").base)]) as address:
        pair = ModelPair.load("organism:em-rank1", remote=Server(address, keep=at))
        there = Audit(pair, asked, settings=settings).run()
    assert here.compare(there, 1e-4)["within"].all()
    assert [one.holds for one in here.findings] == [one.holds for one in there.findings]
    assert there.complete
    assert there.pair["kind"] == "remote"
