"""Built-in sources of prompts and captioned images, by the name that a configuration gives.

A world registers its sources when it is imported. `prompts.py` and `images.py` read all other sources from files.
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
