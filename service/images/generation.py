"""From an image request to encoded images: what the model can do of it, the engine, the encoders."""

import asyncio
import base64
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from service.engine.backend import ModelInfo
from service.engine.batcher import Priority
from service.engine.engine import Engine, GeneratedImage, RequestHandle
from service.engine.request import GenerationRequest
from service.errors import Blocked, InvalidRequest, quoted
from service.images.encode import encode
from service.images.provenance import Origin
from service.schemas import ImageData, ImageRequest, ImagesResponse, OutputFormat, TokenDetails, Usage
from service.state import State

MAX_SEED = 2**53  # JSON numbers beyond are not exact everywhere
RANDOM_SEEDS = 2**32  # exclusive upper bound of random seeds; noise of small seeds is fastest to make


@dataclass(frozen=True)
class Order:
    """A request that the model can honor, with every choice made."""

    info: ModelInfo  # of the model
    prompt: str
    seeds: Sequence[int]
    width: int
    height: int
    output_format: OutputFormat
    compression: int
    priority: Priority
    moderation: Literal["auto", "low"]
    timeout: float | None  # seconds; None is the server's
    adapter: str | None
    scale: float  # of the adapter
    warnings: Sequence[str] = ()  # deviations from the request

    @classmethod
    def of(cls, body: ImageRequest, info: ModelInfo) -> "Order":
        """Fill in what is left open; raises InvalidRequest naming the field that the model cannot honor.

        Where the request says that such a field may be ignored, the order carries a warning instead.
        """
        width, height = _size(body, info.sizes)
        output_format = body.output_format or "png"
        compression = 100 if body.output_compression is None else body.output_compression
        if output_format == "png" and compression != 100:
            body.reject("output_compression", "it is for jpeg and webp; png is lossless")
            compression = 100
        if body.lora and body.lora.name not in info.adapters:
            message = f"{info.name} has no adapter {quoted(body.lora.name)}; it has {[*info.adapters]}"
            raise InvalidRequest(message, "lora.name", "adapter_not_found")
        n = body.n or 1
        if body.seed is not None and body.seed + n > MAX_SEED:
            message = "seed + n is beyond 2^53; take a smaller seed, or leave seed out for a random one"
            raise InvalidRequest(message, "seed", "invalid_value")
        first = secrets.randbelow(RANDOM_SEEDS - n) if body.seed is None else body.seed
        priority = Priority.BATCH if body.priority == "batch" else Priority.INTERACTIVE
        return cls(
            info,
            body.prompt,
            range(first, first + n),
            width,
            height,
            output_format,
            compression,
            priority,
            body.moderation or "auto",
            body.timeout,
            body.lora.name if body.lora else None,
            body.lora.scale if body.lora else 1.0,
            tuple(body.warnings or ()),
        )

    @property
    def model(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def size(self) -> str:
        """As it goes over the wire."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Images:
    """What came of an order: encoded images in the order of its seeds, and what the client is told beside them."""

    order: Order
    encoded: Sequence[bytes]
    usage: Usage
    warnings: list[str] | None
    seconds: dict[str, float]  # by stage; of the image that took longest, and only of stages that one went through

    @property
    def server_timing(self) -> str:
        """The stages as a `Server-Timing` header, in milliseconds as that header has them."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())


async def make(
    service: State,
    engine: Engine,
    order: Order,
    owner: str,
    handle: RequestHandle | None = None,
    *,
    patient: bool = False,
) -> Images:
    """Make an order's images. Cancelling drops what still waits; raises what the engine raises, and Blocked."""
    loop = asyncio.get_running_loop()
    info = order.info
    trace = service.tracing.current if service.tracing else None
    if trace:
        trace.tell({"gen_ai.request.model": order.model, "fgm.size": order.size, "fgm.images": len(order.seeds)})
    request = GenerationRequest(
        model=order.model,
        prompt=order.prompt,
        seeds=order.seeds,
        width=order.width,
        height=order.height,
        adapter=order.adapter,
        scale=order.scale,
        priority=order.priority,
        owner=owner,
        timeout=order.timeout,
    )
    images = await engine.generate(request, handle, patient=patient)
    after: dict[str, float] = {}  # stages after the device
    if service.checker:
        with _stage("safety", after, service):
            checking = [
                loop.run_in_executor(service.encoders, service.checker, image.pixels, order.moderation)
                for image in images
            ]
            complaints = [complaint for complaint in await asyncio.gather(*checking) if complaint]
        service.metrics.blocked.labels(order.model).inc(len(complaints))
        if complaints:
            raise Blocked(f"the safety check found {complaints[0]} in the image; change the prompt", "prompt")
    with _stage("encode", after, service):
        encoding = [
            loop.run_in_executor(service.encoders, _finish, service, order, info, image, seed)
            for image, seed in zip(images, order.seeds, strict=True)
        ]
        encoded: Sequence[bytes] = await asyncio.gather(*encoding)
    service.metrics.bytes.labels(order.output_format).inc(sum(map(len, encoded)))

    tokens, truncated = images[0].tokens, images[0].truncated
    patches = len(encoded) * (order.width // info.pixels_per_token) * (order.height // info.pixels_per_token)
    usage = Usage(
        input_tokens=tokens,
        input_tokens_details=TokenDetails(image_tokens=0, text_tokens=tokens),
        output_tokens=patches,
        output_tokens_details=TokenDetails(image_tokens=patches, text_tokens=0),
        total_tokens=tokens + patches,
    )
    stages = dict.fromkeys(stage for image in images for stage in image.seconds)
    seconds = {stage: max(image.seconds.get(stage, 0.0) for image in images) for stage in stages}
    warnings = [*order.warnings]
    if truncated:
        warnings.append(f"the prompt was cut to the model's {info.token_limit} tokens")
    return Images(order, encoded, usage, warnings or None, seconds | after)


async def respond(service: State, images: Images, base: str | None, lifetime: int | None = None) -> ImagesResponse:
    """The answer: images within it, or, with the `base` of the server's URLs, links that last `lifetime` seconds."""
    order = images.order
    if base is not None:
        loop, threads = asyncio.get_running_loop(), service.artifact_threads
        save = [
            loop.run_in_executor(threads, service.artifacts.save, data, order.output_format, time.time(), lifetime)
            for data in images.encoded
        ]
        names = await asyncio.gather(*save)
        urls = [f"{base.rstrip('/')}/v1/artifacts/{name}?signature={service.artifacts.sign(name)}" for name in names]
        data = [ImageData(url=url, seed=seed) for url, seed in zip(urls, order.seeds, strict=True)]
    else:
        texts = [base64.b64encode(data).decode() for data in images.encoded]
        data = [ImageData(b64_json=text, seed=seed) for text, seed in zip(texts, order.seeds, strict=True)]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=order.output_format,
        size=order.size,
        usage=images.usage,
        warnings=images.warnings,
    )


@contextmanager
def _stage(name: str, seconds: dict[str, float], service: State) -> Iterator[None]:
    """Take the time of a stage for the answer, the metrics and the trace; one that raises is not counted."""
    began = time.monotonic()
    yield
    ended = time.monotonic()
    seconds[name] = ended - began
    if service.tracing and (trace := service.tracing.current):
        trace.stage(name, began, ended)
    service.metrics.stages.labels(name).observe(seconds[name])


def _finish(service: State, order: Order, info: ModelInfo, image: GeneratedImage, seed: int) -> bytes:
    """An image's bytes, with what the server says of its origin."""
    policy = service.settings.provenance
    model = info.name if order.adapter is None else f"{info.name} with {order.adapter} at {order.scale:g}"
    origin = Origin(model, info.digest, seed, order.prompt if policy == "prompt" else None)
    data = encode(image.pixels, order.output_format, order.compression, None if policy == "none" else origin)
    return service.signer.sign(data, order.output_format) if service.signer else data


def _size(body: ImageRequest, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The width and height to make: `auto` is the model's own; an unsupported size may become the nearest one."""
    if body.size is None or body.size == "auto":
        return allowed[0]
    width, height = map(int, body.size.split("x"))
    if (width, height) in allowed:
        return width, height
    if body.warnings is None:
        known = ", ".join(f"{w}x{h}" for w, h in allowed)
        message = f"the model makes images of {known}, not {body.size}; take one of these, or leave size out"
        raise InvalidRequest(message, "size", "invalid_value")

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        """By shape, then by area."""
        wide, high = math.log(size[0] / width), math.log(size[1] / height)
        return abs(wide - high), abs(wide + high)

    nearest = min(allowed, key=distance)
    body.warnings.append(f"size is {nearest[0]}x{nearest[1]}, the nearest to {body.size} that the model makes")
    return nearest
