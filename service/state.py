"""What the handlers of one app share."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from service.engine.backend import Backend
from service.engine.engine import Engine
from service.errors import NotFound
from service.metrics import Metrics
from service.settings import Settings


@dataclass
class State:
    """`engine` is there once the models are loaded and warm, and gone when the app drains."""

    settings: Settings
    metrics: Metrics
    encoders: ThreadPoolExecutor
    backends: Mapping[str, Backend] = field(default_factory=dict)
    engine: Engine | None = None

    def backend(self, name: str | None) -> Backend:
        """The model of that name; the first one when none is named."""
        if name is None:
            return next(iter(self.backends.values()))
        if name not in self.backends:
            raise NotFound(f"there is no model {name!r}; GET /v1/models lists them", "model", "model_not_found")
        return self.backends[name]
