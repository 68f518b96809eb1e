import json
from dataclasses import replace
from threading import Event

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeldiff.dictionaries import checkpoints, files
from modeldiff.dictionaries.checkpoints import FILE
from modeldiff.dictionaries.configs import Activation, Normaliser
from modeldiff.dictionaries.metrics import evaluate
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.dictionaries.training import TrainConfig, train
from modeldiff.errors import (
    Cancelled,
    FileFormatError,
    MismatchError,
    StoreError,
    TrainingError,
)

PLAN = TrainConfig(steps=30, batch_size=32, log_every=10, fast="off", dead_after=64,
                   threshold_start=8, k_start=5)  # fmt: skip
KINDS = ["batch_topk", "topk", "relu", "jumprelu", "gated"]


@pytest.fixture
def source():
    return TensorRows(torch.randn(100, 2, 6) + 1)


def fresh(kind: Activation = "batch_topk", **options):
    return crosscoder(6, 24, k=2, activation=kind, **options)


def stop_at(step):
    """An event, and an `on_log` that sets it."""
    event = Event()

    def seen(log):
        if log.step >= step:
            event.set()

    return {"cancel": event, "on_log": seen}


def same(first, second):
    return all(
        torch.equal(each, second.state_dict()[name]) for name, each in first.state_dict().items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(kind, source, tmp_path):
    whole = train(fresh(kind), source, PLAN)
    with pytest.raises(Cancelled) as stopped:
        train(fresh(kind), source, PLAN, folder=tmp_path, **stop_at(10))
    assert stopped.value.partial.logs[-1].step == 10
    assert not same(stopped.value.partial.dictionary, whole.dictionary)
    resumed = train(fresh(kind), source, PLAN, folder=tmp_path)
    assert same(resumed.dictionary, whole.dictionary)
    assert [replace(log, seconds=0) for log in resumed.logs] == [
        replace(log, seconds=0) for log in whole.logs
    ]


def test_the_fused_step_goes_on_to_the_bit_and_is_the_plain_one(source, tmp_path):
    def wide():
        return crosscoder(6, 128, k=2, n_exclusive=(9, 9))

    plan = replace(PLAN, fast="on")
    whole = train(wide(), source, plan)
    with pytest.raises(Cancelled):
        train(wide(), source, plan, folder=tmp_path, **stop_at(10))
    resumed = train(wide(), source, plan, folder=tmp_path)
    assert same(resumed.dictionary, whole.dictionary)
    assert resumed.dictionary.W_enc.is_contiguous()
    plain = train(wide(), source, PLAN)
    for fused, slow in zip(whole.logs, plain.logs, strict=True):
        assert fused.loss == pytest.approx(slow.loss, rel=1e-3)
        assert fused.fve == pytest.approx(slow.fve, abs=1e-3)
        assert (fused.l0, fused.dead) == (slow.l0, slow.dead)
    with pytest.raises(FileFormatError, match="another run"):
        train(wide(), source, PLAN, folder=tmp_path)


def test_going_on_with_the_dictionary_that_was_stopped(source, tmp_path):
    whole = train(fresh(), source, PLAN)
    made = fresh()
    with pytest.raises(Cancelled):
        train(made, source, PLAN, folder=tmp_path, **stop_at(20))
    assert same(train(made, source, PLAN, folder=tmp_path).dictionary, whole.dictionary)
    assert made.provenance["training"]["steps_done"] == 30


def test_a_run_that_died_goes_on_from_its_last_checkpoint(source, tmp_path):
    whole = train(fresh(), source, PLAN)

    def die(log):
        raise KeyboardInterrupt

    kept = replace(PLAN, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), source, kept, folder=tmp_path, on_log=die)
    stored = checkpoints.read_checkpoint(tmp_path)
    assert stored is not None
    assert stored.step == 8
    assert same(train(fresh(), source, kept, folder=tmp_path).dictionary, whole.dictionary)


def test_a_finished_run_is_read_not_trained_again(source, tmp_path):
    first = train(fresh(), source, PLAN, folder=tmp_path)
    again = train(fresh(), source, PLAN, folder=tmp_path, on_log=lambda log: pytest.fail("step"))
    assert same(first.dictionary, again.dictionary)
    assert first.logs == again.logs


@pytest.mark.parametrize(
    "other",
    [
        {"config": replace(PLAN, seed=1)},
        {"config": replace(PLAN, steps=40)},
        {"made": crosscoder(6, 24, k=2, seed=9)},
        {"made": crosscoder(6, 24, k=3)},
        {"rows": TensorRows(torch.zeros(100, 2, 6))},
    ],
    ids=["seed", "steps", "weights", "k", "rows"],
)
def test_the_checkpoint_of_another_run_is_refused(other, source, tmp_path):
    train(fresh(), source, PLAN, folder=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    made = other.get("made", fresh())
    weights = {name: each.clone() for name, each in made.state_dict().items()}
    with pytest.raises(FileFormatError, match="another run"):
        train(made, other.get("rows", source), other.get("config", PLAN), folder=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert all(torch.equal(each, weights[name]) for name, each in made.state_dict().items())


def test_logging_more_often_is_the_same_run(source, tmp_path):
    with pytest.raises(Cancelled):
        train(fresh(), source, PLAN, folder=tmp_path, **stop_at(10))
    train(fresh(), source, replace(PLAN, log_every=1), folder=tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def without_logs(path):
    header = {"format": "modeldiff.dictionaries.checkpoint", "version": "1", "run": "a"}
    save_file(load_file(path), path, header)


@pytest.mark.parametrize("fault", [cut, foreign, without_logs, lambda p: p.write_text("no")])
def test_damaged_checkpoints_are_refused(fault, source, tmp_path):
    train(fresh(), source, PLAN, folder=tmp_path)
    fault(tmp_path / FILE)
    with pytest.raises(FileFormatError, match="checkpoint"):
        train(fresh(), source, PLAN, folder=tmp_path)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_leaves_the_last_checkpoint(source, tmp_path, monkeypatch, kind):
    with pytest.raises(Cancelled):
        train(fresh(), source, PLAN, folder=tmp_path, **stop_at(10))
    before = (tmp_path / FILE).read_bytes()

    def full(*_):
        raise kind("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(StoreError, match=r"MB\) failed: No space .* make room"):
        train(fresh(), source, PLAN, folder=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_order_of_rows_is_the_seeds(source):
    first, again, other = (
        train(fresh(), source, replace(PLAN, seed=seed)).dictionary for seed in (3, 3, 4)
    )
    assert same(first, again)
    assert not same(first, other)


def test_stopping_before_the_first_step_gives_what_there_is(source):
    stop = Event()
    stop.set()
    with pytest.raises(Cancelled) as stopped:
        train(fresh(), source, PLAN, cancel=stop)
    assert stopped.value.partial.logs == ()
    assert stopped.value.partial.dictionary.W_dec.shape == (24, 2, 6)


def test_logs_say_what_happened(source):
    seen, told = [], []
    made = fresh()
    with torch.no_grad():
        made.b_enc[:4] = -100.0  # never fire
    plan = replace(PLAN, aux=0.0)
    found = train(
        made, source, plan, on_log=seen.append, progress=lambda *report: told.append(report)
    )
    assert tuple(seen) == found.logs
    assert [log.step for log in seen] == [10, 20, 30]
    assert [log.lr for log in seen] == [plan.rate(step, 24) for step in (9, 19, 29)]
    assert seen[-1].l0 == 2.0
    assert seen[-1].dead >= 4 / 24
    assert all(log.loss == pytest.approx(log.mse) and len(log.fve) == 2 for log in seen)
    assert seen[0].loss > seen[-1].loss
    assert [report[:2] for report in told] == [(10, 30), (20, 30), (30, 30)]
    json.dumps(found.dictionary.provenance)


def test_the_threshold_is_the_moving_average_of_the_smallest_kept(source):
    plan = replace(PLAN, threshold_start=29)
    made = train(fresh(), source, plan).dictionary
    other = train(fresh(), source, replace(plan, threshold_start=28, threshold_beta=0.9)).dictionary
    first = train(fresh(), source, replace(plan, threshold_start=28, threshold_beta=1.0)).dictionary
    assert (
        float(train(fresh(), source, replace(plan, threshold_start=30)).dictionary.threshold) == 0
    )
    expected = 0.9 * first.threshold + 0.1 * made.threshold
    assert float(other.threshold) == pytest.approx(float(expected), rel=1e-6)
    assert float(first.threshold) != float(made.threshold)


def test_the_threshold_of_a_short_run_is_of_its_end():
    """While weights grow, the smallest kept score does: an old one lets too few latents fire."""
    rows = TensorRows(torch.randn(1000, 2, 12))
    plan = replace(PLAN, steps=150, batch_size=128, lr=1e-2, threshold_start=None, k_start=None)
    found = {
        beta: evaluate(
            train(crosscoder(12, 96, k=4), rows, replace(plan, threshold_beta=beta)).dictionary,
            rows,
        ).l0
        for beta in (None, 0.999)
    }
    assert found[None] == pytest.approx(4, rel=0.05)
    assert abs(found[0.999] - 4) > 4 * abs(found[None] - 4)
    assert replace(plan, steps=10**6).threshold_keeps == 0.999


def test_a_normaliser_is_fitted_where_there_is_none(source):
    fitted = train(fresh(), source, PLAN).dictionary.normaliser
    assert torch.allclose(fitted.mean, Normaliser.fit(source.acts).mean, atol=0.1)
    given = Normaliser(torch.zeros(2, 6), torch.tensor([0.5, 1.5]))
    made = fresh()
    made.set_normaliser(given)
    assert torch.equal(train(made, source, PLAN).dictionary.scale, given.scale)
    bare = train(fresh(), source, replace(PLAN, normaliser_rows=0)).dictionary
    assert bare.normaliser.is_identity


def test_what_the_configuration_fixes_stays_fixed(source):
    made = train(fresh(n_tied=5, n_exclusive=(3, 4)), source, PLAN).dictionary
    start = fresh(n_tied=5, n_exclusive=(3, 4))
    assert torch.equal(made.W_dec[:5, 0], made.W_dec[:5, 1])
    assert not torch.equal(made.W_dec[:5], start.W_dec[:5])
    assert not torch.equal(made.W_enc[0, :, :5], made.W_enc[1, :, :5])
    assert not made.W_dec[17:20, 1].any()
    assert not made.W_enc[1, :, 17:20].any()
    assert not made.W_dec[20:, 0].any()
    assert not made.W_enc[0, :, 20:].any()


def test_thresholds_of_jumprelu_stay_positive(source):
    plan = replace(PLAN, lr=1.0)
    assert (train(fresh("jumprelu"), source, plan).dictionary.threshold >= 0).all()


def test_a_large_gradient_is_clipped(source):
    """One step of Adam's second moment tells the norm of the gradient it saw."""
    found = {}
    for clip in (1e-3, 1e3):
        made = fresh()
        plan = replace(PLAN, steps=1, clip=clip, betas=(0.0, 0.0), eps=1.0, lr=1.0, warmup=0.0,
                       decay=0.0, normaliser_rows=0)  # fmt: skip
        start = {name: each.clone() for name, each in made.named_parameters()}
        train(made, source, plan)
        moved = [(each - start[name]).detach() for name, each in made.named_parameters()]
        found[clip] = float(torch.stack([each.norm() for each in moved]).norm())
    assert found[1e-3] == pytest.approx(1e-3, rel=1e-2)  # eps 1: Adam's step is the gradient
    assert found[1e3] > 0.05


@pytest.mark.parametrize("side", ["base", "finetuned", "difference"])
def test_sparse_autoencoders_train_on_their_view(side, source):
    made = sae(6, 24, k=2, side=side)
    found = train(made, source, replace(PLAN, steps=60))
    assert len(found.logs[-1].fve) == 1
    assert found.logs[-1].fve[0] > found.logs[0].fve[0]


def test_bfloat16_is_near_float32(source):
    plain, half = (train(fresh(), source, replace(PLAN, bf16=bf16)) for bf16 in (False, True))
    assert half.logs[-1].loss == pytest.approx(plain.logs[-1].loss, rel=0.05)
    assert half.logs[-1].loss != plain.logs[-1].loss
    assert half.dictionary.W_dec.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [*KINDS, "fused"])
def test_rows_that_are_not_finite_stop_the_run(kind, value, tmp_path):
    """At the step that sees them: what was learnt before is kept."""
    acts = torch.randn(100, 2, 6)
    made = crosscoder(6, 240, k=2) if kind == "fused" else fresh(kind)
    made.set_normaliser(Normaliser.fit(acts))
    acts[50, 1, 3] = value
    plan = replace(PLAN, fast="on" if kind == "fused" else "off")
    with pytest.raises(TrainingError, match="finite"):
        train(made, TensorRows(acts), plan, folder=tmp_path)
    assert all(each.isfinite().all() for each in made.state_dict().values())
    assert not list(tmp_path.iterdir())


@pytest.mark.ill_typed
def test_what_does_not_fit_is_refused(source):
    with pytest.raises(MismatchError, match="width 6, a dictionary of width 7"):
        train(crosscoder(7, 24, k=2), source, PLAN)
    with pytest.raises(MismatchError, match="delta is for crosscoders"):
        train(sae(6, 24, k=2), source, replace(PLAN, delta=1.0))
    with pytest.raises(MismatchError, match="k_start=99"):
        train(fresh(), source, replace(PLAN, k_start=99))
    with pytest.raises(MismatchError, match="Tensor is no source of rows"):
        train(fresh(), source.acts, PLAN)
    with pytest.raises(MismatchError, match="no fused step"):
        train(fresh("gated"), source, replace(PLAN, fast="on"))
