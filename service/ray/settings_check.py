"""Checks of the settings of replicas, which need no Ray."""

from service.errors import StartError
from service.settings import Settings

DEVICES = ("auto", "cpu", "cuda:0", "simulator")  # Ray gives each replica a GPU of its own, which it sees as the first


def check_settings(settings: Settings, address: str) -> None:
    """Raise StartError for settings that no replica of the cluster can have."""
    if settings.engine.devices not in DEVICES:
        raise StartError(f"engine.devices: a replica has one, {', '.join(DEVICES)}, and not {settings.engine.devices}")
    if settings.jobs.devices.startswith("cuda"):
        raise StartError(
            f"jobs.devices: a replica's GPU serves; run jobs on {settings.jobs.devices} by a server beside it"
        )
    if address != "local" and settings.images.artifacts is None:
        raise StartError(
            "images.artifacts: replicas on several machines need one store of linked images; name a folder"
        )
