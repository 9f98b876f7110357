"""The training speed of a run, which its folder keeps, and the images that it makes in a time. No torch.

Learning rates decay by images, so a run needs a budget in images: one in seconds is converted by the measured speed.
"""

import json
import math
from pathlib import Path

from distill.errors import RunError
from distill.files import atomic_write_text

SPEED = "speed.json"


def read_speed(out: Path) -> float | None:
    """Read the images/s that were measured before; None if none were. Raises RunError for a file with no speed."""
    path = out / SPEED
    try:
        speed = float(json.loads(path.read_text())["images_per_second"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        speed = 0
    if not 0 < speed < math.inf:
        raise RunError(f"{path} holds no speed; remove it, and the run is measured again")
    return speed


def write_speed(out: Path, speed: float) -> None:
    """Keep the measured images/s for resumed runs."""
    atomic_write_text(out / SPEED, json.dumps({"images_per_second": speed}) + "\n")


def images_within(seconds: float, speed: float, batch: int) -> int:
    """Return the images, in whole batches and at least one, that are trained on in `seconds` at images/s."""
    return max(1, int(speed * seconds / batch)) * batch
