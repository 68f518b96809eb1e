import torch

from modeldiff.probe_baselines import bag_of_tokens, lengths
from modeldiff.probes import probe_features, probe_report
from tests.test_probes import made


def test_a_bag_of_tokens_reads_a_token():
    """The label is one token of the text: the baseline shows that no probe is needed."""
    from dataclasses import replace

    data = made(n=80, shift=0.0)
    ids = data.token_ids.reshape(80, 5).clone()
    ids[:, 2] = torch.where(data.labels, 900, 901)
    data = replace(data, token_ids=ids.flatten())
    table = probe_report(data, poolings=["mean"], n_shuffles=5).set_index(["name", "train"])
    assert table.auroc["bag of tokens", "texts"] == 1
    assert table.above_chance["bag of tokens", "texts"]
    assert not table.above_chance["logistic probe, mean pooling", "finetuned"].any()
    assert not table.above_chance["text length", "texts"]


def test_counts_are_those_of_each_text():
    ids, index = torch.tensor([5, 5, 3, 3, 3, 9]), torch.tensor([0, 0, 0, 1, 1, 2])
    counts = bag_of_tokens(ids, index).expm1().round()
    assert counts.tolist() == [[1, 2, 0], [2, 0, 0], [0, 0, 1]]
    assert bag_of_tokens(ids, index, max_tokens=1).shape == (3, 1)
    assert bag_of_tokens(ids, index, max_tokens=1).expm1().round()[:, 0].tolist() == [1, 2, 0]
    assert lengths(index)[:, 0].tolist() == [3, 2, 1]


def test_length_alone_is_shown_where_it_tells():
    data = made(n=80, shift=0.0)
    features = data.labels.double()[:, None] + 0.0
    assert probe_features(data, features, "text length").auroc.estimate == 1
