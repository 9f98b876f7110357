"""The metrics of a run: means since the last line, to metrics.jsonl and to accelerate's trackers."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.config import RunConfig
from distill.files import append_line
from distill.methods.base import Loss
from distill.report.run_folder import METRICS, TIME_BUCKETS
from distill.training import checkpoint

SATURATED = 3.0  # absolute value above which latents, of standard deviation 1, are saturated
_LOG10 = "log10_"  # prefix of metrics whose mean is logged as its logarithm


class RoundMetrics:
    """Sums and counts of the metrics of one or more rounds, as tensors on the device, without synchronization.

    The losses oscillate around zero. More informative are `gap` (|u - v|^2, and its log10 by t), the fake's flow
    matching error, gradient norms, and the latents' standard deviation, diversity and saturation.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count the values that are finite; `skipped` counts the others."""
        finite = values.isfinite()
        sum_and_count = torch.stack([torch.where(finite, values, 0).sum().float(), finite.sum().float()])
        self._sums[name] = self._sums[name] + sum_and_count if name in self._sums else sum_and_count

    def add_loss(self, role: str, loss: Loss) -> None:
        """Add a loss and its metrics, over all t and by bucket of t; for the student also statistics of its latents."""
        self.add(f"loss/{role}", loss.value.detach())
        if role == "student":
            self._add_latents(loss.x_0)
        for name, values in loss.metrics.items():
            if name == "t":
                continue
            self.add(name, values.float())
            bucket = (loss.metrics["t"] * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
            for number in range(TIME_BUCKETS):
                inside = torch.where(bucket == number, values.float(), torch.nan)
                self.add(f"{_LOG10}{name}/t{number / TIME_BUCKETS:.1f}", inside)

    def _add_latents(self, x_0: Tensor) -> None:
        self.add("latent/std", x_0.std())
        self.add("latent/saturated", (x_0.abs() > SATURATED).float())
        flat = x_0.flatten(1)[:32].float()
        if len(flat) > 1:
            self.add("latent/diversity", torch.nn.functional.pdist(flat) / flat.shape[1] ** 0.5)

    def names(self) -> list[str]:
        return list(self._sums)

    def sums(self) -> Tensor:
        """Sum and count of each name, (names, 2)."""
        return torch.stack(list(self._sums.values()))


class MetricsLog:
    """Collects the metrics of rounds, and writes their means over rounds and processes to metrics.jsonl and trackers.

    `seconds/` are sums of the time of the update phases, or of whole rounds as CUDA graphs, and of waiting for data.
    `memory/peak` is that of the main process, in bytes.
    """

    def __init__(self, out: Path, accelerator: Accelerator, images: int, config: RunConfig) -> None:
        self._path = out / METRICS
        self._accelerator = accelerator
        self._rounds: dict[tuple[str, ...], Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._inner = 0.0
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.trim_lines(self._path, images)
        accelerator.init_trackers("distill", init_kwargs={"wandb": {"name": out.name, "dir": str(out)}})
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would write a second file of events
                tracker.store_init_configuration(config.identity())

    def add_round(self, names: Sequence[str], sums: Tensor) -> None:
        """Add the metrics of a round by name, with sum and count of each (names, 2)."""
        key = tuple(names)
        self._rounds[key] = self._rounds[key] + sums if key in self._rounds else sums

    def add_number(self, name: str, value: float) -> None:
        """Set a metric that is no mean."""
        self._numbers[name] = value

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`, without that of blocks inside of it."""
        outer, self._inner = self._inner, 0.0
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self._seconds[name] = self._seconds.get(name, 0) + took - self._inner
        self._inner = outer + took

    def write(self, images: int, wall_seconds: float) -> dict[str, float]:
        """Write a line, and return its metrics; all processes call this.

        `wall_seconds` is the training time of all images so far.
        """
        metrics = {f"seconds/{name}": value for name, value in self._seconds.items()} | self._numbers
        metrics["wall_seconds"] = wall_seconds
        metrics["memory/peak"] = peak_memory(self._accelerator.device)
        for names, sums in self._rounds.items():
            everywhere = self._accelerator.reduce(sums, "sum").tolist()
            for name, (total, count) in zip(names, everywhere, strict=True):
                if count:
                    mean = total / count
                    metrics[name] = math.log10(max(mean, 1e-12)) if name.startswith(_LOG10) else mean
        metrics = dict(sorted(metrics.items()))
        self._rounds.clear()
        self._numbers.clear()
        self._seconds.clear()
        if self._accelerator.is_main_process:
            append_line(self._path, {"images": images, **metrics})
        self._accelerator.log(metrics, step=images)
        return metrics


def sample_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sample at most 8191 evenly spaced elements of each tensor, scaled so that their norm estimates that of all."""
    parts = []
    for tensor in tensors:
        part = tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].float()
        parts.append(part * (tensor.numel() / part.numel()) ** 0.5)
    return torch.cat(parts)


def peak_memory(device: torch.device) -> float:
    """Peak memory of the process so far in bytes: on its GPU, or resident memory without a GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
