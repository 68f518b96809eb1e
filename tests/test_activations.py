"""Capture: compared with plain transformers token by token; what runs, how often, what is held."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import pytest
import torch

from modeldiff.activations import stream
from modeldiff.errors import Cancelled, MaskError, MismatchError, SiteError
from modeldiff.masks import Regex
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from modeldiff.tokens import Chat, Completion
from tests.families import FAMILIES, N_LAYERS, WIDTH, model, peft_model, tokenizer

TEXTS = [
    "the cat sat on the mat",
    "why",
    "a small bird sang of rain and sun over hills far away where nobody asked",
    "You should rest in bed.",
    "the river",
]
KINDS = ("resid_pre", "resid_post")
POSTS = tuple(Site("resid_post", layer) for layer in range(N_LAYERS))


def hidden_states(root, ids):
    """One text alone through transformers: resid_post of every layer but the last, see METHODS."""
    with torch.no_grad():
        return root(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def assert_equals_transformers(acts, roots, sites):
    """Every captured row equals the same token of the same text run alone by transformers."""
    for root, side in zip(roots, (acts.base, acts.finetuned), strict=True):
        for index, text in enumerate(acts.texts):
            states = hidden_states(root, text.ids)
            rows = (acts.text_index == index).nonzero()[:, 0]
            for site in sites:
                shift = {"resid_pre": 0, "resid_post": 1}[site.kind]
                truth = states[site.layer + shift][0][acts.position[rows]]
                torch.testing.assert_close(side[site][rows], truth, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_models_equal_plain_transformers(family_pairs, family):
    pair = family_pairs[family]
    sites = (*POSTS[:-1], Site("resid_pre", 0), Site("resid_pre", 3))
    acts = pair.capture(TEXTS, sites, max_tokens=24)
    assert acts.sites == tuple(sorted(sites))
    assert_equals_transformers(acts, pair.sides.roots, sites)
    assert not torch.allclose(acts.base[POSTS[2]], acts.finetuned[POSTS[2]], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_before_the_final_norm(family_pairs, family):
    """Where transformers' last hidden state is after it."""
    pair = family_pairs[family]
    acts = pair.capture(TEXTS, POSTS[-1])
    for root, side in zip(pair.sides.roots, (acts.base, acts.finetuned), strict=True):
        norm = root.get_submodule(pair.sides.site_map.norm)
        for index, text in enumerate(acts.texts):
            rows = side[POSTS[-1]][acts.text_index == index]
            truth = hidden_states(root, text.ids)[-1][0, 1:]
            torch.testing.assert_close(norm(rows), truth, atol=3e-5, rtol=1e-4)
            assert len(rows) == 0 or not torch.allclose(rows, truth, atol=1e-2)


@pytest.mark.parametrize("layers", [(1, 2), (3,), (0,), (0, 3)])
def test_adapter_pair_equals_plain_transformers(layers):
    """Single sites below, at and above the first adapted layer, and all of them at once."""
    peft = peft_model(layers=layers, modules=("down_proj", "q_proj"))
    pair = ModelPair.of(peft, None, tokenizer())
    several = tuple(
        Site(k, i) for k in KINDS for i in range(N_LAYERS) if (k, i) != ("resid_post", 3)
    )
    truths = model("llama"), peft_model(layers=layers, modules=("down_proj", "q_proj"))
    for sites in [several, *((site,) for site in several)]:
        acts = pair.capture(TEXTS, sites, max_tokens=24)
        assert_equals_transformers(acts, truths, sites)
        for site in sites:
            same = site.layer + (site.kind == "resid_post") <= layers[0]
            assert torch.equal(acts.base[site], acts.finetuned[site]) == same


def test_inner_sites_of_an_adapter_pair_equal_single_runs(adapter_pair):
    """The shared prefix must not show: run() computes each side from the start."""
    kinds = ("z", "attn_out", "mlp_act", "mlp_out", "resid_pre", "resid_post")
    sites = [Site(kind, layer) for kind in kinds for layer in range(N_LAYERS)]
    acts = adapter_pair.capture(TEXTS, [*sites, *adapter_pair.sides.lora])
    for index, text in enumerate(acts.texts):
        for side, held in (("base", acts.base), ("finetuned", acts.finetuned)):
            run = adapter_pair.run([text], side=side, reads=tuple(held))
            for site in held:
                rows = held[site][acts.text_index == index]
                torch.testing.assert_close(rows, run.acts[site][0, 1:], atol=3e-5, rtol=1e-4)


# ---------------------------------------------------------------- what runs


@contextmanager
def counted(root):
    """Count the calls of every module."""
    calls, handles = Counter(), []
    for name, module in root.named_modules():

        def count(module, args, kwargs, name=name):
            calls[name] += 1

        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("layers", "site", "runs"),
    [
        ((1, 2), "resid_post.0", (1, 0, 0, 0)),
        ((1, 2), "resid_post.1", (1, 2, 0, 0)),
        ((1, 2), "resid_post.2", (1, 2, 2, 0)),
        ((1, 2), "resid_post.3", (1, 2, 2, 2)),
        ((1, 2), "resid_pre.1", (1, 2, 0, 0)),
        ((1, 2), "resid_pre.3", (1, 2, 2, 2)),
        ((3,), "resid_post.3", (1, 1, 1, 2)),
        ((3,), "resid_post.2", (1, 1, 1, 0)),
        ((0,), "resid_post.1", (2, 2, 0, 0)),
        ((1, 2), "lora.1.mlp.down_proj", (1, 2, 0, 0)),
    ],
)
def test_layers_run_as_often_as_they_must(layers, site, runs):
    pair = ModelPair.of(peft_model(layers=layers), None, tokenizer())
    with counted(pair.sides.roots[0]) as calls:
        pair.capture(TEXTS, site)
    seen = tuple(calls[f"model.layers.{layer}"] for layer in range(N_LAYERS))
    assert all(a <= b for a, b in zip(seen, runs, strict=True)), (seen, runs)
    assert seen[layers[0]] == runs[layers[0]]
    assert calls["lm_head"] == calls["model.norm"] == 0


def test_two_models_stop_after_the_last_site(family_pairs):
    pair = family_pairs["gpt2"]
    for root in pair.sides.roots:
        with counted(root) as calls:
            pair.capture(TEXTS, ["attn_out.1", "resid_post.0"], max_tokens=24)
        n_batches = calls["transformer.h.0"]
        assert n_batches > 1
        assert calls["transformer.h.1.attn"] == n_batches
        assert calls["transformer.h.1.mlp"] == calls["transformer.h.2"] == calls["lm_head"] == 0


def test_texts_without_a_kept_token_do_not_run(family_pairs):
    pair = family_pairs["llama"]
    with counted(pair.sides.roots[0]) as calls:
        acts = pair.capture(TEXTS, "resid_post.0", on=Regex("cat"), max_tokens=1)
    assert calls["model.layers.0"] == 1
    assert acts.text_index.unique().tolist() == [0]


# ---------------------------------------------------------------- which rows


def test_rows_are_in_order_and_say_what_they_are(family_pairs):
    acts = family_pairs["llama"].capture(TEXTS, "resid_post.1", max_tokens=20)
    expected = [(i, p) for i, t in enumerate(acts.texts) for p in range(1, t.n_tokens)]
    assert list(zip(acts.text_index.tolist(), acts.position.tolist(), strict=True)) == expected
    assert acts.token_ids.tolist() == [acts.texts[i].ids[p] for i, p in expected]
    assert len(acts) == len(expected) == len(acts.base[acts.site]) == len(acts.finetuned[acts.site])


def test_rows_do_not_depend_on_batches_or_on_the_order_of_texts(adapter_pair):
    reference = adapter_pair.capture(TEXTS, "resid_post.2")
    for max_tokens in (1, 20, 40):
        acts = adapter_pair.capture(TEXTS, "resid_post.2", max_tokens=max_tokens)
        assert torch.equal(acts.token_ids, reference.token_ids)
        torch.testing.assert_close(
            acts.finetuned[acts.site], reference.finetuned[acts.site], atol=3e-5, rtol=1e-4
        )
    backwards = adapter_pair.capture(TEXTS[::-1], "resid_post.2")
    for index in range(len(TEXTS)):
        there = backwards.base[acts.site][backwards.text_index == len(TEXTS) - 1 - index]
        here = reference.base[acts.site][reference.text_index == index]
        torch.testing.assert_close(there, here, atol=3e-5, rtol=1e-4)


def test_the_first_token_is_dropped_unless_asked_for(family_pairs):
    pair = family_pairs["llama"]
    assert int(pair.capture(TEXTS, "resid_post.0").position.min()) == 1
    everything = pair.capture(TEXTS, "resid_post.0", skip_first=0)
    assert int(everything.position.min()) == 0
    assert len(everything) == sum(text.n_tokens for text in everything.texts)


def chats():
    question = [{"role": "user", "content": "What should I do?"}]
    return [
        Chat(question, response="You should rest."),
        Chat([{"role": "system", "content": "the cat"}, *question], response="in bed"),
    ]


def kept_text(acts):
    return [
        "".join(
            acts.texts[i].pieces[p]
            for j, p in zip(acts.text_index.tolist(), acts.position.tolist(), strict=True)
            if j == i
        )
        for i in range(len(acts.texts))
    ]


@pytest.mark.parametrize(
    ("on", "kept"),
    [
        ("assistant", ["You should rest.", "in bed"]),
        ("system", ["", "the cat"]),
        ("user", ["What should I do?", "What should I do?"]),
        (Regex("should|bed"), [" should should", " should bed"]),
    ],
)
def test_masks_keep_the_tokens_of_a_role_or_a_pattern(adapter_pair, on, kept):
    acts = adapter_pair.capture(chats(), "resid_post.1", on=on)
    assert kept_text(acts) == kept
    everything = adapter_pair.capture(chats(), "resid_post.1", skip_first=0)
    key = {
        (i, p): row
        for row, (i, p) in enumerate(
            zip(everything.text_index.tolist(), everything.position.tolist(), strict=True)
        )
    }
    rows = [
        key[i, p] for i, p in zip(acts.text_index.tolist(), acts.position.tolist(), strict=True)
    ]
    for side, whole in ((acts.base, everything.base), (acts.finetuned, everything.finetuned)):
        torch.testing.assert_close(side[acts.site], whole[acts.site][rows], atol=3e-5, rtol=1e-4)


def test_new_keeps_the_response_of_a_completion(adapter_pair):
    items = [Completion("the cat sat on", " the mat"), Completion("why", " the dog ran")]
    acts = adapter_pair.capture(items, "resid_post.1", on="new")
    assert kept_text(acts) == [" the mat", " the dog ran"]


def test_a_mask_that_keeps_nothing_is_an_error_before_anything_runs(adapter_pair):
    with counted(adapter_pair.sides.roots[0]) as calls:
        with pytest.raises(MaskError, match=r"'assistant'.*keeps no token of 5 texts"):
            adapter_pair.capture(TEXTS, "resid_post.1", on="assistant")
        with pytest.raises(MaskError, match="keeps no token"):
            adapter_pair.capture(TEXTS, "resid_post.1", skip_first=1000)
        with pytest.raises(MaskError):
            adapter_pair.capture([], "resid_post.1")
        with pytest.raises(MaskError):
            adapter_pair.capture(TEXTS, "resid_post.1", on="assistent")
    assert not calls


def test_one_string_is_one_text(adapter_pair):
    acts = adapter_pair.capture(TEXTS[0], "resid_post.1")
    assert [text.text for text in acts.texts] == [TEXTS[0]]


# ---------------------------------------------------------------- sites


def test_lora_sites_are_on_the_finetuned_side_alone(adapter_pair):
    lora = adapter_pair.sides.lora
    acts = adapter_pair.capture(TEXTS, [*lora, "mlp_act.1", "mlp_act.2"])
    assert set(acts.finetuned) - set(acts.base) == set(lora)
    root = adapter_pair.sides.roots[1]
    for site in lora:
        module = root.model.layers[site.layer].mlp.down_proj
        truth = acts.finetuned[Site("mlp_act", site.layer)] @ module.lora_A["tuned"].weight.T
        torch.testing.assert_close(acts.finetuned[site], truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 3)])
def test_lora_sites_can_be_all_that_is_captured(layers):
    pair = ModelPair.of(peft_model(layers=layers), None, tokenizer())
    acts = pair.capture(TEXTS, pair.sides.lora)
    assert acts.base == {}
    for site in pair.sides.lora:
        run = pair.run([TEXTS[2]], reads=site)
        rows = acts.finetuned[site][acts.text_index == 2]
        torch.testing.assert_close(rows, run.acts[site][0, 1:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "site", ["resid_post.4", "lora.0.mlp.down_proj", "lora.1.mlp.up_proj", "lora.3.mlp.down_proj"]
)
def test_sites_that_do_not_exist(adapter_pair, site):
    with pytest.raises(SiteError, match=site if "lora" in site else "layers 0 to 3"):
        adapter_pair.capture(TEXTS, site)
    with pytest.raises(SiteError):
        adapter_pair.run(TEXTS, reads=site)


def test_lora_sites_do_not_exist_without_an_adapter(family_pairs, adapter_pair):
    with pytest.raises(SiteError, match=r"lora.1.mlp.down_proj"):
        family_pairs["llama"].capture(TEXTS, "lora.1.mlp.down_proj")
    with pytest.raises(SiteError, match=r"lora.1.mlp.down_proj"):
        adapter_pair.run(TEXTS, side="base", reads="lora.1.mlp.down_proj")


def test_the_single_site_is_known(adapter_pair):
    acts = adapter_pair.capture(TEXTS, ["resid_post.1", "resid_post.2"])
    with pytest.raises(MismatchError, match="captured 2 sites"):
        _ = acts.site
    difference = acts.difference("resid_post.2")
    site = Site("resid_post", 2)
    assert torch.equal(difference, acts.finetuned[site] - acts.base[site])
    assert difference.shape == (len(acts), WIDTH)


# ---------------------------------------------------------------- storage, cancelling, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_other_dtypes_are_refused(adapter_pair, dtype):
    with pytest.raises(MismatchError, match="float32 or bfloat16"):
        adapter_pair.capture(["the cat sat"], "resid_post.1", dtype=dtype)


@pytest.mark.ill_typed
def test_sides_of_other_widths_have_no_difference(adapter_pair):
    acts = adapter_pair.capture(["the cat sat"], "mlp_act.1")
    site = acts.site
    narrow = replace(acts, finetuned={site: acts.finetuned[site][:, 1:]})
    with pytest.raises(MismatchError, match="48 channels in the base and 47"):
        narrow.difference(site)


CHAT = Chat([{"role": "user", "content": "a"}])


@pytest.mark.ill_typed
@pytest.mark.parametrize("item", [Completion("the cat", " sat"), CHAT])
def test_one_item_is_one_text(adapter_pair, item):
    assert adapter_pair.texts(item) == adapter_pair.texts([item])


def test_bfloat16_storage(adapter_pair):
    full = adapter_pair.capture(TEXTS, "resid_post.2")
    half = adapter_pair.capture(TEXTS, "resid_post.2", dtype=torch.bfloat16)
    assert half.base[half.site].dtype == torch.bfloat16
    assert torch.equal(half.finetuned[half.site], full.finetuned[full.site].bfloat16())
    assert half.difference(half.site).dtype == torch.float32


def test_progress_is_reported(adapter_pair):
    seen = []
    adapter_pair.capture(
        TEXTS, "resid_post.1", max_tokens=8, progress=lambda *report: seen.append(report)
    )
    assert len(seen) > 2
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (5, 5)


def test_cancel_stops_between_batches(adapter_pair):
    stop = Event()
    seen = []

    def report(done, total, message):
        seen.append(done)
        stop.set()

    with pytest.raises(Cancelled):
        adapter_pair.capture(TEXTS, "resid_post.1", max_tokens=1, progress=report, cancel=stop)
    assert seen == [1]
    with counted(adapter_pair.sides.roots[0]) as calls, pytest.raises(Cancelled):
        adapter_pair.capture(TEXTS, "resid_post.1", cancel=stop)
    assert not calls


def test_stream_holds_no_more_than_two_batches(adapter_pair):
    texts = adapter_pair.texts([f"{text} {i}" for i in range(8) for text in TEXTS])
    alive, most, count = [], 0, 0
    for part in stream(adapter_pair.sides, texts, POSTS, max_tokens=1):
        alive += [weakref.ref(h) for h in part.run.finetuned.values()]
        most = max(most, sum(ref() is not None for ref in alive))
        count += 1
    assert count == len(texts)
    assert most <= 2 * len(POSTS)


def test_parts_of_a_stream_say_which_tokens_they_hold(adapter_pair):
    texts = adapter_pair.texts(TEXTS)
    whole = adapter_pair.capture(TEXTS, "resid_post.2")
    seen = 0
    for part in stream(adapter_pair.sides, texts, (whole.site,), max_tokens=24):
        rows = part.rows(part.run.finetuned, whole.site)
        for row, index, position in zip(rows, part.text_index, part.position, strict=True):
            here = (whole.text_index == index) & (whole.position == position)
            assert torch.equal(row, whole.finetuned[whole.site][here][0]) or torch.allclose(
                row, whole.finetuned[whole.site][here][0], atol=3e-5
            )
            seen += 1
    assert seen == len(whole)


def test_final_states_are_what_the_unembedding_reads(adapter_pair):
    texts = adapter_pair.texts(TEXTS)
    for part in stream(adapter_pair.sides, texts, (), final=True):
        for side, states in zip(("base", "finetuned"), part.run.final, strict=True):
            root = adapter_pair.sides.root(side)
            logits = root.lm_head(states)
            for row, text in enumerate(part.run.batch.texts):
                alone = adapter_pair.run([text], side=side).logits[0]
                torch.testing.assert_close(
                    logits[row, : text.n_tokens], alone, atol=1e-4, rtol=1e-4
                )
