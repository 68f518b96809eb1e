import numpy as np
import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, InterventionError, MaskError, SiteError
from modeldiff.interventions import Ablate, Cell, Plan, ScaleAdapter, Steer
from modeldiff.masks import Positions
from modeldiff.outputs import TOKEN_COLUMNS
from modeldiff.sites import Site
from modeldiff.token_scores import adapter_scalars, projections, token_scores
from tests.families import FAMILIES
from tests.planted import null_pair

TEXT = "the cat sat on the mat and the dog ran to the old house"
CHAT = [{"role": "user", "content": "why was it"}, {"role": "assistant", "content": "the moon"}]


def direction(layer=1, seed=0, kind="resid_post"):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"{kind}.{layer}", "d")


@pytest.mark.parametrize("item", [TEXT, CHAT])
@pytest.mark.parametrize("budget", [1, 256 << 20])
def test_without_edits_they_are_those_of_output_diff_bit_for_bit(adapter_pair, item, budget):
    (found,) = token_scores(adapter_pair.sides, item, k=5, budget=budget)
    expected = adapter_pair.output_diff([item], k=5)
    if budget == 1:  # one token at a time: other kernels, so equal within rounding
        for name in ("kl_ft_base", "js", "delta_logprob"):
            np.testing.assert_allclose(found.table[name], expected.tokens[name], atol=1e-5)
        return
    assert set(TOKEN_COLUMNS) <= set(found.table)
    for name in found.table:
        assert (found.table[name] == expected.tokens[name]).all(), name
    assert torch.equal(found.top_ids, expected.top_ids)
    assert torch.equal(found.top_logprobs, expected.top_logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_output_diff(family_pairs, family):
    pair = family_pairs[family]
    (found,) = token_scores(pair.sides, TEXT)
    expected = pair.output_diff([TEXT]).tokens
    np.testing.assert_allclose(found.table["kl_ft_base"], expected["kl_ft_base"], atol=2e-6)
    assert (found.table["rank_move"] == expected["rank_move"]).all()


def test_edited_models_equal_the_dense_computation(adapter_pair):
    steer = Plan((Steer(direction(), 2.0),))
    cells = [Cell("finetuned"), Cell("finetuned", "edited", steer), Cell("base", "edited", steer)]
    found = token_scores(adapter_pair.sides, TEXT, cells)
    base = adapter_pair.run([TEXT], side="base").logits[0, :-1].double().log_softmax(-1)
    for cell, one in zip(cells, found, strict=True):
        logits = adapter_pair.run([TEXT], side=cell.side, do=cell.plan).logits[0, :-1]
        own = logits.double().log_softmax(-1)
        kl = (own.exp() * (own - base)).sum(-1)
        np.testing.assert_allclose(one.table["kl_ft_base"], kl, rtol=1e-3, atol=1e-5)
        came = torch.tensor(one.text.ids[1:])[:, None]
        moved = (own - base).gather(1, came)[:, 0]
        np.testing.assert_allclose(one.table["delta_logprob"], moved, rtol=1e-3, atol=1e-5)
        assert one.tops(1, adapter_pair.tokenizer)[3][0][1] == pytest.approx(
            float(own[2].exp().max()), rel=1e-4
        )


def test_an_edit_that_undoes_the_adapter_leaves_no_divergence(adapter_pair):
    undo = Cell("finetuned", "off", Plan((ScaleAdapter(0.0),)))
    plain, off = token_scores(adapter_pair.sides, TEXT, [Cell("finetuned"), undo])
    assert plain.table["kl_ft_base"].max() > 0.1
    assert off.table["kl_ft_base"].abs().max() < 1e-6


def test_identical_models_do_not_differ_at_all():
    pair = null_pair("identical", 0)
    (found,) = token_scores(pair.sides, TEXT)
    for name in ("kl_ft_base", "js", "delta_logprob", "rank_move", "entropy_change"):
        assert (found.table[name] == 0).all(), name


def test_columns_and_tops_have_an_entry_for_every_token(adapter_pair):
    (found,) = token_scores(adapter_pair.sides, TEXT, k=4)
    column = found.column("js")
    assert len(column) == found.text.n_tokens
    assert column[0] is None
    assert column[3] == found.table["js"][2]
    tops = found.tops(0, adapter_pair.tokenizer)
    assert [len(each) for each in tops] == [0] + [4] * (found.text.n_tokens - 1)
    name, p = tops[1][0]
    assert name == adapter_pair.tokenizer.decode([int(found.top_ids[0, 0, 0])])
    assert 0 < p < 1


def test_projections_are_those_of_the_captured_activations(adapter_pair):
    d = direction(2)
    site, plan = Site("resid_post", 2), Plan((Steer(d, 1.5),))
    base, tuned, edited = projections(
        adapter_pair.sides, TEXT, d, [Cell("base"), Cell("finetuned"), Cell("finetuned", "e", plan)]
    )
    acts = adapter_pair.capture([TEXT], site, skip_first=0)
    torch.testing.assert_close(base, acts.base[site] @ d.unit)
    torch.testing.assert_close(tuned, acts.finetuned[site] @ d.unit)
    torch.testing.assert_close(edited, tuned + 1.5 * d.scale, rtol=1e-4, atol=1e-4)


def test_an_ablated_direction_has_no_projection(adapter_pair):
    d = direction(2)
    (found,) = projections(
        adapter_pair.sides, TEXT, d, [Cell("finetuned", "off", Plan((Ablate(d),)))]
    )
    assert found.abs().max() < 1e-5


def test_adapter_scalars_are_what_a_writes(adapter_pair):
    found = adapter_scalars(adapter_pair.sides, TEXT)
    assert tuple(found) == adapter_pair.sides.lora
    n = adapter_pair.texts([TEXT])[0].n_tokens
    assert {each.shape for each in found.values()} == {(n, 2)}
    acts = adapter_pair.capture([TEXT], list(found), skip_first=0)
    for site, values in found.items():
        torch.testing.assert_close(values, acts.finetuned[site])
    halved = adapter_scalars(adapter_pair.sides, TEXT, ScaleAdapter(0.5, layers=1))
    first = adapter_pair.sides.lora[0]
    torch.testing.assert_close(halved[first], found[first] / 2)


def test_what_cannot_be_scored_is_refused(adapter_pair, family_pairs):
    from threading import Event

    cancel = Event()
    cancel.set()
    with pytest.raises(MaskError, match="holds no prediction"):
        token_scores(adapter_pair.sides, "a")
    with pytest.raises(Cancelled):
        token_scores(adapter_pair.sides, TEXT, cancel=cancel)
    with pytest.raises(SiteError, match="no adapter"):
        adapter_scalars(family_pairs["llama"].sides, TEXT)
    nowhere = Plan((Steer(direction(), where="user"),))
    with pytest.raises(InterventionError, match="did not fire"):
        token_scores(adapter_pair.sides, TEXT, [Cell("finetuned", "e", nowhere)])
    beyond = Plan((Steer(direction(), where=Positions((99,))),))
    with pytest.raises(MaskError, match="outside"):
        projections(adapter_pair.sides, TEXT, direction(), [Cell("base", "e", beyond)])
