"""The size of a grid's tiles."""

import numpy as np
import pytest

from distill.report.grid import GAP, LARGEST, TILE, labeled_grid, tile


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, TILE), (200, 160, 200), (1024, 832, LARGEST)])
def test_large_images_have_large_tiles_and_keep_their_proportions(height, width, side):
    """A tile of 128 pixels would hide what an image of 1024 looks like."""
    image = np.full((height, width, 3), 7, np.uint8)
    page = np.asarray(labeled_grid([("", image[None]), ("", image[None])], ["a"]))
    inked = np.argwhere((page == 7).all(-1))
    across, down = np.ptp(inked[:, 1]) + 1, np.ptp(inked[:, 0]) + 1
    assert (down, across) == (2 * side + GAP, round(side * width / height))
    assert tile(image).shape == (TILE, TILE, 3)
