"""Students and LoRA adapters that are loaded because a request asks for them, and make room for others."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from service.engine.engine import Engine
from service.engine.loaded_models import ADAPTER, STUDENT, find, folders_of
from service.errors import ServiceError, no_model


class Wish(NamedTuple):
    """What a request asks for: a student, and an adapter for it or none."""

    student: str
    adapter: str | None


class Guest:
    """What was loaded for one wish, in one replica for as long as Ray keeps it there."""

    def __init__(self, unload: Callable[[], Awaitable[None]]) -> None:
        self._unload = unload
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
        leaving = asyncio.create_task(self._end())
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:  # who wanted its room hung up, and Ray has forgotten it already
            await asyncio.wait([leaving])
            raise

    async def _end(self) -> None:
        await self._unused.wait()
        await self._unload()


class Guests:
    """The guests of one replica. A student stays while any of them needs it; what is there already is left alone."""

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        """`folder` has the folders of students and adapters, one beside another."""
        self._engine = engine
        self._folder = folder
        self._brought: Counter[str] = Counter()  # guests that need a student which was loaded for one of them

    async def wish(self, text: str) -> Wish | None:
        """What STUDENT or STUDENT+ADAPTER has to be loaded for; None for what is always there, or nowhere."""
        folders, adapters = await asyncio.to_thread(self._folders)
        residents = {name for name in self._engine.models if name not in self._brought}
        students = residents | folders
        if text in students:
            return None if text in residents else Wish(text, None)
        student, _, adapter = text.rpartition("+")
        return Wish(student, adapter) if student in students and adapter in adapters else None

    async def load(self, text: str) -> Guest:
        """Load what is not there yet. To be called for one text at a time, and not while a guest leaves.

        Raises NotFound for what is no wish any more, InvalidRequest for what cannot be loaded; nothing of it stays.
        """
        wish = await self.wish(text)
        if wish is None:
            raise no_model(text)
        student, adapter = wish
        async with contextlib.AsyncExitStack() as loaded:
            if student in self._brought or student not in self._engine.models:
                if student not in self._engine.models:
                    folder = await asyncio.to_thread(find, self._folder, student, STUDENT)
                    await self._engine.load(folder, student)
                self._brought[student] += 1
                loaded.push_async_callback(self._dismiss, student)
            if adapter is not None and adapter not in self._engine.info(student).adapters:
                folder = await asyncio.to_thread(find, self._folder, adapter, ADAPTER)
                await self._engine.load_adapter(student, folder, adapter)
                loaded.push_async_callback(self._drop, student, adapter)
            unload = loaded.pop_all().aclose
        return Guest(unload)

    def _folders(self) -> tuple[set[str], set[str]]:
        return {*folders_of(self._folder, STUDENT)}, {*folders_of(self._folder, ADAPTER)}

    async def _drop(self, student: str, adapter: str) -> None:
        with contextlib.suppress(ServiceError):  # an administrator was first
            await self._engine.unload_adapter(student, adapter)

    async def _dismiss(self, student: str) -> None:
        if self._brought[student] > 1:
            self._brought[student] -= 1
            return
        with contextlib.suppress(ServiceError):  # an administrator was first, or left no other model
            await self._engine.unload(student)
        del self._brought[student]  # not before: who asks meanwhile waits, and has it loaded again
