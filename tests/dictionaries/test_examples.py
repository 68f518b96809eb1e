from threading import Event

import pytest
import torch

from modeldiff.dictionaries.examples import NO_TOKEN, max_activating, whole_documents
from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import Cancelled, MismatchError

D, F = 16, 24


def dictionary():
    made = crosscoder(D, F, k=3, activation="relu", seed=1)
    with torch.no_grad():
        made.W_enc.mul_(10)
        made.b_enc.fill_(-3.0)
        made.b_enc[5] = -1e6  # dead
    return made


def corpus(n_docs=60, seed=0):
    """Texts of 1 to 40 tokens that begin at position 1, as without BOS; the last is a repeat."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n_docs,), generator=rng)
    lengths[-1] = lengths[0]
    doc = torch.arange(n_docs).repeat_interleave(lengths)
    position = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
    ids = torch.randint(1, 500, (len(doc),), generator=rng)
    acts = torch.randn(len(doc), 2, D, generator=rng)
    first, last = doc == 0, doc == n_docs - 1
    ids[last], acts[last] = ids[first], acts[first]
    return TensorRows(acts, ids, doc, position)


def brute(made, source, latent):
    """Peaks of every different text, strongest first: (value, document, row)."""
    dense, every = made.encode_dense(source.acts)[:, latent], next(source.in_order(10**6))
    peaks, seen = [], set()
    for doc in every.document.unique().tolist():
        rows = (every.document == doc).nonzero()[:, 0]
        text = tuple(every.token_id[rows].tolist())
        value, at = dense[rows].max(0)
        if value > 0 and text not in seen:
            peaks.append((float(value), doc, int(rows[at])))
        seen.add(text)
    return sorted(peaks, reverse=True), dense


@pytest.mark.parametrize("batch_size", [7, 100, 10_000])
def test_the_strongest_texts_are_those_of_a_search_through_everything(batch_size):
    made, source, window = dictionary(), corpus(), (4, 3)
    found = max_activating(made, source, k=5, window=window, batch_size=batch_size)
    every = next(source.in_order(10**6))
    for latent in range(F):
        want, dense = brute(made, source, latent)
        got = found.of(latent)
        assert len(got) == min(5, len(want)), latent
        for rank, (example, (value, doc, row)) in enumerate(zip(got, want, strict=False)):
            assert (example.kind, example.rank, example.document) == ("max", rank, doc)
            assert example.value == pytest.approx(value, rel=1e-5)
            assert example.position == int(every.position[row])
            near = [r for r in range(row - 4, row + 4)
                    if 0 <= r < source.n_rows and every.document[r] == doc]  # fmt: skip
            assert example.token_ids == tuple(every.token_id[near].tolist())
            assert example.activations == pytest.approx(dense[near].tolist(), rel=1e-4, abs=1e-6)
            assert near[example.peak] == row
            assert max(example.activations) == example.activations[example.peak]
    assert found.of(5) == []


def test_a_text_that_comes_twice_is_shown_once():
    made, source = dictionary(), corpus()
    found = max_activating(made, source, k=60).table()
    best = found[found["document"].isin([0, 59])].groupby("latent").size()
    assert len(best) > 0
    assert (best == 1).all()


def test_results_do_not_depend_on_how_rows_are_batched():
    made, source = dictionary(), corpus()
    a, b = (max_activating(made, source, k=4, n_sample=6, batch_size=size) for size in (11, 5000))
    assert a.table()[["latent", "kind", "rank", "document", "position"]].equals(
        b.table()[["latent", "kind", "rank", "document", "position"]]
    )
    assert torch.equal(a.sampled.token_ids, b.sampled.token_ids)


def test_the_sample_is_fair_and_quantiles_divide_it():
    """Every text in which a latent fires is drawn equally often, whatever its strength."""
    made, source, latent = dictionary(), corpus(), 3
    want, _ = brute(made, source, latent)
    rank_of = {doc: rank / len(want) for rank, (_, doc, _) in enumerate(want)}
    means, drawn = (
        [],
        [max_activating(made, source, [latent], k=0, n_sample=10, seed=seed) for seed in range(30)],
    )
    for found in drawn:
        means += [rank_of[each.document] for each in found.of(latent)]
        assert len(found.of(latent)) == 10
    assert abs(sum(means) / len(means) - 0.5) < 0.06
    groups = drawn[0].quantiles(latent, 5)
    assert [len(group) for group in groups] == [2] * 5
    values = [each.value for group in groups for each in group]
    assert values == sorted(values, reverse=True)


def test_rows_without_documents_are_texts_of_their_own():
    made, source = dictionary(), TensorRows(torch.randn(500, 2, D))
    found = max_activating(made, source, [2], k=8, batch_size=64)
    dense = made.encode_dense(source.acts)[:, 2]
    assert [each.value for each in found.of(2)] == pytest.approx(dense.topk(8).values.tolist())
    assert all(len(each.token_ids) == 1 for each in found.of(2))


def test_tokens_are_named_by_a_tokenizer(adapter_pair):
    ids = torch.tensor(adapter_pair.tokenizer("the cat sat on the mat").input_ids)
    n = len(ids)
    acts = torch.zeros(n, 2, D)
    acts[2, :, 0] = 5.0
    made = crosscoder(D, 2, k=1, activation="relu")
    with torch.no_grad():
        made.W_enc.zero_()[:, 0, 1] = 1.0
    source = TensorRows(acts, ids, torch.zeros(n).long(), torch.arange(n))
    (example,) = max_activating(made, source, [1]).of(1, adapter_pair.tokenizer)
    assert "".join(example.tokens).strip().endswith("the cat sat on the mat")
    assert example.tokens[example.peak] == adapter_pair.tokenizer.decode(ids[2])
    assert example.activations.count(0.0) == n - 1


def test_blocks_hold_whole_texts_unless_one_is_too_long():
    source = corpus()
    blocks = list(whole_documents(source.in_order(9)))
    assert sum(map(len, blocks)) == source.n_rows
    owners = [set(block.document.tolist()) for block in blocks]
    assert sum(map(len, owners)) == 60
    one = TensorRows(torch.zeros(100, 2, 1), document=torch.zeros(100).long(),
                     position=torch.arange(100))  # fmt: skip
    assert [len(block) for block in whole_documents(one.in_order(10), limit=30)] == [30, 30, 30, 10]


def test_unused_places_are_empty_and_what_does_not_exist_is_an_error():
    made, source = dictionary(), corpus(3)
    found = max_activating(made, source, [1, 5], k=10)
    assert (found.strongest.token_ids[1] == NO_TOKEN).all()
    with pytest.raises(MismatchError, match="not among"):
        found.of(2)
    with pytest.raises(MismatchError, match="there are 0 to"):
        max_activating(made, source, [F])


def test_cancelling_keeps_the_examples_so_far():
    made, source, cancel = dictionary(), corpus(), Event()
    with pytest.raises(Cancelled) as caught:
        max_activating(made, source, batch_size=100, cancel=cancel,
                       progress=lambda done, total, message: cancel.set())  # fmt: skip
    assert caught.value.partial.n_texts.sum() > 0
    assert caught.value.partial.table()["document"].max() < 20
