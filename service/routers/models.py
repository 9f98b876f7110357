"""`/v1/models`: the loaded students and their aliases."""

import time

from fastapi import APIRouter

from service.engine.backend import ModelInfo
from service.errors import Forbidden
from service.http.dependencies import ImagesDep, ImagesOwner, JobsDep, JobsOwner, SettingsDep
from service.schemas import Deleted, ErrorResponse, Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"], responses={"4XX": {"model": ErrorResponse}})


@router.get("")
async def index(images: ImagesDep, settings: SettingsDep, owner: ImagesOwner) -> ModelList:
    """All models, the default one first, then the aliases."""
    models = images.engine.catalog.models
    names = [*models, *(alias for alias, name in settings.aliases.items() if name in models)]
    return ModelList(data=[model_object(name, images.engine.catalog.get(name)) for name in names])


@router.get("/{model:path}")
async def show(model: str, images: ImagesDep, owner: ImagesOwner) -> Model:
    """One model."""
    return model_object(model, images.engine.catalog.get(model))


@router.delete("/{model:path}")
def remove(model: str, images: ImagesDep, jobs: JobsDep, owner: JobsOwner) -> Deleted:
    """Delete a student of one of your jobs. The logs and samples of its run stay."""
    if not jobs.fine_tuning.delete_student(owner, model, int(time.time())):
        images.engine.catalog.get(model)
        raise Forbidden(
            "this model is the server's own; an administrator unloads it with DELETE /v1/admin/models",
            "model",
            "not_your_model",
        )
    jobs.students.serve()
    return Deleted(id=model, object="model")


def model_object(name: str, info: ModelInfo) -> Model:
    """Return the API's object of a model, by one of its names."""
    sizes = [f"{width}x{height}" for width, height in info.sizes]
    return Model(
        id=name,
        created=info.created,
        owned_by=info.owner,
        sizes=sizes,
        adapters=[*info.adapters],
        max_steps=info.max_steps,
        decoder=info.decoder,
        description=info.description,
        examples=[*info.examples],
    )
