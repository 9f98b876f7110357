"""Students that are loaded because a request asks for them, and make room for others."""

import asyncio
import contextlib
from collections.abc import Iterator

from service.engine.engine import Engine


class Guest:
    """A student that a request asked for, in one replica for as long as Ray keeps it there."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        # Ray awaits it to make room. It is the instance's, since Python's collector would call the class's once more.
        self.__del__ = self._leave

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep it in the replica for a request."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def _leave(self) -> None:
        await self._unused.wait()
        await self._engine.unload(self._name)
