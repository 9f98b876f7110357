"""Readers of real images with captions: folders of images and WebDataset's tar shards."""

import json
import tarfile
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from itertools import accumulate, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from distill.data.prompt_files import columns_of, text_of
from distill.data.sources import IMAGE_SOURCES, Example
from distill.errors import ImageError, PromptError

ENCODED = "images.json"  # the manifest of a cache that `distill encode` made
METADATA = "metadata.jsonl"  # of a folder of images, as Hugging Face's ImageFolder has it
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
EDGE = 4096  # bytes from each end of an image that enter the digest of the source
NO_CAPTION = "it has no caption"
NO_IMAGE = "it has no image of its name in jpg, png or webp"


def read_examples(source: str, count: int | None = None, seed: int = 0, column: str | None = None) -> Iterator[Example]:
    """Read the images of a source with their captions, at most `count`, in a fixed order.

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


def _examples(path: Path, column: str | None) -> Iterator[Example]:
    if path.is_file() and path.suffix.lower() == ".tar":
        yield from _shard(path, column)
    elif not path.is_dir():
        raise ImageError(f"no images at {path}; give a folder, an uncompressed .tar shard, or `scenes`")
    elif (path / METADATA).is_file():
        yield from _listed(path, column)
    elif shards := sorted(
        file for file in path.iterdir() if file.suffix.lower() == ".tar" and not is_hidden(Path(file.name))
    ):
        for shard in shards:
            yield from _shard(shard, column)
    else:
        yield from _captioned(path)


def is_hidden(path: PurePath) -> bool:
    """Whether a file or a folder above it in this relative path is hidden, like those of macOS and Jupyter."""
    return any(part.startswith(".") for part in path.parts)


def _captioned(folder: Path) -> Iterator[Example]:
    """Images of a folder with text files of the same name, and text files without an image."""
    files = sorted(file for file in folder.rglob("*") if not is_hidden(file.relative_to(folder)))
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
    """Images that a folder's metadata.jsonl lists."""
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
    """Images of an uncompressed tar file, in the order of each one's first file."""
    groups: dict[str, list[tarfile.TarInfo]] = {}
    unused = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                name = PurePosixPath(member.name)
                if member.isfile() and not member.issparse() and name.name and not is_hidden(name):
                    groups.setdefault(str(name.with_suffix("")), []).append(member)
                elif not member.isdir():
                    unused.append(member.name)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{path} is not a complete, uncompressed tar file ({error}); fetch it again") from None
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
    """First and last bytes of an image; empty if it cannot be read."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(start)
        first = file.read(min(size, EDGE))
        file.seek(start + max(0, size - EDGE))
        return first + file.read(min(size, EDGE))
    return b""


def _text(data: bytes) -> tuple[str, str]:
    """Decode a caption; returns it and its fault."""
    try:
        return data.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError:
        return "", "its caption is not UTF-8"


def _json_caption(data: bytes, column: str | None) -> tuple[str, str]:
    """Decode a caption; returns it and its fault."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return "", f"its caption is not JSON: {error}"
    return _caption(value, column) if isinstance(value, dict) else ("", "its caption is not a JSON object")


def _caption(entry: Mapping[str, Any], column: str | None) -> tuple[str, str]:
    """Decode a caption; returns it and its fault."""
    try:
        text = text_of("it", entry, columns_of("it", list(entry), column))
    except PromptError as error:
        return "", str(error)
    return ("", NO_CAPTION) if text is None else (text, "")
