"""Harvest: equal to capture, unbroken by kills and full disks, one store for one key."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import errno
import json
import os
import signal
import sys
import weakref
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from modeldiff.errors import (
    Cancelled,
    FileFormatError,
    MaskError,
    MismatchError,
    SiteError,
    StoreError,
)
from modeldiff.harvesting import harvest
from modeldiff.hooks import replay
from modeldiff.live_rows import streamed
from modeldiff.store_files import locked, plan_shards, write_statistics
from modeldiff.store_statistics import RowStatistics
from modeldiff.stores import ActivationStore
from modeldiff.tokens import Chat
from tests.families import build_adapter_pair

MODULE: Any = import_module("modeldiff.harvesting")
LIVE: Any = import_module("modeldiff.live_rows")
SITES = ("resid_post.2", "mlp_act.1", "z.3")
TEXTS = [f"{'the cat sat on the mat and ' * (1 + i % 4)}the dog {i} ran" for i in range(17)]
OPTIONS = {"rows_per_shard": 60, "max_tokens": 120}


def content(folder):
    """Every file of a folder by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def whole(adapter_pair, tmp_path_factory):
    """A harvest that nothing stopped."""
    return harvest(adapter_pair, TEXTS, SITES, tmp_path_factory.mktemp("whole"), **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_equal_capture(adapter_pair, family_pairs, tmp_path, dtype):
    for number, pair in enumerate((adapter_pair, family_pairs["gpt2"])):
        store = harvest(
            pair.sides, iter(TEXTS), SITES, tmp_path / str(number), dtype=dtype, **OPTIONS
        )
        acts = pair.capture(TEXTS, SITES)
        assert store.sites == acts.sites
        assert store.dtype == dtype
        assert len(store) == len(acts) > 200
        assert store.n_documents == len(TEXTS)
        for site in acts.sites:
            rows = store.rows(site, slice(None))
            truth = torch.stack((acts.base[site], acts.finetuned[site]), 1)
            ulp = 2**-7 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(rows.float(), truth, rtol=ulp, atol=3e-5)
            assert rows.dtype == dtype
        assert torch.equal(store.token_ids, acts.token_ids)
        assert torch.equal(store.documents, acts.text_index)
        assert torch.equal(store.positions, acts.position)


def test_bos_and_padding_and_what_the_mask_leaves_out_are_not_kept(adapter_pair, tmp_path):
    items = [
        Chat([{"role": "user", "content": "why"}], "the moon was round"),
        "no chat, so nothing of it is kept",
        Chat([{"role": "user", "content": "a small bird sang of rain"}], "why"),
    ]
    store = harvest(adapter_pair, items, "resid_post.1", tmp_path, on="assistant")
    texts = adapter_pair.texts(items)
    expected = [
        (number, i)
        for number, text in enumerate(texts)
        for i, role in enumerate(text.roles)
        if role == "assistant"
    ]
    origins = zip(store.documents.tolist(), store.positions.tolist(), strict=True)
    assert list(origins) == expected
    assert store.document(1).kept == ()
    assert store.document(2).ids == texts[2].ids
    assert store.document(2).roles == texts[2].roles
    assert store.document(2).n_prompt == texts[2].n_prompt
    bos = harvest(adapter_pair, items, "resid_post.1", tmp_path / "bos", skip_first=0)
    assert set(bos.positions[bos.positions < 1].tolist()) == {0}
    plain = harvest(adapter_pair, items, "resid_post.1", tmp_path / "plain")
    assert int(plain.positions.min()) == 1
    assert len(plain) == len(bos) - 3 == sum(text.n_tokens for text in texts) - 3


def test_layers_below_the_adapter_run_once_and_each_shard_by_itself(tmp_path, monkeypatch):
    pair = build_adapter_pair(layers=(2,))
    calls = []
    root = pair.sides.roots[0]
    handles = [
        layer.register_forward_hook(lambda m, a, o, i=i: calls.append(i))
        for i, layer in enumerate(root.model.layers)
    ]
    branches = []
    monkeypatch.setattr(
        "modeldiff.forward.replay", lambda *args: branches.append(1) or replay(*args)
    )
    store = harvest(pair, TEXTS, "resid_post.2", tmp_path, **OPTIONS)
    for handle in handles:
        handle.remove()
    assert calls.count(0) == calls.count(1) == len(branches) > len(store.manifest["shards"]) > 3
    assert calls.count(2) == 2 * len(branches)
    assert 3 not in calls


def test_shards_hold_whole_texts_and_every_row_once():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        counts = torch.randint(0, 9, (30,), generator=generator).numpy() + (trial == 0)
        shards = plan_shards(counts, 1 + trial % 13)
        assert [s.documents[0] for s in shards[1:]] == [s.documents[1] for s in shards[:-1]]
        assert [s.n_rows for s in shards] == [
            int(counts[slice(*s.documents)].sum()) for s in shards
        ]
        assert sum(s.n_rows for s in shards) == counts.sum()
        assert all(s.n_rows >= 1 + trial % 13 for s in shards[:-1])


def test_texts_are_taken_one_by_one_and_let_go(adapter_pair, tmp_path):
    alive = weakref.WeakSet()

    def items():
        for text in TEXTS:
            (rendered,) = adapter_pair.texts([text])
            alive.add(rendered)
            assert len(alive) <= 2
            yield rendered

    store = harvest(adapter_pair, items(), "resid_post.0", tmp_path)
    assert store.n_documents == len(TEXTS)
    one = harvest(adapter_pair, TEXTS[0], "resid_post.0", tmp_path / "one")
    assert one.n_documents == 1


def test_the_same_key_returns_at_once_another_is_an_error(adapter_pair, whole, monkeypatch):
    before = content(whole.folder)

    def never(*args, **kwargs):
        raise AssertionError("the models ran")

    monkeypatch.setattr(LIVE, "run_pair", never)
    again = harvest(adapter_pair, (text for text in TEXTS), SITES, whole.folder, **OPTIONS)
    assert (again.key, len(again)) == (whole.key, len(whole))
    changed = {
        "texts": {"items": [*TEXTS[:-1], "another"]},
        "finetuned": {"pair": build_adapter_pair(seed=5)},
        "sites": {"at": "resid_post.2"},
        "dtype": {"dtype": torch.float32},
        "skip_first": {"skip_first": 2},
        "mask": {"on": "text"},
        "rows_per_shard": {"rows_per_shard": 61},
    }
    for name, change in changed.items():
        arguments = {"pair": adapter_pair, "items": TEXTS, "at": SITES, **OPTIONS, **change}
        with pytest.raises(MismatchError, match=rf"another harvest \(.*{name}: "):
            harvest(folder=whole.folder, **arguments)
    monkeypatch.setattr(MODULE, "__version__", "9.9.9")
    with pytest.raises(MismatchError, match=r"modeldiff: .* there, '9\.9\.9' here"):
        harvest(adapter_pair, TEXTS, SITES, whole.folder, **OPTIONS)
    assert content(whole.folder) == before


def killed_harvest(pair, folder, n_writes):
    """Harvest in a process of its own that is killed in the middle of a write."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        real, calls = MODULE.write_at, []

        def write_at(handle, values, offset):
            calls.append(1)
            if len(calls) == n_writes:
                os.pwrite(handle, values.tobytes()[:7], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle, values, offset)

        MODULE.write_at = write_at
        try:
            harvest(pair, TEXTS, SITES, folder, **OPTIONS)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_harvest_goes_on_and_is_the_same_byte_for_byte(whole, adapter_pair, tmp_path):
    """Killed in the first shard, again in a later one, then left alone."""
    killed_harvest(adapter_pair, tmp_path, 4)
    assert not [name for name in content(tmp_path) if name.startswith("receipts")]
    killed_harvest(adapter_pair, tmp_path, 25)
    left = content(tmp_path)
    done = [name for name in left if name.startswith("resid_post.2/0")]
    assert 1 <= len(done) < len(whole.manifest["shards"]) - 1
    assert any("/.0" in name for name in left)  # half of a file
    with pytest.raises(FileFormatError, match="not finished"):
        ActivationStore.open(tmp_path)
    inode = (tmp_path / done[0]).stat().st_ino
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == content(whole.folder)
    assert (tmp_path / done[0]).stat().st_ino == inode  # not made again


def failing(after, error):
    """An `os.pwrite` that works so many times."""
    real, calls = os.pwrite, []

    def pwrite(*args):
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*args)

    return pwrite


@pytest.mark.parametrize("after", [0, 5, 23, 40])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_full_disk_and_a_key_lose_nothing(
    whole, adapter_pair, tmp_path, monkeypatch, after, error, expected
):
    monkeypatch.setattr(os, "pwrite", failing(after, error))
    with pytest.raises(expected) as caught:
        harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    if expected is StoreError:
        assert "No space left" in str(caught.value)
        assert "go on" in str(caught.value)
    left, complete = content(tmp_path), content(whole.folder)
    assert all(complete[name] == found for name, found in left.items() if name != "manifest.json")
    writes = [len(SITES) * (b - a) for a, b in (s["documents"] for s in whole.manifest["shards"])]
    finished = sum(int(end) <= after for end in np.cumsum(writes))
    assert len([name for name in left if "receipts" in name]) == finished
    assert after < 40 or finished > 1
    monkeypatch.undo()
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == complete


@contextmanager
def files_of_at_most(n_bytes):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("n_bytes", [1, 500, 3000, 5000, 7000])
def test_a_write_that_the_system_refuses(adapter_pair, whole, tmp_path, n_bytes):
    """Among the texts, the manifest, the shards; wherever it comes."""
    with files_of_at_most(n_bytes), pytest.raises(StoreError, match=r"too large.*go on"):
        harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert not any(".bin." in name or "json." in name for name in content(tmp_path))
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == content(whole.folder)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_receipt_that_the_system_refuses(whole, tmp_path):
    statistics = {site: whole.statistics(site) for site in whole.sites}
    with files_of_at_most(1000), pytest.raises(StoreError, match=r"statistics\.saf.*go on"):
        write_statistics(tmp_path, statistics)
    assert content(tmp_path) == {}


def test_cancelling_keeps_finished_shards(adapter_pair, whole, tmp_path):
    cancel = Event()
    seen = []

    def progress(done, total, message):
        seen.append((done, total))
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        harvest(adapter_pair, TEXTS, SITES, tmp_path, progress=progress, cancel=cancel, **OPTIONS)
    assert caught.value.partial == tmp_path
    assert seen[-1][0] < seen[-1][1] == len(whole)
    assert len([name for name in content(tmp_path) if "receipts" in name]) == 2
    harvest(adapter_pair, TEXTS, SITES, tmp_path, progress=progress, **OPTIONS)
    assert seen[-1] == (len(whole), len(whole))
    assert content(tmp_path) == content(whole.folder)


def copied(store, folder):
    for name, raw in content(store.folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["resid_post.2/00001.bin", "rows.bin"])
def test_a_cut_or_missing_file_is_an_error_and_is_made_again(
    adapter_pair, whole, tmp_path, damage, name
):
    damage(copied(whole, tmp_path) / name)
    with pytest.raises(FileFormatError, match=rf"{name}.*Harvest again"):
        ActivationStore.open(tmp_path)
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == content(whole.folder)


@pytest.mark.parametrize(
    "name", ["mlp_act.1/00002.bin", "token_ids.bin", "statistics.safetensors", "z.3/00000.bin"]
)
def test_a_flipped_bit_is_found(adapter_pair, whole, tmp_path, name):
    whole.verify()
    flip(copied(whole, tmp_path) / name)
    store = ActivationStore.open(tmp_path)
    with pytest.raises(FileFormatError, match=rf"damaged: {name} differ .*1 of "):
        store.verify()
    (tmp_path / name).unlink()
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS).verify()
    assert content(tmp_path) == content(whole.folder)


def test_a_shard_that_is_cut_after_opening(whole, tmp_path):
    store = ActivationStore.open(copied(whole, tmp_path))
    cut(tmp_path / "z.3/00000.bin")
    with pytest.raises(FileFormatError, match="cannot be read"):
        store.rows("z.3", [0])
    with pytest.raises(FileFormatError, match="cannot be read"):
        next(store.source("z.3").in_order(200))


def test_foreign_files_and_manifests(adapter_pair, whole, tmp_path):
    arguments = {"pair": adapter_pair, "items": TEXTS, "at": SITES, **OPTIONS}
    with pytest.raises(FileFormatError, match="no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileFormatError, match=r"thesis\.tex.*nothing was written"):
        harvest(folder=tmp_path, **arguments)
    assert content(tmp_path) == {"thesis.tex": b"mine"}
    (tmp_path / "thesis.tex").unlink()
    good = json.loads((whole.folder / "manifest.json").read_text())
    for text, message in [
        ("{", "is not a manifest"),
        ("[1]", "is not a manifest"),
        ('{"format": "a website"}', "is not the manifest of an activation store"),
        (json.dumps(good | {"version": 99}), "format version 99"),
        (json.dumps(good | {"key": "0123"}), "changed or damaged"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        for use in (ActivationStore.open, lambda folder: harvest(folder=folder, **arguments)):
            with pytest.raises(FileFormatError, match=message):
                use(tmp_path)
        assert content(tmp_path) == {"manifest.json": text.encode()}


def test_a_store_that_lost_its_manifest_needs_no_second_run(
    adapter_pair, whole, tmp_path, monkeypatch
):
    (copied(whole, tmp_path) / "manifest.json").unlink()
    monkeypatch.setattr(LIVE, "run_pair", None)
    harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == content(whole.folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_two_harvests_into_one_folder(adapter_pair, tmp_path):
    with locked(tmp_path), pytest.raises(StoreError, match="another harvest"):
        harvest(adapter_pair, TEXTS, SITES, tmp_path, **OPTIONS)
    assert content(tmp_path) == {}
    harvest(adapter_pair, TEXTS[:3], SITES, tmp_path)


def test_what_cannot_be_harvested(adapter_pair, tmp_path):
    for at, message in [("lora.1.mlp.down_proj", "both sides"), ((), "no site"),
                        ("resid_post.9", "layers 0 to 3")]:  # fmt: skip
        with pytest.raises(SiteError, match=message):
            harvest(adapter_pair, TEXTS, at, tmp_path)
    with pytest.raises(MismatchError, match="bfloat16 or float32"):
        harvest(adapter_pair, TEXTS, SITES, tmp_path, dtype=torch.float16)
    with pytest.raises(MismatchError, match="rows_per_shard=0"):
        harvest(adapter_pair, TEXTS, SITES, tmp_path, rows_per_shard=0)
    with pytest.raises(MaskError, match="keeps no token of 17 texts"):
        harvest(adapter_pair, TEXTS, SITES, tmp_path, on="assistant")
    with pytest.raises(MaskError, match="of 0 texts"):
        streamed(adapter_pair, [], "resid_post.1")
    assert content(tmp_path) == {}


def test_statistics_after_two_thousand_bfloat16_batches():
    """Where a running mean and square in bfloat16 is wrong by far."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 2, 8, generator=generator) * 3 + 5).bfloat16() for _ in range(2000)]
    found = RowStatistics.joined(map(RowStatistics.of, batches))
    rows = torch.cat(batches).double()
    assert found.n == len(rows)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.std, rows.std(0, correction=0), rtol=1e-9, atol=0)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(found.rms, centred.square().sum(2).mean(0).sqrt(), rtol=1e-9, atol=0)
    total = torch.zeros(2, 8, dtype=torch.bfloat16)
    for batch in batches:
        total += batch.square().sum(0)
    naive = (total.float() / len(rows) - rows.mean(0).square()).clamp(min=0).sqrt()
    assert float((naive / found.std - 1).abs().min()) > 0.1


def test_the_store_holds_the_statistics_of_its_rows(whole):
    for site in whole.sites:
        rows, found = whole.rows(site, slice(None)).double(), whole.statistics(site)
        assert found.n == len(rows)
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.std, rows.std(0, correction=0), rtol=1e-9, atol=1e-9)


def test_streaming_gives_the_rows_of_the_store(adapter_pair, whole):
    live = streamed(adapter_pair, iter(TEXTS), "resid_post.2", pool_rows=100, max_tokens=120)
    stored = whole.source("resid_post.2")
    assert (live.n_rows, live.d_model) == (stored.n_rows, stored.d_model)
    for a, b in zip(live.in_order(77), stored.in_order(77), strict=True):
        torch.testing.assert_close(a.acts, b.acts, rtol=2**-7, atol=1e-3)
        assert torch.equal(a.token_id, b.token_id)
        assert torch.equal(a.document, b.document)
        assert torch.equal(a.position, b.position)
    places = zip(whole.documents.tolist(), whole.positions.tolist(), strict=True)
    truth = dict(zip(places, whole.rows("resid_post.2", slice(None)), strict=True))
    each_epoch, seen = len(whole) // 32, []
    batches = live.shuffled(32, seed=3)
    for _ in range(each_epoch):
        rows = next(batches)
        drawn = list(zip(rows.document.tolist(), rows.position.tolist(), strict=True))
        expected = torch.stack([truth[each] for each in drawn])
        torch.testing.assert_close(rows.acts, expected, rtol=2**-7, atol=1e-3)
        seen += drawn
    assert len(set(seen)) == len(seen) == each_epoch * 32
    assert seen != sorted(seen)


def test_streaming_starts_anywhere_exactly(adapter_pair):
    live = streamed(adapter_pair, TEXTS, "resid_post.2", pool_rows=100)
    batches = live.shuffled(50, seed=0)
    first = [next(batches) for _ in range(14)]  # two epochs and more
    for start in (0, 1, 5, 6, 13):
        again = next(live.shuffled(50, seed=0, start=start))
        assert torch.equal(again.acts, first[start].acts)
        assert torch.equal(again.position, first[start].position)
    other = next(live.shuffled(50, seed=1))
    assert not torch.equal(other.position, first[0].position)
    wide = streamed(adapter_pair, TEXTS, "mlp_act.1")
    assert wide.d_model == next(wide.in_order(5)).acts.shape[2] == 48
    assert wide.key != live.key


def test_half_written_files_that_a_kill_left_are_removed(adapter_pair, whole, tmp_path):
    folder = copied(whole, tmp_path)
    for name in (".manifest.json.abc", "z.3/.00001.bin.xyz", "receipts/.00000.safetensors.q"):
        (folder / name).write_bytes(b"half")
    (folder / "z.3/00001.bin").unlink()
    harvest(adapter_pair, TEXTS, SITES, folder, **OPTIONS)
    assert content(folder) == content(whole.folder)
