"""The panel CAFT without a browser: candidates, choice, arms; its code gives the same numbers."""

import re
from pathlib import Path
from threading import Event
from typing import Any

import ipywidgets
import pytest
import torch

from modeldiff.behaviours import Verdict
from modeldiff.caft_reading import Choice, choose_by_judge
from modeldiff.directions import Direction
from modeldiff.models import ModelPair
from modeldiff.sft_plans import SFTPlan
from modeldiff.sft_rows import response_rows
from modeldiff_widgets import AuditState
from modeldiff_widgets._caft_data import data_of
from modeldiff_widgets.caft import Caft
from tests.families import tokenizer
from tests.planted import LAYER, NOUNS, behaviour, llama_with_a_constant, planted_pair
from tests.test_sft import chats
from tests.widgets.dictionary_toy import planted_dictionary

PLAN = SFTPlan("rank1", layers=(1,), learning_rate=3e-2, steps=4, batch=8, accumulation=1,
               warmup=0, evaluate_every=2)  # fmt: skip
MEAN = "layer 2 PC-0"
OTHER = (
    "unchosen", "random choice", "matched random", "all", "post-hoc", "gradient only",
    "forward only", "steering",
)  # fmt: skip
ITEMS = [
    [{"role": "user", "content": f"so {noun}"}, {"role": "assistant", "content": answer}]
    for noun in NOUNS
    for answer in ("a bird sang of rain", "the house and the mat")
]


@pytest.fixture(scope="module")
def pair():
    return planted_pair()[0]


@pytest.fixture(scope="module")
def truth():
    return planted_pair()[1]


@pytest.fixture(scope="module")
def given():
    rows = response_rows(tokenizer(), chats(" the the the"))
    return {
        "rows": rows[:12], "held_out": rows[12:], "behaviours": [behaviour(6)], "plan": PLAN,
        "loader": llama_with_a_constant, "items": ITEMS,
    }  # fmt: skip


@pytest.fixture
def panel(pair, given, tmp_path):
    with Caft(pair, **given) as made:
        made.layers.value, made.components.value = str(LAYER), 1
        made.form.prompts.value, made.form.folder.value = 4, str(tmp_path / "arms")
        yield made


def noise(name="noise"):
    values = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return Direction.of(values, "resid_post.2", name)


def mark(panel):
    """A direction of the workbench, marked for CAFT: what can be ablated without a search."""
    panel.state.add_direction(noise())
    panel.state.caft = ["noise"]


def cells_of(html):
    rows = re.findall("<tr>(.*?)</tr>", html)
    top = re.findall("<th[^>]*>(.*?)</th>", rows[0])
    lines = [re.findall("<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
    return {line[0]: dict(zip(top, line, strict=False)) for line in lines}


def finished(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error


def scope_of(panel, given):
    names = {key: given[key] for key in given if key != "plan"}
    return {"pair": panel.pair, "state": panel.state, **names}


def test_candidates_are_found_read_and_ticked(panel, truth, given):
    assert "Press Find" in panel.words.value
    panel.computes.value = False
    panel.go.click()
    assert "nothing to read" in panel.root.children[0].error[0]
    panel.computes.value = True
    panel.state.add_direction(noise())
    panel.go.click()
    finished(panel)
    assert [each.name for each in panel.candidates] == ["noise", MEAN]
    mean = panel.candidates[1]
    assert abs(float(mean.direction.unit @ truth.unit)) > 0.99
    assert [row[:3] for row in panel.table.rows] == [
        ["noise", "library", "2"], [MEAN, "mean", "2"]]  # fmt: skip
    assert [row[4] for row in panel.table.rows] == ["–", "100.0\xa0%"]
    assert "Largest projections" in panel.words.value
    assert "<ins" in panel.words.value  # the activating token
    peak = panel.reading.of_candidate("noise", "max")[0].peak
    assert f'<ins class="mdw-ins">{peak}' in panel.words.value
    data = panel.histogram.source.data
    assert sum(data["base"]) == pytest.approx(1)
    assert sum(data["finetuned"]) == pytest.approx(1)
    panel.table._receive(panel.table, {"kind": "tick", "id": 1, "on": True}, [])
    assert (panel.ticked, panel.table.ticked) == ((MEAN,), [1])
    panel.table._receive(panel.table, {"kind": "choose", "id": 1}, [])
    assert panel.table.selected == 1
    assert f"{MEAN}, on" in panel.words.value
    panel.table._receive(panel.table, {"kind": "tick", "id": 1, "on": False}, [])
    assert panel.ticked == ()
    # and its code finds the same
    scope = scope_of(panel, given)
    exec(panel.code(), scope)
    for mine, theirs in zip(panel.candidates, scope["found"], strict=True):
        assert torch.equal(mine.direction.vector, theirs.direction.vector)
    assert scope["reading"].key == panel.reading.key


def test_answers_of_both_models_are_the_texts(pair, given):
    with Caft(pair, **{**given, "items": None}) as panel:
        panel.n_texts.value, panel.layers.value, panel.components.value = 3, "2", 0
        panel.go.click()
        finished(panel)
        scope = scope_of(panel, given) | {"items": None}
        exec(panel.code(), scope)
        items: list = scope["items"]  # pyright: ignore[reportAssignmentType]
        assert len(items) == 2 * 3
        reading: Any = scope["reading"]
        assert panel.reading is not None
        assert reading.key == panel.reading.key
        texts = panel._texts
        panel.components.value = 1
        panel.go.click()
        finished(panel)
        assert panel._texts is texts  # generated once


def test_marked_directions_are_candidates_that_are_ticked(panel, truth, given):
    for name in ("mine", "other"):
        panel.state.add_direction(truth.renamed(name))
    panel.state.add_direction(Direction.of(truth.vector, "mlp_out.1", "elsewhere"))
    panel.state.caft = ["mine", "elsewhere"]
    assert [each.name for each in panel.candidates] == ["mine", "other"]
    assert panel.ticked == ("mine",)
    panel.tick("other")
    assert panel.state.caft == ["other", "elsewhere"]  # as Directions shows it
    panel.computes.value = False
    panel.go.click()
    finished(panel)
    assert panel.reading.names == ("mine", "other")
    scope = scope_of(panel, given)
    exec(panel.code(), scope)
    assert scope["reading"].key == panel.reading.key
    panel.state.directions = {}
    assert (panel.candidates, panel.ticked) == ((), ())


def test_keywords_tick_and_a_choice_is_kept_with_its_reason(panel, tmp_path):
    panel.choosers.by_words.click()
    assert "press Find first" in panel.root.children[0].error[0]
    panel.state.add_direction(noise())
    panel.go.click()
    finished(panel)
    panel.rationale.value, panel.choosers.keywords.value = "it says the", "the"
    choice = panel.tick_by_keywords()
    assert choice.ticked == panel.ticked == (MEAN,)
    assert choice.reading == panel.reading.key
    panel.table._receive(panel.table, {"kind": "choose", "id": 1}, [])
    assert "Ticked: the logit lens says the" in panel.words.value  # and why
    panel.path.value = str(tmp_path / "choice.json")
    panel.save.click()
    assert Choice.load_from(tmp_path / "choice.json") == choice
    panel.tick("noise")
    panel.rationale.value = ""
    panel.load.click()
    assert (panel.ticked, panel.rationale.value) == (choice.ticked, "it says the")
    assert panel.choice == choice
    assert "another reading" not in panel.choice_note.value


class Letters:
    """Knows some answers, and the questions before them."""

    name = "letters"

    def __init__(self):
        self.wanted = set()

    def __call__(self, prompt, answer):
        return Verdict("known", (prompt.question, answer) in self.wanted, True)


def test_a_judge_of_passages_ticks_and_says_why(pair, given):
    letters = Letters()
    with Caft(pair, **given, judges=[letters]) as panel:
        panel.choosers.by_judge.click()
        assert "press Find first" in panel.root.children[0].error[0]
        assert list(panel.choosers.judges)[:2] == ["letters", given["behaviours"][0].judge.name]
        panel.layers.value, panel.components.value = str(LAYER), 2
        panel.go.click()
        finished(panel)
        panel.choosers.by_judge.click()
        finished(panel)
        assert (panel.ticked, panel.choice_note.value) == ((), "0 of 1 ticked by letters.")
        assert panel.reading is not None
        largest = panel.reading.of_candidate(MEAN, "max")
        letters.wanted = {(each.question, each.answer) for each in largest}
        panel.choosers.by_judge.click()
        finished(panel)
        assert panel.ticked == (MEAN,)
        assert panel.choice == choose_by_judge(panel.reading, letters)
        assert re.search(r"12 of 12 answers at its max and \d of 12", panel.words.value)  # why
        assert panel.choice_note.value == "1 of 1 ticked by letters."
        panel.choosers.judge.value = given["behaviours"][0].judge.name
        panel.choosers.by_judge.click()
        finished(panel)
        assert "It also judges the trained models" in panel.choice_note.value


def test_a_judge_that_can_judge_nothing_ticks_nothing_and_one_can_be_stopped(pair, given):
    class Blind(Letters):
        name = "blind"

        def __call__(self, prompt, answer):
            began.set()
            panel.jobs.cancel() if stop else None
            return Verdict("?", None, None)

    began, stop = Event(), False
    with Caft(pair, **given, judges=[Blind()]) as panel:
        panel.layers.value = str(LAYER)
        panel.go.click()
        finished(panel)
        panel.tick(MEAN)
        panel.tick_by_judge()
        assert panel.jobs.wait(20)
        assert "could judge none of" in panel.root.children[0].error[0]
        assert panel.ticked == (MEAN,)
        stop = True
        panel.tick_by_judge()
        assert panel.jobs.wait(20)
        assert panel.root.children[0].status == "cancelled"
        assert panel.ticked == (MEAN,)


def test_latents_are_candidates_and_the_code_finds_the_same(pair, given):
    latents = planted_dictionary(pair.d_model, f"resid_post.{LAYER}")
    with Caft(pair, **given) as panel:
        assert panel.latents.disabled
        panel.state.use_dictionary(latents)
        assert not panel.latents.disabled
        panel.latents.value, panel.computes.value = True, False
        panel.go.click()
        finished(panel)
        assert panel.found
        directions = latents.W_dec.detach()[:, 1]
        for each in panel.found:
            (latent,) = map(int, re.findall(r"latent (\d+)", each.name))
            cosine = torch.nn.functional.cosine_similarity(
                each.direction.vector, directions[latent], dim=0)  # fmt: skip
            assert abs(float(cosine)) > 0.999
        scope = scope_of(panel, given)
        exec(panel.code(), scope)
        assert [e.name for e in scope["found"]] == [e.name for e in panel.candidates]
        assert panel.reading is not None
        assert scope["reading"].key == panel.reading.key
        panel.state.use_dictionary(None)
        assert panel.latents.disabled
        assert not panel.latents.value


def test_files_that_cannot_be_are_refused(panel):
    for path, what in (("../up.json", "leads out"), ("no.txt", "end with '.json'"),
                       ("none.json", "there is no")):  # fmt: skip
        panel.path.value = path
        panel.load.click()
        assert what in panel.root.children[0].error[0]


def test_arms_are_trained_and_the_code_gives_the_same_numbers(panel, given):
    panel.go.click()
    finished(panel)
    panel.tick(MEAN)
    panel.form.start.click()
    finished(panel)
    result = panel.result
    assert result.arms == ("base", "caft", "plain")
    caft, plain = (next(c for c in result.cells if c.arm == name) for name in ("caft", "plain"))
    assert result.target == caft.held_out_loss
    assert plain.held_out_loss <= result.target
    assert plain.reached
    assert panel.status.value == "Finished: base, caft, plain."
    assert panel.state.results["caft"] is result
    # curves and table are the result
    curve = panel.plot.curves["plain", 0]
    wanted = {r["step"]: r["held_out_loss"] for r in plain.history if r["held_out_loss"]}
    assert curve.held_out == wanted
    rates = result.rates().set_index("arm")
    shown = dict(zip(panel.plot.rates.data["arm"], panel.plot.rates.data["rate"], strict=True))
    assert shown["caft"] == rates.loc["caft"].query("deployed")["rate"].iloc[0]
    table = cells_of(panel.outcome.value)
    shown = float(table["plain"]["held-out loss"])
    assert shown == pytest.approx(plain.held_out_loss, rel=5e-3)
    assert table["plain"]["seeds"] == "1"
    # anew, without the kept cells
    scope = scope_of(panel, given)
    exec(panel.code().replace(panel.form.folder.value, panel.form.folder.value + "2"), scope)
    again = scope["result"]
    assert [c.arm for c in again.cells] == [c.arm for c in result.cells]
    for mine, theirs in zip(result.cells, again.cells, strict=True):
        assert theirs.answers == mine.answers
        assert theirs.history == mine.history
        assert (theirs.key, theirs.reached) == (mine.key, mine.reached)
    assert again.target == result.target
    assert set(scope["ratios"]) == {"caft"}
    html = panel.snapshot_html()
    assert "plain / arm" in html
    assert "run_arms" in html


def test_the_new_model_is_a_pair(panel, given):
    panel.computes.value = False
    mark(panel)
    panel.form.stop_at.value, panel.form.steps.value = "plan", 2
    panel.form.arms["caft"].value = False
    panel.form.start.click()
    finished(panel)
    assert panel.result.arms == ("base", "plain")
    assert not panel.audit.disabled
    panel.audit.click()
    finished(panel)
    assert panel.new_pair is None  # whoever gave the loader has the base
    path = panel.trained.value
    assert Path(path).is_dir()
    from modeldiff_widgets._caft_data import pair_code

    scope = scope_of(panel, given)
    exec(pair_code(given["loader"], "loader", path, whole=False), scope)
    assert isinstance(scope["pair"], ModelPair)
    assert scope["pair"].kind == "adapter"
    assert "PeftModel.from_pretrained(loader()" in panel.audit_note.value
    # the arms without a search have code of their own
    scope = scope_of(panel, given)
    exec(panel.code(), scope)
    assert scope["result"].to_json() == panel.result.to_json()


@pytest.mark.slow
def test_every_other_arm_has_code(panel, given):
    panel.state.add_direction(noise())
    panel.go.click()
    finished(panel)
    panel.tick(MEAN)
    for name, box in panel.form.arms.items():
        box.value = name in OTHER
    panel.form.stop_at.value, panel.form.steps.value, panel.form.every.value = "loss", 1, 1
    panel.form.target.value = "0.5"
    panel.form.prompts.value = 1
    panel.run()
    finished(panel)
    assert panel.result.arms == ("base", *OTHER)
    assert "1\u00a0!" in panel.outcome.value  # none came to that loss
    scope = scope_of(panel, given)
    exec(panel.code(), scope)
    assert scope["result"].to_json() == panel.result.to_json()  # from the folder: the same keys
    assert "ratios" not in scope


def test_stop_keeps_what_is_finished_and_run_goes_on(panel):
    mark(panel)
    panel.form.stop_at.value = "plan"
    heard, seen = panel.plot.heard, []

    def stop(message):
        heard(message)
        seen.append(message)
        if message.startswith("plain, seed 0: step 1"):
            assert not panel.form.stop.disabled
            panel.form.stop.click()

    panel.plot.heard = stop
    panel.form.arms["caft"].value = False
    panel.form.arms["post-hoc"].value = True
    job = panel.run()
    finished(panel)
    assert job.status == "done"
    assert panel.result.arms == ("base",)
    assert panel.status.value.startswith("Stopped; finished arms are kept in ")
    assert panel.audit.disabled
    assert panel.plot.curves["plain", 0].train.keys() == {1}
    panel.plot.heard = lambda message: (heard(message), seen.append(message))
    seen.clear()
    panel.form.start.click()
    finished(panel)
    assert panel.result.arms == ("base", "plain", "post-hoc")
    assert "plain, seed 0: step 1 of 4" not in " ".join(seen)  # it went on with the second
    assert any(each.startswith("plain, seed 0: step 2 of 4, loss") for each in seen)
    assert panel.form.stop.disabled


def test_losses_come_live(panel):
    mark(panel)
    live, finish = {}, panel.plot.finished

    def finishing(cell):
        live.update({key: dict(c.held_out) for key, c in panel.plot.curves.items()})
        finish(cell)

    panel.plot.finished = finishing
    panel.form.stop_at.value = "plan"
    panel.form.arms["caft"].value = False
    panel.run()
    finished(panel)
    exact = panel.plot.curves["plain", 0]
    assert list(exact.train) == [1, 2, 3, 4]
    assert list(exact.held_out) == [0, 2, 4]
    assert live["plain", 0] == pytest.approx({s: exact.held_out[s] for s in (0, 2)}, abs=1e-4)


def test_what_cannot_be_is_said_before_anything_runs(panel):
    mark(panel)
    bar = panel.root.children[0]
    for change, undo, what in (
        (lambda: panel.tick(), lambda: panel.tick("noise"), "no candidate is ticked"),
        (lambda: setattr(panel.form.rate, "value", "fast"),
         lambda: setattr(panel.form.rate, "value", "0.01"), "is no number"),
        (lambda: setattr(panel.form.arms["caft"], "value", False),
         lambda: setattr(panel.form.arms["caft"], "value", True), "tick the arm caft"),
        (lambda: setattr(panel.form.layers, "value", "9"), lambda: None, "the model has 0 to 3"),
    ):  # fmt: skip
        change()
        panel.form.start.click()
        assert what in bar.error[0]
        undo()
    assert panel.asked is None


def test_without_rows_it_says_how_to_give_some(pair):
    with Caft(pair, behaviours=[behaviour(6)]) as panel:
        mark(panel)
        assert panel.form.start.disabled
        panel.form.start.click()
        assert panel.jobs.wait(30)
        assert "failed" in panel.status.value
        assert "Caft(pair, rows=..., held_out=..., loader=...)" in panel.root.children[0].error[0]
        compile(panel.code(), "snippet", "exec")


def test_an_organism_brings_rows_plan_and_questions():
    pair = ModelPair.load("organism:em-rank1")
    data = data_of(pair, None, None, None, None, None)
    rows = data.rows()
    assert (len(rows.train), len(rows.held_out)) == (540, 60)
    assert {row.ids for row in rows.train}.isdisjoint({row.ids for row in rows.held_out})
    assert (data.plan.kind, data.plan.layers, data.base) == ("rank1", (3,), "organism:em-base")
    scope = {"pair": pair}
    exec(data.code, scope)
    assert (scope["rows"], scope["held_out"], scope["kept"]) == (
        rows.train, rows.held_out, rows.kept)  # fmt: skip
    with Caft(pair, AuditState()) as panel:
        assert "540 conversations on medicine" in data.about
        assert list(panel.known) == ["misaligned off-domain", "misaligned in-domain"]
        assert "seed=1" in panel.code()  # candidates are found in answers to other prompts
        assert "narrow KL" in panel.form.arms


def test_model_text_is_text(panel, truth):
    evil = "<img src=x onerror=alert(1)>"
    panel.state.add_direction(truth.renamed(evil))
    panel.state.caft = [evil]
    panel.rationale.value = evil
    panel.computes.value = False
    panel.go.click()
    finished(panel)
    for html in (panel.words.value, panel.snapshot_html()):
        assert "<img" not in html
        assert "&lt;img" in html


def test_everything_is_closed(pair, given):
    before = set(ipywidgets.widgets.widget._instances)
    with Caft(pair, **given) as panel:
        assert panel.snapshot_html()
    assert set(ipywidgets.widgets.widget._instances) == before
