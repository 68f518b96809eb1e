"""Norms, CKA and angles against closed forms, and what massive tokens do to them."""

import math
from typing import Any

import pytest
import torch

from modeldiff.errors import MismatchError
from modeldiff.models import ModelPair
from modeldiff.organisms.nulls import embedded_base, null_pairs
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.similarity import (
    CrossSums,
    by_position,
    cka_of,
    linear_cka,
    massive_tokens,
    similarity,
    subspace_angles,
)

TEXTS = [f"a{'bcdefgh'[i % 7]} {i} and some of the other letters {i * i}" for i in range(12)]


def embedded_pair():
    model, tokenizer = embedded_base()
    return model, model, tokenizer


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=5):
    return torch.linalg.qr(draws(width, width, seed=seed)).Q


def dense_cka(x, y, unbiased):
    """The definition, by kernels of all pairs of rows."""

    def hsic(k, m):
        n = len(k)
        if not unbiased:
            h = torch.eye(n, dtype=k.dtype) - 1 / n
            return (h @ k @ h * m).sum()
        k, m = (each - each.diag().diag() for each in (k, m))
        whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return ((k * m).sum() + whole - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_is_one_under_rotation_shift_and_scaling_as_a_whole(unbiased):
    x = draws(80, 12)
    y = 7 * x @ rotation(12) + 3
    assert linear_cka(x, y, unbiased=unbiased) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_is_that_of_the_definition_block_by_block(unbiased):
    x, y = draws(50, 6), draws(50, 9, seed=1)
    y[:, :6] += x
    x, y = x + 2, y - 1
    wanted = dense_cka(x, y, unbiased)
    assert linear_cka(x, y, unbiased=unbiased) == pytest.approx(wanted, abs=1e-10)
    three = [
        sum(
            (CrossSums.of(a[i : i + 7], b[i : i + 7]) for i in range(7, 50, 7)),
            CrossSums.of(a[:7], b[:7]),
        )
        for a, b in ((x, y), (x, x), (y, y))
    ]
    assert cka_of(*three, unbiased=unbiased) == pytest.approx(wanted, abs=1e-9)  # pyright: ignore


def test_cka_of_an_uneven_scaling_is_the_population_value():
    scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    x = draws(40_000, 3)
    wanted = float(scale.square().sum() / (3**0.5 * scale.pow(4).sum().sqrt()))
    assert linear_cka(x, x * scale, unbiased=True) == pytest.approx(wanted, abs=0.01)


def test_independent_rows_look_alike_to_the_biased_estimate_alone():
    n, d = 60, 40
    pairs = [(draws(n, d, seed=2 * i), draws(n, d, seed=2 * i + 1)) for i in range(12)]
    biased = sum(linear_cka(x, y) for x, y in pairs) / len(pairs)
    unbiased = sum(linear_cka(x, y, unbiased=True) for x, y in pairs) / len(pairs)
    assert biased == pytest.approx(d / (n + d), abs=0.02)
    assert unbiased == pytest.approx(0.0, abs=0.02)


def test_angles_are_those_planted_also_tiny_ones():
    turn = rotation(9)
    for angle in (1e-6, 0.3, 1.2, math.pi / 2):
        x, y = torch.eye(9, dtype=torch.float64)[:, :2], torch.zeros(9, 2, dtype=torch.float64)
        y[0, 0], y[1, 1], y[2, 1] = 1.0, math.cos(angle), math.sin(angle)
        found = subspace_angles(turn @ x, turn @ y)
        assert found[0] == pytest.approx(0.0, abs=1e-6)
        assert float(found[1]) == pytest.approx(math.degrees(angle), rel=1e-6)


def test_what_does_not_pair_is_refused():
    with pytest.raises(MismatchError, match="same tokens"):
        linear_cka(draws(5, 2), draws(6, 2))
    with pytest.raises(MismatchError, match="widths 5 and 6"):
        subspace_angles(draws(5, 2), draws(6, 2))
    with pytest.raises(MismatchError, match="at least 4"):
        linear_cka(draws(3, 2), draws(3, 2), unbiased=True)


def test_a_planted_shift_is_found_in_its_layer_and_with_its_length():
    made = planted_shift(2, size=6.0)
    found = similarity(made.pair.sides, TEXTS, n_components=3)
    lengths = found.tokens.groupby("layer")["norm_difference"]
    assert lengths.max()[[0, 1]].tolist() == [0.0, 0.0]
    assert lengths.min()[2] == pytest.approx(6.0, abs=1e-4)
    assert lengths.max()[2] == pytest.approx(6.0, abs=1e-4)
    cka = {row["base_site"]: row for row in found.cka.to_dict("records")}
    for column in ("cka", "unbiased"):  # a shift is taken off by centring, until layers react
        assert cka["resid_post.2"][column] == pytest.approx(1.0, abs=1e-6)
        assert cka["resid_post.3"][column] < 0.999
    angles = found.angles.groupby("base_site")["degrees"].max()
    assert angles["resid_post.2"] == pytest.approx(0.0, abs=0.01)
    assert angles["resid_post.3"] > 1.0
    place = by_position(found.tokens, last=3).query("site == 'resid_post.2'")
    assert place["position"].tolist() == [0, 1, 2, 3]
    want = 6 / found.tokens.query("site == 'resid_post.2' and position == 2")["norm_base"]
    assert place["relative"].iloc[2] == pytest.approx(want.mean())
    assert place["n"].tolist() == [12] * 4


def test_a_pair_of_equal_models_is_equal_everywhere():
    base, tokenizer = tiny_llama(1)
    pair = ModelPair.of(base, base, tokenizer, allow_identical=True)
    found = similarity(pair.sides, TEXTS, ["resid_post.1", "mlp_out.3"])
    assert not found.tokens["norm_difference"].any()
    assert (found.tokens["cosine"] == 1.0).all()
    assert found.cka["unbiased"].tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found.angles["degrees"].max() < 1e-4


def test_across_layers_compares_all_sites_and_agrees_with_captured_rows():
    made = planted_shift(1, characters="aeiou")
    sites = ["resid_post.0", "resid_post.3"]
    found = similarity(made.pair.sides, TEXTS, sites, across_layers=True, massive=1e9)
    assert len(found.cka) == 4
    assert len(found.angles) == 4 * 8
    same = found.angles["base_site"] == found.angles["finetuned_site"]
    first = found.angles["base_site"] == "resid_post.0"
    assert found.angles[same & first]["degrees"].max() == pytest.approx(0.0, abs=1e-3)
    assert found.angles[~same & first]["degrees"].max() > 10.0
    acts = made.pair.capture(TEXTS, sites, skip_first=0)
    for row in found.cka.to_dict("records"):
        x = acts.base[acts.sites[sites.index(row["base_site"])]]
        y = acts.finetuned[acts.sites[sites.index(row["finetuned_site"])]]
        assert row["unbiased"] == pytest.approx(linear_cka(x, y, unbiased=True), abs=1e-6)
        assert row["n_tokens"] == len(acts)


def test_massive_first_tokens_are_flagged_and_results_are_told_without_them():
    """BOS is made 200 times as long as other tokens; the fine-tune turns it elsewhere."""
    models = [tiny_llama(2, tie_word_embeddings=False) for _ in range(2)]
    (base, tokenizer), (made, _) = models
    big = 200 * draws(base.config.hidden_size, seed=4).float()
    bos: Any = tokenizer.bos_token_id
    base.model.embed_tokens.weight[bos] = big
    made.model.embed_tokens.weight[bos] = big.flip(0)
    found = similarity(ModelPair.of(base, made, tokenizer).sides, TEXTS, "resid_pre.0")
    flagged = found.tokens[found.tokens["massive"]]
    assert set(flagged["token"]) == {"<|bos|>"}
    assert len(flagged) == len(TEXTS)
    (row,) = found.guard().to_dict("records")
    assert row["positions"] == "0"
    assert row["dominated"]
    assert row["energy_share"] > 0.99
    assert row["difference_share"] == pytest.approx(1.0)
    assert row["pooled_relative"] > 0.5
    assert row["pooled_relative_without"] == 0.0
    assert row["cosine_without"] == 1.0
    (cka,) = found.cka.to_dict("records")
    assert cka["unbiased_without"] == pytest.approx(1.0, abs=1e-9)
    assert not massive_tokens(found.tokens, 1e9).any()
    assert by_position(found.tokens)["massive"].tolist()[:2] == [1.0, 0.0]


@pytest.mark.slow
def test_null_pairs_that_compute_the_same_are_the_same_to_the_bit():
    different = 0
    for null in null_pairs(20, kind="inert"):
        found = similarity(null.pair.sides, TEXTS[:4])
        same = not found.tokens["norm_difference"].any() and (found.tokens["cosine"] == 1).all()
        different += not (same and found.cka["cka"].sub(1).abs().max() < 1e-9)
    print(f"similarity: {different} of 20 null pairs differ")
    assert different == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rounding", "noise", "replay-adapter"])
def test_what_null_pairs_that_moved_look_like(kind):
    """Prints figures: pytest -m slow -s tests/test_similarity.py -k moved.

    Every statistic is a size. It says that models differ, rightly, in each pair; none may say more.
    """
    equal = ModelPair.of(*embedded_pair(), allow_identical=True)
    carried = similarity(equal.sides, TEXTS).guard().set_index("site")["energy_share"]
    rows, n = [], 8 if kind == "replay-adapter" else 20  # these are trained first
    for null in null_pairs(n, seed=5000, kind=kind):
        found = similarity(null.pair.sides, TEXTS)
        guard, places = found.guard().set_index("site"), by_position(found.tokens, last=8)
        shares = guard["energy_share"].tolist()  # the base's own, whatever the fine-tune is
        assert shares == pytest.approx(carried.tolist(), abs=1e-9)
        moved = found.tokens.groupby("site")["norm_difference"].max() > 0
        excludes = places.groupby("site")["low"].min() > 0
        assert excludes[~moved].sum() == 0
        assert excludes[moved].all()
        rows.append((
            guard["relative"].max(), found.tokens["cosine"].min(), found.cka["unbiased"].min(),
            found.angles["degrees"].max(), excludes.any(), guard["dominated"].any(),
        ))  # fmt: skip
    relative, cosine, cka, degrees, excludes, dominated = map(list, zip(*rows, strict=True))
    print(
        f"similarity, {n} {kind} pairs: mean relative difference up to {max(relative):.3f}, cosine "
        f"down to {min(cosine):.3f}, unbiased CKA down to {min(cka):.4f}, angle up to "
        f"{max(degrees):.0f} degrees; {sum(excludes)} with an interval of by_position above 0, "
        f"{sum(dominated)} dominated"
    )
    assert max(relative) < 0.1
    assert min(cka) > 0.99
