"""The panel LoRA lab without a browser: what it shows is what modeldiff measures."""

from typing import Any

import numpy as np
import pytest

from modeldiff.interventions import Plan, ScaleAdapter
from modeldiff.lora import adapter_modules, adapter_table, write_directions
from modeldiff.lora_effects import leave_one_out
from modeldiff.lora_scalars import lora_scalars
from modeldiff_widgets import AuditState, Workbench, new_edit
from modeldiff_widgets.lora import NO_ADAPTER, LoraLab
from tests.families import build_adapter_pair
from tests.planted import null_pair, planted_pair

TEXT = "the cat sat on the mat and the dog ran to the old house"
HOSTILE = '<img src=x onerror="alert(1)"> $$x$$ \u202e'


@pytest.fixture(scope="module")
def wide():
    """Rank 2 on three modules of two layers."""
    return build_adapter_pair(modules=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def planted():
    return planted_pair(strength=16.0)


def opened(pair, **settings):
    panel: Any = LoraLab(pair, AuditState(prompt=TEXT, max_new_tokens=6, **settings))
    assert panel.jobs.wait(30)
    return panel


@pytest.fixture
def panel(wide):
    with opened(wide) as made:
        yield made


def finished(panel):
    assert panel.jobs.wait(60)
    assert list(panel.root.children[0].error) == ["", ""]


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope


def read(panel, answer=""):
    panel.prompt.answer.value = answer
    panel.go.click()
    finished(panel)
    return panel


def clicked(bars, rows):
    """As a browser says it: only what a view selects is heard."""
    bars.pane._origin = "a view"
    bars.source.selected.indices = rows
    bars.pane._origin = ""


def test_the_table_is_that_of_the_adapter_and_sorts(panel):
    truth = adapter_table(adapter_modules(panel.pair.sides))
    shown = {row[0]: row for row in panel.table.rows}
    assert list(shown) == truth["module"].tolist()
    for _, row in truth.iterrows():
        assert shown[row["module"]][1] == str(row["rank"])
        assert shown[row["module"]][2].startswith(f"{row['top']:.3g}")
        assert float(shown[row["module"]][3]) == pytest.approx(row["relative"], rel=6e-3)
        assert shown[row["module"]][-1] == (row["writes_to"] or "not the stream")
    panel._sort(panel.table.headings.index("rel. norm"))
    by_norm = truth.sort_values("relative", ascending=False)
    assert [row[0] for row in panel.table.rows] == by_norm["module"].tolist()
    assert panel.table.ids == by_norm.index.tolist()
    panel._sort(panel.table.headings.index("rel. norm"))
    assert panel.table.ids == by_norm.index.tolist()[::-1]


def test_spectrum_and_layers_are_drawn_from_the_modules(panel):
    modules = adapter_modules(panel.pair.sides)
    panel.choose(4)
    assert panel.spectrum.source.data["value"] == modules[4].svd.singular.tolist()
    assert panel.table.selected == 4
    layers = dict(zip(panel.layers.source.data["layer"], panel.layers.source.data["relative"],
                      strict=True))  # fmt: skip
    mine = [m for m in modules if m.site.layer == 2]
    want = (sum(m.svd.norm**2 for m in mine) / sum(m.base_norm**2 for m in mine)) ** 0.5
    assert layers[2] == pytest.approx(want)
    clicked(panel.layers, [0])
    assert panel.chosen == 0
    clicked(panel.spectrum, [1])
    assert panel.component.value == 1
    assert panel.spectrum.source.data["alpha"] == [0.45, 1.0]


def test_scalars_are_one_forward_and_the_snippet_gives_the_same(panel):
    panel.choose(2)
    panel.component.value = 1
    read(panel, "finetuned")
    modules = adapter_modules(panel.pair.sides)
    (text,) = panel.scalars.texts
    assert text.n_tokens > len(panel.pair.texts([TEXT])[0].ids)  # answered
    want = lora_scalars(panel.pair.sides, [text], modules).values[modules[2].name][:, 1].tolist()
    assert panel.values() == [None, *want]
    known = executed(panel)
    assert known["values"] == want
    assert known["table"].equals(panel.opened.table)
    assert known["spectrum"].tolist() == panel.spectrum.source.data["value"]
    biases = known["biases"]
    first = biases[biases["component"] == 0].set_index("module")["bias_fraction"]
    shown = {row[0]: float(row[-2]) for row in panel.table.rows}
    assert shown == {name: pytest.approx(value, rel=6e-3) for name, value in first.items()}
    heat = panel.view.columns[0]["values"]["lora"]
    assert heat[1:] == [pytest.approx(v, rel=1e-4) for v in want]


def test_a_constant_push_has_bias_fraction_one(planted):
    with opened(planted[0]) as panel:
        read(panel)
        assert panel.table.rows[0][-2] == "1"
        assert len({round(v, 3) for v in panel.values()[1:]}) == 1


def test_sliders_are_edits_of_the_stack_both_ways(panel):
    sliders = panel.scaling.sliders
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert list(sliders) == ["all", *((layer, name) for layer in (1, 2) for name in names)]
    down, query = (2, "mlp.down_proj"), (1, "self_attn.q_proj")
    panel.state.edits = [new_edit("adapter", layers=[3], coefficient=2.0)]
    sliders[down].value = -0.5
    sliders["all"].value = 0.3
    assert [(e["layers"], e.get("modules"), e["coefficient"]) for e in panel.state.edits] == [
        ([3], None, 2.0), ([2], ["mlp.down_proj"], -0.5), ("all", None, 0.3),
    ]  # fmt: skip
    assert panel.scaling.note.value.startswith("In the stack of edits: 2, 3.")
    sliders[down].value = 0.0
    assert [e["coefficient"] for e in panel.state.edits] == [2.0, 0.0, 0.3]
    panel.state.edits = [new_edit("adapter", layers="all", coefficient=7.0),
                         new_edit("adapter", layers=[1], coefficient=0.5, on=False,
                                  modules=["self_attn.q_proj"])]  # fmt: skip
    assert [sliders[key].value for key in ("all", query, down)] == [7.0, 1.0, 1.0]
    panel.state.edits = [*panel.state.edits, new_edit("adapter", layers=[1, 2])]
    panel.scaling.reset.click()
    assert [e["layers"] for e in panel.state.edits] == [[1, 2]]
    assert sliders["all"].value == 1.0


def test_the_plan_of_the_sliders_scales_the_adapter(panel):
    panel.scaling.sliders[1, "mlp.down_proj"].value = 0.0
    want = Plan((ScaleAdapter(0.0, layers=(1,), modules=("mlp.down_proj",)),)).content_key
    assert panel.state.plan().content_key == want
    assert Plan((executed(panel)["do"],)).content_key == want
    for slider in panel.scaling.sliders.values():
        slider.value = 1.0 if slider is panel.scaling.sliders["all"] else 0.0
    without = panel.pair.run([TEXT], do=panel.state.plan()).logits
    base = panel.pair.run([TEXT], side="base").logits
    np.testing.assert_allclose(without.numpy(), base.numpy(), atol=1e-4)


def test_leave_one_out_is_drawn_beside_its_band_and_the_snippet_gives_it(panel):
    panel.lines.value = "the cat\n\nthe moon and the sun\n"
    panel.by.value, panel.n_random.value = "layer", 4
    panel.leave.click()
    finished(panel)
    found = panel.effects
    assert sorted(found["unit"]) == ["layer 1", "layer 2"]
    for side, source in panel.bars.sources.items():
        assert source.data["value"] == found[side].tolist()
        assert source.data["random_low"] == found[f"{side}_random_low"].tolist()
        assert source.data["random_high"] == found[f"{side}_random_high"].tolist()
    known = executed(panel)
    assert known["effects"].equals(found)
    again = leave_one_out(panel.pair.sides, known["answers"], by="layer", n_random=4)
    assert again.equals(found)
    assert panel.bars.pane.layout.display == ""
    assert f"{found['total'][0]:.3g} nats a token, answers: 2;" in panel.effects_view.value
    panel.lines.value = " \n"
    panel.leave.click()
    assert "there is no prompt" in panel.root.children[0].error[0]


def test_leaving_out_can_be_cancelled(panel):
    job = panel.leave_one_out()
    job.cancel.set()
    assert panel.jobs.wait(30)
    assert job.status == "cancelled"
    assert panel.effects is None


def test_the_write_direction_goes_to_the_library(panel, planted):
    panel.choose(1)
    panel.component.value = 1
    name = panel.add_direction()
    module = adapter_modules(panel.pair.sides)[1]
    want = write_directions(module, models=panel.pair.digests)[1]
    assert panel.state.directions[name].content_key == want.content_key
    assert executed(panel)["write"].content_key == want.content_key
    panel.choose(0)
    assert panel.add.disabled
    assert "does not write to the residual stream" in panel.added.value
    with opened(planted[0]) as other:
        other.add.click()
        (found,) = other.state.directions.values()
        assert abs(found.cosine(planted[1].at(found.site))) > 0.999


def test_without_an_adapter_one_sentence_says_how_to_get_one():
    made: Any = LoraLab(null_pair("identical", 0))
    with made as panel:
        assert "extract_adapter" in NO_ADAPTER
        assert "extract_adapter" in panel.body.children[0].value
        assert panel.shown_code().startswith("# This pair has two whole models")
        assert "extract_adapter" in panel.snapshot_html()


def test_hostile_tokens_are_inert(panel):
    panel.state.prompt = HOSTILE
    read(panel)
    for html in (panel.snapshot_html(), panel.figures.value, panel.effects_view.value):
        assert "<img" not in html
    assert "".join(panel.view.columns[0]["tokens"]).count("<img") == 1


def test_beside_other_panels_it_closes_and_pins(wide):
    with Workbench(wide, panels=[LoraLab]) as wb:
        assert wb.jobs.wait(30)
        assert "1.self_attn.q_proj" in wb.pin()
