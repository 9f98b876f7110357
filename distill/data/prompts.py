"""Prompts of a built-in source or of files, and statistics of them."""

import hashlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from distill.data.prompt_files import read_texts
from distill.data.sources import PROMPT_SOURCES
from distill.errors import PromptError
from distill.models.sd3_folder import SD3Folder

BLOCK = 1024  # prompts tokenized together


def read_prompts(source: str, count: int | None = None, seed: int = 0, column: str | None = None) -> Iterator[str]:
    """Prompts of a built-in source, or whatever `read_texts` reads; at most `count`.

    Blank lines are passed over. Raises PromptError for a source that is missing, empty, or not what its name says.
    """
    if source in PROMPT_SOURCES:
        yield from PROMPT_SOURCES[source](count, seed)
        return
    empty = True
    for prompt in islice(filter(None, map(str.strip, read_texts(source, column))), count):
        empty = False
        yield prompt
    if empty:
        raise _nothing_in(source)


class Distinct:
    """Each different prompt of a source once; counts and digests what has been read of the source.

    `order` has, for each prompt that was read, its number among the different ones.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self.order = array("q")
        self._prompts = iter(prompts)
        self._seen: dict[bytes, int] = {}
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        return filter(self._is_new, self._prompts)

    def skip(self, count: int) -> None:
        """Read on by `count` prompts, or to the end."""
        for prompt in islice(self._prompts, count):
            self._is_new(prompt)

    @property
    def read(self) -> int:
        """How many prompts have been read."""
        return len(self.order)

    @property
    def repeated(self) -> int:
        """How many of the prompts read had been read before."""
        return self.read - len(self._seen)

    @property
    def sha256(self) -> str:
        """Of the prompts read, in their order."""
        return self._digest.hexdigest()

    def _is_new(self, prompt: str) -> bool:
        mark, before = _mark(prompt), len(self._seen)
        self._digest.update(mark)
        self.order.append(self._seen.setdefault(mark, before))
        return len(self._seen) > before


@dataclass(frozen=True)
class Spread:
    """How lengths are spread; `over` of them exceed `limit`, where there is one."""

    minimum: int
    median: int
    p95: int
    maximum: int
    limit: int | None
    over: int


@dataclass(frozen=True)
class PromptStats:
    """A source counted. Lengths are those of its different prompts: in characters, then for each tokenizer."""

    prompts: int
    repeated: int
    empty: int
    lengths: dict[str, Spread]


def prompt_stats(source: str, teacher: SD3Folder | None = None, column: str | None = None) -> PromptStats:
    """Count a source, in tokens too when a teacher is given.

    Raises PromptError for a source without prompts, TeacherError for unusable tokenizers.
    """
    tokenizers = {} if teacher is None else _tokenizers(teacher)
    lengths: dict[str, Counter[int]] = {name: Counter() for name in ("characters", *tokenizers)}
    seen: set[bytes] = set()
    prompts = empty = 0
    texts = map(str.strip, PROMPT_SOURCES[source](None, 0) if source in PROMPT_SOURCES else read_texts(source, column))
    while block := list(islice(texts, BLOCK)):
        filled = {text: _mark(text) for text in block if text}
        prompts += sum(map(bool, block))
        empty += block.count("")
        different = [text for text, mark in filled.items() if mark not in seen]
        seen.update(filled.values())
        lengths["characters"].update(map(len, different))
        for name, (tokenizer, _) in tokenizers.items():
            if different:
                lengths[name].update(map(len, tokenizer(different, verbose=False).input_ids))
    if not prompts:
        raise _nothing_in(source)
    limits = {name: limit for name, (_, limit) in tokenizers.items()}
    spreads = {name: _spread(counts, limits.get(name)) for name, counts in lengths.items()}
    return PromptStats(prompts, prompts - len(seen), empty, spreads)


def _spread(counts: Mapping[int, int], limit: int | None) -> Spread:
    """Nearest-rank percentiles of lengths, given how often each occurs."""
    ordered = sorted(counts)
    reached = list(accumulate(counts[length] for length in ordered))

    def percentile(percent: int) -> int:
        return ordered[bisect_left(reached, -(-percent * reached[-1] // 100))]

    over = 0 if limit is None else sum(number for length, number in counts.items() if length > limit)
    return Spread(ordered[0], percentile(50), percentile(95), ordered[-1], limit, over)


def _tokenizers(teacher: SD3Folder) -> dict[str, tuple[Any, int]]:
    """The tokenizers of a teacher with their limits; its encoders, gigabytes of them, stay on disk."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    from distill.models.text import load_tokenizer

    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    limits = {"tokenizer": teacher.clip_length, "tokenizer_2": teacher.clip_length}
    if teacher.has_t5 and teacher.max_sequence_length > 0:
        kinds["tokenizer_3"], limits["tokenizer_3"] = T5TokenizerFast, teacher.max_sequence_length
    return {name: (load_tokenizer(kind, teacher.path / name), limits[name]) for name, kind in kinds.items()}


def _mark(prompt: str) -> bytes:
    """What a prompt is known again by; sixteen bytes, so that tens of millions fit in memory."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def _nothing_in(source: str) -> PromptError:
    return PromptError(f"{source} holds no prompts; write one a line")
