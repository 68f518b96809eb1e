"""Trained dictionaries against planted latents: what is found, and that nothing else is."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from modeldiff.dictionaries.metrics import evaluate
from modeldiff.dictionaries.models import Dictionary, crosscoder, sae
from modeldiff.dictionaries.sources import TensorRows, rows_source
from modeldiff.dictionaries.training import TrainConfig, train
from modeldiff.organisms.planted import planted_latents

pytestmark = pytest.mark.slow
HELD_OUT = 4000
OFTEN = 10  # rows on which a latent fires that counts: as for classes; planted ones have 160
PLAN = TrainConfig(steps=1200, batch_size=512, lr=2e-2, log_every=200)


def sources(acts):
    return TensorRows(acts[HELD_OUT:]), TensorRows(acts[:HELD_OUT])


@pytest.fixture(scope="module")
def planted():
    """64 shared latents and 12 of each model alone."""
    return planted_latents(104_000)


@pytest.fixture(scope="module")
def acts(planted):
    return rows_source(planted.base, planted.finetuned).acts


def called(made, fired, owner):
    """Latents that fire often enough and whose decoder norms say that they are the owner's."""
    norm = made.relative_decoder_norm
    says = {"base": norm < 0.1, "finetuned": norm > 0.9, "shared": (norm - 0.5).abs() < 0.2}
    return (says[owner] & (fired >= OFTEN)).nonzero().squeeze(1)


def recall_and_precision(made, fired, planted, owner):
    """Shares of the planted latents that are found, and of the called ones that are planted."""
    side = "base" if owner == "base" else "finetuned"
    truth = normalize(getattr(planted, f"{side}_decoder")[list(planted.latents(owner))], dim=1)
    found = normalize(made.decoder(side)[called(made, fired, owner)], dim=1)
    if not len(found):
        return 0.0, math.nan
    cosine = truth @ found.T
    recall, precision = ((cosine.amax(axis) > 0.9).float().mean() for axis in (1, 0))
    return float(recall), float(precision)


def trained(acts, plan=PLAN, **options):
    learning, held_out = sources(acts)
    made = crosscoder(48, **{"n_latents": 96, "k": 4, **options})
    train(made, learning, plan)
    return made, evaluate(made, held_out)


@pytest.fixture(scope="module")
def found(acts):
    return trained(acts)


def report(name, *figures):
    print(name, *(each if isinstance(each, str) else f"{each:.4f}" for each in figures))


def test_planted_latents_are_found_each_on_its_side(found, planted):
    made, seen = found
    truth = float((planted.codes[:HELD_OUT] > 0).sum(1).float().mean())
    report("crosscoder:", str(seen), "true L0", truth)
    assert min(seen.fve) >= 0.98
    assert abs(seen.l0 - truth) <= 0.2 * truth
    for owner, least in (("base", 0.9), ("finetuned", 0.9), ("shared", 0.98)):
        recall, precision = recall_and_precision(made, seen.fired, planted, owner)
        report(f"{owner}: recall, precision", recall, precision)
        assert recall >= least
        assert precision >= 0.9


def test_thresholds_do_not_depend_on_the_batch(found, acts):
    made, _ = found
    rows = acts[:256]
    together = made.encode_dense(rows)
    alone = torch.cat([made.encode_dense(row[None]) for row in rows])
    beside = made.encode_dense(torch.cat((rows, 100 * acts[-256:])))[:256]
    for other in (alone, beside):
        assert torch.equal(together > 0, other > 0)
        assert torch.allclose(together, other, atol=1e-4)


def test_a_trained_dictionary_is_read_bit_for_bit(found, acts, tmp_path):
    made, _ = found
    made.save_to(tmp_path)
    again = Dictionary.load_from(tmp_path)
    assert torch.equal(again.encode_dense(acts[:512]), made.encode_dense(acts[:512]))
    assert torch.equal(again.reconstruct(acts[:512]), made.reconstruct(acts[:512]))
    assert again.provenance["training"]["steps_done"] == PLAN.steps


def test_exclusive_blocks_find_what_looks_shared():
    """Latents that the fine-tune turned: where one fires in the base, another does in it.

    One crosscoder latent with two unlike decoders stands for both at less cost, and its norms
    say that it is shared.
    """
    planted = planted_latents(24_000)
    codes, (in_base, in_tuned) = planted.codes.clone(), map(planted.latents, ("base", "finetuned"))
    turned = torch.rand(24_000, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    codes[:, in_tuned] = torch.where(turned, codes[:, in_base], codes[:, in_tuned])
    acts = rows_source(codes @ planted.base_decoder, codes @ planted.finetuned_decoder).acts
    recalls = {}
    for blocks in ((), (12, 12)):
        made, seen = trained(acts, n_latents=88, n_exclusive=blocks)
        for owner in ("base", "finetuned"):
            recall, precision = recall_and_precision(made, seen.fired, planted, owner)
            recalls[blocks, owner] = recall
            report(f"n_exclusive={blocks}, {owner}: recall, precision", recall, precision)
    for owner in ("base", "finetuned"):
        assert recalls[(12, 12), owner] >= 0.95
        assert recalls[(), owner] <= 0.5


def test_the_models_own_size_does_not_change_the_classes(found, acts):
    """Three times larger activations of the fine-tune: every latent keeps its side."""
    _, before = found
    larger = acts * torch.tensor([1.0, 3.0])[:, None]
    made, seen = trained(larger)
    report("x3:", str(seen))
    assert seen.fve == pytest.approx(before.fve, abs=0.005)
    counts = {
        owner: (len(called(found[0], before.fired, owner)), len(called(made, seen.fired, owner)))
        for owner in ("base", "finetuned", "shared")
    }
    report("latents of each class:", str(counts))
    for owner in ("base", "finetuned"):
        assert counts[owner][0] == counts[owner][1] == 12
    assert sum(after for _, after in counts.values()) == int((seen.fired >= OFTEN).sum())
    ratio = made.decoder("finetuned").norm(dim=1) / made.decoder("base").norm(dim=1)
    shared = called(made, seen.fired, "shared")
    assert float(ratio[shared].median()) == pytest.approx(3.0, rel=0.05)


def test_without_a_normaliser_it_would(acts):
    larger = acts * torch.tensor([1.0, 3.0])[:, None]
    made, seen = trained(larger, TrainConfig(steps=300, batch_size=512, lr=2e-2,
                                             normaliser_rows=0))  # fmt: skip
    norm = made.relative_decoder_norm[seen.fired > 0]
    assert float(norm.median()) > 0.7


def test_the_same_rows_twice_give_no_exclusive_latent():
    rows = planted_latents(24_000, shared=88, exclusive=0).base
    noise = torch.Generator().manual_seed(1)
    acts = torch.stack(
        [rows + 0.03 * torch.randn(rows.shape, generator=noise) for _ in range(2)], 1
    )
    made, seen = trained(acts)
    norm = made.relative_decoder_norm
    report("null:", str(seen), "relative norms", float(norm.min()), float(norm.max()))
    assert ((norm > 0.3) & (norm < 0.7)).all()
    assert min(seen.fve) > 0.9


@pytest.mark.parametrize(
    ("kind", "plan", "fve", "l0"),
    [
        ("topk", {}, 0.88, 4.0),
        ("relu", {"l1": 0.1}, 0.96, 6.0),
        ("jumprelu", {}, 0.97, 4.5),
        ("gated", {"l1": 0.2, "lr": 6e-3, "steps": 2000}, 0.97, 6.0),
    ],
)
def test_the_other_architectures_learn_too(kind, plan, fve, l0, acts, planted):
    settings = {"steps": 800, "batch_size": 512, "lr": 1e-2, **plan}
    made, seen = trained(acts, TrainConfig(**settings), activation=kind)
    report(f"{kind}:", str(seen))
    assert min(seen.fve) >= fve
    assert seen.l0 <= l0
    for owner in ("base", "finetuned"):
        recall, precision = recall_and_precision(made, seen.fired, planted, owner)
        report(f"{kind}, {owner}: recall, precision", recall, precision)
        assert min(recall, precision) >= 0.9


def test_an_sae_of_differences_finds_both_exclusive_sets(acts, planted):
    learning, held_out = sources(acts)
    made = sae(48, 32, side="difference", k=1)
    train(made, learning, PLAN)
    seen = evaluate(made, held_out)
    report("differences:", str(seen))
    exclusive = [*planted.latents("base"), *planted.latents("finetuned")]
    truth = (planted.finetuned_decoder - planted.base_decoder)[exclusive]
    found = normalize(made.decoder()[seen.fired > 0], dim=1)
    assert ((truth @ found.T).amax(1) > 0.9).float().mean() >= 0.9


def test_nested_groups_reconstruct_by_themselves(acts):
    def explained(made, latents):
        rows = acts[:HELD_OUT]
        dense = made.encode_dense(rows)
        dense[:, latents:] = 0.0
        x = made.normalised(rows)
        left = (x - made.decode_normalised(dense)).detach()
        return 1 - float(left.square().sum() / x.square().sum())

    nested, plain = (trained(acts, groups=groups)[0] for groups in ((32, 96), ()))
    report("FVE of the first 32 latents, nested and not:", *(
        explained(made, 32) for made in (nested, plain)
    ))  # fmt: skip
    assert explained(nested, 32) > explained(plain, 32) + 0.05
    assert explained(nested, 96) > 0.9
