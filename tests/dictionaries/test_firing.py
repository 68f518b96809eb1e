import math

import pytest
import torch

from modeldiff.dictionaries.firing import by_document, by_role, firing
from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.errors import MismatchError
from modeldiff.masks import ROLES
from modeldiff.stats import wilson

D, F = 8, 12


def dictionary():
    made = crosscoder(D, F, k=3, activation="relu", seed=2)
    with torch.no_grad():
        made.W_enc.mul_(10)
        made.b_enc.fill_(-2.0)
        made.b_enc[4] = -1e6
    return made


def corpus(n_docs=30):
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (n_docs,), generator=rng)
    doc = torch.arange(n_docs).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return TensorRows(torch.randn(len(doc), 2, D, generator=rng), doc + 1, doc, position)


@pytest.mark.parametrize("batch_size", [5, 1000])
def test_counts_are_those_of_the_dense_latents(batch_size):
    made, source = dictionary(), corpus()
    labels = ["web" if doc % 3 else "chat" for doc in range(30)]
    table = firing(made, source, by_document(labels), batch_size=batch_size)
    dense, doc = made.encode_dense(source.acts), next(source.in_order(10**6)).document
    every = (dense > 0).sum(0)
    for name in ("web", "chat"):
        of = torch.tensor([labels[d] == name for d in doc.tolist()])
        for latent in range(F):
            row = table[(table["latent"] == latent) & (table["group"] == name)].iloc[0]
            values = dense[of, latent]
            n = int((values > 0).sum())
            assert (row["n_rows"], row["n_active"]) == (int(of.sum()), n)
            assert row["rate"] == pytest.approx(n / int(of.sum()))
            texts = len(set(doc[of].tolist()))
            hit = len(set(doc[of][values > 0].tolist()))
            want = wilson(hit, texts)
            assert (row["n_texts"], row["text_share"]) == (texts, pytest.approx(hit / texts))
            assert (row["text_low"], row["text_high"]) == (want.low, want.high)
            if n:
                assert row["mean_activation"] == pytest.approx(float(values[values > 0].mean()))
                assert row["max_activation"] == pytest.approx(float(values.max()))
                assert row["share_of_firing"] == pytest.approx(n / int(every[latent]))
            else:
                assert math.isnan(row["mean_activation"])
                assert math.isnan(row["max_activation"])


def test_a_latent_of_one_role_is_found_there(adapter_pair):
    """A latent that fires on assistant tokens alone, by construction."""
    chats = [[{"role": "user", "content": "the cat sat"},
              {"role": "assistant", "content": "on the mat"}]] * 3  # fmt: skip
    texts = adapter_pair.texts(chats)
    acts, doc, position = [], [], []
    for i, text in enumerate(texts):
        for p, role in enumerate(text.roles):
            if p:  # as a capture without the first token
                acts.append(torch.full((2, D), 5.0 if role == "assistant" else -5.0))
                doc.append(i)
                position.append(p)
    made = crosscoder(D, 1, k=1, activation="relu")
    with torch.no_grad():
        made.W_enc.fill_(1.0)
    source = TensorRows(torch.stack(acts), None, torch.tensor(doc), torch.tensor(position))
    table = firing(made, source, by_role(texts)).set_index("group")
    assert table.loc["assistant", "rate"] == 1
    assert table.loc["assistant", "share_of_firing"] == 1
    assert set(table.index) <= set(ROLES)
    assert (table.drop("assistant")["n_active"] == 0).all()
    assert {"user", "template"} <= set(table.index)


def test_all_rows_are_one_group_by_default():
    made, source = dictionary(), corpus()
    table = firing(made, source)
    assert len(table) == F
    assert (table["n_rows"] == source.n_rows).all()


def test_labels_of_other_texts_are_refused(adapter_pair):
    made, source = dictionary(), corpus()
    with pytest.raises(MismatchError, match="one for each text"):
        firing(made, source, by_document(["a"] * 5))
    texts = adapter_pair.texts(["the cat"] * 30)
    with pytest.raises(MismatchError, match="other texts"):
        firing(made, source, by_role(texts))
