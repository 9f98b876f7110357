"""From student folders to backends. The one file that knows the distillation half, and only its pipeline."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline
from service.engine.backend import Backend, Card, Pixels, Simulator
from service.errors import StartError
from service.settings import Settings


class StudentBackend:
    """A `OneStepPipeline` behind the backend's protocol."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._pipeline = OneStepPipeline.load(folder, device)
        self._tokenizers = threading.Lock()  # each call sets their padding and truncation: one thread at a time
        spec = self._pipeline.spec
        pixels = spec.vae_scale_factor * spec.patch_size
        self.card = Card(spec.name, spec.teacher, spec.created, spec.sizes, pixels, spec.token_limit)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int) -> Pixels:
        """One call of the network for all of them; a prompt that comes several times is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        with self._tokenizers:
            encoded = self._pipeline.encode(distinct)
        cond = encoded[torch.tensor([distinct.index(prompt) for prompt in prompts])]
        pixels: Pixels = np.asarray(self._pipeline.decode(self._pipeline.latents(cond, seeds, width, height)))
        return pixels

    def count_tokens(self, prompt: str) -> tuple[int, bool]:
        """Text tokens that the model sees, and whether the prompt is longer."""
        with self._tokenizers:
            return self._pipeline.count_tokens([prompt])[0], self._pipeline.truncated([prompt])[0]


def load_backends(settings: Settings) -> dict[str, Backend]:
    """A backend for each model folder, by the model's name. Slow: call it off the event loop.

    Raises StartError for a folder that cannot be loaded and for two models of one name.
    """
    if settings.device == "simulator":
        simulator = Simulator()
        return {simulator.card.name: simulator}
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    backends: dict[str, Backend] = {}
    for folder in settings.models or (SHIPPED_STUDENT,):
        try:
            backend = StudentBackend(folder, torch.device(name))
        except Exception as error:  # a foreign folder, no such device, too little memory: all end the start
            raise StartError(f"model {folder} on {name}: {error}") from error
        if backend.card.name in backends:
            raise StartError(
                f"{folder}: a model named {backend.card.name!r} is loaded already; rename it in onestep.json"
            )
        backends[backend.card.name] = backend
    return backends
