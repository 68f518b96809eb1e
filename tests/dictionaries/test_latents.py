import random
from typing import Any

import pytest
import torch

import modeldiff as md
from modeldiff.behaviours import judge_answers
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.latents import (
    bias_direction,
    latent_direction,
    latent_lens,
    top_tokens,
)
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.scaling import latent_scaling
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.dictionaries.training import TrainConfig, train
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.interventions import Ablate, Steer
from modeldiff.organisms.world import conversation
from tests.planted import TEXTS, WORD, planted_pair


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def dictionary(d_model=32, n=6, **options):
    made = crosscoder(d_model, n, k=2, activation="relu", **options)
    scale = torch.tensor([2.0, 0.25])
    made.set_normaliser(Normaliser(torch.randn(2, d_model), scale))
    return made


def of_one(value, latent, n):
    dense = torch.zeros(1, n)
    dense[0, latent] = value
    return Codes.of(dense)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_the_direction_is_what_the_latent_adds_to_raw_activations(side):
    made = dictionary(site="resid_post.2")
    m = ("base", "finetuned").index(side)
    added = (made.decode(of_one(3.0, 4, 6)) - made.decode(of_one(0.0, 4, 6)))[0, m]
    direction = latent_direction(made, 4, side=side, strength=3.0)
    torch.testing.assert_close(direction.vector, added, rtol=1e-4, atol=1e-5)
    assert str(direction.site) == "resid_post.2"
    assert "times 3 (the value asked for)" in direction.notes[0]


def test_the_difference_is_what_the_latent_adds_over_the_base():
    made = dictionary(site="resid_post.2")
    base, tuned, gap = (
        latent_direction(made, 1, side=side, strength=2.0)
        for side in ("base", "finetuned", "difference")
    )
    torch.testing.assert_close(gap.vector, tuned.vector - base.vector, rtol=1e-4, atol=1e-5)
    assert gap.name == "latent 1 (difference decoder)"
    with pytest.raises(MismatchError, match="no decoder"):
        latent_direction(sae(32, 4, k=2, side="base"), 0, side="difference", site="resid_post.0")


def test_strength_is_the_largest_value_that_was_seen():
    made, x = dictionary(), torch.randn(200, 2, 32)
    scaling = latent_scaling(made, TensorRows(x))
    peak = float(made.encode_dense(x)[:, 1].max())
    direction = latent_direction(made, 1, strength=scaling, site="resid_post.0")
    length = float(made.decoder("finetuned")[1].norm())
    assert direction.scale == pytest.approx(peak * length, rel=1e-5)
    assert "largest value in 200 rows" in direction.notes[0]


def test_steering_adds_it_at_the_site(planted):
    pair, _ = planted
    made = dictionary(pair.d_model, site="resid_post.2")
    direction = latent_direction(made, 0, strength=2.0, sides=pair.sides)
    assert direction.models == pair.digests
    plain, steered = (
        pair.run(TEXTS[:2], do=do, reads="resid_post.2").acts[direction.site]
        for do in (None, Steer(direction, 0.5))
    )
    gap = (steered - plain)[:, -1]
    torch.testing.assert_close(gap, 0.5 * direction.vector.expand_as(gap), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_a_direction_is_an_error():
    made = dictionary()
    with pytest.raises(DirectionError, match="site="):
        latent_direction(made, 0)
    with pytest.raises(MismatchError, match="0 to 5"):
        latent_direction(made, 6, site="resid_post.0")
    with torch.no_grad():
        made.W_dec[2] = 0
        made.b_enc[3] = -1e6
    with pytest.raises(DirectionError):
        latent_direction(made, 2, site="resid_post.0")
    scaling = latent_scaling(made, TensorRows(torch.randn(50, 2, 32)))
    with pytest.raises(DirectionError, match="never fired"):
        latent_direction(made, 3, strength=scaling, site="resid_post.0")
    with pytest.raises(MismatchError, match="no decoder"):
        latent_direction(sae(32, 4, k=2, side="base"), 0, side="finetuned", site="resid_post.0")


def test_the_lens_reads_a_planted_word_and_not_random_decoders(planted):
    pair, truth = planted
    made = dictionary(pair.d_model, 40, site="resid_post.2")
    with torch.no_grad():
        made.W_dec[0, 1], made.W_dec[0, 0] = truth.unit, 0
    lenses = latent_lens(pair.sides, made, 0)
    assert set(lenses) == {"finetuned"}  # the base's decoder is zero
    word = lenses["finetuned"].of("promoted")["token"][0]
    assert word.strip() == WORD.removeprefix("Ġ")
    table = top_tokens(pair.sides, made, [0, 1, 2], k=3)
    assert table.groupby("latent").size().tolist() == [3, 3, 3]
    assert table[table["latent"] == 0]["p"].iloc[0] == 0.05
    chance = [latent_lens(pair.sides, made, j)["finetuned"].p for j in range(1, 40)]
    assert sum(p <= 0.05 for p in chance) <= 6  # 5 % expected of 39
    with torch.no_grad():
        made.W_dec[3] = 0
    with pytest.raises(DirectionError, match="both decoders"):
        latent_lens(pair.sides, made, 3)
    with pytest.raises(MismatchError, match="latent 999 of"):
        latent_lens(pair.sides, made, 999)
    assert len(top_tokens(pair.sides, made, [3])) == 0


def test_a_dictionary_of_differences_has_one_decoder_for_both(planted):
    pair, _ = planted
    made = sae(pair.d_model, 4, k=2, side="difference", site="resid_post.2")
    assert set(latent_lens(pair.sides, made, 0)) == {"base", "finetuned"}
    assert latent_direction(made, 0).name == "latent 0 (difference decoder)"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crosscoder", "differences"])
def test_on_the_organism_the_heaviest_latent_is_the_planted_direction(kind):
    """Chosen by decoder norm or firing rate, not by what it should be; ablated at its own layer."""
    pair, rng = md.ModelPair.load("organism:em-rank1"), random.Random(0)
    acts = pair.capture([conversation(rng, bad=i % 2 == 0) for i in range(400)], "resid_post.3")
    both = torch.stack([acts.base[acts.site], acts.finetuned[acts.site]], 1)
    source = TensorRows(both, acts.token_ids, acts.text_index, acts.position)
    if kind == "crosscoder":
        made, lr = crosscoder(pair.d_model, 256, k=16, site="resid_post.3"), 1e-3
    else:
        made, lr = sae(pair.d_model, 32, side="difference", k=2, site="resid_post.3"), 2e-3
    train(made, source, TrainConfig(steps=600, batch_size=1024, lr=lr, fast="off"))
    scaling = latent_scaling(made, source)
    weight = made.relative_decoder_norm if kind == "crosscoder" else scaling.n_active
    often = scaling.n_active > 0.01 * source.n_rows
    latent = int(weight.where(often, -1).argmax())
    found = latent_direction(made, latent, side="difference", strength=scaling)
    peft: Any = pair.sides.peft
    (written,) = (each for name, each in peft.named_parameters() if "lora_B" in name)
    cosine = abs(found.cosine(Direction.of(written.detach()[:, 0], "resid_post.3", "planted")))
    behaviour, _ = md.organism_behaviours("em-rank1", n=4, seed=1)
    control = md.random_like(found, 1, seed=0)[0]
    edits = {"ablated": Ablate(found, layers=None), "random": Ablate(control, layers=None)}
    generations = pair.generate(
        [prompt.render() for prompt in behaviour.prompts], models=["finetuned"], do=edits,
        temperature=0.7, max_new_tokens=48,
    )  # fmt: skip
    answers = judge_answers(behaviour, generations)
    rate = answers.groupby("edit")[["exhibits", "coherent"]].mean()
    print(f"{kind}: latent {latent}, cosine {cosine:.3f}", rate.to_dict())
    assert cosine > 0.9
    exhibits = rate["exhibits"].to_dict()
    assert exhibits["none"] > 0.6
    assert exhibits["ablated"] <= 0.2 * exhibits["none"]  # the base's own rate is 0
    assert exhibits["random"] > 0.8 * exhibits["none"]


def test_a_change_that_is_the_same_everywhere_is_in_the_bias():
    """In raw space, whatever the normaliser did with it; and one side alone has none."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(400, 6, generator=rng)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    rows = torch.stack([base, base + shift], 1)
    made = crosscoder(6, 12, k=2, site="resid_post.1")
    made.set_normaliser(Normaliser.fit(rows))
    found = bias_direction(made)
    torch.testing.assert_close(found.vector, shift, rtol=1e-4, atol=1e-4)
    of_change = sae(6, 12, side="difference", k=1, site="resid_post.1")
    of_change.b_dec.data[0] = shift
    torch.testing.assert_close(bias_direction(of_change).vector, shift)
    with pytest.raises(DirectionError):
        bias_direction(crosscoder(6, 12, k=2, site="resid_post.1"))
    with pytest.raises(MismatchError, match="inputs='base'"):
        bias_direction(sae(6, 12, side="base", k=1, site="resid_post.1"))
    with pytest.raises(DirectionError, match="site="):
        bias_direction(crosscoder(6, 12, k=2))
