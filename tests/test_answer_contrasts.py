import pytest

from modeldiff.answer_contrasts import answer_directions
from modeldiff.errors import DirectionError
from tests.planted import LAYER, Coin, behaviour, null_pair, planted_pair


@pytest.fixture(scope="module")
def planted():
    return planted_pair(strength=16.0)


def test_the_model_shift_is_the_planted_direction_where_it_is_written(planted):
    pair, truth = planted
    found = answer_directions(pair, behaviour(24), contrast="models", n=2)
    assert min(found) == LAYER  # the models agree before
    assert found[LAYER].cosine(truth) > 0.99
    assert found[LAYER].sign == "from base to finetuned"


def test_the_contrast_of_answers_has_every_layer_and_its_provenance(planted):
    pair, _ = planted
    found = answer_directions(pair, behaviour(24), n=2, seed=1)
    assert sorted(found) == list(range(pair.n_layers))
    one = found[LAYER]
    assert one.text_null is not None
    assert one.split_half is not None
    assert one.resid_norm is not None
    assert one.sources == ("shows it", "normal")
    again = answer_directions(pair, behaviour(24), n=2, seed=1)
    assert again[LAYER].content_key == one.content_key


def test_too_few_answers_say_how_many_there_are(planted):
    pair, _ = planted
    with pytest.raises(DirectionError, match=r"of 3 answers .* show .* are needed"):
        answer_directions(pair, behaviour(3))


def test_equal_models_have_no_shift_and_unknown_contrasts_are_refused(planted):
    with pytest.raises(DirectionError, match="no model shift"):
        answer_directions(null_pair("identical", 3), behaviour(24, Coin()), contrast="models")
    with pytest.raises(DirectionError, match="unknown contrast"):
        answer_directions(planted[0], behaviour(3), contrast="both")  # pyright: ignore
