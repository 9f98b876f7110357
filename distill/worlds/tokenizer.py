"""A CLIP tokenizer for a small vocabulary: each of its words is one token, other text is split into bytes."""

from collections.abc import Mapping, Sequence

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

Pair = tuple[str, str]


def build_clip_tokenizer(words: Sequence[str], model_max_length: int) -> CLIPTokenizer:
    """Build a lower-casing byte-level BPE tokenizer in which each of `words` is exactly one token.

    It is saved and loaded like any `CLIPTokenizer`. The ids are: 256 bytes, 256 bytes that end a word, the merges, and
    start and end of text. As in CLIP, the end of text has the highest id and is also the padding. Raises ValueError for
    a word that CLIP splits before any merge ("it's", "two words", "x2").
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [symbol + _WORD_END for symbol in alphabet]
    bare = _tokenizer(symbols, [], model_max_length).backend_tokenizer

    merges: dict[Pair, int] = {}
    for word in words:
        parts = bare.pre_tokenizer.pre_tokenize_str(bare.normalizer.normalize_str(word))
        if len(parts) != 1:
            raise ValueError(f"{word!r} cannot be one token: CLIP's rules split it into {len(parts)} pieces")
        # An appended merge ranks last, so it does not change words that are already one token.
        while len(pieces := _apply(merges, parts[0][0])) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    return _tokenizer(symbols + ["".join(pair) for pair in merges], list(merges), model_max_length)


def _tokenizer(symbols: Sequence[str], merges: Sequence[Pair], model_max_length: int) -> CLIPTokenizer:
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=model_max_length)


def _apply(merges: Mapping[Pair, int], word: str) -> list[str]:
    """Apply byte-pair encoding to one word: the pair of lowest rank is merged first."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    while True:
        ranked = [(merges[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in merges]
        if not ranked:
            return pieces
        i = min(ranked)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
