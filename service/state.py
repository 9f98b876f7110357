"""What the handlers of one app share."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.engine.backend import Card
from service.engine.engine import Engine
from service.errors import NotFound
from service.metrics import Metrics
from service.settings import Settings


@dataclass
class State:
    """`engine` takes work from when the models are loaded until the app drains."""

    settings: Settings
    metrics: Metrics
    encoders: ThreadPoolExecutor
    engine: Engine

    def card(self, name: str | None) -> Card:
        """The model of that name; the first one when none is named."""
        cards = self.engine.cards
        if name is None:
            return next(iter(cards.values()))
        if name not in cards:
            raise NotFound(f"there is no model {name!r}; GET /v1/models lists them", "model", "model_not_found")
        return cards[name]
