"""What administrators loaded while the server ran, so that it comes back when the server starts again.

A JSON file in the data folder, with names of folders of the `students` setting and never paths.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock

from service.engine.engine import Engine
from service.errors import InvalidRequest, ServiceError, StartError, quoted
from service.files import atomic_write

log = logging.getLogger(__name__)

FIRST_PAUSE = 5.0  # seconds before the first new attempt to load; doubled each time
LONGEST_PAUSE = 600.0
STUDENT, ADAPTER = "onestep.json", "pytorch_lora_weights.safetensors"  # by which their folders are known


class StoredStudent(msgspec.Struct, frozen=True):
    """A student of a folder, under the name that it is served by."""

    folder: str
    name: str


class StoredAdapter(msgspec.Struct, frozen=True):
    """An adapter of a folder, for a model."""

    model: str
    folder: str
    name: str


class StoredModels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's contents, in the order of loading."""

    students: tuple[StoredStudent, ...] = ()
    adapters: tuple[StoredAdapter, ...] = ()


class LoadedModelStore:
    """The file. Its methods block, except `restore` and `retry`; servers that share a data folder share it."""

    def __init__(self, data: Path | None) -> None:
        """In a data folder; None keeps nothing. Raises StartError for a file that is none of ours."""
        self._path = data / "models.json" if data else None
        self._failed: Sequence[StoredStudent | StoredAdapter] = ()
        self.read()

    def read(self) -> StoredModels:
        """What was loaded and not unloaded."""
        if self._path is None or not self._path.exists():
            return StoredModels()
        try:
            return msgspec.json.decode(self._path.read_text(encoding="utf-8-sig"), type=StoredModels)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise StartError(f"{self._path} is no list of loaded models ({error}); mend or delete it") from None

    def add(self, new: StoredStudent | StoredAdapter) -> None:
        """Keep what was loaded, in the place of what had its name and could not be."""

        def change(now: StoredModels) -> StoredModels:
            match new:
                case StoredStudent():
                    return StoredModels((*(each for each in now.students if each.name != new.name), new), now.adapters)
                case StoredAdapter():
                    others = (each for each in now.adapters if (each.model, each.name) != (new.model, new.name))
                    return StoredModels(now.students, (*others, new))

        self._change(change)

    def remove(self, model: str, adapter: str | None = None) -> None:
        """Forget a model and its adapters, or one adapter of it."""

        def change(now: StoredModels) -> StoredModels:
            students = tuple(each for each in now.students if adapter or each.name != model)
            adapters = tuple(each for each in now.adapters if each.model != model or adapter not in (None, each.name))
            return StoredModels(students, adapters)

        self._change(change)

    async def restore(self, engine: Engine, students: Path | None) -> None:
        """Load all of it. Failures are logged and left to `retry`."""
        loaded = self.read()
        everything: list[StoredStudent | StoredAdapter] = [*loaded.students, *loaded.adapters]
        self._failed = [each for each in everything if not await self._load(engine, students, each)]

    async def retry(self, engine: Engine, students: Path | None, pause: float = FIRST_PAUSE) -> None:
        """Retry what could not be restored, after increasing pauses, unless it was loaded or unloaded meanwhile."""
        while self._failed:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                loaded = await asyncio.to_thread(self.read)
            except StartError as error:
                log.error("%s", error)
                continue
            wanted = [each for each in self._failed if each in (*loaded.students, *loaded.adapters)]
            missing = [each for each in wanted if not _is_loaded(engine, each)]
            self._failed = [each for each in missing if not await self._load(engine, students, each)]

    async def _load(self, engine: Engine, students: Path | None, wanted: StoredStudent | StoredAdapter) -> bool:
        """Load a student or an adapter; returns whether this succeeded."""
        try:
            match wanted:
                case StoredStudent():
                    folder = await asyncio.to_thread(find, students, wanted.folder, STUDENT)
                    await engine.load(folder, wanted.name)
                case StoredAdapter():
                    folder = await asyncio.to_thread(find, students, wanted.folder, ADAPTER)
                    await engine.load_adapter(wanted.model, folder, wanted.name)
        except (ServiceError, OSError) as error:
            log.error("%s of %s was loaded before and cannot be now: %s", wanted.name, self._path, error)
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


def _is_loaded(engine: Engine, wanted: StoredStudent | StoredAdapter) -> bool:
    model = engine.models.get(wanted.name if isinstance(wanted, StoredStudent) else wanted.model)
    return model is not None and (isinstance(wanted, StoredStudent) or wanted.name in model.adapters)


def find(students: Path | None, name: str, file: str) -> Path:
    """The folder of that name that holds a file. Raises InvalidRequest where there is none."""
    folders = folders_of(students, file)
    if name not in folders:
        raise InvalidRequest(f"there is no folder {quoted(name)} with {file}; there are {sorted(folders)}", "folder")
    return folders[name]


def folders_of(students: Path | None, file: str) -> dict[str, Path]:
    """The folders of the `students` setting that hold a file, by name."""
    if students is None or not students.is_dir():
        return {}
    return {folder.name: folder for folder in students.iterdir() if (folder / file).is_file()}
