"""A CLIP model from a local folder: normalized embeddings of images and texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from distill.errors import ScorerError
from distill.evaluate.image_files import read_pixels
from distill.evaluate.metrics import Features

BATCH = 64


class Clip:
    """CLIP with its own preprocessing. Every score depends on the model, so tables must name it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load from safetensors. Raises ScorerError if the folder holds no CLIP model."""
        local: dict[str, Any] = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True, **local).to(device).eval()
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, **local)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"{folder} is not a CLIP model with safetensors weights, preprocessor_config.json and tokenizer; "
                "give --clip the folder of one, such as a download of openai/clip-vit-large-patch14-336"
            ) from error

    @torch.no_grad()
    def images(self, paths: Sequence[Path]) -> Features:
        """Embed image files: (N, D)."""
        parts = []
        for start in range(0, len(paths), BATCH):
            pixels = self._processor([read_pixels(path) for path in paths[start : start + BATCH]], return_tensors="pt")
            output = self._model.get_image_features(pixels.pixel_values.to(self._model.device))
            parts.append(_unit(output.pooler_output))
        return np.concatenate(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Features:
        """Embed texts, cut to the model's length: (N, D)."""
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = self._tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
            ).to(self._model.device)
            parts.append(_unit(self._model.get_text_features(**batch).pooler_output))
        return np.concatenate(parts)


def _unit(embeddings: torch.Tensor) -> Features:
    return np.asarray(F.normalize(embeddings.double(), dim=-1).cpu().numpy())
