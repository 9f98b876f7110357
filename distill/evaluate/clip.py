"""A CLIP model: normalized embeddings of images and texts, and their CLIP score."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from distill.errors import ScorerError, TeacherError
from distill.evaluate.metrics import Features
from distill.models.hub import HubModel, fetch_single
from distill.models.sd3_files import find_weights, read_bytes, setting_names
from distill.models.sd3_folder import check_weights

BATCH = 64


class Clip:
    """A `CLIPModel` with its own preprocessing. Every score depends on the model, so tables must name it.

    PickScore is such a model; its score, the cosine times `logit_scale`, orders images as the CLIP score does.
    """

    def __init__(self, reference: Path | str, device: torch.device) -> None:
        """Read a folder or a hub id, `owner/name[@revision]`, which is fetched. Raises ScorerError if it is no CLIP.

        The files of the weights must be there; they are loaded when they are needed. `digest` identifies all files.
        """
        self._reference, self._device = str(reference), device
        given = Path(os.path.expanduser(reference))
        self._folder = given if given.is_dir() else self._fetch()
        self.name = given.name if given.is_dir() else self._reference
        config = self._load(CLIPConfig)
        if config.model_type != "clip":
            raise self._no_clip(f"its model_type is {config.model_type}")
        self._processor = self._load(CLIPImageProcessorPil)
        self._tokenizer = self._load(CLIPTokenizer)
        identity = hashlib.sha256()
        try:
            weights = find_weights(self._folder)
            names = [path.name for path in self._folder.iterdir()]
            for name in ("config.json", "preprocessor_config.json", *setting_names("tokenizer", names)):
                identity.update(read_bytes(self._folder / name))
            for path in weights.files:
                check_weights(path, identity)
        except TeacherError as error:
            raise self._no_clip(str(error)) from error
        self.digest, self._variant = identity.hexdigest(), weights.variant
        self._texts: dict[str, Features] = {}

    def _fetch(self) -> Path:
        """The folder of a model of the hub in its cache."""
        if (model := HubModel.parse(self._reference)) is None:
            raise self._no_clip("there is no such folder")
        try:
            return fetch_single(model)
        except TeacherError as error:
            raise self._no_clip(str(error)) from error

    @cached_property
    def _model(self) -> Any:
        return self._load(CLIPModel, use_safetensors=True, variant=self._variant).to(self._device).eval()

    @torch.no_grad()
    def images(self, images: Iterable[NDArray[np.uint8]]) -> Features:
        """Embed images (H, W, 3) of any sizes: (N, D)."""
        parts, rest = [], iter(images)
        while batch := list(islice(rest, BATCH)):
            pixels = self._processor(batch, return_tensors="pt").pixel_values
            parts.append(_unit(self._model.get_image_features(pixels.to(self._device)).pooler_output))
        return np.concatenate(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Features:
        """Embed texts, cut to the model's length: (N, D). Each text is embedded once."""
        new = iter(dict.fromkeys(text for text in texts if text not in self._texts))
        while batch := list(islice(new, BATCH)):
            ids = self._tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(self._device)
            self._texts |= zip(batch, _unit(self._model.get_text_features(**ids).pooler_output), strict=True)
        return np.stack([self._texts[text] for text in texts])

    def scores(self, images: Iterable[NDArray[np.uint8]], texts: Sequence[str]) -> NDArray[np.float64]:
        """Compute the CLIP score 100 max(cos, 0) of each image and its text (Hessel et al., arXiv 2104.08718): (N,)."""
        return self.scores_of(self.images(images), texts)

    def scores_of(self, images: Features, texts: Sequence[str]) -> NDArray[np.float64]:
        """Compute the CLIP score of each embedded image (N, D) and its text: (N,)."""
        cosines = (images * self.texts(texts)).sum(axis=1)
        return np.asarray(100 * np.clip(cosines, 0, None))

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self._folder, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise self._no_clip(str(error)) from error

    def _no_clip(self, why: str) -> ScorerError:
        return ScorerError(
            f"{self._reference} is not a CLIP model with safetensors weights, preprocessor_config.json and tokenizer: "
            f"{why}; give the folder or hub id of one, such as openai/clip-vit-large-patch14-336"
        )


def _unit(embeddings: torch.Tensor) -> Features:
    return np.asarray(F.normalize(embeddings.double(), dim=-1).cpu().numpy())
