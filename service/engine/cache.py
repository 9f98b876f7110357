"""A cache that is bounded in bytes and forgets what was used longest ago."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Least recently used goes first; what is larger than the whole cache is not kept. Of one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: K) -> V | None:
        """What is kept under a key."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def drop(self, unwanted: Callable[[K], bool]) -> None:
        """Forget everything under such keys."""
        for key in [key for key in self._entries if unwanted(key)]:
            self.held_bytes -= self._entries.pop(key)[1]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value of so many bytes."""
        if size > self._max_bytes:
            return
        if key in self._entries:
            self.held_bytes -= self._entries.pop(key)[1]
        self._entries[key] = value, size
        self.held_bytes += size
        while self.held_bytes > self._max_bytes:
            self.held_bytes -= self._entries.popitem(last=False)[1][1]
