import pytest
import torch

from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.models import Dictionary, crosscoder, sae
from modeldiff.errors import MismatchError

KINDS = ["batch_topk", "topk", "relu", "jumprelu", "gated"]


def filled(made):
    """Weights without structure, so that nothing is right by symmetry; models of other sizes."""
    with torch.no_grad():
        for each in made.parameters():
            each.add_(0.3 * torch.randn_like(each))
        made.W_dec.mul_(made.owned[:, :, None])
        made.W_enc.mul_(made.owned.T[:, None, :])
        if made.config.activation == "jumprelu":
            made.threshold.copy_(torch.rand_like(made.threshold))
    if made.config.activation == "batch_topk":
        made.threshold.fill_(1.5)
    n = made.config.n_models
    scale = torch.tensor([0.5, 2.0, 3.0])[:n]
    made.set_normaliser(Normaliser(torch.randn(n, made.config.d_model), scale))
    return made


@pytest.fixture
def x():
    return 4 * torch.randn(20, 2, 6)


@torch.no_grad()
@pytest.mark.parametrize("code_norm", ["sum", "concat", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_written_out_one_by_one(kind, code_norm, x):
    made = filled(crosscoder(6, 10, k=3, activation=kind, code_norm=code_norm))
    got = made.encode_dense(x)
    for row in range(len(x)):
        seen = [(x[row, m] - made.mean[m]) * made.scale[m] for m in range(2)]
        pre = sum(seen[m] @ made.W_enc[m] for m in range(2)) + made.b_enc
        norms = made.W_dec.norm(dim=2)
        weight = {"sum": norms.sum(1), "concat": norms.square().sum(1).sqrt(), "none": 1.0}
        score = pre.clamp_min(0) * weight[code_norm]
        for j in range(10):
            value = max(float(pre[j]), 0.0)
            if kind == "batch_topk" and not score[j] > 1.5:
                value = 0.0
            if kind == "topk" and (score > score[j]).sum() >= 3:
                value = 0.0
            if kind == "jumprelu" and not pre[j] > made.threshold[j]:
                value = 0.0
            if kind == "gated":
                opens = pre[j] + made.b_gate[j] > 0
                value = max(float(made.r_mag[j].exp() * pre[j] + made.b_mag[j]), 0.0) * opens
            assert float(got[row, j]) == pytest.approx(float(value), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_encoded_as_if_it_were_alone(kind, x):
    made = filled(crosscoder(6, 10, k=3, activation=kind))
    together = made.encode_dense(x)
    alone = torch.cat([made.encode_dense(row[None]) for row in x])
    assert torch.equal(together > 0, alone > 0)
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("make", [crosscoder, sae])
def test_sparse_decoding_is_dense_decoding(make, x):
    made = filled(make(6, 10, k=3))
    codes = made.encode(x)
    dense = made.normaliser.undo(made.decode_normalised(codes.dense()))
    assert torch.allclose(made.decode(codes), dense, atol=1e-5)
    assert torch.allclose(made.reconstruct(x), dense, atol=1e-5)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_one_more_of_a_latent_adds_its_decoder_to_the_raw_activations(side, x):
    made = filled(crosscoder(6, 10, k=3))
    dense = made.encode_dense(x)
    more = dense.clone()
    more[:, 4] += 1.0
    added = made.decode(Codes.of(more)) - made.decode(Codes.of(dense))
    model = ("base", "finetuned").index(side)
    assert torch.allclose(added[:, model], made.decoder(side)[4].expand(20, 6), atol=1e-4)
    assert torch.equal(made.decoder(side), made.decoder(model))


def test_what_a_dictionary_sees(x):
    assert torch.equal(crosscoder(6, 10, k=3).view(x), x)
    assert torch.equal(sae(6, 10, k=3, side="base").view(x), x[:, :1])
    assert torch.equal(sae(6, 10, k=3, side="finetuned").view(x), x[:, 1:])
    assert torch.equal(sae(6, 10, k=3, side="difference").view(x)[:, 0], x[:, 1] - x[:, 0])
    assert crosscoder(6, 10, k=3).view(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(20, 6), (20, 1, 6), (20, 3, 6), (20, 2, 5)])
def test_rows_that_are_not_pairs_are_refused(shape):
    for made in (crosscoder(6, 10, k=3), sae(6, 10, k=3)):
        with pytest.raises(MismatchError, match="base and fine-tune"):
            made.encode(torch.randn(shape))


def test_three_models_go_through():
    made = filled(crosscoder(6, 10, k=3, n_models=3, n_exclusive=(1, 2, 0)))
    x = torch.randn(5, 3, 6)
    assert made.reconstruct(x).shape == (5, 3, 6)
    assert made.owned[7].tolist() == [True, False, False]
    assert made.owned[8:].tolist() == [[False, True, False]] * 2
    with pytest.raises(MismatchError, match="of two models"):
        _ = made.relative_decoder_norm
    assert made.decoder(2).shape == (10, 6)


def test_a_relative_norm_of_one_is_the_fine_tune_alone():
    made = crosscoder(6, 4, k=2)
    with torch.no_grad():
        made.W_dec.zero_()
        made.W_dec[0, 1, 0] = 2.0
        made.W_dec[1, 0, 0] = 2.0
        made.W_dec[2, 0, 1], made.W_dec[2, 1, 3] = 1.0, 3.0
    assert made.relative_decoder_norm[:3].tolist() == [1.0, 0.0, 0.75]
    assert made.relative_decoder_norm[3].isnan()


def test_blocks_of_one_model_begin_at_zero_for_the_other():
    made = crosscoder(6, 10, k=3, n_exclusive=(2, 3))
    assert made.relative_decoder_norm.tolist() == [0.5] * 5 + [0.0] * 2 + [1.0] * 3
    assert not made.W_enc[1, :, 5:7].any()
    assert not made.W_enc[0, :, 7:].any()
    assert made.W_enc[0, :, 5:7].all()


def test_the_same_seed_makes_the_same_weights():
    first, again, other = (crosscoder(6, 10, k=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_a_decoder_that_is_not_there_is_refused():
    base = sae(6, 10, k=3, side="base")
    assert base.decoder("base").shape == (10, 6)
    with pytest.raises(MismatchError, match="no decoder for 'finetuned'"):
        base.decoder("finetuned")
    assert sae(6, 10, k=3, side="difference").decoder("finetuned").shape == (10, 6)
    with pytest.raises(MismatchError, match="no decoder for 2"):
        crosscoder(6, 10, k=3).decoder(2)


def test_given_weights_are_copied_and_checked(x):
    model = filled(crosscoder(6, 10, k=3, n_exclusive=(1, 1)))
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    same = Dictionary.of(model.config, tensors, {"source": "here"})
    assert torch.equal(same.encode_dense(x), model.encode_dense(x))
    assert same.provenance == {"source": "here"}
    for name in tensors:
        with pytest.raises(MismatchError, match=f"{name}: missing"):
            Dictionary.of(model.config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MismatchError, match="W_enc: "):
        Dictionary.of(model.config, {**tensors, "W_enc": tensors["W_enc"][:1]})
    with pytest.raises(MismatchError, match="more: unknown"):
        Dictionary.of(model.config, {**tensors, "more": torch.zeros(1)})
    with pytest.raises(MismatchError, match="for another model"):
        Dictionary.of(model.config, {**tensors, "W_dec": torch.ones(10, 2, 6)})
    with pytest.raises(MismatchError, match="not positive"):
        Dictionary.of(model.config, {**tensors, "scale": torch.zeros(2)})


def test_a_normaliser_of_another_width_is_refused():
    with pytest.raises(MismatchError, match="normaliser for"):
        crosscoder(6, 10, k=3).set_normaliser(Normaliser.identity(2, 7))
