"""The toy tokenizer has one token per word; our encoding equals the stock pipeline's."""

from pathlib import Path

import pytest
import torch
from tiny import CLIP_LENGTH, PROMPTS, WORDS, make_teacher, stock_pipeline
from transformers import CLIPTokenizer

from distill.errors import PromptError
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.worlds.tokenizer import build_clip_tokenizer


def test_every_word_is_one_token_also_when_words_contain_each_other(tmp_path: Path) -> None:
    words = ["a", "art", "ear", "heart", "hearts", "the", "three", "there", "earth", "é"]
    build_clip_tokenizer(words, 16).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 16
    ids = tokenizer(words).input_ids
    assert [len(row) for row in ids] == [3] * len(words)
    assert len({row[1] for row in ids}) == len(words)
    assert {(row[0], row[-1]) for row in ids} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_other_words_fall_back_to_bytes_and_case_is_ignored() -> None:
    tokenizer = build_clip_tokenizer(["red", "circle"], 16)
    assert tokenizer("RED Circle").input_ids == tokenizer("red circle").input_ids
    assert tokenizer.decode(tokenizer("zebra ☃").input_ids, skip_special_tokens=True) == "zebra ☃"


@pytest.mark.parametrize("word", ["two words", "it's", "x2", ""])
def test_a_word_that_cannot_be_one_token_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="cannot be one token"):
        build_clip_tokenizer([word], 16)


@pytest.mark.parametrize(("t5", "length"), [(False, 0), (False, 5), (True, 6)])
def test_encoding_is_the_stock_pipelines(t5: bool, length: int, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher", t5=t5, max_sequence_length=length)
    condition = SD3TextEncoder.load(SD3Folder.read(folder)).encode(PROMPTS)
    stock = stock_pipeline(folder)
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert condition.embeds.shape == (len(PROMPTS), CLIP_LENGTH + length, 48)
    assert torch.equal(condition.embeds, embeds)
    assert torch.equal(condition.pooled, pooled)


def test_a_length_can_be_given_instead_of_the_folders_own(teacher_t5: Path) -> None:
    assert SD3TextEncoder.load(SD3Folder.read(teacher_t5)).encode(["a"]).embeds.shape[1] == CLIP_LENGTH + 6
    assert (
        SD3TextEncoder.load(SD3Folder.read(teacher_t5), max_sequence_length=0).encode(["a"]).embeds.shape[1]
        == CLIP_LENGTH
    )


def test_truncation_is_told_for_each_encoder(teacher: Path, teacher_t5: Path) -> None:
    fits = " ".join(WORDS[:1] * (CLIP_LENGTH - 2))  # start and end take two
    assert SD3TextEncoder.load(SD3Folder.read(teacher)).truncated([fits, fits + " a", "a", ""]) == [
        False,
        True,
        False,
        False,
    ]
    six = SD3TextEncoder.load(SD3Folder.read(teacher_t5))  # CLIP's 8 tokens would do, T5's 6 with one end mark do not
    assert six.truncated(["a a a a a", "a a a a a a"]) == [False, True]


def test_half_of_a_character_is_refused_by_the_prompt_that_holds_it(teacher: Path) -> None:
    with pytest.raises(PromptError, match=r"the prompt 'cut \\ud83d' holds half of a character"):
        SD3TextEncoder.load(SD3Folder.read(teacher)).encode(["a", "cut \ud83d"])


def test_conditions_are_sliced_joined_and_repeated() -> None:
    condition = TextCondition(torch.arange(24.0).view(3, 4, 2), torch.arange(3.0).view(3, 1))
    assert condition[1].pooled.tolist() == [[1.0]]
    assert condition[-1].pooled.tolist() == [[2.0]]
    assert condition[1:].embeds.shape == (2, 4, 2)
    assert condition[torch.tensor([2, 0])].pooled.tolist() == [[2.0], [0.0]]
    assert len(TextCondition.cat([condition, condition[0]])) == 4
    assert condition[2].expand(5).embeds.shape == (5, 4, 2)
