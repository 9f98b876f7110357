"""The latents that a small decoder is trained on: of images that a model makes of prompts, and of real images.

They are made once, into caches of the training's folder, so that the model is not in memory during training.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.image_cache import PixelBatches, ReadExamples
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


class LatentCache:
    """A cache of latents in a folder."""

    def __init__(self, folder: Path, model: SD3Folder, source: str) -> None:
        """`source` names what the latents are of, for messages."""
        self.folder = folder
        self.layout = Layout(
            "latent", "run `distill decoder`", source, "latents.json", {"latents": model.latent_shape}, model
        )

    @property
    def is_complete(self) -> bool:
        return (self.folder / self.layout.manifest).exists()

    def open(self, device: torch.device | None = None) -> ShardReader:
        """Open the complete cache."""
        return ShardReader(self.folder, self.layout, device)


class PromptLatents(LatentCache):
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
        super().__init__(folder, model, "prompts")
        self._sampling = None if sampling is None else sampling.as_dict()
        self._prompts, self._count, self._first_seed = prompts, count, first_seed

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


class RealLatents(LatentCache):
    """A cache of the latents of real images. Captions are not needed."""

    def __init__(self, folder: Path, model: SD3Folder, examples: Callable[[], Iterator[Example]]) -> None:
        super().__init__(folder, model, "images")
        self._model, self._examples = model, examples

    def make(self, device: torch.device) -> Iterator[LatentProgress]:
        """Encode what is missing. Raises ImageError for too many images that cannot be decoded, or none that can."""
        source = ReadExamples(
            replace(each, fault="") if each.fault == NO_CAPTION else each for each in self._examples()
        )
        if self.is_complete:
            check_source(self.folder, self.layout, source)
            return
        writer = ShardWriter(self.folder, self.layout, DTYPE, source, {"images", "skipped"})
        images = writer.count("images")
        yield LatentProgress("real images", images, None)
        vae = load_vae(self._model, device=device)
        shard_rows = rows_of_shard(SHARD_ROWS, {"latents": torch.empty(self._model.latent_shape, dtype=DTYPE)})
        with ThreadPoolExecutor() as pool:
            batches = PixelBatches(source, self._model.image_size, pool, writer.count("skipped"))
            more = True
            while more:
                parts: list[Tensor] = []
                rows = 0
                while rows < shard_rows and (taken := batches.take(shard_rows - rows)):
                    usable = [pixels for _, pixels in taken if not isinstance(pixels, str)]
                    if usable:
                        parts.append(encode_in_parts(vae, np.stack(usable)).cpu().to(DTYPE))
                        rows += len(usable)
                        images += len(usable)
                    yield LatentProgress("real images", images, None)
                more = rows == shard_rows
                if rows:
                    writer.add({"latents": torch.cat(parts)}, {}, images=images, skipped=batches.skipped)
        if not images:
            raise ImageError("no real image can be used; give a folder of jpg, png or webp files")
        writer.finish({}, {}, images=images, skipped=batches.skipped)


class LatentSet:
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
