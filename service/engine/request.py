"""`GenerationRequest`: what a router or a batch line asks of the engine, in one value."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.engine.batcher import Priority


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One image per seed of a prompt."""

    model: str
    prompt: str
    seeds: Sequence[int]
    width: int
    height: int
    adapter: str | None = None
    scale: float = 1.0  # of the adapter
    steps: int = 1  # network evaluations per image; more than one only for any-step models
    priority: Priority = Priority.INTERACTIVE
    owner: str = ""  # the API key or address whose turns and limits it counts for
    timeout: float | None = None  # seconds; None is the server's setting

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"
