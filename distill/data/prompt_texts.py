"""`PromptTexts`: the prompts that a run encodes online, as its folder keeps them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.data.prompts import prompt_digest
from distill.errors import CacheError
from distill.files import atomic_write


class PromptTexts:
    """Prompts in a file of JSON strings, one per line; repetitions count.

    The file is held in memory as it is, with 8 bytes more per prompt: 90 MB for a million prompts of 80 characters.
    """

    def __init__(self, path: Path) -> None:
        """Read a file that `write_texts` made. Raises CacheError for a missing one."""
        self._path = path
        try:
            self._lines = path.read_bytes()
        except OSError as error:
            raise self._damaged(error) from None
        self._ends = np.flatnonzero(np.frombuffer(self._lines, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """The prompt at an index of 0 and more. Raises CacheError for a damaged line."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._parse(self._lines[start : int(self._ends[index])])

    def __iter__(self) -> Iterator[str]:
        return map(self._parse, self._lines.splitlines())

    @cached_property
    def sha256(self) -> str:
        """The digest of the prompts in order, equal to that of a cache of them."""
        digest = hashlib.sha256()
        for prompt in self:
            digest.update(prompt_digest(prompt))
        return digest.hexdigest()

    def _parse(self, line: bytes) -> str:
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        if not isinstance(prompt, str):
            raise self._damaged("a line holds no text")
        return prompt

    def _damaged(self, reason: object) -> CacheError:
        return CacheError(f"{self._path} is missing or damaged ({reason}); remove it, and it is written again")


def write_texts(prompts: Iterable[str], path: Path) -> None:
    """Write prompts for `PromptTexts`, atomically. Raises OSError."""
    with atomic_write(path) as made, made.open("wb") as file:
        file.writelines(json.dumps(prompt).encode() + b"\n" for prompt in prompts)
