"""`StoredModels`: the models that administrators loaded, so that a restarted server loads them again.

A JSON file in the data folder, with names of folders of the `models_folder` setting and never paths.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock

from service.backoff import backoff
from service.engine.catalog import ModelCatalog, adapters_in, find, students_in
from service.errors import ServiceError, StartError
from service.files import atomic_write

log = logging.getLogger(__name__)

FIRST_PAUSE = 5.0  # seconds before the first new attempt to load; doubled each time
LONGEST_PAUSE = 600.0


class StoredModel(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A folder, and the model that it is served as, or the adapter of that model."""

    folder: str
    model: str
    adapter: str | None = None


class StoredModels:
    """The file. Its methods block, except `restore` and `retry`. Servers with the same data folder share it."""

    def __init__(self, data: Path | None) -> None:
        """`data` None stores nothing. Raises StartError for a file that cannot be read."""
        self._path = data / "models.json" if data else None
        self._failed: Sequence[StoredModel] = ()
        self.read()

    def read(self) -> list[StoredModel]:
        """Return what was loaded and not unloaded, models before adapters."""
        if self._path is None or not self._path.exists():
            return []
        try:
            return msgspec.json.decode(self._path.read_text(encoding="utf-8-sig"), type=list[StoredModel])
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise StartError(f"{self._path} is not a list of loaded models ({error}); repair or delete it") from None

    def add(self, new: StoredModel) -> None:
        """Store what was loaded, and replace an entry of the same name."""
        self._change(lambda each: (each.model, each.adapter) == (new.model, new.adapter), new)

    def remove(self, model: str, adapter: str | None = None) -> None:
        """Remove a model and its adapters, or one adapter of it."""
        self._change(lambda each: each.model == model and adapter in (None, each.adapter))

    async def restore(self, catalog: ModelCatalog, models_folder: Path | None) -> None:
        """Load everything stored. Failures are logged and left to `retry`."""
        self._failed = [each for each in self.read() if not await self._load(catalog, models_folder, each)]

    async def retry(self, catalog: ModelCatalog, models_folder: Path | None, first_pause: float = FIRST_PAUSE) -> None:
        """Retry what could not be restored, after increasing pauses, unless it was loaded or unloaded meanwhile."""
        pauses = backoff(first_pause, LONGEST_PAUSE)
        while self._failed:
            await asyncio.sleep(next(pauses))
            try:
                stored = await asyncio.to_thread(self.read)
            except StartError as error:
                log.error("%s", error)
                continue
            missing = [each for each in self._failed if each in stored and not _is_loaded(catalog, each)]
            self._failed = [each for each in missing if not await self._load(catalog, models_folder, each)]

    async def _load(self, catalog: ModelCatalog, models_folder: Path | None, stored: StoredModel) -> bool:
        """Load a student or an adapter. Returns whether this succeeded."""
        kind, list_models = ("adapter", adapters_in) if stored.adapter else ("student", students_in)
        try:
            path = find(kind, await asyncio.to_thread(list_models, models_folder), stored.folder)
            if stored.adapter:
                await catalog.load_adapter(stored.model, path, stored.adapter)
            else:
                await catalog.load(path, stored.model)
        except (ServiceError, OSError) as error:
            name = stored.adapter or stored.model
            log.error("%s of %s was loaded before and cannot be loaded now: %s", name, self._path, error)
            return False
        return True

    def _change(self, removed: Callable[[StoredModel], bool], *new: StoredModel) -> None:
        if self._path is None:
            return
        with FileLock(f"{self._path}.lock"):
            now = self.read()
            kept = [each for each in now if not removed(each)]
            changed = sorted([*kept, *new], key=lambda each: each.adapter is not None)
            if changed != now:
                with atomic_write(self._path) as file:
                    file.write(msgspec.json.format(msgspec.json.encode(changed), indent=1))


def _is_loaded(catalog: ModelCatalog, stored: StoredModel) -> bool:
    model = catalog.models.get(stored.model)
    return model is not None and stored.adapter in (None, *model.adapters)
