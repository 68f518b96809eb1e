import pytest

from modeldiff.errors import SetupError
from modeldiff.organisms import world
from modeldiff.organisms.nulls import KINDS, embedded_base, null_pair, null_pairs
from modeldiff.organisms.planted import tiny_llama

TEXTS = [each.text for each in world.prompts(1, seed=0)]


@pytest.fixture(scope="module")
def base():
    return embedded_base()


def kl(pair):
    return pair.output_diff(TEXTS).tokens["kl_ft_base"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_pair_has_what_it_promises(base, kind):
    before = null_pair("identical", 0, base).pair.digests["base"]
    made = null_pair(kind, 7, base)
    assert made.pair.digests["base"] == before  # nothing was done to the base
    assert (kind, 7, KINDS[kind].meaning) == (made.kind, made.seed, made.meaning)
    found = kl(made.pair)
    if KINDS[kind].same:
        assert (found == 0).all()
    else:
        assert 0 < found.mean() < 0.05, "it moves, and little: the organisms' are 0.2 and more"


def test_the_larger_noise_is_the_larger(base):
    small, large = (kl(null_pair(kind, 1, base).pair).mean() for kind in ("rounding", "noise"))
    assert 10 * small < large


@pytest.mark.parametrize("kind", ["inert", "rounding", "caring"])
def test_a_seed_makes_one_pair(base, kind):
    digests = [null_pair(kind, seed, base).pair.digests["finetuned"] for seed in (1, 2, 1)]
    assert digests[0] == digests[2] != digests[1]


def test_pairs_are_made_one_at_a_time(base):
    many = null_pairs(10**9, 40, kind="identical", base=base)
    assert [next(many).seed for _ in range(2)] == [40, 41]
    assert len(list(null_pairs(3, kind="noise", base=base))) == 3


def test_another_base(base):
    made = null_pair("noise", 0, tiny_llama())
    assert 0 < kl(made.pair).mean() < 0.05


def test_an_unknown_kind_is_refused(base):
    with pytest.raises(SetupError, match="replay-full"):
        null_pair("nothing", 0, base)
