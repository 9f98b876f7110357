"""The student folder: what stock diffusers runs in one step, and `onestep.json`, all that serving must know."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from distill import checkpoint
from distill.errors import CheckpointError
from distill.spec import RECORD, read_spec
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
    `recipe` goes into `onestep.json`: method, images_seen, config. Raises CheckpointError when the disk refuses.
    """
    spec = read_spec(teacher)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(
            spec.folder, aside, ignore=shutil.ignore_patterns(RECORD, "*-state", "latents-*", ".*", "*.md")
        )
        weight_files = sorted((aside / "transformer").glob("*.safetensors*"))
        transformer = _transformer(spec.folder, weights, lora, aside)
        for path in weight_files:
            path.unlink()
        transformer.to(dtype).save_pretrained(aside / "transformer")
        record = {
            "format": 1,
            "name": recipe.get("name", spec.name),
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
        for path in aside.rglob("*"):
            checkpoint.flush(path)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        aside.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not write the student to {out}: {error}; make room and export again"
        ) from error
    return out


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
    state, metadata = StableDiffusion3Pipeline.lora_state_dict(
        aside, return_lora_metadata=True, local_files_only=True
    )
    transformer.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer
