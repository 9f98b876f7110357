"""Toy datasets that ship with the project; their import adds them to the sources of `distill.data`.

The rest of `distill` works without this package. Importing it imports neither torch nor numpy.
"""

from distill.data.sources import IMAGE_SOURCES, PROMPT_SOURCES
from distill.worlds.scenes.sources import scene_images, scene_prompts

PROMPT_SOURCES["scenes"] = scene_prompts
IMAGE_SOURCES["scenes"] = scene_images
