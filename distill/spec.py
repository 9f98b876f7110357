"""The Stable Diffusion 3 folder, read without torch: is it whole, is it what we take it for, and what are its numbers.

Weights are only ever safetensors; a header says how long its file must be, so a cut-off download is found here and not
in the middle of a run.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import SizeError, TeacherError

RECORD = "onestep.json"  # beside a teacher: what stock files cannot say; beside a student: all that serving must know
FORMAT = 1  # of a student's record; another number is refused

_PIPELINE = "StableDiffusion3Pipeline"
_MODELS = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
_OTHERS = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "tokenizer": None,
    "tokenizer_2": None,
    "tokenizer_3": None,
}
COMPONENTS = (*_MODELS, *_OTHERS)  # folders of a pipeline
_OPTIONAL = {"text_encoder_3", "tokenizer_3"}
_SCHEDULES = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
              "use_beta_sigmas", "stochastic_sampling")  # fmt: skip
_SAMPLED_BYTES = 4096

_STOCK_SEQUENCE_LENGTH = 256
_STOCK_GUIDANCE = 7.0


@dataclass(frozen=True)
class TeacherSpec:
    """Numbers of an SD3 folder. Latent sizes are in latent pixels, image sizes in image pixels."""

    folder: Path
    digest: str  # identity of configurations and weights, for caches and cards
    parameters: int  # of the transformer
    latent_channels: int
    sample_size: int  # native height and width of the latents
    patch_size: int
    pos_embed_max_size: int  # side of the position table, in patches
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

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

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


def read_spec(folder: Path | str) -> TeacherSpec:
    """Check the folder and read its numbers; costs milliseconds, whatever the model's size.

    Raises TeacherError when it is missing, lacks a file, has a truncated one, or is another kind of pipeline.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise TeacherError(f"{folder} is not a folder; give the path of a {_PIPELINE} folder")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != _PIPELINE:
        raise TeacherError(f"{folder} holds a {index.get('_class_name')}, but only a {_PIPELINE} can be used")
    present = {name: kind for name, kind in {**_MODELS, **_OTHERS}.items() if _is_present(folder, index, name, kind)}
    if ("text_encoder_3" in present) != ("tokenizer_3" in present):
        raise TeacherError(
            f"{folder}/model_index.json names only one of text_encoder_3 and tokenizer_3; name both or none"
        )

    identity = hashlib.sha256()
    for path in sorted(
        path for name in present for path in (folder / name).iterdir() if path.suffix in {".json", ".txt"}
    ):
        identity.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    parameters = {}
    for name in sorted(present.keys() & _MODELS.keys()):
        parameters[name] = sum(_check_weights(path, identity) for path in _weight_files(folder / name))

    transformer, vae = (read_json(folder / name / "config.json") for name in ("transformer", "vae"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    for key in _SCHEDULES:
        if scheduler.get(key):
            raise TeacherError(f"{folder}/scheduler/scheduler_config.json sets {key}; only a static shift is supported")
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    try:
        return TeacherSpec(
            folder=folder,
            digest=identity.hexdigest(),
            parameters=parameters["transformer"],
            latent_channels=int(transformer["in_channels"]),
            sample_size=int(transformer["sample_size"]),
            patch_size=int(transformer["patch_size"]),
            pos_embed_max_size=int(transformer["pos_embed_max_size"]),
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
    except KeyError as missing:
        raise TeacherError(f"{folder}: a component's configuration lacks {missing}; save the pipeline again") from None
    except (TypeError, ValueError) as error:
        raise TeacherError(
            f"{folder}: a component's configuration is not usable: {error}; save the pipeline again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises TeacherError when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{path} is missing; the folder is not a whole {_PIPELINE}") from None
    except (ValueError, OSError) as error:
        raise TeacherError(f"{path} cannot be read as JSON ({error}); fetch or export the folder again") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path} does not hold a JSON object; fetch or export the folder again")
    return value


def _is_present(folder: Path, index: dict[str, Any], name: str, expected: str | None) -> bool:
    """Whether a component is part of the pipeline; an expected class that differs is an error."""
    kind = (index.get(name) or [None, None])[-1]
    if kind is None and name in _OPTIONAL:
        return False
    if kind is None or (expected is not None and kind != expected):
        raise TeacherError(
            f"{folder}/model_index.json has {kind} as {name}, but a {_PIPELINE} needs {expected or 'one'}"
        )
    if not (folder / name).is_dir():
        raise TeacherError(f"{folder / name} is missing; the folder is not a whole {_PIPELINE}")
    return True


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, one or the shards that its index names."""
    indexes = sorted(folder.glob("*model.safetensors.index.json"))
    if indexes:
        shards = read_json(indexes[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
            raise TeacherError(
                f"{indexes[0]} does not map tensors to files beside it; fetch or export the folder again"
            )
        return [folder / name for name in sorted(set(shards.values()))]
    files = sorted(folder.glob("*model.safetensors"))
    if not files:
        raise TeacherError(f"{folder} has no model.safetensors; only safetensors weights are loaded")
    return files[:1]


def _check_weights(path: Path, identity: "hashlib._Hash") -> int:
    """Count a file's parameters and add it to the identity: its header, and the first bytes of every tensor.

    Fine-tuning moves all values of the tensors it trains, so their first ones tell two models apart without
    reading them whole.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(length)
            tensors = [entry for key, entry in json.loads(header).items() if key != "__metadata__"]
            ends = [entry["data_offsets"][1] for entry in tensors]
            if size != 8 + length + max(ends, default=0):
                raise TeacherError(f"{path} is {size} bytes long, not the {8 + length + max(ends, default=0)} of its "
                                   "header; it is truncated, so fetch or export it again")  # fmt: skip
            identity.update(header)
            for begin, end in sorted(entry["data_offsets"] for entry in tensors):
                file.seek(8 + length + begin)
                identity.update(file.read(min(_SAMPLED_BYTES, end - begin)))
    except FileNotFoundError:
        raise TeacherError(f"{path} is missing; the folder is not a whole {_PIPELINE}") from None
    except (struct.error, ValueError, KeyError, MemoryError) as error:
        raise TeacherError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None
    return sum(_product(entry["shape"]) for entry in tensors)


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
