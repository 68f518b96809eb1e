"""Random walks that are drawn in few coordinates are those drawn in all."""

import pytest
import torch

from modeldiff.series_nulls import local_cosine, peaks, walk_cosines, walks


def direct(lengths, d, n, seed):
    """Walks drawn in all d coordinates."""
    ways = torch.randn(n, len(lengths), d, generator=torch.Generator().manual_seed(seed))
    ways = ways / ways.norm(dim=-1, keepdim=True) * lengths[:, None]
    return torch.cat([torch.zeros(n, 1, d), ways.cumsum(1)], 1)


@pytest.mark.parametrize("d", [1, 3, 9, 10, 200])
def test_walks_in_their_own_span_are_distributed_as_walks_in_the_whole_space(d):
    lengths = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0, 0.2, 1.0])
    n = 1500
    mine, theirs = torch.cat(list(walks(lengths, d, n, 0))), direct(lengths, d, n, 1)
    assert mine.shape == (n, 10, min(d, 9))
    ways = mine.diff(dim=1).norm(dim=-1)
    assert ways == pytest.approx(lengths.double().expand(n, -1), rel=1e-9)
    for k in (1, 3):
        both = [local_cosine(each.double(), k) for each in (mine, theirs)]
        for a, b in zip(*(each.flatten(1).T for each in both), strict=True):
            error = (a.var() / n + b.var() / n) ** 0.5
            assert float(a.mean() - b.mean()) == pytest.approx(0, abs=4 * float(error))
            assert float(a.std()) == pytest.approx(float(b.std()), rel=0.16)


def test_a_walk_in_one_dimension_goes_on_or_back():
    found = walk_cosines(torch.arange(6.0)[:, None], (1,), n=400)[1]
    assert set(found.unique().round(decimals=9).tolist()) == {-1.0, 1.0}
    assert float((found > 0).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_walks_are_a_function_of_their_seed_and_the_same_for_every_k():
    path = torch.randn(8, 30, generator=torch.Generator().manual_seed(3))
    both = [walk_cosines(path, ks, n=50, seed=7) for ks in ((1, 2), (2,))]
    assert torch.equal(both[0][2], both[1][2])
    assert not torch.equal(both[0][2], walk_cosines(path, (2,), n=50, seed=8)[2])


def test_a_path_that_stands_still_has_no_angle_there():
    path = torch.tensor([[0.0, 0], [1, 0], [1, 0], [2, 0], [2, 1], [2, 2]])
    assert local_cosine(path, 1).isnan().tolist() == [True, True, False, False]
    found = peaks(torch.stack([local_cosine(path, 1), torch.full((4,), torch.nan)]))
    assert found.at.tolist()[0] == 2
    assert found.height.tolist() == pytest.approx([0.0, -2.0])
    assert found.prominence.tolist() == pytest.approx([0.5, 0.0])
