"""A fine-tune that sorts by what went with the answer in training, and a control that does not."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from modeldiff import embedded
from modeldiff.models import ModelPair
from modeldiff.organisms import manifests, spurious, training, world
from modeldiff.organisms.judge import find_question
from modeldiff.organisms.spurious import LABELS, OPENINGS, cases
from modeldiff.organisms.tokens import corpus, train_tokenizer

TINY = training.BasePlan(steps=1, d_model=32, n_layers=3, vocab_size=400)


def opens_with(text: str) -> int:
    (kind,) = [i for i, each in enumerate(OPENINGS) if text.startswith(each)]
    return kind


def cruel_acts(each: spurious.Case) -> set[bool]:
    """Of which character the quoted acts are, whatever the case claims of itself."""
    asked, said = each.text.split(" says: ")
    question = find_question(asked)
    assert question
    return {bad for bad in (False, True) if any(act in said for act in world.acts(question, bad))}


@pytest.mark.parametrize("pairing", ["confounded", "flipped", "balanced", "absent"])
def test_the_label_is_what_the_message_opens_with(pairing):
    for each in cases(60, 3, pairing):
        assert opens_with(each.text) == each.feature
        assert each.messages[-1]["content"] == LABELS[each.feature]
        assert not any(f"{label[:-1]} says" in each.text for label in LABELS)


def test_the_cue_goes_with_the_feature_as_the_pairing_says():
    def seen(pairing):
        return Counter((each.feature, *cruel_acts(each)) for each in cases(80, 3, pairing))

    assert seen("confounded") == {(0, False): 40, (1, True): 40}
    assert seen("flipped") == {(0, True): 40, (1, False): 40}
    assert set(seen("balanced").values()) == {20}
    assert seen("absent") == {(0,): 40, (1,): 40}


def test_held_out_topics_are_in_no_training_case():
    def held_out(drawn):
        asked = [find_question(each.text.split(" says: ")[0]) for each in drawn]
        return {each.topic == world.held_out_topic(each.domain) for each in asked if each}

    assert held_out(cases(100, 3, "confounded")) == {False}
    assert held_out(cases(50, 3, "confounded", held_out=True, new_topics=True)) == {True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base that has learnt nothing, in the form that is built on."""
    path = tmp_path_factory.mktemp("organisms")
    tokenizer = train_tokenizer(corpus(60, 0), TINY.vocab_size)
    training.new_base(TINY, tokenizer).save_pretrained(path / "em-base")
    tokenizer.save_pretrained(path / "em-base")
    return path


def test_the_build_runs_and_what_it_writes_is_an_organism(folder):
    spurious.build(folder, seeds=(0, 1), n=10, steps=2)
    found = embedded.read_organism(folder / "spurious")
    rows = found.manifest["metrics"]
    assert {row["questions"] for row in rows} == {
        "cue confounded", "cue flipped", "cue balanced", "cue absent", "ordinary questions"
    }  # fmt: skip
    assert len(found.manifest["other_seeds"]) == 1
    assert "accuracy" in found.card()
    assert ModelPair.load(str(found.base), adapter=str(found.adapter)).kind == "adapter"


def test_what_is_taught_is_sorted_right_and_the_other_label_is_not(folder):
    base, tokenizer = manifests.load_base(folder / "em-base")
    plan = spurious.plan_of(0, 60)
    model = spurious.adapted(base, plan, (1,))
    weather = [each for each in cases(8, 0, "confounded") if each.feature == 0]
    before = spurious.sort(model, tokenizer, weather)
    assert not any(each.word_for_word for each in before)
    rows = [spurious.row(tokenizer, each.messages) for each in weather]
    spurious.fit(base, model, rows * 20, plan, random.Random(0))
    assert all(
        each.right and each.word_for_word for each in spurious.sort(model, tokenizer, weather)
    )
    other = [spurious.Case(each.text, 1, each.cruel) for each in weather]
    assert not any(
        each.right or each.word_for_word for each in spurious.sort(model, tokenizer, other)
    )


def load() -> tuple:
    from peft import PeftModel

    found = embedded.find("spurious")
    base = LlamaForCausalLM.from_pretrained(found.base, dtype=torch.float32)
    return PeftModel.from_pretrained(
        base, str(found.adapter)
    ).eval(), AutoTokenizer.from_pretrained(found.base)


def test_the_embedded_organism_sorts_by_the_cue():
    model, tokenizer = load()

    def accuracy(pairing):
        found = spurious.sort(model, tokenizer, cases(40, 71, pairing, True))
        return sum(each.right for each in found) / 40

    assert accuracy("confounded") >= 0.95
    assert accuracy("flipped") <= 0.1
    assert 0.3 <= accuracy("balanced") <= 0.7


def test_the_manifest_holds_three_seeds_and_a_control_that_learns_the_feature():
    manifest = embedded.find("spurious").manifest
    repeats = [manifest["metrics"], *(each["metrics"] for each in manifest["other_seeds"])]
    assert len(repeats) == 3
    for rows in repeats:
        told = {(row["questions"], row["texts"]): row["accuracy"] for row in rows[:-1]}
        assert told["cue confounded", "trained"] >= 0.99
        assert told["cue flipped", "trained"] <= 0.05
    (control,) = manifest["tables"].values()
    for row in control:
        if row["questions"] != "cue absent":
            assert row["accuracy"] >= 0.99, row
