from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch

from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.dictionaries.text_diff import fisher, text_diff
from modeldiff.errors import Cancelled, MismatchError

D, TOPIC, WORD = 24, 7, 123


def dictionary():
    """Latent j reads coordinate j of the fine-tune."""
    made = crosscoder(D, D, k=3, activation="relu")
    with torch.no_grad():
        made.W_enc.zero_()[1] = torch.eye(D)
        made.b_enc.fill_(-1.0)
    return made


def texts(n_docs, seed, topic=0.0, bursts=True):
    """Texts whose latents come in bursts; a share of them is about the topic, and says the word."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 40, (n_docs,), generator=rng)
    doc = torch.arange(n_docs).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    ids = torch.randint(1, 200, (len(doc),), generator=rng)
    level = torch.randn(n_docs, D, generator=rng) if bursts else torch.zeros(n_docs, D)
    acts = torch.randn(len(doc), 2, D, generator=rng) + level[doc, None]
    about = (torch.rand(n_docs, generator=rng) < topic)[doc]
    acts[about, 1, TOPIC] += 1.5
    ids[about & (torch.rand(len(doc), generator=rng) < 0.3)] = WORD
    return TensorRows(acts, ids, doc, position)


@pytest.mark.parametrize("batch_size", [50, 10_000])
def test_a_planted_topic_comes_first_among_latents_and_tokens(batch_size):
    found = text_diff(dictionary(), texts(120, 0), texts(120, 1, 0.6), batch_size=batch_size)
    top = found.latents.iloc[0]
    assert (top["latent"], top["q"] < 0.01, top["difference"] > 0.2) == (TOPIC, True, True)
    assert top["low"] > 0
    assert (found.latents["q"][1:] > 0.05).all()
    word = found.tokens.iloc[0]
    assert (word["token_id"], word["q"] < 0.01) == (WORD, True)
    assert found.tokens["z"].idxmax() == 0
    assert found.n_texts == (120, 120)


def test_where_nothing_differs_nothing_is_found():
    """Bursts inside texts would fool a test that takes tokens as independent."""
    false, lowest, tests = 0, [], 0
    for seed in range(20):
        found = text_diff(dictionary(), texts(60, seed), texts(60, 1000 + seed))
        false += int((found.latents["q"] < 0.05).sum() + (found.tokens["q"] < 0.05).sum())
        lowest += (found.latents["p"] < 0.05).tolist()
        tests += len(found.latents)
    assert false <= 2
    assert sum(lowest) / tests < 0.06


def test_rates_and_shares_are_counted_right():
    made, a, b = dictionary(), texts(30, 2), texts(40, 3)
    found = text_diff(made, a, b).latents.set_index("latent")
    rates, owners, columns = [], [], found.to_dict()
    for which, source in enumerate((a, b)):
        on, documents = made.encode_dense(source.acts) > 0, next(source.in_order(10**6)).document
        for doc in documents.unique():
            rates.append(on[documents == doc].double().mean(0))
            owners.append(which)
        want = on.double().mean(0)
        for latent in found.index:
            assert columns[f"rate_{'ab'[which]}"][latent] == pytest.approx(float(want[latent]))
    rates, owners = torch.stack(rates), torch.tensor(owners)
    high = rates > rates.median(0).values  # torch's median is the lower one
    for latent in found.index:
        for which in (0, 1):
            share = float(high[owners == which, latent].double().mean())
            assert columns[f"share_{'ab'[which]}"][latent] == pytest.approx(share)


def test_fishers_test_is_the_sum_over_all_outcomes():
    from math import comb

    n_a, n_b = 7, 9
    for k_a in range(n_a + 1):
        for k_b in range(n_b + 1):
            k = k_a + k_b
            chance = {
                i: comb(n_a, i) * comb(n_b, k - i) for i in range(n_a + 1) if 0 <= k - i <= n_b
            }
            want = sum(c for c in chance.values() if c <= chance[k_a]) / comb(n_a + n_b, k)
            assert fisher([k_a], [k_b], n_a, n_b)[0] == pytest.approx(want, rel=1e-9)
    many = fisher([0, 3, 7], [9, 3, 0], n_a, n_b)
    assert np.allclose(many, [fisher([a], [b], n_a, n_b)[0] for a, b in ((0, 9), (3, 3), (7, 0))])


def test_log_odds_are_those_of_the_definition():
    a, b = texts(20, 4), texts(30, 5, 0.5)
    found = text_diff(dictionary(), a, b, prior=100.0).tokens.set_index("token_id")
    y = [int((source.token_id == WORD).sum()) for source in (a, b)]
    n = [source.n_rows for source in (a, b)]
    alpha = 100.0 * sum(y) / sum(n)
    odds = [np.log((y[i] + alpha) / (n[i] + 100.0 - y[i] - alpha)) for i in (0, 1)]
    assert found.loc[WORD, "log_odds"] == pytest.approx(odds[1] - odds[0])
    error = np.sqrt(sum(1 / (count + alpha) for count in y))
    assert found.loc[WORD, "z"] == pytest.approx((odds[1] - odds[0]) / error)


def test_without_tokens_or_texts():
    made, x = dictionary(), torch.randn(40, 2, D)
    doc = torch.arange(40) // 4
    source = TensorRows(x, document=doc, position=torch.arange(40) % 4)
    named = replace(source, token_id=torch.arange(40) + 1)
    for a, b in ((source, source), (source, named), (named, source)):
        found = text_diff(made, a, b)
        assert len(found.tokens) == 0
        assert found.n_texts == (10, 10)
    one = TensorRows(x, document=torch.zeros(40).long(), position=torch.arange(40))
    with pytest.raises(MismatchError, match="several texts"):
        text_diff(made, source, one)
    cancel = Event()
    cancel.set()
    with pytest.raises(Cancelled):
        text_diff(made, source, source, cancel=cancel)


def test_tokens_are_named(adapter_pair):
    ids = adapter_pair.tokenizer("the cat sat on the mat").input_ids
    n = len(ids)
    source = TensorRows(torch.randn(2 * n, 2, D), torch.tensor(ids * 2),
                        torch.arange(2 * n) // n, torch.arange(2 * n) % n)  # fmt: skip
    found = text_diff(dictionary(), source, source, tokenizer=adapter_pair.tokenizer).tokens
    assert "cat" in {token.strip() for token in found["token"]}
    assert (found["q"] == 1).all()
