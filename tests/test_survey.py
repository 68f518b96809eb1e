import gc
import weakref

import numpy as np
import pytest
import torch

from modeldiff.batching import Batch
from modeldiff.errors import DirectionError
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean
from modeldiff.survey import (
    _halves,
    base_directions,
    data_directions,
    model_directions,
    survey,
)
from tests.families import N_LAYERS, build_adapter_pair

SITES = tuple(Site("resid_post", layer) for layer in range(N_LAYERS))
SHORT = [f"the cat {word}" for word in ("sat", "ran", "and a dog", "was", "by the sea", "far")]
LONG = [f"the quick brown fox jumps over the lazy dog {word} while a small bird sang of rain"
        for word in ("and", "over", "by", "on", "where", "why")]  # fmt: skip
ITEMS = [text for pair in zip(LONG, SHORT, strict=True) for text in pair]
LABELS = ["long", "short"] * 6


@pytest.fixture(scope="module")
def found(adapter_pair):
    return survey(adapter_pair.sides, adapter_pair.texts(ITEMS), LABELS, seed=3)


@pytest.fixture(scope="module")
def dense(adapter_pair):
    return adapter_pair.capture(ITEMS, SITES)


def rows_of(acts, side, site, label):
    mine = torch.tensor([LABELS[i] == label for i in acts.text_index.tolist()])
    return getattr(acts, side)[site][mine].double()


@pytest.mark.parametrize("label", ["long", "short"])
def test_moments_equal_the_dense_ones_and_classes_keep_their_texts(found, dense, label):
    for site in SITES:
        for side in ("base", "finetuned"):
            rows, got = rows_of(dense, side, site, label), found.of(side, site, label)
            assert got.n == len(rows)
            torch.testing.assert_close(got.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
            assert got.mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-5)
    assert found.counts()[label] == len(rows_of(dense, "base", SITES[0], label))


def test_layers_equal_the_dense_ones_and_those_before_the_adapter_do_not_differ(found, dense):
    table = found.layers(seed=0)
    for site in SITES:
        base, tuned = dense.base[site].double(), dense.finetuned[site].double()
        relative = ((tuned - base).norm(dim=1) / base.norm(dim=1)).numpy()
        cosine = torch.nn.functional.cosine_similarity(tuned, base).numpy()
        owner = dense.text_index.numpy()
        by_text = [relative[owner == i].mean() for i in range(len(ITEMS))]
        row = table[table["layer"] == site.layer].iloc[0]
        want = bootstrap_mean(by_text, seed=0)
        assert row["relative_difference"] == pytest.approx(want.estimate, rel=1e-4)
        assert (row["low"], row["high"]) == pytest.approx((want.low, want.high), rel=1e-4)
        by_text = [cosine[owner == i].mean() for i in range(len(ITEMS))]
        assert row["cosine"] == pytest.approx(np.mean(by_text), rel=1e-5)
    first = table.iloc[0]
    assert tuple(first[["relative_difference", "low", "high", "cosine"]]) == (0, 0, 0, 1)
    assert (table["relative_difference"][1:] > 0.01).all()


def test_directions_equal_the_dense_ones_and_exist_where_the_models_differ(found, dense):
    shift = model_directions(found, "long", "shift")
    contrast = data_directions(found, "long", "short", "contrast")
    null = base_directions(found, "long", "short", "null")
    assert set(shift) == {1, 2, 3}
    assert set(contrast) == set(null) == {0, 1, 2, 3}
    for layer, site in enumerate(SITES):
        means = {
            (side, label): rows_of(dense, side, site, label).mean(0)
            for side in ("base", "finetuned")
            for label in ("long", "short")
        }
        raw = means["finetuned", "long"] - means["finetuned", "short"]
        own = means["base", "long"] - means["base", "short"]
        assert_along(contrast[layer], raw)
        assert_along(null[layer], own)
        cosine = float(torch.cosine_similarity(raw, own, dim=0))
        assert contrast[layer].text_null == pytest.approx(cosine, abs=1e-4)
        if layer in shift:
            assert_along(shift[layer], means["finetuned", "long"] - means["base", "long"])


def assert_along(direction, raw):
    assert direction.scale == pytest.approx(float(raw.norm()), rel=1e-4)
    torch.testing.assert_close(direction.unit.double(), raw / raw.norm(), rtol=1e-3, atol=1e-4)


def test_answers_to_one_prompt_are_in_one_half():
    labels, prompts = ["x", "y", "x", "x"] * 6, [i // 4 for i in range(24)]
    halves = _halves(labels, prompts, 0)
    for prompt in range(6):
        assert len({h for h, p in zip(halves, prompts, strict=True) if p == prompt}) == 1
    assert sum(halves) == 12


def test_halves_are_of_whole_texts_and_split_every_class(found, dense):
    tokens = [int((dense.text_index == i).sum()) for i in range(len(ITEMS))]
    site = SITES[2]
    for label in ("long", "short"):
        halves = [found.of("base", site, label, half) for half in (0, 1)]
        mine = [i for i in range(len(ITEMS)) if LABELS[i] == label]
        possible = {}
        for bits in range(1, 2 ** len(mine)):
            chosen = [i for k, i in enumerate(mine) if bits >> k & 1]
            if len(chosen) == 3:
                rows = dense.base[site][torch.isin(dense.text_index, torch.tensor(chosen))]
                possible[frozenset(chosen)] = rows.double().mean(0)
        split = [
            next(c for c, mean in possible.items() if torch.allclose(mean, half.mean, atol=1e-5))
            for half in halves
        ]
        assert split[0] | split[1] == set(mine)
        assert [half.n for half in halves] == [sum(tokens[i] for i in s) for s in split]


def test_seeds_split_otherwise_and_reproducibly(adapter_pair, found):
    texts = adapter_pair.texts(ITEMS)
    same = survey(adapter_pair.sides, texts, LABELS, seed=3)
    other = survey(adapter_pair.sides, texts, LABELS, seed=4)
    key = ("base", SITES[1], "long", 0)
    assert torch.equal(same.moments[key].mean, found.moments[key].mean)
    assert not torch.equal(other.moments[key].mean, found.moments[key].mean)
    assert other.layers().equals(found.layers())


def test_a_null_pair_has_no_model_direction():
    from tests.planted import null_pair

    pair = null_pair("inert", 0)
    nothing = survey(pair.sides, pair.texts(ITEMS), LABELS)
    assert model_directions(nothing, "long", "shift") == {}
    assert (nothing.per_text["relative_difference"] == 0).all()
    assert (nothing.per_text["cosine"] == 1).all()


def test_a_class_without_texts_is_an_error_that_names_those_there_are(found):
    with pytest.raises(DirectionError, match=r"'medium'.*long.*short"):
        found.of("base", SITES[0], "medium")


def test_no_batch_is_held(monkeypatch):
    pair, made, alive = build_adapter_pair(), [], []
    before = Batch.__init__

    def remembered(self, *arguments, **options):
        before(self, *arguments, **options)
        made.append(weakref.ref(self))
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))

    monkeypatch.setattr(Batch, "__init__", remembered)
    several = [f"{'the cat and ' * i}the dog" for i in range(1, 38, 3)]
    survey(pair.sides, pair.texts(several), ["x"] * len(several))
    assert len(made) >= 4
    assert max(alive) <= 2
