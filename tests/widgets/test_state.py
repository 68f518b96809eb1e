import json
from typing import Any

import pytest
import torch
from traitlets import TraitError

import modeldiff as md
from modeldiff.errors import FileFormatError, InterventionError, MaskError
from modeldiff_widgets import AuditState, new_edit, where_of


def direction(name="shift", layer=1, seed=0):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return md.Direction.of(vector, f"resid_post.{layer}", name)


@pytest.fixture
def state() -> Any:
    state = AuditState(prompt="the cat")
    for i, name in enumerate(["shift", 'it\'s a "name"\n']):
        state.add_direction(direction(name, seed=i))
    return state


EDITS = {
    "steer": new_edit("steer", "shift", coefficient=-1.5),
    "steer layers": new_edit("steer", "shift", layers=[0, 2], where="prompt"),
    "ablate": new_edit("ablate", 'it\'s a "name"\n', layers="all"),
    "scale": new_edit("scale_along", "shift", coefficient=0.25),
    "clamp": new_edit("clamp", "shift", coefficient=2.0),
    "replace along": new_edit("replace", "shift", where="prompt"),
    "replace along layers": new_edit("replace", "shift", layers=[1, 2], where="prompt"),
    "replace": new_edit("replace", layers=[2], where="prompt"),
    "adapter": new_edit("adapter", coefficient=0.0),
    "adapter layers": new_edit("adapter", layers=[1], coefficient=-1.0),
    "positions": new_edit("steer", "shift", where=where_of(md.Positions((1, -1)))),
    "regex": new_edit("steer", "shift", where=where_of(md.Regex(r"[0-9]+\"'"))),
    "composed": new_edit("ablate", "shift", where=where_of(md.Role("user") & ~md.Last())),
}


def run(code, **names) -> Any:
    scope = dict(names)
    exec(code, scope)
    return scope["do"]


def value(code, **names) -> Any:
    return run(f"do = {code}", md=md, **names)


@pytest.mark.parametrize("name", EDITS)
def test_the_code_of_every_edit_makes_the_same_plan(state, name):
    state.edits = [EDITS[name]]
    plan = state.plan()
    assert len(plan) == 1
    assert md.Plan((run(state.code(), state=state),)).content_key == plan.content_key


def test_the_code_of_the_whole_stack_with_its_control(state):
    state.edits = list(EDITS.values())
    state.random_control = True
    state.seed = 7
    made = run(state.grid_code(), state=state)
    expected = state.grid()
    assert set(expected) == {"edited", "random"}
    assert {n: p.content_key for n, p in made.items()} == {
        n: p.content_key for n, p in expected.items()
    }
    assert run(state.code(), state=state).content_key == state.plan().content_key


def test_edits_that_are_off_do_nothing(state):
    state.edits = [{**EDITS["steer"], "on": False}]
    assert state.plan() is None
    assert state.grid() == {}
    assert run(state.code(), state=state) is None
    assert run(state.grid_code(), state=state) == {}


def test_a_coefficient_is_a_multiple_of_the_raw_length(state):
    scale = state.directions["shift"].scale
    state.edits = [EDITS["clamp"], EDITS["steer"]]
    clamp, steer = state.plan().edits
    assert clamp.value == 2.0 * scale
    assert steer.coefficient == -1.5


def test_random_controls_have_the_length_and_differ_from_each_other(state):
    state.edits = [EDITS["steer"], EDITS["ablate"]]
    controls = state.controls()
    one, two = controls.values()
    assert one.scale == state.directions["shift"].scale
    assert abs(one.cosine(two)) < 0.9
    state.seed = 1
    assert state.controls()["shift"].content_key != one.content_key


def test_settings_travel_through_json(state):
    state.edits = list(EDITS.values())
    state.messages = [{"role": "user", "content": "\u202e hi"}]
    state.token = 3
    again = AuditState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again.to_dict() == state.to_dict()
    assert "directions" not in state.to_dict()
    assert "results" not in state.to_dict()


@pytest.mark.parametrize(
    "bad",
    [{"temprature": 1.0}, {"temperature": -1.0}, {"layer": "x"}, {"n_samples": 0},
     {"edits": [{"kind": "explode"}]}],
)  # fmt: skip
def test_bad_settings_change_nothing(bad):
    state = AuditState(prompt="before", seed=3)
    before = state.to_dict()
    with pytest.raises(FileFormatError, match=r"[Nn]othing was changed"):
        state.update({"prompt": "after", **bad})
    assert state.to_dict() == before


def test_what_an_edit_cannot_be_is_refused(state):
    with pytest.raises(InterventionError, match="unknown kind"):
        new_edit("explode")
    with pytest.raises(MaskError, match="names no tokens"):
        new_edit("steer", "shift", where="nowhere")
    with pytest.raises((TraitError, InterventionError)):
        state.edits = [{"kind": "steer"}]
    state.edits = [new_edit("steer", "unknown")]
    with pytest.raises(InterventionError, match="'unknown'"):
        state.plan()
    state.edits = [new_edit("replace")]
    with pytest.raises(InterventionError, match="needs its layers"):
        state.plan()


def test_items_are_texts_or_chats(state):
    assert state.item() == "the cat"
    state.messages = [{"role": "user", "content": "hi"}]
    assert state.item() == [{"role": "user", "content": "hi"}]
    assert value(state.item_code()) == state.item()
    state.prefill = "Sure"
    item = value(state.item_code())
    assert (item.prefill, list(item.messages)) == ("Sure", state.messages)
    assert state.item().prefill == "Sure"


def test_directions_of_one_name_are_kept_apart(state):
    other = direction("shift", seed=9)
    assert state.add_direction(direction("shift", seed=0)) == "shift"
    assert state.add_direction(other) == "shift 2"
    assert state.directions["shift 2"].content_key == other.content_key
    assert state.direction == "shift 2"


def test_snippets_read_directions_from_their_file(state, tmp_path):
    path = tmp_path / "found.safetensors"
    state.save_directions(str(path))
    state.edits = [EDITS["steer"], EDITS["ablate"]]
    assert "state" not in state.code()
    assert run(state.code()).content_key == state.plan().content_key
    state.add_direction(direction("new", seed=5))
    assert "state.directions" in state.code()
    other = AuditState()
    assert other.load_directions(str(path)) == list(state.directions)[:2]
    assert other.directions_file == str(path)


def test_snippets_make_directions_that_have_code():
    state: Any = AuditState()
    code = "md.Direction.of(torch.ones(16), 'resid_post.1', 'ones')"
    state.add_direction(value(code, torch=torch), code)
    state.edits = [new_edit("steer", "ones")]
    made = run(state.code(), torch=torch)
    assert md.Plan((made,)).content_key == state.plan().content_key
