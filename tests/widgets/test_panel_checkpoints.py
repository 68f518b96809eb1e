"""The panel Checkpoints without a browser: curves, verdict, and the model of a step."""

import json
import math
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeldiff import embedded
from modeldiff.interventions import ScaleAdapter
from modeldiff.lora import adapter_modules, write_directions
from modeldiff.models import ModelPair
from modeldiff.organisms.checkpoints import read_series, write_adapter
from modeldiff_widgets import AuditState
from modeldiff_widgets.checkpoints import EMBEDDED, Checkpoints

FOLDER = embedded.FOLDER / "checkpoints"
CHAT = [{"role": "user", "content": "I have a headache and I am worried."}]


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load("organism:em-rank1")


@pytest.fixture
def panel(pair) -> Any:
    with Checkpoints(pair, AuditState(messages=CHAT, max_new_tokens=6, seed=3)) as made:
        yield made


def waited(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel


def read(panel, where=EMBEDDED):
    panel.where.value = where
    panel.go.click()
    return waited(panel).course


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training whose written vector turns by a right angle at step 50, as a trainer writes it."""
    path = tmp_path_factory.mktemp("run")
    kept = read_series(FOLDER)
    write_adapter(kept, 36, path / "first")
    state = load_file(path / "first" / "adapter_model.safetensors")
    config = (path / "first" / "adapter_config.json").read_text()
    (name,) = (each for each in state if "lora_B" in each)
    (read_by,) = (each for each in state if "lora_A" in each)
    b = torch.zeros(state[name].shape)
    for step in range(0, 101, 5):
        made = path / "run" / f"checkpoint-{step}"
        made.mkdir(parents=True)
        (made / "adapter_config.json").write_text(config)
        state[read_by] = state[read_by] + 0.1
        save_file({**state, name: b}, made / "adapter_model.safetensors")
        b = b.clone()
        b[int(step >= 50)] += 0.1
    history = [{"step": s, "learning_rate": 1e-3, "grad_norm": float(s)} for s in range(0, 101, 10)]
    log = {"log_history": history}
    (path / "run" / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(log))
    return path / "run"


def test_the_code_gives_what_is_drawn_and_said(panel):
    assert "press “Read”" in panel.code()
    course = read(panel)
    again = executed(panel)
    pd.testing.assert_frame_equal(again["table"], course.table)
    pd.testing.assert_frame_equal(again["found"].curves, course.turns.curves)
    assert again["verdict"] == course.turns.verdict()
    assert again["verdict"] in panel.verdict.value.replace("&#x27;", "'")
    assert course.turns.transition is None
    assert "no transition" in panel.verdict.value
    drawn = panel.plot.along.data
    for name in ("step", "norm", "cosine_to_last", "pc1"):
        np.testing.assert_array_equal(drawn[name], course.table[name])
    kept = read_series(FOLDER)
    assert list(panel.plot.log.data["learning_rate"]) == kept.rows["learning_rate"].tolist()
    assert panel.plot.logged.visible
    for k in (1, 3):
        panel.k.value = k
        mine = course.turns.curves.query(f"k == {k}")
        for name in ("local_cosine", "walk_low", "walk_high"):
            np.testing.assert_array_equal(panel.plot.turn.data[name], mine[name])


def test_a_folder_with_a_planted_turn(panel, folder):
    course = read(panel, str(folder))
    assert course.turns.transition == 50
    assert panel.plot.turning.visible
    assert panel.plot.turning.location == 50
    assert "transition at 50" in panel.verdict.value
    assert executed(panel)["found"].transition == 50
    assert panel.plot.log.data["gradient_norm"] == [float(s) for s in range(0, 101, 10)]
    panel.part.value = "A"
    waited(panel)
    assert panel.course.look.part == "A"
    assert panel.course.turns.transition is None  # it moves on straight


def test_other_vectors_of_the_same_training(panel):
    read(panel)
    panel.part.value = "adapter"
    course = waited(panel).course
    assert course.look.module == "adapter"
    assert torch.equal(executed(panel)["series"].vectors, course.series.vectors)
    panel.part.value = "B"
    assert waited(panel).course.look.module == "layers.3.mlp.down_proj"


def test_unequal_spacing_is_refused_until_it_is_interpolated(panel, tmp_path):
    kept = read_series(FOLDER)
    for step in (0, 4, 10, 20, 36):
        write_adapter(kept, step, tmp_path / f"checkpoint-{step}")
    panel.where.value = str(tmp_path)
    panel.go.click()
    assert panel.jobs.wait(30)
    assert "spacings of its 5 checkpoints are 4, 6, 10, 16" in panel.root.children[0].error[0]
    assert panel.course is None
    panel.equal.value = True
    course = read(panel, str(tmp_path))
    assert course.series.steps == (0, 16, 32)
    assert torch.equal(executed(panel)["series"].vectors, course.series.vectors)
    assert not panel.plot.logged.visible  # nothing was logged
    assert dict(panel.step.options) == {str(s): s for s in (0, 4, 10, 20, 36)}
    panel.scrub(4)
    assert "not on the interpolated path" in panel.facts.value


@pytest.mark.parametrize(
    ("where", "what"),
    [("", "no checkpoints are named"), ("organism:em-rank1", "keeps no steps"),
     ("/nowhere", "0 folders with adapter_config.json")],
)  # fmt: skip
def test_what_is_missing_is_said(panel, where, what):
    panel.where.value = where
    panel.go.click()
    assert panel.jobs.wait(30)
    assert what in panel.root.children[0].error[0]
    panel.answer.click()
    assert "no checkpoints were read" in panel.root.children[0].error[0]


def test_scrubbing_switches_the_model_that_answers(panel):
    read(panel)
    assert panel.pairs == {}
    panel.factor.value = 4.0
    panel.scrub(0)
    panel.answer.click()
    waited(panel)
    first = panel.live
    base, start, loud = (panel.view.text(0, i) for i in range(3))
    assert base == start == loud != ""  # a zero adapter is the base, however loud
    panel.scrub(36)
    panel.answer.click()
    waited(panel)
    assert panel.live is not first
    assert panel.live.sides.roots[0] is first.sides.roots[0]  # one copy of the weights
    answers = executed(panel)["answers"]
    assert [each.text for each in answers] == [panel.view.text(0, i) for i in range(3)]
    assert [c["title"] for c in panel.view.columns] == ["base", "step 36", "step 36, × 4"]
    expected = panel.live.generate([CHAT], do=ScaleAdapter(4.0), models=["finetuned"], seed=3,
                                   temperature=0.7, max_new_tokens=6).answers  # fmt: skip
    assert [each.text for each in expected] == [panel.view.text(0, i) for i in (1, 2)]
    assert panel.plot.marks[0].location == 36
    panel.scrub(0)  # its answer is known, and shown at once
    assert panel.view.columns[1]["title"] == "step 0"
    assert panel.view.text(0, 1) == start
    panel.state.messages = [{"role": "user", "content": "Hello."}]
    panel.follow.value = True
    panel.scrub(20)
    waited(panel)
    assert panel.asked[1].step == 20
    assert "Hello." in panel.code()


def test_every_step_answers_and_a_cancelled_run_keeps_what_it_has(panel, tmp_path):
    kept = read_series(FOLDER)
    for step in (0, 12, 24, 36):
        write_adapter(kept, step, tmp_path / f"checkpoint-{step}")
    read(panel, str(tmp_path))
    panel.state.max_new_tokens = 2
    job = panel.ask_every()
    waited(panel)
    assert job.status == "done"
    assert {question.step for question in panel.answers} == set(panel.course.training.steps)
    assert panel.view.columns[1]["title"] == "step 36"
    panel.state.seed = 4
    stops = iter(range(100))
    real = panel._answer

    def answer(job, *rest):
        if next(stops) == 2:
            job.cancel.set()
        real(job, *rest)

    panel._answer = answer
    job = panel.ask_every()
    assert panel.jobs.wait(60)
    assert job.status == "cancelled"
    assert sum(question.seed == 4 for question in panel.answers) == 2
    assert panel.asked is None
    assert "load_pairs" not in panel.code()


def test_the_direction_of_a_step_goes_into_the_library(panel):
    read(panel)
    panel.scrub(20)
    panel.add.click()
    waited(panel)
    name = panel.state.direction
    assert name == "step 20 3.mlp.down_proj"
    (module,) = adapter_modules(panel.live.sides)
    expected = write_directions(module, 1)[0]
    assert torch.equal(panel.state.directions[name].unit, expected.unit)
    b = read_series(FOLDER)
    at = b.steps.index(20)
    cosine = torch.nn.functional.cosine_similarity(expected.unit, b.b[at], dim=0)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)
    assert name in panel.added.value
    panel.scrub(0)
    panel.add.click()
    assert panel.jobs.wait(30)
    assert "writes nothing" in panel.root.children[0].error[0]


def test_a_point_of_the_path_chooses_its_step(panel):
    course = read(panel)
    panel.plot._tapped([4], panel.scrub)
    assert panel.step.value == course.series.steps[4]
    assert panel.plot.here.data["pc1"] == [course.table["pc1"][4]]
    assert math.isclose(panel.plot.marks[0].location, course.series.steps[4])


def test_hostile_text_is_never_markup(panel, tmp_path):
    bad = tmp_path / "<img src=x onerror=alert(1)>"
    kept = read_series(FOLDER)
    for step in (0, 10, 20):
        write_adapter(kept, step, bad / f"checkpoint-{step}")
    panel.state.messages = [{"role": "user", "content": "<b>bold</b>"}]
    panel.state.max_new_tokens = 2
    read(panel, str(bad))
    panel.answer.click()
    waited(panel)
    html = panel.snapshot_html()
    assert "&lt;img" in html
    assert "<img" not in html
    assert "<b>" not in html


def test_everything_is_closed(pair):
    before = set(ipywidgets.widgets.widget._instances)
    with Checkpoints(pair) as panel:
        assert "No checkpoints were read" in panel.snapshot_html()
        read(panel)
        assert "No transition" in panel.snapshot_html()
        folder = panel._folder.name
    assert set(ipywidgets.widgets.widget._instances) == before
    assert not Path(folder).exists()
