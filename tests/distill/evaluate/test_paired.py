"""Metrics of pairs of images: known values."""

import numpy as np
import pytest

from distill.evaluate.paired import MOST_PSNR, psnr, sharpness, ssim

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)


def test_psnr_is_that_of_a_known_error() -> None:
    made = np.where(IMAGES < 128, IMAGES + 5, IMAGES - 5).astype(np.uint8)
    np.testing.assert_allclose(psnr(made, IMAGES), 20 * np.log10(255 / 5))
    np.testing.assert_allclose(psnr(IMAGES, IMAGES), MOST_PSNR)


def test_ssim_falls_from_1_with_noise_and_is_that_of_flat_images() -> None:
    noise = RNG.normal(0, 1, IMAGES.shape)
    noisy = [np.clip(IMAGES + sigma * noise, 0, 255).round().astype(np.uint8) for sigma in (0, 10, 60)]
    values = [float(ssim(made, IMAGES).mean()) for made in noisy]
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] > values[2]
    flat, other = (np.full((1, 16, 16, 3), value, np.uint8) for value in (100, 120))
    constant = (0.01 * 255) ** 2  # without variance, only the means are compared
    expected = (2 * 100 * 120 + constant) / (100**2 + 120**2 + constant)
    np.testing.assert_allclose(ssim(flat, other), expected)


def test_sharpness_is_the_difference_between_neighbors() -> None:
    stripes = np.zeros((1, 4, 6, 3), np.uint8)
    stripes[:, :, ::2] = 10
    assert sharpness(stripes) == 5  # 10 across, 0 down
