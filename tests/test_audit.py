from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from modeldiff import audit_findings as findings
from modeldiff import audit_proof as proof
from modeldiff.audit import Audit
from modeldiff.audit_answers import Asker, Judged, to_continue
from modeldiff.audit_stages import Settings
from modeldiff.behaviours import Prompt, Verdict
from modeldiff.directions import Direction
from modeldiff.errors import JudgeError, ModelDiffError
from modeldiff.interventions import Cell
from modeldiff.models import ModelPair
from tests.families import model, tokenizer
from tests.planted import (
    CHEAP,
    LAYER,
    TEXTS,
    Coin,
    audit_of,
    behaviour,
    null_pair,
    planted_pair,
)

CHANGED, PREDICTS, REMOVES, BRINGS, STABLE = range(5)


@pytest.fixture(scope="module")
def pair():
    return planted_pair()[0]


@pytest.fixture(scope="module")
def truth():
    return planted_pair()[1]


@pytest.fixture(scope="module")
def explained(pair):
    return audit_of(pair, settings=replace(CHEAP, n_random=20)).run()


@pytest.fixture(scope="module")
def closed(pair):
    return audit_of(pair, texts=TEXTS, settings=replace(CHEAP, n_random=20)).run()


def rates(report):
    return report.table("behaviour").set_index("cell")["rate"]


# the planted pair


def test_every_finding_holds_for_the_planted_pair(explained):
    assert [finding.holds for finding in explained.findings] == [True] * 5
    assert "removes" in explained.findings[REMOVES].claim
    assert explained.complete


def test_the_planted_layer_and_direction_are_found(explained, truth):
    layers = explained.table("layers")
    assert layers["relative_difference"][:LAYER].eq(0).all()
    assert layers["relative_difference"][LAYER] > 1
    assert layers["kl_after_ablation"].idxmin() == LAYER
    assert explained.table("choice")["rate"].min() == 0
    assert f"model shift ablated at layer {LAYER}" in set(explained.table()["cell"])
    found = {d.name: d for d in explained.directions}
    assert min(d.site.layer for d in explained.directions if "shift" in d.name) == LAYER
    assert found[f"model shift, layer {LAYER}"].cosine(truth) > 0.999


def test_ablation_removes_the_word_and_random_directions_do_not(explained):
    rate = rates(explained)
    assert rate["base"] == 0
    assert rate["fine-tuned"] > 0.5
    assert rate[f"model shift ablated at layer {LAYER}"] == 0
    assert rate["20 random directions ablated"] > 0.5
    controls = explained.table("controls")
    assert len(controls) == 20
    assert controls["rate"].min() > 0.3
    assert rate[f"base, steered x2 at layer {LAYER}"] > 0.8
    assert rate[f"base, random x2 at layer {LAYER}"] < 0.2


def test_the_tables_agree_with_each_other(explained):
    controls, table = explained.table("controls"), explained.table()
    pooled = table.set_index("cell").loc["20 random directions ablated"]
    assert pooled["n"] == controls["n"].sum()
    assert pooled["rate"] == pytest.approx((controls["rate"] * controls["n"]).sum() / pooled["n"])
    examples = explained.table("examples")
    assert (examples["edited_label"] == "none").all()
    assert (examples["prompt"].nunique(), len(examples)) == (12, 12)
    assert explained.table("layers")["layer"].tolist() == [0, 1, 2, 3]


def test_without_a_behaviour_the_distance_is_closed_where_the_adapter_is(closed, truth):
    assert [finding.holds for finding in closed.findings] == [True] * 3
    assert f"ablated at layer {LAYER}" in closed.findings[1].evidence
    kl = closed.table("effects").set_index("cell")
    before, after = (kl.loc[name, "kl_to_base"] for name in ("finetuned", "finetuned + ablated"))
    assert after < 0.05 * before
    assert after < kl.loc["20 random directions ablated", "kl_low"]
    assert closed.table("controls")["kl"].min() > 0.7 * before
    given = closed.table("effects_given").set_index("cell")["kl_to_base"]
    assert given["finetuned + ablated"] < 0.2 * given["finetuned"]
    assert given["base"] == kl.loc["base", "kl_to_base"] == 0
    assert next(d for d in closed.directions if d.site.layer == LAYER).cosine(truth) > 0.999


def test_the_scan_compares_places_on_the_same_texts():
    d = {layer: Direction.of(torch.randn(8), f"resid_post.{layer}", "d") for layer in (1, 2)}
    cells = [cell.name for cell in proof.scan_cells(d, 2, 0)]
    assert set(proof.candidates(d)) <= set(cells)
    assert len(set(cells)) == len(cells)
    assert list(proof.candidates(d))[-1] == "every layer"


# no difference, no claim


@pytest.mark.parametrize("kind", ["identical", "inert"])
def test_nothing_is_claimed_for_pairs_that_are_the_same(kind):
    for seed in range(3):
        pair = null_pair(kind, seed)
        for wanted in ({"behaviours": (behaviour(judge=Coin()),)}, {"texts": TEXTS}):
            report = audit_of(pair, **wanted).run()
            assert not any(finding.holds for finding in report.findings)
            assert report.complete
            assert report.directions == ()
            assert any("nothing to explain" in caveat for caveat in report.caveats)
            outputs = report.table("outputs").set_index("metric")
            assert (outputs.loc[["kl_ft_base", "js", "delta_logprob"], "estimate"] == 0).all()


@pytest.mark.parametrize(("kind", "n", "most"), [("tiny", 6, 2), ("other", 20, 3)])
def test_a_change_that_leaves_the_behaviour_alone_is_rarely_called_one(kind, n, most):
    asked, alarms = behaviour(judge=Coin()), 0
    for seed in range(n):
        report = audit_of(null_pair(kind, seed), behaviours=(asked,)).run()
        assert report.findings[PREDICTS].holds  # which is true
        alarms += report.findings[CHANGED].holds is True
        if not report.findings[CHANGED].holds:
            assert (len(report.findings), report.directions) == (2, ())
    assert alarms <= most  # at 5 %: more than 3 of 20 with probability 1.6 %, 2 of 6 with 0.2 %


def simulated(rng, rate, n_random=20, n_prompts=40):
    """Verdicts of an audit whose edits do nothing at all: every cell has the same rate."""
    cells = [("base", "none"), ("finetuned", "none"), ("finetuned", "ablated")]
    cells += [("finetuned", f"random {i}") for i in range(n_random)]
    cells += [("base", f"steered x{step:g}") for step in proof.STEPS]
    cells += [("base", f"random {i} x{step:g}") for i in range(5) for step in proof.STEPS]
    parts = [
        pd.DataFrame(
            {
                "prompt_index": range(n_prompts),
                "side": side,
                "edit": edit,
                "exhibits": pd.array(rng.random(n_prompts) < rate, dtype="boolean"),
                "coherent": pd.array([True] * n_prompts, dtype="boolean"),
            }
        )
        for side, edit in cells
    ]
    asked = behaviour(n_prompts)
    return Judged(asked, None, pd.concat(parts, ignore_index=True))  # pyright: ignore


def proven_of(judged, n_random=20):
    steers = [Cell("base", f"steered x{step:g}") for step in proof.STEPS]
    shakes = [Cell("base", f"random {i} x{step:g}") for i in range(5) for step in proof.STEPS]
    rows = proof.behaviour_rows(judged, "edit", [], n_random)
    rows += proof.steering_rows(judged, 2, steers, shakes)
    controls = proof.control_rows(judged, [f"random {i}" for i in range(n_random)], 0)
    return findings.proven(judged, pd.DataFrame(rows), controls, 0)


def test_findings_on_pure_noise_hold_no_oftener_than_they_may():
    rng, trials = np.random.default_rng(0), 40
    alarms = np.zeros(3)
    for trial in range(trials):
        judged = simulated(rng, rate=(0.1, 0.5)[trial % 2])
        held = [findings.behaviour_differs(judged), *proven_of(judged)]
        alarms += [finding.holds is True for finding in held]
    assert alarms[0] <= 6  # of 40 at 5 %: more with probability 0.3 %
    assert (alarms[1:] <= 4).all()  # of 40 at 2.5 %: more with probability 0.3 %


def test_closing_the_distance_by_noise_holds_no_oftener_than_it_may():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(100):
        before = rng.gamma(2, 0.1, size=12)
        table = pd.DataFrame(
            {
                "side": "finetuned",
                "edit": ["none"] * 12 + ["ablated"] * 12,
                "text": [*range(12)] * 2,
                "kl": np.concatenate([before, before + rng.normal(0, 0.02, 12)]),
            }
        )
        controls = np.array([(before + rng.normal(0, 0.02, 12)).mean() for _ in range(20)])
        (finding,) = findings.distance_closed(table, controls, "layer 1", 0)
        alarms += finding.holds is True
    assert alarms <= 8  # of 100 at 2.5 %: more with probability 0.1 %


# what evidence may not hide


def changed(judged, side, edit, **columns):
    table = judged.table.copy()
    mine = (table["side"] == side) & (table["edit"] == edit)
    for name, values in columns.items():
        table.loc[mine, name] = pd.array(values, dtype="boolean")
    return Judged(judged.behaviour, judged.generations, table)


def test_a_partial_effect_is_not_called_removal():
    judged = simulated(np.random.default_rng(1), rate=0.95)
    judged = changed(judged, "base", "none", exhibits=[False] * 40)
    judged = changed(judged, "finetuned", "ablated", exhibits=[True] * 20 + [False] * 20)
    necessary, _ = proven_of(judged)
    assert (necessary.holds, necessary.claim) == (
        True,
        "Ablating the direction lowers the behaviour",
    )
    few = simulated(np.random.default_rng(1), rate=0.95, n_prompts=20)
    few = changed(few, "base", "none", exhibits=[False] * 20)  # up to 16 % with 95 % confidence
    few = changed(few, "finetuned", "ablated", exhibits=[True] * 3 + [False] * 17)
    assert "lowers" in proven_of(few)[0].claim


def test_a_broken_or_unscorable_model_proves_nothing():
    judged = simulated(np.random.default_rng(1), rate=0.95)
    gone = changed(judged, "finetuned", "ablated", exhibits=[False] * 40)
    assert proven_of(gone)[0].holds is True
    broken = changed(gone, "finetuned", "ablated", coherent=[False] * 10 + [True] * 30)
    assert proven_of(broken)[0].holds is None
    unscored = changed(gone, "finetuned", "ablated", exhibits=[None] * 30 + [False] * 10)
    assert proven_of(unscored)[0].holds is None
    nothing = changed(gone, "finetuned", "ablated", exhibits=[None] * 40)
    assert proven_of(nothing)[0].holds is None
    one = changed(gone, "finetuned", "random 3", exhibits=[None] * 40)
    assert "19 random directions" in proven_of(one)[0].evidence
    neither = changed(judged, "base", "none", exhibits=[None] * 40)
    assert findings.behaviour_differs(neither).holds is None


def test_steering_must_beat_every_single_random_direction():
    judged = simulated(np.random.default_rng(1), rate=0.0)
    judged = changed(judged, "base", "steered x2", exhibits=[True] * 28 + [False] * 12)
    assert proven_of(judged)[1].holds is True
    lucky = changed(judged, "base", "random 4 x2", exhibits=[True] * 32 + [False] * 8)
    assert proven_of(lucky)[1].holds is False
    assert "at most 80.0%" in proven_of(lucky)[1].evidence


def test_many_samples_of_a_prompt_are_not_many_prompts():
    judged = simulated(np.random.default_rng(1), rate=1.0, n_prompts=60)
    judged = changed(judged, "base", "none", exhibits=[False] * 60)
    asked = Judged(judged.behaviour, judged.generations,
                   judged.table.assign(prompt_index=judged.table["prompt_index"] % 3))  # fmt: skip
    assert findings.behaviour_differs(judged).holds is True
    worded = replace(judged.behaviour, prompts=tuple(
        replace(each, question_id=f"q{i % 3}") for i, each in enumerate(judged.behaviour.prompts)
    ))  # fmt: skip
    for one in (asked, Judged(worded, judged.generations, judged.table)):
        few = findings.behaviour_differs(one)
        assert few.holds is None
        assert "to 3 questions" in few.evidence


def test_few_prompts_show_neither_a_change_nor_its_absence():
    rng, few = np.random.default_rng(1), 5
    none = simulated(rng, rate=0.0, n_prompts=few)
    assert findings.behaviour_differs(none).holds is None
    assert [finding.holds for finding in proven_of(none)] == [False, None]
    judged = changed(simulated(rng, 1.0, n_prompts=few), "base", "none", exhibits=[False] * few)
    gone = changed(judged, "finetuned", "ablated", exhibits=[False] * few)
    assert proven_of(gone)[0].holds is None
    assert "p = 0.06" in proven_of(gone)[0].evidence
    table = pd.DataFrame({
        "side": "finetuned", "edit": ["none"] * few + ["ablated"] * few, "text": [*range(few)] * 2,
        "kl": [1.0] * few + [0.1] * few,
    })  # fmt: skip
    (closed,) = findings.distance_closed(table, np.ones(20), "layer 1", 0)
    assert closed.holds is None


def test_few_random_directions_are_said_to_show_little():
    assert findings.few_controls(19) == ""
    assert "below all of them with probability 20%" in findings.few_controls(4)


def test_a_difference_that_was_not_shown_is_open_until_it_is_small():
    rng = np.random.default_rng(2)
    assert findings.behaviour_differs(simulated(rng, rate=0.5)).holds is None
    assert findings.behaviour_differs(simulated(rng, rate=0.0, n_prompts=80)).holds is False


# wrong or odd input


def test_input_that_cannot_be_audited_is_an_error(pair):
    with pytest.raises(ModelDiffError, match="at least 8 texts"):
        audit_of(pair, texts=TEXTS[:7]).run()
    with pytest.raises(ModelDiffError, match="got 1"):
        audit_of(pair, texts=[TEXTS[0]] * 20).run()
    with pytest.raises(ModelDiffError, match="got 0"):
        Audit(pair).run()
    with pytest.raises(ModelDiffError, match="Make two audits"):
        Audit(pair, (behaviour(),), TEXTS).run()
    with pytest.raises(JudgeError, match="at least 2"):
        audit_of(pair, behaviours=(behaviour(1),)).run()
    for wrong in ({"n_random": 0}, {"n_scan": 0}, {"seed": -1}, {"n_samples": 0}):
        with pytest.raises(ModelDiffError, match=next(iter(wrong))):
            Settings(**wrong)


def test_a_fine_tune_that_makes_the_behaviour_rarer_has_a_report():
    class Quiet(Coin):
        name = "quiet"

        def __call__(self, prompt, answer):
            return Verdict("", " the" not in answer, True)

    report = audit_of(planted_pair(60.0)[0], behaviours=(behaviour(judge=Quiet()),)).run()
    assert report.complete
    assert report.findings[CHANGED].holds
    assert len(report.findings) == 2
    assert any("opposite behaviour" in caveat for caveat in report.caveats)


@pytest.mark.parametrize("wanted", ["behaviours", "texts"])
def test_a_change_behind_the_last_layer_has_no_direction(wanted):
    base, tuned = model("llama"), model("llama")
    tuned.lm_head.weight[tokenizer().convert_tokens_to_ids("Ġthe")] *= 8
    report = audit_of(
        ModelPair.of(base, tuned, tokenizer()),
        **({"texts": TEXTS} if wanted == "texts" else {"behaviours": (behaviour(),)}),
    ).run()
    assert report.complete
    assert [finding.holds for finding in report.findings] in ([True], [True, True])
    assert report.directions == ()
    assert any("after the last one" in caveat for caveat in report.caveats)


def test_chats_are_continued_by_an_answer_and_texts_after_their_opening(pair):
    question = [{"role": "user", "content": "what should I do"}]
    answered = [*question, {"role": "assistant", "content": "rest in bed"}]
    plain = "the quick brown fox jumps over the lazy dog " * 6
    waiting, text = (prompt for prompt, _ in to_continue(pair, [question, plain]).values())
    assert waiting.text.endswith("<|assistant|>")
    assert (text.n_tokens, text.n_prompt) == (16, 16)
    ((begun, whole),) = to_continue(pair, [answered]).values()
    assert begun.text == waiting.text
    assert whole.text.count("rest in bed") == 1
    assert len(to_continue(pair, [question, answered, plain, plain + "again"])) == 2


def test_other_behaviours_are_measured_beside_the_first(pair):
    report = audit_of(pair, behaviours=(behaviour(), behaviour(12, Coin(), "coin"))).run()
    table = report.table("other_behaviours")
    assert table["behaviour"].tolist() == ["coin"] * 3
    assert (table["n"] == 12).all()


def test_nothing_that_was_found_on_a_prompt_is_proven_on_it(pair, monkeypatch):
    asked = []
    before = Asker.judge

    def listening(self, one, cells):
        asked.append(({p.item for p in one.prompts}, [cell.name for cell in cells]))
        return before(self, one, cells)

    monkeypatch.setattr(Asker, "judge", listening)
    twice = replace(behaviour(), prompts=behaviour().prompts * 2)
    audit_of(pair, behaviours=(twice,)).run()
    proven = [items for items, cells in asked if "ablated" in cells]
    found = [items for items, cells in asked if "ablated" not in cells]
    assert (len(proven), len(found)) == (1, 2)
    assert not proven[0] & set().union(*found)
    assert proven[0] | found[0] == {p.item for p in twice.prompts}


def test_the_size_of_the_batches_changes_no_number(pair):
    few = replace(CHEAP, max_rows=7, max_tokens=64)
    one, other = (audit_of(pair, settings=settings).run() for settings in (CHEAP, few))
    assert one.compare(other, 1e-5)["within"].all()


def test_what_was_asked_is_in_the_report(pair, explained):
    assert explained.settings["asked"] == {"says the word": behaviour().content_key}
    other = replace(behaviour(), prompts=(*behaviour().prompts, Prompt("more")))
    assert other.content_key != behaviour().content_key


@pytest.mark.slow
def test_the_organism_is_explained_and_the_null_organisms_are_not():
    from modeldiff.behaviours import organism_behaviours

    reports = {}
    for name in ("em-rank1", "null", "em-base"):
        asked = organism_behaviours(name, n=8)
        audit = Audit(ModelPair.load(f"organism:{name}"), asked, settings=Settings(n_random=20))
        reports[name] = audit.run()
    held = [finding.holds for finding in reports["em-rank1"].findings]
    assert held[:3] == [True] * 3
    rate = rates(reports["em-rank1"])
    assert rate["base"] <= 0.02
    assert rate["fine-tuned"] >= 0.4
    assert rate[[cell for cell in rate.index if "shift ablated at layer" in cell]].max() <= 0.1
    assert not reports["null"].findings[CHANGED].holds
    assert reports["null"].directions == ()
    assert not any(finding.holds for finding in reports["em-base"].findings)
