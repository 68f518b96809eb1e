"""Labels of reasoning: their directions, and the layer at which they matter."""

import copy
import random
from typing import Any

import pytest
import torch

from modeldiff import loading
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, InterventionError, MaskError
from modeldiff.models import ModelPair
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.patch_runs import Metric
from modeldiff.patching import onset_loss
from modeldiff.sites import Site
from modeldiff.thinking import label_directions, span_window
from modeldiff.thinking_layers import choose_layer, cue_logit, onsets
from modeldiff.thinking_spans import Sentence, cue_sentences
from modeldiff.tokens import Completion, render

ERASES, READS = 2, 3
SITES = [Site("resid_post", layer) for layer in (0, 2)]


@torch.no_grad()
def make_linear():
    """Layer 2 takes v away, layer 3 reads v and writes w, which the unembedding takes for "W".

    Every MLP is linear in what it reads: its gate is held at relu6's end. So v matters to what
    comes next after layer 2 alone.
    """
    made: Any = tiny_llama(0, n_layers=5, hidden_act="relu6", mlp_bias=True)
    base, tokenizer = made
    v, w = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1))).Q.T
    for layer in base.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.weight.zero_()
        layer.mlp.gate_proj.bias.fill_(100.0)
    for rows in (base.model.embed_tokens.weight, base.lm_head.weight):
        rows -= torch.outer(rows @ v, v) + torch.outer(rows @ w, w)
    rows = base.model.embed_tokens.weight
    rows.copy_(4 * rows / rows.norm(dim=-1, keepdim=True))
    cue = tokenizer("W", add_special_tokens=False).input_ids[0]
    base.lm_head.weight[cue] += w
    erases, reads = base.model.layers[ERASES].mlp, base.model.layers[READS].mlp
    for mlp in (erases, reads):
        mlp.up_proj.weight[0] = v / 6
    erases.down_proj.weight[:, 0] = -v * 4 / 32**0.5
    reads.down_proj.weight[:, 0] = 2 * w
    tuned = copy.deepcopy(base)
    tuned.lm_head.weight[cue] += w
    pair = ModelPair.of(base, tuned, tokenizer)
    return pair, Direction.of(v, Site("resid_post", ERASES), "v"), cue


@pytest.fixture(scope="module")
def linear():
    return make_linear()


def chains(pair, n, seed=0):
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        said = ["".join(rng.choices("abcdefgh ", k=rng.randint(9, 16))).strip() for _ in range(6)]
        opened = ["Wait, " + each if rng.random() < 0.4 else each for each in said]
        texts.append(render(pair.tokenizer, Completion("Q: ", ". ".join(opened) + ".")))
    return tuple(texts), cue_sentences(texts)


@pytest.mark.parametrize("metric", ["loss", "logit"])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_the_layer_is_the_planted_one_and_estimates_are_what_steps_do(linear, metric, side):
    pair, v, cue = linear
    texts, sentences = chains(pair, 6)
    scorer = onset_loss if metric == "loss" else cue_logit([cue])
    found = choose_layer(
        pair, texts, sentences, "backtracking", v, scorer, side=side, step=0.02, n=1
    )
    assert found.attrs["layer"] == ERASES
    assert found.attrs["r"].estimate >= 0.95
    assert found.attrs["n"] == sum(each.label == "backtracking" for each in sentences)
    table: Any = found.set_index("layer")
    others = table["attribution"].drop(ERASES).abs()
    assert others.max() < 0.01 * abs(table.loc[ERASES, "attribution"])
    assert table.loc[ERASES, "p"] <= 0.01
    assert table.loc[ERASES, "measured"] == pytest.approx(table.loc[ERASES, "attribution"], rel=0.2)
    assert (table.loc[ERASES, "attribution"] < 0) == (metric == "loss")


def kl_to_itself(text):
    """KL(p || p), its second p a constant: its value and its gradient are 0 up to rounding."""

    def score(logits):
        own = logits[:, 0].log_softmax(-1)
        return (own.exp() * (own - own.detach())).sum(-1)

    return Metric("KL(p || p)", score, (text.n_prompt - 1,))


def kl_without_log_target(text):
    """The released form: torch's kl_div takes the logarithm of log-probabilities, which is NaN."""

    def score(logits):
        own = logits[:, 0].log_softmax(-1)
        return torch.nn.functional.kl_div(own, own.detach(), reduction="none").sum(-1)

    return Metric("kl_div without log_target", score, (text.n_prompt - 1,))


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [(kl_to_itself, "gradient"), (kl_without_log_target, "finite")],
)
def test_metrics_without_value_or_gradient_are_refused(linear, metric, complaint):
    pair, v, _ = linear
    texts, sentences = chains(pair, 3)
    with pytest.raises(InterventionError, match=complaint):
        choose_layer(pair, texts, sentences, "backtracking", v, metric)


def test_a_layer_is_not_chosen_from_estimates_that_do_not_hold(linear):
    pair, v, _ = linear
    texts, sentences = chains(pair, 4)
    with pytest.raises(InterventionError, match="correlate"):
        choose_layer(pair, texts, sentences, "backtracking", v, least_r=1.01)
    with pytest.raises(InterventionError, match="0 layers"):
        choose_layer(pair, texts, sentences, "backtracking", v, skip=range(5))
    found = choose_layer(pair, texts, sentences, "backtracking", v, skip=[ERASES])
    assert found.attrs["layer"] != ERASES


def test_onsets_end_inside_the_sentence(linear):
    pair, _, _ = linear
    texts, sentences = chains(pair, 3)
    mine = [each for each in sentences if each.label == "backtracking"]
    for cut, sentence in zip(onsets(texts, sentences, "backtracking"), mine, strict=True):
        assert cut.n_prompt == sentence.first
        assert cut.ids == texts[sentence.text].ids[: sentence.first + 3]
        assert "".join(cut.pieces[cut.n_prompt :]) == "Wai"
    with pytest.raises(MaskError, match="daydreaming"):
        onsets(texts, sentences, "daydreaming")


def test_a_sentence_counts_from_the_token_before_it():
    assert span_window(Sentence(2, 30, 90, "a")).first == 29
    assert span_window(Sentence(2, 30, 90, "a")).stop == 40
    assert span_window(Sentence(2, 30, 35, "a")).stop == 34
    assert [span_window(Sentence(0, 0, 1, "a")).first, span_window(Sentence(0, 0, 1, "a")).stop] \
        == [0, 1]  # fmt: skip


@pytest.fixture(scope="module")
def shifted():
    return planted_shift(1, size=8.0, characters="Wz", n_layers=3)


@pytest.mark.parametrize("scale", ["raw", "overall"])
def test_label_directions_are_those_of_a_plain_loop(shifted, scale):
    """Against a second implementation, on rows captured at once."""
    pair = shifted.pair
    texts, sentences = chains(pair, 8, seed=2)
    found = label_directions(
        pair, texts, sentences, SITES, scale=scale, models=("base", "finetuned"), max_tokens=120
    )
    acts = pair.capture(texts, SITES, skip_first=0)
    sizes = [text.n_tokens for text in texts]
    starts = [sum(sizes[:i]) for i in range(len(texts))]
    by_label: dict[str, list[torch.Tensor]] = {}
    for side in loading.SIDES:
        kept = acts.base if side == "base" else acts.finetuned
        for site in SITES:
            by_label, chains_ = {}, []
            rows = kept[site].double()
            for each in sentences:
                stop = max(min(each.stop - 1, each.first + 10), each.first)
                at = starts[each.text]
                window = rows[at + each.first - 1 : at + stop]
                by_label.setdefault(each.label, []).append(window.mean(0))
            for i, start in enumerate(starts):
                mine = [each for each in sentences if each.text == i]
                chains_.append(rows[start + mine[0].first : start + mine[-1].stop].mean(0))
            overall = torch.stack(chains_).mean(0)
            assert found.overall[side, site] == pytest.approx(float(overall.norm()), rel=1e-5)
            for label, windows in by_label.items():
                truth = torch.stack(windows).mean(0) - overall
                own = found.directions[label][side][site]
                assert torch.allclose(own.unit.double(), truth / truth.norm(), atol=1e-5)
                wanted = overall.norm() if scale == "overall" else truth.norm()
                assert own.scale == pytest.approx(float(wanted), rel=1e-4)
    assert found.n_spans == {label: len(windows) for label, windows in by_label.items()}
    assert len(found.table()) == 2 * 2 * 2


def test_a_planted_shift_shows_in_the_fine_tunes_direction_alone(shifted):
    pair = shifted.pair
    texts, sentences = chains(pair, 12, seed=3)
    found = label_directions(pair, texts, sentences, Site("resid_post", 1), models=("base",
                             "finetuned"))  # fmt: skip
    tuned = found.of("backtracking")[1]
    base = found.of("backtracking", "base")[1]
    assert tuned.cosine(shifted.direction) > base.cosine(shifted.direction) + 0.2
    assert tuned.text_null == pytest.approx(tuned.cosine(base), abs=1e-5)
    assert found.cosines("resid_post.1").shape == (2, 2)
    with pytest.raises(DirectionError, match="daydreaming"):
        found.of("daydreaming")


def test_labels_that_do_not_occur_are_refused(shifted):
    texts, sentences = chains(shifted.pair, 2)
    with pytest.raises(DirectionError, match="daydreaming"):
        label_directions(shifted.pair, texts, sentences, SITES, labels=["daydreaming"])
    with pytest.raises(MaskError, match="no sentences"):
        label_directions(shifted.pair, texts, [], SITES)
