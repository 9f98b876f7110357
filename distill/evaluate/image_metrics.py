"""Metrics of image folders by models that the user provides: CLIP score, CMMD and FID."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import Dataset

from distill.errors import ScorerError
from distill.evaluate.clip import Clip
from distill.evaluate.image_files import prompt_of, read_pixels, size_of
from distill.evaluate.image_folder import find_images
from distill.evaluate.metrics import Interval, cmmd, interval


def score_images(
    folder: Path, clip: str | None, reference: Path | None, inception: Path | None, device: torch.device
) -> dict[str, object]:
    """Compute every metric that the given models allow. Raises ScorerError for unusable images, models or packages."""
    made = find_images(folder)
    real = None if reference is None else find_images(reference)
    metrics: dict[str, object] = {"images": len(made)}
    if clip is not None:
        model, prompts = Clip(clip, device), [prompt_of(path) for path in made]
        embedded = model.images(map(read_pixels, made))
        metrics["clip"] = model.name
        metrics["clip_score"], metrics["clip_score_interval"] = clip_score(model.scores_of(embedded, prompts), prompts)
        if real is not None:
            metrics["cmmd"] = cmmd(embedded, model.images(map(read_pixels, real)))
    if inception is not None and real is not None:
        metrics["fid"] = fid(made, real, inception, device)
    return metrics


def clip_score(scores: NDArray[np.float64], prompts: Sequence[str], seed: int = 0) -> tuple[float, Interval]:
    """Average the CLIP scores (N,) of images per prompt, and then over prompts; also return the mean's interval."""
    _, group = np.unique(prompts, return_inverse=True)
    means = np.bincount(group, scores) / np.bincount(group)
    return float(means.mean()), interval([means], seed)


def fid(made: Sequence[Path], real: Sequence[Path], inception: Path, device: torch.device) -> float:
    """Compute FID with torch-fidelity. Raises ScorerError if it cannot be imported, or for other weights."""
    weights = _inception_weights(inception)
    try:
        from torch_fidelity import calculate_metrics
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        raise ScorerError(
            f"FID needs torch-fidelity, which cannot be imported ({error}); run pip install "
            "'flow-generator-matching[evaluation]', with torchvision from where torch is from"
        ) from error
    sets = _Files(made), _Files(real)
    with TemporaryDirectory() as folder:
        # torch-fidelity unpickles its weights file, so it gets a file that is written here.
        pickled = Path(folder) / "inception.pth"
        torch.save(weights, pickled)
        scores = calculate_metrics(
            input1=sets[0],
            input2=sets[1],
            fid=True,
            feature_extractor_weights_path=str(pickled),
            batch_size=64 if len(sets[0].sizes | sets[1].sizes) == 1 else 1,
            cuda=device.type == "cuda",
            save_cpu_ram=device.type == "cpu",  # no reader processes, because the network uses all cores
            cache=False,
            verbose=False,
        )
    return float(scores["frechet_inception_distance"])


def _inception_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScorerError(
            f"{path} is not a safetensors file ({error}); docs/evaluation.md says how to convert the weights"
        ) from error
    head = weights.get("fc.weight")
    if head is None or head.shape != (1008, 2048):  # other Inception weights have 1000 classes
        raise ScorerError(
            f"{path} does not hold the Inception network that defines FID, whose fc.weight is 1008 x 2048; "
            "docs/evaluation.md says which file to convert"
        )
    return weights


class _Files(Dataset[torch.Tensor]):
    """Image files as uint8 (3, H, W) for torch-fidelity; `sizes` is the set of image sizes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.sizes = set(map(size_of, paths))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read_pixels(self._paths[index])).permute(2, 0, 1)
