"""The panel Training without a browser: what it trains is what its code trains."""

import ipywidgets
import pytest
import torch

from modeldiff.dictionaries.training import TrainLog
from modeldiff_widgets import AuditState, Workbench
from modeldiff_widgets.latents import Latents
from modeldiff_widgets.training import KINDS, Training
from tests.planted import planted_pair
from tests.widgets.dictionary_toy import planted_rows


@pytest.fixture(scope="module")
def pair():
    return planted_pair()[0]


def small(panel, **changes):
    settings = {"n_latents": 24, "k": 3, "steps": 40, "batch": 64, "lr": "0.01",
                "site": "resid_post.2"} | changes  # fmt: skip
    for name, value in settings.items():
        getattr(panel, name).value = value


@pytest.fixture
def panel(pair):
    state = AuditState()
    state.use_rows(planted_rows(d_model=pair.d_model))
    with Training(pair, state) as made:
        small(made)
        yield made


def finished(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel


def test_without_rows_it_says_how_to_get_some(pair):
    with Training(pair) as panel:
        assert panel.whole.layout.display == "none"
        assert "There are no activations" in panel.empty.value
        compile(panel.code(), "snippet", "exec")
        panel.state.use_rows(planted_rows(d_model=pair.d_model))
        assert panel.whole.layout.display == ""
        assert panel.about.value.startswith("1,000 rows of both models")


@pytest.mark.parametrize("inputs", [inputs for _, inputs in KINDS])
def test_the_code_trains_what_was_trained(panel, inputs):
    small(panel, inputs=inputs, steps=20)
    panel.go.click()
    finished(panel)
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    again, mine = scope["trained"], panel.trained
    assert len(mine.logs) == 20
    assert [log.loss for log in again.logs] == [log.loss for log in mine.logs]
    for name, tensor in mine.dictionary.state_dict().items():
        assert torch.equal(again.dictionary.state_dict()[name], tensor), name
    assert panel.state.dictionary is mine.dictionary
    assert mine.dictionary.config.inputs == inputs
    assert mine.dictionary.config.site == "resid_post.2"


def test_curves_are_the_log(panel):
    panel.go.click()
    finished(panel)
    data = panel.plot.source.data
    logs = panel.trained.logs
    assert list(data["step"]) == [log.step for log in logs] == list(range(1, 41))
    assert list(data["loss"]) == [log.loss for log in logs]
    assert list(data["fve_base"]) == [log.fve[0] for log in logs]
    assert list(data["fve_finetuned"]) == [log.fve[1] for log in logs]
    assert (panel.plot._goal.visible, panel.plot._goal.location) == (True, 3)
    assert data["fve_finetuned"][-1] > data["fve_finetuned"][0]
    assert panel.status.value.startswith("Trained. Step 40 of 40")
    assert "loss" in panel.snapshot_html()
    assert panel.stop.disabled


def test_a_side_that_is_not_seen_has_no_curve(panel):
    small(panel, inputs="base", steps=5)
    panel.go.click()
    finished(panel)
    data = panel.plot.source.data
    assert all(value != value for value in data["fve_finetuned"])
    assert all(value == value for value in data["fve_base"])


def test_stop_and_keep(panel):
    small(panel, steps=20_000)
    real, seen = panel.plot.add, []

    def add(log: TrainLog):
        real(log)
        seen.append(log.step)
        if len(seen) == 1:
            assert not panel.stop.disabled
            panel.stop.click()

    panel.plot.add = add
    job = panel.run()
    finished(panel)
    assert job.status == "done"
    assert seen == [100]
    assert panel.n_done == 100
    assert panel.state.dictionary is panel.trained.dictionary
    assert panel.status.value.startswith("Stopped after 100 of 20000 steps and kept.")
    assert "stopped after 100 steps" in panel.code()


def test_stopped_before_the_first_line_nothing_is_kept(panel, monkeypatch):
    from modeldiff_widgets import training

    real = training.train

    def late(*things, **options):
        panel.jobs.cancel()
        return real(*things, **options)

    monkeypatch.setattr(training, "train", late)
    job = panel.run()
    assert panel.jobs.wait(30)
    assert job.status == "cancelled"
    assert panel.state.dictionary is None
    assert "nothing was kept" in panel.status.value


def test_a_checkpoint_is_gone_on_from(panel, tmp_path):
    small(panel, folder=str(tmp_path / "run"), steps=10)
    panel.go.click()
    finished(panel)
    first = panel.trained.dictionary.W_dec.clone()
    assert "folder=" in panel.code()
    panel.go.click()
    finished(panel)
    assert torch.equal(panel.trained.dictionary.W_dec, first)
    small(panel, k=2)
    panel.go.click()
    assert panel.jobs.wait(30)
    assert "another run" in panel.root.children[0].error[0]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lr": "fast"}, "is no number"),
        ({"lr": "-1"}, "not positive"),
        ({"batch": 5000}, "batches of 5000 rows"),
    ],
)
def test_what_cannot_be_is_said(panel, changes, what):
    assert panel.batch.value <= panel.state.rows.n_rows  # as it opens, a step can be made
    small(panel, **changes)
    panel.go.click()
    assert panel.jobs.wait(30)
    assert what in panel.root.children[0].error[0]
    assert "…" not in panel.status.value  # not what it was about to do
    assert panel.state.dictionary is None


def test_what_is_trained_is_read_by_latents(pair):
    rows = planted_rows(d_model=pair.d_model)
    with Workbench(pair, panels=[Latents, Training], store=rows) as bench:
        training, latents = bench.panels["Training"], bench.panels["Latents"]
        small(training)
        training.go.click()
        assert bench.jobs.wait(60)
        assert latents.whole.layout.display == ""
        latents.go.click()
        assert bench.jobs.wait(60)
        assert list(bench.bar.error) == ["", ""]
        assert latents.found.n_rows == 1000
        assert len(latents.list.ids) == 24


def test_everything_is_closed(pair):
    before = set(ipywidgets.widgets.widget._instances)
    with Training(pair) as panel:
        assert panel.snapshot_html()
    assert set(ipywidgets.widgets.widget._instances) == before
