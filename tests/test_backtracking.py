"""Backtracking: a feature of the base that the fine-tune alone reads is found and proved.

The twin is made by hand: ten characters before each sentence that opens with "Wait" stands a mark
at which the base writes u, which nothing reads; the fine-tune's last change is that it reads u and
writes what the unembedding takes for "W".
"""

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from modeldiff.backtracking import (
    Window,
    base_texts,
    for_base,
    window_directions,
    windows_before,
)
from modeldiff.backtracking_scan import cue_probe, cue_tokens, equal_length, probe_grid, window_scan
from modeldiff.backtracking_text import (
    base_perplexity,
    choose_coefficient,
    cue_rate,
    distinct_trigrams,
    held_out_grid,
    repetition,
    steering_grid,
)
from modeldiff.behaviours import Behaviour, Prompt, Verdict
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, JudgeError, MaskError, MismatchError
from modeldiff.interventions import Steer
from modeldiff.models import ModelPair
from modeldiff.organisms import backtrack, steps
from modeldiff.organisms.planted import tiny_llama
from modeldiff.sites import Site
from modeldiff.thinking_spans import cue_sentences, sentences_after
from modeldiff.tokens import Completion, render, with_response

WIDTH, SIZE, LAYER, OFFSET = 128, 16.0, 1, -10
LENGTH = 5.0
"""Of what is steered with: twice the other activations', and enough to be read."""
AT = Site("resid_post", LAYER)


@torch.no_grad()
def make_twin():
    made: Any = tiny_llama(0, n_layers=3, d_model=WIDTH, hidden_act="relu6", mlp_bias=True)
    base, tokenizer = made
    u, w = torch.linalg.qr(
        torch.randn(WIDTH - 1, 2, generator=torch.Generator().manual_seed(1))
    ).Q.T
    u, w = (torch.cat([torch.zeros(1), each]) for each in (u, w))
    for layer in base.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj,
                       layer.mlp.down_proj):  # fmt: skip
            module.weight.zero_()
    for rows in (base.model.embed_tokens.weight, base.lm_head.weight):
        rows -= torch.outer(rows @ u, u) + torch.outer(rows @ w, w)
        rows[:, 0] = 0.0
    base.lm_head.weight *= 0.05
    mark, cue = (tokenizer(c, add_special_tokens=False).input_ids[0] for c in "~W")
    base.model.embed_tokens.weight[mark, 0] = 1.0
    base.lm_head.weight[cue] += 0.7 * w
    writes, reads = base.model.layers[LAYER].mlp, base.model.layers[LAYER + 1].mlp
    writes.gate_proj.weight[0, 0] = 1e4
    reads.gate_proj.weight[1] = u
    reads.gate_proj.bias[1] = -8.0
    for neuron, mlp in enumerate((writes, reads)):
        mlp.up_proj.bias[neuron] = 1 / 6
    writes.down_proj.weight[:, 0] = SIZE * u
    tuned = copy.deepcopy(base)
    tuned.model.layers[LAYER + 1].mlp.down_proj.weight[:, 1] = 60 * w
    pair = ModelPair.of(base, tuned, tokenizer, allow_identical=True)  # without marks they are
    return pair, Direction.of(SIZE * u, AT, "u")


def chain(rng, n=6, planted=True):
    """Sentences of letters; before the "Wait" ones, or anywhere, a mark ten characters earlier."""
    said = ["".join(rng.choices("abcdefgh", k=rng.randint(17, 24))) + "." for _ in range(n)]
    opens = [rng.random() < 0.3 for _ in said]
    marked = opens if planted else [rng.random() < 0.3 for _ in said]
    for i in range(1, n):
        if marked[i]:
            at = len(said[i - 1]) + 1 + OFFSET
            said[i - 1] = said[i - 1][:at] + "~" + said[i - 1][at + 1 :]
        if opens[i]:
            said[i] = "Wait, " + said[i]
    return " ".join(said)


def texts_of(pair, seed, n=24, **options):
    rng = random.Random(seed)
    return tuple(render(pair.tokenizer, Completion("Q: ", chain(rng, **options))) for _ in range(n))


@pytest.fixture(scope="module")
def twin():
    return make_twin()


@pytest.fixture(scope="module")
def pair(twin):
    return twin[0]


@pytest.fixture(scope="module")
def texts(pair):
    return texts_of(pair, 0)


@pytest.fixture(scope="module")
def sentences(texts):
    return cue_sentences(texts)


@pytest.fixture(scope="module")
def probe(pair):
    others = texts_of(pair, 1, n=5)
    return cue_probe(pair, others, cue_sentences(others), words=["w"])


def test_the_bases_direction_is_the_planted_one_and_moves_the_fine_tune_alone(
    twin, pair, texts, sentences, probe
):
    found = window_directions(pair, texts, sentences, AT)
    base, tuned = found.base[AT], found.finetuned[AT]
    assert base.cosine(twin[1]) > 0.95
    assert tuned.cosine(twin[1]) > 0.95
    assert base.split_half is not None
    assert base.split_half > 0.9
    assert tuned.text_null == pytest.approx(1.0)
    assert found.n_windows == sum(each.label == "backtracking" for each in sentences)
    assert base.n_tokens == 6 * found.n_windows
    vectors = equal_length({"base": base, "finetuned": tuned}, LENGTH)
    grid: Any = probe_grid(pair, probe, vectors, [1.0], n_random=4).set_index(
        ["vector", "side", "coefficient"]
    )
    for vector in vectors:
        assert grid.loc[(vector, "finetuned", 1.0), "ratio"] > 5
        assert 1 / 1.2 < grid.loc[(vector, "base", 1.0), "ratio"] < 1.2
        steered = grid.loc[(vector, "finetuned", 1.0)]
        assert steered["low"] > 2 * steered["random_high"]


def test_the_scan_peaks_where_it_was_planted_and_shuffled_labels_do_nothing(
    pair, texts, sentences, probe
):
    windows = [(k, k) for k in range(OFFSET - 1, OFFSET + 2)]
    scan: Any = window_scan(
        pair, texts, sentences, windows, probe, AT, n_shuffled=5, length=LENGTH, seed=1
    ).set_index("first")
    assert scan.attrs["peak"] == (OFFSET, OFFSET)
    assert scan.loc[OFFSET, "outside"]
    plain = scan.attrs["plain"]["finetuned"]
    assert scan.loc[OFFSET, "finetuned"] > 5 * plain
    assert scan.loc[OFFSET, "raw_length"] == pytest.approx(SIZE * 0.75, rel=0.1)
    assert scan["finetuned"].drop(OFFSET).max() < 0.2 * scan.loc[OFFSET, "finetuned"]
    assert scan["base"].max() < 1.2 * scan.attrs["plain"]["base"]
    noise = [
        float(probe(pair, "finetuned", Steer(each)).mean())
        for each in random_like(
            Direction.of(torch.ones(WIDTH) * LENGTH / WIDTH**0.5, AT, "x"), 6, seed=0
        )
    ]
    assert scan.loc[OFFSET, "shuffled_high"] <= max(noise) < 0.5 * scan.loc[OFFSET, "finetuned"]


def test_marks_that_have_nothing_to_do_with_the_label_are_not_found(pair, probe):
    texts = texts_of(pair, 5, planted=False)
    scan = window_scan(pair, texts, cue_sentences(texts), [(OFFSET, OFFSET)], probe, AT,
                       n_shuffled=9, length=LENGTH)  # fmt: skip
    assert not scan["outside"].any()
    assert scan["shuffled_high"].max() > 5 * scan.attrs["plain"]["finetuned"]  # by chance, it does


@pytest.mark.parametrize("edges", ["drop", "clip"])
def test_directions_are_those_of_a_plain_loop(pair, texts, sentences, edges):
    """Against a second implementation, on rows captured at once."""
    texts, sentences = texts[:8], [each for each in sentences if each.text < 8]
    window = (-6, -3)
    found = window_directions(pair, texts, sentences, AT, window=window, edges=edges)
    acts = pair.capture(texts, AT, skip_first=0)
    sizes = [text.n_tokens for text in texts]
    starts = [sum(sizes[:i]) for i in range(len(texts))]
    rows, labels, short = [], [], 0
    for each in sentences:
        first, stop = each.first + window[0], each.first + window[1] + 1
        cut = slice(max(first, 1), max(stop, 0))
        short += first < 1
        if first >= 1 or (edges == "clip" and cut.start < cut.stop):
            offset = starts[each.text]
            rows.append(acts.base[AT][offset + cut.start : offset + cut.stop].double().mean(0))
            labels.append(each.label)
    mine = torch.tensor([label == "backtracking" for label in labels])
    truth = torch.stack(rows)[mine].mean(0) - torch.stack(rows).mean(0)
    assert torch.allclose(found.base[AT].vector.double(), truth, atol=1e-5)
    assert short > 0
    assert found.n_all == len(rows)
    assert found.n_clipped + found.n_dropped == short
    small = window_directions(pair, texts, sentences, AT, window=window, edges=edges, max_tokens=99)
    assert torch.allclose(small.base[AT].unit, found.base[AT].unit, atol=1e-6)


def test_windows_outside_a_text_are_dropped(texts, sentences):
    first, last = sentences[0], [each for each in sentences if each.text == 0][-1]
    kept = windows_before(texts, [first, last], (1, 200), edges="clip")
    assert kept == [Window(0, each.first + 1, texts[0].n_tokens) for each in (first, last)]
    assert windows_before(texts, [first], (-99, -90), edges="clip") == [None]
    with pytest.raises(MaskError, match="first and last"):
        windows_before(texts, [first], (-8, -13))


def test_a_label_without_windows_has_no_direction(pair, texts, sentences):
    with pytest.raises(DirectionError, match="no window before a sentence labelled backtracking"):
        window_directions(pair, texts, sentences, AT, window=(-900, -899))
    with pytest.raises(DirectionError, match="labelled daydreaming"):
        window_directions(pair, texts, sentences, AT, label="daydreaming")


def test_the_base_reads_other_tokens_where_it_lacks_some(pair, texts, sentences):
    mark, other, comma = (
        pair.tokenizer(c, add_special_tokens=False).input_ids[0] for c in "~x,"
    )  # fmt: skip
    n = sum(each == mark for text in texts for each in text.ids)
    found = window_directions(pair, texts, sentences, AT, table={mark: other}, lacks=[mark])
    plain = window_directions(pair, texts, sentences, AT)
    assert found.n_replaced == n > 20
    assert found.finetuned[AT].content_key == plain.finetuned[AT].content_key
    assert found.base[AT].scale < 0.3 * plain.base[AT].scale
    read, _ = for_base(texts[0], {(mark,): (other,), (comma, mark): (other, other)})
    assert [a for a, b in zip(read.ids, texts[0].ids, strict=True) if a != b] == [other] * (
        texts[0].ids.count(mark)
    )
    assert read.offsets == texts[0].offsets
    uneven: Any = ({mark: (other, other)}, {(): ()})
    for table in uneven:
        with pytest.raises(MismatchError, match="same number"):
            for_base(texts[0], table)
    with pytest.raises(MismatchError, match="the base lacks"):
        window_directions(pair, texts, sentences, AT, lacks=[mark])
    with pytest.raises(MismatchError, match="the base lacks"):
        base_texts(pair.sides, [replace(texts[0], ids=(9999, *texts[0].ids[1:]))], {})


def test_a_probe_reads_the_next_tokens_probability(pair, probe):
    p = probe(pair, "finetuned")
    text, position = probe.places[3]
    logits = pair.run([probe.texts[text]], side="finetuned").logits
    truth = float(logits[0, position].softmax(-1)[list(probe.token_ids)].sum())
    assert float(p[3]) == pytest.approx(truth, abs=1e-6)
    assert torch.allclose(p, probe(pair, "finetuned", max_tokens=1), atol=1e-6)
    first, second = probe.split(0)
    assert {*first.places} | {*second.places} == {*probe.places}
    assert not {t for t, _ in first.places} & {t for t, _ in second.places}


def test_a_cue_that_is_no_token_is_refused(pair):
    with pytest.raises(MaskError, match="one token"):
        cue_tokens(pair, ["wait"])
    assert len(cue_tokens(pair, ["w"])) == 2


def test_counts_are_of_whole_words():
    assert cue_rate("Wait, wait. Hmm... the waiter awaits.") == pytest.approx(100 * 3 / 6)
    assert cue_rate("No word of it at all.") == 0
    assert math.isnan(cue_rate(" "))
    assert repetition("wait wait wait wait") == distinct_trigrams("a b c d e") == 1
    assert distinct_trigrams("wait " * 52) == pytest.approx(0.02)


class AnyJudge:
    """Every answer shows it, and reads as text while it has two words or more."""

    name = "any"

    def __call__(self, prompt, answer):
        return Verdict("any", True, len(answer.split()) > 1)


def behaviour(n=4, max_new_tokens=8):
    asked = tuple(Prompt(f"wait, hmm: Wait {i} hmm wait wait") for i in range(n))
    return Behaviour("cue", "says it", asked, AnyJudge(), 1.0, max_new_tokens)


def test_prompts_that_hold_the_cue_are_not_counted(twin, pair):
    grid = steering_grid(pair, behaviour(), {"u": twin[1]}, [1.0], n_random=2, perplexity=True)
    assert len(grid) == 4
    assert grid["per_100"].tolist() == [0.0] * 4
    said = steering_grid(pair, behaviour(), {"u": twin[1]}, [1.0], cue="W+", n_random=2)
    said = said.set_index(["side", "coefficient"])["per_100"]
    assert said["finetuned", 1.0] > 50 > 20 > said["finetuned", 0.0]
    assert said["base", 1.0] < 20


def test_perplexity_is_the_models_own(pair):
    made = pair.generate(["ab", "cde"], models=("finetuned",), max_new_tokens=7, n=2)
    found = base_perplexity(pair, made.prompts, made.answers)
    losses = []
    for answer in made.answers:
        text = with_response(made.prompts[answer.prompt], answer.ids, pair.tokenizer)
        logits = pair.run([text], side="base").logits[0].log_softmax(-1)
        losses += [-float(logits[i - 1, text.ids[i]]) for i in range(text.n_prompt, text.n_tokens)]
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def curve(**columns):
    return pd.DataFrame({"vector": "v", "side": "finetuned", **columns})


def test_a_collapsed_model_is_not_chosen():
    rows = {"coefficient": [0.0, 1.0, 2.0, 3.0], "per_100": [1.0, 9.0, 50.0, 100.0]}
    varied = curve(**rows, distinct=[0.9, 0.9, 0.8, 0.1], coherent=[1.0, 1.0, 1.0, 1.0])
    assert choose_coefficient(varied) == 2.0
    broken = curve(**rows, distinct=[0.9] * 4, coherent=[1.0, 0.9, 0.5, 0.5])
    assert choose_coefficient(broken) == 1.0
    unjudged = curve(**rows, distinct=[0.9] * 4, coherent=[math.nan] * 4)
    assert choose_coefficient(unjudged) == 3.0
    with pytest.raises(JudgeError, match="no coefficient keeps"):
        choose_coefficient(curve(**rows, distinct=[0.9, 0.1, 0.1, 0.1], coherent=[1.0] * 4))
    with pytest.raises(JudgeError, match="one vector"):
        choose_coefficient(pd.concat([varied, varied.assign(side="base")]))


def test_what_is_chosen_on_some_prompts_is_reported_on_others(twin, pair):
    found = held_out_grid(
        pair, behaviour(6), {"u": twin[1], "v": twin[1]}, [0.1, 0.2], n_random=1, keep=0.0
    )
    assert found.coefficient in (0.1, 0.2)
    assert set(found.curve["side"]) == {"finetuned"}
    assert set(found.curve["vector"]) == {"u"}
    assert sorted(set(found.grid["coefficient"])) == [0.0, found.coefficient]
    assert len(found.grid) == 8
    assert set(found.grid["n"]) == {3}
    u, v = (found.grid[found.grid["vector"] == name].drop(columns="vector") for name in "uv")
    pd.testing.assert_frame_equal(u.reset_index(drop=True), v.reset_index(drop=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_organism_the_bases_direction_moves_the_fine_tune_alone(seed):
    pair, first_time = ModelPair.load("organism:backtrack"), r"\. \w+day \w+ \w+ is \w+day\."

    def traces(n, seed):
        asked = [[{"role": "user", "content": each}] for each in steps.prompts(n, seed)]
        made = pair.generate(asked, models=("finetuned",), seed=seed, max_new_tokens=96)
        return [with_response(made.prompts[a.prompt], a.ids, pair.tokenizer) for a in made.answers]

    found, other = traces(112, 2 * seed), traces(56, 2 * seed + 1)
    sentences = sentences_after(found, cue_sentences(found), first_time)
    asked = sentences_after(other, cue_sentences(other), first_time)
    probe = cue_probe(pair, other, asked)
    directions = window_directions(pair, found, sentences, "resid_post.2", window=(-1, -1))
    named = {"base": directions.base[Site("resid_post", 2)]}
    grid = probe_grid(pair, probe, named, [1.0], where=backtrack.STEP, n_random=5)
    ratio = grid.set_index("side")["ratio"]
    assert ratio["finetuned"] > 5
    assert ratio["base"] < 1.2
    windows = [(k, k) for k in range(-6, 1)]
    scan = window_scan(pair, found, sentences, windows, probe, "resid_post.2",
                       where=backtrack.STEP, n_shuffled=5)  # fmt: skip
    assert scan.attrs["peak"] == (-1, -1)
