"""The embedding cache: what comes out is what the encoder makes, and what is not whole or not ours is refused."""

import json

import pytest
import torch
from tiny import PROMPTS, make_teacher
from typer.testing import CliRunner

from distill import embed
from distill.cli import app
from distill.embed import MANIFEST, EmbeddingCache, embed_prompts
from distill.errors import CacheError, PromptError
from distill.text import SD3TextEncoder


@pytest.fixture
def cache(teacher, tmp_path):
    list(embed_prompts(teacher, [*PROMPTS, PROMPTS[0]], tmp_path / "cache"))
    return tmp_path / "cache"


def test_rows_are_what_the_encoder_makes_once_per_prompt(cache, teacher):
    opened = EmbeddingCache(cache, teacher)
    assert len(opened) == len(PROMPTS)
    encoder = SD3TextEncoder.load(teacher)
    rows = opened.rows([2, 0, 1])
    expected = encoder.encode([PROMPTS[i] for i in (2, 0, 1)])
    torch.testing.assert_close(rows.embeds, expected.embeds)
    torch.testing.assert_close(rows.pooled, expected.pooled)
    torch.testing.assert_close(opened.null.embeds, encoder.encode([""]).embeds)


def test_cut_prompts_are_counted(teacher, tmp_path):
    *_, last = embed_prompts(teacher, ["a red circle", "a " * 30], tmp_path / "cache")
    assert (last.prompts, last.truncated) == (2, 1)
    assert json.loads((tmp_path / "cache" / MANIFEST).read_text())["truncated"] == 1


def test_partial_damaged_and_foreign_caches_are_refused(cache, teacher, tmp_path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(CacheError, match="teacher_digest"):
        EmbeddingCache(cache, other)
    shard = cache / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"\0\1\2\3")
    with pytest.raises(CacheError, match="shard-00000"):
        EmbeddingCache(cache, teacher)
    shard.write_bytes(whole)
    (cache / MANIFEST).unlink()
    with pytest.raises(CacheError, match="not a whole"):
        EmbeddingCache(cache, teacher)


def test_no_prompts_is_an_error_and_an_old_cache_is_not_overwritten(cache, teacher, tmp_path):
    with pytest.raises(PromptError):
        list(embed_prompts(teacher, [], tmp_path / "empty"))
    with pytest.raises(CacheError, match="already"):
        list(embed_prompts(teacher, PROMPTS, cache))


def test_rows_are_found_across_shards_and_none_beyond(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SHARD_ROWS", 2)
    texts = ["a", "red", "blue", "circle", "square"]
    list(embed_prompts(teacher, texts, tmp_path / "cache"))
    opened = EmbeddingCache(tmp_path / "cache", teacher)
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3
    expected = SD3TextEncoder.load(teacher).encode([texts[4], texts[1], texts[2]])
    torch.testing.assert_close(opened.rows([4, 1, 2]).pooled, expected.pooled)
    with pytest.raises(IndexError):
        opened.rows([5])


def test_what_a_killed_call_left_is_written_anew(teacher, tmp_path):
    killed = embed_prompts(teacher, ["a", "red"], tmp_path / "cache")
    next(killed)
    killed.close()
    with pytest.raises(CacheError, match="not a whole"):
        EmbeddingCache(tmp_path / "cache", teacher)
    list(embed_prompts(teacher, ["a", "red", "blue"], tmp_path / "cache"))
    assert len(EmbeddingCache(tmp_path / "cache", teacher)) == 3


def test_the_command_warns_of_prompts_over_the_limit(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n" + "a " * 30)
    out = str(tmp_path / "cache")
    result = CliRunner().invoke(
        app, ["embed", str(teacher), str(tmp_path / "prompts.txt"), "--out", out, "--device", "cpu"]
    )
    assert result.exit_code == 0
    assert "1 prompts are over the token limit" in result.output
    assert len(EmbeddingCache(tmp_path / "cache", teacher)) == 2
