import math
from threading import Event

import pytest
import torch

from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.scaling import TARGETS, _Sums, latent_scaling
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import Cancelled, MismatchError

D, F, N, DEAD = 12, 40, 300, 7


def random_dictionary(make=crosscoder, **options):
    """Random weights, decoders that differ between models, a normaliser, one dead latent."""
    made = make(D, F, k=6, **options)
    with torch.no_grad():
        for each in (made.W_enc, made.W_dec, made.b_dec):
            each.copy_(torch.randn(each.shape) * 0.3)
        made.b_enc.fill_(-0.5)
        made.b_enc[DEAD] = -1e6
    made.set_normaliser(Normaliser(torch.randn(made.mean.shape), torch.rand(made.scale.shape) + 1))
    return made


def naive(x, f, W, b, direction, bias=True):
    """The definition, latent by latent and target by target: ``[target, latent, model]``."""
    found = torch.full((3, f.shape[1], x.shape[1]), torch.nan, dtype=x.dtype)
    whole = torch.einsum("nf,fmd->nmd", f, W) + b
    for j in range(f.shape[1]):
        d = W[j, direction]
        for m in range(x.shape[1]):
            error = x[:, m] - (whole[:, m] - f[:, j, None] * W[j, m])
            taken = 0.0 if bias else b[m]
            for t, y in enumerate((x[:, m] - taken, whole[:, m] - taken, error)):
                size = (f[:, j] ** 2).sum() * (d @ d)
                if size > 0:
                    found[t, j, m] = (f[:, j] @ (y @ d)) / size
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("direction", [0, 1])
def test_one_pass_equals_the_definition(direction, bias):
    made, x = random_dictionary(), torch.randn(N, 2, D)
    # a budget of two rows, so that gathering in parts is what is tested
    found = latent_scaling(made, TensorRows(x), batch_size=64, budget=4096, bias=bias)
    f, seen = made.encode_dense(x), made.normalised(x)
    want = naive(seen, f, made.W_dec.detach(), made.b_dec.detach(), direction, bias)
    for t, target in enumerate(TARGETS):
        got = found.beta(target)[:, direction]
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want[t], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert found.n_active.tolist() == (f > 0).sum(0).tolist()
    assert found.n_never == 1
    assert found.beta_error[DEAD].isnan().all()
    assert math.isnan(found.peak[DEAD])
    torch.testing.assert_close(found.peak[:DEAD].float(), f.amax(0)[:DEAD])


def test_the_sums_are_exact_in_float64():
    made = random_dictionary().double()
    x, f = torch.randn(N, 2, D).double(), torch.randn(N, F).double().relu()
    f[:, DEAD] = 0
    f[5] = 0  # a row without latents
    sums = _Sums(made, 1 << 20, 0)
    for part in (slice(0, 100), slice(100, N)):
        sums.add(Codes.of(f[part]), x[part])
    found = sums.scaling(True)
    for direction in (0, 1):
        want = naive(x, f, made.W_dec.detach(), made.b_dec.detach(), direction)
        for t, target in enumerate(TARGETS):
            got = found.beta(target)[:, direction]
            torch.testing.assert_close(got, want[t], rtol=1e-10, atol=1e-10, equal_nan=True)


def planted(share, noise=0.02, n=4000):
    """A perfect dictionary of latents that the base has at ``share`` of their strength."""
    rng = torch.Generator().manual_seed(1)
    d_model, n_latents = 32, len(share)
    d = torch.linalg.qr(torch.randn(d_model, d_model, generator=rng))[0][:n_latents]
    f = torch.rand(n, n_latents, generator=rng) * (torch.rand(n, n_latents, generator=rng) < 0.1)
    share = torch.tensor(share)
    x = torch.stack([(f * share) @ d, f @ d], 1)
    x = x + noise * torch.randn(x.shape, generator=rng)
    made = crosscoder(d_model, n_latents, k=3, activation="relu")
    with torch.no_grad():
        made.W_enc.zero_()[1] = d.T
        made.b_enc.fill_(-0.1)
        made.W_dec.zero_()[:, 1] = d  # as if the base had none of it, whatever it has
    return made, TensorRows(x)


def test_nu_recovers_what_the_base_has_though_its_decoders_are_zero():
    share = [0.0, 0.3, 1.0, 0.0, 0.6]
    found = latent_scaling(*planted(share))
    torch.testing.assert_close(
        found.nu("error"), torch.tensor(share).double(), rtol=0.03, atol=0.01
    )
    assert found.nu("reconstruction").abs().max() < 0.01  # no other latent writes it


def test_roles_can_be_exchanged():
    """Swapping the models of rows and dictionary swaps the two directions, and nothing else."""
    made, source = planted([0.0, 0.3, 1.0])
    turned = crosscoder(32, 3, k=3, activation="relu")
    with torch.no_grad():
        turned.W_enc.copy_(made.W_enc.flip(0))
        turned.W_dec.copy_(made.W_dec.flip(1))
        turned.b_enc.copy_(made.b_enc)
    one = latent_scaling(made, source).nu("error")
    other = latent_scaling(turned, TensorRows(source.acts.flip(1)))
    torch.testing.assert_close(one, other.nu("error", direction=0, other=1))
    assert other.beta_error[:, 1].isnan().all()  # the fine-tune's decoders are zero: no direction


@pytest.mark.parametrize("side", ["base", "finetuned", "difference"])
def test_a_dictionary_on_one_model_compares_the_activations_of_both(side):
    made, x = random_dictionary(sae, side=side), torch.randn(N, 2, D) + 3
    found = latent_scaling(made, TensorRows(x), batch_size=128)
    f, d = made.encode_dense(x).double(), made.W_dec.detach()[:, 0].double()
    centred = ((x - x.mean(0)) * made.scale).double()
    size = (f**2).sum(0) * (d**2).sum(1)
    for m in (0, 1):
        want = ((f.T @ centred[:, m]) * d).sum(1) / size
        got = found.beta_activation[:, 0, m]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    seen = made.normalised(x)
    want = naive(seen, f.float(), made.W_dec.detach(), made.b_dec.detach(), 0)
    torch.testing.assert_close(
        found.beta_error[:, 0].float(), want[2], rtol=1e-5, atol=1e-5, equal_nan=True
    )
    with pytest.raises(MismatchError, match="one-model"):
        found.nu("error")
    assert {"nu_activation", "beta_error_own"} < set(found.table().columns)


def test_three_models_each_with_its_direction():
    made, x = random_dictionary(n_models=3), torch.randn(N, 3, D)
    found = latent_scaling(made, TensorRows(x))
    seen, f = made.normalised(x), made.encode_dense(x)
    want = naive(seen, f, made.W_dec.detach(), made.b_dec.detach(), 2)[2]
    ratio = found.nu("error", direction=2, other=0).float()
    torch.testing.assert_close(ratio, want[:, 0] / want[:, 2], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_cancelling_keeps_the_rows_so_far():
    made, x, cancel = random_dictionary(), torch.randn(N, 2, D), Event()

    def report(done, total, message):
        if done >= 128:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        latent_scaling(made, TensorRows(x), batch_size=64, progress=report, cancel=cancel)
    whole = latent_scaling(made, TensorRows(x[:128]))
    assert caught.value.partial.n_rows == 128
    torch.testing.assert_close(
        caught.value.partial.beta_error, whole.beta_error, equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_no_rows_is_an_error():
    with pytest.raises(MismatchError, match="has none"):
        latent_scaling(random_dictionary(), TensorRows(torch.zeros(0, 2, D)))


def test_the_table_names_what_it_holds():
    table = latent_scaling(random_dictionary(), TensorRows(torch.randn(N, 2, D))).table()
    assert table["latent"].tolist() == list(range(F))
    assert table["nu_error"].isna().sum() == 1
    ratio = table["beta_error_base"] / table["beta_error_finetuned"]
    assert (ratio - table["nu_error"]).abs().max() < 1e-12
