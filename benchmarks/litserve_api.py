"""Stock diffusers as a LitServe API, for `serve.py`."""

from typing import Any

import litserve
from stock import Stock


class Api(litserve.LitAPI):
    """Answers requests with a student, in batches."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self._model = model

    def setup(self, device: str) -> None:
        """Load the student in the worker."""
        self._stock = Stock(self._model)

    def batch(self, inputs: list[dict]) -> list[dict]:
        """Return the requests unchanged."""
        return inputs

    def predict(self, x: list[dict]) -> list[dict]:
        """Generate the images of the requests."""
        return self._stock.answer(x)

    def unbatch(self, output: list[dict]) -> list[dict]:
        """Return the answers unchanged."""
        return output
