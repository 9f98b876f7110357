"""Settings of the server: command line, then `SERVICE_*` environment variables, then these defaults."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

_Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Everything that `create_app` depends on. Lists are JSON in the environment: SERVICE_MODELS='["a", "b"]'."""

    model_config = SettingsConfigDict(env_prefix="SERVICE_", frozen=True, extra="forbid")

    models: tuple[Path, ...] = ()  # student folders; none is the student that ships
    device: str = "auto"  # auto, cpu, cuda, cuda:1, or simulator
    max_batch: _Count = 16  # images in one call of the network
    queue_limit: _Count = 512  # images waiting, over which requests are refused
    encode_threads: _Count = 2
    max_body_bytes: _Count = 1 << 20
    api_keys: tuple[SecretStr, ...] = ()  # none leaves the server open
    drain_seconds: _Count = 30  # time that running requests get after SIGTERM
