"""The average of weights: its half-life is in images, whatever the batch."""

import pytest
import torch

from distill.training.ema import average_into, new_share


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_old_weights_count_half_after_the_half_life(batch):
    average, weights = [torch.zeros(3)], [torch.ones(3)]
    for images in range(100_000 + batch, 101_000 + 1, batch):
        average_into(average, weights, new_share(1000, images, batch))
    torch.testing.assert_close(average[0], torch.full((3,), 0.5), atol=1e-3, rtol=0)


def test_the_half_life_is_at_most_a_tenth_of_the_images_seen():
    assert new_share(1000, 500, 50) == pytest.approx(0.5)
    assert new_share(1000, 8, 8) > 0.99  # the first steps replace the weights that training started from


def test_a_half_life_of_nothing_is_no_average():
    assert new_share(0, 10**6, 8) == 1


def test_the_share_may_be_a_tensor_that_changes_between_replays():
    average, share = [torch.zeros(2)], torch.tensor(0.25)
    average_into(average, [torch.ones(2)], share)
    share.fill_(1.0)
    average_into(average, [torch.full((2,), 3.0)], share)
    torch.testing.assert_close(average[0], torch.full((2,), 3.0))
