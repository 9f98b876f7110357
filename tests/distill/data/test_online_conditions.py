"""Prompts encoded online have the conditions of a cache, in batches of any size."""

import threading

import pytest
import torch
from tiny import PROMPTS

from distill.data import online_conditions
from distill.data.batches import AHEAD, prefetch
from distill.data.embedding_cache import EmbeddingCache, embed_prompts, text_dtype
from distill.data.online_conditions import OnlineConditions
from distill.data.prompt_texts import PromptTexts, write_texts
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder

CPU = torch.device("cpu")


def encoded_online(texts, teacher, kind=SD3TextEncoder, device=CPU) -> OnlineConditions:
    return OnlineConditions(texts, device, lambda: kind.load(teacher, device, text_dtype(device)))


@pytest.fixture
def texts(tmp_path):
    write_texts([*PROMPTS, PROMPTS[0]], tmp_path / "prompts.jsonl")
    return PromptTexts(tmp_path / "prompts.jsonl")


def test_conditions_are_those_of_a_cache_in_any_batch(teacher_t5, texts, tmp_path):
    teacher = SD3Folder.read(teacher_t5).with_sequence_length(9)
    list(embed_prompts(teacher, texts, tmp_path / "cache"))
    cached, online = EmbeddingCache(tmp_path / "cache", teacher, CPU), encoded_online(texts, teacher)
    assert len(online) == len(cached) == len(PROMPTS) + 1
    assert online.sha256 == cached.sha256
    assert torch.equal(online.null.embeds, cached.null.embeds)
    for generator in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        state = generator.get_state()
        order = online.shuffle(generator)
        assert torch.equal(order, cached.shuffle(generator.set_state(state)))
        for indices in order.split(2):
            expected, found = cached.rows(indices), online.rows(indices)
            torch.testing.assert_close(found.embeds, expected.embeds)
            torch.testing.assert_close(found.pooled, expected.pooled)
    with pytest.raises(IndexError):
        online.rows(torch.tensor([len(online)]))


def test_a_prompt_is_encoded_once_while_its_condition_is_kept(teacher, texts, monkeypatch):
    encoded = []

    class Counted(SD3TextEncoder):
        def encode(self, prompts):
            encoded.append(list(prompts))
            return super().encode(prompts)

    online = encoded_online(texts, SD3Folder.read(teacher), Counted)
    rows = [online.rows(torch.tensor(indices)) for indices in ([0, 1, 0, 4], [1, 0], [2])]
    assert encoded == [PROMPTS[:2], [PROMPTS[2]]]
    assert torch.equal(rows[1].embeds[1], rows[0].embeds[3])
    monkeypatch.setattr(online_conditions, "KEPT_BYTES", 2 * rows[2].embeds.nbytes)
    for index in (2, 1, 2):  # 0 is the oldest and goes; one row with its pooled part is kept
        online.rows(torch.tensor([index]))
    online.rows(torch.tensor([0]))
    assert encoded[2:] == [[PROMPTS[1]], [PROMPTS[2]], [PROMPTS[0]]]


def test_prompts_are_encoded_while_the_step_before_is_computed(teacher, texts):
    """The thread prepares a few batches, ends with its reader, and raises its errors in the reader."""
    online, events, made = encoded_online(texts, SD3Folder.read(teacher)), [], threading.Semaphore(0)

    def batches():
        for step in range(20):
            rows = online.rows(torch.tensor([step % len(online)]))
            events.append(f"encoded {step}")
            made.release()
            yield rows

    before = threading.active_count()
    ahead = prefetch(batches())
    next(ahead)
    for _ in range(1 + AHEAD):
        made.acquire()
    events.append("step 0")
    assert events == [*(f"encoded {step}" for step in range(1 + AHEAD)), "step 0"]
    ahead.close()
    assert threading.active_count() == before

    with pytest.raises(IndexError, match="of 5") as raised:
        list(prefetch(online.rows(torch.tensor([row])) for row in (0, 1, 5)))
    assert "check_rows" in {entry.name for entry in raised.traceback}
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_conditions_of_another_stream_are_whole_when_a_step_uses_them(teacher, texts):
    online = encoded_online(texts, SD3Folder.read(teacher), device=torch.device("cuda"))
    encoder = SD3TextEncoder.load(SD3Folder.read(teacher), "cuda", text_dtype("cuda"))
    for step, rows in enumerate(prefetch(online.rows(torch.tensor([step % 4])) for step in range(40))):
        rows.embeds.record_stream(torch.cuda.current_stream())
        torch.testing.assert_close(rows.embeds, encoder.encode([PROMPTS[step % 4]]).embeds)
