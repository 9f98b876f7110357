"""Real images with their captions, encoded once: `encode_examples` writes a cache, `ImageCache` reads it in training.

Sources are built-in ones, a folder of images and WebDataset's tar shards. A row is an image's scaled
latents and what the text encoders make of its caption, in the shards and under the guarantees of `shards.py`.
"""

import hashlib
import json
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.data.conditions import tensors, text_dtype, text_shapes
from distill.data.prompt_files import columns_of, text_of
from distill.data.shards import SHARD_ROWS, Layout, ShardReader, ShardWriter, check_source, rows_of_shard
from distill.data.sources import IMAGE_SOURCES, Example
from distill.data.srgb import to_srgb
from distill.errors import ImageError, PromptError
from distill.methods.base import Real
from distill.models.sd3 import encode_images, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.vae import to_pixels

MANIFEST = "images.json"
ROWS, SKIPPED = "images.jsonl", "skipped.jsonl"  # for people: name and caption of each row; what was passed over
METADATA = "metadata.jsonl"  # of a folder of images, as Hugging Face's ImageFolder has it
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BATCH, BATCH_PIXELS = 64, 1 << 21  # encoded together at most; the autoencoder runs in fp32
EDGE = 4096  # bytes from each end of an image that enter the digest of the source
NO_CAPTION = "it has no caption"
NO_IMAGE = "it has no image of its name in jpg, png or webp"
UNUSED = "it belongs to no image; an image and its caption have one name but for the last ending"
FEW, SHARE = 10, 0.01  # images passed over without an error: so many, or this share of those read


@dataclass(frozen=True)
class EncodedImages:
    """Progress of `encode_examples`: images encoded, images passed over, and captions cut to the token limit.

    `unused` counts the files of shards that belong to no image.
    """

    images: int
    skipped: int
    truncated: int
    unused: int = 0


def read_examples(source: str, count: int | None = None, seed: int = 0, column: str | None = None) -> Iterator[Example]:
    """Images of a source with their captions, at most `count`, in an order of their own that does not change.

    A built-in source makes `count` images. A folder holds a metadata.jsonl of `file_name` and `text`, or tar shards, or
    jpg, png and webp files with a txt file of the same name beside each. A .tar file is one shard in WebDataset's form,
    in any order: an image and its caption, a txt or json file, have the same name except for the last ending.
    `column` names the caption's key in metadata.jsonl and in json files.

    Raises ImageError for a source that is missing, holds no images, or is not what its name says.
    """
    found = IMAGE_SOURCES[source](count, seed) if source in IMAGE_SOURCES else _examples(Path(source), column)
    empty = True
    for example in islice(found, count):
        empty = False
        yield example
    if empty:
        raise ImageError(f"{source} holds no images; give a folder of jpg, png or webp files, or of tar shards")


def encode_examples(
    teacher: SD3Folder,
    examples: Iterable[Example],
    out: Path,
    device: torch.device | str = "cpu",
    shard_rows: int = SHARD_ROWS,
) -> Iterator[EncodedImages]:
    """Encode images, at the teacher's native size, and their captions into `out`, in order.

    Latents are kept in fp32, captions as `embed_prompts` keeps prompts. An image that cannot be decoded, or has no
    caption, is passed over and named in skipped.jsonl, as are files of shards that belong to no image. In a folder
    that a killed call left, whole shards are kept: the images they were made of are passed over without being decoded,
    and must be the same.

    Raises ImageError without images, or when more than FEW and more than SHARE of those read had to be passed over;
    CacheError when `out` holds a whole cache already, was begun with other images or another teacher, or the disk
    refuses.
    """
    dtype = text_dtype(device)
    source = _Counted(examples)
    names = ("images", "skipped", "truncated", "unused")
    writer = ShardWriter(out, _layout(teacher), dtype, source, set(names))
    count, skipped, truncated, unused = map(writer.count, names)
    yield EncodedImages(count, skipped, truncated, unused)

    text = SD3TextEncoder.load(teacher, device, dtype)
    vae = load_vae(teacher, device=device)
    row = {"latents": torch.empty(1, *teacher.latent_shape), **tensors(text.encode([""]))}
    shard_rows = rows_of_shard(shard_rows, row)
    batch = max(1, min(BATCH, BATCH_PIXELS // teacher.image_size**2))
    decode = partial(_decode, side=teacher.image_size)
    passed: list[dict[str, str]] = []
    with ThreadPoolExecutor() as pool:
        more = True
        while more:
            latents, conds = [], []
            rows: list[dict[str, str]] = []
            while len(rows) < shard_rows and (taken := list(islice(source, min(batch, shard_rows - len(rows))))):
                whole = []
                for example, decoded in zip(taken, pool.map(decode, taken), strict=True):
                    passed += [{"name": name, "reason": UNUSED} for name in example.unused]
                    unused += len(example.unused)
                    if isinstance(decoded, str):
                        fault = {"name": example.name, "reason": decoded}
                        passed.append(fault)
                    else:
                        whole.append((example, decoded))
                skipped += len(taken) - len(whole)
                if skipped > max(FEW, SHARE * source.read):
                    raise ImageError(
                        f"{skipped} of {source.read} images cannot be used, the last of them "
                        f"{fault['name']}: {fault['reason']}; correct them or leave them out"
                    )
                if whole:
                    captions = [example.caption for example, _ in whole]
                    with torch.no_grad():
                        latents.append(encode_images(vae, to_pixels(np.stack([image for _, image in whole]))).cpu())
                    conds.append(text.encode(captions).to("cpu"))
                    truncated += sum(text.truncated(captions))
                    rows += [{"name": example.name, "caption": example.caption} for example, _ in whole]
                    count += len(whole)
                yield EncodedImages(count, skipped, truncated, unused)
            more = len(rows) == shard_rows
            if rows:
                metrics = dict(zip(names, (count, skipped, truncated, unused), strict=True))
                found = {"latents": torch.cat(latents), **tensors(TextCondition.cat(conds))}
                writer.add(found, {ROWS: rows, SKIPPED: passed}, **metrics)
                passed = []
    if not count:
        last = f", the last of them {passed[-1]['name']}: {passed[-1]['reason']}" if passed else ""
        raise ImageError(f"there are no images to encode; {skipped} were passed over{last}")
    writer.finish({}, {SKIPPED: passed}, skipped=skipped, unused=unused)
    yield EncodedImages(count, skipped, truncated, unused)


def check_examples(teacher: SD3Folder, examples: Iterable[Example], folder: Path) -> None:
    """Raise CacheError unless this is a complete cache of these images for this teacher."""
    check_source(folder, _layout(teacher), _Counted(examples))


def _layout(teacher: SD3Folder) -> Layout:
    """What a cache of images holds."""
    shapes = {"latents": teacher.latent_shape, **text_shapes(teacher)}
    return Layout("image", "encode", "images", MANIFEST, shapes, teacher)


class ImageCache:
    """A whole cache of one teacher's latents and captions, held on a device if small, else read from disk by row."""

    def __init__(
        self, folder: Path, teacher: SD3Folder, count: int | None = None, device: torch.device | None = None
    ) -> None:
        """Open and check; `count` are its first rows alone. Small caches are held on the `device`, if one is given.

        Raises CacheError for a cache that is partial, damaged, or another teacher's.
        """
        self._reader = ShardReader(folder, _layout(teacher), device)
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
        self._digest.update(json.dumps([example.name, example.caption, example.size]).encode() + example.edges())
        return example

    def skip(self, count: int) -> None:
        """Read on by `count` examples, or to the end."""
        for _ in islice(self, count):
            pass

    @property
    def sha256(self) -> str:
        """The digest of the names, captions, sizes and edges read so far, in order."""
        return self._digest.hexdigest()


def _decode(example: Example, side: int) -> NDArray[np.uint8] | str:
    """Pixels (side, side, 3), or why there are none.

    Upright, in sRGB and on white; the shorter side is scaled to `side`, and the middle is cut out.
    """
    if example.fault:
        return example.fault
    try:
        with Image.open(BytesIO(example.read()), formats=("JPEG", "PNG", "WEBP")) as opened:
            return np.asarray(ImageOps.fit(to_srgb(opened), (side, side), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        return "it is not a JPEG, PNG or WebP image, or its beginning is damaged"
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"


def _examples(path: Path, column: str | None) -> Iterator[Example]:
    if path.is_file() and path.suffix.lower() == ".tar":
        yield from _shard(path, column)
    elif not path.is_dir():
        raise ImageError(f"no images at {path}; give a folder, an uncompressed .tar shard, or `scenes`")
    elif (path / METADATA).is_file():
        yield from _listed(path, column)
    elif shards := sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar" and not _is_hidden(file)):
        for shard in shards:
            yield from _shard(shard, column)
    else:
        yield from _captioned(path)


def _is_hidden(path: PurePosixPath | Path) -> bool:
    """Whether a file is hidden, like those that macOS puts beside others."""
    return path.name.startswith(".")


def _captioned(folder: Path) -> Iterator[Example]:
    """The images of a folder, each with a text file beside it, and the text files that have no image."""
    files = sorted(file for file in folder.rglob("*") if not _is_hidden(file))
    images = {file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES}
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt" and file.is_file()}
    for file in files:
        stem, name = file.with_suffix(""), file.relative_to(folder).as_posix()
        if file.suffix.lower() in SUFFIXES:
            caption = _text(texts[stem].read_bytes()) if stem in texts else ("", NO_CAPTION)
            yield _file(file, name, *caption)
        elif stem in texts and stem not in images and file == texts[stem]:
            yield _file(file, name, "", NO_IMAGE)


def _listed(folder: Path, column: str | None) -> Iterator[Example]:
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
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ImageError(
                    f"{path} line {number} is not a JSON object with a `file_name`; correct it or remove it"
                ) from None
            yield _file(image, name, *_caption(entry, column))


def _file(path: Path, name: str, caption: str, fault: str) -> Example:
    size = path.stat().st_size if path.exists() else 0
    return Example(name, caption, size, path.read_bytes, partial(_edges, path, 0, size), fault)


def _shard(path: Path, column: str | None) -> Iterator[Example]:
    """Images of an uncompressed tar file, in the order of the first file of each."""
    groups: dict[str, list[tarfile.TarInfo]] = {}
    unused = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                name = PurePosixPath(member.name)
                if member.isfile() and not member.issparse() and name.name and not _is_hidden(name):
                    groups.setdefault(str(name.with_suffix("")), []).append(member)
                elif not member.isdir():
                    unused.append(member.name)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{path} is not a whole, uncompressed tar file ({error}); fetch it again") from None
    with_image = {key for key, members in groups.items() if any(_suffix(member) in SUFFIXES for member in members)}
    samples = []
    for key, members in groups.items():
        images = [member for member in members if _suffix(member) in SUFFIXES]
        captions = [member for member in members if _suffix(member) == ".txt"]
        captions = captions or [member for member in members if _suffix(member) == ".json"]
        if (images and captions) or ((images or captions) and not _is_part(key, with_image)):
            samples.append((key, images, captions))
        else:
            unused += [member.name for member in members]
    for number, (key, images, captions) in enumerate(samples):
        file = (images or captions)[0]
        caption, fault = "", NO_IMAGE if captions else NO_CAPTION
        if len(images) > 1 or len(captions) > 1:
            clash = ", ".join(member.name for member in (images if len(images) > 1 else captions))
            fault = f"it has several images or captions: {clash}"
        elif images and captions:
            data = _slice(path, captions[0].offset_data, captions[0].size)
            caption, fault = _text(data) if _suffix(captions[0]) == ".txt" else _json_caption(data, column)
        where = (path, file.offset_data, file.size)
        others = tuple(f"{path.name}/{name}" for name in unused) if number == 0 else ()
        read, edges = partial(_slice, *where), partial(_edges, *where)
        yield Example(f"{path.name}/{key}", caption, file.size, read, edges, fault, others)


def _suffix(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).suffix.lower()


def _is_part(key: str, with_image: Set[str]) -> bool:
    """Whether a file belongs to an image with a shorter key, as `0.mask.png` to `0.jpg`."""
    name = PurePosixPath(key)
    shorter = list(accumulate(name.name.split("."), "{}.{}".format))[:-1]
    return any(str(name.with_name(stem)) in with_image for stem in shorter)


def _slice(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _edges(path: Path, start: int, size: int) -> bytes:
    """The first and last bytes of an image; none if it cannot be read."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(start)
        first = file.read(min(size, EDGE))
        file.seek(start + max(0, size - EDGE))
        return first + file.read(min(size, EDGE))
    return b""


def _text(data: bytes) -> tuple[str, str]:
    """A caption, or its fault."""
    try:
        return data.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError:
        return "", "its caption is not UTF-8"


def _json_caption(data: bytes, column: str | None) -> tuple[str, str]:
    """A caption, or its fault."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return "", f"its caption is not JSON: {error}"
    return _caption(value, column) if isinstance(value, dict) else ("", "its caption is not a JSON object")


def _caption(entry: Mapping[str, Any], column: str | None) -> tuple[str, str]:
    """A caption, or its fault."""
    try:
        text = text_of("it", entry, columns_of("it", list(entry), column))
    except PromptError as error:
        return "", str(error)
    return ("", NO_CAPTION) if text is None else (text, "")
