"""Prompts encoded once: `embed_prompts` writes a folder of shards, `EmbeddingCache` reads it in training.

So training needs no text encoders, which are most of a large teacher's memory.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from itertools import count as count_from
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.data.prompt_files import EMBEDDED
from distill.data.prompts import DistinctPrompts
from distill.data.shard_reader import ShardReader
from distill.data.shard_writer import ShardWriter, check_source
from distill.data.shards import SHARD_ROWS, Layout, check_rows, rows_of_shard, shard_name, write_rows
from distill.data.worker_process import follow_parent
from distill.errors import CacheError, PromptError
from distill.models.device import fast_bfloat16
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition

TEXTS = "prompts.jsonl"  # the prompt of each row, in order
BATCH = 64


@dataclass(frozen=True)
class EmbedProgress:
    """Distinct prompts encoded so far, prompts cut to the token limit, and repetitions, which are not encoded again."""

    prompts: int
    truncated: int
    repeated: int = 0


@dataclass(frozen=True)
class _Shard:
    """Prompts of a shard to write, and the position in the source after reading them."""

    prompts: list[str]
    path: Path
    read: dict[str, Any]
    repeated: int


def embed_prompts(
    teacher: SD3Folder,
    prompts: Iterable[str],
    out: Path,
    device: torch.device | str = "cpu",
    shard_rows: int = SHARD_ROWS,
    processes: int = 1,
) -> Iterator[EmbedProgress]:
    """Encode the distinct prompts, in order, into `out`, with the empty prompt and the order of all prompts.

    Dtype is bf16 where the device is fast in it, else fp32. A shard has at most `shard_rows` rows and SHARD_BYTES
    bytes. With several `processes`, each has its own encoders, on its own GPU if there are enough, and encodes whole
    shards; the files are the same. A call that was killed is resumed: its complete shards are kept, and their prompts
    are read again and must be the same.

    Raises PromptError without prompts, CacheError when `out` holds a complete cache, was begun with other prompts or
    another teacher, cannot be written, or when a process is killed.
    """
    dtype = text_dtype(device)
    source = DistinctPrompts(prompts)
    writer = ShardWriter(out, _layout(teacher), dtype, source, {"prompts", "truncated", "repeated"})
    count, truncated = writer.count("prompts"), writer.count("truncated")
    yield EmbedProgress(count, truncated, source.repeated)

    row = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in text_shapes(teacher).items()}
    shard_rows = rows_of_shard(shard_rows, row)
    first = writer.shards

    def shards() -> Iterator[_Shard]:
        different = iter(source)
        for number in count_from(first):
            if not (rows := list(islice(different, shard_rows))):
                return
            yield _Shard(rows, writer.partial(shard_name(number)), writer.read_so_far(), source.repeated)

    null = _Shard([""], writer.partial("null"), {}, 0)
    for shard, cut in _encoded(chain(shards(), [null]), teacher, _devices(device, processes), dtype):
        if shard is null:
            continue
        count, truncated = count + len(shard.prompts), truncated + cut
        counts = {"prompts": count, "truncated": truncated, "repeated": shard.repeated}
        writer.add(shard.path, {TEXTS: shard.prompts}, shard.read, **counts)
        yield EmbedProgress(count, truncated, shard.repeated)
    if not count:
        raise PromptError("there are no prompts to encode; give a source that holds some")
    order = {"rows": torch.tensor(source.order)}
    writer.finish({"null": null.path, "order": order}, {}, repeated=source.repeated)
    yield EmbedProgress(count, truncated, source.repeated)


def check_prompts(teacher: SD3Folder, prompts: Iterable[str], folder: Path) -> None:
    """Raise CacheError unless this is a complete cache of these prompts for this teacher."""
    check_source(folder, _layout(teacher), DistinctPrompts(prompts))


def cached_prompts(folder: Path, count: int) -> list[str]:
    """The first distinct prompts of a cache, at most `count`. Raises CacheError when they cannot be read."""
    try:
        with (folder / TEXTS).open("rb") as lines:
            return [str(json.loads(line)) for line in islice(lines, count)]
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{folder / TEXTS} cannot be read ({error}); remove {folder} and embed again") from None


def _devices(device: torch.device | str, processes: int) -> list[torch.device]:
    """A device for each process: the named one, or for plain `cuda` all GPUs in rotation."""
    if processes > 1 and str(device) == "cuda":
        return [torch.device("cuda", i % torch.cuda.device_count()) for i in range(processes)]
    return [torch.device(device)] * processes


def _encoded(
    shards: Iterable[_Shard], teacher: SD3Folder, devices: Sequence[torch.device], dtype: torch.dtype
) -> Iterator[tuple[_Shard, int]]:
    """Encode shards in one process per device; yields each in order, with the number of prompts that were cut."""
    if len(devices) == 1:
        encoder = SD3TextEncoder.load(teacher, devices[0], dtype)
        for shard in shards:
            yield shard, _write(encoder, shard.prompts, shard.path)
        return
    context = get_context("spawn")
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    running: deque[tuple[_Shard, Future[int]]] = deque()
    with ProcessPoolExecutor(len(devices), context, _initialize, (teacher, free, dtype, len(devices))) as pool:
        try:
            for shard in shards:
                running.append((shard, pool.submit(_encode_shard, shard.prompts, shard.path)))
                if len(running) > 2 * len(devices):  # so that no process waits for a slow one
                    done, cut = running.popleft()
                    yield done, cut.result()
            while running:
                done, cut = running.popleft()
                yield done, cut.result()
        except BrokenProcessPool as error:
            raise CacheError(
                "a process that encodes prompts was killed, perhaps for memory; run the same command, with fewer "
                "--processes, complete shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write(encoder: SD3TextEncoder, prompts: Sequence[str], path: Path) -> int:
    """Encode prompts into a file; returns how many were cut."""
    parts = [encoder.encode(prompts[start : start + BATCH]).to("cpu") for start in range(0, len(prompts), BATCH)]
    try:
        write_rows(tensors(TextCondition.cat(parts)), path)
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"could not write {path}: {error}; make room and run the same command, complete shards are kept"
        ) from error
    return sum(encoder.truncated(prompts))


_encoder: SD3TextEncoder  # of an encoding process


def _initialize(teacher: SD3Folder, free: Any, dtype: torch.dtype, processes: int) -> None:
    """Set up an encoding process."""
    global _encoder
    follow_parent()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _encoder = SD3TextEncoder.load(teacher, free.get(), dtype)


def _encode_shard(prompts: Sequence[str], path: Path) -> int:
    return _write(_encoder, prompts, path)


def _layout(teacher: SD3Folder) -> Layout:
    """The layout of a cache of prompts."""
    return Layout("embedding", "embed", "prompts", EMBEDDED, text_shapes(teacher), teacher)


def text_shapes(teacher: SD3Folder) -> dict[str, tuple[int, ...]]:
    """Shapes of one encoded prompt, by tensor."""
    return {"embeds": teacher.text_shape, "pooled": (teacher.pooled_dim,)}


def row_bytes(teacher: SD3Folder) -> int:
    """Bytes of one encoded prompt in bf16: 2.73 MB for Stable Diffusion 3 with T5."""
    return torch.bfloat16.itemsize * sum(map(math.prod, text_shapes(teacher).values()))


def text_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of encoded prompts: bf16 where the device is fast in it, else fp32."""
    return torch.bfloat16 if fast_bfloat16(torch.device(device)) else torch.float32


def tensors(cond: TextCondition) -> dict[str, Tensor]:
    """The tensors of conditions by name, on the CPU."""
    return {"embeds": cond.embeds.cpu(), "pooled": cond.pooled.cpu()}


class EmbeddingCache:
    """A complete cache of a teacher's text conditions; a prompt that its source repeats has as many indices."""

    def __init__(
        self, folder: Path, teacher: SD3Folder, device: torch.device | None = None, count: int | None = None
    ) -> None:
        """Open at most `count` prompts, as `ShardReader` opens a cache; raises the same errors."""
        self._reader = ShardReader(folder, _layout(teacher), device)
        self.null = TextCondition(**self._reader.extra("null"))
        self._order = self._reader.extra("order")["rows"][:count]
        self.sha256 = self._reader.sha256  # of the source's prompts

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, indices: Tensor) -> TextCondition:
        """Read the conditions of the prompts at indices (B,). Raises IndexError, and CacheError for a damaged shard."""
        check_rows(indices, len(self))
        return TextCondition(**self._reader.rows(self._order[indices]))

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch (N,): a uniform permutation, or windows of shards if the cache is large."""
        return self._reader.shuffle(self._order, generator)
