"""The panel Patch map without a browser: what it draws is what modeldiff computes."""

import json
import math
from dataclasses import replace
from typing import Any

import ipywidgets
import pandas as pd
import pytest
import torch

from modeldiff.interventions import Replace, ScaleAdapter
from modeldiff.masks import Positions
from modeldiff.models import ModelPair
from modeldiff.patch_runs import Component
from modeldiff.patching import components_of, kl_to, logit_difference, patch_map
from modeldiff.self_repair import ablation_table
from modeldiff_widgets import AuditState, Workbench
from modeldiff_widgets._patch_ask import edit_of
from modeldiff_widgets.patch_map import PatchMap, _summary
from modeldiff_widgets.tokens import Tokens
from tests.families import model, tokenizer
from tests.planted import LAYER, null_pair, planted_pair

TEXT = "the cat sat on the mat and the dog ran"
ALL = ("resid_post", "attn_out", "mlp_out", "mlp_act", "head", "adapter")


def two_models():
    return ModelPair.of(model("llama"), model("llama", 1), tokenizer())


@pytest.fixture(scope="module")
def planted():
    return planted_pair()[0]


@pytest.fixture
def panel(planted):
    with PatchMap(planted, AuditState(prompt=TEXT, max_new_tokens=3)) as made:
        yield made


def draw(panel, *, parts=(), **controls):
    for part in parts and ALL:
        panel.parts[part].value = part in parts
    for name, value in controls.items():
        getattr(panel, name).value = value
    panel.go.click()
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel.found


def executed(panel, name="values"):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope[name]


def row_of(panel, part, layer):
    return next(
        i for i, c in enumerate(panel.found.components) if (c.part, c.layer) == (part, layer)
    )


@pytest.mark.parametrize("metric", ["onset", "logits", "kl"])
@pytest.mark.parametrize("side", ["finetuned", "base"])
def test_the_code_gives_the_numbers_that_are_drawn(panel, metric, side):
    assert "press" in panel.code()
    found = draw(panel, metric=metric, side=side)
    assert torch.equal(executed(panel), panel.values)
    drawn = torch.tensor(list(panel.grid.map.source.data["value"]), dtype=torch.float64)
    assert torch.equal(drawn.reshape(panel.values.shape), panel.values)
    kinds = [c.part for c in found.components]
    assert kinds == sorted(kinds, key=("resid_post", "attn_out", "mlp_out").index)


def test_shares_of_a_way_that_is_hardly_one_are_left_out(panel):
    found = draw(panel, metric="kl")
    row, column = found.strongest(1)[0]
    near = replace(found.patches, target=found.patches.start + abs(found.way) / 1000)
    small = replace(found, patches=near)
    assert found.recovered(row, column) == pytest.approx(1, abs=0.2)
    assert math.isnan(small.recovered(row, column))
    assert "left out" in _summary(small)
    assert "left out" not in _summary(found)


def test_only_the_planted_layer_and_what_is_above_it_carries(panel):
    found = draw(panel, parts=ALL, metric="kl")
    carried = {(c.part, c.layer) for c, row in zip(found.components, panel.values, strict=True)
               if bool((row != 0).any())}  # fmt: skip
    assert ("adapter", LAYER) in carried
    assert ("mlp_out", LAYER) in carried
    assert all(layer >= LAYER for _, layer in carried)
    last = panel.values.shape[1] - 1
    assert found.recovered(row_of(panel, "resid_post", 3), last) == pytest.approx(1, abs=1e-5)
    whole = found.recovered(row_of(panel, "adapter", LAYER), last)
    assert whole == pytest.approx(found.recovered(row_of(panel, "resid_post", LAYER), last),
                                  abs=1e-5)  # fmt: skip
    names = [row[0] for row in panel.table.rows]
    assert set(names) <= {str(each) for each in panel.grid.names}


@pytest.mark.parametrize("side", ["finetuned", "base"])
def test_cells_without_effect_have_no_colour(panel, side):
    draw(panel, metric="logits", side=side)
    mapper = panel.grid.map.mapper
    share = (0 - mapper.low) / (mapper.high - mapper.low)
    bin_of_zero = min(int(share * len(mapper.palette)), len(mapper.palette) - 1)
    assert mapper.palette[bin_of_zero].endswith("00")
    assert not mapper.palette[0 if mapper.low else -1].endswith("00")


def test_the_table_lists_the_strongest_cells_and_a_row_goes_there(panel):
    found = draw(panel, metric="kl")
    sizes = [abs(float(panel.values.flatten()[i])) for i in panel.table.ids]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == float(panel.values.abs().max())
    best = panel.table.ids[1]
    panel.table._receive(panel.table, {"kind": "choose", "id": best}, [])
    row, column = divmod(best, panel.values.shape[1])
    assert (panel.state.layer, panel.state.token) == (found.components[row].layer, column)
    assert panel.table.selected == best


def test_the_metric_is_what_it_says(panel, planted):
    found = draw(panel, metric="logits", tokens=" the| dog", predicted="next",
                 side="base")  # fmt: skip
    the, dog = (planted.tokenizer(word, add_special_tokens=False)["input_ids"][0]
                for word in (" the", " dog"))  # fmt: skip
    assert found.task.ids == (the, dog)
    scores = planted.run([found.task.text], side="base").logits[0, -1]
    assert found.patches.start == pytest.approx(float(scores[the] - scores[dog]), abs=1e-4)
    up, down = draw(panel, metric="logits", tokens="").task.ids
    ft, base = (planted.run([found.task.text], side=side).logits[0, -1].softmax(-1)
                for side in ("finetuned", "base"))  # fmt: skip
    assert float(ft[up] - base[up]) > 0 > float(ft[down] - base[down])


@pytest.mark.parametrize("grad_drop", [False, True])
def test_attribution_shows_its_correlation_with_real_patches(panel, grad_drop):
    found = draw(panel, metric="logits", method=True, grad_drop=grad_drop)
    attribution = found.attribution
    assert torch.equal(executed(panel), panel.values)
    r = f"r = {attribution.r.estimate:.2f}".replace("-", "−")
    assert r in panel.agreement.value
    assert "32 real patches" in panel.agreement.value
    assert "estimated change" in panel.caption
    real = patch_map(panel.pair.sides, found.task.text, found.task.metric(panel.pair.sides),
                     components=found.components)  # fmt: skip
    for cell in attribution.sample.to_dict("records"):
        row = [str(c) for c in found.components].index(cell["component"])
        assert cell["patched"] == pytest.approx(float(real.effect[row, cell["position"]]), abs=1e-4)
    assert panel.agreement.value in panel.snapshot_html()


def test_an_estimate_that_cannot_be_checked_says_so():
    """Where nothing differs there is no correlation, and no silence about it."""
    with PatchMap(null_pair("identical", 0), AuditState(prompt=TEXT, max_new_tokens=3)) as panel:
        draw(panel, metric="onset")
        assert (panel.values == 0).all()
        assert panel.table.note == "No cell differs from 0."
        draw(panel, metric="onset", method=True)
        assert "not checked" in panel.agreement.value


def test_a_click_goes_there_and_patches(planted):
    state = AuditState(prompt=TEXT, max_new_tokens=3)
    with Workbench(planted, panels=[Tokens, PatchMap], state=state) as bench:
        panel, tokens = bench.panels["Patch map"], bench.panels["Tokens"]
        tokens.run()
        panel.parts["adapter"].value = True
        panel.metric.value = "kl"
        panel.run()
        assert bench.jobs.wait(60)
        n = panel.values.shape[1]
        row = row_of(panel, "resid_post", 3)
        panel.grid.map._chosen([row * n + n - 1], panel.choose)
        assert (state.layer, state.token) == (3, n - 1)
        assert tokens.view.selected == [0, n - 1]
        plan: Any = state.plan()
        (edit,) = plan.edits
        assert isinstance(edit, Replace)
        assert (edit.at, edit.source, edit.along) == (("resid_post.3",), "base", None)
        assert edit.where == Positions((n - 1,))
        patched = planted.run([panel.found.task.text], side="finetuned", do=state.plan())
        base = planted.run([panel.found.task.text], side="base").logits[0, -1].log_softmax(-1)
        own = patched.logits[0, -1].log_softmax(-1)
        kl = float((own.exp() * (own - base)).sum())
        change = float(panel.values[row, n - 1])
        assert kl == pytest.approx(panel.found.patches.start + change, abs=1e-5)
        panel.choose(row_of(panel, "adapter", LAYER), 2)  # takes the place of the one before
        plan: Any = state.plan()
        (edit,) = plan.edits
        assert isinstance(edit, ScaleAdapter)
        assert (edit.factor, edit.layers, edit.modules) == (0, (LAYER,), ("mlp.down_proj",))
        patched = planted.run([panel.found.task.text], side="finetuned", do=plan)
        own = patched.logits[0, -1].log_softmax(-1)
        kl = float((own.exp() * (own - base)).sum())
        change = float(panel.values[row_of(panel, "adapter", LAYER), 2])
        assert kl == pytest.approx(panel.found.patches.start + change, abs=1e-5)
        panel.choose(row, 1)
        panel.off.click()
        assert state.edits == []
        assert panel.off.disabled
        panel.patches.value = False
        panel.choose(row, 2)
        assert (state.edits, state.token) == ([], 2)


def test_edits_of_others_stay_on_the_stack(panel):
    from modeldiff_widgets._stack import new_edit

    mine = new_edit("adapter", coefficient=2.0)
    panel.state.edits = [mine]
    draw(panel, parts=("resid_post",), metric="kl")
    panel.choose(3, 1)
    panel.choose(2, 1)
    assert [e["kind"] for e in panel.state.edits] == ["adapter", "replace"]
    panel.off.click()
    assert panel.state.edits == [mine]
    draw(panel, parts=("adapter",), side="base")
    panel.choose(0, 1)
    assert panel.state.edits == [mine]
    assert "patch the fine-tune" in panel.stacked.value


@pytest.mark.parametrize("side", ["finetuned", "base"])
def test_a_cell_of_every_part_is_the_edit_that_goes_on_the_stack(side):
    """Weights of every kind differ here, so that every cell does something."""
    pair = two_models()
    with PatchMap(pair, AuditState(prompt=TEXT, max_new_tokens=3)) as made:
        panel: Any = made
        found: Any = draw(panel, parts=("resid_post", "attn_out", "mlp_out", "mlp_act", "head"),
                     metric="kl", side=side)  # fmt: skip
        last = panel.values.shape[1] - 1
        for row in [r for r, c in enumerate(found.components) if c.layer == 2]:
            panel.choose(row, last)
            assert panel.stacked.value.startswith("On the stack"), panel.stacked.value
            assert ("edit of the base" in panel.stacked.value) == (side == "base")
            other = "base" if side == "finetuned" else "fine-tune"
            assert f"of the {other}" in panel.stacked.value
            scope: dict[str, Any] = {}
            exec(panel.state.code(), scope)
            kept = AuditState.from_dict(json.loads(json.dumps(panel.state.to_dict()))).plan()
            plans = panel.state.plan(), scope["do"], kept
            changes = [kl_of(pair, found.task.text, side, plan) for plan in plans]
            assert changes[0] == changes[1] == changes[2]
            change = changes[0] - kl_of(pair, found.task.text, side, None)
            assert abs(change) > 1e-5
            assert change == pytest.approx(float(panel.values[row, last]), abs=2e-6)


def kl_of(pair, text, side, plan):
    own = pair.run([text], side=side, do=plan).logits[0, -1].log_softmax(-1)
    other = "base" if side == "finetuned" else "finetuned"
    other = pair.run([text], side=other).logits[0, -1].log_softmax(-1)
    return float((own.exp() * (own - other)).sum())


@pytest.mark.parametrize("part", ["query", "key"])
def test_queries_and_keys_are_refused_and_it_is_said_why(panel, part):
    found: Any = draw(panel, parts=("resid_post",), metric="kl")
    why = edit_of(panel.pair.sides, found.task, Component(part, 1, 0), 2)
    assert isinstance(why, str)
    assert "no site" in why


def test_rows_stream_and_a_cancelled_map_shows_what_it_has(panel, monkeypatch):
    seen, real = [], panel._stream

    def stream(found):
        real(found)
        seen.append(sum(not math.isnan(v) for v in panel.grid.map.source.data["value"]))
        if len(seen) == 2:
            panel.jobs.cancel()

    monkeypatch.setattr(panel, "_stream", stream)
    job = panel.run()
    assert panel.jobs.wait(60)
    assert job.status == "cancelled"
    n = panel.values.shape[1]
    assert seen == [n, 2 * n]
    assert torch.isnan(panel.values[2:]).all()
    assert "2 of 12 components" in panel.status.value


@pytest.mark.parametrize("asked", ["logits", "onset"])
def test_self_repair_is_that_of_modeldiff(panel, asked):
    found = draw(panel, metric=asked, parts=("attn_out", "mlp_out"))
    panel.check.click()
    assert panel.jobs.wait(60)
    chosen = [c for c in components_of(panel.pair.sides, ["attn_out", "mlp_out"])
              if str(c) in set(panel.repair.component)]  # fmt: skip
    sides = panel.pair.sides
    texts = [found.task.text, *panel.pair.texts(panel.donors.value.splitlines())]
    metric = (lambda text: kl_to(sides, text, "base")) if asked == "onset" else (
        lambda text: logit_difference(*found.task.ids))  # fmt: skip
    expected = ablation_table(sides, texts, chosen, metric)
    mine = panel.repair.set_index("component").loc[expected.component]
    assert mine.zeroed.to_numpy() == pytest.approx(expected.zeroed.to_numpy(), abs=1e-6)
    pd.testing.assert_frame_equal(executed(panel, "repair"), panel.repair)
    assert "resample" in panel.repaired.value
    assert panel.repaired.value in panel.snapshot_html()


def test_what_is_missing_is_said(panel):
    bar = panel.root.children[0]
    for changes, what in (
        ({"metric": "logits", "tokens": "one two"}, "name two tokens"),
        ({"metric": "kl", "predicted": "selected"}, "choose one after the first"),
    ):
        for name, value in changes.items():
            getattr(panel, name).value = value
        panel.go.click()
        assert panel.jobs.wait(30)
        assert what in bar.error[0]
    panel.check.click()
    assert "draw a map" in bar.error[0]
    for button in panel.parts.values():
        button.value = False
    panel.go.click()
    assert "no components" in bar.error[0]
    panel.parts["resid_post"].value = True
    panel.prompt.answer.value = ""
    panel.metric.value = "onset"
    panel.go.click()
    assert panel.jobs.wait(30)
    assert "onset" in bar.error[0]


def test_hostile_text_is_never_markup(panel):
    from bokeh.models import PlainText

    panel.state.prompt = "$$x^2$$ <b>the</b>"
    draw(panel, metric="kl")
    labels = panel.grid.map.pane.figure.xaxis.major_label_overrides
    assert all(isinstance(each, PlainText) for each in labels.values())
    assert "<b>" not in panel.snapshot_html()


def test_everything_is_closed(planted):
    before = set(ipywidgets.widgets.widget._instances)
    with PatchMap(planted, AuditState(prompt=TEXT)) as panel:
        assert "Nothing was patched" in panel.snapshot_html()
    assert set(ipywidgets.widgets.widget._instances) == before
