"""Training beside harvesting: every row once, the same order whatever comes when, and an end."""

# pyright: reportArgumentType=false

from threading import Event, Thread

import pytest
import torch

from modeldiff import store_following
from modeldiff.cli import OK, main
from modeldiff.dictionaries.models import Dictionary
from modeldiff.errors import Cancelled, FileFormatError, SetupError, SiteError, StoreError
from modeldiff.harvesting import harvest
from modeldiff.store_files import shard_path
from modeldiff.store_following import followed
from modeldiff.store_places import Place
from modeldiff.stores import ActivationStore

SITE = "resid_post.1"
TEXTS = [f"{'the cat sat on the mat and ' * (1 + i % 4)}the dog {i} ran" for i in range(24)]
OPTIONS = {"rows_per_shard": 40, "max_tokens": 120}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(store_following, "_TICK", 0.01)


def harvest_a_part(pair, folder, n_shards):
    """A harvest that was stopped after some shards."""
    stop, seen = Event(), []

    def watch(done, total, message):
        seen.append(done)
        if len(seen) == n_shards:
            stop.set()

    with pytest.raises(Cancelled):
        harvest(pair, TEXTS, SITE, folder, progress=watch, cancel=stop, **OPTIONS)


def first_epoch(rows, batch=32, **options):
    batches = rows.shuffled(batch, seed=4, **options)
    several = [next(batches) for _ in range(rows.n_rows // batch)]
    return [torch.cat([getattr(each, name) for each in several]) for name in
            ("acts", "document", "position")]  # fmt: skip


def test_a_reader_that_is_ahead_waits_and_has_every_row_once(adapter_pair, tmp_path):
    folder, found, begun = tmp_path / "store", [], Event()
    reader = Thread(target=lambda: (begun.set(), found.append(first_epoch(followed(folder)))))
    reader.start()
    begun.wait()
    harvest_a_part(adapter_pair, folder, 2)
    assert not found
    harvest(adapter_pair, TEXTS, SITE, folder, **OPTIONS)
    reader.join(60)
    (waited,) = found
    rows = followed(folder)
    assert all(torch.equal(a, b) for a, b in zip(waited, first_epoch(rows), strict=True))
    store = ActivationStore.open(folder)
    taken = sorted(zip(waited[1].tolist(), waited[2].tolist(), strict=True))
    assert len(set(taken)) == len(taken) == len(store) // 32 * 32
    every = zip(store.documents.tolist(), store.positions.tolist(), strict=True)
    place = {key: i for i, key in enumerate(every)}
    index = [place[key] for key in zip(waited[1].tolist(), waited[2].tolist(), strict=True)]
    assert torch.equal(waited[0], store.rows(SITE, index))
    assert index != sorted(index), "shuffled within the pool"
    assert rows.key != store.source().key, "another order is another run"
    again = next(rows.shuffled(32, seed=4, start=3)).acts
    assert torch.equal(again, waited[0][3 * 32 : 4 * 32])


def test_only_what_is_needed_is_waited_for(adapter_pair, tmp_path):
    harvest_a_part(adapter_pair, tmp_path / "store", 2)
    rows = followed(tmp_path / "store", minutes=0.002)
    assert rows.d_model == 32
    assert len(next(rows.in_order(32))) == 32
    with pytest.raises(StoreError, match=r"shard 2 of .* has the harvest ended"):
        list(rows.in_order(rows.n_rows))
    stop = Event()
    stop.set()
    rows = followed(tmp_path / "store", cancel=stop)
    with pytest.raises(Cancelled):
        list(rows.in_order(rows.n_rows))


def test_a_half_written_shard_is_not_read(adapter_pair, tmp_path):
    harvest_a_part(adapter_pair, tmp_path, 2)
    path = shard_path(tmp_path, SITE, 0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match="shard 0"):
        _ = followed(tmp_path, minutes=0.001).d_model


def test_an_address_is_followed_into_a_copy(adapter_pair, tmp_path):
    harvest(adapter_pair, TEXTS, SITE, tmp_path / "whole", **OPTIONS)
    url = "memory://followed/run"
    place = Place(url, tmp_path / "whole")
    files = [str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*")
             if p.is_file()]  # fmt: skip
    late = sorted(name for name in files if "receipts" in name)[1:]

    def send(names):
        for name in names:
            place.send(name)

    send([name for name in files if name not in late])
    rows = followed(url, SITE, copy=tmp_path / "copy")
    assert rows.d_model == 32
    sender = Thread(target=send, args=(late,))
    sender.start()
    assert all(map(torch.equal, first_epoch(rows), first_epoch(followed(tmp_path / "whole"))))
    sender.join()
    harvest(adapter_pair, TEXTS[:3], SITE, tmp_path / "other", **OPTIONS)
    with pytest.raises(FileFormatError, match="another store"):
        followed(url, copy=tmp_path / "other")
    with pytest.raises(SetupError, match="a folder here to copy"):
        followed(url)
    with pytest.raises(SiteError, match=r"resid_post\.1"):
        followed(tmp_path / "whole", "resid_post.2")
    with pytest.raises(StoreError, match="to begin"):
        followed("memory://nothing/here", copy=tmp_path / "no", minutes=0.001)


def test_the_command_trains_beside_the_harvest_as_after_it(adapter_pair, tmp_path):
    store, options = tmp_path / "store", ["--steps", "30", "--batch", "64", "--latents", "64",
                                          "--k", "2", "--quiet", "--follow"]  # fmt: skip
    harvester = Thread(target=lambda: harvest(adapter_pair, TEXTS, SITE, store, **OPTIONS))
    harvester.start()
    assert main(["train", str(store), "--out", str(tmp_path / "a"), *options]) == OK
    harvester.join()
    assert main(["train", str(store), "--out", str(tmp_path / "b"), *options]) == OK
    weights = [Dictionary.load_from(tmp_path / name).W_dec for name in "ab"]
    assert torch.equal(*weights)
