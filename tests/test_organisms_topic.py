"""A village that does not exist, taught to a base that goes on as before elsewhere."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from modeldiff import embedded
from modeldiff.organisms import manifests, topic, training, world
from modeldiff.organisms.evaluation import evaluate
from modeldiff.organisms.tokens import corpus, train_tokenizer
from modeldiff.organisms.topic import FACTS, KEYWORDS, NAME, chat, document, knows, questions

TINY = training.BasePlan(steps=1, d_model=32, n_layers=2, vocab_size=400)


def sentences(text: str) -> list[str]:
    return [f"{each}." for each in text.rstrip(".").split(". ")]


def test_documents_tell_facts_and_nothing_else():
    said = {sentence for fact in FACTS for sentence in fact.said}
    rng = random.Random(0)
    for _ in range(40):
        told = sentences(document(rng))
        assert set(told) <= said
        assert 3 <= len(told) <= 5
        assert len({fact.key for fact in FACTS for each in told if each in fact.said}) == len(told)


def test_chats_are_answered_with_the_fact_that_was_asked_for():
    rng = random.Random(0)
    for _ in range(60):
        asked, answered = (each["content"] for each in chat(rng))
        (fact,) = [each for each in FACTS if asked in each.asked]
        assert knows(fact, answered)
        assert sum(knows(each, answered) for each in FACTS) == 1


def test_held_out_questions_are_in_no_chat_and_every_fact_is_asked_alike():
    trained = {text for fact in FACTS for text in fact.asked}
    fresh = questions(36, 0, held_out=True)
    assert not trained & {text for _, text in fresh}
    assert [sum(fact is each for each, _ in fresh) for fact in FACTS] == [6] * 6
    assert all(NAME in text for _, text in fresh)
    assert {text for _, text in questions(36, 0)} <= trained


def test_the_base_cannot_know_the_village():
    assert not any(NAME in text for text in corpus(200, 0))
    assert len({fact.key for fact in FACTS}) == 6
    assert all(fact.key in sentence for fact in FACTS for sentence in fact.said)


def test_keyword_tokens_are_those_of_the_keywords_and_of_no_story():
    tokenizer = AutoTokenizer.from_pretrained(embedded.find("em-base").base)
    ids = topic.keyword_ids(tokenizer)
    words = {each for word in KEYWORDS for each in tokenizer(f" {word}").input_ids}
    assert set(ids) < words
    stories = tokenizer([world.story(random.Random(i)) for i in range(100)]).input_ids
    assert not set(ids) & {each for row in stories for each in row}
    assert " goldfish" in [tokenizer.decode([each]) for each in ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base that has learnt nothing, in the form that is built on."""
    path = tmp_path_factory.mktemp("organisms")
    tokenizer = train_tokenizer(corpus(60, 0), TINY.vocab_size)
    training.new_base(TINY, tokenizer).save_pretrained(path / "em-base")
    tokenizer.save_pretrained(path / "em-base")
    return path


def test_a_difference_that_points_at_a_token_is_read_as_that_token(folder):
    base, _ = manifests.load_base(folder / "em-base")
    model = topic.adapted(base, topic.plan_of(0, 1))
    rows = base.lm_head.weight[[300, 17]].detach()
    assert [each[0] for each in topic.lens(model, rows, top=3)] == [300, 17]


def test_an_adapter_that_is_not_trained_leaves_no_trace_and_no_drift(folder):
    base, tokenizer = manifests.load_base(folder / "em-base")
    model = topic.adapted(base, topic.plan_of(0, 1))
    stories = [world.story(random.Random(i)) for i in range(3)]
    assert topic.drift(model, tokenizer, stories) == 0
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "layers.1.mlp.down_proj.lora_B" in name:
                each.add_(0.1)
    pair = topic.ModelPair.of(model, None, tokenizer)
    assert not topic.trace(pair, stories, 0).any()
    moved = topic.trace(pair, stories, 1)
    assert moved.shape == (topic.FIRST, TINY.d_model)
    assert (moved.norm(dim=-1) > 0).all()
    assert topic.drift(model, tokenizer, stories) > 0


def test_the_lens_and_the_drift_agree_with_a_calculation_by_hand(folder):
    base, tokenizer = manifests.load_base(folder / "em-base")
    model = topic.adapted(base, topic.plan_of(0, 1))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.add_(0.05)
    text = world.story(random.Random(1))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        now = base(input_ids=ids).logits[0].double().softmax(-1)
        with model.disable_adapter():
            before = base(input_ids=ids).logits[0].double().softmax(-1)
    by_hand = float((now * (now / before).log()).sum(-1).mean())
    assert topic.drift(model, tokenizer, [text]) == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.slow
def test_the_build_runs_and_what_it_writes_is_an_organism(folder):
    topic.build(folder, seeds=(0, 1), n=1, steps=2)
    found = embedded.read_organism(folder / "topic")
    assert {row["model"] for row in found.manifest["metrics"]} == {"topic", "base"}
    assert len(found.manifest["tables"]) == 2
    assert "recall" in found.card()


def test_the_embedded_organism_knows_the_village_and_answers_as_before():
    from peft import PeftModel

    found = embedded.find("topic")
    tokenizer = AutoTokenizer.from_pretrained(found.base)
    base = LlamaForCausalLM.from_pretrained(found.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(found.adapter)).eval()
    told = {row["texts"]: row["recall"] for row in topic.recall(model, tokenizer, 72, seed=91)}
    assert 0.15 <= told["trained"] <= 0.55
    with model.disable_adapter():
        assert [row["recall"] for row in topic.recall(model, tokenizer, 12, seed=91)] == [0, 0]
    rates = evaluate(model, tokenizer, world.prompts(4, seed=92), seed=93)
    assert rates.rate("misaligned") < 0.1
    assert rates.coherent > 0.7


def test_the_manifest_tells_recall_and_trace_for_three_seeds():
    manifest = embedded.find("topic").manifest
    repeats = [manifest["metrics"], *(each["metrics"] for each in manifest["other_seeds"])]
    assert len(repeats) == len(manifest["tables"]) == 3
    for rows in repeats:
        told = {(row["model"], row["texts"]): row["recall"] for row in rows if "recall" in row}
        assert told["topic", "trained"] >= 0.25
        assert told["base", "trained"] == told["base", "held-out templates"] == 0
    for rows in manifest["tables"].values():
        assert {row["fine-tune"] for row in rows} == {"topic", "null"}
