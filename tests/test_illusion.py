import dataclasses
from typing import Any

import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import MaskError, MismatchError, RemoteError, SiteError
from modeldiff.hooks import count_hooks
from modeldiff.illusion import check_illusion, readers, row_space, with_check
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.patching import kl_to, logit_difference
from modeldiff.sites import Site
from tests.families import FAMILIES, build_adapter_pair
from tests.planted import TEXTS
from tests.straight import CHANNEL, free_channel, pair_of, straight

DIFFERENCE = logit_difference(7, 9)
UNREAD = 6


def metric(text):
    return DIFFERENCE


def axis(*channels, width=32, site="resid_post.1"):
    vector = torch.zeros(width)
    vector[list(channels)] = 1.0
    return Direction.of(vector, site, f"channels {channels}")


def asleep(changed):
    """Nothing reads `UNREAD`, the unembedding reads `CHANNEL`; the sides differ in one of them."""
    model: Any
    model, tokenizer = tiny_llama(3, mlp_bias=True)
    model.model.embed_tokens.weight[:, CHANNEL] = 0.0
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight[CHANNEL] = 0.0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight[:, UNREAD] = 0.0
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
            module.weight[:, UNREAD] = 0.0
    model.lm_head.weight[:, UNREAD] = 0.0
    model.lm_head.weight[7, CHANNEL] = 5.0

    def change(tuned):
        tuned.model.layers[1].mlp.down_proj.bias[changed] += 6.0

    return pair_of(model, change, tokenizer)


def test_a_planted_dormant_path_is_flagged():
    pair = asleep(UNREAD)
    found = check_illusion(pair.sides, TEXTS[:6], axis(UNREAD, CHANNEL), metric)
    assert found.flagged
    assert found.row_share == pytest.approx(0.5, abs=1e-6)
    assert found.random_share == 31 / 32
    assert abs(found.effect.estimate) > 1
    assert found.kept == pytest.approx(0, abs=1e-4)
    assert found.difference_outside == pytest.approx(1, abs=1e-6)
    assert "illusion" in found.note
    assert "50%" in found.note
    assert count_hooks(pair.sides.root("base")) == 0


def test_a_direction_that_is_read_and_differs_is_none():
    found = check_illusion(asleep(CHANNEL).sides, TEXTS[:6], axis(CHANNEL), metric)
    assert not found.flagged
    assert found.row_share == pytest.approx(1)
    assert found.kept == pytest.approx(1, abs=1e-3)
    assert found.difference_outside == pytest.approx(0, abs=1e-9)
    assert "no illusion" in found.note
    planted = planted_shift(2)
    direction, sides = planted.direction, planted.pair.sides
    assert direction is not None
    found = check_illusion(sides, TEXTS[:6], direction, lambda text: kl_to(sides, text, "base"))
    assert not found.flagged
    assert found.p <= 0.05
    assert found.effect.high < 0
    assert with_check(direction, found).notes[-1] == found.note


def test_what_is_read_by_nothing_does_nothing_and_is_no_illusion():
    found = check_illusion(asleep(UNREAD).sides, TEXTS[:6], axis(UNREAD), metric)
    assert found.row_share == pytest.approx(0, abs=1e-9)
    assert found.gain == pytest.approx(0, abs=1e-6)
    assert not found.flagged
    assert found.row_effect.estimate == 0


@pytest.mark.parametrize("dormant", [True, False])
def test_neurons_have_a_null_space(dormant):
    """64 neurons are read by 32 channels: half of any direction of neurons is read by nothing."""
    model, tokenizer = straight()
    free_channel(model)
    model.lm_head.weight[7, CHANNEL] = 3.0
    down = model.model.layers[1].mlp.down_proj.weight
    down[CHANNEL] = torch.randn(64, generator=torch.Generator().manual_seed(5))
    rows = torch.linalg.qr(down.double().T).Q.T
    read = down[CHANNEL].double() / down[CHANNEL].double().norm()
    draw = torch.randn(64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    unread = draw - rows.T @ (rows @ draw)
    unread = unread / unread.norm()

    def change(tuned):
        tuned.model.layers[1].mlp.up_proj.bias += 4 * (unread if dormant else read).float()

    v = Direction.of(read + unread if dormant else read, "mlp_act.1", "neurons")
    found = check_illusion(pair_of(model, change, tokenizer).sides, TEXTS[:5], v, metric)
    assert found.flagged == dormant
    assert found.row_share == pytest.approx(0.5 if dormant else 1, abs=1e-6)
    assert found.kept == pytest.approx(0 if dormant else 1, abs=1e-3)
    assert found.random_share == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_are_what_the_residual_stream_feeds(family, family_pairs):
    """Second implementation: how the readers' inputs move with a tiny step, by gradient."""
    sides = family_pairs[family].sides
    matrix = readers(sides, Site("resid_post", 1), "base")
    config = sides.config.get_text_config()
    vocab = config.vocab_size
    heads = 32 + (64 if family in ("gpt2", "gpt_neox") else 32)  # queries, keys and values
    inner = {"gpt2": 128, "gpt_neox": 48}.get(family, 96)  # gate and up where there is a gate
    assert matrix.shape == (2 * (heads + inner) + vocab, 32)
    centred = family in ("gpt2", "gpt_neox")
    constant = torch.ones(32, dtype=torch.float64)
    assert (float((matrix @ constant).norm()) < 1e-4) == centred
    assert len(row_space(matrix, 1e-3)) == 32 - centred
    parallel = family == "gpt_neox"
    after = readers(sides, Site("attn_out", 1), "base").shape[0] - matrix.shape[0]
    assert after == (0 if parallel else inner)
    assert readers(sides, Site("mlp_out", 3), "base").shape == (vocab, 32)
    assert readers(sides, Site("z", 2), "base").shape == (32, 32)


def test_an_adapters_reads_count_on_its_side_alone():
    pair = build_adapter_pair(modules=("down_proj", "up_proj"))
    at = Site("resid_post", 0)
    more = readers(pair.sides, at, "finetuned").shape[0] - readers(pair.sides, at, "base").shape[0]
    assert more == 2 * 2  # rank 2 on up_proj of layers 1 and 2
    act = Site("mlp_act", 1)
    assert readers(pair.sides, act, "finetuned").shape[0] == 32 + 2
    assert readers(pair.sides, act, "base").shape[0] == 32


def test_gains_are_folded_in():
    model, tokenizer = tiny_llama()
    model.model.norm.weight[4] = 0.0
    pair = pair_of(model, lambda tuned: tuned.lm_head.weight.mul_(2), tokenizer)
    matrix = readers(pair.sides, Site("resid_post", 3), "base")
    assert (matrix[:, 4].abs() < 1e-9).all()
    torch.testing.assert_close(matrix[:, 5].float(), model.lm_head.weight[:, 5], rtol=1e-4, atol=0)


def test_what_cannot_be_checked_is_refused(adapter_pair):
    sides = adapter_pair.sides
    with pytest.raises(SiteError, match="knows"):
        check_illusion(sides, TEXTS[:2], axis(1, site="resid_pre.1"), metric)
    with pytest.raises(MismatchError, match="width"):
        check_illusion(sides, TEXTS[:2], axis(1, width=16), metric)
    with pytest.raises(MaskError):
        check_illusion(sides, TEXTS[:1], axis(1), metric)
    model, tokenizer = straight()  # its norms do nothing, and are no norms
    pair = pair_of(model, lambda tuned: tuned.lm_head.weight.mul_(2), tokenizer)
    with pytest.raises(SiteError, match="output of a norm"):
        check_illusion(pair.sides, TEXTS[:2], axis(1), metric)
    with pytest.raises(RemoteError):
        readers(dataclasses.replace(sides, kind="remote"), Site("z", 1), "base")


@pytest.mark.slow
def test_random_directions_of_null_pairs_are_rarely_flagged():
    base = tiny_llama()
    flagged = 0
    for null in null_pairs(24, kind="noise", base=base):
        draw = torch.randn(64, generator=torch.Generator().manual_seed(900 + null.seed))
        v = Direction.of(draw, "mlp_act.2", "random")
        flagged += check_illusion(null.pair.sides, TEXTS[:4], v, metric).flagged
    assert flagged <= 4
