"""`ConfigGroup`, the base class of configuration groups."""

from pydantic import BaseModel, ConfigDict


class ConfigGroup(BaseModel):
    """A group of settings: frozen, with known keys and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
