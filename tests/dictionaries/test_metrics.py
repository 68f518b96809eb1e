from threading import Event

import pytest
import torch

from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.metrics import evaluate
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import Cancelled, MismatchError


@pytest.fixture
def acts():
    return torch.randn(101, 2, 6) * torch.tensor([1.0, 5.0])[:, None] + 3


@pytest.fixture
def made(acts):
    found = crosscoder(6, 10, k=3)
    found.threshold.fill_(1.0)
    found.set_normaliser(Normaliser.fit(acts))
    return found


def test_figures_are_the_definitions(made, acts):
    found = evaluate(made, TensorRows(acts))
    x, made_of = acts.double(), made.reconstruct(acts).double()
    error = (x - made_of).square().sum((0, 2))
    fve = 1 - error / (x - x.mean(0)).square().sum((0, 2))
    fires = made.encode_dense(acts) > 0
    assert found.fve == pytest.approx(fve.tolist(), abs=1e-9)
    assert found.l0 == pytest.approx(fires.sum(1).double().mean().item())
    assert found.dead == pytest.approx((~fires.any(0)).double().mean().item())
    assert found.fired.tolist() == fires.sum(0).tolist()
    assert found.n_rows == 101


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_the_batch_size_does_not_count(made, acts, batch_size):
    whole, parts = evaluate(made, TensorRows(acts)), evaluate(made, TensorRows(acts), batch_size)
    assert parts.fve == pytest.approx(whole.fve, abs=1e-6)
    assert parts.fired.tolist() == whole.fired.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused(made, acts, value):
    acts[70, 1, 2] = value
    with pytest.raises(MismatchError, match="not finite"):
        evaluate(made, TensorRows(acts))


def test_a_constant_error_is_an_error(made, acts):
    """Unlike the ratio of variances, which does not see a biased reconstruction."""
    before = evaluate(made, TensorRows(acts)).fve[1]
    with torch.no_grad():
        made.b_dec[1] += 3.0
    assert evaluate(made, TensorRows(acts)).fve[1] < before - 5


def test_the_mean_alone_explains_nothing_and_the_rows_everything(acts):
    made = sae(6, 12, activation="relu", k=3)
    made.set_normaliser(Normaliser.fit(made.view(acts)))
    with torch.no_grad():
        made.W_enc.zero_()
        assert evaluate(made, TensorRows(acts)).fve[0] == pytest.approx(0.0, abs=1e-6)
        both = torch.cat((torch.eye(6), -torch.eye(6)))
        made.W_enc[0], made.W_dec[:, 0] = both.T, both
    found = evaluate(made, TensorRows(acts))
    assert found.fve[0] == pytest.approx(1.0, abs=1e-6)
    assert found.l0 == pytest.approx(6.0)


def test_it_stops_and_refuses(made, acts):
    stop = Event()
    stop.set()
    with pytest.raises(Cancelled):
        evaluate(made, TensorRows(acts), cancel=stop)
    with pytest.raises(MismatchError, match="no rows"):
        evaluate(made, TensorRows(acts[:0]))
