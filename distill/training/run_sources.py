"""The prompts and real images of a run, each with its cache."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from distill.config import Prompts, RealImages, RunConfig
from distill.data.conditions import Conditions, Reals
from distill.data.embedding_cache import (
    EmbeddingCache,
    EmbedProgress,
    cached_prompts,
    check_prompts,
    embed_prompts,
    row_bytes,
    text_dtype,
)
from distill.data.image_cache import ImageCache, check_examples, encode_examples
from distill.data.images import ENCODED, read_examples
from distill.data.online_conditions import OnlineConditions
from distill.data.prompt_files import EMBEDDED
from distill.data.prompt_texts import PromptTexts, write_texts
from distill.data.prompts import DistinctPrompts, read_prompts
from distill.data.shard_reader import RESIDENT_BYTES
from distill.data.sources import IMAGE_SOURCES, PROMPT_SOURCES
from distill.errors import CacheError, CheckpointError, ConfigError
from distill.files import atomic_write_text
from distill.models.device import resolve_device
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.training.preflight import check_source
from distill.training.run_teacher import SOURCES, TEXTS, read_digests

Cache = TypeVar("Cache", Conditions, Reals)
_log = logging.getLogger(__name__)


class RunSource(Generic[Cache]):
    """A source of prompts or of real images. `cache` is the source itself if `is_cache`, else a folder of the run."""

    manifest: ClassVar[str]
    folder: ClassVar[str]
    _cache: Callable[[Path, SD3Folder, torch.device | None, int | None], Cache]
    _read: Callable[[str, int | None, int, str | None], Iterator[Any]]
    _encode: Callable[[SD3Folder, Iterator[Any], Path, torch.device], Iterator[Any]]
    _compare: Callable[[SD3Folder, Iterator[Any], Path], None]

    def __init__(self, config: Prompts | RealImages, out: Path) -> None:
        """Raises ConfigError if a column is given for a cache."""
        source = Path(config.source)
        self.config = config
        self.is_cache = (source / self.manifest).exists()
        self.cache = source if self.is_cache else out / self.folder
        if self.is_cache and config.column is not None:
            raise ConfigError(f"column {config.column!r} is named, but {source} is a cache; leave the column out")

    @property
    def is_encoded(self) -> bool:
        """Whether the source need not be encoded before training."""
        return (self.cache / self.manifest).exists()

    @property
    def encoded(self) -> Path:
        """What another run can take as its source instead, without reading this one again."""
        return self.cache

    def check(self, teacher: SD3Folder) -> None:
        """Find errors of a source, unless it is a stream. Raises CacheError, PromptError or ImageError."""
        if self.is_cache:
            self.open(teacher)
        else:
            check_source(self.config, self._read)

    def encode(self, teacher: SD3Folder, device: torch.device, resumed: bool) -> Iterator[Any]:
        """Encode the source into the cache, or compare it with a complete cache of the run; yield progress.

        A resumed run skips the comparison with a warning if its source is gone or is standard input. Raises CacheError
        if the source has changed.
        """
        source = self.config.source
        if self.is_cache:
            return
        if not self.is_encoded:
            yield from self._encode(teacher, self._rows(), self.cache, device)
        elif resumed and self._is_gone:
            what = "standard input" if source == "-" else source
            _log.warning("%s is not read again; the run goes on with what was encoded of it in %s", what, self.cache)
        else:
            self._compare(teacher, self._rows(), self.cache)

    def open(self, teacher: SD3Folder, device: torch.device | None = None) -> Cache:
        """Open the cache. With a device, only the first `max_count` rows are used, and a small cache is held there."""
        return self._cache(self.cache, teacher, device, None if device is None else self.config.max_count)

    @property
    def _is_gone(self) -> bool:
        """Whether the source cannot be read again."""
        source = self.config.source
        return source not in PROMPT_SOURCES and (source == "-" or not Path(source).exists())

    def _rows(self) -> Iterator[Any]:
        return self._read_source()

    def _read_source(self) -> Iterator[Any]:
        return self._read(self.config.source, self.config.max_count, self.config.seed, self.config.column)


class RunPrompts(RunSource[Conditions]):
    """The prompts of a run: a cache of conditions, or texts that are encoded online."""

    config: Prompts
    manifest, folder = EMBEDDED, "embeddings"
    _cache, _read = EmbeddingCache, staticmethod(read_prompts)
    _encode, _compare = staticmethod(embed_prompts), staticmethod(check_prompts)

    def __init__(self, config: Prompts, out: Path) -> None:
        """Raises ConfigError if a cache is given with a column or with encoding `online`."""
        super().__init__(config, out)
        if self.is_cache and config.encoding == "online":
            raise ConfigError(f"prompts.encoding is online, but {config.source} is a cache; set it to auto")
        self._file = out / TEXTS
        self._read_rows: list[str] | None = None

    @property
    def is_encoded(self) -> bool:
        """Whether the cache is complete, or the texts for online encoding are in the run folder."""
        return self._file.exists() if self._has_texts else super().is_encoded

    @property
    def encoded(self) -> Path:
        """The cache, or the file of texts."""
        return self._file if self._has_texts else self.cache

    def is_online(self, teacher: SD3Folder) -> bool:
        """Whether the prompts are encoded online. `auto` is decided at the first start, by the size of the cache."""
        if self._has_texts or self.is_encoded or self.config.encoding == "cached":
            return self._has_texts
        return self.distinct() * row_bytes(teacher) > RESIDENT_BYTES

    def encode(self, teacher: SD3Folder, device: torch.device, resumed: bool) -> Iterator[Any]:
        """Encode the source into the cache, or write its texts for online encoding; else compare with what is there.

        Raises CacheError if the source has changed.
        """
        if not self.is_online(teacher):
            yield from super().encode(teacher, device, resumed)
        elif not resumed or not self._file.exists():
            write_texts(self._rows(), self._file)
            yield EmbedProgress(self.distinct(), 0)
        elif self._is_gone:
            _log.warning("%s is not read again; the run goes on with %s", self.config.source, self._file)
        else:
            source = DistinctPrompts(self._rows())
            source.skip(sys.maxsize)
            if source.sha256 != PromptTexts(self._file).sha256:
                raise CacheError(
                    f"{self._file} has other prompts than the source holds now; restore the source, or give another "
                    "--out"
                )
        self._read_rows = None

    def open(self, teacher: SD3Folder, device: torch.device | None = None) -> Conditions:
        """Open the cache, or the texts for encoding on the device, unless `encoder_device` names another."""
        if not self._has_texts:
            return super().open(teacher, device)
        place = self.config.encoder_device
        where = (device or torch.device("cpu")) if place is None else resolve_device(place)
        load = partial(SD3TextEncoder.load, teacher, where, text_dtype(where), t5=self.config.t5)
        return OnlineConditions(PromptTexts(self._file), where, load)

    def first(self, count: int) -> list[str]:
        """The first distinct prompts of an encoded source, at most `count`. Raises CacheError."""
        if self._has_texts:
            return list(islice(DistinctPrompts(PromptTexts(self._file)), count))
        return cached_prompts(self.cache, min(count, self.config.max_count))

    def count(self) -> int | None:
        """The number of distinct prompts of an encoded source; None if it cannot be read."""
        try:
            if self._has_texts:
                return len(set(PromptTexts(self._file)))
            return int(json.loads((self.cache / self.manifest).read_text())["prompts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CacheError):
            return None

    def distinct(self) -> int:
        """The number of distinct prompts; a source that is not encoded yet is read for it."""
        counted = self.count() if self.is_encoded else None
        return len(set(self._rows())) if counted is None else counted

    @property
    def _has_texts(self) -> bool:
        """Whether the run is known to encode online: by its configuration, or by what is in its folder."""
        if self.is_cache or self.config.encoding != "auto":
            return self.config.encoding == "online"
        return self._file.exists() and not super().is_encoded

    def _rows(self) -> Iterator[str]:
        """The prompts of the source, which may be a stream and is read once."""
        if self._read_rows is None:
            self._read_rows = list(self._read_source())
        return iter(self._read_rows)


class RunImages(RunSource[Reals]):
    """The real images of a run, for methods that take them."""

    manifest, folder = ENCODED, "images"
    _cache, _read = ImageCache, staticmethod(read_examples)
    _encode, _compare = staticmethod(encode_examples), staticmethod(check_examples)

    def to_encode(self) -> int:
        """The number of images that are still to be encoded; those of a source that is not built in are read for it."""
        if self.is_encoded:
            return 0
        if self.config.source in IMAGE_SOURCES and self.config.max_count is not None:
            return self.config.max_count
        return sum(1 for _ in self._read_source())


def run_sources(config: RunConfig, out: Path) -> tuple[RunPrompts, RunImages | None]:
    """The prompts of a run, and its real images if it takes any. Raises ConfigError for a column of a cache."""
    return RunPrompts(config.prompts, out), None if config.real is None else RunImages(config.real, out)


def check_digests(
    out: Path, teacher: SD3Folder, prompts: Conditions, images: Reals | None, has_checkpoint: bool
) -> dict[str, str]:
    """The digests of what a run trains on. Raises CheckpointError if the run in `out` has trained on something else."""
    digests = {"prompts": prompts.sha256, **({"real images": images.sha256} if images is not None else {})}
    digests["teacher"] = teacher.digest
    recorded = (read_digests(out) if has_checkpoint else None) or digests
    for name, digest in digests.items():
        if recorded.get(name) != digest:
            raise CheckpointError(
                f"{out} was trained on other {name} than it is given now; restore what it was given, or give another "
                "--out folder"
            )
    return digests


def write_digests(out: Path, digests: dict[str, str]) -> None:
    """Record what a run trains on."""
    atomic_write_text(out / SOURCES, json.dumps(digests, indent=2) + "\n")
