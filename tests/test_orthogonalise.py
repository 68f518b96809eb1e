import dataclasses

import pandas as pd
import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError, MismatchError, RemoteError, SiteError
from modeldiff.interventions import Ablate
from modeldiff.models import ModelPair
from modeldiff.organisms.planted import planted_shift
from modeldiff.orthogonalise import (
    candidate_sweep,
    everywhere,
    orthogonalised,
    select_direction,
)
from tests.families import FAMILIES, build_adapter_pair, model, tokenizer

TEXT = "the cat sat on the mat and the dog ran"


def direction(seed=0, width=32):
    draw = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, "resid_post.2", f"d{seed}")


def with_biases(family):
    """A random model whose biases and gains are not the zeros and ones they start as."""
    made = model(family)
    generator = torch.Generator().manual_seed(9)
    for weight in made.parameters():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return made


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "gemma2"])
def test_orthogonal_weights_do_what_the_hooks_do(family):
    pair = ModelPair.of(model(family, 1), with_biases(family), tokenizer())
    before = pair.sides.root("finetuned").state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    several = [direction(0), direction(1)]
    for chosen in (several[0], several):
        by_hook = pair.run([TEXT], side="finetuned", do=everywhere(chosen)).logits
        made = orthogonalised(pair.sides, chosen)
        ids = pair.run([TEXT], side="finetuned").batch.ids
        by_weight = made(input_ids=ids).logits
        assert by_hook is not None
        assert float((by_hook - by_weight).abs().max()) <= 1e-4
    plain = pair.run([TEXT], side="finetuned").logits
    assert plain is not None
    assert float((plain - by_weight).abs().max()) > 0.1
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_layer_can_write_the_direction(family):
    d = direction()
    pair = ModelPair.of(model(family, 1), with_biases(family), tokenizer())
    made = ModelPair.of(model(family, 1), orthogonalised(pair.sides, d), tokenizer())
    sites = tuple(f"resid_post.{layer}" for layer in range(4))
    acts = made.capture([TEXT], sites, skip_first=0).finetuned
    for h in acts.values():
        assert float((h @ d.unit).abs().max()) < 1e-5 * float(h.norm(dim=1).mean())


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_adapters_are_merged_or_left_out(side):
    pair, d = build_adapter_pair(), direction()
    by_hook = pair.run([TEXT], side=side, do=everywhere(d))
    made = orthogonalised(pair.sides, d, side)
    assert by_hook.logits is not None
    found = made(input_ids=by_hook.batch.ids).logits
    assert float((by_hook.logits - found).abs().max()) <= 1e-4
    assert not any("lora" in name for name, _ in made.named_parameters())
    again = pair.run([TEXT], side=side, do=everywhere(d)).logits
    assert again is not None
    assert torch.equal(again, by_hook.logits)  # the pair is as it was


def test_ablating_after_layers_alone_is_something_else():
    """The stream between attention and MLP still holds the direction then."""
    pair, d = build_adapter_pair(), direction()
    after = pair.run([TEXT], side="base", do=Ablate(d)).logits
    whole = pair.run([TEXT], side="base", do=everywhere(d)).logits
    assert after is not None
    assert whole is not None
    assert float((after - whole).abs().max()) > 1e-2


def test_what_cannot_be_orthogonalised_is_refused(family_pairs):
    with pytest.raises(SiteError, match="norm there"):
        orthogonalised(family_pairs["gemma2"].sides, direction())
    with pytest.raises(MismatchError, match="width 16"):
        orthogonalised(family_pairs["llama"].sides, direction(width=16))
    with pytest.raises(RemoteError):
        orthogonalised(dataclasses.replace(family_pairs["llama"].sides, kind="remote"), direction())


ROWS = [  # position, layer, ablated, steered, kl, why
    (-1, 2, -9.0, 5.0, 0.11, "KL too large"),
    (-2, 8, -8.0, 5.0, 0.01, "too late a layer"),
    (-1, 3, -7.0, -0.1, 0.01, "steering does not cause it"),
    (-1, 4, float("nan"), 5.0, 0.01, "not finite"),
    (-3, 7, -5.0, 0.0, 0.10, ""),  # on every limit, and inside it
    (-1, 1, -4.0, 9.0, 0.00, ""),
]


def candidates(rows=ROWS):
    names = ["position", "layer", "ablated", "steered", "kl", "expected"]
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize("order", [1, -1])
def test_the_selection_rule_in_closed_form(order):
    found = select_direction(candidates(ROWS[::order]), 10)
    assert (found.position, found.layer) == (-3, 7)
    assert found.table.why.tolist() == found.table.expected.tolist()
    assert found.table.ablated[:2].tolist() == [-5.0, -4.0]
    assert select_direction(candidates(), 10, max_kl=0.2).layer == 2
    assert select_direction(candidates(), 10, below=0.9).layer == 8
    assert select_direction(candidates(), 10, min_steering=-1).layer == 3
    assert select_direction(candidates(), 10, min_steering=1).layer == 1


def test_a_selection_of_nothing_says_why():
    with pytest.raises(DirectionError, match="1 KL too large"):
        select_direction(candidates(ROWS[:4]), 10)
    with pytest.raises(DirectionError, match="there were none"):
        select_direction(candidates([]), 10)
    with pytest.raises(MismatchError, match="lack steered"):
        select_direction(candidates().drop(columns="steered"), 10)


def planted_behaviour():
    """After a vowel the fine-tune writes a direction, which the unembedding reads as one token."""
    planted = planted_shift(1, characters="aeiou", size=40.0)
    vector = planted.direction
    assert vector is not None
    for root in planted.pair.sides.roots:
        root.lm_head.weight[100] = 2 * vector.unit  # pyright: ignore
    return planted.pair, vector


def test_the_sweep_finds_a_planted_direction_and_its_ablation_removes_it():
    pair, truth = planted_behaviour()
    words = ["xqz", "wrt", "kls", "bnm", "pfg", "jhd", "ccv", "ttr"]
    positive = [word + "aeio"[i % 4] for i, word in enumerate(words)]
    negative = [word[::-1] + "zkrt"[i % 4] for i, word in enumerate(words)]
    table, found = candidate_sweep(pair.sides, positive, negative, [100])
    assert len(table) == len(found) == 2 * 3
    assert table.start.nunique() == 1
    chosen = select_direction(table, 4, max_kl=2.0, below=1.0, min_steering=-99)
    assert chosen.position == -1
    assert chosen.layer >= 2
    best = found[chosen.position, chosen.layer]
    assert best.cosine(truth) > 0.7
    row = chosen.table.iloc[0]
    assert row.ablated < row.start - 3
    assert row.steered > 0  # more likely than not, where it never came
    with pytest.raises(MaskError, match="four or more"):
        candidate_sweep(pair.sides, positive[:3], negative, [100])
    with pytest.raises(MaskError, match="too short"):
        candidate_sweep(pair.sides, positive, negative, [100], positions=(-99,))
