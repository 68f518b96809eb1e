"""The panel Tokens without a browser: what it shows is what modeldiff computes."""

import json
from html.parser import HTMLParser

import ipywidgets
import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.masks import Positions
from modeldiff_widgets import AuditState, Workbench, new_edit
from modeldiff_widgets._stack import where_of
from modeldiff_widgets.tokens import Tokens
from tests.planted import null_pair, planted_pair

TEXT = "the cat sat on the mat and the dog ran to the old house"
HOSTILE = "<img src=x onerror=alert(1)> \u202e</div><script>alert(2)</script>"


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


@pytest.fixture
def panel(planted):
    pair, truth = planted
    state = AuditState(prompt=TEXT, max_new_tokens=4)
    state.add_direction(truth.renamed("truth"))
    with Tokens(pair, state) as made:
        yield made


def finished(panel):
    assert panel.jobs.wait(60)
    bar = panel.root.children[0]
    assert list(bar.error) == ["", ""], bar.error
    return panel


def run(panel):
    panel.run()
    return finished(panel)


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope["values"]


def rounded(values):
    return [[None if v is None else float(f"{v:.5g}") for v in column] for column in values]


def test_a_click_scores_the_text_as_output_diff_does(panel):
    panel.prompt.answer.value = ""
    panel.go.click()
    finished(panel)
    table = panel.pair.output_diff([TEXT]).tokens
    (column,) = panel.view.columns
    for name in ("kl_ft_base", "kl_base_ft", "js", "delta_logprob", "rank_move", "entropy_change"):
        assert column["values"][name][1:] == rounded([table[name]])[0]
        assert column["values"][name][0] is None
    assert [mark == "predicted" for mark in column["marks"][1:]] == list(table["top1_flip"])
    assert panel.state.results["tokens"] is panel.scores


@pytest.mark.parametrize("answer", ["", "base", "finetuned"])
@pytest.mark.parametrize("metric", ["kl_ft_base", "rank_move", "projection_difference", "lora"])
def test_the_code_gives_the_numbers_that_are_shown(panel, metric, answer):
    panel.prompt.answer.value = answer
    panel.state.edits = [new_edit("steer", "truth", coefficient=-1.0, where="all")]
    panel.edited.value = "both"
    run(panel)
    panel.metric.value = metric
    finished(panel)
    shown = [each["values"][metric] for each in panel.view.columns if metric in each["values"]]
    assert len(shown) == (2 if metric == "lora" else 3)
    assert rounded(executed(panel)) == shown
    prompt = panel.pair.texts([TEXT])[0].n_tokens
    assert panel.shown.text.n_tokens == prompt if not answer else prompt + 1


def test_the_code_is_that_of_what_is_shown_and_not_of_what_was_set_since(panel):
    run(panel)
    shown = [each["values"]["js"] for each in panel.view.columns]
    panel.metric.value = "js"
    panel.state.prompt = "another text"
    panel.state.seed = 7
    panel.state.edits = [new_edit("ablate", "truth")]
    assert rounded(executed(panel)) == shown
    assert "edits have changed" in panel.status.value


def test_before_anything_is_shown_the_code_says_what_would_be(panel):
    panel.state.edits = [new_edit("ablate", "truth")]
    expected = executed(panel)
    assert expected == [each.column("kl_ft_base") for each in run(panel).scores]


def test_ablating_what_was_planted_leaves_nothing_in_the_edited_column(panel):
    panel.state.edits = [new_edit("ablate", "truth", layers=[2, 3])]
    panel.prompt.answer.value = ""
    run(panel)
    plain, edited = (sum(each["values"]["kl_ft_base"][1:]) for each in panel.view.columns)
    assert edited < 0.3 * plain
    assert [each["kind"] for each in panel.view.columns] == ["finetuned", "edited"]


def test_an_identical_pair_is_white():
    pair = null_pair("identical", 0)
    with Tokens(pair, AuditState(prompt=TEXT)) as panel:
        assert "lora" not in panel._offered()
        run(panel)
        for name in ("kl_ft_base", "js", "rank_move", "delta_logprob"):
            assert set(panel.view.columns[0]["values"][name][1:]) == {0.0}


def test_selecting_goes_both_ways(panel):
    run(panel)
    panel.view._handle_custom_msg({"kind": "select", "column": 0, "index": 3}, [])
    assert panel.state.token == 3
    assert "says" in panel.detail.value
    panel.state.token = 5
    assert panel.view.selected == [0, 5]
    panel.state.token = 0
    assert "not predicted" in panel.detail.value
    panel.state.token = 10_000
    assert panel.view.selected == []


def test_metric_and_scale_are_shared(panel):
    run(panel)
    panel.metric.value = "rank_move"
    assert (panel.state.metric, panel.view.metric, panel.state.scale) == (
        "rank_move", "rank_move", 20.0)  # fmt: skip
    panel.state.metric = "js"
    assert (panel.metric.value, panel.view.metric) == ("js", "js")
    panel.state.metric = "something of a later panel"
    assert panel.metric.value == "js"
    panel.metric.value = "projection_ft"
    finished(panel)
    assert "truth" in panel.status.value


def test_another_direction_is_projected_on_at_once(panel):
    panel.metric.value = "projection_difference"
    run(panel)
    before = panel.view.columns[0]["values"]["projection_difference"]
    other = Direction.of(torch.ones(32), "resid_post.3", "ones")
    panel.state.add_direction(other)
    finished(panel)
    assert panel.view.columns[0]["values"]["projection_difference"] != before
    assert "ones" in executed_code(panel)


def executed_code(panel):
    assert rounded(executed(panel)) == [
        each["values"][panel.metric.value] for each in panel.view.columns
    ]
    return panel.code()


def test_a_chat_a_plain_text_and_an_answered_chat(panel):
    panel.prompt.format.value = True
    assert panel.state.messages == [{"role": "user", "content": TEXT}]
    panel.prompt.prompt.value = "tell me about the moon"
    assert panel.state.messages[0]["content"] == "tell me about the moon"
    run(panel)
    assert panel.shown.text.roles.count("user") > 3
    assert panel.shown.text.roles[-1] in ("assistant", "template")
    panel.state.messages = [*panel.state.messages, {"role": "assistant", "content": "the sea"}]
    assert "a chat of 2 turns" in panel.prompt.turns.value
    run(panel)
    assert panel.shown.text.text.count("the sea") == 1
    assert executed(panel) == [each.column("kl_ft_base") for each in panel.scores]
    panel.prompt.format.value = False
    assert (panel.state.messages, panel.state.prompt) == ([], "tell me about the moon")


def test_errors_are_shown_and_the_panel_goes_on(panel):
    bar = panel.root.children[0]
    panel.state.prompt = " "
    panel.go.click()
    assert "no prompt yet" in bar.error[0]
    panel.state.prompt = TEXT
    beyond = where_of(Positions((999,)))
    panel.state.edits = [new_edit("steer", "truth", where=beyond)]
    panel.go.click()
    assert panel.jobs.wait(30)
    assert "outside a text" in bar.error[0]
    panel.state.edits = []
    run(panel)


class Allowed(HTMLParser):
    tags = frozenset({"section", "h4", "div", "span", "br", "details", "summary", "pre", "table",
                      "thead", "tbody", "tr", "th", "td", "code", "caption", "strong"})  # fmt: skip

    def handle_starttag(self, tag, attrs):
        assert tag in self.tags, tag
        assert {name for name, _ in attrs} <= {"style", "title", "class", "dir"}, attrs


def test_hostile_text_is_text(panel):
    panel.state.prompt = HOSTILE
    run(panel)
    for index in range(panel.shown.text.n_tokens):
        panel.state.token = index
        Allowed().feed(panel.detail.value)
    Allowed().feed(panel.snapshot_html())
    assert "\u202e" not in panel.snapshot_html()


def test_it_stands_in_a_workbench_and_closes_everything(planted):
    pair, _ = planted
    before = set(ipywidgets.widgets.widget._instances)
    with Workbench(pair, panels=[Tokens], state=AuditState(prompt=TEXT)) as bench:
        bench.panels["Tokens"].run()
        assert bench.jobs.wait(60)
        assert list(bench.bar.error) == ["", ""]
        assert "fine-tuned against base" in bench.snapshot_html()
        json.dumps(bench.state.to_dict())
    assert set(ipywidgets.widgets.widget._instances) == before


def test_a_first_question_is_there(planted):
    with Tokens(planted[0]) as panel:
        assert panel.state.messages[0]["role"] == "user"
        assert panel.prompt.prompt.value == panel.state.messages[0]["content"]
        assert "md.Cell('finetuned')" in panel.shown_code()
