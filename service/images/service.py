"""`ImageService`: from a request to encoded images, or links to them."""

import asyncio
import base64
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from service.engine.backend import ModelInfo
from service.engine.dispatcher import GeneratedImage, RequestHandle
from service.engine.engine import Engine
from service.engine.request import GenerationRequest
from service.errors import Blocked
from service.images.artifacts import ArtifactStore
from service.images.encode import encode
from service.images.provenance import Provenance, Signer
from service.images.request import OutputOptions, resolve
from service.images.safety import SafetyChecker
from service.observability.metrics import Metrics
from service.schemas import Decoder, ImageData, ImageRequest, ImagesResponse, TokenDetails, Usage
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing


ENCODED_AT_ONCE = 1 << 15  # bytes of pixels; a thread takes longer to wake up than so few take to encode


@dataclass(frozen=True)
class GeneratedImages:
    """The encoded images of a request in the order of its seeds, and what the answer says of them."""

    request: GenerationRequest
    output: OutputOptions
    encoded: Sequence[bytes]
    usage: Usage
    warnings: list[str] | None
    seconds: dict[str, float]  # by stage; of the image that took longest, and only of stages that ran
    decoder: Decoder

    @property
    def server_timing(self) -> str:
        """The stages as a `Server-Timing` header, in milliseconds as that header has them."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())

    @property
    def texts(self) -> list[str]:
        return [base64.b64encode(data).decode() for data in self.encoded]

    def response(self, texts: Sequence[str] = (), urls: Sequence[str] = ()) -> ImagesResponse:
        """The answer with the images as Base64, as links, or with neither."""
        data = [
            ImageData(b64_json=texts[i] if texts else None, url=urls[i] if urls else None, seed=seed)
            for i, seed in enumerate(self.request.seeds)
        ]
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=self.output.format,
            size=self.request.size,
            usage=self.usage,
            decoder=self.decoder,
            warnings=self.warnings,
        )


class ImageService:
    """Generates images with the engine; checks, labels, encodes and signs them in threads of its own."""

    def __init__(
        self,
        engine: Engine,
        artifacts: ArtifactStore,
        check: SafetyChecker | None,
        signer: Signer | None,
        settings: Settings,
        metrics: Metrics,
        tracing: "Tracing | None" = None,
    ) -> None:
        self.engine = engine
        self.artifacts = artifacts
        self._check = check
        self._signer = signer
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._threads = ThreadPoolExecutor(settings.images.encode_threads, thread_name_prefix="encode")

    def resolve(self, body: ImageRequest, owner: str) -> tuple[GenerationRequest, OutputOptions]:
        """Check a request against its model and fill in the defaults. Raises NotFound or InvalidRequest."""
        return resolve(body, self.engine.catalog.get(body.model), owner)

    async def generate(
        self,
        request: GenerationRequest,
        output: OutputOptions,
        handle: RequestHandle | None = None,
        *,
        patient: bool = False,
    ) -> GeneratedImages:
        """Generate and encode images. Cancelling drops what still waits; raises the engine's errors, and Blocked."""
        info = self.engine.catalog.get(request.model)
        trace = self._tracing.current if self._tracing else None
        if trace:
            count = len(request.seeds)
            trace.set_attributes({"gen_ai.request.model": request.model, "fgm.size": request.size, "fgm.images": count})
        images = await self.engine.generate(request, handle, patient=patient)
        stages = dict.fromkeys(stage for image in images for stage in image.seconds)
        seconds = {stage: max(image.seconds.get(stage, 0.0) for image in images) for stage in stages}
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        if self._check:
            with self._stage("safety", seconds):
                checks = [in_thread(self._check, image.pixels, output.moderation) for image in images]
                complaints = [complaint for complaint in await asyncio.gather(*checks) if complaint]
            self._metrics.blocked.labels(request.model).inc(len(complaints))
            if complaints:
                message = f"the safety check found {complaints[0]} in the image; change the prompt"
                raise Blocked(message, "prompt", "moderation_blocked")
        with self._stage("encode", seconds):
            pairs = zip(images, request.seeds, strict=True)
            encoded: Sequence[bytes]
            if self._signer is None and sum(image.pixels.nbytes for image in images) <= ENCODED_AT_ONCE:
                encoded = [self._encode(request, output, info, image, seed) for image, seed in pairs]
            else:
                encoding = [in_thread(self._encode, request, output, info, image, seed) for image, seed in pairs]
                encoded = await asyncio.gather(*encoding)
        self._metrics.bytes.labels(output.format).inc(sum(map(len, encoded)))
        warnings = [*output.warnings]
        if images[0].truncated:
            warnings.append(f"the prompt was cut to the model's {info.token_limit} tokens")
        usage = _usage(request, info, images[0].tokens)
        return GeneratedImages(request, output, encoded, usage, warnings or None, seconds, info.decoder)

    async def links(self, images: GeneratedImages, base: str, lifetime: int | None = None) -> ImagesResponse:
        """Store images; the answer with links below the server's base URL, which last `lifetime` seconds."""
        save = [self.artifacts.save(data, images.output.format, lifetime) for data in images.encoded]
        names = await asyncio.gather(*save)
        return images.response(urls=[self.artifacts.link(base, name) for name in names])

    def close(self) -> None:
        self._threads.shutdown()

    def _encode(
        self, request: GenerationRequest, output: OutputOptions, info: ModelInfo, image: GeneratedImage, seed: int
    ) -> bytes:
        """Return an image's bytes with the labels that the settings choose."""
        policy = self._settings.images.provenance
        model = info.name if request.adapter is None else f"{info.name} with {request.adapter} at {request.scale:g}"
        if request.steps > 1:
            model += f" in {request.steps} steps"
        prompt = request.prompt if policy == "prompt" else None
        provenance = Provenance(model, info.digest, seed, prompt, info.decoder, info.decoder_digest)
        data = encode(image.pixels, output.format, output.compression, None if policy == "none" else provenance)
        return self._signer.sign(data, output.format) if self._signer else data

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Time a stage for the answer, the metrics and the trace. A stage that raises is not counted."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        seconds[name] = ended - began
        if self._tracing and (trace := self._tracing.current):
            trace.stage(name, began, ended)
        self._metrics.stages.labels(name).observe(seconds[name])


def _usage(request: GenerationRequest, info: ModelInfo, tokens: int) -> Usage:
    side = info.pixels_per_token
    patches = len(request.seeds) * (request.width // side) * (request.height // side)
    return Usage(
        input_tokens=tokens,
        input_tokens_details=TokenDetails(image_tokens=0, text_tokens=tokens),
        output_tokens=patches,
        output_tokens_details=TokenDetails(image_tokens=patches, text_tokens=0),
        total_tokens=tokens + patches,
    )
