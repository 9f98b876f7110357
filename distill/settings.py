"""What all settings of a run have in common."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings: frozen, without unknown keys, and without numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
