"""Prompts encoded once: `embed_prompts` writes a folder of shards, `EmbeddingCache` reads it while training.

The text encoders, most of a large teacher's memory, are gone by then. The manifest is written last, so a folder with
one is whole; it says which teacher and which lengths the rows were made with.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from distill.spec import read_spec
from distill.text import SD3TextEncoder, TextCondition

MANIFEST = "embeddings.json"
NULL = "null.safetensors"
FORMAT = 1
SHARD_ROWS = 4096
SHARD_BYTES = 1 << 30  # a prompt of a model with T5 takes megabytes, and a shard is built in memory
BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """Progress of `embed_prompts`: prompts encoded, and how many of them were cut to the token limit."""

    prompts: int
    truncated: int


def embed_prompts(
    teacher: Path | str, prompts: Iterable[str], out: Path, device: torch.device | str = "cpu"
) -> Iterator[Encoded]:
    """Encode each different prompt, in order, into `out`, and the empty prompt beside them.

    Computed and kept in bf16 where the device is fast in it, else in fp32. A folder that a killed call left is
    written anew.

    Raises PromptError without prompts, CacheError when `out` holds a whole cache already or the disk refuses.
    """
    if (out / MANIFEST).exists():
        raise CacheError(f"{out} holds embeddings already; remove it or give another folder")
    spec = read_spec(teacher)
    dtype = torch.bfloat16 if fast_bfloat16(torch.device(device)) else torch.float32
    encoder = SD3TextEncoder.load(teacher, device, dtype)
    null = encoder.encode([""]).to("cpu")
    shard_rows = max(1, min(SHARD_ROWS, SHARD_BYTES // (null.embeds.nbytes + null.pooled.nbytes)))
    out.mkdir(parents=True, exist_ok=True)
    different = iter(dict.fromkeys(prompts))
    shards: list[dict[str, Any]] = []
    count = truncated = 0
    try:
        with (out / "prompts.jsonl").open("w", encoding="utf-8") as texts:
            while rows := list(islice(different, shard_rows)):
                parts = []
                for start in range(0, len(rows), BATCH):
                    batch = rows[start : start + BATCH]
                    parts.append(encoder.encode(batch).to("cpu"))
                    truncated += sum(encoder.truncated(batch))
                    count += len(batch)
                    yield Encoded(count, truncated)
                name = f"shard-{len(shards):05d}.safetensors"
                shards.append({"name": name, "rows": len(rows), "sha256": _save(TextCondition.cat(parts), out / name)})
                texts.writelines(json.dumps(prompt) + "\n" for prompt in rows)
        if not shards:
            raise PromptError("there are no prompts to encode")
        null_sha256 = _save(null, out / NULL)
        manifest = {
            "format": FORMAT,
            "teacher": spec.name,
            "teacher_digest": spec.digest,
            "prompts": count,
            "truncated": truncated,
            "clip_length": spec.clip_length,
            "max_sequence_length": spec.max_sequence_length,
            "dtype": str(dtype).removeprefix("torch."),
            "null": {"name": NULL, "rows": 1, "sha256": null_sha256},
            "shards": shards,
        }
        checkpoint.write_aside(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"could not write embeddings to {out}: {error}; make room and run it again") from error


def _save(cond: TextCondition, path: Path) -> str:
    """Write rows and return the file's SHA-256."""
    save_file({"embeds": cond.embeds.contiguous(), "pooled": cond.pooled.contiguous()}, path)
    checkpoint.flush(path)
    return _digest(path)


class EmbeddingCache:
    """A whole cache of one teacher's text conditions; rows are read from disk when they are asked for."""

    def __init__(self, folder: Path, teacher: Path | str) -> None:
        """Open and check. Raises CacheError for a cache that is partial, damaged, or another teacher's."""
        path = folder / MANIFEST
        if not path.exists():
            raise CacheError(
                f"{folder} is not a whole embedding cache ({MANIFEST} is missing); remove it and embed again"
            )
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise CacheError(f"{path} is damaged ({error}); remove {folder} and embed again") from None
        spec = read_spec(teacher)
        expected = (FORMAT, spec.digest, spec.clip_length, spec.max_sequence_length)
        keys = ("format", "teacher_digest", "clip_length", "max_sequence_length")
        for key, value in zip(keys, expected, strict=True):
            if manifest.get(key) != value:
                raise CacheError(
                    f"{folder} was made for teacher {manifest.get('teacher')!r} with {key} = {manifest.get(key)}, "
                    f"not {value} of {spec.name!r}; remove it and embed again"
                )
        self.null = _row(_open(folder, manifest["null"]), 0)
        self._shards = [_open(folder, shard) for shard in manifest["shards"]]
        self._starts = [0, *accumulate(shard["rows"] for shard in manifest["shards"])]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int]) -> TextCondition:
        """The conditions of some prompts, in the order asked. Raises IndexError for one that is not there."""
        parts = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            shard = bisect_right(self._starts, index) - 1
            parts.append(_row(self._shards[shard], index - self._starts[shard]))
        return TextCondition.cat(parts)


def _open(folder: Path, entry: Mapping[str, Any]) -> Any:
    path = folder / entry["name"]
    if not path.exists() or _digest(path) != entry["sha256"]:
        raise CacheError(f"{path} is missing or damaged; remove {folder} and embed again")
    return safe_open(path, "pt")


def _row(file: Any, row: int) -> TextCondition:
    """One row of a shard, as a batch."""
    return TextCondition(*(file.get_slice(name)[row : row + 1] for name in ("embeds", "pooled")))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
