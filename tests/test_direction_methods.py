import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff import moments
from modeldiff.direction_methods import Contrast, Quadrants, contrast_direction, mean_difference
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.moments import Moments
from modeldiff.sites import Site
from modeldiff.split_halves import half_masks

SITE = Site("resid_post", 12)
REFUSED = (DirectionError, TypeError)  # the latter where shape annotations are enforced


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(d, seed=0):
    return torch.nn.functional.normalize(normal(d, seed=seed), dim=0)


# --- moments ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=5), offset=st.floats(-1e3, 1e3))
def test_merged_moments_equal_the_dense_ones(cuts, offset):
    rows = normal(200, 6) + offset
    ends = [0, *sorted(cuts), 200]
    parts = [Moments.of(rows[a:b], covariance=True) for a, b in pairwise(ends)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    assert total.n == 200
    torch.testing.assert_close(total.mean, rows.mean(0), atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(total.covariance, rows.T.cov(), atol=1e-10, rtol=1e-10)
    assert total.mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)


def test_moments_do_not_depend_on_the_block_size(monkeypatch):
    rows, others = normal(100, 8), normal(100, 8, seed=1)
    whole = Moments.of(rows, minus=others, covariance=True)
    monkeypatch.setattr(moments, "_CELLS", 24)
    blocks = Moments.of(rows, minus=others, covariance=True)
    torch.testing.assert_close(blocks.mean, (rows - others).mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(blocks.covariance, whole.covariance, atol=1e-12, rtol=0)


def test_moments_that_do_not_fit_are_refused():
    rows = normal(10, 4)
    with pytest.raises(MismatchError, match="width 4 and 5"):
        Moments.of(rows).merged(Moments.of(normal(10, 5)))
    with pytest.raises(MismatchError, match="with and without covariance"):
        Moments.of(rows).merged(Moments.of(rows, covariance=True))
    with pytest.raises(MismatchError, match=r"\(10, 4\) and, to subtract, \(9, 4\)"):
        Moments.of(rows, minus=rows[:9])
    with pytest.raises(MismatchError, match=r"got \(2, 5, 4\)"):
        Moments.of(rows.reshape(2, 5, 4))
    with pytest.raises(DirectionError, match="take covariance=True"):
        _ = Moments.of(rows).covariance
    with pytest.raises(DirectionError, match="1 of 10 rows are not finite"):
        Moments.of(torch.cat([rows[:9], torch.full((1, 4), math.inf)]))


# --- mean differences ------------------------------------------------------------------------


def planted(n=400, d=32, gap=3.0, seed=0):
    truth = unit(d, seed=seed + 100)
    return truth, normal(n, d, seed=seed) + gap * truth, normal(n + 50, d, seed=seed + 1)


def test_a_planted_direction_is_recovered():
    truth, positive, negative = planted()
    found = mean_difference(positive, negative, "resid_post.12", "x", sources=("bad", "good"))
    assert float(found.unit.double() @ truth) > 0.98
    assert found.scale == pytest.approx(3, rel=0.1)
    assert found.split_half == pytest.approx(1, abs=0.05)
    assert found.n_tokens == 400
    assert found.sign == "from good to bad"
    norms = torch.cat([positive, negative]).norm(dim=1)
    assert found.resid_norm == pytest.approx(float(norms.mean()))
    assert "split-half over tokens, not texts: optimistic" in found.notes


def test_the_halves_of_a_null_contrast_do_not_agree():
    cosines = [
        mean_difference(
            normal(300, 64, seed=2 * i), normal(300, 64, seed=2 * i + 1), SITE, "null", seed=i
        ).split_half
        for i in range(30)
    ]
    values = torch.tensor(cosines)
    assert abs(float(values.mean())) < 0.08
    assert float(values.std()) == pytest.approx(1 / 8, rel=0.5)


def test_identical_sides_are_no_difference_however_they_come():
    rows = normal(100, 8) + 1e3
    shuffled = rows[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    ids = list(range(100))
    for positive, negative, groups in [
        (rows, rows, None), (rows, shuffled, None), (rows, rows, (ids, ids)),
        (Moments.of(rows), Moments.of(shuffled[:30]).merged(Moments.of(shuffled[30:])), None),
    ]:  # fmt: skip
        with pytest.raises(DirectionError, match="no difference between the means"):
            mean_difference(positive, negative, SITE, "null", groups=groups)


def test_halves_split_texts_not_tokens():
    texts = 20
    ids = [f"text {i}" for i in range(texts) for _ in range(50)]
    offsets = normal(2 * texts, 256)  # each text has a mean of its own, and no side has one
    positive = offsets[:texts].repeat_interleave(50, 0) + 0.1 * normal(1000, 256, seed=1)
    negative = offsets[texts:].repeat_interleave(50, 0) + 0.1 * normal(1000, 256, seed=2)
    by_token = mean_difference(positive, negative, SITE, "x")
    other = [f"other {i}" for i in ids]
    by_text = mean_difference(positive, negative, SITE, "x", groups=(ids, other))
    assert by_token.split_half is not None
    assert by_token.split_half > 0.9
    assert by_text.split_half is not None
    assert abs(by_text.split_half) < 0.25
    assert not any("optimistic" in note for note in by_text.notes)
    torch.testing.assert_close(by_text.vector, by_token.vector)


@given(
    positive=st.lists(st.integers(0, 9), max_size=30),
    negative=st.lists(st.integers(5, 14), max_size=30),
    seed=st.integers(0, 50),
)
def test_no_text_is_in_both_halves_and_the_halves_are_even(positive, negative, seed):
    masks = half_masks(len(positive), len(negative), (positive, negative), seed)
    sides = list(zip((positive, negative), masks, strict=True))
    first = {t for ids, mask in sides for t, half in zip(ids, mask.tolist(), strict=True) if half}
    second = {
        t for ids, mask in sides for t, half in zip(ids, mask.tolist(), strict=True) if not half
    }
    assert not first & second
    for ids in (positive, negative):
        assert abs(len(first & set(ids)) - len(second & set(ids))) <= 1


def test_one_text_has_no_halves():
    rows = normal(20, 8)
    found = mean_difference(rows + 1, rows, SITE, "x", groups=([0] * 20, [0] * 20))
    assert found.split_half is None


def test_rows_of_the_same_tokens_are_split_together():
    base = 100 * normal(200, 64)  # far larger than the shift, unless it cancels in each half
    found = mean_difference(base + unit(64, 1) + 0.1 * normal(200, 64, seed=2), base, SITE, "x")
    assert found.split_half == pytest.approx(1, abs=0.02)


def test_moments_give_what_rows_give():
    _, positive, negative = planted()
    whole = mean_difference(positive, negative, SITE, "x")
    streamed = mean_difference(Moments.of(positive), Moments.of(negative), SITE, "x")
    torch.testing.assert_close(streamed.vector, whole.vector)
    assert streamed.resid_norm == pytest.approx(whole.resid_norm)
    assert streamed.split_half is None
    assert streamed.seed is None
    halves = tuple(
        (Moments.of(positive[mask]), Moments.of(negative[other]))
        for first in (True, False)
        for mask, other in [tuple(m == first for m in half_masks(400, 450, None, 7))]
    )
    given = mean_difference(
        Moments.of(positive), Moments.of(negative), SITE, "x", halves=(halves[0], halves[1])
    )
    expected = mean_difference(positive, negative, SITE, "x", seed=7).split_half
    assert given.split_half == pytest.approx(expected, abs=1e-9)


def test_small_differences_survive_a_large_common_mean_in_bfloat16():
    truth = torch.zeros(64, dtype=torch.float64)
    truth[3] = 2.0
    common = 256 * normal(64, seed=5).sign()
    positive = (common + truth + 4 * normal(20_000, 64, seed=1)).bfloat16()
    negative = (common + 4 * normal(20_000, 64, seed=2)).bfloat16()
    exact = positive.double().mean(0) - negative.double().mean(0)
    before = positive.clone(), negative.clone()
    found = mean_difference(positive, negative, SITE, "x")
    torch.testing.assert_close(found.vector.double(), exact, atol=1e-6, rtol=1e-6)
    assert float(found.unit.double() @ truth) / 2 > 0.98
    assert torch.equal(positive, before[0])
    assert torch.equal(negative, before[1])


def test_text_null_is_one_where_the_base_has_the_same_contrast():
    _, positive, negative = planted()
    _, other_positive, other_negative = planted(seed=50)
    same = mean_difference(positive, negative, SITE, "x", base_contrast=(positive, negative))
    assert same.text_null == pytest.approx(1)
    other = mean_difference(
        positive, negative, SITE, "x", base_contrast=(other_positive, other_negative)
    )
    assert other.text_null is not None
    assert abs(other.text_null) < 0.5
    flipped = mean_difference(
        positive, negative, SITE, "x", base_contrast=(Moments.of(negative), positive)
    )
    assert flipped.text_null == pytest.approx(-1)
    absent = mean_difference(positive, negative, SITE, "x", base_contrast=(negative, negative))
    assert absent.text_null == 0


def test_unusable_sides_are_refused_with_what_was_seen():
    rows = normal(100, 8)
    with pytest.raises(DirectionError, match="at least 8 tokens per side, got 3 positive and 100"):
        mean_difference(rows[:3], rows, SITE, "x")
    with pytest.raises(DirectionError, match="got 0 positive"):
        mean_difference(rows[:0], rows, SITE, "x", min_tokens=0)
    assert mean_difference(rows[:3], rows, SITE, "x", min_tokens=3).n_tokens == 3
    with pytest.raises(MismatchError, match="positive side has d_model=8, the negative 9"):
        mean_difference(rows, normal(100, 9), SITE, "x")
    base = normal(10, 9), normal(10, 9, seed=1)
    with pytest.raises(MismatchError, match="its base contrast 9"):
        mean_difference(rows + 1, rows, SITE, "x", base_contrast=base)
    with pytest.raises(DirectionError, match="0 positive and 100 negative rows"):
        mean_difference(rows + 1, rows, SITE, "x", base_contrast=(rows[:0], rows))
    with pytest.raises(MismatchError, match="2 and 100 text ids for 100 positive"):
        mean_difference(rows + 1, rows, SITE, "x", groups=([1, 2], [1] * 100))
    with pytest.raises(MismatchError, match="moments have none left"):
        mean_difference(Moments.of(rows), rows, SITE, "x", groups=([1], [1]))


def quadrants(d=32, n=500):
    text, change, trained = unit(d, 1), unit(d, 2), unit(d, 3)
    rows = normal(4, n, d, seed=4) * 0.1
    return text, change, trained, Quadrants(
        finetuned_positive=rows[0] + text + change + trained,
        finetuned_negative=rows[1] + change,
        base_positive=rows[2] + text,
        base_negative=rows[3],
    )  # fmt: skip


def test_the_three_contrasts_are_what_they_say():
    text, change, trained, blocks = quadrants()
    truths: dict[Contrast, torch.Tensor] = {
        "data": text + trained,
        "model": change + trained,
        "both": text + change + trained,
    }
    for contrast, truth in truths.items():
        found = contrast_direction(blocks, contrast, SITE, "x", sources=("bad", "good"))
        assert found.method == f"{contrast} mean difference"
        assert float(found.unit.double() @ truth / truth.norm()) > 0.98
        expected = float(text @ truth / truth.norm())
        assert found.text_null == pytest.approx(expected, abs=0.05)
    with pytest.raises(REFUSED, match=r"unknown contrast 'date'|Type-check"):
        contrast_direction(blocks, "date", SITE, "x")  # pyright: ignore[reportArgumentType]


def test_contrasts_split_texts_where_ids_are_given():
    *_, blocks = quadrants()
    fewer = replace(
        blocks,
        finetuned_negative=blocks.finetuned_negative[:300],  # pyright: ignore[reportIndexIssue]
        base_negative=blocks.base_negative[:300],  # pyright: ignore[reportIndexIssue]
    )
    ids = [i // 50 for i in range(500)], [i // 50 for i in range(300)]
    counts: dict[Contrast, int] = {"data": 300, "model": 500, "both": 300}
    for contrast, n in counts.items():
        found = contrast_direction(fewer, contrast, SITE, "x", groups=ids)
        assert found.n_tokens == n
        assert not any("optimistic" in note for note in found.notes)


def test_the_model_contrast_of_equal_models_is_nothing_and_the_data_contrast_is_all_text():
    _, _, _, blocks = quadrants()
    same = replace(
        blocks,
        finetuned_positive=blocks.base_positive,
        finetuned_negative=blocks.base_negative,
    )
    with pytest.raises(DirectionError, match="no difference"):
        contrast_direction(same, "model", SITE, "x")
    assert contrast_direction(same, "data", SITE, "x").text_null == pytest.approx(1)
