"""The optional safety check of generated images."""

import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import StartError

# NudeNet's classes of nudity, and the scores from which an image is blocked
_NUDITY_CLASSES = frozenset(
    f"{part}_EXPOSED" for part in ("FEMALE_GENITALIA", "MALE_GENITALIA", "FEMALE_BREAST", "BUTTOCKS", "ANUS")
)
_MIN_SCORES = {"auto": 0.4, "low": 0.7}


class SafetyChecker(Protocol):
    """Checks one image. Called by several threads of the server at a time."""

    def __call__(self, pixels: NDArray[np.uint8], moderation: str) -> str | None:
        """Return why an image (H, W, 3) is blocked, in a few words for the client; None if it is not.

        `moderation` is that of the request: `auto`, or `low` for a more lenient check.
        """


class NudeNet:
    """Blocks nudity with the detector of the `nudenet` package."""

    def __init__(self) -> None:
        from nudenet import NudeDetector

        self._detector = NudeDetector()

    def __call__(self, pixels: NDArray[np.uint8], moderation: str) -> str | None:
        """Return "nudity" if the detector's score is high enough."""
        found: list[dict[str, Any]] = self._detector.detect(np.ascontiguousarray(pixels[..., ::-1]))  # it takes BGR
        sure = any(each["class"] in _NUDITY_CLASSES and each["score"] >= _MIN_SCORES[moderation] for each in found)
        return "nudity" if sure else None


def load_checker(name: str | None) -> SafetyChecker | None:
    """Return the check of a setting: none, `nudenet`, or `package.module:Class`, a class without arguments.

    Raises StartError for one that cannot be loaded.
    """
    if name is None:
        return None
    module, _, attribute = ("service.images.safety:NudeNet" if name == "nudenet" else name).partition(":")
    try:
        made: SafetyChecker = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        fix = "pip install '.[safety]'" if name == "nudenet" else "install its package beside the server"
        raise StartError(f"safety {name!r} cannot be loaded ({error}); {fix}") from None
    except (AttributeError, ValueError, TypeError) as error:
        raise StartError(f"safety {name!r} is neither 'nudenet' nor 'package.module:Class' ({error})") from None
    return made
