"""Evaluation of a small decoder: images of the same latents, decoded by the VAE and by the small decoder."""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from distill.evaluate.base import EvalPrompts, Images
from distill.evaluate.paired import psnr, sharpness, ssim
from distill.models.sd3 import decode_in_parts
from distill.models.vae import to_images
from distill.report.grid import labeled_grid

GRID = 16  # images in a grid
DETAIL = 256  # pixels; the side of the part that a grid shows, at most
AMPLIFIED = 8  # times the difference in a grid
SCORE_TARGET = 0.99  # of the VAE's score
ROUNDS = 12  # of the measurement of time


@dataclass(frozen=True)
class DecoderEvaluation:
    """The metrics of a small decoder, and the picture of its images beside the VAE's."""

    metrics: dict[str, float]
    picture: Image


class DecoderEvaluator:
    """Compares small decoders with the VAE on fixed latents (N, C, h, w), made of `prompts`.

    `scored` are the same prompts with the scorer of their dataset, if they are of one.
    """

    def __init__(
        self, vae: AutoencoderKL, latents: Tensor, prompts: Sequence[str], scored: EvalPrompts | None = None
    ) -> None:
        """Decode the latents with the VAE."""
        self._vae, self._latents, self._prompts, self._scored = vae, latents, prompts, scored
        self._full = _decode(vae, latents)
        self._score = None if scored is None else _overall(scored, self._full)

    def evaluate(self, small: AutoencoderTiny) -> DecoderEvaluation:
        """Evaluate a decoder as it is exported: its weights are rounded to fp16.

        `psnr` (dB) and `ssim` are means over images. `sharpness` is relative to the VAE's images. `color_shift` is the
        largest difference of a channel's mean in levels of 255. `time_ratio` is the time of decoding one image in fp32,
        relative to the VAE's. `score` and `full_score` are in [0, 1].
        """
        rounded = deepcopy(small).half().float()
        made = _decode(rounded, self._latents)
        metrics = {
            "psnr": float(psnr(made, self._full).mean()),
            "ssim": float(ssim(made, self._full).mean()),
            "sharpness": sharpness(made) / max(sharpness(self._full), 1e-6),
            "color_shift": float(np.abs(_channel_means(made) - _channel_means(self._full)).max()),
            "time_ratio": time_ratio(rounded, self._vae, self._latents[:1]),
        }
        if self._scored is not None and self._score is not None:
            metrics |= {"score": _overall(self._scored, made), "full_score": self._score}
            metrics["score_ratio"] = metrics["score"] / self._score if self._score else 1.0
        return DecoderEvaluation(metrics, self._picture(made))

    def _picture(self, made: Images) -> Image:
        """The first images, their middle at full resolution: the VAE's, the small decoder's, and the difference."""
        full, small = (_middle(images[:GRID]) for images in (self._full, made))
        difference = np.abs(full.astype(int) - small) * AMPLIFIED
        rows = [("full", full), ("small", small), (f"{AMPLIFIED} x |difference|", difference.clip(0, 255))]
        shown = [(name, images.astype(np.uint8)) for name, images in rows]
        return labeled_grid(shown, self._prompts[: len(full)])


def meets_score(metrics: dict[str, float]) -> bool:
    """Whether a dataset's score shows that the small decoder may be the default."""
    return metrics.get("score_ratio", 0.0) >= SCORE_TARGET


@torch.no_grad()
def _decode(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Images:
    parts = [to_images(decode_in_parts(vae, part.float())) for part in torch.split(latents, 64)]
    return np.concatenate(parts)


def time_ratio(small: AutoencoderTiny, vae: AutoencoderKL, latents: Tensor) -> float:
    """Measure the time of decoding the same latents, relative to the VAE's: the shortest of alternating rounds."""
    seconds = []
    for _ in range(ROUNDS):
        times = [time.perf_counter()]
        for decoder in (small, vae):
            _decode(decoder, latents)  # ends with a copy to the CPU, which waits for a GPU
            times.append(time.perf_counter())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    least = [min(each) for each in zip(*seconds, strict=True)]
    return float(least[0] / least[1])


def _overall(prompts: EvalPrompts, images: Images) -> float:
    """The mean over tasks of a dataset's scores."""
    return float(np.mean([values.mean() for values in prompts.scores(images).values()]))


def _channel_means(images: Images) -> NDArray[np.float64]:
    return np.asarray(images.mean(axis=(0, 1, 2), dtype=float))


def _middle(images: Images) -> Images:
    height, width = images.shape[1:3]
    side = min(height, width, DETAIL)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]
