"""The model card of a student, written from its record: use, training, metrics and license."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.models.sd3_folder import RECORD, SD3Folder

_LICENSE = ("license", "license_name", "license_link")  # fields of the Hugging Face Hub


def license_of(folder: Path) -> dict[str, str]:
    """Read the license from the card of a model folder, in the hub's fields; empty without a card or a license."""
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
    """Write the card: a YAML header for the hub, then Markdown. `adapter`: the folder also holds the adapter."""
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **license}
    width, height = record["sizes"][0]
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {record["name"]}

A one-step student of `{record["teacher"]}`, distilled with {record["method"]} on {record["images_seen"]:,} samples.
It generates {width}x{height} pixels in one network evaluation, without guidance.

{"".join((*_use(record, folder, adapter), *_training(record), *_metrics(record), *_license(record, license)))}"""


def _use(record: Mapping[str, Any], folder: SD3Folder, adapter: bool) -> Iterator[str]:
    absent = "" if folder.has_t5 else ", text_encoder_3=None, tokenizer_3=None"
    name, (width, height), length = record["name"], record["sizes"][0], record["max_sequence_length"]
    yield f"""## Use

```python
from distill.pipeline import OneStepPipeline

images = OneStepPipeline.load("{name}")(["a prompt"], seeds=[0])  # uint8 (1, {height}, {width}, 3)
```

Stock diffusers gives the same images. It needs the text length:

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{name}"{absent})
image = pipeline(
    "a prompt", num_inference_steps=1, guidance_scale=0, height={height}, width={width}, max_sequence_length={length}
).images[0]
```

Prompts are cut to {record["clip_length"]} CLIP tokens, including the start and end tokens.
"""
    if record.get("any_step"):
        yield """
With this package, the student also samples in several steps, for example with `steps=4`.
"""
    if adapter:
        yield """
`pytorch_lora_weights.safetensors` is the same student as a LoRA adapter for its teacher. Load it with
`load_lora_weights` or with ComfyUI's LoRA loader at strength 1, and sample one step without guidance.
"""


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    prompts, config = record.get("prompts"), record.get("config")
    yield "\n## Training\n\n"
    if prompts:
        count = "" if prompts["count"] is None else f"{prompts['count']:,} distinct "
        yield f"Data: {count}prompts from `{prompts['source']}`.\n"
    if config:
        chosen = {key: config[key] for key in ("method", "networks", "optimizer", "batch", "ema_half_life", "seed")}
        yield f"Settings:\n\n```yaml\n{yaml.safe_dump(chosen, sort_keys=False)}```\n"
    yield f"`{RECORD}` contains the complete configuration.\n"


def _metrics(record: Mapping[str, Any]) -> Iterator[str]:
    metrics = record.get("metrics")
    if not metrics:
        return
    yield "\n## Metrics\n\nMeasured during training on a small set of prompts. A lower Frechet distance is better.\n\n"
    yield "| metric | value |\n|---|---|\n"
    for name, value in metrics.items():
        yield f"| {name.replace('_', ' ')} | {value:.4g} |\n"


def _license(record: Mapping[str, Any], license: Mapping[str, str]) -> Iterator[str]:
    yield "\n## License\n\nThe student is derived from its teacher's weights, so the teacher's license applies to it. "
    if license:
        link = f", {license['license_link']}" if "license_link" in license else ""
        yield f"License: {license.get('license_name', license.get('license', ''))}{link}.\n"
    else:
        yield f"See the license of `{record['teacher']}`.\n"
