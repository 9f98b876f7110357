"""The model catalog: loads and unloads students and LoRA adapters while the engine serves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cachetools import TTLCache

from service.engine.backend import ModelInfo
from service.engine.dispatcher import Dispatcher
from service.engine.messages import LoadAdapter, LoadModel, ModelLoaded, Unload
from service.engine.supervisor import Supervisor
from service.errors import InvalidRequest, NotFound, ServiceError, no_adapter, no_model, quoted
from service.settings import Settings

BROKEN_SECONDS = 60  # in which a model or adapter that could not be loaded is not tried again, unless it changes
_Name = tuple[str, str | None]  # a model, or a model and its adapter


@dataclass(eq=False)
class _OnDemand:
    """A student or adapter that a request had loaded. It may be unloaded to make room for another one."""

    users: int = 0  # requests in progress
    leaving: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class ModelCatalog:
    """The models that take requests, the default one first. One model or adapter is loaded or unloaded at a time."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher, supervisor: Supervisor) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._supervisor = supervisor
        self._models: dict[str, ModelInfo] = {}
        self._leaving: _Name | None = None  # finishes its requests and takes no new ones
        self._changing = asyncio.Lock()
        self._on_demand: dict[_Name, _OnDemand] = {}  # least recently used first
        self._making_room = asyncio.Lock()
        self._broken: TTLCache[tuple[Path, int], str] = TTLCache(1000, BROKEN_SECONDS)  # reasons by path and change

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        models = dict(self._models)
        match self._leaving:
            case model, None:
                del models[model]
            case model, str(adapter):
                models[model] = models[model].without(adapter)
        return models

    @property
    def on_demand(self) -> set[str]:
        """What requests had loaded, as MODEL or MODEL+ADAPTER."""
        return {"+".join(filter(None, name)) for name in self._on_demand}

    def get(self, name: str | None = None) -> ModelInfo:
        """Return the model of a name or alias, or the default one. Raises NotFound."""
        models = self.models
        if name is None:
            return next(iter(models.values()))
        info = models.get(self._settings.aliases.get(name, name))
        if info is None:
            raise no_model(name)
        return info

    def add(self, loaded: ModelLoaded) -> None:
        """Take requests for a model that every worker has."""
        self._models[loaded.info.name] = loaded.info
        self._dispatcher.add_model(loaded)

    async def load(self, folder: Path, name: str | None = None) -> ModelInfo:
        """Load a student into every worker while they serve. `name` None is the student's own.

        Raises InvalidRequest for a folder that cannot be loaded or a name that is taken, and then no worker keeps it;
        Unavailable when a worker dies meanwhile or none is ready.
        """
        async with self._changing:
            path = str(folder.absolute())
            if name and self._keep((name, None), path):
                return self._models[name]
            self._check_free(name)
            loaded = await self._supervisor.load(LoadModel(path, name))
            try:
                self._check_free(loaded.info.name)
            except InvalidRequest:
                self._supervisor.unload(Unload(loaded.info.name))
                raise
            self.add(loaded)
            self._supervisor.models[loaded.info.name] = LoadModel(path, loaded.info.name)
            return loaded.info

    async def load_adapter(self, model: str, path: Path, name: str) -> ModelInfo:
        """Load a LoRA adapter of a model, a file or folder, into every worker, and return the model's new info.

        Raises what `load` raises.
        """
        async with self._changing:
            command = LoadAdapter(model, name, str(path.absolute()))
            if name in self._named(model).adapters:
                if self._keep((model, name), command.path):
                    return self._models[model]
                raise InvalidRequest(f"{model} has an adapter {name!r} already; unload it first", "name")
            self._models[model] = (await self._supervisor.load(command)).info
            self._set_adapters(model, {**self._supervisor.models[model].adapters, name: command.path})
            return self._models[model]

    async def unload(self, model: str, adapter: str | None = None) -> None:
        """Take no more requests for a model or adapter, answer the accepted ones, then free it and drop its results.

        Raises NotFound when it is not loaded, InvalidRequest when the model is the only one.
        """
        async with self._changing:
            info = self._named(model)
            if adapter is None and len(self._models) == 1:
                raise InvalidRequest("this is the only model; load another one first", "model", "last_model")
            if adapter is not None and adapter not in info.adapters:
                raise NotFound(f"{model} has no adapter {quoted(adapter)}", "name", "adapter_not_found")
            await self._finish(model, adapter)
            if adapter is not None:
                self._models[model] = info.without(adapter)
                folders = self._supervisor.models[model].adapters
                self._set_adapters(model, {name: folder for name, folder in folders.items() if name != adapter})
                self._on_demand.pop((model, adapter), None)
                self._dispatcher.drop_results(info.cache_key, info.adapters[adapter])
            else:
                del self._models[model], self._supervisor.models[model]
                self._on_demand = {name: entry for name, entry in self._on_demand.items() if name[0] != model}
                self._dispatcher.remove_model(model)
                if all(other.cache_key != info.cache_key for other in self._models.values()):
                    self._dispatcher.drop_results(info.cache_key)
            self._supervisor.unload(Unload(model, adapter))

    @contextlib.asynccontextmanager
    async def use(self, name: str | None, adapter: str | None = None) -> AsyncIterator[ModelInfo]:
        """Provide a model, with an adapter if one is named, and keep both loaded for the duration of a request.

        What is not loaded and lies in the `models_folder` is loaded. If there are too many of its kind, the least
        recently used one is unloaded once its requests are answered. Raises NotFound for a model that does not exist,
        InvalidRequest for an adapter that does not exist or does not fit.
        """
        model = self.get().name if name is None else self._settings.aliases.get(name, name)
        names: list[_Name] = [(model, None), (model, adapter)] if adapter else [(model, None)]
        if not all(map(self._is_available, names)):
            for each in names:
                if not self._is_available(each):
                    await self._find_path(each)  # a name that does not exist waits for nobody's load
            async with self._making_room:
                for each in names:
                    if not self._is_available(each):
                        await self._load_on_demand(each)
        used = [(each, self._on_demand.pop(each)) for each in names if each in self._on_demand]
        for each, entry in used:
            self._on_demand[each] = entry  # now the most recently used
            entry.users += 1
            entry.unused.clear()
        try:
            yield self.get(model)
        finally:
            for _, entry in used:
                entry.users -= 1
                if not entry.users:
                    entry.unused.set()

    def _is_available(self, name: _Name) -> bool:
        model, adapter = name
        entry, info = self._on_demand.get(name), self.models.get(model)
        return info is not None and adapter in (None, *info.adapters) and not (entry and entry.leaving)

    async def _find_path(self, name: _Name) -> Path:
        """Return the folder of a student, or the folder or file of an adapter, in `models_folder`. Raises as `use`."""
        model, adapter = name
        list_models = adapters_in if adapter else students_in
        found = await asyncio.to_thread(list_models, self._settings.models_folder) if self._limit(name) else {}
        if (path := found.get(adapter or model)) is not None:
            return path
        if adapter is None:
            raise no_model(model)
        info = self.models.get(model)
        raise no_adapter(model, adapter, sorted({*(info.adapters if info else ()), *found}))

    def _limit(self, name: _Name) -> int:
        """Return how many students, or adapters, may be loaded on demand."""
        engine = self._settings.engine
        return engine.on_demand_adapters if name[1] else engine.on_demand_students

    async def _load_on_demand(self, name: _Name) -> None:
        """Load a student or adapter of the `models_folder`, and unload others of its kind that are too many."""
        model, adapter = name
        path = await self._find_path(name)
        version = path, await asyncio.to_thread(_changed_at, path)
        param = "lora.name" if adapter else "model"
        if version in self._broken:
            raise InvalidRequest(self._broken[version], param, "model_not_loadable")
        if not adapter:
            await self._make_room(name, self._limit(name) - 1)  # before, because a student needs its memory
        loading = asyncio.create_task(self.load_adapter(model, path, adapter) if adapter else self.load(path, model))
        cancelled = await _completed(loading)
        if error := loading.exception():
            if not isinstance(error, InvalidRequest):
                raise error
            self._broken[version] = error.message.replace(str(path.absolute()), path.name)
            raise InvalidRequest(self._broken[version], param, error.code) from None
        entry = self._on_demand[name] = _OnDemand()
        entry.unused.set()
        if adapter:
            await self._make_room(name, self._limit(name))  # after, so that a broken adapter displaces none
        if cancelled:
            raise asyncio.CancelledError

    async def _make_room(self, new: _Name, at_most: int) -> None:
        """Unload students, or adapters, until at most so many are loaded on demand, each once no request uses it."""
        while len(loaded := [each for each in self._on_demand if bool(each[1]) == bool(new[1])]) > at_most:
            name, entry = loaded[0], self._on_demand[loaded[0]]
            entry.leaving = True
            try:
                await entry.unused.wait()
                if self._on_demand.get(name) is entry:  # else an administrator loaded or unloaded it meanwhile
                    with contextlib.suppress(ServiceError):  # an administrator was faster, or left no other model
                        await self.unload(*name)
                    self._on_demand.pop(name, None)
            finally:
                entry.leaving = False

    def _keep(self, name: _Name, folder: str) -> bool:
        """Let what a request had loaded from a folder stay, because an administrator loads the same."""
        if name not in self._on_demand:
            return False
        model, adapter = name
        command = self._supervisor.models[model]
        if folder != (command.adapters[adapter] if adapter else command.folder):
            return False
        del self._on_demand[name]
        return True

    async def _finish(self, model: str, adapter: str | None) -> None:
        self._leaving = model, adapter
        try:
            await self._dispatcher.finish(model, adapter)
        finally:
            self._leaving = None

    def _named(self, name: str) -> ModelInfo:
        """Return the model of a name, not an alias. Raises NotFound."""
        info = self.models.get(name)
        if info is None:
            raise no_model(name)
        return info

    def _set_adapters(self, model: str, folders: Mapping[str, str]) -> None:
        models = self._supervisor.models
        models[model] = msgspec.structs.replace(models[model], adapters=folders)

    def _check_free(self, name: str | None) -> None:
        if name in self._models or name in self._settings.aliases:
            raise InvalidRequest(f"the name {name!r} is taken; unload that model, or take another name", "name")


async def _completed(task: "asyncio.Task[ModelInfo]") -> bool:
    """Wait until a task is done, also when cancelled meanwhile. Returns whether that happened.

    A worker finishes a load that it has begun. A client that changes its mind faster than that would have it begin
    anew each time.
    """
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


def students_in(models: Path | None) -> dict[str, Path]:
    """Return the students in the folder of the `models_folder` setting, by name."""
    return {path.name: path for path in _entries(models) if (path / "onestep.json").is_file()}


def adapters_in(models: Path | None) -> dict[str, Path]:
    """Return the LoRA adapters, files and folders, in the folder of the `models_folder` setting, by name."""
    return {path.stem if path.is_file() else path.name: path for path in _entries(models) if _is_adapter(path)}


def _changed_at(path: Path) -> int:
    """Return the time of the last change of a file, or of a folder and its files, in nanoseconds."""
    files = path.iterdir() if path.is_dir() else ()
    return max(path.stat().st_mtime_ns, *(file.stat().st_mtime_ns for file in files), 0)


def find(kind: str, found: Mapping[str, Path], name: str) -> Path:
    """Return the path of a name. Raises InvalidRequest where there is none; `kind` is student or adapter."""
    if name not in found:
        raise InvalidRequest(
            f"models_folder has no {kind} {quoted(name)}; it has {', '.join(sorted(found)) or 'none'}", "folder"
        )
    return found[name]


def _entries(models: Path | None) -> list[Path]:
    return sorted(models.iterdir()) if models is not None and models.is_dir() else []


def _is_adapter(path: Path) -> bool:
    """Whether a path is a safetensors file, or a folder with diffusers' file of an adapter or one file and no model."""
    if path.is_file():
        return path.suffix == ".safetensors"
    if (path / "pytorch_lora_weights.safetensors").is_file():
        return True
    a_model = any((path / name).exists() for name in ("config.json", "model_index.json"))
    return not a_model and len(list(path.glob("*.safetensors"))) == 1
