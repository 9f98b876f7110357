"""Profiles: time and memory of batches of each size, measured once and stored by device and model."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from service.engine.backend import Backend, ModelInfo, Timing
from service.errors import StartError
from service.files import atomic_write

FORMAT: Literal[3] = 3
REPEATS = 3  # the median counts; the first run of a size is not timed


class Profile(msgspec.Struct, frozen=True):
    """A model's times on one device, in the order of its sizes and of batch size."""

    format: Literal[3]
    environment: str
    info: ModelInfo
    timings: Sequence[Timing]


def growing_sizes(max_batch: int) -> list[int]:
    """Return the powers of two up to a number, and the number."""
    return [*(2**i for i in range((max_batch - 1).bit_length())), max_batch]


def measure(backend: Backend, batches: Sequence[int] = (), repeats: int = REPEATS) -> list[Timing]:
    """Time every image size with each batch size, with its padding. This also warms up the device.

    The smallest batch and a batch of the largest part are always timed, and no batch over `BatchLimits.largest`.
    Batches that do not fit into the device's memory are left out. Raises StartError if the smallest batch does not fit,
    or if a run fails for another reason.
    """
    timings = []
    for (width, height), limits in zip(backend.info.sizes, backend.info.batches, strict=True):
        padded = {limits.padded(batch) for batch in (1, limits.sizes[-1], *batches)}
        for batch in sorted(batch for batch in padded if batch <= limits.largest):
            try:
                timings.append(_time(backend, width, height, batch, repeats))
            except Exception as error:
                if isinstance(error, MemoryError) and batch > limits.sizes[0]:
                    break
                raise StartError(f"{backend.info.name} fails at {width}x{height}: {error}") from error
    return timings


def recall(backend: Backend, batches: Sequence[int], folder: Path) -> list[Timing]:
    """Read the profile of a backend, or measure and write it.

    Batch sizes whose first run is slow, and the smallest ones, are run also if the profile exists.
    """
    path = profile_path(folder, backend)
    if path.exists():
        measure(backend, backend.slow_first_runs, repeats=1)
        # A copy of a model under another name has the same digest.
        return [replace(timing, model=backend.info.name) for timing in read_profile(path).timings]
    profile = Profile(FORMAT, backend.environment, backend.info, measure(backend, (*batches, *backend.slow_first_runs)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:  # concurrent workers may write the same file
        file.write(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    return list(profile.timings)


def batch_cap(timings: Sequence[Timing], seconds: float | None) -> int:
    """Return the largest measured batch of a size that takes at most so long, or the smallest one."""
    inside = [timing.batch for timing in timings if seconds is None or timing.total() <= seconds]
    return max(inside, default=min(timing.batch for timing in timings))


def profile_path(folder: Path, backend: Backend) -> Path:
    """Return the path of a backend's profile, named after its environment, the model's files and the format."""
    environment = re.sub(r"[^A-Za-z0-9]+", "-", backend.environment).strip("-")
    return folder / f"{environment}.{backend.info.digest[:16]}.{FORMAT}.json"


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises StartError for a file that is not a profile."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise StartError(f"{path} is not a profile ({error}); make one with `fgm-service profile`") from None


def _time(backend: Backend, width: int, height: int, batch: int, repeats: int) -> Timing:
    """Run a batch once without timing, then so many times."""
    runs = [_run(backend, width, height, [f"warm-up {i} {row}" for row in range(batch)]) for i in range(repeats + 1)]
    middle = sorted(runs[1:], key=lambda seconds: sum(seconds.values()))[repeats // 2]
    return Timing(backend.info.name, width, height, batch, middle, backend.memory_bytes())


def _run(backend: Backend, width: int, height: int, prompts: Sequence[str]) -> dict[str, float]:
    """Return the seconds of each stage. The prompts must not be cached."""
    began = time.perf_counter()
    text = backend.encode(prompts)
    encoded = time.perf_counter()
    latents = backend.denoise(text.conditions, backend.noise(range(len(prompts)), width, height))
    denoised = time.perf_counter()
    backend.decode(latents)
    return {"text": encoded - began, "model": denoised - encoded, "vae": time.perf_counter() - denoised}
