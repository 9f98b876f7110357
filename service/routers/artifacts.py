"""`/v1/artifacts`: images of the links of `response_format: url`. The signature replaces the API key."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.errors import NotFound
from service.http.dependencies import ImagesDep
from service.schemas import ErrorResponse

router = APIRouter(prefix="/v1/artifacts", tags=["images"])


@router.get("/{name}", response_class=Response, responses={"4XX": {"model": ErrorResponse}})
async def show(name: str, images: ImagesDep, signature: Annotated[str, Query()]) -> Response:
    """One image, until its link expires."""
    found = await images.artifacts.read(name, signature)
    if found is None:
        raise NotFound("this link has expired or is not one of this server; generate the image again")
    data, output_format = found
    headers = {"cache-control": "private, immutable", "x-content-type-options": "nosniff"}
    return Response(data, headers=headers, media_type=f"image/{output_format}")
