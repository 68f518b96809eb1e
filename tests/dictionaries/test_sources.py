from itertools import islice

import pytest
import torch

from modeldiff.dictionaries.sources import TensorRows, epoch_order, rows_source
from modeldiff.errors import MismatchError


@pytest.fixture
def source():
    """Rows that tell their own number everywhere."""
    number = torch.arange(10)
    acts = number[:, None, None].expand(10, 2, 3).float().contiguous()
    return TensorRows(acts, number, number // 3, number % 3)


def numbers(batches):
    return [rows.token_id.tolist() for rows in batches]


def test_every_row_once_in_order(source):
    assert numbers(source.in_order(4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_epoch_has_every_row_once_and_the_next_another_order(source):
    drawn = numbers(islice(source.shuffled(5, seed=1), 4))
    epochs = [drawn[0] + drawn[1], drawn[2] + drawn[3]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_only_full_batches_are_drawn(source):
    assert {len(rows) for rows in islice(source.shuffled(4, seed=1), 9)} == {4}


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_starting_later_is_as_if_the_earlier_had_been_drawn(source, start):
    drawn = numbers(islice(source.shuffled(4, seed=3), 10))
    assert numbers(islice(source.shuffled(4, seed=3, start=start), 10 - start)) == drawn[start:]


def test_the_seed_decides_the_order(source):
    first, again, other = (numbers(islice(source.shuffled(5, seed=s), 2)) for s in (1, 1, 2))
    assert first == again != other


def test_what_is_known_of_a_row_stays_with_it(source):
    for rows in islice(source.shuffled(4, seed=0), 5):
        assert torch.equal(rows.acts[:, 1, 2].long(), rows.token_id)
        assert torch.equal(rows.document * 3 + rows.position, rows.token_id)


def test_what_is_not_known_is_zero():
    rows = next(TensorRows(torch.randn(4, 2, 3)).in_order(4))
    assert not rows.token_id.any()
    assert rows.document.shape == rows.position.shape == (4,)


def test_the_key_is_of_the_content(source):
    same = TensorRows(source.acts.clone(), source.token_id, source.document, source.position)
    assert same.key == source.key
    changed = source.acts.clone()
    changed[9, 1, 2] += 1e-3
    others = [
        TensorRows(changed, source.token_id, source.document, source.position),
        TensorRows(source.acts, source.document, source.token_id, source.position),
        TensorRows(source.acts),
        TensorRows(source.acts.bfloat16()),
        TensorRows(source.acts.reshape(10, 3, 2)),
    ]
    assert len({each.key for each in others} | {source.key}) == 6


def test_matrices_of_two_models_become_pairs():
    base, tuned = torch.zeros(4, 3), torch.ones(4, 3)
    paired = rows_source(base, tuned)
    assert paired.acts[:, 0].eq(0).all()
    assert paired.acts[:, 1].eq(1).all()
    assert rows_source(paired.acts).acts is paired.acts
    with pytest.raises(MismatchError, match=r"\(4, 3\), \(5, 3\)"):
        rows_source(base, torch.ones(5, 3))


def test_wrong_shapes_and_too_few_rows_are_refused(source):
    with pytest.raises(MismatchError, match="row, model, d_model"):
        TensorRows(torch.zeros(4, 3))
    with pytest.raises(MismatchError, match="document has shape"):
        TensorRows(torch.zeros(4, 2, 3), document=torch.zeros(3))
    with pytest.raises(MismatchError, match="batches of 11 rows from 10"):
        next(source.shuffled(11, seed=0))


def test_an_epochs_order_is_a_permutation():
    assert sorted(epoch_order(50, 3, 7).tolist()) == list(range(50))
    assert epoch_order(50, 3, 7).tolist() != epoch_order(50, 7, 3).tolist()
