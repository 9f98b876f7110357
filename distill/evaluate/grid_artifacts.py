"""Grid artifacts: seams or a texture that repeats with the patches of a transformer."""

import numpy as np
from numpy.typing import NDArray

REACH = 4  # neighboring frequencies on each side, at most
_ROUNDING = 1 / 12  # variance of the error of rounding to whole numbers


def grid_energy(images: NDArray[np.uint8], period: int) -> NDArray[np.float64]:
    """Compute the energy at the period of a patch and its harmonics over that at neighboring frequencies: (N,).

    `images` are (N, H, W, 3) with sides that are multiples of `period`, in pixels. About 1 without a grid, whatever the
    images show; it grows with the energy of a grid. Seams, which are straight lines, and textures count one half each;
    each is a mean over both directions and all harmonics. A constant image gives 1, because the energy of 8-bit
    rounding is added everywhere.
    """
    horizontal, vertical = (_energy(x, period) for x in (images, images.transpose(0, 2, 1, 3)))
    return (horizontal + vertical) / 2


def _energy(images: NDArray[np.uint8], period: int) -> NDArray[np.float64]:
    """The ratio for frequencies along the width (N,). The height is folded to one period, where a grid adds up."""
    count, height, width, channels = images.shape
    folded = images.reshape(count, height // period, period, width, channels).mean(axis=1, dtype=np.float64)
    power = (np.abs(np.fft.fft2(folded, axes=(1, 2))) ** 2).sum(axis=-1)  # (N, period, width)
    power += channels * period * width * _ROUNDING / (height // period)
    patches = width // period
    harmonics = np.arange(patches, width, patches)  # frequency k / period is entry k * patches of the spectrum
    offsets = np.arange(1, min(REACH, max(1, (patches - 1) // 2)) + 1)
    neighbors = np.mean([power[..., (harmonics + d) % width] for d in (*offsets, *-offsets)], axis=0)
    ratios = power[..., harmonics] / neighbors
    seams, textures = ratios[:, 0], ratios[:, 1:]  # row 0 is constant across the fold
    return np.asarray((seams.mean(axis=1) + textures.mean(axis=(1, 2))) / 2)
