"""The student folder: what stock diffusers runs in one step, and `onestep.json`, all that serving must know."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError
from torch import Tensor

from distill import checkpoint
from distill.errors import CheckpointError
from distill.spec import RECORD, TeacherSpec, read_json, read_spec
from distill.teacher import load_transformer


def export_student(
    teacher: Path | str,
    weights: Mapping[str, Tensor],
    out: Path,
    recipe: Mapping[str, Any],
    lora: Any = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the student of `teacher` to `out`, replacing an older one only when it is whole.

    `weights` is the transformer's state, or, with `lora` its peft configuration, the adapter's in peft's naming: then
    the folder holds the merged transformer and, beside it, the adapter that `load_lora_weights` takes.
    `recipe` goes into `onestep.json`: name, method, images_seen, config. Raises CheckpointError when the disk refuses.
    """
    spec = read_spec(teacher)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _copy_frozen(spec.folder, aside)
        _transformer(spec.folder, weights, lora, aside).to(dtype).save_pretrained(aside / "transformer")
        # diffusers writes the path it loaded from into the configuration; the teacher's own is the same without it.
        shutil.copyfile(spec.folder / "transformer" / "config.json", aside / "transformer" / "config.json")
        record = {
            "format": 1,
            "start_time": 1.0,
            "image_size": spec.image_size,
            "latent_shape": list(spec.latent_shape),
            "vae_scale_factor": spec.vae_scale_factor,
            "scaling_factor": spec.scaling_factor,
            "shift_factor": spec.shift_factor,
            "clip_length": spec.clip_length,
            "max_sequence_length": spec.max_sequence_length,
            "dtype": str(dtype).removeprefix("torch."),
            "teacher": spec.name,
            "teacher_digest": spec.digest,
            **recipe,
            "made_with": {name: version(name) for name in ("flow-generator-matching", "diffusers", "torch")},
        }
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (aside / "README.md").write_text(_card(record, spec))
        for path in aside.rglob("*"):
            checkpoint.flush(path)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        aside.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not write the student to {out}: {error}; make room and export again") from error
    return out


def _copy_frozen(teacher: Path, aside: Path) -> None:
    """Copy what the student shares with its teacher: the pipeline's other parts, in the form that is loaded."""
    aside.mkdir(parents=True)
    shutil.copyfile(teacher / "model_index.json", aside / "model_index.json")
    for name, kind in read_json(teacher / "model_index.json").items():
        if isinstance(kind, list) and kind[-1] is not None and name != "transformer":
            others = shutil.ignore_patterns("*.bin", "*.fp16*.safetensors*", "*.msgpack", ".*")
            shutil.copytree(teacher / name, aside / name, ignore=others)


def _card(record: Mapping[str, Any], spec: TeacherSpec) -> str:
    """The model card."""
    absent = "" if spec.has_t5 else ", text_encoder_3=None, tokenizer_3=None"
    side, length = record["image_size"], record["max_sequence_length"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# {record["name"]}

A one-step student of `{record["teacher"]}`, distilled with {record["method"]} from its prompts alone over
{record["images_seen"]:,} images. It makes {side}x{side} pixels in one call of the network, without guidance.

```python
from distill.pipeline import OneStepPipeline

images = OneStepPipeline.load("{record["name"]}")(["a prompt"], seeds=[0])  # uint8 (1, {side}, {side}, 3)
```

The same in stock diffusers, where the text length must be given:

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{record["name"]}"{absent})
image = pipeline(
    "a prompt", num_inference_steps=1, guidance_scale=0, height={side}, width={side}, max_sequence_length={length}
).images[0]
```

Prompts of more than {record["clip_length"]} CLIP tokens, start and end included, are cut. Everything else about it,
with the whole recipe, is in `{RECORD}`.
"""


def _transformer(folder: Path, weights: Mapping[str, Tensor], lora: Any, aside: Path) -> Any:
    """The student's transformer in fp32, adapter merged; writes the adapter beside it."""
    transformer = load_transformer(folder)
    if lora is None:
        state = {**transformer.state_dict(), **{name: tensor.float() for name, tensor in weights.items()}}
        transformer.load_state_dict(state)  # buffers are the teacher's
        return transformer
    adapter = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(
        aside, transformer_lora_layers=adapter, transformer_lora_adapter_metadata=lora.to_dict()
    )
    state, metadata = StableDiffusion3Pipeline.lora_state_dict(aside, return_lora_metadata=True, local_files_only=True)
    transformer.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer
