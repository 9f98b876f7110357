"""What the handlers of one app share."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.engine.backend import ModelInfo
from service.engine.engine import Engine
from service.engine.loaded_models import LoadedModelStore
from service.errors import no_model
from service.http.idempotency import IdempotencyStore
from service.http.keys import ApiKey, KeyFile, KeyReader
from service.http.rate_limiter import RateLimiter
from service.images.artifacts import Artifacts
from service.images.provenance import Signer
from service.images.safety import Checker
from service.jobs.jobs import Jobs
from service.observability.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing


@dataclass
class State:
    """`engine` takes work from when the models are loaded until the app drains. No `jobs`: nothing is kept."""

    settings: Settings
    metrics: Metrics
    encoders: ThreadPoolExecutor
    engine: Engine
    artifacts: Artifacts
    artifact_threads: ThreadPoolExecutor  # separate, so that a slow store of linked images occupies no other threads
    replays: IdempotencyStore
    limiter: RateLimiter
    checker: Checker | None  # of images before they are shown
    signer: Signer | None  # of encoded images
    jobs: Jobs | None
    tracing: "Tracing | None"
    loaded_models: LoadedModelStore
    sessions: int = 0  # realtime ones that are open

    def __post_init__(self) -> None:
        self._given = tuple(ApiKey.of_settings(key.get_secret_value()) for key in self.settings.api_keys)
        self._reader = KeyReader(KeyFile(self.settings.keys_file)) if self.settings.keys_file else None

    @property
    def guarded(self) -> bool:
        """Whether callers need a key: if one is set, or a key file is named, even an empty one."""
        return bool(self._given) or self._reader is not None

    async def keys(self) -> tuple[ApiKey, ...]:
        """The keys that are valid now. Raises Unavailable if they cannot be read."""
        return self._given + (await self._reader.read() if self._reader else ())

    def model(self, name: str | None) -> ModelInfo:
        """The model of that name or alias; the first one when none is named. Raises NotFound."""
        if name is None:
            return next(iter(self.engine.models.values()))
        info = self.engine.models.get(self.settings.aliases.get(name, name))
        if info is None:
            raise no_model(name)
        return info
