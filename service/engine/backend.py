"""What makes pixels: the `Backend` protocol, and a timed simulator for load tests and clients without a model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (B, H, W, 3)


@dataclass(frozen=True)
class Card:
    """What a server must know of a model without touching it. Sizes are (width, height), the native one first."""

    name: str
    owner: str
    created: int
    sizes: tuple[tuple[int, int], ...]
    pixels_per_token: int  # side of the image patch that one transformer token stands for
    token_limit: int


class Backend(Protocol):
    """One model on one device; `generate` is called by one thread at a time. The worker process will go behind it."""

    card: Card

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int) -> Pixels:
        """One image per prompt and seed; an image depends on its own prompt and seed alone."""

    def count_tokens(self, prompt: str) -> tuple[int, bool]:
        """Text tokens that the model sees, and whether it sees only the prompt's beginning. Safe from any thread."""


class Simulator:
    """A backend that takes the time of a model and paints one colour per seed."""

    def __init__(self, call_seconds: float = 0.01, image_seconds: float = 0.002, fails_on: str | None = None) -> None:
        self.card = Card("simulator", "simulator", 0, ((64, 64), (128, 64)), 16, 77)
        self._call_seconds = call_seconds
        self._image_seconds = image_seconds
        self._fails_on = fails_on

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int) -> Pixels:
        """Flat images; raises for a prompt that holds the text that it was told to fail on."""
        time.sleep(self._call_seconds + self._image_seconds * len(prompts))
        if self._fails_on is not None and any(self._fails_on in prompt for prompt in prompts):
            raise RuntimeError("simulated failure")
        colours = [np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8) for seed in seeds]
        return np.stack([np.broadcast_to(colour, (height, width, 3)) for colour in colours])

    def count_tokens(self, prompt: str) -> tuple[int, bool]:
        """A token a word, start and end."""
        words = len(prompt.split()) + 2
        return min(words, self.card.token_limit), words > self.card.token_limit
