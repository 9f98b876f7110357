"""The training of a small decoder: it decodes parts of latents, and its pixels are compared with the VAE's.

A step depends only on the weights, the state of the optimizer and the indices of its images, so that a resumed training
is bit-identical to an uninterrupted one.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from distill.decoder.latents import LatentSet
from distill.decoder.losses import feature_distance, gradient_l1, multiscale_l1
from distill.decoder.recipe import SCALES, DecoderConfig
from distill.errors import DivergedError
from distill.files import append_line
from distill.models.device import autocast, to_device
from distill.models.sd3 import decode_latents
from distill.philox import Draw
from distill.report.run_folder import METRICS
from distill.training import checkpoint
from distill.training.ema import average_into, new_share
from distill.training.metrics import RoundMetrics, peak_memory
from distill.training.optimizers import set_rate, step
from distill.training.rate_schedule import RateSchedule
from distill.training.state import TrainingProgress, load_state, save_state

CHECKPOINTS = "checkpoints"
MOST_SKIPPED = 3  # steps in a row whose gradient is not finite
TARGET_BYTES = 1 << 30  # targets of small images are held in so much memory at most
WARM, TIMED = 3, 6  # steps of the measurement of the speed


class DecoderTraining:
    """A small decoder with its average and its optimizer. `average` (an AutoencoderTiny) is what is exported."""

    def __init__(self, config: DecoderConfig, vae: AutoencoderKL, small: AutoencoderTiny, latents: LatentSet) -> None:
        """`vae` is frozen and on the device of the training; `small` is untrained."""
        self.config = config
        self.device = vae.device
        self._vae, self._latents = vae, latents
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._schedule = RateSchedule(config.images, config.batch, config.warmup, decay=config.images)
        self._targets: dict[int, Tensor] = {}  # by row of the latents, in fp16
        if self.device.type == "cpu":  # where convolutions are faster in this format
            vae.to(memory_format=torch.channels_last)
            small.to(memory_format=torch.channels_last)
        self._small = small.to(self.device).train()
        self.average = deepcopy(self._small).eval().requires_grad_(False)
        fused = self.device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(
            self._small.decoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=fused
        )

    def step(self, images: int) -> tuple[dict[str, Tensor], Tensor]:
        """Train on the batch from an index on; return the metrics (), and whether the gradient was finite ()."""
        # 1. parts of latents, and what the VAE decodes
        indices = torch.arange(images, images + self.config.batch)
        z, target = self._examples(Draw(self.config.seed, "decoder", indices))

        # 2. what the small decoder does
        made = decode_latents(self._small, z)

        # 3. losses
        weights = self.config.weights
        losses = {
            "l1": multiscale_l1(made, target, SCALES),
            "squared": F.mse_loss(made, target),
            "gradient": gradient_l1(made, target),
        }
        if weights.feature:
            few = math.ceil(self.config.feature_share * len(made))
            losses["feature"] = feature_distance(self._vae, made[:few], target[:few])
        loss = torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()

        # 4. step
        set_rate(self._optimizer, self.config.learning_rate * self._schedule.factor(images))
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._small.decoder.parameters(), 1.0)
        sound = norm.isfinite() & loss.isfinite()
        step(self._optimizer, sound)
        share = new_share(self.config.ema_half_life, images + self.config.batch, self.config.batch)
        average_into(self.average.decoder.parameters(), self._small.decoder.parameters(), share)

        metrics = {f"loss/{name}": value.detach() for name, value in losses.items()}
        metrics |= {"gradient_norm": norm, "psnr": 10 * torch.log10(4 / losses["squared"].detach().clamp(min=1e-10))}
        metrics["skipped"] = (~sound).float()
        return metrics, sound

    def _examples(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draw square parts (B, C, c, c) of latents; return them and the pixels (B, 3, H, W) that the VAE decodes."""
        rows = draw.integers(len(self._latents))
        latents = self._latents.rows(rows).cpu()
        height, width = latents.shape[-2:]
        side = max(1, min(height, width, self.config.crop // self._factor))
        tops, lefts = draw.integers(height - side + 1).tolist(), draw.integers(width - side + 1).tolist()
        parts = zip(latents, tops, lefts, strict=True)
        z = torch.stack([x[:, top : top + side, left : left + side] for x, top, left in parts])
        z = to_device(z, self.device).float()
        if self.device.type == "cpu":
            z = z.contiguous(memory_format=torch.channels_last)
        if side == height == width and len(self._latents) * 2 * 3 * (side * self._factor) ** 2 <= TARGET_BYTES:
            return z, self._kept_targets(z, rows.tolist())
        return z, self._decode(z)

    def _kept_targets(self, z: Tensor, rows: Sequence[int]) -> Tensor:
        """The targets of whole latents, each decoded alone and once, so that its bits do not depend on a batch."""
        for i, row in enumerate(rows):
            if row not in self._targets:
                self._targets[row] = self._decode(z[i : i + 1]).half()
        return torch.cat([self._targets[row] for row in rows]).float()

    def _decode(self, z: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device):
            return decode_latents(self._vae, z).float().clamp(-1, 1)

    def run(self, out: Path) -> Iterator[TrainingProgress]:
        """Train to the budget, from the newest checkpoint in `out`; write metrics and checkpoints.

        Raises CheckpointError for a checkpoint of another configuration, DivergedError for gradients that are not
        finite several times in a row.
        """
        config, modules = self.config, {"decoder": self._small, "ema": self.average}
        images = load_state(out / CHECKPOINTS, modules, self._optimizer, config)
        self._match_formats()
        log = _Log(out / METRICS, images, self.device)
        skipped = 0
        with _deterministic():
            while images < config.images:
                started = time.perf_counter()
                metrics, sound = self.step(images)
                skipped = 0 if bool(sound) else skipped + 1  # waits for the device
                if skipped > MOST_SKIPPED:
                    raise DivergedError(
                        f"the gradient was not finite {skipped} times in a row after {images} images; lower "
                        "learning_rate; the last checkpoint is sound"
                    )
                log.add(metrics, time.perf_counter() - started)
                before, images = images, images + config.batch
                save = partial(save_state, out / CHECKPOINTS, modules, self._optimizer, images, config)
                progress = TrainingProgress(before, images, config.images, {}, save)
                finished = images >= config.images
                if finished or progress.crosses(config.log_every):
                    progress.metrics.update(log.write(images))
                if finished or progress.crosses(config.checkpoint_every):
                    save()
                yield progress

    def _match_formats(self) -> None:
        """Give the optimizer's moments the memory format of their weights, as the fused kernel expects them."""
        for weight, moments in self._optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(moment)

    def speed(self) -> float:
        """Measure images per second. The weights change, so a training that is measured is not continued."""
        times = []
        with _deterministic():
            for first, count in ((0, WARM), (WARM, TIMED)):
                for number in range(first, first + count):
                    bool(self.step(number * self.config.batch)[1])
                times.append(time.perf_counter())
        return TIMED * self.config.batch / (times[1] - times[0])


class _Log:
    """Sums the metrics of steps, and writes their means as lines of the run's log."""

    def __init__(self, path: Path, images: int, device: torch.device) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.trim_lines(path, images)
        self._path, self._device = path, device
        lines = path.read_text().splitlines() if path.exists() else []
        self._seconds = float(json.loads(lines[-1]).get("wall_seconds", 0)) if lines else 0.0
        self._steps = RoundMetrics()

    def add(self, metrics: dict[str, Tensor], seconds: float) -> None:
        """Add the metrics of a step and the seconds that it took; values that are not finite are left out."""
        self._seconds += seconds
        for name, value in metrics.items():
            self._steps.add(name, value)

    def write(self, images: int) -> dict[str, float]:
        """Write a line, and return its metrics."""
        sums = zip(self._steps.names(), self._steps.sums().tolist(), strict=True)
        metrics: dict[str, float] = {name: total / count for name, (total, count) in sums if count}
        metrics["wall_seconds"] = self._seconds
        metrics["memory/peak"] = peak_memory(self._device)
        append_line(self._path, {"images": images, **dict(sorted(metrics.items()))})
        self._steps = RoundMetrics()
        return metrics


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let cuDNN only use algorithms that give the same bits each time."""
    flags: Any = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    with flags:
        yield
