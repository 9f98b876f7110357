"""`LoadedModelStore`: the models that administrators loaded, so that a restarted server loads them again.

A JSON file in the data folder, with names of folders of the `models_folder` setting and never paths.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock

from service.engine.catalog import ModelCatalog, adapters_in, find, students_in
from service.errors import ServiceError, StartError
from service.files import atomic_write

log = logging.getLogger(__name__)

FIRST_PAUSE = 5.0  # seconds before the first new attempt to load; doubled each time
LONGEST_PAUSE = 600.0


class StoredStudent(msgspec.Struct, frozen=True):
    """A student of a folder and the name it is served by."""

    folder: str
    name: str


class StoredAdapter(msgspec.Struct, frozen=True):
    """An adapter of a folder and its model."""

    model: str
    folder: str
    name: str


class StoredModels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of the file, in the order of loading."""

    students: tuple[StoredStudent, ...] = ()
    adapters: tuple[StoredAdapter, ...] = ()


class LoadedModelStore:
    """The file. Its methods block, except `restore` and `retry`. Servers with the same data folder share it."""

    def __init__(self, data: Path | None) -> None:
        """`data` None stores nothing. Raises StartError for a file that cannot be read."""
        self._path = data / "models.json" if data else None
        self._failed: Sequence[StoredStudent | StoredAdapter] = ()
        self.read()

    def read(self) -> StoredModels:
        """Return what was loaded and not unloaded."""
        if self._path is None or not self._path.exists():
            return StoredModels()
        try:
            return msgspec.json.decode(self._path.read_text(encoding="utf-8-sig"), type=StoredModels)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise StartError(f"{self._path} is no list of loaded models ({error}); repair or delete it") from None

    def add(self, new: StoredStudent | StoredAdapter) -> None:
        """Store what was loaded, and replace an entry of the same name."""

        def change(now: StoredModels) -> StoredModels:
            match new:
                case StoredStudent():
                    return StoredModels((*(each for each in now.students if each.name != new.name), new), now.adapters)
                case StoredAdapter():
                    others = (each for each in now.adapters if (each.model, each.name) != (new.model, new.name))
                    return StoredModels(now.students, (*others, new))

        self._change(change)

    def remove(self, model: str, adapter: str | None = None) -> None:
        """Remove a model and its adapters, or one adapter of it."""

        def change(now: StoredModels) -> StoredModels:
            students = tuple(each for each in now.students if adapter or each.name != model)
            adapters = tuple(each for each in now.adapters if each.model != model or adapter not in (None, each.name))
            return StoredModels(students, adapters)

        self._change(change)

    async def restore(self, catalog: ModelCatalog, students: Path | None) -> None:
        """Load everything stored. Failures are logged and left to `retry`."""
        stored = self.read()
        everything: list[StoredStudent | StoredAdapter] = [*stored.students, *stored.adapters]
        self._failed = [each for each in everything if not await self._load(catalog, students, each)]

    async def retry(self, catalog: ModelCatalog, students: Path | None, pause: float = FIRST_PAUSE) -> None:
        """Retry what could not be restored, after increasing pauses, unless it was loaded or unloaded meanwhile."""
        while self._failed:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                stored = await asyncio.to_thread(self.read)
            except StartError as error:
                log.error("%s", error)
                continue
            current = [each for each in self._failed if each in (*stored.students, *stored.adapters)]
            missing = [each for each in current if not _is_loaded(catalog, each)]
            self._failed = [each for each in missing if not await self._load(catalog, students, each)]

    async def _load(self, catalog: ModelCatalog, students: Path | None, stored: StoredStudent | StoredAdapter) -> bool:
        """Load a student or an adapter. Returns whether this succeeded."""
        try:
            match stored:
                case StoredStudent():
                    folder = find("student", await asyncio.to_thread(students_in, students), stored.folder)
                    await catalog.load(folder, stored.name)
                case StoredAdapter():
                    path = find("adapter", await asyncio.to_thread(adapters_in, students), stored.folder)
                    await catalog.load_adapter(stored.model, path, stored.name)
        except (ServiceError, OSError) as error:
            log.error("%s of %s was loaded before and cannot be loaded now: %s", stored.name, self._path, error)
            return False
        return True

    def _change(self, change: Callable[[StoredModels], StoredModels]) -> None:
        if self._path is None:
            return
        with FileLock(f"{self._path}.lock"):
            now = self.read()
            new = change(now)
            if new != now:
                with atomic_write(self._path) as file:
                    file.write(msgspec.json.format(msgspec.json.encode(new), indent=1))


def _is_loaded(catalog: ModelCatalog, stored: StoredStudent | StoredAdapter) -> bool:
    model = catalog.models.get(stored.name if isinstance(stored, StoredStudent) else stored.model)
    return model is not None and (isinstance(stored, StoredStudent) or stored.name in model.adapters)
