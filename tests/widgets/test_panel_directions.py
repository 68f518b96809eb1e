import math

import pytest
import torch

from modeldiff.directions import Direction, cosine_table, load_directions
from modeldiff.errors import DirectionError, FileFormatError
from modeldiff_widgets import AuditState, Workbench, new_edit
from modeldiff_widgets.directions import Directions, safe_path
from modeldiff_widgets.edits import Edits
from tests.families import WIDTH
from tests.planted import LAYER, WORD, behaviour, planted_pair


@pytest.fixture(scope="module")
def planted():
    return planted_pair(strength=16.0)


def some(seed, name, site=f"resid_post.{LAYER}"):
    draw = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, site, name)


@pytest.fixture
def panel(planted):
    pair, truth = planted
    state = AuditState()
    state.add_direction(some(1, "a"))
    state.add_direction(some(2, "b"))
    state.add_direction(truth.renamed("word"))
    with Directions(pair, state, behaviours=[behaviour(24)]) as made:
        assert made.jobs.wait(30)
        yield made


def error_of(panel):
    return panel.root.children[0].error[0]


def test_the_table_names_every_direction_and_marks_the_selected_one(panel):
    html = panel.table.value
    assert html.count("<tr") == 4
    assert html.count("class=selected") == 1
    for name, direction in panel.state.directions.items():
        assert f"<td>{name}</td>" in html
        assert f"{direction.scale:.3g}" in html
    assert panel.selected.value == "word"


def test_the_lens_of_the_planted_word_beats_its_random_control(panel):
    first = panel.lens.of("promoted").iloc[0]
    assert first["token_id"] == panel.pair.tokenizer.convert_tokens_to_ids(WORD)
    assert "reaches further than each of them" in panel.words.value
    assert "random control: promoted" in panel.words.value
    panel.selected.value = "a"
    assert panel.jobs.wait(30)
    assert panel.state.direction == "a"
    assert panel.lens.tokens["name"][0] == "a"


def test_the_map_holds_the_cosines_and_a_click_selects(panel):
    want = cosine_table(panel.state.directions.values()).to_numpy().flatten()
    assert panel.map.source.data["cosine"] == pytest.approx(want)
    panel.map._tapped([1], panel._tapped)
    assert (panel.first.value, panel.second.value) == ("a", "b")
    assert panel.state.direction == "a"


def test_directions_of_other_widths_have_no_cosine(panel):
    panel.state.add_direction(Direction.of(torch.ones(7), "mlp_act.1", "narrow"))
    assert panel.jobs.wait(30)
    assert math.isnan(panel.map.source.data["cosine"][3])
    assert "not in the residual stream" in panel.words.value


@pytest.mark.parametrize(
    ("operation", "want"),
    [
        ("+", lambda a, b: a.vector + b.vector),
        ("-", lambda a, b: a.vector - b.vector),
        ("neg", lambda a, b: -a.vector),
        ("⊥", lambda a, b: a.vector - (a.vector @ b.unit) * b.unit),
    ],
)
def test_combining_is_the_algebra_of_directions(panel, operation, want):
    panel.first.value, panel.second.value, panel.operation.value = "a", "b", operation
    panel.make.click()
    made = panel.state.directions[panel.state.direction]
    a, b = panel.state.directions["a"], panel.state.directions["b"]
    torch.testing.assert_close(made.vector, want(a, b), rtol=1e-4, atol=1e-4)
    assert panel.selected.value == panel.state.direction


def test_what_cannot_be_combined_is_said(panel):
    panel.state.add_direction(some(5, "elsewhere", "resid_post.0"))
    panel.first.value, panel.second.value = "a", "elsewhere"
    panel.make.click()
    assert "to combine them anyway, move one" in error_of(panel).lower()
    panel.second.value, panel.operation.value = "a", "-"
    panel.make.click()
    assert "is zero" in error_of(panel)


def test_steering_and_ablating_put_edits_on_the_stack(panel):
    panel.steer.click()
    panel.ablate.click()
    kinds = [(e["kind"], e["direction"], e["layers"]) for e in panel.state.edits]
    assert kinds == [("steer", "word", None), ("ablate", "word", "all")]
    assert panel.used.value == "In the stack of edits: steer (1), ablate (2)."
    panel.remove.click()
    assert "is used by edit 1, 2" in error_of(panel)
    panel.state.edits = []
    panel.remove.click()
    assert list(panel.state.directions) == ["a", "b"]


def test_a_direction_is_marked_for_caft_until_it_is_unmarked_or_removed(panel):
    panel.caft.click()
    assert panel.state.caft == ["word"]
    assert panel.used.value.endswith("Marked for CAFT.")
    panel.caft.click()
    assert panel.state.caft == []
    panel.caft.click()
    panel.remove.click()
    assert panel.state.caft == []
    assert "CAFT" not in panel.used.value


def test_a_direction_is_found_with_one_button_and_its_snippet_gives_the_same(planted):
    with Directions(planted[0], behaviours=[behaviour(24)]) as panel:
        assert "No directions yet" in panel.table.value
        assert panel.steer.disabled
        panel.find.click()
        assert panel.jobs.wait(60)
        (found,) = panel.state.directions.values()
        assert found.cosine(planted[1]) > 0.99
        panel.contrast.value = "answers"
        panel.layer.value = -1
        panel.find.click()
        assert panel.jobs.wait(60)
        assert len(panel.state.directions) == 1 + planted[0].n_layers
        panel.contrast.value, panel.layer.value = "models", 0
        panel.find.click()
        assert panel.jobs.wait(60)
        assert f"they differ from layer {LAYER} on" in error_of(panel)


def test_the_snippet_gives_the_cosines_and_the_words(panel):
    known = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), known)
    assert known["cosines"].to_numpy().flatten() == pytest.approx(panel.map.source.data["cosine"])
    assert known["lens"].tokens.equals(panel.lens.tokens)
    with Directions(panel.pair) as empty:
        exec(empty.code(), {})


def test_export_and_import_give_the_same_directions(panel, planted, tmp_path):
    panel.path.value = str(tmp_path / "mine.safetensors")
    panel.write.click()
    kept = load_directions(tmp_path / "mine.safetensors")
    assert [each.name for each in kept] == ["a", "b", "word"]
    known = {"pair": panel.pair}  # now from the file
    exec(panel.code(), known)
    assert known["lens"].tokens.equals(panel.lens.tokens)
    with Directions(planted[0]) as other:
        other.path.value = str(tmp_path / "mine.safetensors")
        other.read.click()
        assert other.jobs.wait(30)
        keys = [each.content_key for each in other.state.directions.values()]
        assert keys == [each.content_key for each in kept]
        assert "3 directions read" in other.file_note.value


@pytest.mark.parametrize("wrong", ["", "x.txt", "../up.safetensors", "a/../b.safetensors",
                                   ".safetensors", "gone/x.safetensors"])  # fmt: skip
def test_paths_that_are_not_safe_are_refused(wrong):
    with pytest.raises(FileFormatError):
        safe_path(wrong)


def test_no_other_file_is_overwritten_and_bad_files_are_named(panel, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, other)
    before = other.read_bytes()
    panel.path.value = str(other)
    panel.write.click()
    assert "holds no directions" in error_of(panel)
    assert other.read_bytes() == before
    panel.read.click()
    assert "holds no directions" in error_of(panel)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    panel.path.value = str(tmp_path / "cut.safetensors")
    panel.read.click()
    assert "nothing was read" in error_of(panel)
    panel.path.value = str(tmp_path / "none.safetensors")
    panel.read.click()
    assert "there is no file" in error_of(panel)
    assert list(panel.state.directions) == ["a", "b", "word"]


def test_nothing_hostile_reaches_html(panel):
    bad = '<img src=x onerror="alert(1)">'
    panel.state.add_direction(some(9, bad))
    assert panel.jobs.wait(30)
    for html in (panel.table.value, panel.words.value, panel.snapshot_html()):
        assert "<img" not in html
        assert "&lt;img" in html


def test_without_behaviours_or_selection_it_says_what_to_do(planted):
    with Directions(planted[0]) as panel:
        assert panel.find.disabled
        with pytest.raises(DirectionError, match="behaviours="):
            panel.run()
        with pytest.raises(DirectionError, match="select a direction first"):
            panel.use("steer")
        with pytest.raises(DirectionError, match="choose two directions"):
            panel.combine()


def test_beside_steer_and_ablate_one_state_is_shared(planted):
    with Workbench(planted[0], panels=[Edits, Directions]) as wb:
        wb.state.add_direction(planted[1].renamed("word"))
        wb.panels["Directions"].use("ablate")
        assert wb.panels["Steer and ablate"]._rows[0].direction.value == "word"
        wb.state.edits = [*wb.state.edits, new_edit("steer", "word")]
        assert wb.jobs.wait(30)
        assert wb.panels["Directions"].used.value.count("(") == 2
