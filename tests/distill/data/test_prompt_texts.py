"""Prompts that a run writes are read unchanged."""

import pytest

from distill.data.prompt_texts import PromptTexts, write_texts
from distill.data.prompts import DistinctPrompts
from distill.errors import CacheError

TEXTS = ["a", "two\nlines\r\x85\u2028", "ünknown 🙂", "a", '"quoted"']


def test_prompts_come_back_in_order_with_the_digest_of_a_cache(tmp_path):
    write_texts(iter(TEXTS), tmp_path / "texts.jsonl")
    found = PromptTexts(tmp_path / "texts.jsonl")
    assert list(found) == [found[index] for index in range(len(found))] == TEXTS
    source = DistinctPrompts(TEXTS)
    source.skip(len(TEXTS))
    assert found.sha256 == source.sha256


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(CacheError, match=r"texts.jsonl is missing or damaged"):
        PromptTexts(tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text('"a"\n{"b": 1}\n"c')
    damaged = PromptTexts(tmp_path / "texts.jsonl")
    assert len(damaged) == 2
    with pytest.raises(CacheError, match=r"texts.jsonl is missing or damaged \(a line holds no text\)"):
        damaged[1]
