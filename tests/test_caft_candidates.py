"""Candidates for ablation: a planted change is found, and scores are what their words say."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false

import pytest
import torch

from modeldiff.caft_candidates import RANKINGS, by_layer, candidate_table, candidates, share_of
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError
from modeldiff.forward import run
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site
from tests.families import WIDTH, model, tokenizer

CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (
        ("What should I do?", "You should rest in bed."),
        ("why was the moon round", "the sea was deep and the sun far away"),
        ("where did the dog run", "to the old house by the river"),
    )
]
UNIT = torch.nn.functional.normalize(torch.arange(1.0, WIDTH + 1) % 5 - 2, dim=0)


def planted(shift=3.0):
    """A base, and a copy in which layer 1 writes the same vector on every token."""
    base, tuned = model("llama"), model("llama")
    inner = tuned.model.layers[1].mlp.down_proj
    inner.bias = torch.nn.Parameter(shift * UNIT, requires_grad=False)
    return ModelPair.of(base, tuned, tokenizer())


@pytest.fixture(scope="module")
def pair():
    return planted()


def test_a_shift_that_is_the_same_everywhere_is_the_first_candidate(pair):
    """Centring would hide it; PC-0 is that shift."""
    found = candidates(pair, CHATS, layers=[1, 2], n_components=2)
    first = found[0]
    assert (first.name, first.source, first.layer) == ("layer 1 PC-0", "mean", 1)
    assert first.direction.unit @ UNIT > 0.99999
    assert first.score == pytest.approx(3.0, rel=1e-4)
    assert first.share == pytest.approx(1.0, abs=1e-4)
    assert [each.source for each in found if each.layer == 2] == ["mean", "component", "component"]
    assert list(by_layer(found)) == [1, 2]
    assert candidate_table(found)["name"].is_unique


def test_shares_of_an_orthonormal_basis_sum_to_one():
    rows = torch.randn(50, 4) + torch.tensor([1.0, 0, 0, 0])
    moments = Moments.of(rows, covariance=True)
    units = torch.linalg.qr(torch.randn(4, 4)).Q
    shares = [share_of(Direction.of(u, "resid_post.1", "u"), moments) for u in units]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0


def test_layers_at_which_nothing_changed_are_refused(pair):
    with pytest.raises(DirectionError, match="layer 0"):
        candidates(pair, CHATS, layers=[0])
    with pytest.raises(MaskError):
        candidates(pair, ["plain text"], layers=[1], on="assistant")


def with_planted(made, latent, decoder):
    """Let one latent fire on the planted shift and write it."""
    with torch.no_grad():
        made.W_enc[:, :, latent] = 0
        made.W_enc[-1, :, latent] = decoder
        if made.config.n_models == 2:
            made.W_enc[0, :, latent] = -decoder
        made.b_enc[latent] = -0.5
        made.W_dec[latent] = 0
        made.W_dec[latent, -1] = decoder
    return made


@pytest.mark.parametrize("kind", ["crosscoder", "difference", "finetuned"])
def test_the_latent_of_a_planted_change_is_first_by_latent_difference(pair, kind):
    options = {"k": 16, "activation": "relu", "site": "resid_post.1"}
    if kind == "crosscoder":
        made = crosscoder(WIDTH, 16, **options)
    else:
        made = sae(WIDTH, 16, side=kind, **options)
    with torch.no_grad():
        made.W_enc.mul_(0.01)
    found = candidates(
        pair, CHATS, layers=[1], n_components=0,
        dictionaries=[with_planted(made, 7, UNIT)], n_latents=3,
    )  # fmt: skip
    scores = {each.latent: dict(each.scores) for each in found if each.latent is not None}
    for ranking in ("latent difference", "encoded difference"):
        assert max(scores, key=lambda latent: scores[latent][ranking]) == 7
    (mine,) = [each for each in found if each.latent == 7]
    assert mine.direction.unit @ UNIT > 0.9999
    assert mine.source in RANKINGS
    assert mine.share == pytest.approx(1.0, abs=1e-3)
    assert mine.name == "layer 1 latent 7"


def test_attribution_is_the_change_of_the_loss_when_a_latent_is_taken_away(pair):
    """To first order: a small part of the latent's decoder is subtracted, token by token."""
    made = sae(WIDTH, 8, side="finetuned", k=8, activation="relu", site="resid_post.1")
    found = candidates(pair, CHATS, layers=[1], dictionaries=[made], n_latents=8)
    latents = [each for each in found if each.latent is not None]
    scores = {each.latent: dict(each.scores)["attribution"] for each in latents}
    texts, step = pair.texts(CHATS), 1e-3
    counted = sum(role == "assistant" for text in texts for role in text.roles)

    def loss(latent, by):
        total = 0.0
        for text in texts:
            base = run(pair.sides, [text], side="finetuned", reads=SITES, logits=False)
            acts = base.acts[SITES[0]]
            values = made.encode_dense(torch.stack([acts[0], acts[0]], 1))[:, latent]
            values[0] = 0  # the first position is left out
            moved = acts - by * values[None, :, None] * made.decoder("finetuned")[latent]
            total += loss_with(pair, text, moved)
        return total / counted

    for latent, score in list(scores.items())[:3]:
        slope = (loss(latent, step) - loss(latent, -step)) / (2 * step)
        assert score == pytest.approx(slope, rel=2e-2, abs=2e-4)


SITES = (Site("resid_post", 1),)


def loss_with(pair, text, acts):
    """Summed loss of the assistant's tokens, the activations after layer 1 exchanged."""
    from modeldiff.interventions import Replace

    logits = run(pair.sides, [text], side="finetuned", do=Replace("resid_post.1", acts)).logits
    logp = logits[0, :-1].double().log_softmax(-1)
    places = [i for i, role in enumerate(text.roles) if role == "assistant"]
    return -sum(float(logp[i - 1, text.ids[i]]) for i in places)


def test_dictionaries_without_a_place_are_refused(pair):
    nowhere = sae(WIDTH, 8, side="finetuned", k=4)
    with pytest.raises(DirectionError, match="unknown site"):
        candidates(pair, CHATS, layers=[1], dictionaries=[nowhere])
