"""Real images with their captions, encoded once: `encode_examples` writes a cache, `ImageCache` reads it in training.

A row is an image's scaled latents and the text condition of its caption, in the shards of `shards.py`.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.data.embedding_cache import tensors, text_dtype, text_shapes
from distill.data.images import ENCODED
from distill.data.shard_reader import ShardReader
from distill.data.shard_writer import ShardWriter, check_source
from distill.data.shards import SHARD_ROWS, Layout, rows_of_shard
from distill.data.sources import Example
from distill.data.srgb import to_srgb
from distill.errors import ImageError
from distill.methods.base import Real
from distill.models.sd3 import encode_images, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.vae import to_pixels

ROWS, SKIPPED = "images.jsonl", "skipped.jsonl"  # for people: name and caption of each row; what was skipped, and why
BATCH, BATCH_PIXELS = 64, 1 << 21  # most images and pixels encoded together; the autoencoder runs in fp32
UNUSED = "it belongs to no image; an image and its caption have one name but for the last ending"
SKIPPED_IMAGES, SKIPPED_SHARE = 10, 0.01  # how many images, or which share of those read, are skipped without an error


@dataclass(frozen=True)
class EncodeProgress:
    """Images encoded so far, images skipped, captions cut to the token limit, and files that belong to no image."""

    images: int
    skipped: int
    truncated: int
    unused: int = 0


def encode_examples(
    teacher: SD3Folder,
    examples: Iterable[Example],
    out: Path,
    device: torch.device | str = "cpu",
    shard_rows: int = SHARD_ROWS,
) -> Iterator[EncodeProgress]:
    """Encode images, at the teacher's native size, and their captions into `out`, in order.

    Latents are stored in fp32, captions as `embed_prompts` stores prompts. An image that cannot be decoded or has no
    caption is skipped and listed in skipped.jsonl, as are files of shards that belong to no image. A call that was
    killed is resumed: its complete shards are kept, and their images are read again, which must be the same, but not
    decoded.

    Raises ImageError without images, or when more than SKIPPED_IMAGES and SKIPPED_SHARE of those read are skipped;
    CacheError when `out` holds a complete cache, was begun with other images or another teacher, or cannot be written.
    """
    dtype = text_dtype(device)
    source = ReadExamples(examples)
    names = ("images", "skipped", "truncated", "unused")
    writer = ShardWriter(out, _layout(teacher), dtype, source, set(names))
    counts = {name: writer.count(name) for name in names}
    yield EncodeProgress(**counts)

    text = SD3TextEncoder.load(teacher, device, dtype)
    vae = load_vae(teacher, device=device)
    row = {"latents": torch.empty(1, *teacher.latent_shape), **tensors(text.encode([""]))}
    shard_rows = rows_of_shard(shard_rows, row)
    faults: list[dict[str, str]] = []
    with ThreadPoolExecutor() as pool:
        batches = PixelBatches(source, teacher.image_size, pool, counts["skipped"])
        more = True
        while more:
            latents, conds = [], []
            rows: list[dict[str, str]] = []
            while len(rows) < shard_rows and (taken := batches.take(shard_rows - len(rows))):
                usable = []
                for example, decoded in taken:
                    faults += [{"name": name, "reason": UNUSED} for name in example.unused]
                    counts["unused"] += len(example.unused)
                    if isinstance(decoded, str):
                        faults.append({"name": example.name, "reason": decoded})
                    else:
                        usable.append((example, decoded))
                counts["skipped"] = batches.skipped
                if usable:
                    captions = [example.caption for example, _ in usable]
                    with torch.no_grad():
                        latents.append(encode_images(vae, to_pixels(np.stack([image for _, image in usable]))).cpu())
                    conds.append(text.encode(captions).to("cpu"))
                    counts["truncated"] += sum(text.truncated(captions))
                    rows += [{"name": example.name, "caption": example.caption} for example, _ in usable]
                    counts["images"] += len(usable)
                yield EncodeProgress(**counts)
            more = len(rows) == shard_rows
            if rows:
                encoded = {"latents": torch.cat(latents), **tensors(TextCondition.cat(conds))}
                writer.add(encoded, {ROWS: rows, SKIPPED: faults}, **counts)
                faults = []
    if not counts["images"]:
        last = f", the last of them {faults[-1]['name']}: {faults[-1]['reason']}" if faults else ""
        raise ImageError(f"there are no images to encode; {counts['skipped']} were skipped{last}")
    writer.finish({}, {SKIPPED: faults}, **counts)
    yield EncodeProgress(**counts)


def check_examples(teacher: SD3Folder, examples: Iterable[Example], folder: Path) -> None:
    """Raise CacheError unless this is a complete cache of these images for this teacher."""
    check_source(folder, _layout(teacher), ReadExamples(examples))


def _layout(teacher: SD3Folder) -> Layout:
    """The layout of a cache of images."""
    shapes = {"latents": teacher.latent_shape, **text_shapes(teacher)}
    return Layout("image", "encode", "images", ENCODED, shapes, teacher)


class ImageCache:
    """A complete cache of one teacher's latents and captions: on a device if small, else read from disk by row."""

    def __init__(
        self, folder: Path, teacher: SD3Folder, device: torch.device | None = None, count: int | None = None
    ) -> None:
        """Open at most `count` images, as `ShardReader` opens a cache; raises the same errors."""
        self._reader = ShardReader(folder, _layout(teacher), device)
        self.sha256 = self._reader.sha256  # of the source's images
        self._count = len(self._reader) if count is None else min(count, len(self._reader))

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: Tensor) -> Real:
        """Read the images at indices (B,), with captions. Raises IndexError, and CacheError for a damaged shard."""
        found = self._reader.rows(indices)
        return Real(found.pop("latents"), TextCondition(**found))

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch (N,): a uniform permutation, or windows of shards if the cache is large."""
        return self._reader.shuffle(torch.arange(len(self)), generator)


class ReadExamples:
    """Iterates over examples, and counts and digests what it reads."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.read = 0
        self._examples = iter(examples)
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        example = next(self._examples)
        self.read += 1
        self._digest.update(json.dumps([example.name, example.caption, example.size]).encode() + example.edges())
        return example

    def skip(self, count: int) -> None:
        """Read the next `count` examples, or all that are left."""
        for _ in islice(self, count):
            pass

    @property
    def sha256(self) -> str:
        """The digest of the names, captions, sizes and edges read so far, in order."""
        return self._digest.hexdigest()


class PixelBatches:
    """Batches of examples with their pixels, decoded by a pool of threads; `skipped` counts those that are unusable."""

    def __init__(self, source: ReadExamples, side: int, pool: ThreadPoolExecutor, skipped: int) -> None:
        """Decode to squares of `side` pixels. `skipped` are those of an earlier call."""
        self.skipped = skipped
        self._source, self._pool = source, pool
        self._batch = max(1, min(BATCH, BATCH_PIXELS // side**2))
        self._decode = partial(decode_example, side=side)

    def take(self, count: int) -> list[tuple[Example, NDArray[np.uint8] | str]]:
        """Read a batch of at most `count` examples, each with its pixels (side, side, 3) or why it cannot be used.

        Empty at the end. Raises ImageError when more than SKIPPED_IMAGES and SKIPPED_SHARE of those read are skipped.
        """
        taken = list(islice(self._source, min(self._batch, count)))
        decoded = list(zip(taken, self._pool.map(self._decode, taken), strict=True))
        faults = [f"{example.name}: {pixels}" for example, pixels in decoded if isinstance(pixels, str)]
        self.skipped += len(faults)
        if faults and self.skipped > max(SKIPPED_IMAGES, SKIPPED_SHARE * self._source.read):
            raise ImageError(
                f"{self.skipped} of {self._source.read} images cannot be used, the last of them {faults[-1]}; correct "
                "them or leave them out"
            )
        return decoded


def decode_example(example: Example, side: int) -> NDArray[np.uint8] | str:
    """Decode to upright, center-cropped sRGB pixels (side, side, 3) on white, or say why that is impossible."""
    if example.fault:
        return example.fault
    try:
        with Image.open(BytesIO(example.read()), formats=("JPEG", "PNG", "WEBP")) as opened:
            return np.asarray(ImageOps.fit(to_srgb(opened), (side, side), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        return "it is not a JPEG, PNG or WebP image, or its beginning is damaged"
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
