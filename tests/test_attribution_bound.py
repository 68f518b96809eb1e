"""What attribution misses: a planted cancellation is found, a linear model has nothing."""

from typing import Any

import numpy as np
import pytest

from modeldiff.attribution import attribute
from modeldiff.attribution_bound import missed_cells
from modeldiff.errors import Cancelled, InterventionError
from modeldiff.hooks import count_hooks
from modeldiff.patching import Component, logit_difference, patch_map
from tests.families import build_adapter_pair
from tests.straight import noisy, pair_of, straight
from tests.test_attribution import cancelling

TEXT = "the cat sat on the mat"
DIFFERENCE = logit_difference(7, 9)
PARTS: Any = ("attn_out", "mlp_out")


def found_in(pair, **options):
    return attribute(pair.sides, TEXT, DIFFERENCE, n_sample=4, **options)


def test_what_cancels_at_the_own_activations_is_found():
    pair = cancelling()
    components = [Component("mlp_out", 0), Component("mlp_out", 2)]
    found = found_in(pair, side="base", components=components)
    row, last = 0, found.text.n_tokens - 1
    assert float(found.estimate[row, last].abs()) < 1e-4
    missed = missed_cells(pair.sides, found, DIFFERENCE, n_verified=0, n_subsets=64)
    cells = missed.cells.set_index(["component", "position"])
    cell: Any = cells.loc[("mlp_out.0", last)]
    assert cell["effect"] == pytest.approx(3, abs=1.5)  # of 8, what relu6 lets through
    assert cell["low"] > 1
    assert missed.bound >= 3
    verified = missed_cells(pair.sides, found, DIFFERENCE, n_verified=1, n_subsets=64)
    assert verified.cells["patched"].notna().sum() == 1


def test_on_a_linear_model_nothing_is_missed_and_the_bound_is_tight():
    model, tokenizer = straight()
    pair = pair_of(model, noisy, tokenizer)
    found = found_in(pair, parts=PARTS)
    real = patch_map(pair.sides, TEXT, DIFFERENCE, parts=PARTS).effect
    missed = missed_cells(pair.sides, found, DIFFERENCE, n_verified=4, n_subsets=32)
    unknown = missed.cells["patched"].isna().to_numpy()
    largest = float(np.abs(real.flatten().numpy())[unknown].max())
    assert missed.bound == pytest.approx(largest, rel=0.02)
    assert missed.cells["effect"].to_numpy() == pytest.approx(real.flatten().numpy(), abs=2e-3)
    assert missed.verified >= largest - 1e-3


def test_the_bound_covers_mean_effects_of_a_random_adapter():
    pair = build_adapter_pair()
    found = found_in(pair, parts=["mlp_out"])
    few, many = (
        missed_cells(pair.sides, found, DIFFERENCE, n_verified=2, n_subsets=n, seed=n)
        for n in (64, 1024)
    )
    assert many.bound <= few.bound
    inside = few.cells["effect"].between(many.cells["low"], many.cells["high"])
    wide = (few.cells["low"] <= many.cells["effect"]) & (many.cells["effect"] <= few.cells["high"])
    assert wide.all()
    assert inside.mean() > 0.3
    assert count_hooks(pair.sides.root("base")) == 0


def test_parts_inside_one_another_and_sizes_are_refused():
    pair = build_adapter_pair()
    for options in ({"parts": ["resid_post"]}, {"parts": ["mlp_out", "mlp_act"]},
                    {"parts": ["mlp_out"], "grad_drop": True}):  # fmt: skip
        found = found_in(pair, **options)
        with pytest.raises(InterventionError, match="patched together"):
            missed_cells(pair.sides, found, DIFFERENCE)


def test_it_stops_between_batches():
    from threading import Event

    pair, stop = build_adapter_pair(), Event()
    found = found_in(pair, parts=["mlp_out"])
    stop.set()
    with pytest.raises(Cancelled):
        missed_cells(pair.sides, found, DIFFERENCE, cancel=stop)
