"""Presets of `distill run`, one YAML file each. Importing this module imports no torch."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
# Defaults of `RunConfig` for keys that a preset may leave out. A server lists presets without importing that class.
METHOD, IMAGES, BATCH = "fgm", 100_000, 128


def names() -> list[str]:
    """List the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """Return the keys of a preset; keys that it lacks have the defaults of `RunConfig`."""
    values: dict[str, Any] = yaml.safe_load(_text(name))
    return values


def summary(name: str) -> str:
    """Return the first sentence of the comment that a preset begins with."""
    lines = _text(name).splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]).partition(". ")[0].rstrip(".")


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
