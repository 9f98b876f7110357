"""The engine: a catalog of models, a dispatcher of requests, and a supervisor of workers."""

from typing import TYPE_CHECKING

from service.engine.catalog import ModelCatalog
from service.engine.dispatcher import Dispatcher, GeneratedImage, RequestHandle
from service.engine.launch import WorkerPool
from service.engine.request import GenerationRequest
from service.engine.supervisor import Supervisor
from service.errors import Unavailable
from service.observability.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing


class Engine:
    """Generates images on the event loop. Takes requests from `start` until `drain`."""

    def __init__(
        self, pool: WorkerPool, settings: Settings, metrics: Metrics, tracing: "Tracing | None" = None
    ) -> None:
        self.dispatcher = Dispatcher(settings, metrics, tracing)
        self.supervisor = Supervisor(pool, settings, metrics, self.dispatcher)
        self.catalog = ModelCatalog(settings, self.dispatcher, self.supervisor)
        self._draining = False

    @property
    def open(self) -> bool:
        """Whether it takes requests, also while a worker is being replaced."""
        return bool(self.catalog.models) and not self._draining

    @property
    def ready(self) -> bool:
        """Whether it takes requests and has a worker for them."""
        return self.open and bool(self.dispatcher.workers)

    def check_open(self) -> None:
        """Raise Unavailable unless requests are taken."""
        if not self.open:
            raise Unavailable("the server is starting or shutting down; ask another one")

    async def start(self) -> None:
        """Wait for every worker. Raises StartError when one cannot start."""
        for loaded in await self.supervisor.start():
            self.catalog.add(loaded)

    async def generate(
        self, request: GenerationRequest, handle: RequestHandle | None = None, *, patient: bool = False
    ) -> list[GeneratedImage]:
        """Return one image per seed. Cancelling drops the queued images that no other request waits for.

        `patient` waits until the queue has room for bulk requests, and then never raises Overloaded. `handle` tells
        whether a worker has begun. Raises Overloaded, without queueing anything, when the queue is full or the timeout
        cannot be met; TimedOut when it was not met; GenerationFailed for an image that the model fails on; NotFound for
        a model that is not loaded; InvalidRequest for an adapter that is not, or an unsupported number of steps;
        Unavailable while the engine starts or drains.
        """
        if patient:
            await self.dispatcher.wait_for_room(request)
        self.check_open()
        info = self.catalog.get(request.model)
        info.check(request.adapter, request.steps)
        return await self.dispatcher.generate(request, info, handle, admitted=patient)

    async def drain(self) -> None:
        """Refuse new requests, answer the accepted ones, and end the workers."""
        self._draining = True
        await self.dispatcher.drain()
        await self.supervisor.stop()
