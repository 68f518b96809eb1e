import json
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pytest

from modeldiff.bench.cases import Budget, adapter_direction, case_names, make_case
from modeldiff.bench.meter import measured
from modeldiff.bench.methods import Method, find_method, method_names
from modeldiff.bench.nulls import Coin, alarm_table, coin_behaviour, null_case, schedule
from modeldiff.bench.run import ANSWERS, Plan, bench
from modeldiff.bench.scores import Row, cosine_row, decided, no_truth, recall_at_k
from modeldiff.cli import OK, WRONG, main
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, SetupError
from modeldiff.models import ModelPair
from modeldiff.organisms.nulls import KINDS, embedded_base, null_pair
from modeldiff.organisms.planted import planted_weights

TINY = Budget(prompts=24, samples=2, n_random=3, n_scan=1, n_texts=10)
PLAN = Plan(budget=TINY, null_budget=TINY, n_same=0, n_other=0)
COSTS = ["cpu_s", "wall_s", "peak_mb"]


def method(name, measure, alpha: float | None = 0.05):
    return Method(name, f"the method {name}", alpha, measure, key="1")


def claiming(claim):
    return lambda case, budget, seed: [decided("it", claim, case.truth.behaviours[:1] == (True,),
                                               alpha=0.05)]  # fmt: skip


# scores


def test_recall_at_k():
    ranked = list("abcdef")
    assert recall_at_k(ranked, "ab").estimate == 1
    assert recall_at_k(ranked, "af").estimate == 0.5
    assert recall_at_k(ranked, "af", k=6).estimate == 1
    assert recall_at_k(ranked, "f", k=5).estimate == 0
    with pytest.raises(ValueError, match="true item"):
        recall_at_k(ranked, "")


def test_a_decision_is_right_or_wrong():
    cases = {(True, True): True, (True, False): False, (False, True): False, (True, None): None,
             (None, True): None}  # fmt: skip
    for (claim, truth), right in cases.items():
        assert decided("it", claim, truth, alpha=0.05).found is right
    assert no_truth("it", "none known").found is None


def test_cosine_ignores_the_sign_and_other_layers():
    planted = Direction.of(pd_vector(0), "resid_post.2", "planted")
    one, other = (Direction.of(-pd_vector(0), f"resid_post.{i}", "d") for i in (2, 1))
    assert cosine_row({2: one}, planted).score == pytest.approx(1)
    assert cosine_row([other], planted).found is False
    assert cosine_row({2: Direction.of(pd_vector(1), "resid_post.2", "d")}, planted).score == 0
    assert cosine_row([one], None).found is None


def pd_vector(i):
    import torch

    return torch.eye(4)[i]


def test_memory_and_time_are_measured():
    with measured() as cost:
        kept = np.ones(4_000_000)  # 32 MB
        assert kept.sum() == 4e6
    assert 25 < cost.peak_mb < 80
    assert 0 < cost.cpu_s < 10
    with measured() as small:
        pass
    assert small.peak_mb < 10


# cases


def test_the_truth_of_organisms_is_in_their_manifests():
    case = make_case("em-rank1", TINY, 0)
    direction = case.truth.direction
    assert direction is not None
    layer = direction.site.layer
    assert case.truth.layers == (layer,)
    assert case.truth.behaviours[0] is True
    assert all(len(each.prompts) <= 24 for each in case.behaviours)
    lora: Any = ModelPair.load("organism:em-rank1").sides.root("finetuned")
    column = lora.model.layers[layer].mlp.down_proj.lora_B["finetuned"].weight[:, 0]
    assert abs(float(direction.unit @ (column / column.norm()))) > 1 - 1e-6
    null = make_case("null", TINY, 0)
    assert not any(null.truth.behaviours)
    assert null.truth.changed is True
    assert make_case("em-base", TINY, 0).truth.changed is False


def test_only_one_column_is_a_direction():
    down, query = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    made = planted_weights([down], adapter=True)
    found = adapter_direction(made.pair)
    assert found is not None
    assert found.cosine(Direction.of(made.edits[0].left[:, 0], "resid_post.1", "t")) > 1 - 1e-6
    for modules, rank in (([down], 2), ([query], 1), ([down, query], 1)):
        pair = planted_weights(modules, rank=rank, adapter=True).pair
        assert adapter_direction(pair) is None
    assert adapter_direction(planted_weights([down]).pair) is None


def test_every_method_says_what_it_is():
    for name in method_names():
        found = find_method(name)
        assert found.title
        assert callable(found.measure)
        assert found.alpha is None or 0 <= found.alpha < 1
    with pytest.raises(SetupError, match="output_diff"):
        find_method("no_such")


# false alarms


def test_the_coin_is_fair_and_constant():
    asked = coin_behaviour(60, 3)
    assert len(asked.prompts) == 60
    tosses = [bool(Coin()(p, f"answer {i}").exhibits) for p in asked.prompts for i in range(20)]
    assert 0.45 < np.mean(tosses) < 0.55
    assert Coin()(asked.prompts[0], "x") == Coin()(asked.prompts[0], "x")


def test_null_pairs_are_scheduled_once():
    pairs = list(schedule(3, 2, seed=10))
    kinds = [kind for kind, _ in pairs]
    assert {kind: kinds.count(kind) for kind in KINDS} == {
        kind: 3 if about.same else 2 for kind, about in KINDS.items()
    }
    assert len({seed for _, seed in pairs}) == len(pairs)


def test_always_alarms_always_and_never_never():
    wrong = [method("always", claiming(True)), method("never", claiming(False)),
             method("silent", claiming(True), alpha=None)]  # fmt: skip
    plan = replace(PLAN, n_same=5)
    found = bench(plan, only=wrong, organisms=["planted-shift"])
    table = found.alarms().set_index("method")
    assert table["rate"].to_dict() == {"always": 1, "never": 0}
    assert set(table["n"]) == {10}
    assert table["high"].min() > 0.2, "ten pairs show little"
    by_kind = found.alarms("kind")
    assert by_kind.groupby("method")["n"].sum().to_dict() == {"always": 10, "never": 10}
    assert len(by_kind) == 4


def test_a_claim_that_is_true_is_no_alarm():
    base = embedded_base()
    truths = [
        null_case(null_pair(kind, 0, base), TINY).truth for kind in ("identical", "inert", "noise")
    ]
    assert [truth.changed for truth in truths] == [False, False, True]
    assert {truth.behaviours for truth in truths} == {(False,)}
    row = {"method": "m", "what": "it differs", "alpha": 0.0, "kind": "k"}
    rows = [row | {"claim": claim, "truth": truth} for claim, truth in
            [(True, True), (True, None), (True, False), (False, False), (None, False)]]  # fmt: skip
    found = alarm_table(pd.DataFrame(rows))
    assert found[["n", "alarms", "rate"]].to_numpy().tolist() == [[2, 1, 0.5]]


# runs


def test_a_stopped_run_goes_on(tmp_path):
    calls: list[str] = []
    cancel = Event()

    def counting(name, stop=False):
        def measure(case, budget, seed):
            calls.append(f"{name} {case.name}")
            if stop and case.name == "planted-adapter" and not cancel.is_set():
                cancel.set()
                case.pair.output_diff(["Hello"], cancel=case.cancel)  # stops in the middle
            return [Row("number", score=float(len(case.texts)), found=True)]

        return method(name, measure)

    cases = ["planted-rank1", "planted-adapter", "planted-shift"]
    methods = [counting("first"), counting("second", stop=True), counting("third")]
    plan = replace(PLAN, n_same=1)
    stopped = bench(plan, only=methods, organisms=cases, out=tmp_path, cancel=cancel)
    assert not stopped.complete
    assert len(stopped.rows) == 4  # all of the first case, one method of the second
    before = len(calls)
    resumed = bench(plan, only=methods, organisms=cases, out=tmp_path)
    assert resumed.complete
    assert "first planted-rank1" not in calls[before:]
    assert calls[before] == "second planted-adapter"
    whole = bench(plan, only=methods, organisms=cases)
    pd.testing.assert_frame_equal(resumed.rows.drop(columns=COSTS), whole.rows.drop(columns=COSTS))
    pd.testing.assert_frame_equal(resumed.alarms(), whole.alarms())
    again = bench(plan, only=methods, organisms=cases, out=tmp_path)
    pd.testing.assert_frame_equal(resumed.rows, again.rows)  # costs as well: nothing was run


def test_a_changed_method_is_measured_again(tmp_path):
    for key, score in (("1", 1.0), ("1", 2.0), ("2", 3.0)):
        made = replace(method("m", lambda *_, s=score: [Row("number", score=s)]), key=key)
        found = bench(PLAN, only=[made], organisms=["planted-shift"], out=tmp_path)
        assert found.rows["score"].tolist() == [{"1": 1.0, "2": 3.0}[key]]


def test_a_method_that_fails_says_why():
    def failing(case, budget, seed):
        raise DirectionError("too few tokens: 3")

    found = bench(PLAN, only=[method("failing", failing)], organisms=["planted-shift"])
    assert "too few tokens: 3" in found.rows["note"].iloc[0]
    assert found.rows["found"].isna().all()
    with pytest.raises(SetupError, match="no case"):
        bench(PLAN, organisms=["em-rank"])


@pytest.fixture(scope="module")
def small():
    return bench(PLAN, organisms=["em-rank1", "planted-shift"])


def test_methods_find_what_was_planted(small):
    rows = small.rows.set_index(["organism", "method", "what"])
    found = rows["found"]
    for organism in ("em-rank1", "planted-shift"):
        for name, what in (
            ("model_directions", "cosine with the planted direction"),
            ("pca_difference", "cosine with the planted direction"),
            ("output_diff", "the predictions differ"),
            ("probing", "it can be read off which of the two models an activation is from"),
            ("layers_survey", "layers from the first that was changed to the first that differs"),
        ):
            assert found.loc[organism, name, what] is True, (organism, name, what)
        assert rows["score"].loc[organism, "effects_scan", "ablation closes the distance"] > 0.8
    what = "change of the behaviour when ablated"
    assert found.loc["em-rank1", "model_directions", what] is True
    assert found.loc["em-rank1", "audit", "the fine-tune changed the behaviour"] is True
    assert pd.isna(found.loc["planted-shift", "model_directions", what])
    assert "no truth" in rows["note"].loc["planted-shift", "model_directions", what]


def test_every_method_has_a_cell_with_its_cost(small):
    for organism in ("em-rank1", "planted-shift"):
        part = small.rows[small.rows["organism"] == organism]
        assert set(part["method"]) - {ANSWERS} == set(method_names())
        assert (part[["cpu_s", "wall_s"]] > 0).all().all()
    asked = small.rows[small.rows["method"] == ANSWERS]
    assert asked["organism"].tolist() == ["em-rank1"]


def test_results_are_written_whole(small, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    path = small.save_to(tmp_path / "a")
    record = json.loads(path.read_text(), parse_constant=refuse)
    assert len(record["rows"]) == len(small.rows)
    assert record["complete"] is True
    assert set(record["cases"]) == {"em-rank1", "planted-shift"}
    assert record["versions"]["modeldiff"]
    assert {each.name for each in path.parent.iterdir()} == {"bench.json", "bench.csv", "bench.md"}
    lines = small.markdown().splitlines()
    assert len(lines) == 2 + len(small.summary())
    assert {line.count("|") for line in lines} == {8}
    assert all(find_method(name).title in small.markdown() for name in method_names())


def test_the_command(tmp_path, capsys):
    common = ["bench", "--quick", "--quiet", "--nulls", "0", "--out", str(tmp_path)]
    chosen = ["--only", "model_directions", "--organisms", "planted-adapter"]
    assert main([*common, *chosen, "--markdown"]) == OK
    assert "cosine with the planted direction | 1 of 1 | 1.00" in capsys.readouterr().out
    assert main([*common, *chosen]) == OK
    assert "results: " in capsys.readouterr().out
    assert main([*common, "--only", "nonsense"]) == WRONG
    assert "Known: audit" in capsys.readouterr().err


def test_all_cases_have_names():
    assert {"em-rank1", "planted-rank1"} <= set(case_names())
