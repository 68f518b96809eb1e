from threading import Event

import pytest
import torch

from modeldiff.dictionaries import matching
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.matching import match
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.errors import Cancelled, MismatchError


def test_a_shuffled_copy_with_noise_and_new_latents_is_matched(monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 7)  # several blocks
    rng = torch.Generator().manual_seed(0)
    b = torch.randn(50, 64, generator=rng)
    order = torch.randperm(50, generator=rng)
    size = torch.rand(50, 1, generator=rng) + 0.5
    copied = b[order] * size + 0.02 * torch.randn(50, 64, generator=rng)
    fresh = torch.randn(10, 64, generator=rng)
    found = match(torch.cat([copied, fresh]), b)
    table = found.table
    assert table["match"][:50].tolist() == order.tolist()
    assert table["mutual"][:50].all()
    assert table["novel"].tolist() == [False] * 50 + [True] * 10
    assert not table["mutual"][50:].any()
    assert found.novel_share == pytest.approx(10 / 60)


def test_it_equals_a_search_through_all_pairs():
    a, b = torch.randn(30, 8), torch.randn(20, 8)
    found = match(a, b).table
    for j in range(30):
        cosines = torch.nn.functional.cosine_similarity(a[j], b)
        assert found["match"][j] == int(cosines.argmax())
        assert found["cosine"][j] == pytest.approx(float(cosines.max()), abs=1e-6)
        assert found["second"][j] == pytest.approx(float(cosines.sort().values[-2]), abs=1e-6)
        back = torch.nn.functional.cosine_similarity(b[found["match"][j]], a)
        assert found["mutual"][j] == (int(back.argmax()) == j)


def test_random_dictionaries_match_as_well_as_chance_says():
    a, b = torch.randn(2000, 32), torch.randn(300, 32)
    found = match(a, b)
    above = (found.table["cosine"] > found.chance).mean()
    assert 0.02 < above < 0.09
    assert found.novel_share > 0.95


def test_sides_are_raw_decoders_and_zero_ones_have_no_match():
    made = crosscoder(16, 10, k=2)
    with torch.no_grad():
        made.W_dec.copy_(torch.randn(10, 2, 16))
        made.W_dec[4, 1] = 0
    made.set_normaliser(Normaliser(torch.zeros(2, 16), torch.tensor([1.0, 5.0])))
    one = sae(16, 10, k=2, side="finetuned")
    with torch.no_grad():
        one.W_dec.copy_(made.W_dec[:, 1:].flip(0))
    found = match(made, one)
    assert found.table["match"].drop(4).tolist() == [9, 8, 7, 6, 4, 3, 2, 1, 0]
    assert found.table["match"][4] == -1
    assert found.table["cosine"].isna().sum() == 1
    assert found.novel_share == 0
    assert match(made, made, side="both").table["cosine"].min() > 0.999
    with pytest.raises(MismatchError, match="different"):
        match(made, one, side="both", other_side="finetuned")
    with pytest.raises(MismatchError, match="no decoder"):
        match(made, one, other_side="base")


def test_cancel():
    cancel = Event()
    cancel.set()
    with pytest.raises(Cancelled):
        match(torch.randn(3, 4), torch.randn(3, 4), cancel=cancel)
