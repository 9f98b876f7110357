"""A grid of a known period and strength is found; other images have none."""

import numpy as np
import pytest

from distill.evaluate.grid_artifacts import grid_energy

PERIOD = 8


def natural(count: int, height: int, width: int) -> np.ndarray:
    """Images (N, H, W, 3) whose amplitudes fall with the frequency, as those of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    rng = np.random.default_rng(0)
    pixels = np.fft.ifft2(np.fft.fft2(rng.normal(size=(count, 3, height, width))) / frequency).real
    return (pixels / pixels.std() * 40 + 128).transpose(0, 2, 3, 1)


def energy(pixels: np.ndarray) -> float:
    return float(grid_energy(pixels.round().clip(0, 255).astype(np.uint8), PERIOD).mean())


def grid(kind: str, height: int, width: int) -> np.ndarray:
    added = np.zeros((height, width, 1))
    if kind in ("vertical", "both"):
        added[:, ::PERIOD] = 1
    if kind in ("horizontal", "both"):
        added[::PERIOD] = 1
    if kind == "texture":
        texture = np.random.default_rng(1).normal(size=(PERIOD, PERIOD, 1))
        added = np.tile(texture, (height // PERIOD, width // PERIOD, 1))
    if kind == "other period":
        added[:, :: PERIOD + 1] = 1
    return added


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
@pytest.mark.parametrize("kind", ["vertical", "horizontal", "both", "texture"])
def test_energy_rises_with_the_strength_of_a_grid(kind: str, size: tuple[int, int]) -> None:
    clean, added = natural(6, *size), grid(kind, *size)
    values = [energy(clean + strength * added) for strength in (0, 2, 4, 8)]
    assert values[0] == pytest.approx(1, abs=0.1)
    assert values == sorted(values)
    assert values[-1] > 3 * values[0]  # 8 of 255 gray levels


def test_other_periods_and_blank_images_are_no_grid() -> None:
    clean = natural(6, 96, 160)
    assert energy(clean + 8 * grid("other period", 96, 160)) == pytest.approx(energy(clean), rel=0.1)
    assert energy(np.full((2, 64, 64, 3), 7.0)) == pytest.approx(1)
