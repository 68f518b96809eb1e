import dataclasses

import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError, RemoteError
from modeldiff.logit_lens import logit_lens
from tests.families import FAMILIES, WIDTH
from tests.planted import WORD, planted_pair


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def some(seed=3, site="resid_post.2"):
    draw = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, site, "some")


def test_the_planted_word_is_promoted_first_and_beats_every_random_direction(planted):
    pair, truth = planted
    lens = logit_lens(pair.sides, truth, k=5, n_random=19)
    first = lens.of("promoted").iloc[0]
    assert first["token_id"] == pair.tokenizer.convert_tokens_to_ids(WORD)
    assert first["token"] == " the"
    assert lens.p == 1 / 20
    assert max(lens.random_reach) < first["logit"]


def test_the_opposite_direction_swaps_the_ends(planted):
    pair, truth = planted
    there, back = (logit_lens(pair.sides, each, k=4) for each in (truth, -truth))
    promoted, suppressed = there.of("promoted"), back.of("suppressed")
    assert promoted["token_id"].tolist() == suppressed["token_id"].tolist()
    assert promoted["logit"].to_numpy() == pytest.approx(-suppressed["logit"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_logits_are_the_unembedding_of_the_normed_direction_by_hand(family_pairs, family):
    """A second way: weights by name, the norm written out, its bias left out."""
    assert family in FAMILIES
    pair, direction = family_pairs[family], some()
    root = pair.sides.roots[1]
    head = root.get_output_embeddings().weight.double()
    unit = direction.unit.double() * WIDTH**0.5
    norm = dict(root.named_modules())[pair.sides.site_map.norm]
    if family in ("gpt2", "gpt_neox"):  # LayerNorm centres
        unit = unit - unit.mean()
        unit = unit / unit.pow(2).mean().sqrt()
    weight = norm.weight.double() + (1 if family == "gemma2" else 0)
    scores = head @ (weight * unit)
    want = (scores - scores[: len(pair.tokenizer)].mean())[: len(pair.tokenizer)]
    lens = logit_lens(pair.sides, direction, k=6)
    for end, ordered in (("promoted", want), ("suppressed", -want)):
        got = lens.of(end)
        assert got["token_id"].tolist() == ordered.topk(6).indices.tolist()
        assert torch.tensor(got["logit"].tolist(), dtype=torch.float64) == pytest.approx(
            want[ordered.topk(6).indices], abs=1e-3
        )


def test_its_length_does_not_matter_and_controls_are_seeded(planted):
    pair, truth = planted
    one, other = (logit_lens(pair.sides, each, seed=4) for each in (truth, 7.0 * truth))
    assert one.of("promoted")["logit"].tolist() == other.of("promoted")["logit"].tolist()
    assert one.random_reach == other.random_reach
    assert logit_lens(pair.sides, truth, seed=5).random_reach != one.random_reach
    assert one.of("promoted", "random", 1)["name"].unique().tolist() == ["random 1 like truth"]


def test_random_directions_do_not_stand_out_from_random_ones(planted):
    pair, _ = planted
    ps = [logit_lens(pair.sides, some(seed), n_random=9, seed=100 + seed).p for seed in range(20)]
    assert sum(ps) / len(ps) == pytest.approx(0.55, abs=0.2)
    assert min(ps) >= 0.1


def test_what_cannot_be_read_is_refused(planted):
    pair, truth = planted
    with pytest.raises(DirectionError, match="not in the residual stream"):
        logit_lens(pair.sides, some(site="mlp_act.1"))
    with pytest.raises(MismatchError, match="another model"):
        logit_lens(pair.sides, Direction.of(torch.ones(7), "resid_post.1", "narrow"))
    with pytest.raises(DirectionError, match="at least 1"):
        logit_lens(pair.sides, truth, k=0)
    with pytest.raises(RemoteError):
        logit_lens(dataclasses.replace(pair.sides, kind="remote"), truth)
