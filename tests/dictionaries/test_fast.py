import pytest
import torch

from modeldiff.dictionaries import fast
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.fast import FastStep, available
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.sources import rows_source
from modeldiff.dictionaries.training import PlainStep, train
from modeldiff.errors import MismatchError, TrainingError

D, LATENTS, K, ROWS = 24, 320, 6, 192
KINDS = {
    "sum": lambda: crosscoder(D, LATENTS, k=K),
    "concat": lambda: crosscoder(D, LATENTS, k=K, code_norm="concat"),
    "none": lambda: crosscoder(D, LATENTS, k=K, code_norm="none"),
    "three models": lambda: crosscoder(D, LATENTS, k=K, n_models=3),
    "one model": lambda: sae(D, LATENTS, k=K),
    "blocks": lambda: crosscoder(D, LATENTS, k=K, n_tied=40, n_exclusive=(30, 50)),
}


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def half(request, monkeypatch):
    """What scores are selected from, whatever this machine is fast at."""
    monkeypatch.setattr(fast, "half_pays", lambda device: request.param)
    return request.param


def rows(models, n=ROWS * 8, seed=0):
    """Sparse sums of planted directions, normalised."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(100, models * D, generator=draw)
    fires = torch.rand(n, 100, generator=draw) < 0.05
    x = (fires * torch.rand(n, 100, generator=draw)) @ directions
    x = x + 0.05 * torch.randn(n, models * D, generator=draw)
    return (x / x.std()).unflatten(1, (models, D))


def batches(models, n):
    x = rows(models)
    return [x[(i % 8) * ROWS : (i % 8 + 1) * ROWS] for i in range(n)]


def run(stepper, dictionary, n, *, k_start=K, dead_after=None, start=0):
    """Results of n steps with a falling k and rate, and a count of silent rows."""
    silent, results = torch.zeros(LATENTS, dtype=torch.long), []
    for i, x in enumerate(batches(dictionary.config.n_models, start + n)[start:], start):
        dead = None if dead_after is None else silent >= dead_after
        k = K + (k_start - K) * max(0.0, 1 - i / 20)
        results.append(stepper.step(x, k, 3e-3 * (1 - i / 200), dead))
        silent = torch.where(results[-1].fired, 0, silent + ROWS)
    return results


def curves(make, n, config=None, **options):
    config = config or TrainConfig(steps=n, batch_size=ROWS)
    both = []
    for kind in (PlainStep, FastStep):
        dictionary = make()
        stepper = kind(dictionary, config)
        both.append((dictionary, run(stepper, dictionary, n, **options)))
        stepper.close()
    return both


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_is_that_of_the_plain_step(kind, half):
    (plain, wanted), (ours, got) = curves(KINDS[kind], 40)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-3, atol=0)
        torch.testing.assert_close(b.mse, a.mse, rtol=1e-3, atol=0)
        torch.testing.assert_close(b.lowest, a.lowest, rtol=1e-3, atol=0)
        assert float(b.l0) == float(a.l0) == K
    assert float(got[-1].loss) < 0.8 * float(got[0].loss)
    moved = [a - b for a, b in zip(plain.parameters(), KINDS[kind]().parameters(), strict=True)]
    apart = [a - b for a, b in zip(plain.parameters(), ours.parameters(), strict=True)]
    for far, near in zip(moved, apart, strict=True):
        assert near.detach().norm() < 0.05 * far.detach().norm()


@pytest.mark.parametrize("k_aux", [None, 5])
def test_dead_latents_are_revived_as_in_the_plain_step(k_aux, half):
    """By all of them, and by the five on a row that would fire most."""
    config = TrainConfig(steps=30, batch_size=ROWS, k_aux=k_aux, aux=0.2)
    (_, wanted), (_, got) = curves(KINDS["sum"], 30, config, dead_after=2 * ROWS)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-3, atol=0)
    (_, without), _ = curves(KINDS["sum"], 30)
    assert abs(float(without[-1].loss) - float(wanted[-1].loss)) > 1e-2 * float(wanted[-1].loss)


def test_the_first_steps_gradients_are_autograds(half):
    """Adam hides the size of a gradient: here the gradients themselves, clipped ones too."""
    x, dead = batches(2, 1)[0], torch.arange(LATENTS) > 300
    for clip in (1e9, 0.01):
        config = TrainConfig(steps=1, batch_size=ROWS, clip=clip, aux=0.5)
        make = KINDS["blocks"]
        plain, ours = make(), make()
        PlainStep(plain, config).step(x, K, 0.0, dead)
        stepper = FastStep(ours, config)
        stepper.step(x, K, 0.0, dead)
        for name, each in plain.named_parameters():
            got = stepper._means[name] / (1 - config.betas[0])
            got = got.permute(1, 2, 0) if name == "W_enc" else got
            assert each.grad is not None
            tolerance = 5e-3 if half else 1e-5  # the auxiliary loss is multiplied in bfloat16
            scale = float(each.grad.abs().max())
            torch.testing.assert_close(got, each.grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("n", [1, 8])
def test_rows_that_are_all_alike_do_not_blow_up(n):
    """Their errors have no variance by which what the dead explain could be divided."""
    x, losses = batches(2, 1)[0][:1].expand(n, 2, D).contiguous(), []
    for kind in (PlainStep, FastStep):
        stepper = kind(KINDS["sum"](), TrainConfig(steps=20, batch_size=n))
        losses.append(
            [stepper.step(x, K, 1e-3, torch.arange(LATENTS) > 20).loss for _ in range(20)]
        )
        stepper.close()
    plain, fast_ones = (torch.stack(each) for each in losses)
    assert plain.max() < 50
    torch.testing.assert_close(fast_ones, plain, rtol=5e-2, atol=0)  # in bfloat16, where that pays


def test_k_may_fall(half):
    (_, wanted), (_, got) = curves(KINDS["sum"], 24, k_start=4 * K)
    assert float(got[0].l0) == 4 * K
    assert [float(b.l0) for b in got] == [float(a.l0) for a in wanted]
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-3, atol=0)


def test_selection_is_exact_however_the_threshold_jumps(half):
    """The rows' size changes a hundredfold from step to step, so that every hint is wrong."""
    config = TrainConfig(steps=9, batch_size=ROWS)
    dictionary = KINDS["sum"]()
    stepper = FastStep(dictionary, config)
    for i, size in enumerate((1.0, 100.0, 1.0, 0.01, 1.0)):
        x = batches(2, i + 1)[i] * size
        scores = dictionary.pre(x).relu() * dictionary.code_weight
        wanted = scores.flatten().topk(K * ROWS).values.min()
        torch.testing.assert_close(stepper.step(x, K, 0.0).lowest, wanted.detach())


def test_more_may_be_asked_for_than_is_positive(half):
    dictionary = KINDS["sum"]()
    dictionary.b_enc.data.fill_(-6.0)
    plain = KINDS["sum"]()
    plain.b_enc.data.fill_(-6.0)
    config, x = TrainConfig(steps=1, batch_size=ROWS), batches(2, 1)[0]
    a = PlainStep(plain, config).step(x, K, 1e-3)
    b = FastStep(dictionary, config).step(x, K, 1e-3)
    assert 0 < float(a.l0) < K
    assert float(a.l0) == float(b.l0)
    torch.testing.assert_close((b.loss, b.lowest), (a.loss, a.lowest))


def test_a_run_that_was_stopped_goes_on_to_the_bit(half):
    config = TrainConfig(steps=12, batch_size=ROWS)
    through, stopped, resumed = (KINDS["blocks"]() for _ in range(3))
    run(FastStep(through, config), through, 12)
    first = FastStep(stopped, config)
    run(first, stopped, 7)
    state = {name: each.clone() for name, each in first.state().items()}
    first.close()
    resumed.load_state_dict(stopped.state_dict())
    second = FastStep(resumed, config)
    second.load(state)
    run(second, resumed, 5, start=7)
    for name, each in through.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[name]), name


def test_the_encoder_has_its_layout_again_when_the_step_is_closed():
    dictionary = KINDS["sum"]()
    before = dictionary.W_enc.detach().clone()
    stepper = FastStep(dictionary, TrainConfig(steps=1))
    assert torch.equal(dictionary.W_enc, before)
    run(stepper, dictionary, 2)
    assert not torch.equal(dictionary.W_enc, before)
    after = dictionary.W_enc.detach().clone()
    stepper.close()
    assert dictionary.W_enc.is_contiguous()
    assert torch.equal(dictionary.W_enc, after)
    with pytest.raises(TrainingError, match="closed"):
        run(stepper, dictionary, 1)


def test_a_state_of_another_dictionary_is_refused():
    stepper = FastStep(KINDS["sum"](), TrainConfig(steps=1))
    with pytest.raises(MismatchError, match="unlike in shape"):
        stepper.load(FastStep(KINDS["one model"](), TrainConfig(steps=1)).state())
    with pytest.raises(MismatchError, match="missing"):
        stepper.load({})


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_rows_that_are_not_finite_change_nothing(value, half):
    dictionary = KINDS["sum"]()
    stepper, x = FastStep(dictionary, TrainConfig(steps=1)), batches(2, 1)[0].clone()
    before = {name: each.clone() for name, each in dictionary.state_dict().items()}
    x[3, 0, 5] = value
    with pytest.raises(TrainingError, match=r"finite"):
        stepper.step(x, K, 1e-3)
    for name, each in dictionary.state_dict().items():
        assert torch.equal(each, before[name])


@pytest.mark.parametrize(
    ("make", "config", "answer"),
    [
        (KINDS["sum"], {}, True),
        (KINDS["one model"], {}, True),
        (KINDS["blocks"], {}, True),
        (lambda: crosscoder(D, 64, k=4), {}, False),
        (lambda: crosscoder(D, LATENTS, k=K, activation="topk"), {}, False),
        (lambda: crosscoder(D, LATENTS, k=K, groups=(32, LATENTS)), {}, False),
        (KINDS["sum"], {"delta": 0.1}, False),
    ],
)
def test_where_it_is_available(make, config, answer):
    assert available(make(), TrainConfig(steps=1, **config)) is answer


def test_what_it_cannot_train_is_refused():
    dictionary = crosscoder(D, LATENTS, k=K, groups=(32, LATENTS))
    with pytest.raises(MismatchError, match=r"groups=\(32, 320\)"):
        FastStep(dictionary, TrainConfig(steps=1))


def test_train_logs_the_same_with_it_and_without():
    source, logs = rows_source(rows(2) * 3 + 1), []
    for choice in ("off", "on"):
        config = TrainConfig(steps=60, batch_size=ROWS, fast=choice, log_every=10, lr=5e-3)
        logs.append(train(KINDS["sum"](), source, config).logs)
    for a, b in zip(*logs, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-3)
        assert b.fve == pytest.approx(a.fve, abs=1e-3)
        assert (a.step, a.l0) == (b.step, b.l0)
        assert abs(a.dead - b.dead) <= 2 / LATENTS
    assert logs[1][-1].loss < 0.9 * logs[1][0].loss
