from threading import Event

import numpy as np
import pytest
import torch

from modeldiff.dictionaries.causality import CONTROLS, causality, latent_sets
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.scaling import latent_scaling
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import Cancelled, MaskError, MismatchError
from modeldiff.interventions import Replace
from tests.planted import LAYER, TEXTS, planted_pair

SITE = f"resid_post.{LAYER}"
SETS = {"planted": [0], "others": [1, 2, 3], "all of them": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def dictionary(truth, scales=(1.0, 1.0)):
    """Latent 0 is the planted shift of the fine-tune; the others are the same in both models."""
    d_model, rng = len(truth.unit), torch.Generator().manual_seed(0)
    made = crosscoder(d_model, 4, k=2, activation="relu", site=SITE)
    scale = torch.tensor(scales)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(2, d_model, 4, generator=rng))
        made.W_dec.copy_(torch.randn(4, 1, d_model, generator=rng).expand(4, 2, d_model))
        made.W_enc[0, :, 0], made.W_enc[1, :, 0] = -truth.unit, truth.unit
        made.W_dec[0, 0], made.W_dec[0, 1] = 0, truth.unit
        made.W_enc.div_(scale[:, None, None])
        made.W_dec.mul_(scale[:, None])
    made.set_normaliser(Normaliser(torch.zeros(2, d_model), scale))
    return made


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 3.0)])
def test_the_planted_latent_closes_the_distance_and_shared_ones_do_not(planted, scales):
    """In raw space, whatever the normaliser."""
    pair, truth = planted
    found = causality(pair.sides, dictionary(truth, scales), TEXTS, SETS, skip_first=0)
    assert found.closed("planted") > 0.999
    assert abs(found.closed("others")) < 1e-3
    assert found.closed("all of them") > 0.999
    assert found.closed("none") == 0
    assert found.closed("replacement") > 0.9999
    assert abs(found.closed("error")) < 1e-3  # the dictionary leaves nothing of the change out
    summary = found.summary.set_index("patch")
    assert set(summary.index) == {*SETS, *CONTROLS, "all latents"}
    assert summary["kl"]["none"] > 0.1
    assert (summary["low"] <= summary["closed"] + 1e-9).all()
    assert (summary["high"] >= summary["closed"] - 1e-9).all()


def test_what_the_dictionary_lacks_is_in_the_error(planted):
    pair, truth = planted
    made = dictionary(truth)
    with torch.no_grad():
        made.W_dec[0] = 0
    found = causality(pair.sides, made, TEXTS, SETS, skip_first=0)
    assert abs(found.closed("planted")) < 1e-3
    assert found.closed("error") > 0.999


def test_it_is_the_computation_written_out(planted):
    """One text, half of the latent's decoder: KL of dense logits in float64."""
    pair, truth = planted
    made = dictionary(truth)
    with torch.no_grad():
        made.W_dec[0] *= 0.5
    found = causality(pair.sides, made, TEXTS[:3], {"half": [0]})
    rows = found.texts[found.texts["patch"] == "half"].set_index("text")
    for i, text in enumerate(TEXTS[:3]):
        runs = {side: pair.run([text], side=side, reads=SITE) for side in ("base", "finetuned")}
        base, tuned = (run.acts[truth.site] for run in runs.values())
        value = ((tuned - base) @ truth.unit).relu()
        patched = base + 0.5 * value[..., None] * truth.unit
        patched[:, 0] = base[:, 0]
        edited = pair.run([text], do=Replace(SITE, patched)).logits
        p, q = (x[0, :-1].double().log_softmax(-1) for x in (runs["finetuned"].logits, edited))
        assert rows.loc[i, "kl"] == pytest.approx(
            float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3
        )
        assert rows.loc[i, "n_tokens"] == len(p)


def test_batches_change_nothing(planted):
    pair, truth = planted
    one, many = (
        causality(pair.sides, dictionary(truth), TEXTS[:6], SETS, max_tokens=n).summary
        for n in (1, 4096)
    )
    np.testing.assert_allclose(one["closed"], many["closed"], atol=1e-4)


def test_latents_are_ranked_by_what_the_base_has_of_them():
    rng = torch.Generator().manual_seed(1)
    d = torch.linalg.qr(torch.randn(32, 32, generator=rng))[0][:10]
    share = torch.arange(10) / 10
    f = torch.rand(5000, 10, generator=rng) * (torch.rand(5000, 10, generator=rng) < 0.2)
    made = crosscoder(32, 10, k=2, activation="relu")
    with torch.no_grad():
        made.W_enc.zero_()[1] = d.T
        made.b_enc.fill_(-0.05)
        made.W_dec[:, 1] = d
        made.W_dec[:, 0] = share[:, None] * d
        made.b_enc[9] = -1e6
    x = torch.stack([(f * share) @ d, f @ d], 1)
    scaling = latent_scaling(made, TensorRows(x))
    sets = latent_sets(scaling, range(10), shares=(0.34, 0.5), n_random=2)
    assert sets["best 34%"] == [0, 1, 2]
    assert sets["worst 34%"] == [6, 7, 8]
    assert sets["candidates 100%"] == list(range(9))  # the dead one has no nu
    assert len(set(sets["random 50% #0"])) == len(sets["best 50%"]) == 4
    assert sets["random 50% #0"] != sets["random 50% #1"]
    with pytest.raises(MismatchError, match="0 of 1 candidates"):
        latent_sets(scaling, [9])


def test_errors(planted):
    pair, truth = planted
    made = dictionary(truth)
    with pytest.raises(MismatchError, match="crosscoder"):
        causality(pair.sides, sae(32, 4, k=2, site=SITE), TEXTS, SETS)
    for wrong in (-1, made.config.n_latents):
        with pytest.raises(MismatchError, match=f"latent {wrong} of a dictionary"):
            causality(pair.sides, made, TEXTS[:2], {"mine": [0, wrong]})
    with pytest.raises(MaskError, match="no predicted token"):
        causality(pair.sides, made, TEXTS[:2], SETS, on="new")
    with pytest.raises(MismatchError, match="nothing below the site changed"):
        causality(pair.sides, made, TEXTS[:2], SETS, site="resid_post.0")
    cancel = Event()
    with pytest.raises(Cancelled) as caught:
        causality(pair.sides, made, TEXTS, SETS, max_tokens=1, cancel=cancel,
                  progress=lambda done, total, message: cancel.set())  # fmt: skip
    assert caught.value.partial["text"].nunique() == 1
