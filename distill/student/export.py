"""Export of a student: a folder that stock diffusers runs in one step, with the record `onestep.json` for serving."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError
from torch import Tensor

from distill.config import Lora
from distill.errors import CheckpointError, ConfigError, DivergedError, TeacherError
from distill.files import atomic_write, reason
from distill.models.sd3 import load_transformer
from distill.models.sd3_files import (
    COMPONENTS,
    DECODER,
    FORMAT,
    MODELS,
    RECORD,
    Weights,
    decoder_digest,
    find_weights,
    read_json,
    setting_files,
)
from distill.models.sd3_folder import SD3Folder
from distill.models.two_times import save_second_time, split
from distill.models.weights import first_nonfinite
from distill.student.card import card, license_of
from distill.student.place import check_place
from distill.versions import NAME, version_of

SHARD_SIZE = "5GB"


def export_student(
    teacher: SD3Folder,
    weights: Mapping[str, Tensor],
    out: Path,
    recipe: Mapping[str, Any],
    lora: Lora | None = None,
    dtype: torch.dtype = torch.float16,
    max_shard_size: str = SHARD_SIZE,
    license: str | None = None,
) -> Path:
    """Write the student of `teacher` to `out` atomically. Only an older student is replaced.

    `weights` is the state of the transformer or, with `lora`, of the adapter in peft's naming. With `lora` the folder
    holds the merged transformer, and also the adapter for `load_lora_weights`. Weights of a second time are written to
    their own file, which one-step sampling does not need. A small decoder of an older student in `out` is kept. Files
    larger than `max_shard_size` are split.

    `recipe` is copied to `onestep.json`: name, method and images_seen, and if known prompts, metrics and config. The
    license is that of the teacher's model card unless another is given.

    Raises ConfigError for an invalid size, OutputError if `out` holds other files than a student, DivergedError for
    weights that are not finite, and CheckpointError if writing fails.
    """
    check_size(max_shard_size)
    check_place(out, teacher.path)
    if (name := first_nonfinite(weights)) is not None:
        raise DivergedError(f"the student's {name} is not finite; export an earlier checkpoint with --checkpoint")
    weights, second = split(weights)
    named = license_of(teacher.path) if license is None else {"license": license}
    record = {
        "format": FORMAT,
        "start_time": 1.0,
        "image_size": teacher.image_size,
        "sizes": [[teacher.image_size, teacher.image_size]],
        "latent_shape": list(teacher.latent_shape),
        "vae_scale_factor": teacher.vae_scale_factor,
        "scaling_factor": teacher.scaling_factor,
        "shift_factor": teacher.shift_factor,
        "clip_length": teacher.clip_length,
        "max_sequence_length": teacher.max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "any_step": bool(second),
        "teacher": teacher.name,
        **({"teacher_revision": teacher.revision} if teacher.revision else {}),
        "teacher_digest": teacher.digest,
        **recipe,
        "made_with": {name: version_of(name) for name in (NAME, "diffusers", "torch")},
    }
    try:
        with atomic_write(out) as made:
            _copy_frozen(teacher, made)
            transformer = _transformer(teacher, weights, lora, made).to(dtype)
            if (name := first_nonfinite(transformer.state_dict())) is not None:
                raise DivergedError(f"the student's {name} is too large for {dtype}; export it with --dtype bf16")
            transformer.save_pretrained(made / "transformer", max_shard_size=max_shard_size)
            # diffusers writes the teacher's path into the configuration; the teacher's own file does not contain it.
            shutil.copyfile(teacher.path / "transformer" / "config.json", made / "transformer" / "config.json")
            if second:
                save_second_time(second, made)
            if (decoder := _small_decoder(out, teacher)) is not None:
                shutil.copytree(out / DECODER, made / DECODER)
                record["decoder"] = decoder
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            (made / "README.md").write_text(card(record, teacher, named, lora is not None), encoding="utf-8")
            check_place(out, teacher.path)  # again, because files may have been added in the meantime
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the student to {out}: {reason(error)}; free space and export again"
        ) from error
    return out


def check_size(max_shard_size: str) -> None:
    """Raise ConfigError for text that is not a file size."""
    size = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([KMGT])B", max_shard_size)
    if not size or float(size[1]) * 1000 ** "KMGT".index(size[2]) < 1:
        raise ConfigError(f"max_shard_size {max_shard_size!r} is not a size of at least 1KB; write it as 5GB or 500MB")


def _small_decoder(student: Path, teacher: SD3Folder) -> Any:
    """The record of the small decoder of an older student of this teacher; None without one that is complete."""
    try:
        record = read_json(student / RECORD)
        decoder, same = record["decoder"], record["teacher_digest"] == teacher.digest
        return decoder if same and decoder["digest"] == decoder_digest(student / DECODER) else None
    except (KeyError, OSError, TeacherError, TypeError):
        return None


def _copy_frozen(teacher: SD3Folder, made: Path) -> None:
    """Copy all files that are loaded, but for the transformer; names of variants lose their suffix."""
    made.mkdir()
    index = {name: kind for name, kind in teacher.index.items() if name != "_name_or_path"}
    for name, kind in index.items():
        if isinstance(kind, list) and (name not in COMPONENTS or kind[-1] is None):
            index[name] = [None, None]  # a component that is not loaded
        elif isinstance(kind, list) and name != "transformer":
            (made / name).mkdir()
            weights = find_weights(teacher.path / name) if name in MODELS else Weights(())
            ending = f".{weights.variant}"
            indices = () if weights.index is None else (weights.index,)
            for path in (*setting_files(teacher.path / name), *indices, *weights.files):
                renamed = weights.index in (None, path)
                shutil.copyfile(path, made / name / (path.name.replace(ending, "") if renamed else path.name))
    (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _transformer(folder: SD3Folder, weights: Mapping[str, Tensor], lora: Lora | None, made: Path) -> Any:
    """Build the student's transformer in fp32 with the adapter merged; also write the adapter to `made`."""
    transformer = load_transformer(folder)
    if lora is None:
        state = {**transformer.state_dict(), **{name: tensor.float() for name, tensor in weights.items()}}
        transformer.load_state_dict(state)  # buffers come from the teacher
        return transformer
    adapter = _scaled(weights, lora)
    StableDiffusion3Pipeline.save_lora_weights(made, transformer_lora_layers=adapter)
    state = StableDiffusion3Pipeline.lora_state_dict(made, local_files_only=True)
    transformer.load_lora_adapter(state, prefix="transformer")
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer


def _scaled(weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Multiply B by alpha / rank, so that the adapter's scale is 1.

    diffusers stores alpha in the file's metadata, and ComfyUI reads `.alpha` tensors but no metadata. If both are
    absent, every reader of the file assumes alpha = rank.
    """
    scale = lora.alpha / lora.rank
    return {
        name: (tensor.detach().cpu().float() * (scale if ".lora_B." in name else 1)).contiguous()
        for name, tensor in weights.items()
    }
