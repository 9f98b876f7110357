"""`/v1/admin/models` and `/v1/admin/adapters`: what is served, changed while serving. For keys of the scope `admin`.

A client names a folder that the server has found below its `students` setting; no text of a client becomes a path.
What is loaded here comes back when the server starts again.
"""

import asyncio

from fastapi import APIRouter

from service.engine.backend import Card
from service.engine.roster import ADAPTER, STUDENT, Adapter, Student, find, folders_of
from service.http.dependencies import AdminCaller, EngineDep, Service
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

router = APIRouter(
    prefix="/v1/admin",
    tags=["administration"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.get("/models")
async def index(service: Service, engine: EngineDep, caller: AdminCaller) -> LoadedModels:
    """All models, the default one first, and the folders that may be loaded."""
    students = await asyncio.to_thread(folders_of, service.settings.students, STUDENT)
    adapters = await asyncio.to_thread(folders_of, service.settings.students, ADAPTER)
    data = [_shown(service, card) for card in engine.cards.values()]
    return LoadedModels(data=data, folders=sorted(students), adapter_folders=sorted(adapters))


@router.post("/models")
async def load(body: StudentToLoad, service: Service, engine: EngineDep, caller: AdminCaller) -> LoadedModel:
    """Load a student; the answer comes when every worker has it and requests may name it."""
    folder = await asyncio.to_thread(find, service.settings.students, body.folder, STUDENT)
    card = await engine.load(folder, body.name)
    await asyncio.to_thread(service.roster.add, Student(body.folder, card.name))
    return _shown(service, card)


@router.delete("/models/{model:path}")
async def unload(model: str, service: Service, engine: EngineDep, caller: AdminCaller) -> ModelDeleted:
    """Serve a model no more; the answer comes when what was accepted is answered."""
    await engine.unload(model)
    await asyncio.to_thread(service.roster.remove, model)
    return ModelDeleted(id=model)


@router.post("/adapters")
async def load_adapter(body: AdapterToLoad, service: Service, engine: EngineDep, caller: AdminCaller) -> LoadedModel:
    """Load a LoRA adapter for a model; requests may name it in `lora` when the answer comes."""
    folder = await asyncio.to_thread(find, service.settings.students, body.folder, ADAPTER)
    card = await engine.load_adapter(service.card(body.model).name, folder, body.name)
    await asyncio.to_thread(service.roster.add, Adapter(card.name, body.folder, body.name))
    return _shown(service, card)


@router.delete("/adapters/{name}")
async def unload_adapter(
    name: str, model: str, service: Service, engine: EngineDep, caller: AdminCaller
) -> AdapterDeleted:
    """Take an adapter from a model; the answer comes when what was accepted is answered."""
    card = service.card(model)
    await engine.unload_adapter(card.name, name)
    await asyncio.to_thread(service.roster.remove, card.name, name)
    return AdapterDeleted(id=name)


def _shown(service: State, card: Card) -> LoadedModel:
    aliases = [alias for alias, name in service.settings.aliases.items() if name == card.name]
    known = described(card.name, card).model_dump()
    return LoadedModel(**known, aliases=aliases, digest=card.digest, computed=card.computed)
