"""`Simulator`: a backend without a model, for load tests and clients under development."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.backend import BatchLimits, EncodedPrompts, ModelInfo, Pixels, Timing
from service.engine.embeddings import UNSHARED, SharedEmbeddings
from service.errors import StartError

_ANY_BATCH = BatchLimits((1,), sys.maxsize)
_INFO = ModelInfo("simulator", "simulator", 0, "simulator", ((64, 64), (128, 64)), 16, 77, (_ANY_BATCH, _ANY_BATCH))


class Simulator:
    """Takes the time of a model, and paints each image in one color that depends on the seed.

    The times are a constant for each run of the network and one for each image, or those of a profile.
    """

    environment = "simulator"
    text_bytes = 0
    slow_first_runs: Sequence[int] = ()

    def __init__(
        self,
        call_seconds: float = 0.01,
        image_seconds: float = 0.002,
        fails_on: str | None = None,
        info: ModelInfo = _INFO,
        timings: Sequence[Timing] = (),
    ) -> None:
        """A batch with a prompt that contains `fails_on` fails."""
        self.info = info
        self._timings = timings
        self._call_seconds = call_seconds
        self._image_seconds = image_seconds
        self._fails_on = fails_on
        self._shift = 0

    def encode(self, prompts: Sequence[str], shared: SharedEmbeddings = UNSHARED) -> EncodedPrompts:
        """Count a token for each word, and two for start and end."""
        self._sleep("text", len(prompts), *self.info.sizes[0])
        words = [len(prompt.split()) + 2 for prompt in prompts]
        limit = self.info.token_limit
        return EncodedPrompts(list(prompts), [min(count, limit) for count in words], [count > limit for count in words])

    def add_adapter(self, name: str, path: str) -> None:
        """Accept a file, or a folder with one, whatever it contains."""
        if not Path(path).is_file() and not any(Path(path).glob("*.safetensors")):
            raise StartError(f"{path} is missing")
        self.info = replace(self.info, adapters=self.info.adapters | {name: f"adapter of {path}"})

    def remove_adapter(self, name: str) -> None:
        self.info = self.info.without(name)

    def adapt(self, name: str | None, scale: float) -> None:
        """Shift the seed, and with it the color, by the scale."""
        self._shift = int(1000 * scale) if name else 0

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Any:
        """Return noise (B, H, W) that is the seed everywhere. It takes no memory for the pixels."""
        return np.broadcast_to(np.array(seeds)[:, None, None], (len(seeds), height, width))

    def denoise(self, conditions: Any, noise: Any, steps: int = 1) -> Any:
        images, height, width = noise.shape
        for _ in range(steps):
            self._sleep("model", images, width, height)
        if self._fails_on is not None and any(self._fails_on in prompt for prompt in conditions):
            raise RuntimeError("simulated failure")
        return np.broadcast_to(noise[:, :1, :1] + self._shift + 10**6 * (steps - 1), noise.shape)

    def decode(self, latents: Any) -> Pixels:
        images, height, width = latents.shape
        self._sleep("vae", images, width, height)
        colors = [np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8) for seed in latents[:, 0, 0]]
        return np.stack([np.broadcast_to(color, (height, width, 3)) for color in colors])

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Do nothing."""

    def _sleep(self, stage: str, images: int, width: int, height: int) -> None:
        """Take a stage's time for so many images, with padding."""
        known = [timing for timing in self._timings if (timing.width, timing.height) == (width, height)]
        if known:
            padded = self.info.limits(width, height).padded(images)
            seconds = [timing.seconds[stage] for timing in known]
            time.sleep(float(np.interp(padded, [timing.batch for timing in known], seconds)))
        elif stage == "model":
            time.sleep(self._call_seconds + self._image_seconds * images)
