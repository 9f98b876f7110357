"""Metrics of images against others of the same content: uint8 (N, H, W, 3), a number for each image.

Images are measured one by one, because a metric's arrays in float64 take up to a hundred times an image's bytes.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from distill.evaluate.base import Images

Numbers = NDArray[np.float64]

MOST_PSNR = 100.0  # dB; of equal images, whose ratio is infinite
_SIGMA, _RADIUS = 1.5, 5  # of the Gaussian window of SSIM
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(made: Images, target: Images) -> Numbers:
    """Compute the peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE), at most MOST_PSNR."""
    error = np.array([np.square(a.astype(float) - b).mean() for a, b in zip(made, target, strict=True)])
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 255**2 / 10 ** (MOST_PSNR / 10))))


def ssim(made: Images, target: Images) -> Numbers:
    """Compute the structural similarity in [-1, 1], 1 for equal images, averaged over channels.

    The window is a Gaussian of 11 x 11 pixels and standard deviation 1.5 (Wang et al., IEEE TIP 2004).
    """
    return np.array([_ssim(a.astype(float), b.astype(float)) for a, b in zip(made, target, strict=True)])


def _ssim(a: Numbers, b: Numbers) -> float:
    """The structural similarity of two images (H, W, 3)."""
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((similar / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))).mean())


def sharpness(images: Images) -> float:
    """Compute the mean absolute difference of neighboring pixels, across and down, in levels of 255."""
    count, height, width, channels = images.shape
    down, across = (sum(int(np.abs(np.diff(x.astype(int), axis=axis)).sum()) for x in images) for axis in (0, 1))
    vertical, horizontal = count * (height - 1) * width * channels, count * height * (width - 1) * channels
    return float(down / vertical + across / horizontal) / 2


def _blur(image: Numbers) -> Numbers:
    return np.asarray(ndimage.gaussian_filter(image, _SIGMA, axes=(0, 1), radius=_RADIUS))
