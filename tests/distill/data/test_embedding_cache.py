"""The embedding cache returns the encoder's results, and is refused if it is incomplete or of another teacher."""

import json
from pathlib import Path

import pytest
import torch
from commands import invoke
from tiny import PROMPTS, WORDS, make_teacher

from distill.data import shard_reader, shards
from distill.data.embedding_cache import EmbeddingCache, embed_prompts, text_dtype
from distill.data.prompt_files import EMBEDDED
from distill.data.prompts import read_prompts
from distill.errors import CacheError, OutputError, PromptError, TeacherError
from distill.files import _left
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder

UNFINISHED = "embeddings.unfinished.json"
TEXTS = [f"{a} {b}" for a in WORDS for b in (*WORDS, WORDS[0])]  # 72 prompts, each eighth repeats one before
DIFFERENT = len(set(TEXTS))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the cache's files, without the empty lock file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def begin(teacher: Path, out: Path, texts: list[str]) -> None:
    """Start a call that is killed after its first shard of 8."""
    killed = embed_prompts(SD3Folder.read(teacher), texts, out, shard_rows=8)
    while not (out / UNFINISHED).exists():
        next(killed)
    killed.close()


@pytest.fixture
def cache(teacher, tmp_path):
    list(embed_prompts(SD3Folder.read(teacher), [*PROMPTS, PROMPTS[0]], tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["from disk", "held"])
def test_rows_are_what_the_encoder_makes_as_often_as_the_source_has_them(cache, teacher, device):
    opened = EmbeddingCache(cache, SD3Folder.read(teacher), device)
    assert len(opened) == len(PROMPTS) + 1
    assert json.loads((cache / EMBEDDED).read_text())["prompts"] == len(PROMPTS)  # a repetition is encoded once
    encoder = SD3TextEncoder.load(SD3Folder.read(teacher), dtype=text_dtype("cpu"))
    assert {path.stat().st_mode & 0o444 for path in (cache, *cache.iterdir())} == {cache.stat().st_mode & 0o444}
    rows = opened.rows(torch.tensor([2, 0, 1, len(PROMPTS)]))
    expected = encoder.encode([PROMPTS[i] for i in (2, 0, 1, 0)])
    torch.testing.assert_close(rows.embeds, expected.embeds)
    torch.testing.assert_close(rows.pooled, expected.pooled)
    torch.testing.assert_close(opened.null.embeds, encoder.encode([""]).embeds)
    for row in (-1, len(PROMPTS) + 1):
        with pytest.raises(IndexError):
            opened.rows(torch.tensor([row]))


def test_a_cache_is_held_only_within_the_memory_for_it(cache, teacher, monkeypatch):
    monkeypatch.setattr(shard_reader, "RESIDENT_BYTES", 1)
    shard = cache / "shard-00000.safetensors"
    opened = EmbeddingCache(cache, SD3Folder.read(teacher), torch.device("cpu"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(CacheError, match="shard-00000"):  # it is read now, not before
        opened.rows(torch.tensor([0]))
    monkeypatch.undo()
    with pytest.raises(CacheError, match="shard-00000"):
        EmbeddingCache(cache, SD3Folder.read(teacher), torch.device("cpu"))


def test_a_large_cache_is_read_by_shards_each_row_once_an_epoch(teacher, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    list(embed_prompts(SD3Folder.read(teacher), TEXTS, cache, shard_rows=8))
    small = EmbeddingCache(cache, SD3Folder.read(teacher))
    expected = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(small.shuffle(torch.Generator().manual_seed(0)), expected)

    size = (cache / "shard-00000.safetensors").stat().st_size
    monkeypatch.setattr(shard_reader, "RESIDENT_BYTES", 1)
    monkeypatch.setattr(shard_reader, "WINDOW_BYTES", 2 * size)
    large = EmbeddingCache(cache, SD3Folder.read(teacher))
    first, again, other = (large.shuffle(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    shard_of = torch.tensor([list(dict.fromkeys(TEXTS)).index(text) // 8 for text in TEXTS])
    for order in (first, other):
        assert sorted(order.tolist()) == list(range(len(TEXTS)))
        read = shard_of[order]
        assert len(read.unique_consecutive()) > 2 * 8  # rows of the two shards of a window alternate
        windows = list(dict.fromkeys(read.tolist()))
        assert windows != sorted(windows)
        for early, late in zip(windows[::2], windows[2::2], strict=False):
            assert (read == early).nonzero().max() < (read == late).nonzero().min()


def test_opening_a_cache_reads_headers_and_each_block_is_checked_when_it_is_first_read(teacher, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    row = sum(
        tensor[0].nbytes for tensor in SD3TextEncoder.load(SD3Folder.read(teacher)).encode([""]).__dict__.values()
    )
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2 * row)  # in bf16 twice as many rows
    list(embed_prompts(SD3Folder.read(teacher), TEXTS[:20], cache))
    path = cache / "shard-00000.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:header] + bytes(len(whole) - header))  # no row is left
    opened = EmbeddingCache(cache, SD3Folder.read(teacher))
    with pytest.raises(CacheError, match="shard-00000"):
        opened.rows(torch.tensor([0]))

    last = bytearray(whole)
    last[-1] ^= 1  # of the last row of the last tensor
    path.write_bytes(last)
    opened = EmbeddingCache(cache, SD3Folder.read(teacher))
    assert len(opened.rows(torch.arange(12))) == 12
    with pytest.raises(CacheError, match="shard-00000"):
        opened.rows(torch.tensor([19]))
    path.write_bytes(whole[: header - 1] + b"\0" + whole[header:])
    with pytest.raises(CacheError, match="shard-00000"):
        EmbeddingCache(cache, SD3Folder.read(teacher))


def test_cut_prompts_are_counted(teacher, tmp_path):
    *_, last = embed_prompts(SD3Folder.read(teacher), ["a red circle", "a " * 30], tmp_path / "cache")
    assert (last.prompts, last.truncated) == (2, 1)
    assert json.loads((tmp_path / "cache" / EMBEDDED).read_text())["truncated"] == 1


def test_partial_damaged_and_foreign_caches_are_refused(cache, teacher, tmp_path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(CacheError, match="teacher_digest"):
        EmbeddingCache(cache, SD3Folder.read(other))
    shard = cache / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"\0\1\2\3")
    damaged = EmbeddingCache(cache, SD3Folder.read(teacher))
    with pytest.raises(CacheError, match="shard-00000"):
        damaged.rows(torch.tensor([0]))
    shard.write_bytes(whole[:-4])
    with pytest.raises(CacheError, match="shard-00000"):
        EmbeddingCache(cache, SD3Folder.read(teacher))
    shard.unlink()
    with pytest.raises(CacheError, match="shard-00000"):
        EmbeddingCache(cache, SD3Folder.read(teacher))
    shard.write_bytes(whole)
    assert len(EmbeddingCache(cache, SD3Folder.read(teacher)).rows(torch.tensor([0]))) == 1
    (cache / EMBEDDED).unlink()
    with pytest.raises(CacheError, match="not a complete"):
        EmbeddingCache(cache, SD3Folder.read(teacher))


def test_no_prompts_is_an_error_and_an_old_cache_is_not_overwritten(cache, teacher, tmp_path):
    with pytest.raises(PromptError):
        list(embed_prompts(SD3Folder.read(teacher), [], tmp_path / "empty"))
    with pytest.raises(CacheError, match="already"):
        list(embed_prompts(SD3Folder.read(teacher), PROMPTS, cache))


@pytest.mark.parametrize(
    "change",
    [{"shards": [{}]}, {"shards": [{"name": "shard-00000.safetensors", "rows": 3, "sha256": ""}]}, {"null": 1}],
)
def test_an_index_that_is_not_of_its_files_is_refused(change, cache, teacher):
    index = json.loads((cache / EMBEDDED).read_text())
    (cache / EMBEDDED).write_text(json.dumps({**index, **change}))
    with pytest.raises(CacheError, match=r"damaged; remove .*cache and embed again"):
        EmbeddingCache(cache, SD3Folder.read(teacher))


def test_an_index_that_is_nested_without_end_is_refused(cache, teacher):
    (cache / EMBEDDED).write_text("[" * 100_000)
    with pytest.raises(CacheError, match=r"damaged; remove .*cache and embed again"):
        EmbeddingCache(cache, SD3Folder.read(teacher))


def test_the_lengths_that_rows_were_made_with_are_recorded_and_held_to(teacher_t5, tmp_path):
    list(embed_prompts(SD3Folder.read(teacher_t5), PROMPTS, tmp_path / "cache"))
    path = tmp_path / "cache" / EMBEDDED
    index = json.loads(path.read_text())
    assert (index["clip_length"], index["max_sequence_length"], index["t5"]) == (8, 6, True)
    opened = EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher_t5))
    assert opened.rows(torch.tensor([0])).embeds.shape == (1, 14, 48)
    path.write_text(json.dumps({**index, "max_sequence_length": 5}))
    with pytest.raises(CacheError, match="max_sequence_length = 5, not 6"):
        EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher_t5))


def test_rows_are_found_across_shards_and_none_beyond(teacher, tmp_path):
    texts = ["a", "red", "blue", "circle", "square"]
    list(embed_prompts(SD3Folder.read(teacher), texts, tmp_path / "cache", shard_rows=2))
    opened = EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher))
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3
    expected = SD3TextEncoder.load(SD3Folder.read(teacher), dtype=text_dtype("cpu")).encode(
        [texts[4], texts[1], texts[2]]
    )
    torch.testing.assert_close(opened.rows(torch.tensor([4, 1, 2])).pooled, expected.pooled)
    with pytest.raises(IndexError):
        opened.rows(torch.tensor([5]))


def test_a_call_killed_before_its_first_shard_leaves_nothing_that_binds(teacher, tmp_path):
    killed = embed_prompts(SD3Folder.read(teacher), ["a", "red"], tmp_path / "cache")
    next(killed)
    killed.close()
    with pytest.raises(CacheError, match="not a complete"):
        EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher))
    list(embed_prompts(SD3Folder.read(teacher), ["a", "red", "blue"], tmp_path / "cache"))
    assert len(EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher))) == 3


@pytest.mark.parametrize("name", ["prompts.jsonl", "shard-00000.safetensors", "null.safetensors", "mine.jsonl"])
def test_a_cache_replaces_no_file_of_another(name, teacher, tmp_path):
    (tmp_path / name).write_text('{"prompt": "mine"}\n')
    for _ in range(2):
        with pytest.raises(OutputError, match=f"{name} is not a part of a cache"):
            list(embed_prompts(SD3Folder.read(teacher), ["a"], tmp_path))
    assert contents(tmp_path) == {name: b'{"prompt": "mine"}\n'}


def test_a_teacher_that_is_not_there_leaves_no_folder(tmp_path):
    for words in (("embed", "a.txt"), ("encode", "scenes")):
        wrong = invoke(words[0], str(tmp_path / "nowhere"), words[1], "--out", str(tmp_path / "cache"))
        assert isinstance(wrong.exception, TeacherError)
    assert list(tmp_path.iterdir()) == []


def test_the_command_continues_a_killed_call_to_the_same_bytes(teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    whole, out = tmp_path / "whole", tmp_path / "killed"

    begin(teacher, out, TEXTS[:30])
    kept = out / "shard-00000.safetensors"
    written = kept.stat().st_mtime_ns
    assert not (out / EMBEDDED).exists()

    for folder in (out, whole):
        words = ["embed", str(teacher), str(prompts), "--out", str(folder), "--shard-rows", "8", "--device", "cpu"]
        done = invoke(*words, "--count", str(2 * len(TEXTS)))
        assert done.exit_code == 0, done.output
        assert f"prompts {len(TEXTS)}/{len(TEXTS)}" in done.output
        repeated = len(TEXTS) - DIFFERENT
        assert f"{DIFFERENT} prompts are in {folder}; {repeated} repeated prompts were skipped." in done.output
    assert kept.stat().st_mtime_ns == written
    assert len(EmbeddingCache(out, SD3Folder.read(teacher))) == len(TEXTS)
    assert contents(out) == contents(whole)


def test_what_a_kill_leaves_half_written_changes_no_byte(teacher, tmp_path):
    out = tmp_path / "killed"
    begin(teacher, out, TEXTS)
    with (out / "prompts.jsonl").open("a") as file:
        file.write('"a prompt of the next sh')
    (out / ".shard-00001.safetensors.partial").write_bytes(b"half")
    (out / f".{UNFINISHED}.99999999.distill-partial").write_text("{")
    _left.cache_clear()  # as in a new process
    (out / "shard-00001.safetensors").write_bytes(b"renamed, but not in the index")
    list(embed_prompts(SD3Folder.read(teacher), TEXTS, out, shard_rows=8))
    list(embed_prompts(SD3Folder.read(teacher), TEXTS, tmp_path / "whole", shard_rows=8))
    assert contents(out) == contents(tmp_path / "whole")


def test_several_processes_leave_the_bytes_of_one_also_after_a_kill(teacher, tmp_path):
    out = tmp_path / "several"
    begin(teacher, out, TEXTS)
    kept = (out / "shard-00000.safetensors").stat().st_mtime_ns
    *_, last = embed_prompts(SD3Folder.read(teacher), TEXTS, out, shard_rows=8, processes=2)
    assert (last.prompts, last.repeated) == (DIFFERENT, len(TEXTS) - DIFFERENT)
    list(embed_prompts(SD3Folder.read(teacher), TEXTS, tmp_path / "one", shard_rows=8))
    assert contents(out) == contents(tmp_path / "one")
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("texts", [["blue", *TEXTS[1:]], TEXTS[:5]], ids=["another", "shorter"])
def test_another_source_does_not_continue_a_cache(texts, teacher, tmp_path):
    begin(teacher, tmp_path / "cache", TEXTS)
    before = contents(tmp_path / "cache")
    with pytest.raises(CacheError, match="cache was begun with other prompts; give those again, or remove it"):
        list(embed_prompts(SD3Folder.read(teacher), texts, tmp_path / "cache"))
    assert contents(tmp_path / "cache") == before


def test_a_source_that_has_grown_continues_a_cache(teacher, tmp_path):
    begin(teacher, tmp_path / "cache", TEXTS[:20])
    *_, last = embed_prompts(SD3Folder.read(teacher), TEXTS, tmp_path / "cache")
    assert (last.prompts, last.repeated) == (DIFFERENT, len(TEXTS) - DIFFERENT)
    rows = EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher)).rows(torch.arange(len(TEXTS)))
    expected = SD3TextEncoder.load(SD3Folder.read(teacher), dtype=text_dtype("cpu")).encode(TEXTS)
    torch.testing.assert_close(rows.embeds, expected.embeds)
    lines = (tmp_path / "cache" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(dict.fromkeys(TEXTS))


def test_what_was_begun_is_refused_when_it_is_damaged_or_foreign(teacher, tmp_path):
    out = tmp_path / "cache"
    begin(teacher, out, TEXTS)
    with pytest.raises(CacheError, match="teacher_digest"):
        list(embed_prompts(SD3Folder.read(make_teacher(tmp_path / "other", seed=5)), TEXTS, out))
    index = (out / UNFINISHED).read_text()
    (out / UNFINISHED).write_text(index.replace('"float32"', '"another"').replace('"bfloat16"', '"another"'))
    with pytest.raises(CacheError, match="begun in another, and this device computes in"):
        list(embed_prompts(SD3Folder.read(teacher), TEXTS, out))
    (out / UNFINISHED).write_text(index[:-20])
    with pytest.raises(CacheError, match=f"{UNFINISHED} is missing or damaged; remove"):
        list(embed_prompts(SD3Folder.read(teacher), TEXTS, out))
    (out / UNFINISHED).write_text(index)
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError, match="shard-00000"):
        list(embed_prompts(SD3Folder.read(teacher), TEXTS, out))
    with pytest.raises(CacheError, match=r"not a complete embedding cache .*embed again, which continues it"):
        EmbeddingCache(out, SD3Folder.read(teacher))


def test_the_command_warns_of_prompts_over_the_limit(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n" + "a " * 30)
    words = ["embed", str(teacher), str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "cache")]
    result = invoke(*words, "--device", "cpu")
    assert result.exit_code == 0
    assert "1 prompts are longer than the token limit" in result.output
    assert len(EmbeddingCache(tmp_path / "cache", SD3Folder.read(teacher))) == 2


def test_a_cache_is_not_read_as_a_folder_of_prompt_files(cache, teacher, tmp_path):
    with pytest.raises(PromptError, match="cache is a cache of encoded prompts; a run takes it"):
        list(read_prompts(str(cache)))
    begin(teacher, tmp_path / "part", TEXTS)
    with pytest.raises(PromptError, match="part is an incomplete cache"):
        list(read_prompts(str(tmp_path / "part")))
