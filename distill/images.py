"""Real images with their captions, encoded once: `encode_examples` writes a cache, `ImageCache` reads it in training.

Sources are the small world's renderer, a folder of images and WebDataset's tar shards. A row is an image's scaled
latents and what the text encoders make of its caption, in the shards and under the guarantees of `shards.py`.
"""

import hashlib
import json
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from distill.embed import tensors, text_dtype, text_shapes
from distill.errors import ImageError
from distill.methods import Real
from distill.prompt_files import COLUMNS
from distill.prompts import SCENES_COUNT
from distill.scenes.captions import sample_prompt, wording
from distill.scenes.render import Scene, place, render
from distill.scenes.vae import to_pixels
from distill.shards import SHARD_ROWS, Layout, ShardReader, ShardWriter, check_source, rows_of_shard
from distill.spec import TeacherSpec, read_spec
from distill.teacher import encode_images, load_vae
from distill.text import SD3TextEncoder, TextCondition

MANIFEST = "images.json"
ROWS, SKIPPED = "images.jsonl", "skipped.jsonl"  # for people: name and caption of each row; what was passed over
METADATA = "metadata.jsonl"  # of a folder of images, as Hugging Face's ImageFolder has it
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BATCH, BATCH_PIXELS = 64, 1 << 21  # encoded together at most; the autoencoder runs in fp32
FEW, SHARE = 10, 0.01  # images passed over without an error: so many, or this share of those read


@dataclass(frozen=True)
class Example:
    """An image as it lies in its source: `read` gives its `size` bytes; no caption is None."""

    name: str
    caption: str | None
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class EncodedImages:
    """Progress of `encode_examples`: images encoded, images passed over, and captions cut to the token limit."""

    images: int
    skipped: int
    truncated: int


def read_examples(source: str, count: int | None = None, seed: int = 0) -> Iterator[Example]:
    """Images of a source with their captions, at most `count`, in an order of their own that does not change.

    `scenes` renders as many as are asked for. A folder holds a metadata.jsonl of `file_name` and `text`, or tar
    shards, or jpg, png and webp files with a txt file of the same name beside each. A .tar file is one shard, in
    WebDataset's way: files of one name up to the first dot are an image and its caption, as txt or as json.

    Raises ImageError for a source that is missing, holds no images, or is not what its name says.
    """
    found = _scenes(SCENES_COUNT if count is None else count, seed) if source == "scenes" else _examples(Path(source))
    empty = True
    for example in islice(found, count):
        empty = False
        yield example
    if empty:
        raise ImageError(f"{source} holds no images; give a folder of jpg, png or webp files, or of tar shards")


def encode_examples(
    teacher: Path | str,
    examples: Iterable[Example],
    out: Path,
    device: torch.device | str = "cpu",
    shard_rows: int = SHARD_ROWS,
) -> Iterator[EncodedImages]:
    """Encode images, at the teacher's native size, and their captions into `out`, in order.

    Latents are kept in fp32, captions as `embed_prompts` keeps prompts. An image that cannot be decoded, or has no
    caption, is passed over and named in skipped.jsonl. In a folder that a killed call left, whole shards are kept:
    the images they were made of are passed over without being decoded, and must be the same.

    Raises ImageError without images, or when more than FEW and more than SHARE of those read had to be passed over;
    CacheError when `out` holds a whole cache already, was begun with other images or another teacher, or the disk
    refuses.
    """
    spec = read_spec(teacher)
    dtype = text_dtype(device)
    source = _Counted(examples)
    writer = ShardWriter(out, _layout(spec), dtype, source, {"images", "skipped", "truncated"})
    count, skipped, truncated = (writer.count(name) for name in ("images", "skipped", "truncated"))
    yield EncodedImages(count, skipped, truncated)

    text = SD3TextEncoder.load(teacher, device, dtype)
    vae = load_vae(teacher, device=device)
    row = {"latents": torch.empty(1, *spec.latent_shape), **tensors(text.encode([""]))}
    shard_rows = rows_of_shard(shard_rows, row)
    batch = max(1, min(BATCH, BATCH_PIXELS // spec.image_size**2))
    decode = partial(_decode, side=spec.image_size)
    passed: list[dict[str, str]] = []
    with ThreadPoolExecutor() as pool:
        more = True
        while more:
            latents, conds = [], []
            rows: list[dict[str, str | None]] = []
            while len(rows) < shard_rows and (taken := list(islice(source, min(batch, shard_rows - len(rows))))):
                whole = []
                for example, decoded in zip(taken, pool.map(decode, taken), strict=True):
                    if isinstance(decoded, str):
                        passed.append({"name": example.name, "reason": decoded})
                    else:
                        whole.append((example, decoded))
                skipped += len(taken) - len(whole)
                if skipped > max(FEW, SHARE * source.read):
                    raise ImageError(
                        f"{skipped} of {source.read} images cannot be used, the last of them "
                        f"{passed[-1]['name']}: {passed[-1]['reason']}; mend them or leave them out"
                    )
                if whole:
                    captions = [example.caption or "" for example, _ in whole]
                    with torch.no_grad():
                        latents.append(encode_images(vae, to_pixels(np.stack([image for _, image in whole]))).cpu())
                    conds.append(text.encode(captions).to("cpu"))
                    truncated += sum(text.truncated(captions))
                    rows += [{"name": example.name, "caption": example.caption} for example, _ in whole]
                    count += len(whole)
                yield EncodedImages(count, skipped, truncated)
            more = len(rows) == shard_rows
            if rows:
                figures = {"images": count, "skipped": skipped, "truncated": truncated}
                found = {"latents": torch.cat(latents), **tensors(TextCondition.cat(conds))}
                writer.add(found, {ROWS: rows, SKIPPED: passed}, **figures)
                passed = []
    if not count:
        raise ImageError(f"there are no images to encode; {skipped} were passed over")
    writer.finish({}, {SKIPPED: passed}, skipped=skipped)
    yield EncodedImages(count, skipped, truncated)


def check_examples(teacher: Path | str, examples: Iterable[Example], folder: Path) -> None:
    """Raise CacheError unless a whole cache was made of these images, and for this teacher."""
    check_source(folder, _layout(read_spec(teacher)), _Counted(examples))


def _layout(spec: TeacherSpec) -> Layout:
    """What a cache of images holds."""
    shapes = {"latents": spec.latent_shape, **text_shapes(spec)}
    return Layout("image", "encode", "images", MANIFEST, shapes, spec)


class ImageCache:
    """A whole cache of one teacher's latents and captions, held on a device if small, else read from disk by row."""

    def __init__(
        self, folder: Path, teacher: Path | str, count: int | None = None, device: torch.device | None = None
    ) -> None:
        """Open and check; `count` are its first rows alone. Small caches are held on the `device`, if one is given.

        Raises CacheError for a cache that is partial, damaged, or another teacher's.
        """
        self._reader = ShardReader(folder, _layout(read_spec(teacher)), device)
        self.sha256 = self._reader.sha256  # of the source's images
        self._count = len(self._reader) if count is None else min(count, len(self._reader))

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: Tensor) -> Real:
        """The images of some indices (B,) with their captions' conditions, in that order.

        Raises IndexError for one that is not there, CacheError for one in a damaged shard.
        """
        found = self._reader.rows(indices)
        return Real(found.pop("latents"), TextCondition(**found))


class _Counted:
    """Examples in their order; counts and digests what has been read of them."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.read = 0
        self._examples = iter(examples)
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        example = next(self._examples)
        self.read += 1
        self._digest.update(json.dumps([example.name, example.caption, example.size]).encode())
        return example

    def skip(self, count: int) -> None:
        """Read on by `count` examples, or to the end."""
        for _ in islice(self, count):
            pass

    @property
    def sha256(self) -> str:
        """Of names, captions and sizes read, in their order."""
        return self._digest.hexdigest()


def _decode(example: Example, side: int) -> NDArray[np.uint8] | str:
    """Pixels (side, side, 3), or why there are none.

    Upright, in RGB and on white; the shorter side is scaled to `side`, and the middle is cut out.
    """
    if example.caption is None:
        return "it has no caption in UTF-8"
    try:
        with Image.open(BytesIO(example.read()), formats=("JPEG", "PNG", "WEBP")) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"


def _examples(path: Path) -> Iterator[Example]:
    if path.is_file() and path.suffix == ".tar":
        yield from _shard(path)
    elif not path.is_dir():
        raise ImageError(f"no images at {path}; give a folder, a .tar shard, or `scenes`")
    elif (path / METADATA).is_file():
        yield from _listed(path)
    elif shards := sorted(path.glob("*.tar")):
        for shard in shards:
            yield from _shard(shard)
    else:
        for image in sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES):
            caption = image.with_suffix(".txt")
            text = _text(caption.read_bytes()) if caption.is_file() else None
            yield _file(image, image.relative_to(path).as_posix(), text)


def _listed(folder: Path) -> Iterator[Example]:
    """The images that a folder's metadata.jsonl names."""
    path = folder / METADATA
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name = entry["file_name"]
                image = folder / name
            except (ValueError, KeyError, TypeError):
                raise ImageError(
                    f"{path} line {number} is not a JSON object with a `file_name`; mend it or take it out"
                ) from None
            yield _file(image, name, _caption(entry))


def _file(path: Path, name: str, caption: str | None) -> Example:
    return Example(name, caption, path.stat().st_size if path.exists() else 0, path.read_bytes)


def _shard(path: Path) -> Iterator[Example]:
    """Images of an uncompressed tar file; files of one name up to the first dot stand side by side."""
    try:
        with tarfile.open(path, "r:") as shard:
            files = (member for member in shard if member.isfile())
            for key, group in groupby(files, lambda member: _key(member.name)):
                members = {Path(member.name).suffix.lower(): member for member in group}
                image = next((members[suffix] for suffix in sorted(SUFFIXES & members.keys())), None)
                if image is None:
                    continue
                caption = None
                if ".txt" in members:
                    caption = _text(_slice(path, members[".txt"].offset_data, members[".txt"].size))
                elif ".json" in members:
                    caption = _json_caption(_slice(path, members[".json"].offset_data, members[".json"].size))
                read = partial(_slice, path, image.offset_data, image.size)
                yield Example(f"{path.name}/{key}", caption, image.size, read)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{path} is not a whole, uncompressed tar file ({error}); fetch it again") from None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}" if folder else file.partition(".")[0]


def _slice(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None


def _json_caption(data: bytes) -> str | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return _caption(value) if isinstance(value, dict) else None


def _caption(entry: Mapping[str, Any]) -> str | None:
    return next((entry[name] for name in COLUMNS if isinstance(entry.get(name), str)), None)


def _scenes(count: int, seed: int) -> Iterator[Example]:
    for index in range(count):
        caption, scene = _scene(seed, index)
        yield Example(f"scene {index} of seed {seed}", caption, 0, partial(_png, scene))


def _scene(seed: int, index: int) -> tuple[str, Scene]:
    """A scene of its own numbers, whichever were made before."""
    rng = np.random.default_rng((seed, index))
    prompt = sample_prompt(rng)
    return wording(prompt, rng), place(prompt, rng)


def _png(scene: Scene) -> bytes:
    file = BytesIO()
    Image.fromarray(render([scene])[0]).save(file, "PNG")
    return file.getvalue()
