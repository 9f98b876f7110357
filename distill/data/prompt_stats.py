"""Statistics of a source of prompts: counts, and lengths in characters and tokens."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from distill.data.prompt_files import read_texts
from distill.data.prompts import no_prompts, prompt_digest
from distill.data.sources import PROMPT_SOURCES
from distill.models.sd3_folder import SD3Folder

BLOCK = 1024  # prompts tokenized together


@dataclass(frozen=True)
class LengthStats:
    """Percentiles of lengths; `over` of them exceed the `limit`, if there is one."""

    minimum: int
    median: int
    p95: int
    maximum: int
    limit: int | None
    over: int


@dataclass(frozen=True)
class PromptStats:
    """Counts of a source, and lengths of its distinct prompts in characters and in tokens of each tokenizer."""

    prompts: int
    repeated: int
    empty: int
    lengths: dict[str, LengthStats]


def prompt_stats(source: str, teacher: SD3Folder | None = None, column: str | None = None) -> PromptStats:
    """Count the prompts of a source and their lengths, in tokens too if a teacher is given.

    Raises PromptError for a source without prompts, TeacherError for unusable tokenizers.
    """
    tokenizers = {} if teacher is None else _tokenizers(teacher)
    lengths: dict[str, Counter[int]] = {name: Counter() for name in ("characters", *tokenizers)}
    seen: set[bytes] = set()
    prompts = empty = 0
    texts = map(str.strip, PROMPT_SOURCES[source](None, 0) if source in PROMPT_SOURCES else read_texts(source, column))
    while block := list(islice(texts, BLOCK)):
        filled = {text: prompt_digest(text) for text in block if text}
        prompts += sum(map(bool, block))
        empty += block.count("")
        different = [text for text, digest in filled.items() if digest not in seen]
        seen.update(filled.values())
        lengths["characters"].update(map(len, different))
        for name, (tokenizer, _) in tokenizers.items():
            if different:
                lengths[name].update(map(len, tokenizer(different, verbose=False).input_ids))
    if not prompts:
        raise no_prompts(source)
    limits = {name: limit for name, (_, limit) in tokenizers.items()}
    length_stats = {name: _length_stats(counts, limits.get(name)) for name, counts in lengths.items()}
    return PromptStats(prompts, prompts - len(seen), empty, length_stats)


def _length_stats(counts: Mapping[int, int], limit: int | None) -> LengthStats:
    """Nearest-rank percentiles of lengths, given the count of each."""
    ordered = sorted(counts)
    reached = list(accumulate(counts[length] for length in ordered))

    def percentile(percent: int) -> int:
        return ordered[bisect_left(reached, -(-percent * reached[-1] // 100))]

    over = 0 if limit is None else sum(number for length, number in counts.items() if length > limit)
    return LengthStats(ordered[0], percentile(50), percentile(95), ordered[-1], limit, over)


def _tokenizers(teacher: SD3Folder) -> dict[str, tuple[Any, int]]:
    """Load a teacher's tokenizers, without its encoders, and their token limits."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    from distill.models.text import load_tokenizer

    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    limits = {"tokenizer": teacher.clip_length, "tokenizer_2": teacher.clip_length}
    if teacher.has_t5 and teacher.max_sequence_length > 0:
        kinds["tokenizer_3"], limits["tokenizer_3"] = T5TokenizerFast, teacher.max_sequence_length
    return {name: (load_tokenizer(kind, teacher.path / name), limits[name]) for name, kind in kinds.items()}
