"""`/v1/images`: text to images, in OpenAI's format."""

import asyncio
import base64
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request

from service.dependencies import Running, Service, require_key
from service.encode import encode
from service.errors import ClientGone, InvalidRequest
from service.schemas import ErrorResponse, ImageData, ImageRequest, ImagesResponse, TokenDetails, Usage

router = APIRouter(prefix="/v1/images", tags=["images"], dependencies=[Depends(require_key)])

MAX_SEED = 2**53  # JSON numbers beyond are not exact everywhere
T = TypeVar("T")


@router.post(
    "/generations",
    response_model_exclude_none=True,
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)
async def generate(body: ImageRequest, request: Request, service: Service, engine: Running) -> ImagesResponse:
    """Make `n` images of a prompt, each from one call of the network.

    `seed` (extension) makes them reproducible; every image's seed is in the answer. A prompt over the model's token
    limit is cut, and `warnings` (extension) says so.
    """
    card = service.card(body.model)
    width, height = _size(body.size, card.sizes)
    output_format = body.output_format or "png"
    compression = 100 if body.output_compression is None else body.output_compression
    if output_format == "png" and compression != 100:
        raise InvalidRequest("output_compression is for jpeg and webp; png is lossless", "output_compression")
    n = body.n or 1
    first = secrets.randbelow(MAX_SEED - n) if body.seed is None else body.seed
    seeds = range(first, first + n)

    images = await _unless_disconnected(request, engine.generate(card.name, body.prompt, seeds, width, height))
    started = time.monotonic()
    loop = asyncio.get_running_loop()
    encoding = [
        loop.run_in_executor(service.encoders, encode, image.pixels, output_format, compression) for image in images
    ]
    encoded: Sequence[bytes] = await asyncio.gather(*encoding)
    service.metrics.stages.labels("encode").observe(time.monotonic() - started)
    service.metrics.bytes.labels(output_format).inc(sum(map(len, encoded)))

    tokens, truncated = images[0].tokens, images[0].truncated
    patches = n * (width // card.pixels_per_token) * (height // card.pixels_per_token)
    return ImagesResponse(
        created=int(time.time()),
        data=[ImageData(b64_json=base64.b64encode(e).decode(), seed=s) for e, s in zip(encoded, seeds, strict=True)],
        output_format=output_format,
        size=f"{width}x{height}",
        usage=Usage(
            input_tokens=tokens,
            input_tokens_details=TokenDetails(image_tokens=0, text_tokens=tokens),
            output_tokens=patches,
            output_tokens_details=TokenDetails(image_tokens=patches, text_tokens=0),
            total_tokens=tokens + patches,
        ),
        warnings=[f"the prompt was cut to the model's {card.token_limit} tokens"] if truncated else None,
    )


def _size(size: str | None, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Width and height meant; `auto` is the model's own."""
    if size is None or size == "auto":
        return allowed[0]
    width, height = map(int, size.split("x"))
    if (width, height) not in allowed:
        known = ", ".join(f"{w}x{h}" for w, h in allowed)
        raise InvalidRequest(f"the model makes images of {known}, not {size}", "size", "invalid_value")
    return width, height


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; when the client hangs up first, the work is cancelled and ClientGone raised."""
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
    """Returns when the client is gone; the body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
