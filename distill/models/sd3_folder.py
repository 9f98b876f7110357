"""Reads and checks a Stable Diffusion 3 folder without torch: its files, its kind and its numbers.

Weights are always safetensors. Their header has the length of the file, so a truncated download is found here and not
in the middle of a run.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from distill.errors import SizeError, TeacherError
from distill.models.sd3_files import (
    CLASSES,
    INDEX,
    MODELS,
    OPTIONAL,
    PIPELINE,
    POINTER,
    RECORD,
    SENTENCEPIECE,
    check_pointer,
    find_weights,
    missing,
    present_components,
    read_bytes,
    read_json,
    setting_files,
)

_WORDS = {  # files of a tokenizer's vocabulary if there is no tokenizer.json
    "tokenizer": ("vocab.json", "merges.txt"),
    "tokenizer_2": ("vocab.json", "merges.txt"),
    "tokenizer_3": (SENTENCEPIECE,),
}
PLAIN_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}  # safetensors' names; others are quantized
# Settings without effect under a static shift. Any other setting of a scheduler that is on changes its times.
_WITHOUT_EFFECT = {"base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "time_shift_type"}
_TRAIN_TIMESTEPS = 1000
_SAMPLED_BYTES = 4096

_STOCK_SEQUENCE_LENGTH = 256
_STOCK_GUIDANCE = 7.0


@dataclass(frozen=True)
class SD3Folder:
    """A checked SD3 folder and its numbers. Latent sizes are in latent pixels, image sizes in image pixels.

    `read` costs milliseconds, whatever the model's size. A program reads a folder once and passes this value on.
    """

    path: Path
    name: str  # shown to people: the folder's, or `owner/name` of the hub
    revision: str | None  # commit of a model of the hub
    index: Mapping[str, Any] = field(repr=False)  # of model_index.json
    digest: str  # identity of the files that are loaded, wherever they are; for caches and cards
    parameters: int  # of the transformer
    latent_channels: int
    sample_size: int  # native height and width of the latents
    patch_size: int
    pos_embed_max_size: int  # side of the position table, in patches
    layers: int  # transformer blocks
    vae_scale_factor: int
    scaling_factor: float
    shift_factor: float
    joint_dim: int
    pooled_dim: int
    clip_length: int  # CLIP tokens of every prompt, start and end included
    max_sequence_length: int  # T5 tokens after them, zeros where T5 is absent
    has_t5: bool
    shift: float  # the scheduler's static time shift
    guidance: float  # scale to sample the teacher with

    @classmethod
    def read(
        cls,
        path: Path | str,
        name: str | None = None,
        revision: str | None = None,
        weights: Collection[str] = tuple(MODELS),
    ) -> Self:
        """Check a folder and read its numbers. The model has the folder's name unless another is given.

        Of the components that are not in `weights`, the folder may lack the weights. They do not count in `digest` and
        `parameters` then.

        Raises TeacherError when it is missing, lacks a file, has a truncated one, is another kind of pipeline, or has
        settings that the sampler here does not follow.
        """
        folder = Path(os.path.expanduser(path)).resolve()
        if not folder.is_dir():
            raise TeacherError(f"{folder} is not a folder; give the path of a {PIPELINE} folder")
        index = read_json(folder / INDEX)
        present = present_components(index, str(folder))
        for part in present:
            if not (folder / part).is_dir():
                raise _missing_component(folder / part)

        identity = hashlib.sha256()
        loaded = sorted(MODELS.keys() & present & set(weights))
        files = {part: find_weights(folder / part) for part in loaded}
        indices = [each.index for each in files.values() if each.index is not None]
        for file in sorted([*indices, *(file for part in present for file in setting_files(folder / part))]):
            content = read_bytes(file)
            identity.update(file.relative_to(folder).as_posix().encode() + content)
        for part in sorted(_WORDS.keys() & present):
            _check_words(folder / part)
        parameters = {part: sum(check_weights(path, identity) for path in each.files) for part, each in files.items()}

        configs = {part: read_json(folder / part / "config.json") for part in present if part in MODELS}
        for part, config in configs.items():
            _check_class(folder / part / "config.json", config, part)
        transformer, vae = configs["transformer"], configs["vae"]
        scheduler = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
        record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
        try:
            found = cls(
                path=folder,
                name=name or _name_of(folder),
                revision=revision,
                index=index,
                digest=identity.hexdigest(),
                parameters=parameters.get("transformer", 0),
                latent_channels=int(transformer["in_channels"]),
                sample_size=int(transformer["sample_size"]),
                patch_size=int(transformer["patch_size"]),
                pos_embed_max_size=int(transformer["pos_embed_max_size"]),
                layers=int(transformer["num_layers"]),
                vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
                scaling_factor=float(vae["scaling_factor"]),
                shift_factor=float(vae["shift_factor"]),
                joint_dim=int(transformer["joint_attention_dim"]),
                pooled_dim=int(transformer["pooled_projection_dim"]),
                clip_length=int(read_json(folder / "tokenizer" / "tokenizer_config.json")["model_max_length"]),
                max_sequence_length=int(record.get("max_sequence_length", _STOCK_SEQUENCE_LENGTH)),
                has_t5="text_encoder_3" in present,
                shift=float(scheduler["shift"]),
                guidance=float(record.get("guidance", _STOCK_GUIDANCE)),
            )
            _check_numbers(found, configs)
            return found
        except KeyError as missing:
            raise TeacherError(
                f"{folder}: a component's configuration lacks {missing}; save the pipeline again"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise TeacherError(
                f"{folder}: a component's configuration is not usable: {error}; save the pipeline again"
            ) from None

    @property
    def reference(self) -> str:
        """The name, with the commit of a model of the hub, as `teacher` of a configuration names it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def image_size(self) -> int:
        """Native height and width in image pixels."""
        return self.sample_size * self.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the native size."""
        return self.latent_channels, self.sample_size, self.sample_size

    def latent_shape_of(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of another size in image pixels. Raises SizeError for one that the model cannot make."""
        check_size(width, height, self.vae_scale_factor * self.patch_size, self.pos_embed_max_size, self.name)
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def with_sequence_length(self, length: int | None) -> Self:
        """The same folder with another number of T5 tokens for each prompt; None keeps its own."""
        return self if length is None else replace(self, max_sequence_length=length)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(L, D) of an encoded prompt."""
        return self.clip_length + self.max_sequence_length, self.joint_dim


def check_size(width: int, height: int, unit: int, patches: int, name: str) -> None:
    """Raise SizeError unless both sides are whole patches of `unit` image pixels, and at most `patches` of them."""
    for side in (width, height):
        if side % unit or not 0 < side <= unit * patches:
            raise SizeError(
                f"{name} cannot make images of {width}x{height}: a side must be a multiple of {unit} up to "
                f"{unit * patches}"
            )


def _name_of(folder: Path) -> str:
    """The folder's name, or what the hub's cache calls the model of a revision."""
    owner = folder.parent.parent.name
    if folder.parent.name == "snapshots" and owner.startswith("models--"):
        return owner.rpartition("--")[2]
    if re.fullmatch(r"[0-9a-f]{40}", folder.name):  # a revision by itself
        return f"sd3-{folder.name[:8]}"
    return folder.name


def _missing_component(path: Path) -> TeacherError:
    """The error for a component that `model_index.json` names and the folder lacks."""
    leave = f", or set {' and '.join(OPTIONAL)} to [null, null] in {INDEX} to go without T5"
    return TeacherError(f"{missing(path)}: fetch it{leave if path.name in OPTIONAL else ''}")


def _read_scheduler(path: Path) -> dict[str, Any]:
    """A scheduler's configuration. Raises TeacherError if its times are not those of a static shift."""
    scheduler = read_json(path)
    _check_class(path, scheduler, "scheduler")
    steps = scheduler.get("num_train_timesteps", _TRAIN_TIMESTEPS)
    if steps != _TRAIN_TIMESTEPS:
        raise TeacherError(f"{path} sets num_train_timesteps to {steps}; only {_TRAIN_TIMESTEPS} is supported")
    for key, value in scheduler.items():
        if value and not key.startswith("_") and key not in {"num_train_timesteps", "shift", *_WITHOUT_EFFECT}:
            raise TeacherError(f"{path} sets {key}; only a static shift is supported")
    return scheduler


def _check_class(path: Path, config: Mapping[str, Any], name: str) -> None:
    """Raise TeacherError unless a component's configuration names the expected class and unquantized weights."""
    expected = CLASSES[name]
    named = config.get("_class_name", config.get("architectures"))
    if named is not None and expected not in (named if isinstance(named, list) else [named]):
        raise TeacherError(f"{path} is of a {named}, but {expected} is what can be used as {name}")
    if config.get("quantization_config"):
        raise TeacherError(f"{path} is of quantized weights, which cannot be distilled; give the plain model")


def _check_numbers(folder: SD3Folder, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for impossible numbers and for components that do not fit together."""
    clips = [configs["text_encoder"], configs["text_encoder_2"]]  # a configuration omits default values
    hidden, pooled, positions = (
        [int(clip.get(key, default)) for clip in clips]
        for key, default in (("hidden_size", 512), ("projection_dim", 512), ("max_position_embeddings", 77))
    )
    vae, transformer = configs["vae"], configs["transformer"]
    out = transformer.get("out_channels")
    t5 = int(configs["text_encoder_3"].get("d_model", 512)) if folder.has_t5 else folder.joint_dim
    sizes = (folder.latent_channels, folder.sample_size, folder.patch_size, folder.joint_dim, folder.pooled_dim)
    checks = {
        "a size is not positive": min(*sizes, folder.layers, folder.clip_length) > 0,
        "scaling_factor is not a positive number": 0 < folder.scaling_factor < math.inf,
        "shift_factor is not a number": math.isfinite(folder.shift_factor),
        "the scheduler's shift is not a positive number": 0 < folder.shift < math.inf,
        "guidance is not a number from 1 to 100": 1 <= folder.guidance <= 100,
        "max_sequence_length is negative": folder.max_sequence_length >= 0,
        "the vae's latent_channels are not the transformer's in_channels": vae.get("latent_channels", 4)
        == folder.latent_channels,
        "the transformer's out_channels are not its in_channels": out in (None, folder.latent_channels),
        "the vae's images are not RGB": (vae.get("in_channels", 3), vae.get("out_channels", 3)) == (3, 3),
        "sample_size is over pos_embed_max_size": folder.sample_size <= folder.patch_size * folder.pos_embed_max_size,
        "pooled_projection_dim is not the sum of the CLIPs' projection_dim": sum(pooled) == folder.pooled_dim,
        "joint_attention_dim is less than the CLIPs' hidden_size": sum(hidden) <= folder.joint_dim,
        "joint_attention_dim is not T5's d_model": t5 == folder.joint_dim,
        "the tokenizer's model_max_length is over the CLIPs' positions": folder.clip_length <= min(positions),
    }
    for what, holds in checks.items():
        if not holds:
            raise ValueError(what)


def _check_words(folder: Path) -> None:
    """Raise TeacherError for a tokenizer without a vocabulary, which would encode all prompts alike."""
    words = _WORDS[folder.name]
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in words):
        raise TeacherError(f"{folder} has neither tokenizer.json nor {' and '.join(words)}; fetch or export it again")


def check_weights(path: Path, identity: "hashlib._Hash", replaced: str | None = None) -> int:
    """Count a file's parameters and add it to the identity: its header, and the first bytes of every tensor.

    Only tensors whose names begin with `replaced` may be quantized.

    Fine-tuning moves all values of the tensors it trains, so their first ones tell two models apart without
    reading them whole.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            check_pointer(file.read(len(POINTER)), path)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(length)
            named = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            tensors = list(named.values())
            ends = [entry["data_offsets"][1] for entry in tensors]
            loaded = [name for name in named if replaced is None or not name.startswith(replaced)]
            if packed := {named[name]["dtype"] for name in loaded} - PLAIN_DTYPES:
                raise TeacherError(
                    f"{path} holds quantized weights ({packed.pop()}), which cannot be distilled; give the plain model"
                )
            if size != 8 + length + max(ends, default=0):
                raise TeacherError(f"{path} is {size} bytes long, not the {8 + length + max(ends, default=0)} of its "
                                   "header; it is truncated, so fetch or export it again")  # fmt: skip
            identity.update(header)
            for begin, end in sorted(entry["data_offsets"] for entry in tensors):
                file.seek(8 + length + begin)
                identity.update(file.read(min(_SAMPLED_BYTES, end - begin)))
    except FileNotFoundError:
        raise TeacherError(missing(path)) from None
    except (struct.error, ValueError, KeyError, MemoryError, RecursionError) as error:
        raise TeacherError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None
    return sum(math.prod(entry["shape"]) for entry in tensors)
