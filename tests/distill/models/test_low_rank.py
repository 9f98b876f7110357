"""The nearest matrix of low rank, against the singular value decomposition."""

import pytest
import torch

from distill.models.low_rank import nearest_product


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_product_is_the_truncated_decomposition(shape, rank):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down = nearest_product(change, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_no_change_gives_an_adapter_that_does_nothing_and_can_learn(shape):
    up, down = nearest_product(torch.zeros(shape), 3)
    assert not up.any()
    torch.testing.assert_close(down @ down.T, torch.eye(3))
