"""Toy datasets that ship with the project. Importing this package registers them.

The rest of `distill` works without this package. Importing it imports neither torch nor NumPy.
"""

from pathlib import Path

from distill.data.sources import IMAGE_SOURCES, PROMPT_SOURCES
from distill.evaluate.datasets import EVAL_DATASETS
from distill.models.teacher import TEACHERS, TRAINED_BY
from distill.worlds.scenes.sources import hard_scene_prompts, scene_eval_dataset, scene_images, scene_prompts

PROMPT_SOURCES["scenes"] = scene_prompts
PROMPT_SOURCES["scenes-hard"] = hard_scene_prompts
IMAGE_SOURCES["scenes"] = scene_images
EVAL_DATASETS["scenes"] = scene_eval_dataset
TEACHERS["scenes"] = Path(__file__).parent / "scenes" / "weights" / "teacher"
TRAINED_BY["runs/teacher"] = "distill teacher"
TRAINED_BY["runs/cifar10-teacher"] = "distill cifar10 teacher DATA"
