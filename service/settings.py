"""Settings of the server: command line, then `SERVICE_*` environment variables, then these defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from service.errors import StartError

_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
_Bytes = Annotated[int, Field(ge=0)]


class Settings(BaseSettings):
    """Everything that `create_app` depends on. Lists are JSON in the environment: SERVICE_MODELS='["a", "b"]'."""

    model_config = SettingsConfigDict(env_prefix="SERVICE_", frozen=True, extra="forbid")

    models: tuple[Path, ...] = ()  # student folders; none is the student that ships
    devices: str = "auto"  # cpu, simulator, or GPUs as cuda:0,cuda:1; auto is the first GPU, or the CPU
    replicas: _Count = 1  # workers on each device
    max_batch: _Count = 16  # images in one call of the network
    queue_limit: Annotated[int, Field(ge=10)] = 512  # images waiting at most; the largest request must fit
    queue_limit_per_key: Annotated[int, Field(ge=10)] | None = None  # the same for each API key; none is no less
    timeout_seconds: _Seconds = 60.0  # from arrival to answer, where a request does not say; refused if it cannot be
    linger_seconds: Annotated[float, Field(ge=0)] = 0.0  # what a lone image waits for company while nothing runs
    worker_silence_seconds: _Seconds = 30.0  # a worker that says nothing for so long is replaced
    batch_timeout_seconds: _Seconds = 120.0  # a worker whose batch takes longer is replaced
    prompt_cache_bytes: _Bytes = 256 << 20  # embeddings of prompts that a worker keeps for each model
    result_cache_bytes: _Bytes = 64 << 20  # images kept for requests of the same prompt, seed and size
    encode_threads: _Count = 2
    max_body_bytes: _Count = 1 << 20
    api_keys: tuple[SecretStr, ...] = ()  # none leaves the server open
    drain_seconds: _Count = 30  # time that running requests get after SIGTERM


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings with some given. Raises StartError naming the environment variable that is wrong."""
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key
        name = "_".join(str(part) for part in first["loc"][:1]).upper()
        raise StartError(f"SERVICE_{name}: {first['msg']}") from None
    except SettingsError as error:
        raise StartError(f'{error}; lists are JSON, for example SERVICE_API_KEYS=\'["one", "two"]\'') from None
