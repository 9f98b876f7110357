"""The decoders of a student: its VAE, and a small decoder in `decoder/`, named by its digest in `onestep.json`."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from distill.errors import ConfigError, OutputError, TeacherError
from distill.files import atomic_write, atomic_write_text
from distill.models.sd3 import load_vae
from distill.models.sd3_files import DECODER, DECODER_CONFIG, DECODER_WEIGHTS, RECORD, decoder_digest, read_json
from distill.models.sd3_folder import SD3Folder
from distill.models.small_decoder import load_small_decoder
from distill.options import DecoderChoice
from distill.student.spec import OneStepSpec

README = "README.md"
FILES = (DECODER_CONFIG, DECODER_WEIGHTS, README)  # of a small decoder
Default = Literal["full", "small"]


def check_decoder_place(student: Path, replacing: str | None = None) -> None:
    """Raise OutputError unless a student folder has no small decoder, or one that `add_decoder` may replace.

    That is the one which its record names, without other files, or that of the digest `replacing`.
    """
    path = student / DECODER
    if not os.access(student, os.W_OK):
        raise OutputError(f"{student} cannot be written; name a copy of the student with --student")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} is in the place of the small decoder; move it away, or name another student")
    check_decoder_files(path)
    if not path.exists() or not any(path.iterdir()):
        return
    try:
        named = (read_json(student / RECORD).get("decoder") or {}).get("digest")
        known = decoder_digest(path) in (named, replacing)
    except (AttributeError, OSError, TeacherError):
        known = False
    if not known:
        raise OutputError(
            f"{path} is not the decoder that {RECORD} names, so it is not replaced; move it away, or name another "
            "student"
        )


def check_decoder_files(decoder: Path) -> None:
    """Raise OutputError if a folder that is going to be replaced holds more than a small decoder."""
    held = sorted(file for file in decoder.rglob("*") if file.name not in FILES) if decoder.exists() else []
    if held:
        raise OutputError(f"{held[0]} is not a part of a small decoder; move it away, or name another folder")


def add_decoder(student: Path, decoder: Path, default: Default, metrics: Mapping[str, float]) -> None:
    """Copy a small decoder into a student folder and name it in the record, with its default and its metrics.

    An older one is replaced. The decoder is written first: until the record names it, `small` is refused. Raises
    OutputError for a decoder that is not this program's, and OSError.
    """
    digest = decoder_digest(decoder)
    check_decoder_place(student, digest)
    record = read_json(student / RECORD)
    with atomic_write(student / DECODER) as made:
        made.mkdir()
        for name in FILES:
            if (decoder / name).exists():
                shutil.copyfile(decoder / name, made / name)
    record["decoder"] = {"default": default, "digest": digest, "metrics": dict(metrics)}
    atomic_write_text(student / RECORD, json.dumps(record, indent=2) + "\n")


def load_decoder(
    folder: SD3Folder, spec: OneStepSpec, decoder: DecoderChoice, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderKL | AutoencoderTiny, str | None]:
    """Load the decoder of `RuntimeOptions`, and its digest if it is a small one. Raises ConfigError naming the option.

    The student's own small decoder has to be the one that its record names.
    """
    if decoder == "auto":
        decoder = spec.decoder
    if decoder == "full":
        return load_vae(folder, dtype, device), None
    own = decoder == "small"
    if own:
        spec.check_small_decoder()
    path = folder.path / DECODER if own else Path(decoder)
    if own and digest_of(path) != spec.small_decoder:
        raise ConfigError(
            f"decoder small: {path} is damaged or not the one that {RECORD} names; remove it and add it again with "
            "`distill decoder`, or take full"
        )
    return load_small_decoder(path, spec.latent_channels, spec.vae_scale_factor, dtype, device)


def digest_of(decoder: Path) -> str | None:
    """The digest of a small decoder; None if files are missing."""
    try:
        return decoder_digest(decoder)
    except OSError:
        return None
