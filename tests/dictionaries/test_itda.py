"""ITDA: planted clusters, rotated and replaced copies, and the pursuit against a plain one."""

# pyright: reportArgumentType=false

import math
from threading import Event

import pytest
import torch

from modeldiff.dictionaries.files import write_dictionary
from modeldiff.dictionaries.itda import (
    Itda,
    ItdaConfig,
    build_itda,
    jaccard,
    rank_by_difference,
)
from modeldiff.dictionaries.pursuit import missing
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import Cancelled, FileFormatError, MismatchError
from modeldiff.harvesting import harvest

WIDTH, CLUSTERS = 64, 30
QUICK = ItdaConfig(k=4)


def planted(n, seed=0, noise=0.1):
    """Rows around 30 random directions, of any length; which direction each is around."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, generator=g), dim=1)
    which = torch.cat((torch.randperm(CLUSTERS, generator=g),
                       torch.randint(0, CLUSTERS, (n - CLUSTERS,), generator=g)))  # fmt: skip
    length = 1 + 9 * torch.rand(n, 1, generator=g)
    around = centres[which] + noise * torch.randn(n, WIDTH, generator=g) / math.sqrt(WIDTH)
    return length * around, which


def source_of(base, finetuned=None, first=1):
    """Texts of 40 tokens of which all but the first ``first`` are kept."""
    n, kept = len(base), 40 - first
    row = torch.arange(n)
    both = torch.stack((base, base if finetuned is None else finetuned), 1)
    return TensorRows(both, row % 97, row // kept, row % kept + first)


def row_of(dictionary, first=1):
    return dictionary.document * (40 - first) + dictionary.position - first


@pytest.mark.parametrize("measure", ["cosine", "square"])
@pytest.mark.parametrize("k", [1, 40])
def test_thirty_clusters_give_thirty_atoms(measure, k):
    rows, which = planted(600)
    source = source_of(torch.zeros_like(rows), rows)
    found = build_itda(source, ItdaConfig(k=k, measure=measure), batch_size=200)
    assert len(found) == CLUSTERS
    assert sorted(which[row_of(found)].tolist()) == list(range(CLUSTERS))
    expected = torch.nn.functional.normalize(rows[row_of(found)], dim=1)
    torch.testing.assert_close(found.atoms, expected)
    assert found.provenance["n_used"] == found.provenance["n_rows"] == 600
    assert not found.provenance["full"]


@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_the_number_of_atoms_does_not_hang_on_the_threshold_or_the_width(threshold):
    rows, _ = planted(600)
    assert len(build_itda(source_of(rows), ItdaConfig(k=4, threshold=threshold))) == CLUSTERS
    wide = torch.cat((rows, torch.zeros(600, 5 * WIDTH)), 1)
    assert len(build_itda(source_of(wide), ItdaConfig(k=4, threshold=threshold))) == CLUSTERS


def test_a_rotated_copy_has_the_same_atoms():
    rows, _ = planted(600)
    g = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g))[0]
    a, b = build_itda(source_of(rows), QUICK), build_itda(source_of(rows @ rotation), QUICK)
    assert jaccard(a, b) == jaccard(a, a) == 1.0
    assert not torch.allclose(a.atoms, b.atoms, atol=0.1)


@pytest.mark.parametrize("n", [240, 540])
def test_half_of_the_rows_replaced(n):
    """A tenth at 540 rows: all 30 places stay atoms, and the 270 new rows are atoms as well.

    The first row of a cluster is an atom in the copy if it was kept, and also if it was replaced,
    as a row that nothing explains. So the index falls with the number of rows that are replaced:
    it is ``30 / (30 + n / 2)`` as long as every cluster keeps a row.
    """
    rows, _ = planted(n)
    g = torch.Generator().manual_seed(100)
    replaced = torch.randperm(n, generator=g)[: n // 2]
    other = rows.index_copy(0, replaced, torch.randn(n // 2, WIDTH, generator=g))
    a, b = build_itda(source_of(rows), QUICK), build_itda(source_of(other), QUICK)
    assert a.places <= b.places
    assert jaccard(a, b) == CLUSTERS / len(b)
    assert jaccard(a, b) == pytest.approx(CLUSTERS / (CLUSTERS + n / 2), rel=0.06)


def test_nothing_in_common():
    rows, _ = planted(600)
    a = build_itda(source_of(rows), QUICK)
    later = source_of(rows)
    assert later.document is not None
    b = build_itda(
        TensorRows(later.acts, later.token_id, later.document + 50, later.position), QUICK
    )
    assert jaccard(a, b) == 0.0


def test_dictionaries_of_other_texts_are_not_compared():
    rows, _ = planted(600)
    source = source_of(rows)
    assert source.token_id is not None
    a = build_itda(source, QUICK)
    b = build_itda(TensorRows(source.acts, source.token_id + 1, source.document, source.position))
    with pytest.raises(MismatchError, match="not built on the same texts"):
        jaccard(a, b)


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_batches_do_not_change_the_atoms(batch_size):
    """Where a whole batch of failing rows was added at once, 600 would all become atoms."""
    rows, _ = planted(600)
    found = build_itda(source_of(rows), QUICK, batch_size=batch_size)
    whole = build_itda(source_of(rows), QUICK)
    assert torch.equal(found.document, whole.document)
    assert torch.equal(found.position, whole.position)
    same = torch.ones(50, WIDTH) * torch.arange(1, 51)[:, None]
    assert len(build_itda(source_of(same), batch_size=batch_size)) == 1


def plain_pursuit(x, atoms, k):
    """Matching pursuit on the residual itself, in float64."""
    left, codes = x.double().clone(), torch.zeros(len(x), len(atoms), dtype=torch.float64)
    rows = torch.arange(len(x))
    for _ in range(k):
        scores = left @ atoms.double().T
        best = scores.abs().argmax(1)
        codes[rows, best] += scores[rows, best]
        left -= scores[rows, best, None] * atoms.double()[best]
    return codes, left


@pytest.mark.parametrize("k", [1, 3, 12])
def test_codes_equal_a_plain_pursuit(k):
    g = torch.Generator().manual_seed(0)
    found = build_itda(source_of(torch.randn(80, 16, generator=g)), ItdaConfig(threshold=0.05, k=3))
    x = 5 * torch.randn(40, 16, generator=g)
    truth, left = plain_pursuit(x, found.atoms, k)
    codes = found.encode(x, k)
    torch.testing.assert_close(codes.dense().double(), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decode(codes).double(), x - left, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.reconstruct(x, k), found.decode(codes))
    assert bool((codes.value < 0).any())
    assert int(codes.offsets.diff().max()) <= k
    assert all(
        bool((row.diff() > 0).all()) for row in codes.latent.split(codes.offsets.diff().tolist())
    )
    torch.testing.assert_close(found.encode(3 * x, k).value, 3 * codes.value, rtol=1e-4, atol=1e-4)
    unit = torch.nn.functional.normalize(x, dim=1)
    scores, y = unit @ found.atoms.T, found.reconstruct(unit, k)
    cosine = missing(scores, found.gram, k, "cosine")
    square = missing(scores, found.gram, k, "square")
    torch.testing.assert_close(cosine, 1 - torch.cosine_similarity(unit, y), rtol=0, atol=1e-5)
    torch.testing.assert_close(square, (unit - y).square().sum(1), rtol=0, atol=1e-5)


def test_an_atom_is_its_own_code():
    rows, _ = planted(600)
    found = build_itda(source_of(rows), QUICK)
    codes = found.encode(7 * found.atoms)
    torch.testing.assert_close(codes.dense(), 7 * torch.eye(CLUSTERS), rtol=0, atol=1e-4)


def test_the_first_position_is_no_atom():
    rows, _ = planted(600)
    rows[::40] = 1000 * torch.randn(15, WIDTH, generator=torch.Generator().manual_seed(77))
    found = build_itda(source_of(rows, first=0), QUICK)
    assert int(found.position.min()) >= 1
    assert len(found) == CLUSTERS
    assert found.provenance["n_used"] == 585
    kept = build_itda(source_of(rows, first=0), ItdaConfig(k=4, skip_first=0))
    assert len(kept) == CLUSTERS + 15


def test_atoms_of_a_store_are_its_rows(adapter_pair, tmp_path):
    texts = [f"the {noun} sat on the mat {i}" for i in range(3) for noun in ("cat", "moon", "sea")]
    store = harvest(adapter_pair, texts, "resid_post.2", tmp_path, dtype=torch.float32)
    for side in ("base", "finetuned", "difference"):
        found = build_itda(store.source(), ItdaConfig(side=side, threshold=0.05, k=2))
        where = {place: row for row, place in enumerate(
            zip(store.documents.tolist(), store.positions.tolist(), strict=True))}  # fmt: skip
        index = [
            where[p] for p in zip(found.document.tolist(), found.position.tolist(), strict=True)
        ]
        x = found.view(store.rows("resid_post.2", index))
        torch.testing.assert_close(found.atoms, torch.nn.functional.normalize(x, dim=1))
        assert torch.equal(found.token_id, store.token_ids[index])
        assert 3 < len(found) < len(store)


def test_the_latent_that_only_the_fine_tune_uses_ranks_first():
    rows, which = planted(600)
    tuned = rows.clone()
    new = torch.nn.functional.normalize(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)), dim=0
    )
    tuned[which == 3] = rows[which == 3].norm(dim=1, keepdim=True) * new
    source = source_of(rows, tuned)
    found = build_itda(source, QUICK)
    table = rank_by_difference(found, source)
    top = found.atoms[int(table["latent"][0])]
    assert float(top @ new) > 0.999
    share = float((which == 3).float().mean())
    assert table["difference"][0] == pytest.approx(share, abs=0.3 * share)
    assert table["mean_finetuned"][0] > 5 * abs(table["mean_base"][0])
    assert abs(table["difference"][1]) < 0.6 * share
    assert table["difference"].abs().is_monotonic_decreasing
    same = rank_by_difference(found, source_of(rows))
    assert same["difference"].abs().max() == 0.0


def test_a_full_dictionary_stops_and_says_so():
    rows, _ = planted(600)
    found = build_itda(source_of(rows), ItdaConfig(k=4, max_atoms=7), batch_size=50)
    assert len(found) == 7
    assert found.provenance["full"]
    assert found.provenance["n_used"] < 50


def test_cancelling_keeps_the_atoms():
    rows, _ = planted(600)
    cancel, seen = Event(), []

    def progress(done, total, message):
        seen.append(done)
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        build_itda(source_of(rows), QUICK, batch_size=20, progress=progress, cancel=cancel)
    assert seen == [20, 40]
    assert 20 <= len(caught.value.partial) <= CLUSTERS
    with pytest.raises(Cancelled):
        rank_by_difference(caught.value.partial, source_of(rows), cancel=cancel)


def test_saved_and_loaded(tmp_path):
    rows, _ = planted(600)
    made = build_itda(source_of(rows), QUICK)
    made.save_to(tmp_path / "a")
    again = Itda.load_from(tmp_path / "a")
    assert torch.equal(again.atoms, made.atoms)
    assert again.places == made.places
    assert torch.equal(again.token_id, made.token_id)
    assert (again.config, again.provenance) == (made.config, made.provenance)
    write_dictionary(tmp_path / "b", {"atoms": made.atoms}, {"kind": "crosscoder"})
    with pytest.raises(FileFormatError, match="no ITDA"):
        Itda.load_from(tmp_path / "b")
    raw = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a" / "model.safetensors").write_bytes(bytes(raw))
    with pytest.raises(FileFormatError, match="damaged"):
        Itda.load_from(tmp_path / "a")


def test_what_cannot_be_built():
    rows, _ = planted(600)
    with pytest.raises(MismatchError, match="does not know text"):
        build_itda(TensorRows(torch.stack((rows, rows), 1)), ItdaConfig(k=4, skip_first=0))
    with pytest.raises(MismatchError, match="skip_first=0"):
        build_itda(TensorRows(torch.stack((rows, rows), 1)))
    with pytest.raises(MismatchError, match="or zero"):
        build_itda(source_of(rows), ItdaConfig(side="difference"))
    for wrong in ({"side": "left"}, {"measure": "l1"}, {"threshold": 0.0}, {"k": 0}):
        with pytest.raises(MismatchError):
            ItdaConfig(**wrong)
    found = build_itda(source_of(rows), QUICK)
    with pytest.raises(MismatchError, match="width 5"):
        found.encode(torch.zeros(3, 5))
