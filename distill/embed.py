"""Prompts encoded once: `embed_prompts` writes a folder of shards, `EmbeddingCache` reads it while training.

The text encoders, most of a large teacher's memory, are gone by then. A cache grows shard by shard under an index of
its own name; the index takes its final name last, so a folder with a manifest is whole. It says which teacher and
which lengths the rows were made with, and what each file's bytes must add up to.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distill import checkpoint
from distill.device import fast_bfloat16
from distill.errors import CacheError, PromptError
from distill.prompts import Distinct
from distill.spec import TeacherSpec, read_spec
from distill.text import SD3TextEncoder, TextCondition

MANIFEST = "embeddings.json"
UNFINISHED = "embeddings.unfinished.json"  # the manifest while shards are still being added
NULL = "null.safetensors"
TEXTS = "prompts.jsonl"  # for people: the prompt of each row
FORMAT = 1
SHARD_ROWS = 4096
SHARD_BYTES = 1 << 30  # a prompt of a model with T5 takes megabytes, and a shard is built in memory
BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """Progress of `embed_prompts`: prompts encoded, how many of them were cut to the token limit, and repetitions.

    A repeated prompt is encoded once, and `repeated` counts its further occurrences.
    """

    prompts: int
    truncated: int
    repeated: int = 0


def embed_prompts(
    teacher: Path | str,
    prompts: Iterable[str],
    out: Path,
    device: torch.device | str = "cpu",
    shard_rows: int = SHARD_ROWS,
) -> Iterator[Encoded]:
    """Encode each different prompt, in order, into `out`, and the empty prompt beside them.

    Computed and kept in bf16 where the device is fast in it, else in fp32. A shard has at most `shard_rows` rows and
    SHARD_BYTES bytes. In a folder that a killed call left, whole shards are kept: the prompts they were made of are
    read again and passed over, and must be the same.

    Raises PromptError without prompts, CacheError when `out` holds a whole cache already, was begun with other
    prompts or another teacher, or the disk refuses.
    """
    if (out / MANIFEST).exists():
        raise CacheError(f"{out} holds embeddings already; remove it or give another folder")
    spec = read_spec(teacher)
    dtype = torch.bfloat16 if fast_bfloat16(torch.device(device)) else torch.float32
    source = Distinct(prompts)
    index = _begun(out, spec, str(dtype).removeprefix("torch."))
    source.skip(index["source"]["read"])
    if index["source"] != {"read": source.read, "sha256": source.sha256}:
        raise CacheError(f"{out} was begun with other prompts; give those again, or remove it to begin anew")
    count, truncated = index["prompts"], index["truncated"]
    yield Encoded(count, truncated, source.repeated)

    encoder = SD3TextEncoder.load(teacher, device, dtype)
    null = encoder.encode([""]).to("cpu")
    shard_rows = max(1, min(shard_rows, SHARD_BYTES // (null.embeds.nbytes + null.pooled.nbytes)))
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    different = iter(source)
    while rows := list(islice(different, shard_rows)):
        parts = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            parts.append(encoder.encode(batch).to("cpu"))
            truncated += sum(encoder.truncated(batch))
            count += len(batch)
            yield Encoded(count, truncated, source.repeated)
        with _writing(out):
            name = f"shard-{len(index['shards']):05d}.safetensors"
            sha256 = _save(TextCondition.cat(parts), out / name)
            index["shards"].append({"name": name, "rows": len(rows), "sha256": sha256})
            index["texts_bytes"] = _append(out / TEXTS, index["texts_bytes"], rows)
            index.update(prompts=count, truncated=truncated, source={"read": source.read, "sha256": source.sha256})
            checkpoint.write_aside(out / UNFINISHED, json.dumps(index, indent=2) + "\n")
    if not index["shards"]:
        raise PromptError("there are no prompts to encode")
    with _writing(out):
        index["null"] = {"name": NULL, "rows": 1, "sha256": _save(null, out / NULL)}
        index.update(repeated=source.repeated, source={"read": source.read, "sha256": source.sha256})
        checkpoint.write_aside(out / UNFINISHED, json.dumps(index, indent=2) + "\n")
        (out / UNFINISHED).replace(out / MANIFEST)
        checkpoint.flush(out)
    yield Encoded(count, truncated, source.repeated)


def _begun(out: Path, spec: TeacherSpec, dtype: str) -> dict[str, Any]:
    """The index of the shards that a killed call left, or one of none.

    Raises CacheError when it is of another teacher, device or format, or what it names is not there.
    """
    empty: dict[str, Any] = {
        "format": FORMAT,
        "teacher": spec.name,
        "teacher_digest": spec.digest,
        "clip_length": spec.clip_length,
        "max_sequence_length": spec.max_sequence_length,
        "t5": spec.has_t5,
        "dtype": dtype,
        "prompts": 0,
        "truncated": 0,
        "source": {"read": 0, "sha256": hashlib.sha256().hexdigest()},
        "texts_bytes": 0,
        "shards": [],
    }
    path = out / UNFINISHED
    if not path.exists():
        return empty
    index = _read_index(path, spec, empty.keys())
    if index["dtype"] != dtype:
        raise CacheError(
            f"{out} was begun in {index['dtype']}, and this device computes in {dtype}; go on with the device that "
            "it was begun on, or remove it and embed again"
        )
    texts = out / TEXTS
    if not texts.exists() or texts.stat().st_size < index["texts_bytes"]:
        raise CacheError(f"{texts} is missing or cut off; remove {out} and embed again")
    _shards(path, index["shards"], spec)
    return index


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn what a disk says into our error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"could not write embeddings to {out}: {error}; make room and run the same command, whole shards are kept"
        ) from error


def _save(cond: TextCondition, path: Path) -> str:
    """Write rows whole or not at all, and return the file's SHA-256."""
    aside = path.with_name(f".{path.name}.partial")
    save_file({"embeds": cond.embeds.contiguous(), "pooled": cond.pooled.contiguous()}, aside)
    checkpoint.flush(aside)
    aside.replace(path)
    checkpoint.flush(path.parent)
    return _digest(path)


def _append(path: Path, at: int, prompts: Iterable[str]) -> int:
    """Write lines from a byte on, over what a killed call may have left there, and return where they end."""
    with path.open("r+b" if at else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.writelines(json.dumps(prompt).encode() + b"\n" for prompt in prompts)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


class EmbeddingCache:
    """A whole cache of one teacher's text conditions; rows are read from disk when they are asked for.

    That every shard is there, and of its size, is checked when the cache is opened; its checksum when its first row is
    asked for. A large model's cache is terabytes, which no start and no process of many should have to read through,
    and no row gets into training unchecked either way.
    """

    def __init__(self, folder: Path, teacher: Path | str) -> None:
        """Open and check. Raises CacheError for a cache that is partial, damaged, or another teacher's."""
        path = folder / MANIFEST
        if not path.exists():
            mend = "embed again, which continues it" if (folder / UNFINISHED).exists() else "remove it and embed again"
            raise CacheError(f"{folder} is not a whole embedding cache ({MANIFEST} is missing); {mend}")
        spec = read_spec(teacher)
        manifest = _read_index(path, spec, {"null", "shards"})
        self.null = _shards(path, [manifest["null"]], spec)[0].row(0)
        self._shards = _shards(path, manifest["shards"], spec)
        self._starts = [0, *accumulate(shard.rows for shard in self._shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Sequence[int]) -> TextCondition:
        """The conditions of some prompts, in the order asked.

        Raises IndexError for one that is not there, CacheError for one in a damaged shard.
        """
        parts = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            shard = bisect_right(self._starts, index) - 1
            parts.append(self._shards[shard].row(index - self._starts[shard]))
        return TextCondition.cat(parts)


class _Shard:
    """A file of rows, of which the header is checked at once and the bytes at the first row."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], spec: TeacherSpec) -> None:
        self.rows: int = entry["rows"]
        self._path = folder / entry["name"]
        self._sha256 = entry["sha256"]
        self._checked = False
        expected = {"embeds": [self.rows, *spec.text_shape], "pooled": [self.rows, spec.pooled_dim]}
        try:
            file: Any = safe_open(self._path, "pt")  # refuses a file that is not as long as its header says
            shapes = {name: file.get_slice(name).get_shape() for name in expected}
        except (OSError, SafetensorError):
            raise self._damaged() from None
        if shapes != expected:
            raise self._damaged()
        self._file = file

    def row(self, row: int) -> TextCondition:
        """One row, as a batch. Raises CacheError when the file is not what was written."""
        if not self._checked:
            if _digest(self._path) != self._sha256:
                raise self._damaged()
            self._checked = True
        return TextCondition(*(self._file.get_slice(name)[row : row + 1] for name in ("embeds", "pooled")))

    def _damaged(self) -> CacheError:
        return CacheError(f"{self._path} is missing or damaged; remove {self._path.parent} and embed again")


def _read_index(path: Path, spec: TeacherSpec, keys: Set[str]) -> dict[str, Any]:
    """A manifest, or the beginning of one, with at least these keys.

    Raises CacheError when it cannot be read or is not of this teacher.
    """
    damaged = CacheError(f"{path} is damaged; remove {path.parent} and embed again")
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError):
        raise damaged from None
    if not isinstance(index, dict):
        raise damaged
    expected = (FORMAT, spec.digest, spec.clip_length, spec.max_sequence_length)
    pinned = ("format", "teacher_digest", "clip_length", "max_sequence_length")
    for key, value in zip(pinned, expected, strict=True):
        if index.get(key) != value:
            raise CacheError(
                f"{path.parent} was made for teacher {index.get('teacher')!r} with {key} = {index.get(key)}, "
                f"not {value} of {spec.name!r}; remove it and embed again"
            )
    if not index.keys() >= keys:
        raise damaged
    return index


def _shards(path: Path, entries: Iterable[Mapping[str, Any]], spec: TeacherSpec) -> list[_Shard]:
    """The files that the index at `path` names. Raises CacheError when one is not there or its entry is not one."""
    try:
        return [_Shard(path.parent, entry, spec) for entry in entries]
    except (KeyError, TypeError):
        raise CacheError(f"{path} is damaged; remove {path.parent} and embed again") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
