"""Toy datasets that ship with the project. Importing this package registers them.

The rest of `distill` works without this package. Importing it imports neither torch nor NumPy.
"""

from pathlib import Path

from distill.data.sources import EVALUATORS, IMAGE_SOURCES, PROMPT_SOURCES
from distill.models.teacher import TEACHERS
from distill.worlds.scenes.sources import scene_evaluator, scene_images, scene_prompts

PROMPT_SOURCES["scenes"] = scene_prompts
IMAGE_SOURCES["scenes"] = scene_images
EVALUATORS["scenes"] = scene_evaluator
TEACHERS["scenes"] = Path(__file__).parent / "scenes" / "weights" / "teacher"
