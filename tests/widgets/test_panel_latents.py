"""The panel Latents without a browser: what it shows is what modeldiff measures."""

import json
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch

from modeldiff.dictionaries.models import Dictionary, sae
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.harvesting import harvest
from modeldiff_widgets import AuditState, Workbench
from modeldiff_widgets.latents import Latents
from tests.planted import TEXTS, planted_pair
from tests.widgets.dictionary_toy import (
    BASE,
    DEAD,
    FINETUNED,
    N_LATENTS,
    SHARED,
    planted_dictionary,
    planted_rows,
)

HOSTILE = '<img src=x onerror="alert(1)"> $$x^2$$ \u202e'


@pytest.fixture(scope="module")
def pair():
    return planted_pair()[0]


def state_of(pair, dictionary=True, rows=True):
    state = AuditState()
    if dictionary:
        state.use_dictionary(planted_dictionary(pair.d_model))
    if rows:
        state.use_rows(planted_rows(d_model=pair.d_model))
    return state


@pytest.fixture
def panel(pair):
    with Latents(pair, state_of(pair)) as made:
        assert made.jobs.wait(30)
        yield made


def finished(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel


def measured(panel):
    panel.go.click()
    return finished(panel)


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope


def test_without_a_dictionary_it_says_how_to_get_one(pair):
    with Latents(pair) as panel:
        assert panel.whole.layout.display == "none"
        assert "There is no dictionary yet" in panel.empty.value
        assert "crosscoder(rows.d_model" in panel.code()
        compile(panel.code(), "snippet", "exec")
        panel.path.value = "/nowhere/at/all"
        panel.open.click()
        assert panel.jobs.wait(10)
        assert "there is no file or folder" in panel.root.children[0].error[0]
        panel.state.use_dictionary(planted_dictionary(pair.d_model))
        assert (panel.whole.layout.display, panel.go.disabled) == ("", True)
        assert panel.jobs.wait(10)


def test_weights_alone_give_norms_and_a_place_in_no_plot(panel):
    assert panel.found.table["class"].unique().tolist() == ["not measured"]
    assert panel.list.headings == ["latent", "class", "rel. norm", "label"]
    assert panel.map.source.data["latent"] == []
    assert "have no place in the plot" in panel.list.note


def test_planted_classes_are_found_and_drawn(panel):
    measured(panel)
    kinds = panel.found.table["class"].tolist()
    for latents, kind in ((SHARED, "shared"), (FINETUNED, "finetuned-only"),
                          (BASE, "base-only"), (DEAD, "dead")):  # fmt: skip
        assert {kinds[latent] for latent in latents} == {kind}
    drawn = panel.map.source.data
    assert drawn["latent"] == [j for j in panel.list.ids if j not in DEAD]
    at = dict(zip(drawn["latent"], zip(drawn["x"], drawn["y"], strict=True), strict=True))
    rate = panel.found.table["firing_rate"]
    assert at[6] == (1.0, pytest.approx(np.log10(rate[6])))
    assert at[9][0] == 0.0
    panel.up.value = "nu_error"
    assert panel.map.source.data["y"][drawn["latent"].index(0)] == pytest.approx(1.0, abs=0.1)
    assert "ν error" in panel.map.pane.label


def test_the_code_gives_the_numbers_that_are_shown(panel):
    panel.state.latent = 6
    measured(panel)
    found = executed(panel)
    for column in ("relative_decoder_norm", "nu_error", "firing_rate", "max_activation"):
        np.testing.assert_array_equal(found["table"][column], panel.found.table[column])
    assert found["table"]["class"].tolist() == panel.found.table["class"].tolist()
    shown = [(e.value, e.document, e.tokens) for e in panel.card.examples]
    texts = [(e.value, e.document, e.tokens) for e in found["texts"] if e.kind == "max"]
    assert len(shown) == 12
    assert shown == texts
    assert list(found["lenses"]) == ["finetuned"]  # the base has no decoder of it
    lens = found["lenses"]["finetuned"].tokens
    assert lens.equals(panel.lenses["finetuned"].tokens)
    assert found["direction"].content_key == panel.direction().content_key
    assert float(found["direction"].scale) == pytest.approx(
        float(panel.found.table["max_activation"][6])
    )


def test_examples_are_token_heat_of_the_strongest_texts(panel):
    measured(panel)
    panel.state.latent = 3
    finished(panel)
    rows, peak = panel.state.rows, panel.found.table["max_activation"][3]
    best = panel.card.view.columns[0]
    values = best["values"]["latent"]
    assert max(values) == pytest.approx(peak, rel=1e-4)
    at = int(planted_dictionary(panel.pair.d_model).encode_dense(rows.acts)[:, 3].argmax())
    token = panel.pair.tokenizer.convert_ids_to_tokens(int(rows.token_id[at]))
    assert best["tokens"][values.index(max(values))].strip() == token.strip("Ġ ")
    assert best["marks"][values.index(max(values))] == "predicted"
    assert panel.card.view.scale == pytest.approx(peak)
    panel.on_.click()
    assert panel.card.place.value.startswith("4 to 6 of 12")
    panel.examples.value = "sample"
    assert panel.card.place.value.startswith("1 to 3")
    panel.state.latent = 11
    assert panel.card.view.columns[0]["tokens"] == []
    assert panel.card.view.blank == "it fires in no text"
    finished(panel)


def test_filters_sort_and_search(panel):
    measured(panel)
    panel.kind.value = "shared"
    assert sorted(panel.list.ids) == list(SHARED)
    assert sorted(panel.map.source.data["latent"]) == list(SHARED)
    panel.kind.value = "any class"
    panel.rate.value = (0.1, 1.0)
    rate = panel.found.table["firing_rate"]
    assert sorted(panel.list.ids) == [j for j in range(N_LATENTS) if rate[j] >= 0.1]
    panel.rate.value = (0.0, 1.0)
    panel.labels[4] = "Weather talk"
    panel.words.value = "WEATHER"
    assert panel.list.ids == [4]
    panel.words.value = "7"
    assert panel.list.ids == [7]
    panel.words.value = "(.*"
    assert panel.list.ids == []
    panel.words.value = ""
    column = panel.list.headings.index("fires on")
    panel.list._receive(panel.list, {"kind": "sort", "column": column}, [])
    rates = [rate[j] for j in panel.list.ids]
    assert rates == sorted(rates, reverse=True)
    panel.list._receive(panel.list, {"kind": "sort", "column": column}, [])
    assert [rate[j] for j in panel.list.ids] == sorted(rates)


def test_tap_box_and_row_choose(panel):
    measured(panel)
    latents = panel.map.source.data["latent"]
    panel._picked([8])
    assert (panel.state.latent, panel.list.selected, panel.latent.value) == (8, 8, 8)
    assert panel.map.mark.data["x"] == [0.0]
    panel._picked([1, 2, 3])
    assert sorted(panel.list.ids) == [1, 2, 3]
    assert not panel.unbox.disabled
    panel.unbox.click()
    assert len(panel.list.ids) == N_LATENTS
    panel.list._receive(panel.list, {"kind": "choose", "id": latents[0]}, [])
    assert panel.state.latent == latents[0]
    panel.list._receive(panel.list, {"kind": "choose", "id": 10_000}, [])
    panel.list._receive(panel.list, {"kind": "choose", "id": "1"}, [])
    assert panel.state.latent == latents[0]
    finished(panel)


def test_labels_lie_beside_the_dictionary(panel, tmp_path):
    panel.label.value = HOSTILE
    assert panel.list.rows[panel.list.ids.index(0)][-1] == HOSTILE
    panel.path.value = str(tmp_path / "mine")
    panel.write.click()
    kept = json.loads((tmp_path / "mine" / "labels.json").read_text("utf-8"))
    assert kept["labels"] == {"0": HOSTILE}
    panel.state.latent = 5
    assert panel.label.value == ""
    panel.label.value = "rain"
    kept = json.loads((tmp_path / "mine" / "labels.json").read_text("utf-8"))
    assert kept["labels"] == {"0": HOSTILE, "5": "rain"}
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "dictionary.json", "labels.json", "model.safetensors",
    ]  # fmt: skip
    finished(panel)
    with Latents(panel.pair) as other:
        other.path.value = str(tmp_path / "mine")
        other.open.click()
        finished(other)
        assert other.labels == {0: HOSTILE, 5: "rain"}
        assert other.label.value == HOSTILE
        scope = executed(other)
        assert isinstance(scope["dictionary"], Dictionary)
        assert "state." not in other.code()
        assert "<img" not in other.snapshot_html()
        (tmp_path / "mine" / "labels.json").write_text("[1]")
        other.open.click()
        assert other.jobs.wait(10)
        assert "is not a file of labels" in other.root.children[0].error[0]


def test_steer_ablate_and_caft_use_the_shared_library(panel):
    measured(panel)
    panel.state.latent = 7
    panel.steer.click()
    panel.ablate.click()
    panel.caft.click()
    panel.caft.click()
    (name,) = panel.state.directions
    assert name == "latent 7 (finetuned decoder)"
    assert [(e["kind"], e["direction"], e["layers"]) for e in panel.state.edits] == [
        ("steer", name, None), ("ablate", name, "all"),
    ]  # fmt: skip
    assert panel.state.caft == [name]
    used = f"In the stack of edits: steer (1), ablate (2). Marked for CAFT: {name}."
    assert panel.used.value == used
    finished(panel)
    direction = panel.state.directions[name]
    assert torch.allclose(direction.unit, planted_dictionary(panel.pair.d_model).decoder()[7])
    answer = panel.pair.generate([TEXTS[0]], max_new_tokens=2, do=panel.state.grid(), temperature=0)
    assert len(answer.of("finetuned", "edited")) == 1
    panel.side.value = "base"
    panel.steer.click()
    assert "there is no direction in it" in panel.root.children[0].error[0]
    assert len(panel.state.edits) == 2
    panel.state.latent = BASE[0]
    assert panel.side.value == "base"  # the decoder that there is
    panel.jobs.wait(30)


def test_a_cancelled_measurement_keeps_what_it_has(pair, monkeypatch):
    from modeldiff_widgets import _latent_measure

    real = _latent_measure.latent_scaling
    with Latents(pair, state_of(pair)) as panel:

        def stopping(*things, **options):
            def report(done, total, message):
                panel.jobs.cancel()

            return real(*things, **{**options, "progress": report, "batch_size": 100})

        monkeypatch.setattr(_latent_measure, "latent_scaling", stopping)
        job = panel.run()
        assert panel.jobs.wait(30)
        assert job.status == "cancelled"
        found: Any = panel.found
        assert found.n_rows == 100
        assert "Measured on 100 rows" in panel.measured_note.value
        assert "stopped after 100 rows" in panel.code()


@pytest.mark.parametrize("side", ["finetuned", "base", "difference"])
def test_autoencoders_of_one_model_are_read_too(pair, side):
    dictionary = sae(pair.d_model, 24, side=side, k=3, site="resid_post.1")
    with Latents(pair, state_of(pair, dictionary=False)) as panel:
        panel.state.use_dictionary(dictionary)
        measured(panel)
        assert "ν act." in panel.list.headings
        assert "rel. norm" not in panel.list.headings
        shown: Any = panel.found
        found = executed(panel)
        np.testing.assert_array_equal(found["table"]["nu_activation"], shown.table["nu_activation"])
        names = {"finetuned": "fine-tuned", "base": "base", "difference": "difference"}
        assert [name for name, _ in panel.side.options] == [names[side]]
        read = "read by the base" if side == "difference" else f"{names[side]} decoder"
        assert read in panel.card.lens_view.value
        panel.up.value = "max_activation"
        assert len(panel.map.source.data["latent"]) > 0
        panel.steer.click()
        assert panel.state.directions
        finished(panel)


def test_another_dictionary_takes_the_place_of_what_was_measured(panel):
    measured(panel)
    panel.state.latent = 11
    panel.state.use_dictionary(sae(panel.pair.d_model, 4, k=2, site="resid_post.0"))
    finished(panel)
    assert panel.found.rows is None
    assert panel.state.latent == 3
    assert panel.list.ids == [0, 1, 2, 3]
    panel.state.use_dictionary(None)
    assert panel.whole.layout.display == "none"


def test_a_workbench_of_files_and_its_code(pair, tmp_path):
    store = harvest(pair, TEXTS, "resid_post.2", tmp_path / "store", dtype=torch.float32)
    planted_dictionary(pair.d_model).save_to(tmp_path / "dictionary")
    with Workbench(
        pair, panels=[Latents], dictionary=tmp_path / "dictionary", store=store
    ) as bench:
        panel = bench.panels["Latents"]
        panel.go.click()
        assert bench.jobs.wait(60)
        assert list(bench.bar.error) == ["", ""]
        scope = {"pair": pair}
        exec(panel.code(), scope)
        assert scope["rows"].n_rows == len(store)
        np.testing.assert_array_equal(
            scope["table"]["firing_rate"], panel.found.table["firing_rate"]
        )


def test_hostile_tokens_are_text(pair, monkeypatch):
    def decoded(tokenizer, batch, **options):
        return [HOSTILE for _ in batch]

    monkeypatch.setattr(type(pair.tokenizer), "batch_decode", decoded)
    with Latents(pair, state_of(pair)) as panel:
        measured(panel)
        assert set(panel.card.view.columns[0]["tokens"]) == {HOSTILE}
        html = panel.snapshot_html()
        assert "&lt;img" in html
        assert "<img" not in html
        assert "\u202e" not in html


def test_rows_without_tokens_still_measure(pair):
    rows = planted_rows(d_model=pair.d_model)
    with Latents(pair, state_of(pair, rows=False)) as panel:
        panel.state.use_rows(TensorRows(rows.acts))
        measured(panel)
        found: Any = panel.found
        assert found.table["class"].tolist().count("shared") == len(SHARED)


def test_everything_is_closed(pair):
    before = set(ipywidgets.widgets.widget._instances)
    with Latents(pair, state_of(pair)) as panel:
        measured(panel)
        assert "Latents" in panel.snapshot_html()
    assert set(ipywidgets.widgets.widget._instances) == before
