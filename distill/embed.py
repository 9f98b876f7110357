"""Prompts encoded once: `embed_prompts` writes a folder of shards, `EmbeddingCache` reads it while training.

The text encoders, most of a large teacher's memory, are gone by then.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from distill.device import fast_bfloat16
from distill.errors import PromptError
from distill.prompts import Distinct
from distill.shards import SHARD_ROWS, Layout, ShardReader, ShardWriter, rows_of_shard
from distill.spec import TeacherSpec, read_spec
from distill.text import SD3TextEncoder, TextCondition

MANIFEST = "embeddings.json"
TEXTS = "prompts.jsonl"  # for people: the prompt of each row
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
    spec = read_spec(teacher)
    dtype = text_dtype(device)
    source = Distinct(prompts)
    writer = ShardWriter(out, _layout(spec), dtype, source, {"prompts", "truncated", "repeated"})
    count, truncated = writer.count("prompts"), writer.count("truncated")
    yield Encoded(count, truncated, source.repeated)

    encoder = SD3TextEncoder.load(teacher, device, dtype)
    null = tensors(encoder.encode([""]))
    shard_rows = rows_of_shard(shard_rows, null)
    different = iter(source)
    while rows := list(islice(different, shard_rows)):
        parts = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            parts.append(encoder.encode(batch).to("cpu"))
            truncated += sum(encoder.truncated(batch))
            count += len(batch)
            yield Encoded(count, truncated, source.repeated)
        figures = {"prompts": count, "truncated": truncated, "repeated": source.repeated}
        writer.add(tensors(TextCondition.cat(parts)), {TEXTS: rows}, **figures)
    if not count:
        raise PromptError("there are no prompts to encode")
    writer.finish({"null": null}, {}, repeated=source.repeated)
    yield Encoded(count, truncated, source.repeated)


def _layout(spec: TeacherSpec) -> Layout:
    """What a cache of prompts holds."""
    return Layout("embedding", "embed", "prompts", MANIFEST, text_shapes(spec), spec)


def text_shapes(spec: TeacherSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of one encoded prompt, by tensor."""
    return {"embeds": spec.text_shape, "pooled": (spec.pooled_dim,)}


def text_dtype(device: torch.device | str) -> torch.dtype:
    """What prompts are encoded and kept in: bf16 where the device is fast in it, else fp32."""
    return torch.bfloat16 if fast_bfloat16(torch.device(device)) else torch.float32


def tensors(cond: TextCondition) -> dict[str, Tensor]:
    """Conditions by tensor, on the CPU."""
    return {"embeds": cond.embeds.cpu(), "pooled": cond.pooled.cpu()}


class EmbeddingCache:
    """A whole cache of one teacher's text conditions; rows are read from disk when they are asked for."""

    def __init__(self, folder: Path, teacher: Path | str) -> None:
        """Open and check. Raises CacheError for a cache that is partial, damaged, or another teacher's."""
        self._reader = ShardReader(folder, _layout(read_spec(teacher)))
        self.null = TextCondition(**self._reader.only("null"))

    def __len__(self) -> int:
        return len(self._reader)

    def rows(self, indices: Sequence[int]) -> TextCondition:
        """The conditions of some prompts, in the order asked.

        Raises IndexError for one that is not there, CacheError for one in a damaged shard.
        """
        return TextCondition(**self._reader.rows(indices))
