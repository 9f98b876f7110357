"""`/v1/images`: text to images, in OpenAI's format."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from service.errors import ClientGone, InvalidRequest
from service.http.accept import IMAGES, image_type
from service.http.body import read_json
from service.http.dependencies import ImagesOwner, owner_of
from service.http.error_handlers import request_error
from service.http.idempotency import IdempotencyStore
from service.images.service import GeneratedImages, ImageService
from service.schemas import ErrorResponse, ImageCompleted, ImageRequest, ImagesResponse
from service.settings import Settings

EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
_idempotency_key: TypeAdapter[str | None] = TypeAdapter(IdempotencyKey)
T = TypeVar("T")


async def _read_and_generate(request: Request) -> Response:
    """Read the parameters of `generate` and call it. Raises Unavailable while the engine starts or drains."""
    content = await read_json(request)
    request.app.state.engine.check_open()
    owner = await owner_of(request, "generate")
    settings: Settings = request.app.state.settings
    place = ["body"]
    try:
        body = ImageRequest.model_validate(content, context={"unsupported": settings.images.unsupported_fields})
        place = ["header", "idempotency-key"]
        key = _idempotency_key.validate_python(request.headers.get("idempotency-key"))
    except ValidationError as error:
        raise request_error(error, *place) from None
    return await generate(request, owner, body, key)


class _ImagesRoute(APIRoute):
    """The route of `generate`, whose parameters FastAPI only describes.

    Its resolution of them would take as long as the rest of the handler.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return _read_and_generate


router = APIRouter(prefix="/v1/images", tags=["images"], route_class=_ImagesRoute)


@router.post(
    "/generations",
    response_model=ImagesResponse,
    responses={
        200: {
            "description": "Images; with `stream` one event, with `Accept: image/*` the bytes of one image",
            "content": {
                "text/event-stream": {"schema": EVENT},
                **{kind: {"schema": {"type": "string"}} for kind in IMAGES},
            },
        },
        "4XX": {"model": ErrorResponse},
        "5XX": {"model": ErrorResponse},
    },
)
async def generate(
    request: Request,
    owner: ImagesOwner,
    body: ImageRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generate `n` images of a prompt, each with one network evaluation or with `steps` of them (extension).

    `seed` (extension) makes them reproducible; every image's seed is in the answer. A prompt over the model's token
    limit is cut, and `warnings` (extension) says so.
    """
    raw = image_type(", ".join(request.headers.getlist("accept")), body.output_format)
    _check_consistency(body, raw)
    if raw is not None:
        body = body.model_copy(update={"output_format": IMAGES[raw]})
    state = request.app.state
    images: ImageService = state.images
    settings: Settings = state.settings
    async with images.engine.catalog.use(body.model, body.lora.name if body.lora else None):
        generation, output = images.resolve(body, owner)
        request.state.user = body.user
        request.state.prompt = body.prompt if settings.observability.log_prompts else None

        async def answer() -> Response:
            state.rate_limiter.take(owner, len(generation.seeds))
            generated = await _unless_disconnected(request, images.generate(generation, output))
            headers = {"server-timing": generated.server_timing}
            if raw is not None:
                return Response(generated.encoded[0], headers=headers | _image_headers(generated), media_type=raw)
            if body.stream:
                return Response(_event(generated), headers=headers, media_type="text/event-stream")
            if body.response_format == "url":
                content = await images.links(generated, str(settings.http.public_url or request.base_url))
            else:
                content = generated.response(texts=generated.texts)
            return Response(content.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")

        if idempotency_key is None:
            return await answer()
        fingerprint = hashlib.sha256(f"{raw} {body.model_dump_json()}".encode()).hexdigest()
        idempotency: IdempotencyStore = state.idempotency
        return await idempotency.run_once(owner, idempotency_key, fingerprint, answer)


def _check_consistency(body: ImageRequest, raw: str | None) -> None:
    """Refuse fields that contradict each other or the `Accept` header."""
    if body.partial_images and not body.stream:
        body.reject("partial_images", "it is for stream = true")
    if not body.stream and raw is None:
        return
    if body.stream and raw is not None:
        message = f"stream = true asks for events and Accept: {raw} for the bytes of an image; leave one of them out"
        raise InvalidRequest(message, "stream")
    means = "stream = true" if body.stream else f"Accept: {raw}"
    if (body.n or 1) > 1:
        raise InvalidRequest(f"{means} answers with one image; n must be 1", "n")
    if body.response_format == "url":
        raise InvalidRequest(f"{means} answers with the image itself, not with a url", "response_format")
    if raw is not None and body.output_format not in (None, IMAGES[raw]):
        raise InvalidRequest(f"output_format contradicts {means}", "output_format")


def _image_headers(images: GeneratedImages) -> dict[str, str]:
    """Return the headers that an answer of plain bytes has in place of fields."""
    headers = {"x-seed": str(images.request.seeds[0])}
    return headers | {"x-warning": "; ".join(images.warnings)} if images.warnings else headers


def _event(images: GeneratedImages) -> str:
    """Return the stream: its one event, and the text that ends it."""
    event = ImageCompleted(
        b64_json=images.texts[0],
        created_at=int(time.time()),
        output_format=images.output.format,
        size=images.request.size,
        usage=images.usage,
        decoder=images.decoder,
        seed=images.request.seeds[0],
        warnings=images.warnings,
    )
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\ndata: [DONE]\n\n"


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the work's result. If the client disconnects first, the work is cancelled and ClientGone raised."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
