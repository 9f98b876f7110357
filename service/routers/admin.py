"""`/v1/admin/models` and `/v1/admin/adapters`: load and unload models at run time. For keys with the scope `admin`.

A client names a folder that the server has found in `models_folder`; no text of a client becomes a path. Models
that were loaded here are loaded again when the server restarts.
"""

import asyncio

from fastapi import APIRouter

from service.engine.backend import ModelInfo
from service.engine.catalog import adapters_in, find, students_in
from service.engine.stored_models import StoredModel
from service.http.dependencies import AdminOwner, EngineDep, SettingsDep, StoredModelsDep
from service.routers.models import model_object
from service.schemas import AdapterToLoad, Deleted, ErrorResponse, LoadedModel, LoadedModels, StudentToLoad
from service.settings import Settings

router = APIRouter(
    prefix="/v1/admin",
    tags=["administration"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.get("/models")
async def index(settings: SettingsDep, engine: EngineDep, owner: AdminOwner) -> LoadedModels:
    """All models, the default one first, and the folders that can be loaded."""
    students = await asyncio.to_thread(students_in, settings.models_folder)
    adapters = await asyncio.to_thread(adapters_in, settings.models_folder)
    data = [_loaded_model(settings, info) for info in engine.catalog.models.values()]
    return LoadedModels(data=data, folders=sorted(students), adapter_folders=sorted(adapters))


@router.post("/models")
async def load(
    body: StudentToLoad, settings: SettingsDep, engine: EngineDep, stored: StoredModelsDep, owner: AdminOwner
) -> LoadedModel:
    """Load a student. The response is sent when every worker has it and requests may name it."""
    folder = find("student", await asyncio.to_thread(students_in, settings.models_folder), body.folder)
    info = await engine.catalog.load(folder, body.name)
    await asyncio.to_thread(stored.add, StoredModel(body.folder, info.name))
    return _loaded_model(settings, info)


@router.delete("/models/{model:path}")
async def unload(model: str, engine: EngineDep, stored: StoredModelsDep, owner: AdminOwner) -> Deleted:
    """Unload a model. The response is sent when its accepted requests are answered."""
    await engine.catalog.unload(model)
    await asyncio.to_thread(stored.remove, model)
    return Deleted(id=model, object="model")


@router.post("/adapters")
async def load_adapter(
    body: AdapterToLoad, settings: SettingsDep, engine: EngineDep, stored: StoredModelsDep, owner: AdminOwner
) -> LoadedModel:
    """Load a LoRA adapter for a model. The response is sent when requests may name it in `lora`."""
    path = find("adapter", await asyncio.to_thread(adapters_in, settings.models_folder), body.folder)
    info = await engine.catalog.load_adapter(engine.catalog.get(body.model).name, path, body.name)
    await asyncio.to_thread(stored.add, StoredModel(body.folder, info.name, body.name))
    return _loaded_model(settings, info)


@router.delete("/adapters/{name}")
async def unload_adapter(
    name: str, model: str, engine: EngineDep, stored: StoredModelsDep, owner: AdminOwner
) -> Deleted:
    """Unload an adapter of a model. The response is sent when its accepted requests are answered."""
    info = engine.catalog.get(model)
    await engine.catalog.unload(info.name, name)
    await asyncio.to_thread(stored.remove, info.name, name)
    return Deleted(id=name, object="adapter")


def _loaded_model(settings: Settings, info: ModelInfo) -> LoadedModel:
    aliases = [alias for alias, name in settings.aliases.items() if name == info.name]
    known = model_object(info.name, info).model_dump()
    return LoadedModel(**known, aliases=aliases, digest=info.digest, runtime_fingerprint=info.runtime_fingerprint)
