"""The losses of a small decoder."""

from pathlib import Path

import torch

from distill.decoder.losses import feature_distance, gradient_l1, multiscale_l1
from distill.models.sd3 import load_vae
from distill.models.sd3_folder import SD3Folder


def test_a_constant_offset_counts_at_every_scale_and_has_no_gradient() -> None:
    target = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(multiscale_l1(target + 0.25, target, 3), torch.tensor(0.25))
    torch.testing.assert_close(gradient_l1(target + 0.25, target), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_fine_noise_disappears_at_coarse_scales_and_shows_in_the_gradient() -> None:
    target, checks = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = -1
    torch.testing.assert_close(multiscale_l1(checks, target, 2), torch.tensor(0.5))
    torch.testing.assert_close(gradient_l1(checks, target), torch.tensor(2.0))


def test_the_feature_distance_is_0_for_equal_pixels_and_trains_the_made_ones(teacher: Path) -> None:
    vae = load_vae(SD3Folder.read(teacher))
    target = torch.rand(2, 3, 16, 16)
    assert feature_distance(vae, target, target) == 0
    made = torch.rand(2, 3, 16, 16, requires_grad=True)
    feature_distance(vae, made, target).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
