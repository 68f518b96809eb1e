import math

import numpy as np
import pandas as pd
import pytest
import torch

from modeldiff import divergence
from modeldiff.difference_lens import difference_trace
from modeldiff.divergence import block_size, compare, kl_and_loss, logits_of
from modeldiff.edit_effects import effects
from modeldiff.errors import MismatchError
from modeldiff.interventions import Cell
from modeldiff.models import ModelPair
from modeldiff.outputs import TOKEN_COLUMNS, output_diff
from modeldiff.similarity import similarity
from modeldiff.token_scores import token_scores
from modeldiff.tokens import Completion
from tests.families import FAMILIES, build_adapter_pair, model, tokenizer

TEXTS = ["the cat sat on the mat and the dog ran", "a small bird sang of rain", "why was the moon"]


def dense(pair, texts):
    """The straightforward computation in float64, one text at a time."""
    rows = []
    for index, text in enumerate(texts):
        got = {}
        for side in ("base", "finetuned"):
            run = pair.run([text], side=side)
            got[side] = run.logits[0].double().log_softmax(-1)
        ids = run.batch.ids[0]
        for p in range(1, len(ids)):
            b, f = got["base"][p - 1], got["finetuned"][p - 1]
            m = torch.logaddexp(b, f) - math.log(2)
            y = ids[p]
            rows.append(
                {
                    "text": index,
                    "position": p,
                    "token_id": int(y),
                    "kl_ft_base": float((f.exp() * (f - b)).sum()),
                    "kl_base_ft": float((b.exp() * (b - f)).sum()),
                    "js": float((f.exp() * (f - m)).sum() + (b.exp() * (b - m)).sum()) / 2,
                    "delta_logprob": float(f[y] - b[y]),
                    "rank_base": int((b > b[y]).sum()),
                    "rank_ft": int((f > f[y]).sum()),
                    "entropy_change": float(-(f.exp() * f).sum() + (b.exp() * b).sum()),
                    "top1_flip": bool(b.argmax() != f.argmax()),
                    "ratio": (f - b).numpy(),
                }
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_metric_equals_the_dense_computation(family_pairs, family):
    pair = family_pairs[family]
    found = output_diff(pair.sides, TEXTS, k=3, budget=1)  # one token a block
    want = dense(pair, TEXTS)
    for column in want.columns.drop("ratio"):
        np.testing.assert_allclose(
            found.tokens[column].to_numpy(float), want[column].to_numpy(float), rtol=2e-4, atol=2e-5
        )
    assert set(TOKEN_COLUMNS) <= set(found.tokens.columns)


def test_mined_counts_equal_the_dense_counts(adapter_pair):
    found = output_diff(adapter_pair.sides, TEXTS, k=3, budget=1)
    ratio = np.stack(dense(adapter_pair, TEXTS)["ratio"].tolist())
    top = np.argsort(-ratio, axis=1)[:, :3]
    bottom = np.argsort(ratio, axis=1)[:, :3]
    vocab = ratio.shape[1]
    table = found.vocabulary
    np.testing.assert_array_equal(table["n_promoted"], np.bincount(top.ravel(), minlength=vocab))
    np.testing.assert_array_equal(table["n_demoted"], np.bincount(bottom.ravel(), minlength=vocab))
    np.testing.assert_allclose(table["mean_log_ratio"], ratio.mean(0), atol=1e-5)
    np.testing.assert_array_equal(
        table["share_promoted"] * len(ratio), (ratio > 0).sum(0), err_msg="positive counts"
    )


@pytest.mark.parametrize("k", [0, -1, 401])
def test_k_is_a_number_of_tokens(adapter_pair, k):
    for call in (lambda: adapter_pair.output_diff(["the cat sat"], k=k),
                 lambda: token_scores(adapter_pair.sides, "the cat sat", k=k)):  # fmt: skip
        with pytest.raises(MismatchError, match=f"k={k}: give 1 to"):
            call()


def test_numbers_that_are_not_finite_are_errors():
    """NaN would read as no difference, and the most promoted tokens would be any."""
    tuned = model("llama", 1)
    tuned.model.embed_tokens.weight[tokenizer()(" moon").input_ids[-1]] = torch.nan
    pair = ModelPair.of(model("llama"), tuned, tokenizer())
    texts = ["why was the moon round", "the moon was far away", "a moon and the sun", "moon of me"]
    calls = (
        lambda: pair.output_diff(texts),
        lambda: effects(pair.sides, texts, [Cell("finetuned")]),
        lambda: difference_trace(pair.sides, texts, n_positions=3),
        lambda: similarity(pair.sides, texts, "resid_post.1"),
    )
    for call in calls:
        with pytest.raises(MismatchError, match="are not finite: a side's weights"):
            call()


def test_block_size_and_batching_do_not_matter(adapter_pair):
    one = output_diff(adapter_pair.sides, TEXTS, budget=1, max_tokens=1)
    all_at_once = output_diff(adapter_pair.sides, TEXTS)
    numeric = [c for c in one.tokens.columns if one.tokens[c].dtype.kind in "fib"]
    np.testing.assert_allclose(
        one.tokens[numeric].to_numpy(float), all_at_once.tokens[numeric].to_numpy(float), atol=2e-5
    )
    pd.testing.assert_frame_equal(
        one.vocabulary[["n_promoted", "n_demoted"]],
        all_at_once.vocabulary[["n_promoted", "n_demoted"]],
    )


def test_kl_is_labelled_the_right_way_round():
    """A bias of beta on one logit: both KLs have closed forms, and they differ."""
    pb, beta = torch.tensor([0.7, 0.2, 0.1]), 1.5
    base = pb.log()[None]
    tuned = base + torch.tensor([[0.0, 0.0, beta]])
    z = float(0.9 + 0.1 * math.exp(beta))
    block = compare(base, tuned, torch.tensor([2]), 1)
    p2 = 0.1 * math.exp(beta) / z
    assert float(block.kl_fb) == pytest.approx(p2 * beta - math.log(z), rel=1e-5)
    assert float(block.kl_bf) == pytest.approx(-0.1 * beta + math.log(z), rel=1e-5)
    assert float(block.logprob[0, 1] - block.logprob[0, 0]) == pytest.approx(beta - math.log(z))


def test_small_divergences_are_accurate_and_never_negative():
    """At a mean KL of 2e-3 over a large vocabulary the float32 error stays below 5e-3."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, 50_000, generator=g) * 2
    tuned = base + 0.06 * torch.randn(64, 50_000, generator=g)
    block = compare(base, tuned, torch.zeros(64, dtype=torch.int64), 5)
    b, f = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    exact = (f.exp() * (f - b)).sum(-1)
    assert 1e-3 < exact.mean() < 3e-3
    assert float(((block.kl_fb - exact).abs() / exact).max()) < 5e-3
    assert float(torch.stack([block.kl_fb, block.kl_bf, block.js]).min()) > -1e-6
    assert float(block.js.max()) <= math.log(2)


def test_disjoint_distributions_reach_ln2():
    base, tuned = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert float(compare(base, tuned, torch.tensor([0]), 1).js) == pytest.approx(math.log(2))


def test_the_null_pair_reports_exactly_no_difference():
    peft = build_adapter_pair()
    same = ModelPair.of(model("llama"), model("llama"), tokenizer(), allow_identical=True)
    found = output_diff(same.sides, TEXTS)
    numeric = ["kl_ft_base", "kl_base_ft", "js", "delta_logprob", "rank_move", "entropy_change"]
    assert (found.tokens[numeric].abs().to_numpy() == 0).all()
    assert not found.tokens["top1_flip"].any()
    assert found.vocabulary["n_promoted"].sum() == found.vocabulary["n_demoted"].sum() == 0
    assert output_diff(peft.sides, TEXTS).tokens["kl_ft_base"].mean() > 0.01


def test_rows_are_at_the_predicted_token_and_masks_select_it(adapter_pair):
    item = Completion("the cat sat on the mat", " and the dog ran")
    (text,) = adapter_pair.texts([item])
    found = output_diff(adapter_pair.sides, [item], on="new")
    assert found.tokens["position"].tolist() == list(range(text.n_prompt, text.n_tokens))
    assert found.tokens["token"].tolist() == list(text.pieces[text.n_prompt :])
    everything = output_diff(adapter_pair.sides, [item])
    assert everything.tokens["position"].tolist() == list(range(1, text.n_tokens))


def test_sources_are_kept_apart_and_intervals_resample_texts(adapter_pair):
    named = {"on-policy base": TEXTS[:2], "on-policy finetuned": TEXTS[1:]}
    found = output_diff(adapter_pair.sides, named)
    summary = found.summary(seed=1)
    by_text = found.by_text()
    assert by_text["n_tokens"].sum() == len(found.tokens)
    for name in named:
        part = found.tokens[found.tokens["source"] == name]
        mine = summary[(summary["source"] == name) & (summary["metric"] == "kl_ft_base")]
        (row,) = mine.to_dict("records")
        assert row["estimate"] == pytest.approx(part["kl_ft_base"].mean())
        assert row["low"] <= row["estimate"] <= row["high"]
        assert row["n_texts"] == len(named[name])


def test_no_tensor_of_all_tokens_by_vocabulary_exists(adapter_pair, monkeypatch):
    seen = []
    real = divergence.divergences
    monkeypatch.setattr(
        divergence, "divergences", lambda b, f, c, k: seen.append(b.shape) or real(b, f, c, k)
    )
    vocab = adapter_pair.sides.config.vocab_size
    budget = 4 * vocab * 8 * 5
    output_diff(adapter_pair.sides, TEXTS * 5, budget=budget)
    assert max(shape[0] for shape in seen) == block_size(vocab, budget) == 5


def test_fast_kl_equals_the_full_comparison():
    g = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 300, 16, generator=g)
    h, reference = torch.randn(2, 20, 16, generator=g)
    came = torch.randint(300, (20,), generator=g)
    kl, loss = kl_and_loss(h, reference, lambda x: x @ weight.T, lambda x: x @ other.T, came, 1)
    block = compare(reference @ other.T, h @ weight.T, came, 1)
    torch.testing.assert_close(kl, block.kl_fb, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(-loss, block.logprob[:, 1])


def test_logits_that_are_not_rounded_to_16_bits_give_a_divergence_ten_times_as_exact(monkeypatch):
    """With a matrix product that writes float32, as GPUs have; no hook or gradient is passed by."""
    product = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype=None: product(*(x.to(out_dtype) for x in (a, b)))
        if out_dtype else product(a, b),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(256, 8000, bias=False).bfloat16()
    head.weight.data = (torch.randn(8000, 256, generator=g) * 1.2 / 16).bfloat16()
    reference = torch.randn(32, 256, generator=g)
    h = (reference + 0.05 * torch.randn(32, 256, generator=g)).bfloat16()
    reference, came = reference.bfloat16(), torch.zeros(32, dtype=torch.long)
    weight = head.weight.detach().double()
    p, q = ((x.double() @ weight.T).log_softmax(-1) for x in (h, reference))
    truth = float((p.exp() * (p - q)).sum(-1).mean())

    def error():
        unembed = lambda x: logits_of(head, x, None)  # noqa: E731
        with torch.no_grad():
            kl = kl_and_loss(h, reference, unembed, unembed, came, 1 << 20)[0]
        return abs(float(kl.double().mean()) / truth - 1)

    divergence._writes_float32.cache_clear()
    assert error() < 1e-4

    def doubled(module, args, out) -> torch.Tensor:
        return out * 2

    handle = head.register_forward_hook(doubled)
    assert error() > 0.1, "a hook was passed by"
    handle.remove()
    monkeypatch.undo()
    divergence._writes_float32.cache_clear()
    assert not divergence._writes_float32("cpu", torch.bfloat16)
    assert 1e-3 < error() < 0.02
    assert logits_of(head, h, None).requires_grad
