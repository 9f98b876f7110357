"""The evaluator of a run's students, from the group `evaluation` of its configuration."""

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from distill.config import RunConfig
from distill.data.prompts import DistinctPrompts, read_prompts
from distill.errors import ConfigError
from distill.evaluate.clip_evaluator import ClipEvaluator
from distill.evaluate.dataset_evaluator import DatasetEvaluator
from distill.evaluate.datasets import EVAL_DATASETS, find_eval_dataset
from distill.evaluate.evaluator import Evaluator
from distill.evaluate.reference_evaluator import ReferenceEvaluator
from distill.evaluate.references import References, image_count
from distill.evaluate.sampler import Sampling
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.training.preflight import check_evaluation_prompts, check_evaluator_name

_log = logging.getLogger(__name__)

# Images from which on the kernel distance separates good students from bad ones. Measured on the toy dataset with five
# students, the worst of which has twice the distance of the others: it is chosen in 5 % of the samples of 256 images,
# and in 22 % of those of 128, which is chance. The Frechet distance chooses it in 12 % and 46 %, because few images
# bias it.
ENOUGH = 256
REFERENCES = "references"  # folder of a run for the teacher's images
PROMPTS_PER_TASK = 16  # of a dataset with a scorer


def evaluator_kind(config: RunConfig, teacher: SD3Folder) -> str:
    """Resolve `evaluation.evaluator` to `none`, `clip`, `reference` or the name of a dataset.

    `auto` is the dataset of the teacher's or the prompts' name, if it scores images of this size, else `reference`.
    Raises ConfigError for an unknown name, and for settings that the evaluator does not take.
    """
    kind, size = config.evaluation.evaluator, evaluated_size(config, teacher)
    if kind == "auto":
        names = (config.teacher, config.prompts.source)
        kind = next((name for name in names if find_eval_dataset([name], size)), "reference")
    if kind in ("none", "clip", "reference"):
        return kind
    check_evaluator_name(kind)
    if find_eval_dataset([kind], size) is None:
        raise ConfigError(
            f"evaluation.evaluator: {kind} does not score images of {size[0]}x{size[1]} pixels; take reference"
        )
    for key in ("clip", "metric", "prompts"):
        if getattr(config.evaluation, key) is not None:
            raise ConfigError(f"evaluation.{key}: the evaluator {kind} takes none; set evaluation.evaluator=reference")
    return kind


def check_evaluator(config: RunConfig, teacher: SD3Folder) -> None:
    """Check what an evaluator needs before anything is computed; nothing is written. Warn of too few images.

    Raises what `evaluator_kind` and `check_evaluation_prompts` raise, ScorerError for a CLIP model, and ConfigError for
    `early_stopping_patience` without evaluations and for `references` that is a file.
    """
    if evaluator_kind(config, teacher) == "none" and config.early_stopping_patience is not None:
        raise ConfigError("early_stopping_patience counts evaluations; set evaluation.evaluator, or set it to null")
    check_evaluation_prompts(config.evaluation.prompts)
    images = config.evaluation.images
    if evaluator_kind(config, teacher) == "reference" and config.evaluation.metric != "clip_score" and images < ENOUGH:
        _log.warning(
            "evaluation.images is %d: with less than %d, chance decides which checkpoint is the best", images, ENOUGH
        )
    references = config.evaluation.references
    if references is not None and Path(references).exists() and not Path(references).is_dir():
        raise ConfigError(f"evaluation.references: {references} is no folder; give one, or leave the key out")
    if config.evaluation.clip is not None:
        from distill.evaluate.clip import Clip

        Clip(config.evaluation.clip, torch.device("cpu"))


def evaluation_prompts(config: RunConfig, own: Sequence[str]) -> list[str]:
    """The first distinct prompts of the file `evaluation.prompts`, or of the run's `own`; at most `images`."""
    source = config.evaluation.prompts
    return list(islice(DistinctPrompts(own if source is None else read_prompts(source)), config.evaluation.images))


def references_folder(config: RunConfig, out: Path) -> Path:
    """The folder of the teacher's images, which has a folder for each digest."""
    return out / REFERENCES if config.evaluation.references is None else Path(config.evaluation.references)


def run_references(config: RunConfig, teacher: SD3Folder, out: Path, prompts: Sequence[str]) -> References | None:
    """The teacher's images that the run's evaluator compares with; None if it needs none. They may be missing yet."""
    if evaluator_kind(config, teacher) != "reference":
        return None
    texts = evaluation_prompts(config, prompts)
    folder, size = references_folder(config, out), evaluated_size(config, teacher)
    return References(folder, teacher, teacher_sampling(config), size, texts, config.evaluation.images)


def teacher_sampling(config: RunConfig) -> Sampling:
    """How evaluations sample the teacher: in `evaluation.teacher_steps`, with the guidance of the method."""
    guided = config.method.guidance.model_dump(include=TeacherGuidance.model_fields.keys())
    return Sampling(config.evaluation.teacher_steps, TeacherGuidance(**guided))


def run_evaluator(
    config: RunConfig, teacher: SD3Folder, out: Path, prompts: Sequence[str], device: torch.device
) -> Evaluator | None:
    """The evaluator of the run's students on a device; None for `none`. `prompts` are the run's own, the first ones."""
    kind, settings = evaluator_kind(config, teacher), config.evaluation
    if kind == "none":
        return None
    clip = None
    if settings.clip is not None:
        from distill.evaluate.clip import Clip  # its image processors are slow to import

        clip = Clip(settings.clip, device)
    if references := run_references(config, teacher, out, prompts):
        return ReferenceEvaluator(references, clip, settings.metric or "kernel")
    if clip is not None:
        return ClipEvaluator(clip, evaluation_prompts(config, prompts), settings.images)
    prompts_of_tasks = EVAL_DATASETS[kind]().prompts(PROMPTS_PER_TASK, config.seed, held_out=False)
    return DatasetEvaluator(prompts_of_tasks, config.seed)


def evaluated_images(config: RunConfig, kind: str) -> int:
    """The number of images that a student makes for an evaluation by an evaluator, which is not `none`."""
    if kind in EVAL_DATASETS:
        return EVAL_DATASETS[kind]().prompts(PROMPTS_PER_TASK, config.seed, held_out=False).count
    return image_count(config.evaluation.images) if kind == "reference" else config.evaluation.images


def evaluated_size(config: RunConfig, teacher: SD3Folder) -> tuple[int, int]:
    """(width, height) of the images that are evaluated."""
    return config.sizes[0] if config.sizes else (teacher.image_size, teacher.image_size)
