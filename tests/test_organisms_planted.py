from typing import Any

import pytest
import torch

from modeldiff.architectures import module_at
from modeldiff.direction_components import pca_difference
from modeldiff.errors import SetupError
from modeldiff.organisms.planted import planted_latents, planted_shift, planted_weights, tiny_llama

TEXTS = ["How do I treat a fever?", "a", "What is the best way to mend a lamp at home, please?"]


def linear_weights(root):
    return {name: each.weight.double() for name, each in root.named_modules()
            if isinstance(each, torch.nn.Linear)}  # fmt: skip


@pytest.mark.parametrize(("k", "rank"), [(1, 1), (5, 1), (3, 4)])
def test_the_change_of_the_weights_is_the_truth(k, rank):
    made = planted_weights(k, rank=rank, seed=3)
    base, tuned = (linear_weights(made.pair.sides.root(side)) for side in ("base", "finetuned"))
    changed = {name for name in base if not base[name].equal(tuned[name])}
    assert changed == {edit.module for edit in made.edits}
    assert (len(changed), made.n_modules) == (k, 28)
    for edit in made.edits:
        left, singular, right = torch.linalg.svd(tuned[edit.module] - base[edit.module])
        assert edit.rank == rank
        torch.testing.assert_close(singular[:rank], edit.singular, rtol=1e-5, atol=0)
        assert float(singular[rank]) < 1e-5 * float(singular[0])
        for found, truth in ((left[:, :rank].T, edit.left.T), (right[:rank], edit.right.T)):
            assert ((found * truth).sum(-1).abs() > 1 - 1e-6).all()
        size = edit.delta.norm() / base[edit.module].norm()
        assert float(size) == pytest.approx(0.3, rel=1e-6)


def test_nothing_but_the_planted_modules_changes():
    made = planted_weights(2)
    base, tuned = (dict(made.pair.sides.root(s).named_parameters()) for s in ("base", "finetuned"))
    differ = {n.removesuffix(".weight") for n in base if not base[n].equal(tuned[n])}
    assert differ == {edit.module for edit in made.edits}


@pytest.mark.parametrize("rank", [1, 4])
def test_the_adapter_is_the_same_change(rank):
    full, adapter = (planted_weights(3, rank=rank, adapter=each) for each in (False, True))
    assert (full.pair.kind, adapter.pair.kind) == ("two", "adapter")
    assert {str(site) for site in adapter.pair.sides.lora} == {
        f"lora.{edit.layer}.{edit.module.split('.', 3)[3]}" for edit in full.edits
    }
    for side in ("base", "finetuned"):
        one, other = (each.pair.run(TEXTS, side=side).logits for each in (full, adapter))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for edit in adapter.edits:
        lora: Any = module_at(adapter.pair.sides.root("finetuned"), edit.module)
        a, b = (getattr(lora, f"lora_{name}")["planted"].weight.double() for name in "AB")
        torch.testing.assert_close(b @ a, edit.delta, rtol=1e-5, atol=1e-6)
        assert lora.scaling["planted"] == 1


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("characters", [None, "aeiou"])
def test_the_stream_moves_by_the_planted_direction(characters, adapter):
    made = planted_shift(2, characters=characters, adapter=adapter, seed=1)
    direction = made.direction
    assert direction is not None
    acts = made.pair.capture(TEXTS, at=["resid_post.1", "mlp_out.2", "resid_post.2"], skip_first=0)
    before, mlp, after = (acts.finetuned[site] - acts.base[site] for site in acts.sites)
    chosen = torch.ones(len(acts), dtype=torch.bool)
    if made.token_ids is not None:
        chosen = torch.isin(acts.token_ids, torch.tensor(sorted(made.token_ids)))
        assert 0 < chosen.sum() < len(acts)
        letters = made.pair.tokenizer.convert_ids_to_tokens(sorted(made.token_ids))
        assert letters == sorted(characters or "")
    assert not before.any()
    for moved in (mlp, after):
        assert not moved[~chosen].any()
        torch.testing.assert_close(
            moved[chosen], direction.vector.expand(int(chosen.sum()), -1), rtol=0, atol=1e-5
        )


def test_methods_find_the_planted_shift():
    made = planted_shift(1, seed=2)
    acts = made.pair.capture(TEXTS, at="resid_post.1")
    first = pca_difference(acts.base[acts.site], acts.finetuned[acts.site], acts.site, 1)[0]
    assert made.direction is not None
    assert first.cosine(made.direction) > 1 - 1e-6
    assert first.scale == pytest.approx(made.direction.scale, rel=1e-5)


def test_latents_are_what_the_codes_say():
    made = planted_latents(2000, weak=5, weak_share=0.3, seed=4)
    assert {name: len(made.latents(name)) for name in ("shared", "base", "finetuned", "weak")} == {
        "shared": 64, "base": 12, "finetuned": 12, "weak": 5,
    }  # fmt: skip
    assert torch.equal(made.base, made.codes @ made.base_decoder)
    assert torch.equal(made.finetuned, made.codes @ made.finetuned_decoder)
    norms = {
        name: (made.base_decoder[list(rows)].norm(dim=-1).mean().item(),
               made.finetuned_decoder[list(rows)].norm(dim=-1).mean().item())
        for name in ("shared", "base", "finetuned", "weak") for rows in [made.latents(name)]
    }  # fmt: skip
    wanted = {"shared": (1, 1), "base": (1, 0), "finetuned": (0, 1), "weak": (0.3, 1)}
    for name, each in wanted.items():
        assert norms[name] == pytest.approx(each, abs=1e-6)
    fired = made.codes[made.codes > 0]
    assert len(fired) / made.codes.numel() == pytest.approx(0.04, rel=0.05)
    assert 0.5 <= float(fired.min()) < float(fired.max()) <= 1.5
    # with the codes known the decoder is identifiable: a second way to the same truth
    solved = torch.linalg.lstsq(made.codes.double(), made.finetuned.double()).solution
    torch.testing.assert_close(solved.float(), made.finetuned_decoder, rtol=0, atol=1e-5)


def test_a_seed_makes_one_plant():
    same, other = [planted_weights(2, seed=seed) for seed in (1, 2)], planted_weights(2, seed=1)
    assert same[0].pair.digests == other.pair.digests
    assert same[0].pair.digests != same[1].pair.digests


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: planted_weights(29), "29 modules"),
        (lambda: planted_weights(0), "0 modules"),
        (lambda: planted_weights(["model.layers.9.mlp.down_proj"]), "layers.9"),
        (lambda: planted_weights(1, rank=33), "rank 33"),
        (lambda: planted_shift(1, characters="é"), "ASCII"),
        (lambda: planted_shift(1, characters=""), "ASCII"),
    ],
)
def test_what_cannot_be_planted_is_refused(make, said):
    with pytest.raises(SetupError, match=said):
        make()


def test_a_chat_can_be_rendered():
    pair = planted_shift(0).pair
    text = pair.texts([[{"role": "user", "content": "Hi"}]], reply=True)[0]
    assert text.text == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert len(tiny_llama(n_layers=1)[1]) == 262
