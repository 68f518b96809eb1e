import pytest
import torch

from modeldiff.dictionaries.codes import Codes
from modeldiff.errors import MismatchError


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_codes_are_the_matrix_they_were_made_of(density):
    dense = torch.randn(13, 7) * (torch.rand(13, 7) < density)
    codes = Codes.of(dense)
    assert torch.equal(codes.dense(), dense)
    assert len(codes) == 13
    assert len(codes.value) == int((dense != 0).sum())


def test_rows_without_latents_keep_their_place():
    codes = Codes.of(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))
    assert codes.offsets.tolist() == [0, 0, 1, 1, 3, 3]
    assert codes.row.tolist() == [1, 3, 3]
    assert codes.latent.tolist() == [0, 0, 1]


def test_no_rows_are_codes_too():
    codes = Codes.of(torch.zeros(0, 4))
    assert (len(codes), codes.dense().shape) == (0, (0, 4))


def test_latents_and_values_go_together():
    with pytest.raises(MismatchError, match="go together"):
        Codes(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([1.0]), 3)
