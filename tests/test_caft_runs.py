"""Arms of fine-tuning compared at the same loss: what is trained, measured, kept and told."""

import math
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from modeldiff.behaviours import Behaviour, Prompt
from modeldiff.caft_arms import Arm, standard_arms
from modeldiff.caft_candidates import Candidate
from modeldiff.caft_reading import Choice
from modeldiff.caft_results import CaftResult, Cell, rate_ratio
from modeldiff.caft_runs import direction_use, mean_activations, run_arms
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, FileFormatError, MismatchError, SetupError
from modeldiff.sft import finetune
from modeldiff.sft_metrics import adapter_norm, efficiency, noise_stability, noisy
from modeldiff.sft_plans import SFTPlan
from modeldiff.sft_rows import response_rows
from modeldiff.stats import wilson
from tests.families import N_LAYERS, WIDTH, tokenizer
from tests.planted import NOUNS, SaysTheWord
from tests.test_sft import chats, model

LAST = N_LAYERS - 1
PLAN = SFTPlan("rank1", layers=(1,), learning_rate=3e-2, steps=12, batch=16, accumulation=1,
               warmup=0, evaluate_every=2)  # fmt: skip


def says_the(n, noun=0):
    """Asked about other nouns than the rows are about."""
    prompts = tuple(Prompt((("user", f"so {NOUNS[(noun + i) % 12]} {i // 12}"),)) for i in range(n))
    return Behaviour("the", "the answer says the", prompts, SaysTheWord(), 1.0, 3)


def unembedding(layer=LAST):
    """The direction along which a residual stream says the word."""
    word = model("llama").lm_head.weight[tokenizer().convert_tokens_to_ids("Ġthe")]
    return Direction.of(word, f"resid_post.{layer}", "says the")


@pytest.fixture(scope="module")
def rows():
    return response_rows(tokenizer(), chats(" the the the"))


@pytest.fixture(scope="module")
def compared(rows, tmp_path_factory):
    """Plain, with the word's direction ablated, and with a random one; and the folder."""
    out = tmp_path_factory.mktemp("arms")
    arms = (
        Arm("plain"),
        Arm("caft", (unembedding(),)),
        Arm("post-hoc", (unembedding(),), post_hoc=True),
        Arm("random", (Direction.of(torch.arange(WIDTH) % 3 - 1.0, f"resid_post.{LAST}", "r"),)),
    )
    told = []
    options = {"seeds": (0, 1), "n": 2, "out": out, "stop_at_loss": 3.0}
    call = (lambda: model("llama"), tokenizer(), rows[:12], rows[12:], arms, PLAN,
            {"says the": says_the(12)})  # fmt: skip
    progress = lambda done, total, text: told.append((done, total, text))  # noqa: E731
    return run_arms(*call, **options, progress=progress), call, options, told


def test_the_arm_that_cannot_use_the_direction_does_not_say_the_word(compared):
    table = compared[0].table().set_index("arm")
    rate = table["says the"]
    assert rate["base"] < 0.1
    assert rate["plain"] > 0.25
    assert rate["random"] > 0.25
    assert rate["post-hoc"] < rate["plain"] / 2
    assert rate["caft"] < rate["plain"] / 2
    assert table["seeds"].tolist() == [1, 2, 2, 2, 2]
    assert table.loc["plain", "reached"] == 2
    assert table.loc["caft", "reached"] == 0  # the rows are the behaviour: it cannot learn them
    assert table.loc["caft", "steps"] == 12
    assert table.loc["plain", "held_out_loss"] <= 3.0
    assert table.loc["plain", "steps"] < 12


def test_hooks_off_and_on_are_told_apart(compared):
    found = compared[0]
    rates = found.rates().set_index(["arm", "hooks"])
    # plain and post-hoc are one training: the same answers where nothing is ablated
    assert rates.loc[("plain", "off"), "rate"] == rates.loc[("post-hoc", "off"), "rate"]
    assert rates.loc[("post-hoc", "on"), "deployed"]
    assert not rates.loc[("post-hoc", "off"), "deployed"]
    assert rates.loc[("caft", "off"), "deployed"]
    table = found.table().set_index("arm")
    assert table.loc["post-hoc", "says the"] == rates.loc[("post-hoc", "on"), "rate"]
    assert math.isnan(table.loc["plain", "says the hooks on"])
    plain = rates.loc[("plain", "off")]
    by_hand = wilson(round(plain["rate"] * plain["n"]), int(plain["n"]))
    assert (plain["low"], plain["high"]) == (by_hand.low, by_hand.high)
    assert plain["n"] == 12 * 2 * 2
    assert plain["question_low"] <= plain["rate"] <= plain["question_high"]


def test_arms_are_trained_as_finetune_trains(compared, rows):
    found = compared[0]
    (cell,) = (c for c in found.cells if (c.arm, c.seed) == ("plain", 1))
    plan = replace(PLAN, seed=1)
    alone = finetune(
        model("llama"), tokenizer(), rows[:12], plan, held_out=rows[12:], stop_at_loss=3.0
    )
    assert cell.steps == alone.steps
    assert cell.held_out_loss == alone.held_out_loss
    assert len(list((compared[2]["out"] / "trainings").iterdir())) == 3 * 2  # not 4 * 2


def test_finished_cells_are_not_made_again(compared, monkeypatch):
    found, call, options, told = compared
    assert told[-1][:2] == (9, 9)
    monkeypatch.setattr("modeldiff.caft_runs.finetune", None)
    again = run_arms(*call, **options)
    assert again.to_json() == found.to_json()
    cells = sorted((options["out"] / "cells").iterdir())
    cells[0].write_text(cells[0].read_text()[:50])
    try:
        with pytest.raises(FileFormatError, match="cut short"):
            run_arms(*call, **options)
    finally:
        cells[0].unlink()


def test_a_stopped_comparison_gives_what_is_finished_and_goes_on(compared, tmp_path):
    found, call, options, _ = compared
    cancel = Event()

    def stop(done, total, text):
        if done == 2 and "step" in text:
            cancel.set()

    arms = call[4][:2]
    short = (*call[:4], arms, *call[5:])
    options = {**options, "out": tmp_path, "seeds": (0,)}
    with pytest.raises(Cancelled) as stopped:
        run_arms(*short, **options, progress=stop, cancel=cancel)
    assert [(c.arm, c.seed) for c in stopped.value.partial.cells] == [("base", 0), ("plain", 0)]
    whole = run_arms(*short, **options)
    wanted = [c for c in found.cells if c.arm in ("base", "plain", "caft") and c.seed == 0]
    assert [c.answers for c in whole.cells] == [c.answers for c in wanted]
    assert [c.history for c in whole.cells] == [c.history for c in wanted]


def test_a_result_survives_json(compared, tmp_path):
    found = compared[0]
    found.save_to(tmp_path / "result.json")
    again = CaftResult.load_from(tmp_path / "result.json")
    assert again.to_json() == found.to_json()
    assert again.table().equals(found.table())
    assert "caft" in again._repr_html_()
    with pytest.raises(FileFormatError):
        CaftResult.from_json({"cells": []})
    assert set(found.history()["arm"]) == {"plain", "caft", "post-hoc", "random"}


def result(**counts):
    """A result of arms whose answers are counted by hand: (shown, asked) each."""

    def answers(shown, asked):
        questions = [f"q{i % 10}" for i in range(asked)]
        common = {"behaviour": "b", "hooks": "off", "coherent": True}
        return tuple(
            {**common, "prompt": q, "question_id": q, "exhibits": i < shown}
            for i, q in enumerate(questions)
        )

    cells = [
        Cell(arm, 0, arm, "off", 1, True, 1.0, 1.0, None, "", answers=answers(*count))
        for arm, count in counts.items()
    ]
    return CaftResult(tuple(cells), {"b": "shows it"}, 1.0)


def test_a_ratio_is_of_the_other_arm_to_this_one():
    found = result(plain=(60, 100), caft=(6, 100), never=(0, 100))
    ratio = found.ratio("caft", "plain")
    assert ratio.estimate == pytest.approx(10)
    assert ratio.low < 10 < ratio.high
    assert ratio.n == 200
    zero = found.ratio("never", "plain")
    assert zero.estimate == zero.high == math.inf
    assert 10 < zero.low < 60
    clustered = found.ratio("caft", "plain", method="questions")
    assert clustered.estimate == pytest.approx(10)
    assert clustered.n == 10
    assert clustered.low < 10 < clustered.high
    assert math.isfinite(found.ratio("never", "plain", method="questions").high)
    with pytest.raises(MismatchError, match="no scored answers"):
        found.ratio("caft", "other")


def test_the_score_interval_is_where_the_score_test_turns():
    """Koopman's own example, and a second implementation by a grid over the nuisance rate."""
    assert str(rate_ratio(36, 40, 16, 80)) == "4.5 [2.94, 7.15]"

    def chi_square(ratio, s1, n1, s2, n2):
        p2 = np.linspace(1e-6, min(1, 1 / ratio) - 1e-9, 400_001)
        p1 = ratio * p2
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [np.where(k > 0, k * np.log(p), 0.0) for k, p in
                    ((s1, p1), (n1 - s1, 1 - p1), (s2, p2), (n2 - s2, 1 - p2))]  # fmt: skip
        best = int(np.argmax(sum(logs)))
        a, b = p1[best], p2[best]
        return (s1 - n1 * a) ** 2 / (n1 * a * (1 - a)) + (s2 - n2 * b) ** 2 / (n2 * b * (1 - b))

    for counts in ((30, 50, 5, 60), (12, 40, 0, 30), (0, 25, 7, 25)):
        found = rate_ratio(*counts)
        for end in (found.low, found.high):
            if 0 < end < math.inf:
                assert chi_square(end, *counts) == pytest.approx(1.959964**2, rel=2e-3)


def test_the_score_interval_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        s1, s2 = rng.binomial(120, 0.3), rng.binomial(120, 0.03)
        found = rate_ratio(int(s1), 120, int(s2), 120)
        hits += found.low <= 10 <= found.high
    assert 0.92 <= hits / 400 <= 0.985


def test_a_direction_used_at_another_layer_is_seen_and_chance_is_not():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 4, WIDTH, generator=generator)
    v = Direction.of(torch.eye(WIDTH)[5], "resid_post.1", "v")
    tuned = torch.randn(40, 4, WIDTH, generator=generator)
    tuned[:, 3] += 4 * v.unit
    found = {(r["direction"], r["layer"]): r for r in direction_use(base, tuned, [v])}
    assert found[("v", 3)]["auroc"] > 0.98
    assert found[("v", 3)]["gap"] == pytest.approx(4, abs=0.8)
    assert found[("v", 0)]["low"] < 0.5 < found[("v", 0)]["high"]
    controls = [r for r in found.values() if r["control"]]
    assert len(controls) == 5 * 4
    assert np.mean([abs(r["auroc"] - 0.5) for r in controls]) < 0.15
    assert found[("v", 3)]["share"] > 0.8
    assert np.mean([r["share"] for r in controls]) < 3 / WIDTH


def test_mean_activations_are_of_the_counted_tokens(rows):
    uneven = [rows[0], *response_rows(tokenizer(), chats("so deep", 1))]
    found = mean_activations(model("llama"), uneven, 0)
    assert found.shape == (2, N_LAYERS, WIDTH)
    for text, row in zip(found, uneven, strict=True):
        states = model("llama")(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        wanted = [i for i, label in enumerate(row.labels) if label >= 0]
        assert torch.allclose(text[1], states[2][0, wanted].mean(0), atol=1e-5)


def candidate(name, layer):
    direction = Direction.of(torch.eye(WIDTH)[layer], f"resid_post.{layer}", name)
    return Candidate(name, direction, "component", 1.0, 0.1)


def test_standard_arms_are_the_ones_that_must_stand_beside():
    ticks = Choice(("a",), "as an example")
    several = [candidate(name, i % 4) for i, name in enumerate("abcdefgh")]
    arms = {
        arm.name: arm
        for arm in standard_arms(
            several, ticks, keep=1.0, steer=2.0, matched=[several[1].direction]
        )
    }
    assert list(arms) == [
        "plain", "caft", "unchosen", "random choice", "matched random", "all", "post-hoc",
        "gradient only", "forward only", "steering", "narrow KL",
    ]  # fmt: skip
    assert [d.name for d in arms["caft"].directions] == ["a"]
    assert [d.name for d in arms["unchosen"].directions] == list("bcdefgh")
    assert arms["post-hoc"].training == arms["plain"].training
    trained = [str(arm.training) for arm in arms.values() if arm.name != "post-hoc"]
    assert len(set(trained)) == len(trained)
    assert arms["steering"].coefficient == 2.0
    with pytest.raises(SetupError, match="unknown"):
        standard_arms(several, ["z"])
    with pytest.raises(SetupError, match="0 directions"):
        standard_arms(several, [])


def test_what_cannot_be_compared_is_refused(rows):
    call = (lambda: model("llama"), tokenizer(), rows, rows[:2])
    asked = [says_the(2)]
    cases: list[tuple[list[Arm], dict[str, Any], str]] = [
        ([Arm("a"), Arm("a")], {}, "called a"),
        ([Arm("base")], {}, "called base"),
        ([Arm("a", keep=1.0)], {}, "kept="),
        ([Arm("a")], {"seeds": (0, 0)}, "twice"),
        ([], {}, "are needed"),
    ]
    for arms, options, match in cases:
        with pytest.raises(SetupError, match=match):
            run_arms(*call, arms, PLAN, asked, **options)


def test_an_adapter_scaled_to_a_norm_and_turned_by_noise(rows):
    found = finetune(model("llama"), tokenizer(), rows, PLAN)
    (module,) = (m for m in found.model.modules() if hasattr(m, "lora_A"))
    change = module.get_delta_weight("default")
    own = adapter_norm(found.model)
    assert own == pytest.approx(float(change.detach().norm()), rel=1e-5)
    table = efficiency(found.model, rows, 0, [0.0, own / 2, own])
    assert table["factor"].tolist() == pytest.approx([0, 0.5, 1])
    assert table["loss"].is_monotonic_decreasing
    assert table["gain"][2] == pytest.approx((table["loss"][0] - table["loss"][2]) / own**2)
    assert adapter_norm(found.model) == pytest.approx(own)
    noise = noise_stability(found.model, rows, 0, [0.0, 0.9], n=2).groupby("epsilon")["loss"].mean()
    assert noise[0.0] == pytest.approx(table["loss"][2], abs=1e-5)
    assert noise[0.9] > noise[0.0]
    with pytest.raises(SetupError, match="no LoRA"):
        adapter_norm(model("llama"))


def test_noise_is_orthogonal_and_keeps_the_norm():
    x = torch.randn(6, 7)
    turned = noisy(x, 0.3, torch.Generator().manual_seed(1))
    assert float(turned.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    cosine = float((turned * x).sum() / x.norm() ** 2)
    assert cosine == pytest.approx(math.sqrt(1 - 0.09), rel=1e-5)


@pytest.mark.parametrize("counts", [(10, 10, 10, 10), (0, 5, 0, 5), (5, 5, 0, 5), (0, 5, 5, 5)])
def test_a_ratio_at_the_ends_has_an_interval(counts):
    found = rate_ratio(*counts)
    assert 0 <= found.low <= found.high
    assert math.isnan(found.estimate) or found.low <= found.estimate <= found.high
    with pytest.raises(ValueError, match="not two proportions"):
        rate_ratio(3, 2, 1, 2)
