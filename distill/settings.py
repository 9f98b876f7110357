"""The base class of a run's settings."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings: frozen, with known keys and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
