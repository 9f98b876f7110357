"""Whether an image may be shown: a stage that is off unless a checker is named."""

import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import StartError

# NudeNet's classes that count, and its scores from which they do
_SHOWN = frozenset(
    f"{part}_EXPOSED" for part in ("FEMALE_GENITALIA", "MALE_GENITALIA", "FEMALE_BREAST", "BUTTOCKS", "ANUS")
)
_SCORE = {"auto": 0.4, "low": 0.7}


class Checker(Protocol):
    """Judges one image. Called by several threads at a time, never beside the device."""

    def __call__(self, pixels: NDArray[np.uint8], moderation: str) -> str | None:
        """What is wrong with an image (H, W, 3), in a few words for the client; None if nothing is.

        `moderation` is the request's: `auto`, or `low` for the more lenient judgment.
        """


class NudeNet:
    """Refuses nudity, by the detector that the `nudenet` package brings along."""

    def __init__(self) -> None:
        from nudenet import NudeDetector

        self._detector = NudeDetector()

    def __call__(self, pixels: NDArray[np.uint8], moderation: str) -> str | None:
        """Nudity that the detector is sure enough of."""
        found: list[dict[str, Any]] = self._detector.detect(np.ascontiguousarray(pixels[..., ::-1]))  # it takes BGR
        sure = any(each["class"] in _SHOWN and each["score"] >= _SCORE[moderation] for each in found)
        return "nudity" if sure else None


def load_checker(name: str | None) -> Checker | None:
    """The checker of a setting: none, `nudenet`, or `package.module:Class` of one's own, made without arguments.

    Raises StartError for one that cannot be had.
    """
    if name is None:
        return None
    module, _, attribute = ("service.images.safety:NudeNet" if name == "nudenet" else name).partition(":")
    try:
        made: Checker = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        mend = "pip install '.[safety]'" if name == "nudenet" else "install its package beside the server"
        raise StartError(f"safety {name!r} cannot be loaded ({error}); {mend}") from None
    except (AttributeError, ValueError, TypeError) as error:
        raise StartError(f"safety {name!r} is neither 'nudenet' nor 'package.module:Class' ({error})") from None
    return made
