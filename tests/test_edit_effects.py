import numpy as np
import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import InterventionError, MaskError
from modeldiff.interventions import Ablate, Cell, Plan, Replace, ScaleAdapter, Steer
from modeldiff.tokens import Completion

TEXTS = ["the cat sat on the mat and the dog ran", "a small bird sang of rain", "why was it"]


def cell(edit, name):
    return Cell("finetuned", name, Plan((edit,)))


def dense(pair, texts, do, side="finetuned"):
    """KL(edited || base) and loss of each text, one text at a time in float64."""
    rows = []
    for text in texts:
        run, base = pair.run([text], side=side, do=do), pair.run([text], side="base")
        p, q = (r.logits[0, :-1].double().log_softmax(-1) for r in (run, base))
        came = run.batch.ids[0, 1:]
        loss = -p.gather(-1, came[:, None])[:, 0]
        rows.append((float((p.exp() * (p - q)).sum(-1).mean()), float(loss.mean())))
    return np.array(rows)


def test_effects_equal_the_dense_computation_for_every_cell(adapter_pair):
    d = Direction.of(torch.randn(32), "resid_post.1", "d")
    edits = {
        "none": None,
        "steer": Steer(d, 0.5),
        "ablate": Ablate(d),
        "half": ScaleAdapter(0.5),
        "patched": Replace("resid_post.1", "base", along=d),
    }
    cells = [Cell("finetuned") if e is None else cell(e, n) for n, e in edits.items()]
    for max_tokens in (1, 4096):  # alone, and in one batch padded on the right
        table = effects(adapter_pair.sides, TEXTS, cells, max_tokens=max_tokens)
        for index, (name, edit) in enumerate(edits.items()):
            part = table[table["cell"] == index].sort_values("text")
            want = dense(adapter_pair, TEXTS, edit)
            np.testing.assert_allclose(
                part[["kl", "loss"]], want, rtol=1e-3, atol=1e-5, err_msg=name
            )


def test_removing_the_adapter_closes_the_whole_distance(adapter_pair):
    cells = [Cell("base"), Cell("finetuned"), cell(ScaleAdapter(0.0), "off")]
    kl = effects(adapter_pair.sides, TEXTS, cells).groupby("cell")["kl"].mean()
    assert kl[0] == kl[2] == 0
    assert kl[1] > 0.01


def test_only_masked_predictions_count(adapter_pair):
    item = Completion("the cat sat on the mat", " and the dog ran")
    table = effects(adapter_pair.sides, [item], [Cell("finetuned")], on="new")
    (text,) = adapter_pair.texts([item])
    assert table["n_tokens"].tolist() == [text.n_tokens - text.n_prompt]


def test_nothing_to_compare_and_edits_that_do_not_fire_are_errors(adapter_pair):
    with pytest.raises(MaskError, match="no predicted token"):
        effects(adapter_pair.sides, TEXTS, [Cell("finetuned")], on="new")
    d = Direction.of(torch.randn(32), "resid_post.1", "d")
    with pytest.raises(InterventionError, match="did not fire"):
        effects(adapter_pair.sides, TEXTS, [cell(Steer(d, where="new"), "late")])
