"""The prompts and real images of a run, each with its cache."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from distill.config import Prompts, RealImages, RunConfig
from distill.data import embedding_cache, image_cache
from distill.data.embedding_cache import EmbeddingCache, check_prompts, embed_prompts
from distill.data.image_cache import ImageCache, check_examples, encode_examples
from distill.data.images import read_examples
from distill.data.prompts import read_prompts
from distill.data.sources import PROMPT_SOURCES
from distill.errors import CheckpointError, ConfigError
from distill.files import atomic_write_text
from distill.models.sd3_folder import SD3Folder

SOURCES = "sources.json"  # digests of the teacher, prompts and real images that a run trains on
Cache = TypeVar("Cache", EmbeddingCache, ImageCache)
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
        """Whether the cache is complete."""
        return (self.cache / self.manifest).exists()

    def check(self, teacher: SD3Folder) -> None:
        """Find errors of a source, unless it is a stream. Raises CacheError, PromptError or ImageError."""
        path = Path(self.config.source)
        if self.is_cache:
            self.open(teacher)
        elif self.config.source not in ("-", *PROMPT_SOURCES) and (
            path.is_dir() or path.is_file() or not path.exists()
        ):
            next(self._rows(), None)

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
        elif resumed and source not in PROMPT_SOURCES and (source == "-" or not Path(source).exists()):
            what = "standard input" if source == "-" else source
            _log.warning("%s is not read again; the run goes on with what was encoded of it in %s", what, self.cache)
        else:
            self._compare(teacher, self._rows(), self.cache)

    def open(self, teacher: SD3Folder, device: torch.device | None = None) -> Cache:
        """Open the cache. With a device, only the first `max_count` rows are used, and a small cache is held there."""
        return self._cache(self.cache, teacher, device, None if device is None else self.config.max_count)

    def _rows(self) -> Iterator[Any]:
        return self._read(self.config.source, self.config.max_count, self.config.seed, self.config.column)


class RunPrompts(RunSource[EmbeddingCache]):
    """The prompts of a run."""

    manifest, folder = embedding_cache.MANIFEST, "embeddings"
    _cache, _read = EmbeddingCache, staticmethod(read_prompts)
    _encode, _compare = staticmethod(embed_prompts), staticmethod(check_prompts)

    def count(self) -> int | None:
        """The number of distinct prompts in the cache; None if it cannot be read."""
        try:
            return int(json.loads((self.cache / self.manifest).read_text())["prompts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


class RunImages(RunSource[ImageCache]):
    """The real images of a run, for methods that take them."""

    manifest, folder = image_cache.MANIFEST, "images"
    _cache, _read = ImageCache, staticmethod(read_examples)
    _encode, _compare = staticmethod(encode_examples), staticmethod(check_examples)


def run_sources(config: RunConfig, out: Path) -> tuple[RunPrompts, RunImages | None]:
    """The prompts of a run, and its real images if it takes any. Raises ConfigError for a column of a cache."""
    return RunPrompts(config.prompts, out), None if config.real is None else RunImages(config.real, out)


def check_digests(
    out: Path, teacher: SD3Folder, prompts: EmbeddingCache, images: ImageCache | None, has_checkpoint: bool
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


def read_digests(out: Path) -> dict[str, str] | None:
    """Read what a run has trained on; None if nothing was recorded. Raises CheckpointError for a damaged record."""
    path = out / SOURCES
    if not path.exists():
        return None
    try:
        digests: dict[str, str] = json.loads(path.read_text())
        digests["teacher"]  # every record has it
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say what the run learns from ({error}); give another --out") from None
    return digests


def write_digests(out: Path, digests: dict[str, str]) -> None:
    """Record what a run trains on."""
    atomic_write_text(out / SOURCES, json.dumps(digests, indent=2) + "\n")
