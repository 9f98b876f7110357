"""The figures of a run: means since the last line, to metrics.jsonl and to accelerate's trackers."""

import json
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

from distill import checkpoint
from distill.config import Run
from distill.methods import Loss
from distill.runs import METRICS

BUCKETS = 5  # of t, for the gap between teacher and fake
SATURATED = 3.0  # latents have standard deviation 1; beyond this they are called saturated


class Log:
    """Figures are added while turns go on, and written as a line at the cadence.

    The losses swing round zero and say little. What tells whether a run is well: `gap` (log10 |u - v|^2 by t),
    the fake's flow matching error, gradient norms, and the latents' spread, diversity and saturation. `seconds/` are
    sums: what the roles' turns took, and how long they waited for data. `memory/peak` is of the main process, in bytes.
    Figures stay on their device until a line is written, so that nothing waits for them.
    """

    def __init__(self, out: Path, accelerator: Accelerator, images: int, config: Run) -> None:
        self._path = out / METRICS
        self._accelerator = accelerator
        self._values: dict[str, list[float | Tensor]] = {}
        self._by_time: list[tuple[str, Tensor, Tensor]] = []
        self._seconds: dict[str, float] = {}
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.trim_lines(self._path, images)
        accelerator.init_trackers("distill", init_kwargs={"wandb": {"name": out.name, "dir": str(out)}})
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would write a second file of events for it
                tracker.store_init_configuration(config.identity())

    def add(self, name: str, value: float | Tensor) -> None:
        self._values.setdefault(name, []).append(value)

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Count what is done here as time of `name`."""
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0) + time.perf_counter() - began

    def add_loss(self, role: str, loss: Loss) -> None:
        """Squared distances by bucket of t, and over all; in the student's turn also how its images are spread."""
        self.add(f"loss/{role}", loss.value.detach())
        if role == "student":
            self.add_latents(loss.x_0)
        for name, values in loss.figures.items():
            if name != "t":
                self.add(name, values.float().mean())
                self._by_time.append((name, loss.figures["t"], values.float()))

    def add_latents(self, x_0: Tensor) -> None:
        self.add("latent/std", x_0.std())
        self.add("latent/saturated", (x_0.abs() > SATURATED).float().mean())
        flat = x_0.flatten(1)[:32].float()
        if len(flat) > 1:
            self.add("latent/diversity", torch.nn.functional.pdist(flat).mean() / flat.shape[1] ** 0.5)

    @contextmanager
    def update_ratio(self, role: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        """|update| / |weights| of the step taken inside, over evenly spaced numbers of each tensor."""
        before = [_sample(tensor) for tensor in tensors]
        yield
        change = size = 0.0
        for tensor, old in zip(tensors, before, strict=True):
            change += float((_sample(tensor) - old).square().mean()) * tensor.numel()
            size += float(old.square().mean()) * tensor.numel()
        self.add(f"update_ratio/{role}", math.sqrt(change / size))

    def write(self, images: int) -> dict[str, float]:
        for name, t, values in self._by_time:
            buckets = (t.cpu() * BUCKETS).long().clamp(max=BUCKETS - 1)
            for bucket in sorted(set(buckets.tolist())):
                inside = values.cpu()[buckets == bucket]
                self.add(f"log10_{name}/t{bucket / BUCKETS:.1f}", inside.mean().clamp(1e-12).log10())
        figures = {f"seconds/{name}": value for name, value in self._seconds.items()}
        figures["memory/peak"] = _peak_memory(self._accelerator.device)
        for name, added in self._values.items():
            finite = [number for number in map(float, added) if math.isfinite(number)]  # `skipped` counts the others
            if finite:
                figures[name] = sum(finite) / len(finite)
        figures = dict(sorted(figures.items()))
        self._values.clear()
        self._by_time.clear()
        self._seconds.clear()
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"images": images, **figures}) + "\n")
        self._accelerator.log(figures, step=images)
        return figures


def _sample(tensor: Tensor) -> Tensor:
    """At most about 4096 numbers of a tensor: enough for a norm, and no second copy of a large model."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].float().clone()


def _peak_memory(device: torch.device) -> float:
    """Bytes at the process's heaviest moment so far: on its GPU, or all that it held where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
