"""`/v1/admin/models` and `/v1/admin/adapters`: what is served, changed while serving. For keys of the scope `admin`.

A client names a folder that the server has found below its `students` setting; no text of a client becomes a path.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter

from service.dependencies import Admin, Running, Service
from service.engine.backend import Card
from service.errors import InvalidRequest
from service.routers.models import described
from service.schemas import (
    AdapterDeleted,
    AdapterToLoad,
    ErrorResponse,
    LoadedModel,
    LoadedModels,
    ModelDeleted,
    StudentToLoad,
)
from service.state import State

STUDENT, ADAPTER = "onestep.json", "pytorch_lora_weights.safetensors"

router = APIRouter(
    prefix="/v1/admin",
    tags=["administration"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.get("/models")
async def index(service: Service, engine: Running, caller: Admin) -> LoadedModels:
    """All models, the default one first, and the folders that may be loaded."""
    students = await asyncio.to_thread(_folders, service.settings.students, STUDENT)
    adapters = await asyncio.to_thread(_folders, service.settings.students, ADAPTER)
    data = [_shown(service, card) for card in engine.cards.values()]
    return LoadedModels(data=data, folders=sorted(students), adapter_folders=sorted(adapters))


@router.post("/models")
async def load(body: StudentToLoad, service: Service, engine: Running, caller: Admin) -> LoadedModel:
    """Load a student; the answer comes when every worker has it and requests may name it."""
    folder = await _found(service, body.folder, STUDENT)
    return _shown(service, await engine.load(folder, body.name))


@router.delete("/models/{model:path}")
async def unload(model: str, engine: Running, caller: Admin) -> ModelDeleted:
    """Serve a model no more; the answer comes when what was accepted is answered."""
    await engine.unload(model)
    return ModelDeleted(id=model)


@router.post("/adapters")
async def load_adapter(body: AdapterToLoad, service: Service, engine: Running, caller: Admin) -> LoadedModel:
    """Load a LoRA adapter for a model; requests may name it in `lora` when the answer comes."""
    folder = await _found(service, body.folder, ADAPTER)
    return _shown(service, await engine.load_adapter(service.card(body.model).name, folder, body.name))


@router.delete("/adapters/{name}")
async def unload_adapter(name: str, model: str, service: Service, engine: Running, caller: Admin) -> AdapterDeleted:
    """Take an adapter from a model; the answer comes when what was accepted is answered."""
    await engine.unload_adapter(service.card(model).name, name)
    return AdapterDeleted(id=name)


async def _found(service: State, name: str, file: str) -> Path:
    """The folder of that name. Raises InvalidRequest where there is none."""
    folders = await asyncio.to_thread(_folders, service.settings.students, file)
    if name not in folders:
        raise InvalidRequest(f"there is no folder {name!r} with {file}; there are {sorted(folders)}", "folder")
    return folders[name]


def _folders(students: Path | None, file: str) -> dict[str, Path]:
    """The folders that hold a file, by name."""
    if students is None or not students.is_dir():
        return {}
    return {folder.name: folder for folder in students.iterdir() if (folder / file).is_file()}


def _shown(service: State, card: Card) -> LoadedModel:
    aliases = [alias for alias, name in service.settings.aliases.items() if name == card.name]
    return LoadedModel(**described(card.name, card).model_dump(), aliases=aliases, digest=card.digest)
