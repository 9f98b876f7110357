"""Conversions between 8-bit images and the pixels that an autoencoder takes and gives."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_pixels(images: NDArray[np.uint8], device: torch.device | None = None) -> Tensor:
    """Convert uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1], on a device if one is given."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert float (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3), on the same device."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Convert float (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3), on the CPU."""
    return np.asarray(to_bytes(pixels).cpu().numpy())
