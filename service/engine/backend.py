"""The `Backend` protocol: one model on one device, in three stages; and the facts that it reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.embeddings import UNSHARED, SharedEmbeddings
from service.errors import InvalidRequest, no_adapter

Pixels = NDArray[np.uint8]  # (B, H, W, 3)


@dataclass(frozen=True)
class BatchLimits:
    """The batch sizes in which a model computes images of one size, ascending. A batch is computed in parts of them.

    The last part is padded to one of the sizes. Batches of more than `largest` images are not faster per image.
    """

    sizes: tuple[int, ...]
    largest: int

    def padded(self, images: int) -> int:
        """Return the number of images that are computed for so many."""
        rest = images % self.sizes[-1]
        return images - rest + (min(size for size in self.sizes if size >= rest) if rest else 0)

    def unpadded(self, images: int) -> int:
        """Return the largest number, at most so many, that needs no padding; 0 if there is none."""
        rest = images % self.sizes[-1]
        return images - rest + max((size for size in self.sizes if size <= rest), default=0)


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a loaded model. Sizes are (width, height), the native one first."""

    name: str
    owner: str
    created: int
    digest: str  # of the model's files
    sizes: tuple[tuple[int, int], ...]
    pixels_per_token: int  # side of the image patch of one transformer token
    token_limit: int
    batches: tuple[BatchLimits, ...]  # of each size
    adapters: dict[str, str] = field(default_factory=dict)  # digests by name; equal digests give equal images
    max_steps: int = 1  # largest number of network evaluations per image; 1 for a one-step student
    runtime_fingerprint: str = ""  # what images depend on besides the files, such as precision and batch buckets
    decoder: Literal["full", "small"] = "full"  # what decodes latents: the VAE, or a small decoder
    decoder_digest: str | None = None  # of a small decoder's files
    description: str = ""  # of the model's card
    examples: tuple[str, ...] = ()  # prompts that the card names

    def limits(self, width: int, height: int) -> BatchLimits:
        """Return the batches of a supported size."""
        return self.batches[self.sizes.index((width, height))]

    @property
    def cache_key(self) -> str:
        """A key of everything in the model that determines the bits of an image."""
        return f"{self.digest} {self.runtime_fingerprint}"

    def without(self, adapter: str) -> "ModelInfo":
        """Return the info of the model after an adapter is unloaded."""
        return replace(self, adapters={name: digest for name, digest in self.adapters.items() if name != adapter})

    @property
    def steps_advice(self) -> str:
        allowed = "one step" if self.max_steps == 1 else f"1 to {self.max_steps} steps"
        return f"{self.name} makes images in {allowed}; leave steps out for one step"

    def check(self, adapter: str | None, steps: int) -> None:
        """Raise InvalidRequest for an adapter that is not loaded, or an unsupported number of steps."""
        if adapter is not None and adapter not in self.adapters:
            raise no_adapter(self.name, adapter, self.adapters)
        if not 1 <= steps <= self.max_steps:
            raise InvalidRequest(f"steps: {self.steps_advice}", "steps", "invalid_value")


@dataclass(frozen=True)
class Timing:
    """Time and memory of a batch of one size on a device, in one step."""

    model: str
    width: int
    height: int
    batch: int
    seconds: dict[str, float]  # by stage: text, model, vae
    memory_bytes: int  # of the device, held by the process after the batch

    def total(self, steps: int = 1) -> float:
        """Return the seconds from the prompts to the pixels."""
        return sum(self.seconds.values()) + (steps - 1) * self.seconds["model"]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the network takes them, and facts that clients are given."""

    conditions: Any
    tokens: Sequence[int]  # of each prompt, as the model sees it
    truncated: Sequence[bool]  # whether the model sees only the beginning of the prompt
    hits: int = 0  # prompts whose embeddings were shared already


class Backend(Protocol):
    """One model on one device. Each stage is called by one thread at a time, and the stages run side by side.

    An image depends on its own prompt and seed alone, to the bit, whatever else is in its batch. Every stage raises
    MemoryError if the device has too little memory, DeviceLost if the device no longer computes, and any other error
    for a batch that fails.
    """

    info: ModelInfo
    environment: str  # what times and last bits depend on besides the model: device, data type, threads, batch sizes
    text_bytes: int  # of one prompt's embedding; 0 if embeddings are not shared
    slow_first_runs: Sequence[int]  # batch sizes that are compiled or recorded when they run first

    def encode(self, prompts: Sequence[str], shared: SharedEmbeddings = UNSHARED) -> EncodedPrompts:
        """Encode prompts. Embeddings in `shared` are read, and the others are written to it."""

    def add_adapter(self, name: str, path: str) -> None:
        """Read a LoRA adapter, a file or folder, while batches run, and add it to the info.

        Raises StartError if it cannot be read.
        """

    def remove_adapter(self, name: str) -> None:
        """Free an adapter without batches in progress."""

    def adapt(self, name: str | None, scale: float) -> None:
        """Use this adapter, or none, from now on. Called by the thread of `denoise`."""

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Any:
        """Draw the noise of seeds and a size for `denoise`. Called by the thread of `encode`."""

    def denoise(self, conditions: Any, noise: Any, steps: int = 1) -> Any:
        """Return the latents, one for each condition and its noise. Raises FloatingPointError if one is not finite."""

    def decode(self, latents: Any) -> Pixels:
        """Decode latents to images."""

    def memory_bytes(self) -> int:
        """Return the device memory that this process holds. Safe from any thread."""

    def close(self) -> None:
        """Free the device's memory. Called once, after the last batch."""


class DeviceLost(Exception):
    """The device no longer computes for this process. A new process may be able to use it."""
