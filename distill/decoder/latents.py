"""The latents that a small decoder is trained on: of images that a model makes of prompts, and of real images.

They are made once, into caches of the training's folder, so that the model is not in memory during training.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.image_cache import BATCH, BATCH_PIXELS, SKIPPED_IMAGES, SKIPPED_SHARE, ReadExamples, decode_example
from distill.data.images import NO_CAPTION
from distill.data.shard_reader import ShardReader
from distill.data.shard_writer import ShardWriter, check_source
from distill.data.shards import SHARD_ROWS, Layout, rows_of_shard
from distill.data.sources import Example
from distill.errors import ImageError
from distill.evaluate.sampler import Sampling, TeacherSampler
from distill.models.sd3 import encode_in_parts, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import OneStepPipeline, RuntimeOptions

FIRST_SEED = 1 << 31  # of the latents; those of evaluations count up from 0
DTYPE = torch.float16  # of the caches: half of the disk, and an error far below that of any decoder
_TOKENS = 4096  # image tokens that a model makes at once

MakeLatents = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds -> latents (N, C, h, w)


@dataclass(frozen=True)
class LatentProgress:
    """Latents of a cache that exist, and how many there will be; None if that is unknown."""

    what: str
    images: int
    total: int | None


def latent_maker(model: SD3Folder, sampling: Sampling | None, device: torch.device) -> MakeLatents:
    """Load a model that makes latents of prompts: a student in one step if `sampling` is None, else a teacher."""
    if sampling is not None:
        return partial(TeacherSampler(model, device).latents, sampling)
    pipeline = OneStepPipeline.load(model.path, device, RuntimeOptions(decoder="full"))
    return lambda prompts, seeds: pipeline.latents(pipeline.encode(prompts), pipeline.noise(seeds))


class PromptLatents:
    """A cache of `count` latents of prompts, which repeat in order, with seeds that count up from `first_seed`."""

    def __init__(
        self,
        folder: Path,
        model: SD3Folder,
        sampling: Sampling | None,
        prompts: Sequence[str],
        count: int,
        first_seed: int = FIRST_SEED,
    ) -> None:
        self.folder = folder
        self.layout = _layout(model, "prompts")
        self._sampling = None if sampling is None else sampling.as_dict()
        self._prompts, self._count, self._first_seed = prompts, count, first_seed

    @property
    def is_complete(self) -> bool:
        return (self.folder / self.layout.manifest).exists()

    def make(self, maker: Callable[[], MakeLatents], what: str = "latents") -> Iterator[LatentProgress]:
        """Make what is missing; `maker` loads the model. Raises CacheError for a cache of other prompts or sampling."""
        source = _PromptSource(self._prompts, self._count, self._first_seed, self._sampling)
        if self.is_complete:
            check_source(self.folder, self.layout, source)
            return
        writer = ShardWriter(self.folder, self.layout, DTYPE, source, {"images"})
        yield LatentProgress(what, source.read, self._count)
        model = maker()
        channels, height, width = self.layout.shapes["latents"]
        at_once = max(1, _TOKENS // (height * width))
        shard_rows = rows_of_shard(SHARD_ROWS, {"latents": torch.empty(channels, height, width, dtype=DTYPE)})
        while source.read < self._count:
            parts: list[Tensor] = []
            rows = 0
            while rows < shard_rows and (taken := source.take(min(at_once, shard_rows - rows))):
                made = model([prompt for prompt, _ in taken], [seed for _, seed in taken])
                parts.append(made.cpu().to(DTYPE))
                rows += len(taken)
                yield LatentProgress(what, source.read, self._count)
            writer.add({"latents": torch.cat(parts)}, {}, images=source.read)
        writer.finish({}, {})

    def open(self, device: torch.device | None = None) -> ShardReader:
        """Open the complete cache."""
        return ShardReader(self.folder, self.layout, device)


class RealLatents:
    """A cache of the latents of real images. Captions are not needed."""

    def __init__(self, folder: Path, model: SD3Folder, examples: Callable[[], Iterator[Example]]) -> None:
        self.folder, self._model, self._examples = folder, model, examples
        self.layout = _layout(model, "images")

    def make(self, device: torch.device) -> Iterator[LatentProgress]:
        """Encode what is missing. Raises ImageError for too many images that cannot be decoded, or none that can."""
        source = ReadExamples(self._examples())
        if (self.folder / self.layout.manifest).exists():
            check_source(self.folder, self.layout, source)
            return
        writer = ShardWriter(self.folder, self.layout, DTYPE, source, {"images", "skipped"})
        images, skipped = writer.count("images"), writer.count("skipped")
        yield LatentProgress("real images", images, None)
        side = self._model.image_size
        vae = load_vae(self._model, device=device)
        batch = max(1, min(BATCH, BATCH_PIXELS // side**2))
        shard_rows = rows_of_shard(SHARD_ROWS, {"latents": torch.empty(self._model.latent_shape, dtype=DTYPE)})
        decode = partial(_decode, side=side)
        with ThreadPoolExecutor() as pool:
            more = True
            while more:
                parts: list[Tensor] = []
                rows = 0
                while rows < shard_rows and (taken := list(islice(source, min(batch, shard_rows - rows)))):
                    decoded = list(pool.map(decode, taken))
                    usable = [image for image in decoded if not isinstance(image, str)]
                    skipped += len(taken) - len(usable)
                    if skipped > max(SKIPPED_IMAGES, SKIPPED_SHARE * source.read):
                        name, why = next((e.name, d) for e, d in zip(taken, decoded, strict=True) if isinstance(d, str))
                        raise ImageError(
                            f"{skipped} of {source.read} images cannot be used, among them {name}: {why}; correct "
                            "them or leave them out"
                        )
                    if usable:
                        parts.append(encode_in_parts(vae, np.stack(usable)).cpu().to(DTYPE))
                        rows += len(usable)
                        images += len(usable)
                    yield LatentProgress("real images", images, None)
                more = rows == shard_rows
                if rows:
                    writer.add({"latents": torch.cat(parts)}, {}, images=images, skipped=skipped)
        if not images:
            raise ImageError("no real image can be used; give a folder of jpg, png or webp files")
        writer.finish({}, {}, images=images, skipped=skipped)

    def open(self, device: torch.device | None = None) -> ShardReader:
        """Open the complete cache."""
        return ShardReader(self.folder, self.layout, device)


class Pool:
    """The latents of several caches as one sequence, from which training draws."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers

    def __len__(self) -> int:
        return sum(map(len, self._readers))

    def rows(self, indices: Tensor) -> Tensor:
        """Read the latents at indices (B,): (B, C, h, w)."""
        parts = []
        for index in indices.tolist():
            for reader in self._readers:
                if index < len(reader):
                    parts.append(reader.rows(torch.tensor([index]))["latents"])
                    break
                index -= len(reader)
        return torch.cat(parts)


class _PromptSource:
    """Prompts with their seeds, in order, and the digest of those that were read."""

    def __init__(self, prompts: Sequence[str], count: int, first_seed: int, sampling: object) -> None:
        self.read = 0
        self._prompts, self._count, self._first_seed = prompts, count, first_seed
        self._sampling = json.dumps(sampling, sort_keys=True)
        self._digest = hashlib.sha256()

    def take(self, count: int) -> list[tuple[str, int]]:
        """Read the next prompts with their seeds, at most `count`."""
        stop = min(self.read + count, self._count)
        taken = [(self._prompts[i % len(self._prompts)], self._first_seed + i) for i in range(self.read, stop)]
        for prompt, seed in taken:
            self._digest.update(json.dumps([prompt, seed, self._sampling]).encode())
        self.read = stop
        return taken

    def skip(self, count: int) -> None:
        """Read the next `count` prompts, or all that are left."""
        self.take(count)

    @property
    def sha256(self) -> str:
        """The digest of the prompts, seeds and sampling read so far."""
        return self._digest.hexdigest()


def _layout(model: SD3Folder, source: str) -> Layout:
    shapes = {"latents": model.latent_shape}
    return Layout("latent", "run `distill decoder`", source, "latents.json", shapes, model)


def _decode(example: Example, side: int) -> NDArray[np.uint8] | str:
    return decode_example(replace(example, fault="") if example.fault == NO_CAPTION else example, side)
