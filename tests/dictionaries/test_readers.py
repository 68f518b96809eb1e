"""Foreign layouts: each is written here as its package writes it, and read back.

Two checks a layout: a dictionary of ours, written in it, reconstructs the same; and random tensors
reconstruct what that package's own formula gives, written out below.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeldiff.dictionaries.configs import DictionaryConfig, Normaliser
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.readers import read
from modeldiff.errors import FileFormatError, MismatchError

D, F, N = 12, 40, 64
relu = torch.relu


def numbers(*shape, seed=0, scale=0.5):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed=9):
    """Raw rows of both models: a large offset, another scale each."""
    return numbers(N, 2, D, seed=seed, scale=1.0) * torch.tensor([3.0, 5.0])[:, None] + 2.0


def made(activation, n_models, **more):
    """A dictionary of ours with random weights."""
    config = DictionaryConfig(
        d_model=D, n_latents=F, n_models=n_models, activation=activation, k=6,
        inputs="pair" if n_models == 2 else "finetuned", **more,
    )  # fmt: skip
    dictionary = Dictionary(config)
    if n_models == 2:
        scale = torch.tensor([0.3, 0.2])
        dictionary.set_normaliser(Normaliser(numbers(2, D, seed=7), scale))
    with torch.no_grad():
        for seed, value in enumerate(dictionary.parameters()):
            value.copy_(numbers(*value.shape, seed=seed + 20))
        if activation == "gated":
            dictionary.b_enc.zero_()  # its pre-activations have none of their own
        if activation in ("batch_topk", "jumprelu"):
            dictionary.threshold.copy_(numbers(*dictionary.threshold.shape, seed=3).abs() + 0.2)
    return dictionary


def write_pt(value, path):
    torch.save(value, path)  # noqa: TID251 - what is read here was written so, elsewhere


def write_json(path, value):
    path.write_text(json.dumps(value))


def crosscoder_tensors(own):
    name = {"sum": 1, "concat": 2, "none": 4}[own.config.code_norm]
    found = {
        "encoder.weight": own.W_enc, "encoder.bias": own.b_enc,
        "decoder.weight": own.W_dec.transpose(0, 1), "decoder.bias": own.b_dec,
        "code_normalization_id": torch.tensor(name),
        "activation_mean": own.normaliser.mean, "activation_std": torch.ones(2, D),
        "activation_global_scale": own.normaliser.scale,
    }  # fmt: skip
    if own.config.activation == "batch_topk":
        found |= {"k": torch.tensor(own.config.k), "threshold": own.threshold}
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def write_crosscoder(folder, own):
    write_pt(crosscoder_tensors(own), folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": {"dict_class": "BatchTopKCrossCoder"}})


def write_crosscoder_hub(folder, own):
    save_file(crosscoder_tensors(own), folder / "model.safetensors")
    write_json(folder / "config.json", {"activation_dim": D, "dict_size": F, "num_layers": 2})


def subtracting(own):
    """The encoder's bias where the input is ``x - b_dec``."""
    return own.b_enc + own.b_dec[0] @ own.W_enc[0]


def write_sae(folder, own):
    name = {"batch_topk": "BatchTopKSAE", "topk": "AutoEncoderTopK"}[own.config.activation]
    found = {
        "encoder.weight": own.W_enc[0].T, "encoder.bias": subtracting(own),
        "decoder.weight": own.W_dec[:, 0].T, "b_dec": own.b_dec[0],
        "k": torch.tensor(own.config.k), "threshold": torch.tensor(float(own.threshold.max())),
    }  # fmt: skip
    write_pt({key: value.detach().clone() for key, value in found.items()}, folder / "ae.pt")
    trainer = {"dict_class": name, "submodule_name": "resid_post_layer_4"}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})


def write_gated(folder, own):
    shift = own.b_dec[0] @ own.W_enc[0]  # the encoder of the file reads x - b_dec
    found = {
        "encoder.weight": own.W_enc[0].T, "decoder.weight": own.W_dec[:, 0].T,
        "decoder_bias": own.b_dec[0], "r_mag": own.r_mag, "gate_bias": own.b_gate + shift,
        "mag_bias": own.b_mag + shift * own.r_mag.exp(),
    }  # fmt: skip
    write_pt({key: value.detach().clone() for key, value in found.items()}, folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": {"dict_class": "GatedAutoEncoder"}})


def plain_tensors(own):
    found = {"W_enc": own.W_enc[0], "W_dec": own.W_dec[:, 0], "b_enc": own.b_enc,
             "b_dec": own.b_dec[0]}  # fmt: skip
    if own.config.activation == "jumprelu":
        found["threshold"] = own.threshold
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


SAELENS = {"architecture": "jumprelu", "apply_b_dec_to_input": False,
           "normalize_activations": "none", "hook_name": "blocks.4.hook_resid_post"}  # fmt: skip


def write_saelens(folder, own):
    save_file(plain_tensors(own), folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", SAELENS)


def write_saelens_standard(folder, own):
    found = plain_tensors(own) | {"b_enc": subtracting(own).detach().clone()}
    save_file(found, folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", SAELENS | {
        "architecture": "standard", "apply_b_dec_to_input": True})  # fmt: skip


def write_gemma(folder, own):
    arrays = {key: value.numpy() for key, value in plain_tensors(own).items()}
    np.savez(folder / "params.npz", **arrays)


def write_sparsify(folder, own):
    found = {"encoder.weight": own.W_enc[0].T, "encoder.bias": subtracting(own),
             "W_dec": own.W_dec[:, 0], "b_dec": own.b_dec[0]}  # fmt: skip
    found = {key: value.detach().clone().contiguous() for key, value in found.items()}
    save_file(found, folder / "sae.safetensors")
    write_json(folder / "cfg.json", {"k": own.config.k, "activation": "topk", "d_in": D})


def crosscode_tensors(own, *, folded):
    """Folded: the weights read raw activations; the offset has to be in the biases."""
    normaliser = own.normaliser
    scale = normaliser.scale[:, None]
    shift = torch.einsum("md,mdf->f", normaliser.mean * scale, own.W_enc)
    found = {
        "_W_enc_XiDiL": (own.W_enc * scale[..., None])[:, None], "b_enc_L": own.b_enc - shift,
        "_W_dec_LXoDo": (own.W_dec / scale)[:, :, None],
        "_b_dec_XoDo": (own.b_dec / scale + normaliser.mean)[:, None],
        "is_folded": torch.tensor(folded), "folded_scaling_factors_in_Xi": torch.ones(2, 1),
    }  # fmt: skip
    if own.config.activation == "jumprelu":
        found["_activation_fn.log_threshold_L"] = own.threshold.log()
    return {key: value.detach().clone() for key, value in found.items()}


CROSSCODE = """
activation_fn: {cfg: {bandwidth: 0.1, size: 40}, classname: AnthropicSTEJumpReLUActivation}
dtype: !!python/object/apply:torch.dtype [float32]
shape: !!python/tuple [2, 1]
n_models: 2
"""


def write_crosscode(folder, own, *, folded=True):
    write_pt(crosscode_tensors(own, folded=folded), folder / "model.pt")
    (folder / "model_cfg.yaml").write_text(CROSSCODE)


def write_jumprelu(folder, own):
    """JumpReluAutoEncoder of dictionary_learning, whose tensors are named as in SAELens."""
    write_pt(plain_tensors(own), folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": {"dict_class": "JumpReluAutoEncoder"}})


def write_matryoshka(folder, own):
    ends = own.config.groups
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    found = plain_tensors(own) | {
        "b_enc": subtracting(own).detach().clone(), "k": torch.tensor(own.config.k),
        "threshold": own.threshold.detach().clone(), "group_sizes": torch.tensor(sizes),
    }  # fmt: skip
    write_pt({"state_dict": found, "step": 7}, folder / "ae.pt")


def write_saelens_gated(folder, own):
    shift = own.b_dec[0] @ own.W_enc[0]
    found = plain_tensors(own) | {
        "r_mag": own.r_mag, "b_gate": own.b_gate + shift,
        "b_mag": own.b_mag + shift * own.r_mag.exp(),
    }  # fmt: skip
    del found["b_enc"]
    found = {key: value.detach().clone().contiguous() for key, value in found.items()}
    save_file(found, folder / "sae_weights.safetensors")
    write_json(
        folder / "cfg.json", SAELENS | {"architecture": "gated", "apply_b_dec_to_input": True}
    )


WRITERS = {
    "crosscoder batch_topk": (write_crosscoder, "batch_topk", 2, {"code_norm": "sum"}),
    "crosscoder batch_topk concat": (write_crosscoder, "batch_topk", 2, {"code_norm": "concat"}),
    "crosscoder relu": (write_crosscoder, "relu", 2, {}),
    "crosscoder hub": (write_crosscoder_hub, "batch_topk", 2, {"code_norm": "sum"}),
    "sae batch_topk": (write_sae, "batch_topk", 1, {"code_norm": "none"}),
    "sae topk": (write_sae, "topk", 1, {"code_norm": "none"}),
    "sae gated": (write_gated, "gated", 1, {"code_norm": "none"}),
    "sae jumprelu": (write_jumprelu, "jumprelu", 1, {"code_norm": "none"}),
    "sae matryoshka": (
        write_matryoshka,
        "batch_topk",
        1,
        {"code_norm": "none", "groups": (10, 25, F)},
    ),
    "saelens gated": (write_saelens_gated, "gated", 1, {"code_norm": "none"}),
    "saelens jumprelu": (write_saelens, "jumprelu", 1, {"code_norm": "none"}),
    "saelens standard": (write_saelens_standard, "relu", 1, {"code_norm": "none"}),
    "gemma scope": (write_gemma, "jumprelu", 1, {"code_norm": "none"}),
    "sparsify": (write_sparsify, "topk", 1, {"code_norm": "none"}),
    "crosscode jumprelu": (write_crosscode, "jumprelu", 2, {"code_norm": "none"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_dictionary_written_in_a_foreign_layout_reconstructs_the_same(tmp_path, name):
    write, activation, n_models, more = WRITERS[name]
    own = made(activation, n_models, **more)
    write(tmp_path, own)
    found = read(tmp_path)
    x, there = rows(), found.encode_dense(rows())
    assert 0 < (there > 0).float().sum(1).mean() < F
    assert torch.equal(there > 0, own.encode_dense(x) > 0)
    largest = own.reconstruct(x).abs().max()
    assert (found.reconstruct(x) - own.reconstruct(x)).abs().max() <= 1e-6 * largest
    assert found.config.activation == activation
    assert found.config.groups == own.config.groups
    assert found.provenance["read"]["digest"]


# -- the formulas of the packages themselves


def spread(mean, std):
    return 1.0 / torch.sqrt(std.square().sum(-1) + 1e-8)


@pytest.mark.parametrize("with_scale", [True, False])
def test_a_batch_topk_crosscoder_by_its_own_formula(tmp_path, with_scale):
    W, b = numbers(2, D, F, seed=1), numbers(F, seed=2)
    V, c = numbers(2, F, D, seed=3), numbers(2, D, seed=4)
    mean, std = numbers(2, D, seed=5), numbers(2, D, seed=6).abs() + 1
    scale = 3.0 * spread(mean, std)
    tensors = {
        "encoder.weight": W, "encoder.bias": b, "decoder.weight": V, "decoder.bias": c,
        "k": torch.tensor(5), "threshold": torch.tensor(0.9),
        "code_normalization_id": torch.tensor(1), "activation_mean": mean, "activation_std": std,
    }  # fmt: skip
    settings = {"trainer": {"target_rms": 3.0}}
    if with_scale:
        tensors["activation_global_scale"], settings = scale, {}
    write_pt({f"_orig_mod.{name}": value for name, value in tensors.items()}, tmp_path / "ae.pt")
    write_json(tmp_path / "config.json", settings)
    x = rows()
    f = relu(torch.einsum("nmd,mdf->nf", (x - mean) * scale[:, None], W) + b)
    f = f * (f * V.norm(dim=2).sum(0) > 0.9)
    expected = (torch.einsum("nf,mfd->nmd", f, V) + c) / scale[:, None] + mean
    found = read(tmp_path)
    assert torch.allclose(found.reconstruct(x), expected, rtol=1e-5, atol=1e-5)
    assert (f > 0).sum() > 50


def test_our_sign_one_is_finetuned_only(tmp_path):
    own = made("batch_topk", 2)
    with torch.no_grad():
        own.W_dec[3, 0], own.W_dec[4, 1] = 0.0, 0.0
    write_crosscoder(tmp_path, own)
    assert read(tmp_path).relative_decoder_norm[[3, 4]].tolist() == [1.0, 0.0]
    swapped = read(tmp_path, order=(1, 0))
    assert swapped.relative_decoder_norm[[3, 4]].tolist() == [0.0, 1.0]
    x = rows()
    assert torch.allclose(
        swapped.reconstruct(x.flip(1)).flip(1), own.reconstruct(x), rtol=1e-5, atol=1e-5
    )


def test_a_saelens_sae_that_subtracts_and_one_that_rescales(tmp_path):
    own = made("topk", 1)
    tensors = plain_tensors(own)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    write_json(tmp_path / "cfg.json", SAELENS | {
        "architecture": "topk", "k": 4, "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": True})  # fmt: skip
    x = rows()
    norms = tensors["W_dec"].norm(dim=1)
    scores = relu((x[:, 1] - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    best, where = scores.topk(4)
    f = torch.zeros_like(scores).scatter(1, where, best) / norms
    expected = f @ tensors["W_dec"] + tensors["b_dec"]
    found = read(tmp_path)
    assert found.config.site == "resid_post.4"
    assert torch.allclose(found.reconstruct(x)[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["base", "finetuned", "difference"])
def test_an_sae_sees_the_side_that_is_named(tmp_path, side):
    write_gemma(tmp_path, made("jumprelu", 1))
    found = read(tmp_path / "params.npz", side=side, site="resid_post.2")
    assert (found.config.inputs, found.config.site) == (side, "resid_post.2")
    x = rows()
    seen = {"base": x[:, 0], "finetuned": x[:, 1], "difference": x[:, 1] - x[:, 0]}[side]
    assert torch.equal(found.view(x)[:, 0], seen)


# -- what must not pass


def broken(tmp_path, own, **changes):
    tensors = crosscoder_tensors(own)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name) if value is None else tensors.update({name: value})
    write_pt(tensors, tmp_path / "ae.pt")
    return tmp_path / "ae.pt"


NAN = torch.full((2, D), float("nan"))


@pytest.mark.parametrize(
    ("changes", "settings", "what"),
    [
        ({"activation_mean": None, "activation_std": None}, {}, "neither activation_mean"),
        ({"activation_mean": NAN}, {"normalize_activations": True}, "is NaN, though"),
        ({"activation_global_scale": None}, {}, "nor target_rms"),
        ({"threshold": torch.tensor(-1.0)}, {}, "no threshold was estimated"),
        ({"code_normalization_id": torch.tensor(5)}, {}, "DECOUPLED"),
        ({"decoder__bias": None}, {}, "decoder.bias"),
        ({"decoder__weight": torch.zeros(2, F, D + 1)}, {}, "W_dec has shape"),
        ({"decoder__weight": torch.zeros(F)}, {}, "do not go together"),
        ({"decoder__bias": torch.zeros(7)}, {}, "do not go together"),
    ],
)
def test_what_would_reconstruct_badly_is_an_error(tmp_path, changes, settings, what):
    path = broken(tmp_path, made("batch_topk", 2), **changes)
    with pytest.raises(FileFormatError, match=what):
        read(path, settings=settings)


def test_what_is_missing_can_be_given(tmp_path):
    own = made("batch_topk", 2)
    path = broken(tmp_path, own, activation_mean=None, threshold=torch.tensor(-1.0))
    found = read(path, normaliser=own.normaliser, threshold=float(own.threshold))
    x = rows()
    assert torch.allclose(found.reconstruct(x), own.reconstruct(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(MismatchError, match="normaliser is of"):
        read(path, normaliser=Normaliser.identity(1, D), threshold=1.0)
    with pytest.raises(MismatchError, match="no order"):
        read(path, normaliser=own.normaliser, threshold=1.0, order=(0, 0))


def test_nan_means_say_that_raw_activations_were_used(tmp_path):
    found = read(broken(tmp_path, made("batch_topk", 2), activation_mean=NAN))
    assert torch.equal(found.normaliser.scale, torch.ones(2))


def test_a_crosscode_file_whose_scaling_is_elsewhere_is_refused(tmp_path):
    write_crosscode(tmp_path, made("jumprelu", 2, code_norm="none"), folded=False)
    with pytest.raises(FileFormatError, match="not folded"):
        read(tmp_path)
    assert read(tmp_path, normaliser=Normaliser.identity(2, D)).config.activation == "jumprelu"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"normalize_activations": "layer_norm"}, "scales each row"),
        ({"normalize_activations": "expected_average_only_in"}, "does not hold"),
        ({"architecture": "transcoder"}, "transcoder"),
    ],
)
def test_saelens_settings_without_a_counterpart_are_refused(tmp_path, settings, what):
    write_saelens(tmp_path, made("jumprelu", 1))
    with pytest.raises(FileFormatError, match=what):
        read(tmp_path, settings=settings)


class Trap:
    """What a hostile pickle does on loading."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.trapped = True",))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    import builtins

    write_pt({"encoder.weight": Trap()}, tmp_path / "ae.pt")
    with pytest.raises(FileFormatError, match="refused"):
        read(tmp_path / "ae.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Trap()], dtype=object))
    with pytest.raises(FileFormatError):
        read(tmp_path / "params.npz")
    assert not hasattr(builtins, "trapped")


@pytest.mark.parametrize("content", [b"", b"no tensors", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("file", ["ae.pt", "params.npz"])
def test_damaged_files_are_typed_errors(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FileFormatError):
        read(tmp_path / file)


def test_an_unknown_layout_says_what_was_seen(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"seen \['weights.h5'\].*sae_weights"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_an_ambiguous_sae_asks_which(tmp_path):
    write_sae(tmp_path, made("batch_topk", 1))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileFormatError, match="AutoEncoderTopK"):
        read(tmp_path)
    assert read(tmp_path, settings={"dict_class": "AutoEncoderTopK"}).config.activation == "topk"
