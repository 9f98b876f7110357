"""The model card of a student, written from its record: what it was made of, how good it was found, how to use it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.models.sd3_folder import RECORD, SD3Folder

_LICENSE = ("license", "license_name", "license_link")  # the hub's own fields


def license_of(folder: Path) -> dict[str, str]:
    """The license that a model folder's card names, in the hub's fields; nothing without a card or a license."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError):
        return {}
    return {key: str(header[key]) for key in _LICENSE if key in header} if isinstance(header, dict) else {}


def card(record: Mapping[str, Any], folder: SD3Folder, license: Mapping[str, str], adapter: bool) -> str:
    """The card as text: a YAML header for the hub, then Markdown. `adapter` says whether the folder holds one too."""
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **license}
    width, height = record["sizes"][0]
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {record["name"]}

A one-step student of `{record["teacher"]}`, distilled with {record["method"]} over {record["images_seen"]:,} images.
It makes {width}x{height} pixels in one call of the network, without guidance.

{"".join((*_use(record, folder, adapter), *_made_of(record), *_metrics(record), *_license(record, license)))}"""


def _use(record: Mapping[str, Any], folder: SD3Folder, adapter: bool) -> Iterator[str]:
    absent = "" if folder.has_t5 else ", text_encoder_3=None, tokenizer_3=None"
    name, (width, height), length = record["name"], record["sizes"][0], record["max_sequence_length"]
    yield f"""## Use

```python
from distill.pipeline import OneStepPipeline

images = OneStepPipeline.load("{name}")(["a prompt"], seeds=[0])  # uint8 (1, {height}, {width}, 3)
```

The same in stock diffusers, where the text length must be given:

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{name}"{absent})
image = pipeline(
    "a prompt", num_inference_steps=1, guidance_scale=0, height={height}, width={width}, max_sequence_length={length}
).images[0]
```

Prompts of more than {record["clip_length"]} CLIP tokens, start and end included, are cut.
"""
    if record.get("any_step"):
        yield """
It takes any number of steps, through this package alone: call it with `steps=4`.
"""
    if adapter:
        yield """
`pytorch_lora_weights.safetensors` is the same student as an adapter of its teacher, for `load_lora_weights` and for
ComfyUI's LoRA loader at strength 1; one step, no guidance.
"""


def _made_of(record: Mapping[str, Any]) -> Iterator[str]:
    prompts, config = record.get("prompts"), record.get("config")
    yield "\n## How it was made\n\n"
    if prompts:
        count = "" if prompts["count"] is None else f"{prompts['count']:,} different "
        yield f"Data: {count}prompts of `{prompts['source']}`.\n"
    if config:
        chosen = {key: config[key] for key in ("method", "networks", "optimizer", "batch", "ema_half_life", "seed")}
        yield f"Settings:\n\n```yaml\n{yaml.safe_dump(chosen, sort_keys=False)}```\n"
    yield f"Everything else about it, with the whole recipe, is in `{RECORD}`.\n"


def _metrics(record: Mapping[str, Any]) -> Iterator[str]:
    metrics = record.get("metrics")
    if not metrics:
        return
    yield "\n## Metrics\n\nAs it was judged while it was trained, on few prompts; a Frechet distance is better low.\n\n"
    yield "| figure | value |\n|---|---|\n"
    for name, value in metrics.items():
        yield f"| {name.replace('_', ' ')} | {value:.4g} |\n"


def _license(record: Mapping[str, Any], license: Mapping[str, str]) -> Iterator[str]:
    yield "\n## License\n\nA student is made of its teacher's weights: the teacher's license holds for it too. "
    if license:
        link = f", {license['license_link']}" if "license_link" in license else ""
        yield f"This one is under {license.get('license_name', license.get('license', ''))}{link}.\n"
    else:
        yield f"See that of `{record['teacher']}`.\n"
