"""The panel Lens without a browser: what it shows is what modeldiff reads, controls beside it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from modeldiff.difference_lens import KINDS, difference_lens, difference_trace
from modeldiff.directions import Direction
from modeldiff.lens_queries import read_direction, text_means, token_query
from modeldiff.logit_lens import lens_logits, logit_lens
from modeldiff.patchscope import patchscope
from modeldiff.report_text import token_text
from modeldiff_widgets import AuditState, Workbench
from modeldiff_widgets._lens_views import words_html
from modeldiff_widgets.lens import Lens
from tests.families import WIDTH
from tests.planted import LAYER, TEXTS, WORD, null_pair, planted_pair

HOSTILE = '<img src=x onerror="alert(1)"> $$x$$ \u202e'


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def some(seed, name="noise", site=f"resid_post.{LAYER}"):
    draw = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, site, name)


def made(pair, *directions) -> Any:
    state = AuditState()
    for each in directions:
        state.add_direction(each)
    panel: Any = Lens(pair, state)
    panel.texts.value = "\n".join(TEXTS)
    panel.n_random.value = 9
    panel.layer.value = LAYER
    return panel


@pytest.fixture
def panel(planted):
    with made(planted[0], some(1), planted[1].renamed("word")) as opened:
        yield opened


def finished(panel):
    assert panel.jobs.wait(60)
    assert list(panel.root.children[0].error) == ["", ""]
    return panel


def read(panel, source="direction"):
    panel.source.value = source
    panel.go.click()
    return finished(panel)


def executed(panel):
    scope = {"pair": panel.pair, "state": panel.state}
    exec(panel.code(), scope)
    return scope


def test_a_direction_is_read_beside_both_controls_and_the_snippet_gives_it(panel):
    read(panel)
    lens = panel.reading.lens
    counts = lens.tokens.groupby(["kind", "end"]).size()
    assert counts.to_dict() == {
        (kind, end): 10 * (1 if kind == "difference" else 9)
        for kind in KINDS for end in ("promoted", "suppressed")
    }  # fmt: skip
    word = panel.pair.tokenizer.convert_tokens_to_ids(WORD)
    assert lens.tokens["token_id"][0] == word
    assert lens.reach["p_random"][0] == pytest.approx(0.1)
    assert "further than every control of both kinds" in panel.words.value
    for title in ("promoted", "suppressed", "random direction 0: promoted",
                  "random difference 0: suppressed"):  # fmt: skip
        assert title in panel.words.value
    known = executed(panel)
    assert known["lens"].tokens.equals(lens.tokens)
    assert known["lens"].reach.equals(lens.reach)
    plain = logit_lens(panel.pair.sides, known["direction"], k=10, n_random=9)
    mine = lens.tokens[lens.tokens["kind"] == "difference"]
    for end in ("promoted", "suppressed"):
        got = mine[mine["end"] == end]["logit"].tolist()
        assert got == plain.of(end)["logit"].tolist()


def test_another_control_is_shown_on_demand(panel):
    read(panel)
    before = panel.words.value
    assert panel.control.max == 8
    panel.control.value = 3
    assert "random difference 3: promoted" in panel.words.value
    assert panel.words.value != before


def test_the_difference_of_the_pair_over_positions(panel, planted):
    read(panel, "difference")
    pair = panel.pair
    trace = difference_trace(pair.sides, TEXTS, layer=LAYER, n_random=9)
    want = difference_lens(pair.sides, trace, k=10)
    assert panel.reading.lens.tokens.equals(want.tokens)
    panel.position.value = 3
    known = executed(panel)
    assert known["lens"].tokens.equals(want.tokens)
    assert known["direction"].content_key == trace.direction(3).content_key
    panel.add.click()
    (name,) = [each for each in panel.state.directions if each.startswith("difference")]
    assert name == f"difference at 3, layer {LAYER}"
    assert panel.state.directions[name].cosine(planted[1]) > 0.999
    whole = difference_lens(pair.sides, trace, k=10)
    assert "may be an artefact" not in words_html(whole, 1, 0, 9)
    flagged = replace(whole, reach=whole.reach.assign(flagged=True))
    assert "may be an artefact" in words_html(flagged, 1, 0, 9)


def test_the_first_position_where_all_texts_are_alike_is_left_out_and_named(panel):
    read(panel, "difference")
    assert [at for _, at in panel.position.options] == [1, 2, 3, 4]
    assert "Left out: position 0, where all texts are alike." in panel.status.value
    known = executed(panel)
    assert known["lens"].tokens.equals(panel.reading.lens.tokens)
    assert known["trace"].alike == (0,)


def test_equal_models_have_no_difference_to_read():
    with made(null_pair("identical", 0)) as panel:
        read(panel, "difference")
        assert "The models do not differ" in panel.status.value
        assert "there are no tokens" in panel.words.value
        assert panel.ask.disabled
        assert panel.add.disabled
        assert not len(executed(panel)["lens"].tokens)
        panel.token.value = "the"
        with pytest.raises(Exception, match="do not differ"):
            panel.query()


def test_a_token_has_its_logit_and_rank_beside_the_band(panel):
    read(panel)
    panel.token.value = "the"
    panel.ask.click()
    finished(panel)
    table, direction = panel.queried[0], panel.reading.direction
    word = panel.pair.tokenizer.convert_tokens_to_ids(WORD)
    row = table[table["token_id"] == word].iloc[0]
    top = panel.reading.lens.tokens.iloc[0]
    assert row["rank"] == 0
    assert row["logit"] == pytest.approx(top["logit"], abs=1e-5)
    assert row["logit"] > row["random_high"] > row["random_low"]
    assert row["random_p"] == pytest.approx(0.02)
    assert executed(panel)["query"].equals(table)
    assert f"1 of {len(panel.pair.tokenizer):,}" in panel.answer.value
    logits = lens_logits(panel.pair.sides, direction.unit[None], "finetuned")[0]
    ends = logit_lens(panel.pair.sides, direction, k=len(logits), n_random=1).of("promoted")
    falling = logits.sort(descending=True).values.tolist()
    assert falling == pytest.approx(ends["logit"].tolist(), abs=1e-5)
    order = ends["token_id"].tolist()
    for _, each in table.iterrows():
        assert order.index(each["token_id"]) == pytest.approx(each["rank"], abs=1)  # rounding


def test_a_random_direction_stays_inside_its_bands(planted):
    pair = planted[0]
    inside, n = 0, 60
    for seed in range(n):
        row = token_query(pair.sides, some(1000 + seed), [], [50], seed=seed).iloc[0]
        inside += row["random_low"] <= row["logit"] <= row["random_high"]
    assert 50 <= inside <= n


def test_a_topic_is_found_where_it_is_and_not_elsewhere(panel):
    panel.k.value = 3
    panel.texts.value = "\n".join(t.replace("the ", "") for t in TEXTS)
    read(panel)
    panel.keywords.value = " the ,"
    panel.test.click()
    finished(panel)
    table = panel.topic[0]
    assert table["share"][0] > table["random"][0]
    assert executed(panel)["topic"].equals(table)
    assert "the: promoted" in panel.verdict.value
    panel.state.direction = "noise"
    read(panel)
    assert "the: promoted" not in panel.verdict.value
    assert "topic" not in panel.code()
    panel.keywords.value = "the"
    panel.test.click()
    finished(panel)
    assert not panel.topic[0]["relevant"][0]


def test_a_patchscope_reads_the_word(panel):
    read(panel)
    panel.scope_go.click()
    finished(panel)
    found = panel.scope[0]
    want = patchscope(panel.pair.sides, panel.reading.direction, k=10,
                      controls=panel.reading.controls)  # fmt: skip
    assert found.tokens.equals(want.tokens)
    assert executed(panel)["scope"].scales.equals(found.scales)
    for title in ("read as", "random direction", "random difference"):
        assert title in panel.scope_view.value


def test_what_was_asked_of_another_position_is_said_to_be(panel):
    read(panel, "difference")
    panel.token.value = "the"
    panel.ask.click()
    finished(panel)
    assert "Of position" not in panel.answer.value
    panel.position.value = 2
    assert "Of position 1: ask again." in panel.answer.value
    assert "token_query" not in panel.code()


def test_writes_are_read_and_other_sites_refused(panel):
    panel.state.add_direction(some(3, "write", f"mlp_out.{LAYER}"))
    read(panel)
    assert panel.reading.direction.name == "write"
    panel.scope_go.click()
    finished(panel)
    panel.state.add_direction(Direction.of(torch.ones(7), f"mlp_act.{LAYER}", "narrow"))
    panel.go.click()
    assert panel.jobs.wait(30)
    assert panel.root.children[0].error[0] != ""
    assert panel.reading.direction.name == "write"


def test_what_is_missing_is_said(planted):
    with made(planted[0]) as panel:
        assert panel.source.value == "difference"
        panel.source.value = "direction"
        panel.go.click()
        assert "the library has no direction yet" in panel.root.children[0].error[0]
        assert panel.shown_code().startswith("# the library has no direction yet")
        assert "Nothing was read" in panel.snapshot_html()
        panel.source.value = "difference"
        assert panel._of_library.layout.display == "none"
        panel.texts.value = "one text\nand another"
        panel.go.click()
        assert panel.jobs.wait(30)
        assert "the lens needs 4 or more" in panel.root.children[0].error[0]


def test_reading_can_be_cancelled(panel):
    panel.source.value = "difference"
    job = panel.read()
    job.cancel.set()
    assert panel.jobs.wait(30)
    assert job.status == "cancelled"
    assert panel.reading is None


def test_the_choice_is_the_states_and_the_other_way_round(panel):
    assert panel.direction.value == "word"
    panel.direction.value = "noise"
    assert panel.state.direction == "noise"
    panel.state.direction = "word"
    assert panel.direction.value == "word"


def test_hostile_names_and_tokens_are_inert(panel, monkeypatch):
    names = "modeldiff.logit_lens.token_names"
    monkeypatch.setattr(names, lambda tokenizer, ids: [HOSTILE for _ in ids])
    panel.state.add_direction(some(5, HOSTILE))
    read(panel)
    panel.keywords.value = "the"
    panel.test.click()
    finished(panel)
    for html in (panel.words.value, panel.snapshot_html(), panel.verdict.value):
        assert "<img" not in html
    assert "&lt;img" in panel.words.value


def test_the_helpers_agree_with_the_panel(panel):
    read(panel)
    controls = panel.reading.controls
    means = text_means(panel.pair.sides, TEXTS, panel.reading.direction)
    assert means.shape == (len(TEXTS), WIDTH)
    again = read_direction(panel.pair.sides, panel.reading.direction, controls, k=10)
    assert again.tokens.equals(panel.reading.lens.tokens)
    with Workbench(panel.pair, panels=[Lens], state=panel.state) as wb:
        wb.panels["Lens"].read()
        assert wb.jobs.wait(30)
        assert "promoted" in wb.pin()


def test_every_position_has_a_line_with_its_size_and_words(panel):
    read(panel, "difference")
    html = panel.words.value
    assert html.count("class=selected") == 1
    table = panel.reading.trace.table()
    assert f"{table['relative'][1]:.3g}" in html
    assert html.index("norm / base") < html.index("promoted")
    assert html.count(f"<td>{token_text(' the')} ") == 4  # first at every position
