"""The images of an evaluation that its picture shows."""

import numpy as np
from numpy.typing import NDArray

from distill.evaluate.base import Images
from distill.report.grid import tile

PICTURED = 8  # prompts in an evaluation's picture


class TopTiles:
    """Tiles of the PICTURED images with the highest values of all that were added; the others are not kept."""

    def __init__(self) -> None:
        self._indices: list[int] = []  # ascending, so that of equal values the first image comes first
        self._values = np.zeros(0)
        self._tiles: list[NDArray[np.uint8]] = []

    def add(self, first: int, values: NDArray[np.float64], images: Images) -> None:
        """Add images (N, H, W, 3) that count up from the index `first`, with their values (N,)."""
        indices = [*self._indices, *range(first, first + len(values))]
        every = np.concatenate([self._values, values])
        chosen = sorted(_highest(every))
        kept = len(self._tiles)
        self._tiles = [self._tiles[i] if i < kept else tile(images[i - kept]) for i in chosen]
        self._indices, self._values = [indices[i] for i in chosen], every[chosen]

    def ordered(self) -> tuple[list[int], Images]:
        """The indices and tiles (N, side, side, 3) of the images, the highest value first."""
        order = _highest(self._values)
        return [self._indices[i] for i in order], np.stack([self._tiles[i] for i in order])


def _highest(values: NDArray[np.float64]) -> list[int]:
    return [int(i) for i in np.argsort(-values, kind="stable")[:PICTURED]]
