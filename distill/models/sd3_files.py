"""The files of a Stable Diffusion 3 pipeline: which are loaded, by name here and on the hub, and how JSON is read."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import ConfigError, TeacherError

PIPELINE = "StableDiffusion3Pipeline"
INDEX = "model_index.json"
RECORD = "onestep.json"  # beside a teacher: what stock files cannot say; beside a student: all that serving must know
DECODER = "decoder"  # folder of a student's small decoder
DECODER_CONFIG, DECODER_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
SMALL_DECODER = "AutoencoderTiny"  # its class
FORMAT = 1  # of a student's record; another number is refused
MODELS = {  # components with weights, and their classes
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
CLASSES = MODELS | {"scheduler": "FlowMatchEulerDiscreteScheduler"}
COMPONENTS = (*CLASSES, "tokenizer", "tokenizer_2", "tokenizer_3")  # folders of a pipeline
OPTIONAL = ("text_encoder_3", "tokenizer_3")
_CONFIG_FILES = ("config.json", "scheduler_config.json")
_TOKENIZER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
                    "tokenizer_config.json", "vocab.json")  # fmt: skip
SENTENCEPIECE = "spiece.model"  # of T5; read if there is no tokenizer.json
_VARIANTS = (None, "fp16", "bf16")  # in file names, in order of preference
POINTER = b"version https://git-lfs.github.com/spec/"


def present_components(index: Mapping[str, Any], where: str) -> list[str]:
    """The components that the `model_index.json` of `where` names. Raises TeacherError unless it is an SD3's."""
    if index.get("_class_name") != PIPELINE:
        raise TeacherError(f"{where} holds a {index.get('_class_name')}, but only a {PIPELINE} can be used")
    present = []
    for name in COMPONENTS:
        entry = index.get(name) or [None, None]
        if not isinstance(entry, list):
            raise TeacherError(f"{where}/{INDEX} has {entry!r} as {name}, not a library and a class")
        kind, expected = entry[-1], CLASSES.get(name)
        if kind is None and name in OPTIONAL:
            continue
        if kind is None or (expected is not None and kind != expected):
            raise TeacherError(f"{where}/{INDEX} has {kind} as {name}, but a {PIPELINE} needs {expected or 'one'}")
        present.append(name)
    if len(set(OPTIONAL) & set(present)) == 1:
        raise TeacherError(f"{where}/{INDEX} names only one of {' and '.join(OPTIONAL)}; name both or none")
    return present


def setting_names(component: str, names: Collection[str]) -> list[str]:
    """The files among `names` that are loaded besides weights: the configuration, or the vocabulary."""
    if not component.startswith("tokenizer"):
        return [name for name in _CONFIG_FILES if name in names]
    others = () if "tokenizer.json" in names else (SENTENCEPIECE,)
    return [name for name in (*_TOKENIZER_FILES, *others) if name in names]


def weights_name(component: str, names: Collection[str]) -> tuple[str, str | None]:
    """The file among `names` that a component's weights are loaded by, and its variant: all weights, or an index.

    A variant such as `model.fp16.safetensors` is used if there are no plain files. Raises LookupError if there are
    none; its argument is the name of the plain file.
    """
    ours = component in ("transformer", "vae")  # diffusers prefers an index, transformers a single file
    stem = "diffusion_pytorch_model" if ours else "model"
    for variant in _VARIANTS:
        ending = f".{variant}" if variant else ""
        whole, index = f"{stem}{ending}.safetensors", f"{stem}.safetensors.index{ending}.json"
        for name in (index, whole) if ours else (whole, index):
            if name in names:
                return name, variant
    raise LookupError(f"{stem}.safetensors")


def setting_files(folder: Path) -> list[Path]:
    """The files of a component that are loaded besides its weights and their index: settings or vocabulary."""
    return [folder / name for name in setting_names(folder.name, _names(folder))]


@dataclass(frozen=True)
class Weights:
    """Files of a component's weights, the `index` that maps tensors to them, and the `variant` to ask loaders for."""

    files: tuple[Path, ...]
    index: Path | None = None
    variant: str | None = None


def find_weights(folder: Path) -> Weights:
    """The safetensors files that are loaded of a component: one, or the shards that its index names.

    Raises TeacherError if there are none.
    """
    names = _names(folder)
    try:
        name, variant = weights_name(folder.name, names)
    except LookupError as error:
        raise TeacherError(f"{folder} has no {error.args[0]}; {_instead_of_weights(names)}") from None
    path = folder / name
    if path.suffix != ".json":
        return Weights((path,), None, variant)
    return Weights(tuple(folder / shard for shard in shard_names(path)), path, variant)


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names. Raises TeacherError for any that is not beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
        raise TeacherError(f"{index} does not map tensors to files beside it; fetch or export the folder again")
    return sorted(set(shards.values()))


def _names(folder: Path) -> set[str]:
    """The names of files in a folder, and of links that lead nowhere, which are errors where a file is loaded."""
    return {path.name for path in folder.iterdir() if path.is_file() or path.is_symlink()}


def _instead_of_weights(names: Collection[str]) -> str:
    """What a component without weights in safetensors has instead, and the fix."""
    for name in sorted(names):
        if old := re.fullmatch(r"(.+\.safetensors)\.(fp16|bf16)\.index\.json", name):  # of diffusers before 0.32
            return f"rename {name} to {old[1]}.index.{old[2]}.json"
        if name.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".gguf")):
            return f"{name} is not loaded: save the pipeline in safetensors with save_pretrained, or fetch those files"
    return "only safetensors weights are loaded; fetch or export the folder again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises TeacherError when it is missing or not one."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise TeacherError(f"{path} cannot be read as JSON ({error}); fetch or export the folder again") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path} does not hold a JSON object; fetch or export the folder again")
    return value


def read_decoder(folder: Path) -> str:
    """Check that a folder is a small decoder's, and return the digest of its files. Raises ConfigError."""
    for name in (DECODER_CONFIG, DECODER_WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"decoder {folder} has no {name}; give the folder of an {SMALL_DECODER}")
    try:
        kind = read_json(folder / DECODER_CONFIG).get("_class_name")
        digest = decoder_digest(folder)
    except (TeacherError, OSError) as error:
        raise ConfigError(f"decoder {folder} cannot be read: {error}") from None
    if kind != SMALL_DECODER:
        raise ConfigError(f"decoder {folder} holds {kind}; give the folder of an {SMALL_DECODER}")
    return digest


def decoder_digest(folder: Path) -> str:
    """The digest of a small decoder's files. Raises OSError."""
    return hashlib.sha256((folder / DECODER_CONFIG).read_bytes() + (folder / DECODER_WEIGHTS).read_bytes()).hexdigest()


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises TeacherError when it is missing or Git LFS has not fetched it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TeacherError(missing(path)) from None
    check_pointer(content, path)
    return content


def missing(path: Path) -> str:
    """Say what is wrong with a path that does not exist: it is absent, or a link to something that is."""
    what = f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "is missing"
    return f"{path} {what}; the folder is not a whole {PIPELINE}"


def check_pointer(content: bytes, path: Path) -> None:
    """Raise TeacherError for a file that Git LFS has not fetched."""
    if content.startswith(POINTER):
        raise TeacherError(f"{path} is a pointer of Git LFS and not the file; run `git lfs pull` in its folder")
