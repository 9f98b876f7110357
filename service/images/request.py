"""From a request of the API to a `GenerationRequest` and the choices of its output, checked against the model."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.engine.backend import ModelInfo
from service.engine.batcher import Priority
from service.engine.request import GenerationRequest
from service.errors import InvalidRequest
from service.schemas import ImageRequest, OutputFormat

MAX_SEED = 2**53  # JSON numbers beyond are not exact everywhere
RANDOM_SEEDS = 2**32  # exclusive upper bound of random seeds; noise of small seeds is fastest to make


@dataclass(frozen=True)
class OutputOptions:
    """How images are checked and encoded, and the warnings of the answer."""

    format: OutputFormat
    compression: int  # 0 to 100, the quality of JPEG and WebP
    moderation: Literal["auto", "low"]
    warnings: Sequence[str] = ()  # deviations from the request


def resolve(body: ImageRequest, info: ModelInfo, owner: str) -> tuple[GenerationRequest, OutputOptions]:
    """Fill in the defaults. Raises InvalidRequest with the name of a field that the model does not support.

    If the server may ignore such a field, the output has a warning instead.
    """
    width, height = _size(body, info.sizes)
    output_format = body.output_format or "png"
    compression = 100 if body.output_compression is None else body.output_compression
    if output_format == "png" and compression != 100:
        body.reject("output_compression", "it is for jpeg and webp; png is lossless")
    adapter, steps = body.lora.name if body.lora else None, body.steps or 1
    if steps > info.max_steps:
        body.reject("steps", info.steps_advice)
        steps = 1
    info.check(adapter, steps)
    n = body.n or 1
    if body.seed is not None and body.seed + n > MAX_SEED:
        message = "seed + n is beyond 2^53; take a smaller seed, or leave seed out for a random one"
        raise InvalidRequest(message, "seed", "invalid_value")
    first = secrets.randbelow(RANDOM_SEEDS - n) if body.seed is None else body.seed
    request = GenerationRequest(
        model=info.name,
        prompt=body.prompt,
        seeds=range(first, first + n),
        width=width,
        height=height,
        adapter=adapter,
        scale=body.lora.scale if body.lora else 1.0,
        steps=steps,
        priority=Priority.BULK if body.priority == "batch" else Priority.INTERACTIVE,
        owner=owner,
        timeout=body.timeout,
    )
    return request, OutputOptions(output_format, compression, body.moderation or "auto", tuple(body.warnings or ()))


def _size(body: ImageRequest, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return width and height: `auto` is the model's own size; an unsupported size may become the nearest one."""
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
        """Compare by shape, then by area."""
        wide, high = math.log(size[0] / width), math.log(size[1] / height)
        return abs(wide - high), abs(wide + high)

    nearest = min(allowed, key=distance)
    body.warnings.append(f"size is {nearest[0]}x{nearest[1]}, the nearest to {body.size} that the model makes")
    return nearest
