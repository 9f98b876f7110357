"""`OnlineConditions`: conditions of prompts that are encoded when training needs them."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from distill.data.prompt_texts import PromptTexts
from distill.data.shards import check_rows
from distill.models.text import SD3TextEncoder, TextCondition

KEPT_BYTES = 1 << 29  # recent conditions: those of one round, whose update phases share them, with batches up to 196


class OnlineConditions:
    """Conditions of prompts, one row for each, encoded on a device.

    On a GPU the encoders have a stream of their own, so a thread that reads rows computes beside the training step.
    One thread may read at a time.
    """

    def __init__(self, texts: PromptTexts, device: torch.device, load: Callable[[], SD3TextEncoder]) -> None:
        """`load` loads the encoders on the device, at their first use."""
        self._texts = texts
        self._device = device
        self._load = load
        self._recent: OrderedDict[str, TextCondition] = OrderedDict()
        self.sha256 = texts.sha256  # of the prompts

    def __len__(self) -> int:
        return len(self._texts)

    @cached_property
    def null(self) -> TextCondition:
        """The condition of the empty prompt."""
        with self._own_stream():
            return self._encoder.encode([""])

    def rows(self, indices: Tensor) -> TextCondition:
        """Encode the prompts at indices (B,), those that were not encoded recently. Raises IndexError."""
        check_rows(indices, len(self))
        prompts = [self._texts[index] for index in indices.tolist()]
        with self._own_stream():
            missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._recent]
            if missing:
                encoded = self._encoder.encode(missing)
                self._recent |= {prompt: encoded[row] for row, prompt in enumerate(missing)}
            for prompt in prompts:
                self._recent.move_to_end(prompt)
            rows = TextCondition.cat([self._recent[prompt] for prompt in prompts])
            size = (rows.embeds.nbytes + rows.pooled.nbytes) // len(rows)
            while len(self._recent) * size > KEPT_BYTES:
                self._recent.popitem(last=False)
        return rows

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch (N,), uniformly."""
        return torch.randperm(len(self), generator=generator)

    @cached_property
    def _encoder(self) -> SD3TextEncoder:
        encoder = self._load()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # weights were copied on other streams
        return encoder

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Compute on the encoders' stream, and wait for the results."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
