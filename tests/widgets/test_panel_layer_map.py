"""The panel Layer map without a browser: what it draws is what modeldiff computes."""

import math

import ipywidgets
import pytest
import torch

from modeldiff.layer_maps import before, patch_effects
from modeldiff_widgets import AuditState, Workbench
from modeldiff_widgets.layer_map import DIFFERENCES, EFFECTS, LayerMap
from modeldiff_widgets.tokens import Tokens
from tests.planted import null_pair, planted_pair

TEXT = "the cat sat on the mat and the dog ran"


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


@pytest.fixture
def panel(planted):
    pair, truth = planted
    state = AuditState(prompt=TEXT, max_new_tokens=3)
    state.add_direction(truth.renamed("truth"))
    with LayerMap(pair, state) as made:
        yield made


def finished(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel


def draw(panel, what, **controls):
    panel.what.value = what
    for name, value in controls.items():
        getattr(panel, name).value = value
    panel.run()
    return finished(panel)


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope["values"]


@pytest.mark.parametrize("what", [*DIFFERENCES, *EFFECTS])
def test_the_code_gives_the_numbers_that_are_drawn(panel, what):
    assert panel.shown_code()
    draw(panel, what, coefficients="1, 0, -0.5")
    assert torch.equal(executed(panel), panel.values)
    drawn = torch.tensor(list(panel.map.source.data["value"]), dtype=torch.float64)
    assert torch.equal(drawn.reshape(panel.values.shape), panel.values)
    if what in EFFECTS:
        panel.measure.value = "logprob"
        assert torch.equal(executed(panel), panel.values)


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("predicted", ["next", "widest", "selected"])
def test_what_is_measured_can_be_chosen(panel, side, predicted):
    panel.state.token = 4
    draw(panel, "patch", side=side, predicted=predicted)
    found = panel.found
    wanted = {"next": found.text.n_tokens, "selected": 4}.get(predicted, found.predicted)
    assert found.predicted == wanted
    expected = patch_effects(panel.pair.sides, before(found.text, wanted), side=side)
    assert torch.equal(panel.values, expected.kl)
    assert f"token {wanted}," in panel.status.value


def test_the_widest_place_is_where_the_answer_differs_most(panel):
    draw(panel, "patch", predicted="widest")
    table = panel.pair.output_diff([panel.found.text]).tokens
    answered = table[table["position"] >= panel.found.text.n_prompt]
    best = answered.loc[answered["kl_ft_base"].idxmax(), "position"]
    assert panel.found.predicted == best


def test_a_click_on_a_cell_goes_there_everywhere(planted):
    pair, _ = planted
    state = AuditState(prompt=TEXT, max_new_tokens=3)
    with Workbench(pair, panels=[Tokens, LayerMap], state=state) as bench:
        maps, tokens = bench.panels["Layer map"], bench.panels["Tokens"]
        tokens.run()
        maps.run()
        assert bench.jobs.wait(60)
        assert maps.found.text == tokens.shown.text  # read once, for both
        n = maps.values.shape[1]
        maps.map._chosen([2 * n + 5], maps._clicked)
        assert (state.layer, state.token) == (2, 5)
        assert tokens.view.selected == [0, 5]
        assert (maps.layer.value, maps.token.value) == (2, 5)
        assert maps.map.mark.data == {"x": [5], "y": [2]}
        tokens.prompt.answer.value = ""
        assert maps.prompt.answer.value == ""


def test_a_click_on_a_coefficient_sets_the_layer_alone(panel):
    panel.state.token = 1
    draw(panel, "steer", coefficients="-1, 0, 1")
    panel.map._chosen([3 * 3 + 2], panel._clicked)
    assert (panel.state.layer, panel.state.token) == (3, 1)
    assert "coefficient" in panel.readout.value
    assert panel.map.columns == ("-1", "0", "+1")


def test_maps_of_one_run_are_switched_without_another(panel):
    draw(panel, "relative_norm")
    panel.what.value = "projection_ft"
    assert panel.values is panel.found.maps["projection_ft"]
    assert "projection" in panel.map.bar.title
    panel.what.value = "patch"
    assert "Draw map" in panel.status.value


def test_an_identical_pair_is_exactly_the_null_everywhere():
    with LayerMap(null_pair("identical", 0), AuditState(prompt=TEXT)) as panel:
        for what, null in (("relative_norm", 0.0), ("cosine", 1.0), ("patch", 0.0)):
            draw(panel, what)
            assert panel.values is not None
            assert (panel.values == null).all()
            cells = panel.values.numel()
            assert f"{cells} of {cells} cells" in panel.status.value


def test_rows_stream_and_a_cancelled_map_shows_what_it_has(panel, monkeypatch):
    seen = []
    real = panel._stream

    def stream(found, *, first):
        real(found, first=first)
        seen.append(sum(not math.isnan(v) for v in panel.map.source.data["value"]))
        if len(seen) == 2:
            panel.jobs.cancel()

    monkeypatch.setattr(panel, "_stream", stream)
    panel.what.value = "patch"
    job = panel.run()
    assert panel.jobs.wait(60)
    assert job.status == "cancelled"
    n = panel.values.shape[1]
    assert seen == [n, 2 * n]
    assert torch.isnan(panel.values[2:]).all()
    assert "2 of 4 layers" in panel.status.value


def test_what_is_missing_is_said(panel):
    bar = panel.root.children[0]
    panel.what.value = "patch"
    panel.predicted.value = "selected"
    panel.go.click()
    assert panel.jobs.wait(30)
    assert "choose one after the first" in bar.error[0]
    panel.state.directions = {}
    panel.what.value = "steer"
    panel.go.click()
    assert "needs a direction" in bar.error[0]
    panel.coefficients.value = "1, two"
    panel.what.value = "patch"
    panel.go.click()
    assert "numbers with commas" in bar.error[0]


def test_labels_are_never_mathematics(panel):
    from bokeh.models import PlainText

    panel.state.prompt = "$$x^2$$ <b>the</b>"
    draw(panel, "relative_norm")
    labels = panel.map.pane.figure.xaxis.major_label_overrides
    assert all(isinstance(each, PlainText) for each in labels.values())
    assert "<b>" not in panel.snapshot_html()


def test_everything_is_closed(planted):
    before = set(ipywidgets.widgets.widget._instances)
    with LayerMap(planted[0], AuditState(prompt=TEXT)) as panel:
        draw(panel, "relative_norm")
        assert "Layer map" in panel.snapshot_html()
    assert set(ipywidgets.widgets.widget._instances) == before
