"""The model card of a student, written from its record: use, training, metrics and license."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from distill.models.sd3_folder import SD3Folder

_LICENSE = ("license", "license_name", "license_link")  # fields of the Hugging Face Hub
MAX_DESCRIPTION_CHARACTERS = 600
MAX_EXAMPLES = 12
MAX_EXAMPLE_CHARACTERS = 300  # longer ones are left out
_SETTINGS = ("method", "networks", "optimizer", "batch", "ema_half_life", "seed")  # keys of the run that are shown


def license_of(folder: Path) -> dict[str, str]:
    """Read the license from the card of a model folder, in the hub's fields; empty without a card or a license."""
    header, _ = _read(folder)
    return {key: str(header[key]) for key in _LICENSE if key in header}


def description_of(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Read the first paragraph of a model folder's card, as plain text, and its example prompts.

    The examples are the texts of `widget`, the hub's field for them, at most 12. Both are empty without a card.
    """
    header, text = _read(folder)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    first = next((part for part in paragraphs if part and part[0] not in "#|`<![-"), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first).replace("`", "").replace("**", "")
    widget = header.get("widget")
    texts = [each.get("text") for each in widget if isinstance(each, dict)] if isinstance(widget, list) else []
    examples = [each for each in texts if isinstance(each, str) and 0 < len(each) <= MAX_EXAMPLE_CHARACTERS]
    return plain[:MAX_DESCRIPTION_CHARACTERS], tuple(examples[:MAX_EXAMPLES])


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the YAML header of a folder's card and the text after it; both empty without a card."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if not text.startswith("---\n"):
        return {}, text
    head, _, text = text[4:].partition("\n---")
    try:
        header = yaml.safe_load(head)
    except (yaml.YAMLError, RecursionError):
        header = None
    return header if isinstance(header, dict) else {}, text.lstrip("-")


def card(record: Mapping[str, Any], folder: SD3Folder, license: Mapping[str, str], adapter: bool) -> str:
    """Write the card: a YAML header for the hub, then Markdown. `adapter`: the folder also holds the adapter."""
    base = {"base_model": folder.name} if folder.revision else {}  # the hub links to it
    width, height = record["sizes"][0]
    return (
        _environment()
        .get_template("card.jinja")
        .render(
            record=record,
            header={"library_name": "diffusers", "pipeline_tag": "text-to-image", **base, **license},
            settings={key: record["config"][key] for key in _SETTINGS} if record.get("config") else {},
            width=width,
            height=height,
            has_t5=folder.has_t5,
            adapter=adapter,
            license=license,
        )
    )


def decoder_card(
    config: Mapping[str, Any],
    folder: SD3Folder,
    parameters: int,
    images: int,
    metrics: Mapping[str, float],
) -> str:
    """Write the card of a small decoder that was distilled from the VAE of `folder`."""
    license = license_of(folder.path)
    shown = {key: value for key, value in config.items() if key not in ("kind", "model_digest")}
    return (
        _environment()
        .get_template("decoder_card.jinja")
        .render(
            config=config,
            header={"library_name": "diffusers", **license},
            settings=shown,
            channels=folder.latent_channels,
            factor=folder.vae_scale_factor,
            parameters=parameters,
            images=images,
            metrics=metrics,
            has_t5=folder.has_t5,
            license=license,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(yaml=partial(yaml.safe_dump, sort_keys=False), number=lambda count: f"{count:,}")
    return environment
