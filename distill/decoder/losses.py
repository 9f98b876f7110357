"""The losses of a small decoder: its pixels against those of the VAE.

Pixels are (B, 3, H, W), nominally in [-1, 1].
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from distill.models.device import autocast


def multiscale_l1(made: Tensor, target: Tensor, scales: int) -> Tensor:
    """The mean absolute error, averaged over `scales` resolutions, each half as high as the one before."""
    total = made.new_zeros(())
    for scale in range(scales):
        if scale:
            made, target = F.avg_pool2d(made, 2), F.avg_pool2d(target, 2)
        total = total + F.l1_loss(made, target)
    return total / scales


def gradient_l1(made: Tensor, target: Tensor) -> Tensor:
    """The mean absolute error of the differences between neighboring pixels, across and down: edges and texture."""
    across, down = (F.l1_loss(made.diff(dim=dim), target.diff(dim=dim)) for dim in (-1, -2))
    return (across + down) / 2


def feature_distance(vae: AutoencoderKL, made: Tensor, target: Tensor) -> Tensor:
    """A perceptual distance without external weights: in features of the VAE's own encoder.

    The mean absolute difference after each of its down-sampling blocks, relative to the mean of the target's features
    there, so that all blocks of any VAE count alike.
    """
    with autocast(made.device):
        with torch.no_grad():
            wanted = _features(vae, target)
        found = _features(vae, made)
    distances = [F.l1_loss(a.float(), b.float()) / b.float().abs().mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(distances).mean()


def _features(vae: AutoencoderKL, pixels: Tensor) -> list[Tensor]:
    """The output of each down-sampling block of the encoder."""
    x = vae.encoder.conv_in(pixels)
    features = []
    for block in vae.encoder.down_blocks:
        x = block(x)
        features.append(x)
    return features
