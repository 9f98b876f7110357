"""Built-in sources of prompts and of captioned images, by the name that a configuration gives.

A world adds its sources when it is imported. Everything else is read from files, by `prompts.py` and `images.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """An image with its caption, or the `fault` that makes it unusable.

    `read` returns its `size` bytes, and `edges` the first and last of them. `unused` names the files of its shard that
    belong to no image.
    """

    name: str
    caption: str
    size: int
    read: Callable[[], bytes]
    edges: Callable[[], bytes]
    fault: str = ""
    unused: tuple[str, ...] = ()


# Functions of (count, seed); a count of None is the source's own default.
PROMPT_SOURCES: dict[str, Callable[[int | None, int], Iterable[str]]] = {}
IMAGE_SOURCES: dict[str, Callable[[int | None, int], Iterable[Example]]] = {}
