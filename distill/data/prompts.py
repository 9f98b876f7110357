"""Prompts of a built-in source or of files."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

from distill.data.prompt_files import read_texts
from distill.data.sources import PROMPT_SOURCES
from distill.errors import PromptError


def read_prompts(source: str, count: int | None = None, seed: int = 0, column: str | None = None) -> Iterator[str]:
    """Read the prompts of a built-in source, or of whatever `read_texts` reads; at most `count`.

    Blank lines are skipped. Raises PromptError for a source that is missing, empty, or not of the format of its name.
    """
    if source in PROMPT_SOURCES:
        yield from PROMPT_SOURCES[source](count, seed)
        return
    empty = True
    for prompt in islice(filter(None, map(str.strip, read_texts(source, column))), count):
        empty = False
        yield prompt
    if empty:
        raise no_prompts(source)


class DistinctPrompts:
    """Iterates over a source's distinct prompts, and digests all; `order` has the index of each that was read."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self.order = array("q")
        self._prompts = iter(prompts)
        self._indices: dict[bytes, int] = {}
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        return filter(self._is_new, self._prompts)

    def skip(self, count: int) -> None:
        """Read the next `count` prompts, or all that are left."""
        for prompt in islice(self._prompts, count):
            self._is_new(prompt)

    @property
    def read(self) -> int:
        """Number of prompts read."""
        return len(self.order)

    @property
    def repeated(self) -> int:
        """Number of prompts read that had been read before."""
        return self.read - len(self._indices)

    @property
    def sha256(self) -> str:
        """Digest of the prompts read, in order."""
        return self._digest.hexdigest()

    def _is_new(self, prompt: str) -> bool:
        digest, before = prompt_digest(prompt), len(self._indices)
        self._digest.update(digest)
        self.order.append(self._indices.setdefault(digest, before))
        return len(self._indices) > before


def prompt_digest(prompt: str) -> bytes:
    """Sixteen bytes that identify a prompt, so that tens of millions fit in memory."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def no_prompts(source: str) -> PromptError:
    """The error of an empty source."""
    return PromptError(f"{source} holds no prompts; write one per line")
