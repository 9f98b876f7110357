"""What makes pixels: the `Backend` protocol, and a timed simulator for load tests and clients without a model."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.embeddings import UNSHARED, SharedEmbeddings
from service.errors import InvalidRequest, StartError

Pixels = NDArray[np.uint8]  # (B, H, W, 3)


@dataclass(frozen=True)
class ModelInfo:
    """What a server must know of a model without touching it. Sizes are (width, height), the native one first."""

    name: str
    owner: str
    created: int
    digest: str  # of the model's files
    sizes: tuple[tuple[int, int], ...]
    pixels_per_token: int  # side of the image patch that one transformer token stands for
    token_limit: int
    rows: int  # images computed together: a batch costs whole blocks of so many
    adapters: dict[str, str] = field(default_factory=dict)  # digests by name: the same digest, the same images
    max_steps: int = 1  # network evaluations per image that a request may choose; 1 for a one-step student
    runtime_fingerprint: str = ""  # what images depend on besides the files: precision, blocks, kernels, replaced parts

    @property
    def cache_key(self) -> str:
        """All of the model that an image's bits depend on."""
        return f"{self.digest} {self.runtime_fingerprint}"

    def check_steps(self, steps: int) -> None:
        """Raise InvalidRequest unless the model makes images in so many steps."""
        if not 1 <= steps <= self.max_steps:
            allowed = "one step; leave steps out" if self.max_steps == 1 else f"1 to {self.max_steps} steps"
            raise InvalidRequest(f"{self.name} makes images in {allowed}, not {steps}", "steps", "invalid_value")


@dataclass(frozen=True)
class Timing:
    """What a batch of a size takes of a device."""

    model: str
    width: int
    height: int
    batch: int
    seconds: dict[str, float]  # by stage: text, model, vae
    memory_bytes: int  # that the process held of the device after it

    @property
    def total(self) -> float:
        """Seconds from the prompts to the pixels, in one step."""
        return sum(self.seconds.values())

    def total_of(self, steps: int) -> float:
        """The same in several steps."""
        return self.total + (steps - 1) * self.seconds["model"]


@dataclass(frozen=True)
class EncodedPrompts:
    """Encoded prompts: what the network takes of them, and what a client is told."""

    conditions: Any
    tokens: Sequence[int]  # that the model sees, of each prompt
    truncated: Sequence[bool]  # whether it sees only the prompt's beginning
    hits: int = 0  # prompts that some worker had encoded before


class Backend(Protocol):
    """One model on one device, in three stages. Each is called by one thread at a time, and they run side by side.

    An image depends on its own prompt and seed alone, to the bit, whatever else is in its batch. All raise MemoryError
    where the device has too little, DeviceLost where it can compute no more, and anything else for a batch that fails.
    """

    info: ModelInfo
    setup: str  # what times and last bits depend on besides the model: device, data type, threads, blocks
    text_bytes: int  # of one prompt's embedding; 0 where none is shared

    def encode(self, prompts: Sequence[str], shared: SharedEmbeddings = UNSHARED) -> EncodedPrompts:
        """Prompts to what the network takes; what `shared` has is not encoded, and the rest is left there."""

    def add_adapter(self, name: str, folder: str) -> None:
        """Read a LoRA adapter and put it on the card, beside batches that run; raises StartError where it is none."""

    def remove_adapter(self, name: str) -> None:
        """Let go of an adapter; none of its batches is on the way any more."""

    def adapt(self, name: str | None, scale: float) -> None:
        """Denoise with this adapter from now on, or with none. Called by the thread that denoises."""

    def denoise(self, conditions: Any, seeds: Sequence[int], width: int, height: int, steps: int = 1) -> Any:
        """Latents, one for each condition and seed; raises FloatingPointError when one of them is not finite."""

    def decode(self, latents: Any) -> Pixels:
        """Latents to images."""

    def memory_bytes(self) -> int:
        """Memory of the device that this process holds. Safe from any thread."""

    def close(self) -> None:
        """Give the device's memory back. Called once, after the last batch."""


class DeviceLost(Exception):
    """The device is beyond use for this process; another process may find it well."""


class Simulator:
    """A backend that takes the time of a model and paints one color per seed.

    The times are a constant for each call and one for each image, or those that were measured of the model of `card`.
    """

    setup = "simulator"
    text_bytes = 0

    def __init__(
        self,
        call_seconds: float = 0.01,
        image_seconds: float = 0.002,
        fails_on: str | None = None,
        info: ModelInfo = ModelInfo("simulator", "simulator", 0, "simulator", ((64, 64), (128, 64)), 16, 77, 1),
        timings: Sequence[Timing] = (),
    ) -> None:
        self.info = info
        self._timings = timings
        self._call_seconds = call_seconds
        self._image_seconds = image_seconds
        self._fails_on = fails_on
        self._shift = 0

    def encode(self, prompts: Sequence[str], shared: SharedEmbeddings = UNSHARED) -> EncodedPrompts:
        """A token a word, start and end."""
        self._pass("text", len(prompts), *self.info.sizes[0])
        words = [len(prompt.split()) + 2 for prompt in prompts]
        limit = self.info.token_limit
        return EncodedPrompts(list(prompts), [min(count, limit) for count in words], [count > limit for count in words])

    def add_adapter(self, name: str, folder: str) -> None:
        """Takes any file of that name for an adapter."""
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        if not path.is_file():
            raise StartError(f"{path} is missing")
        self.info = replace(self.info, adapters=self.info.adapters | {name: f"adapter of {folder}"})

    def remove_adapter(self, name: str) -> None:
        """Forgets it."""
        self.info = replace(self.info, adapters={n: d for n, d in self.info.adapters.items() if n != name})

    def adapt(self, name: str | None, scale: float) -> None:
        """Adds the scale to the seed, and so to the color."""
        self._shift = int(1000 * scale) if name else 0

    def denoise(self, conditions: Any, seeds: Sequence[int], width: int, height: int, steps: int = 1) -> Any:
        """Takes its time in every step; raises for a prompt that holds the text that it was told to fail on."""
        for _ in range(steps):
            self._pass("model", len(seeds), width, height)
        if self._fails_on is not None and any(self._fails_on in prompt for prompt in conditions):
            raise RuntimeError("simulated failure")
        return [seed + self._shift + 10**6 * (steps - 1) for seed in seeds], width, height

    def decode(self, latents: Any) -> Pixels:
        """Flat images."""
        seeds, width, height = latents
        self._pass("vae", len(seeds), width, height)
        colors = [np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8) for seed in seeds]
        return np.stack([np.broadcast_to(color, (height, width, 3)) for color in colors])

    def memory_bytes(self) -> int:
        """It has no device."""
        return 0

    def close(self) -> None:
        """It holds nothing."""

    def _pass(self, stage: str, images: int, width: int, height: int) -> None:
        """Take a stage's time for so many images, in whole blocks."""
        known = [timing for timing in self._timings if (timing.width, timing.height) == (width, height)]
        if known:
            blocks = math.ceil(images / self.info.rows) * self.info.rows
            seconds = [timing.seconds[stage] for timing in known]
            time.sleep(float(np.interp(blocks, [timing.batch for timing in known], seconds)))
        elif stage == "model":
            time.sleep(self._call_seconds + self._image_seconds * images)
