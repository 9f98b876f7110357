"""`/v1/admin/models`: what is served, changed while serving. For keys of the scope `admin`.

A client names a folder that the server has found below its `students` setting; no text of a client becomes a path.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter

from service.dependencies import Admin, Running, Service
from service.engine.backend import Card
from service.errors import InvalidRequest
from service.schemas import ErrorResponse, LoadedModel, LoadedModels, ModelDeleted, StudentToLoad

router = APIRouter(
    prefix="/v1/admin/models",
    tags=["administration"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.get("")
async def index(service: Service, engine: Running, caller: Admin) -> LoadedModels:
    """All models, the default one first, and the folders that may be loaded."""
    folders = await asyncio.to_thread(_folders, service.settings.students)
    return LoadedModels(data=[_shown(card) for card in engine.cards.values()], folders=sorted(folders))


@router.post("")
async def load(body: StudentToLoad, service: Service, engine: Running, caller: Admin) -> LoadedModel:
    """Load a student; the answer comes when every worker has it and requests may name it."""
    folders = await asyncio.to_thread(_folders, service.settings.students)
    if body.folder not in folders:
        raise InvalidRequest(f"there is no student folder {body.folder!r}; there are {sorted(folders)}", "folder")
    return _shown(await engine.load(folders[body.folder], body.name))


@router.delete("/{model:path}")
async def unload(model: str, engine: Running, caller: Admin) -> ModelDeleted:
    """Serve a model no more; the answer comes when what was accepted is answered."""
    await engine.unload(model)
    return ModelDeleted(id=model)


def _folders(students: Path | None) -> dict[str, Path]:
    """The student folders that are there, by name."""
    if students is None or not students.is_dir():
        return {}
    return {folder.name: folder for folder in students.iterdir() if (folder / "onestep.json").is_file()}


def _shown(card: Card) -> LoadedModel:
    sizes = [f"{width}x{height}" for width, height in card.sizes]
    return LoadedModel(id=card.name, created=card.created, owned_by=card.owner, digest=card.digest, sizes=sizes)
