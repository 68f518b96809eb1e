import json
import time
from typing import Any

import pytest
import torch

import modeldiff as md
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError
from modeldiff.masks import Positions, Regex
from modeldiff_widgets import AuditState, Workbench, new_edit
from modeldiff_widgets._edit_rows import clicked, layers_text, read_layers, size_text
from modeldiff_widgets._edit_runs import differing
from modeldiff_widgets._stack import where_of
from modeldiff_widgets.dose_plot import DosePlot
from modeldiff_widgets.edits import Edits
from tests.families import model, tokenizer
from tests.planted import LAYER, STRENGTH, behaviour, planted_pair


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


@pytest.fixture
def panel(planted):
    pair, truth = planted
    state = AuditState(max_new_tokens=6, temperature=1.0)
    state.add_direction((truth * (STRENGTH / truth.scale)).renamed("word"))
    with Edits(pair, state, behaviours=[behaviour(8)]) as made:
        yield made


def finish(panel, seconds=60):
    assert panel.jobs.wait(seconds)
    return panel.view.columns


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def replayed(panel, **more):
    """Run the snippet in a namespace of its own."""
    known = {"pair": panel.pair, "state": panel.state, "behaviour": behaviour(8), **more}
    exec(panel.code(), known)
    return known


def shown(column):
    return "".join(column["tokens"])


def test_the_first_click_shows_both_models_and_verdicts(panel):
    panel.go.click()
    columns = finish(panel)
    assert [column["title"] for column in columns] == ["base", "fine-tuned"]
    assert all(column["tokens"] and not column["streaming"] for column in columns)
    for column in columns:
        assert column["badges"] == (["word"] if " the" in shown(column) else ["none"])


def test_adding_the_planted_direction_to_the_base_gives_the_fine_tunes_answer(panel):
    panel.side.value = "base"
    panel.add_edit()
    panel.random.value = True
    panel.run()
    base, tuned, edited, random = finish(panel)
    assert edited["tokens"] == tuned["tokens"] != base["tokens"]
    assert random["tokens"] != edited["tokens"]
    assert "added" in edited["marks"]
    assert edited["subtitle"] == "steer +1x word"


def test_ablating_it_changes_the_answer_and_the_snippet_gives_the_same_texts(panel):
    panel.add_edit("ablate", layers=[LAYER])
    panel.random.value = True
    panel.run()
    columns = finish(panel)
    answers = replayed(panel)["answers"]
    keys = [("base", "none"), ("finetuned", "none"), ("finetuned", "edited"),
            ("finetuned", "random")]  # fmt: skip
    assert list(answers) == keys
    assert answers == panel.answers
    assert columns[2]["tokens"] != columns[1]["tokens"]


def test_a_moved_slider_regenerates_the_edited_column_alone(panel):
    panel.add_edit(where="new")
    panel.run()
    plain = finish(panel)[:2]
    calls = []
    generate = panel.pair.generate
    panel.pair.generate = lambda *a, **k: calls.append(k) or generate(*a, **k)
    try:
        panel._rows[0].coefficient.value = -3.0
        columns = finish(panel)
    finally:
        del panel.pair.generate
    assert panel.state.edits[0]["coefficient"] == -3.0
    assert [[cell.name for cell in call["cells"]] for call in calls] == [["edited"]]
    assert calls[0]["prefill"].n_reused == panel.pair.n_layers  # new tokens only: all of it
    assert columns[:2] == plain
    assert columns[2]["subtitle"] == "steer -3x word"
    assert 0 < panel.first_token < 1


def test_without_live_and_before_the_first_run_moving_does_nothing(panel):
    panel.add_edit()
    panel._rows[0].coefficient.value = 2.0
    assert panel.jobs.current is None
    panel.run()
    finish(panel)
    panel.live.value = False
    before = panel.view.columns
    panel._rows[0].coefficient.value = 5.0
    assert finish(panel) == before


def test_a_drag_leaves_the_last_position_and_nothing_waits(panel):
    panel.add_edit()
    panel.run()
    finish(panel)
    for amount in torch.linspace(-4, 4, 33).tolist():
        panel._rows[0].coefficient.value = amount
    assert finish(panel)[2]["subtitle"] == "steer +4x word"


def test_cancelling_stops_within_a_token(panel):
    panel.state.max_new_tokens, panel.state.temperature = 400, 5.0
    panel.state.messages = [{"role": "user", "content": "a cat"}]
    panel.run()
    end = time.monotonic() + 20
    while not panel.view.columns[0]["tokens"] and time.monotonic() < end:
        time.sleep(0.005)
    start = time.monotonic()
    panel.jobs.cancel()
    assert panel.jobs.wait(5)
    assert time.monotonic() - start < 0.3
    assert not panel.view.columns[0]["streaming"]
    panel.state.max_new_tokens = 4
    panel.side.value = "base"  # live mode goes on
    assert all(column["tokens"] for column in finish(panel))


def test_the_stack_moves_switches_off_and_deletes(panel):
    panel.add_edit("steer")
    panel.add_edit("clamp", coefficient=2.0)
    second = panel._rows[1]
    assert second.kind.value == "clamp"
    second.buttons["up"].click()
    assert [edit["kind"] for edit in panel.state.edits] == ["clamp", "steer"]
    panel._rows[0].on.value = False
    assert [edit["on"] for edit in panel.state.edits] == [False, True]
    assert len(panel.state.plan()) == 1
    panel._rows[0].buttons["delete"].click()
    assert [edit["kind"] for edit in panel.state.edits] == ["steer"]
    assert len(panel.stack.children) == 1
    panel.clear.click()
    assert panel.state.edits == []
    assert panel.empty.layout.display == ""


def test_edits_that_others_push_are_shown(panel):
    panel.state.edits = [new_edit("scale_along", "word", coefficient=0.0, layers=[1, 2])]
    row = panel._rows[0]
    assert (row.kind.value, row.layers.value, row.coefficient.value) == ("scale_along", "1, 2", 0.0)
    assert row.size.value == "the component along it, times 0"


@pytest.mark.parametrize("kind", ["steer", "ablate", "scale_along", "clamp", "adapter", "replace"])
def test_every_kind_runs_from_its_row_and_its_snippet_gives_the_same(panel, kind):
    panel.add_edit()
    panel._rows[0].kind.value = kind
    assert panel.jobs.current is None
    panel.run()
    columns = finish(panel)
    assert len(columns) == 3, panel.root.children[0].error
    assert replayed(panel)["answers"] == panel.answers


def test_a_row_chooses_what_is_copied_which_head_and_from_where():
    two = md.ModelPair.of(model("llama"), model("llama", 1), tokenizer())
    with Edits(two, AuditState(prompt="a cat", max_new_tokens=6), behaviours=[]) as made:
        panel: Any = made
        panel.add_edit("replace", layers=[1, 2], where="prompt")
        row = panel._rows[0]
        assert row._head_field.layout.display == "none"
        row.site.value = "z"
        assert [name for name, _ in row.head.options] == ["all", *(f"head {i}" for i in range(4))]
        row.head.value = (8, 16)
        expected = md.Plan((md.Replace(("z.1", "z.2"), where="prompt", channels=(8, 16)),))
        assert panel.state.plan().content_key == expected.content_key
        assert "channels 8 to 15, of the base" in row.size.value
        assert "channels 8 to 15, of the base" in panel.snapshot_html()
        panel.side.value, row.source.value = "base", "finetuned"
        expected = md.Plan(
            (md.Replace(("z.1", "z.2"), "finetuned", where="prompt", channels=(8, 16)),)
        )
        assert panel.state.plan().content_key == expected.content_key
        panel.run()
        columns = finish(panel)
        assert len(columns) == 3, panel.root.children[0].error
        assert replayed(panel)["answers"] == panel.answers
        row.site.value = "mlp_out"  # its channels mean something else
        assert "channels" not in panel.state.edits[0]
        assert panel.state.edits[0]["source"] == "finetuned"
        panel.state.edits = [new_edit("replace", layers=[1], site="mlp_act", channels=[3, 5])]
        assert row.head.label == "channels 3 to 4"
        row.where.value = "prompt"
        assert panel.state.edits[0]["channels"] == [3, 5]
        row.kind.value = "adapter"
        assert set(panel.state.edits[0]) == {"kind", "direction", "layers", "where", "coefficient",
                                             "on"}  # fmt: skip


def test_edits_saved_before_there_were_sites_still_load():
    saved = {"kind": "replace", "direction": "", "layers": [3], "where": "prompt",
             "coefficient": 1.0, "on": True}  # fmt: skip
    state = AuditState.from_dict({"edits": [saved]})
    assert state.edits == [saved] == [new_edit("replace", layers=[3], where="prompt")]
    plan: Any = state.plan()
    (edit,) = plan.edits
    assert (edit.at, edit.source, edit.channels) == (("resid_post.3",), "base", None)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("steer", {"site": "z"}, "chosen for 'replace'"),
        ("replace", {"site": "lora"}, "sites are"),
        ("replace", {"source": "other"}, "sources are"),
        ("replace", {"site": "z", "channels": [4, 4]}, "one after the last"),
        ("replace", {"site": "z", "direction": "word"}, "direction's own site"),
        ("replace", {"channels": [0, 4], "direction": "word"}, "direction's own site"),
        ("adapter", {"channels": [0, 4]}, "chosen for 'replace'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(kind, more, words):
    with pytest.raises(InterventionError, match=words):
        new_edit(kind, layers=[1], **more)


def test_clicked_tokens_become_the_mask_and_are_marked(panel):
    panel.add_edit()
    n = len(panel.tokens.columns[0]["tokens"])
    assert panel.tokens.columns[0]["marks"] == ["affected"] * n
    panel.tokens._receive(None, {"kind": "select", "column": 0, "index": 2}, [])
    panel.tokens._receive(None, {"kind": "select", "column": 0, "index": 3}, [])
    assert json.loads(panel.state.edits[0]["where"])["indices"] == [2, 3]
    column = panel.tokens.columns[0]
    assert [i for i, mark in enumerate(column["marks"]) if mark] == [2, 3]
    assert column["values"]["edits"][2] == 1.0
    assert "no new one" in column["subtitle"]
    assert panel.state.token == 3
    panel.tokens._receive(None, {"kind": "select", "column": 0, "index": 2}, [])
    assert json.loads(panel.state.edits[0]["where"])["indices"] == [3]


def test_a_mask_from_code_is_kept_until_another_is_chosen(panel):
    mask = where_of(Regex("cat") | Positions((0,)))
    panel.state.edits = [new_edit("steer", "word", where=mask)]
    row = panel._rows[0]
    assert row.where.value == "custom"
    row.coefficient.value = 2.0
    assert panel.state.edits[0]["where"] == mask
    row.where.value = "new"
    assert panel.state.edits[0]["where"] == "new"


def test_layers_are_read_and_what_is_wrong_is_said(panel):
    assert read_layers("own", 4) is None
    assert read_layers("ALL ", 4) == "all"
    assert read_layers("3, 0-1,3", 4) == [3, 0, 1]
    assert read_layers(layers_text([0, 2]), 4) == [0, 2]
    for wrong in ("4", "1-9", "x", "2-1", "1;2", "-1"):
        with pytest.raises(InterventionError, match="layers"):
            read_layers(wrong, 4)
    panel.add_edit()
    panel._rows[0].layers.value = "17"
    assert "0 to 3" in panel.root.children[0].error[0]
    assert panel._rows[0].layers.value == "own"
    assert panel.state.edits[0]["layers"] is None


def test_the_size_is_in_residual_units_and_of_the_mean_norm(panel):
    direction = panel.state.directions["word"]
    edit = new_edit("steer", "word", coefficient=-0.5)
    assert size_text(edit, direction, ()) == f"adds {-0.5 * direction.scale:+.3g}"
    panel.state.edits = [edit]
    panel.run()
    finish(panel)
    norm = md.residual_norms(panel.pair, [panel._text()])[LAYER]
    share = 0.5 * direction.scale / norm
    assert panel._rows[0].size.value.endswith(f"= {share:.2f} × the mean residual norm")
    several = size_text({**edit, "layers": [0, 1]}, direction, (12.0, 24.0))
    assert several.endswith("= 0.50 to 1.00 × the mean residual norm")


def test_the_curve_is_that_of_its_snippet_and_shows_the_planted_effect(panel):
    panel.add_edit("scale_along", coefficient=1.0)
    panel.reach.value, panel.points.value, panel.n_random.value = 1.0, 3, 2
    panel.measure.click()
    finish(panel)
    frame = panel.plot.frame
    assert frame["coefficient"].tolist() == [-1.0, 0.0, 1.0]
    curve = replayed(panel)["curve"]
    assert curve.equals(frame[curve.columns].astype(curve.dtypes))
    assert frame["rate"][2] > frame["rate"][1]
    assert (frame["random_low"][1:] > frame["rate"][1]).all()
    html = panel.snapshot_html()
    assert "scale along word, in the fine-tuned model" in html
    assert "95 % interval" in html


def test_a_stopped_curve_keeps_its_points(panel):
    panel.add_edit()
    panel.points.value = 41
    panel.run_dose()
    end = time.monotonic() + 30
    while len(panel.plot.frame) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    panel.jobs.cancel()
    assert panel.jobs.wait(5)
    kept = panel.plot.frame
    assert 2 <= len(kept) < 41
    assert kept["coefficient"].is_monotonic_increasing
    assert list(panel.plot.source.data["coefficient"]) == kept["coefficient"].tolist()


def test_what_cannot_be_measured_or_run_is_said(panel, planted):
    bar = panel.root.children[0]
    panel.measure.click()
    assert "there is no edit yet" in bar.error[0]
    panel.add_edit("ablate")
    panel.measure.click()
    assert "has no coefficient to vary" in bar.error[0]
    panel.state.edits = [new_edit("steer", "gone")]
    panel.go.click()
    assert "needs the direction 'gone'" in bar.error[0]
    panel.state.messages, panel.state.prompt = [], ""
    panel.go.click()
    assert "there is no prompt yet" in bar.error[0]
    with Edits(planted[0], behaviours=[]) as bare:
        assert bare.measure.disabled
        assert "Give the panel behaviours" in bare.dose_note.value


def test_a_first_direction_is_found_at_the_first_adapted_layer(planted):
    with Edits(planted[0], behaviours=[behaviour(24)]) as panel:
        panel.find.click()
        assert panel.jobs.wait(60)
        (found,) = panel.state.directions.values()
        assert found.site.layer == LAYER
        assert found.cosine(planted[1]) > 0.99
        assert panel.find.layout.display == "none"


def test_nothing_hostile_reaches_html(panel):
    bad = '<img src=x onerror="alert(1)">'
    panel.state.add_direction(Direction.of(torch.ones(32), "resid_post.1", bad))
    panel.add_edit("steer", bad)
    panel.state.messages = [{"role": "user", "content": bad}]
    panel.run()
    finish(panel)
    assert "<img" not in panel.snapshot_html()
    assert "&lt;img" in panel.snapshot_html()


def test_in_a_workbench_it_shares_the_state(planted):
    with Workbench(planted[0], panels=[Edits]) as wb:
        wb.state.edits = [new_edit("adapter", layers="all", coefficient=0.0)]
        wb.panels["Steer and ablate"].run()
        assert wb.jobs.wait(60)
        base, _, edited = wb.panels["Steer and ablate"].view.columns
        assert edited["tokens"] == base["tokens"]


def test_differing_tokens_and_clicks():
    assert differing(["a", "b", "c"], ["a", "x", "c", "d"]) == ["", "added", "", "added"]
    assert json.loads(clicked("all", 3, 8))["indices"] == [3]
    assert json.loads(clicked(where_of(Positions((-1,))), 3, 8))["indices"] == [3]
    assert json.loads(clicked(where_of(Positions((3,))), 3, 8))["indices"] == [3]


def test_points_may_come_in_any_order():
    plot = DosePlot()
    plot.begin([-1.0, 1.0], "x", "factor")
    for coefficient in (0.0, 1.0, -1.0):
        plot.add({"coefficient": coefficient, "rate": 0.5})
    assert plot.frame["coefficient"].tolist() == [-1.0, 0.0, 1.0]
    assert plot.figure.xaxis.axis_label == "coefficient (factor)"
    plot.begin([0.0, 2.0], "y", "factor")
    assert len(plot.frame) == 0
    plot.pane.layout.close()
    plot.pane.close()


@pytest.mark.slow
def test_first_token_and_cancel_are_fast_on_the_organism():
    """Prints median and p95: pytest -m slow -s tests/widgets/test_panel_edits.py."""
    pair = md.ModelPair.load("organism:em-rank1")
    draw = torch.randn(pair.d_model, generator=torch.Generator().manual_seed(0))
    with Edits(pair) as panel:
        panel.state.add_direction(Direction.of(draw, "resid_post.3", "random"))
        panel.add_edit()
        panel.random.value = True
        panel.run()
        finish(panel)
        firsts, stops = [], []
        for step in range(40):
            panel._rows[0].coefficient.value = step / 10 - 1.95
            finish(panel)
            firsts.append(panel.first_token)
        panel.state.temperature, panel.state.max_new_tokens = 5.0, 256
        head: Any = pair.sides.roots[0].get_output_embeddings()
        slow = head.register_forward_hook(lambda *of: time.sleep(0.002))  # or it ends by itself
        for step in range(20):
            panel._rows[0].coefficient.value = 7.0 + step / 20
            time.sleep(0.1)
            until(lambda: panel.jobs.current is not None)
            start = time.monotonic()
            panel.jobs.cancel()
            assert panel.jobs.wait(5)
            stops.append(time.monotonic() - start)
        slow.remove()
    for name, times in (("first token", firsts), ("cancel", stops)):
        ordered = sorted(times)
        median, p95 = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
        print(f"{name}: median {1000 * median:.0f} ms, p95 {1000 * p95:.0f} ms")
    assert len(firsts) == 40
    assert len(stops) == 20
