"""Prompts that are encoded in advance, so that the text encoders can be freed."""

from collections.abc import Iterable, Sequence

from distill.models.text import SD3TextEncoder, TextCondition


class KnownPrompts:
    """The conditions of known prompts, each encoded alone and held on the CPU."""

    def __init__(self, text: SD3TextEncoder, prompts: Iterable[str]) -> None:
        known = list(dict.fromkeys(prompts))
        self._conditions = {prompt: text.encode([prompt]).to("cpu") for prompt in known}
        self._truncated = dict(zip(known, text.truncated(known), strict=True))

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Return the conditions of prompts, each one of the known ones."""
        return TextCondition.cat([self._conditions[prompt] for prompt in prompts])

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each of these prompts, whether any encoder cuts it."""
        return [self._truncated[prompt] for prompt in prompts]
