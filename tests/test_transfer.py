"""Directions of one fine-tune in another: a shared one transfers, a random one does not."""

from threading import Event

import pytest
import torch

import modeldiff as md
from modeldiff.errors import Cancelled, MismatchError
from modeldiff.transfer import COVARIANCE, RANDOM, UNEDITED, transfer_matrix
from tests.planted import LAYER, behaviour, null_pair, planted_pair

ASKED = behaviour(24)


@pytest.fixture(scope="module")
def planted():
    pair, direction = planted_pair()
    return pair, direction


def matrix(targets, sources, **options):
    return transfer_matrix(targets, sources, n_random=3, **options).set_index(["target", "source"])


def test_a_planted_direction_transfers_and_random_ones_do_not(planted):
    pair, direction = planted
    other = md.Direction.of(torch.randn(direction.d_model), direction.site, "other")
    table = matrix({"one": (pair, ASKED), "two": (pair, ASKED)},
                   {"planted": [direction], "other": [other]})  # fmt: skip
    for target in ("one", "two"):
        rows = table.loc[target]
        rate = rows["rate"].astype(float).to_dict()
        assert rate[UNEDITED] > 0.25
        assert rate["planted"] < 0.1
        assert rate["other"] > 0.2
        assert float(rows["change_high"].to_dict()["planted"]) < 0
        assert rows["below_random"].to_dict()["planted"]
        kinds = [f"{kind} {i}" for kind in (RANDOM, COVARIANCE) for i in range(3)]
        assert set(rows.index) == {UNEDITED, "planted", "other", *kinds}
        assert (rows.loc[kinds, "kind"] == "random").all()


def test_where_nothing_was_taught_nothing_changes(planted):
    _, direction = planted
    table = matrix({"null": (null_pair("identical", 0), ASKED)}, {"planted": [direction]})
    assert table["rate"].max() < 0.2
    assert table["change_low"].max() <= 0 <= table["change_high"].min()
    assert not table.loc[("null", "planted"), "below_random"]


def test_what_does_not_fit_is_refused(planted):
    pair, direction = planted
    with pytest.raises(MismatchError, match="0 targets"):
        transfer_matrix({}, {"a": [direction]})
    with pytest.raises(MismatchError, match="give one of each"):
        transfer_matrix({"one": (pair, ASKED)}, {"a": []})
    wide = md.Direction.of(torch.ones(3), f"resid_post.{LAYER}", "wide")
    with pytest.raises(MismatchError, match="3 wide"):
        transfer_matrix({"one": (pair, ASKED)}, {"a": [wide]})


def test_cancelling_keeps_finished_targets(planted):
    pair, direction = planted
    stop = Event()
    targets = {"one": (pair, ASKED), "two": (pair, ASKED)}
    with pytest.raises(Cancelled) as stopped:
        transfer_matrix(targets, {"planted": [direction]}, n_random=0, cancel=stop,
                        progress=lambda done, total, said: stop.set())  # fmt: skip
    assert set(stopped.value.partial["target"]) == {"one"}
