"""The prompts of a run are encoded as configured or, by default, by the size of their cache."""

import pytest
import torch

from distill.config import Prompts
from distill.data.embedding_cache import row_bytes
from distill.errors import ConfigError
from distill.models.sd3_folder import SD3Folder
from distill.training import run_sources
from distill.training.run_sources import RunPrompts


def test_prompts_are_encoded_online_where_their_cache_is_too_large_for_memory(teacher, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nred\nblue\na\ncircle\nsquare\n")
    folder = SD3Folder.read(teacher)

    def encode(encoding, out):
        source = RunPrompts(Prompts(source=str(prompts), encoding=encoding), out)
        list(source.encode(folder, torch.device("cpu"), False))
        return source.is_online(folder), {path.name for path in out.iterdir()}

    assert encode("auto", tmp_path / "small") == (False, {"embeddings"})
    monkeypatch.setattr(run_sources, "RESIDENT_BYTES", 5 * row_bytes(folder) - 1)
    assert encode("auto", tmp_path / "small") == (False, {"embeddings"})  # as it was decided
    assert encode("auto", tmp_path / "large") == (True, {"online-prompts.jsonl"})
    assert encode("cached", tmp_path / "cached") == (False, {"embeddings"})
    cache = tmp_path / "cached" / "embeddings"
    assert RunPrompts(Prompts(source=str(cache)), tmp_path).is_online(folder) is False
    with pytest.raises(ConfigError, match=r"encoding is online, but .* is a cache"):
        RunPrompts(Prompts(source=str(cache), encoding="online"), tmp_path)
