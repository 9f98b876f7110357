"""`/v1/models`: the students that are loaded."""

from fastapi import APIRouter, Depends

from service.dependencies import Service, require_key
from service.engine.backend import Card
from service.schemas import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_key)])


@router.get("")
async def index(service: Service) -> ModelList:
    """All models, the default one first."""
    return ModelList(data=[_model(card) for card in service.engine.cards.values()])


@router.get("/{model:path}")
async def show(model: str, service: Service) -> Model:
    """One model."""
    return _model(service.card(model))


def _model(card: Card) -> Model:
    return Model(id=card.name, created=card.created, owned_by=card.owner)
