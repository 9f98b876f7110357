"""Data that training reads by row: the conditions of prompts, cached or encoded online, and real images."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from distill.methods.base import Real
from distill.models.text import TextCondition

T_co = TypeVar("T_co", covariant=True)


class Rows(Protocol[T_co]):
    """Rows of prompts or real images; `sha256` is the digest of all that they were made of."""

    sha256: str

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> T_co:
        """Return the rows at indices (B,), on any device. Raises IndexError for a row that does not exist."""
        ...

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch: a permutation (N,) of all rows that suits how they are read."""
        ...


class Conditions(Rows[TextCondition], Protocol):
    """The text conditions of a run's prompts, one row for each prompt, and that of the empty prompt."""

    @property
    def null(self) -> TextCondition: ...


Reals = Rows[Real]
