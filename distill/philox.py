"""Random numbers that are a pure function of (seed, purpose, image index): Philox, a counter-based generator.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a
64-bit key to 128 random bits. The key is a hash of seed and purpose, so streams are independent. The counter holds the
image's index, the number of the draw, and the position in it. All images of a batch are computed at once, on any
device, also inside of a CUDA graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from distill.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random words for each counter of four words. Words are int64 tensors in [0, 2^32), which broadcast."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        # Products of two words need 64 bits: they may wrap to a negative number, whose bits are the same.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (second >> 32 & _WORD) ^ b ^ low, second & _WORD
        c, d = (first >> 32 & _WORD) ^ d ^ high, first & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return [a, b, c, d]


def key_of(seed: int, purpose: str) -> int:
    """The 64-bit key of a named stream of random numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "big")


class Draw:
    """Random numbers of a batch of images, functions of (seed, purpose, image index).

    An image's numbers do not depend on devices, on resumption or on the rest of its batch. Each call generates new
    ones.
    """

    def __init__(self, seed: int, purpose: str, images: Iterable[int] | Tensor) -> None:
        """`images` are indices (B,); numbers are generated on their device, or on the CPU."""
        key = key_of(seed, purpose)
        self._key = (key & _WORD, key >> 32)
        self._images = images if isinstance(images, torch.Tensor) else torch.tensor(list(images), dtype=torch.int64)
        self._draws = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape) in fp32, by the Box-Muller transform."""
        first, second, third, fourth = (word.float() for word in self._words(math.prod(shape)))
        numbers = []
        for radius, angle in ((first, second), (third, fourth)):
            length = torch.sqrt(-2 * torch.log((radius + 1) * 2**-32))  # the logarithm of a number in (0, 1]
            angle = angle * (2 * math.pi * 2**-32)
            numbers += [length * torch.cos(angle), length * torch.sin(angle)]
        return torch.stack(numbers, -1).flatten(1)[:, : math.prod(shape)].reshape(-1, *shape)

    def uniform(self) -> Tensor:
        """Uniform (B,) in [0, 1), in fp32."""
        return (self._words(1)[0] >> 8).float().flatten() * 2**-24

    def integers(self, below: int) -> Tensor:
        """Uniform integers (B,) in [0, below), as int64; `below` is at most 2^31."""
        return (self._words(1)[0] * below >> 32).flatten()

    def _words(self, numbers: int) -> list[Tensor]:
        """Four words for each image and each four numbers, (B, numbers / 4) each."""
        images = self._images.view(-1, 1)
        block = torch.arange(-(-numbers // 4), device=images.device).expand(len(images), -1)
        draw = torch.full_like(images, self._draws)
        self._draws += 1
        return philox4x32([block, draw, images & _WORD, images >> 32 & _WORD], self._key)
