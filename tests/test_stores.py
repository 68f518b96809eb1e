"""Stores: every row where it belongs, shuffled alike every time, read by several at once."""

# pyright: reportArgumentType=false

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.sources import Rows
from modeldiff.errors import MismatchError, SiteError
from modeldiff.harvesting import harvest
from modeldiff.store_reading import BLOCK, fills, rebatched, shuffled
from modeldiff.stores import ActivationStore

SITES = ("resid_post.1", "z.2")
TEXTS = [f"{'a small bird sang of rain and sun ' * (2 + i % 3)}and {i}" for i in range(90)]


@pytest.fixture(scope="module")
def store(adapter_pair, tmp_path_factory):
    """A few thousand rows in several shards, none of which ends with a block."""
    folder = tmp_path_factory.mktemp("store")
    made = harvest(adapter_pair, TEXTS, SITES, folder, rows_per_shard=700)
    assert len(made) > 5 * BLOCK
    assert len(made.manifest["shards"]) > 3
    return made


@pytest.fixture(scope="module")
def truth(adapter_pair):
    return adapter_pair.capture(TEXTS, SITES)


@pytest.mark.parametrize("site", SITES)
def test_rows_by_number(store, truth, site):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, len(store), (400,), generator=generator)
    both = torch.stack((truth.base[truth.sites[0]], truth.finetuned[truth.sites[0]]), 1)
    at = next(each for each in truth.sites if str(each) == site)
    both = torch.stack((truth.base[at], truth.finetuned[at]), 1)
    found = store.rows(site, index)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), both[index], rtol=2**-7, atol=1e-3)
    everything = store.rows(site, slice(None))
    assert torch.equal(found, everything[index])
    assert torch.equal(store.rows(site, index.numpy()), found)
    assert torch.equal(store.rows(site, index.tolist()), found)
    assert torch.equal(store.rows(site, [-1, 0, -len(store)]), everything[[-1, 0, 0]])
    assert torch.equal(store.rows(site, slice(690, 710)), everything[690:710])
    assert store.rows(site, []).shape == (0, 2, 32)


def test_what_is_not_there(store):
    for index in ([len(store)], [-len(store) - 1]):
        with pytest.raises(MismatchError, match=f"a store with {len(store)} rows"):
            store.rows("z.2", index)
    with pytest.raises(SiteError, match=r"resid_post\.2: the store .* has resid_post\.1, z\.2"):
        store.rows("resid_post.2", [0])
    with pytest.raises(SiteError, match="say which"):
        store.source()
    with pytest.raises(MismatchError, match="smaller batch_size"):
        next(store.source("z.2").shuffled(len(store) + 1, seed=0))


def test_every_row_knows_its_token(store, adapter_pair):
    texts = adapter_pair.texts(TEXTS)
    assert store.n_documents == len(texts)
    for row in range(0, len(store), 97):
        document, position = int(store.documents[row]), int(store.positions[row])
        assert texts[document].ids[position] == int(store.token_ids[row])
        found = store.document(document)
        assert found.ids == texts[document].ids
        assert found.roles == texts[document].roles
        assert found.kept[row - found.first_row] == position


def test_in_order(store):
    source = store.source("z.2")
    batches = list(source.in_order(600))
    assert [len(rows) for rows in batches[:-1]] == [600] * (len(batches) - 1)
    acts = torch.cat([rows.acts for rows in batches])
    assert acts.dtype == torch.bfloat16
    assert torch.equal(acts, store.rows("z.2", slice(None)))
    assert torch.equal(torch.cat([rows.document for rows in batches]), store.documents)
    assert (source.n_rows, source.d_model) == (len(store), 32)
    assert source.key != store.source("resid_post.1").key


@pytest.mark.parametrize("pool_rows", [100, 1100, 1 << 15])
def test_shuffled_batches_hold_every_row_once_an_epoch(store, pool_rows):
    source = store.source("resid_post.1", pool_rows=pool_rows)
    everything, n = store.rows("resid_post.1", slice(None)), len(store)
    number = {
        place: row
        for row, place in enumerate(
            zip(store.documents.tolist(), store.positions.tolist(), strict=True)
        )
    }
    batches, orders = source.shuffled(128, seed=1), []
    for _ in range(2):
        order = []
        for _ in range(n // 128):
            rows = next(batches)
            assert len(rows) == 128
            places = zip(rows.document.tolist(), rows.position.tolist(), strict=True)
            index = [number[each] for each in places]
            assert torch.equal(rows.acts, everything[index])
            assert torch.equal(rows.token_id, store.token_ids[index])
            order += index
        assert len(set(order)) == len(order) == n // 128 * 128
        orders.append(order)
    assert orders[0] != orders[1]
    blocks = len({row // BLOCK for row in orders[0][:128]})
    assert blocks >= (1 if pool_rows < BLOCK else 2 if pool_rows < 2000 else 5)
    neighbours = np.mean(np.abs(np.diff(orders[0])) == 1)
    assert neighbours < 0.02


def test_the_order_is_a_function_of_seed_and_number_alone(store):
    source = store.source("z.2", pool_rows=1100)
    batches, again = source.shuffled(300, seed=4), source.shuffled(300, seed=4)
    first = [next(batches) for _ in range(3 * (len(store) // 300))]
    assert all(torch.equal(rows.acts, next(again).acts) for rows in first)
    for start in range(len(first)):
        rows = next(ActivationStore.open(store.folder).source("z.2", pool_rows=1100).shuffled(
            300, seed=4, start=start))  # fmt: skip
        assert torch.equal(rows.acts, first[start].acts)
        assert torch.equal(rows.position, first[start].position)
    other = next(source.shuffled(300, seed=5))
    assert not torch.equal(other.acts, first[0].acts)


def test_starting_late_reads_no_more_than_one_fill(store, monkeypatch):
    source, read = store.source("z.2", pool_rows=600), []
    real = type(source)._read
    monkeypatch.setattr(
        type(source),
        "_read",
        lambda self, spans, out: read.append(len(spans)) or real(self, spans, out),
    )
    next(source.shuffled(100, seed=0, start=17))
    assert read == [2]


def test_fills_hold_whole_units_and_all_of_them():
    generator = np.random.default_rng(0)
    for trial in range(60):
        sizes = generator.integers(0, 7, 20)
        order = generator.permutation(20)
        groups = fills(order, sizes, 1 + trial % 11)
        assert np.concatenate(groups).tolist() == order.tolist()
        assert all(sizes[group].sum() >= 1 + trial % 11 for group in groups[:-1])


def test_batches_are_cut_across_pools():
    zeros = torch.zeros(10, dtype=torch.long)
    pool = Rows(torch.arange(10.0)[:, None, None], zeros, zeros, torch.arange(10))
    pools = [(pool, torch.tensor([3, 1, 4])), (pool, torch.tensor([0, 5, 9, 2])), (pool, zeros[:0])]
    found = [rows.position.tolist() for rows in rebatched(pools, 2)]
    assert found == [[3, 1], [4, 0], [5, 9], [2]]
    with pytest.raises(MismatchError, match="batch -1"):
        next(shuffled([4], lambda units: pool, 2, pool_rows=4, seed=0, start=-1))


def _read_some(store, results):
    torch.set_num_threads(1)
    rows = next(store.source("z.2").shuffled(512, seed=7))
    results.put((float(rows.acts.double().sum()), float(store.rows("z.2", [5, 900]).sum())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_processes_read_at_once(store):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read_some, args=(store, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    rows = next(store.source("z.2").shuffled(512, seed=7))
    assert found == {(float(rows.acts.double().sum()), float(store.rows("z.2", [5, 900]).sum()))}


def test_a_pickled_store_is_its_folder(store):
    store.rows("z.2", slice(None))
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    again = pickle.loads(sent)  # noqa: S301
    assert torch.equal(again.rows("z.2", [3, 1]), store.rows("z.2", [3, 1]))
    assert again.key == store.key


def test_the_normaliser_is_the_one_that_the_rows_give(store):
    for site in store.sites:
        rows = store.rows(site, slice(None)).float()
        fitted, stored = Normaliser.fit(rows), store.normaliser(site)
        torch.testing.assert_close(stored.mean, fitted.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stored.scale, fitted.scale, rtol=1e-5, atol=0)
        lengths = stored.apply(rows).square().sum(2).mean(0)
        torch.testing.assert_close(lengths, torch.full((2,), 32.0), rtol=1e-4, atol=0)
