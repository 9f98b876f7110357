"""Single-file checkpoints in the layout of Stable Diffusion 3's original code, which ComfyUI reads and writes as well.

A file holds a transformer, and may hold an autoencoder and text encoders, but no tokenizers and no configurations. One
that is read is converted by diffusers into a folder, once, which lies in the user's cache.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from distill.errors import OutputError, TeacherError
from distill.files import MARK, atomic_write
from distill.models.original_layout import OriginalTensor, transformer_tensors, vae_tensors
from distill.models.sd3_files import COMPONENTS, MODELS, RECORD, find_weights
from distill.models.sd3_folder import PLAIN_DTYPES, SD3Folder, check_weights
from distill.models.tensor_file import DTYPES, write_tensors
from distill.models.weights import first_missing, tensor_shapes

_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_TEXT = "text_encoders."
_KINDS: dict[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
_PROJECTION = "text_projection.weight"  # of the first CLIP: the original uses its features without a projection
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_log = logging.getLogger(__name__)


def open_single_file(path: Path, open_base: Callable[[Collection[str]], SD3Folder] | None) -> SD3Folder:
    """Open a checkpoint as an SD3 folder with the file's name.

    `open_base` opens its base, the same model as a folder, with the weights of the given components.

    The folder holds what the file has and links to the other components of the base, whose weights are fetched if the
    base is a model of the hub. It is made once for a file and a base. The folder has a T5 if the base has one. Text
    encoders of the base replace those in 8 bits.

    Raises TeacherError for a file that is no plain SD3 checkpoint, without a base, and for a base of another geometry;
    OutputError if the cache cannot be written.
    """
    identity = hashlib.sha256()
    check_weights(path, identity, replaced=_TEXT)
    shapes = tensor_shapes(path)
    parts = _parts(path, shapes)
    if open_base is None:
        raise TeacherError(
            f"{path} holds {', '.join(parts)}, but no tokenizers and no configurations; name the folder or hub id of "
            f"the same model in teacher_base, or with --teacher-base: {_published(shapes)}"
        )
    quantized = [part for part, names in parts.items() if _is_quantized(path, names.values())]
    parts = {part: names for part, names in parts.items() if part not in quantized}
    base = open_base(MODELS.keys() - parts)
    if not base.has_t5:
        parts.pop("text_encoder_3", None)
    for part in ("transformer", "vae"):
        if part in parts:
            _check_geometry(path, part, parts[part], shapes, base)
    identity.update(f"{base.digest} {base.path}".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flow-generator-matching" / "teachers"
    folder = cache / identity.hexdigest()[:32]
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # another process may convert the same file
                if not folder.exists():
                    for part in quantized:
                        _log.warning("the %s of %s is quantized, so that of %s is used", part, path, base.name)
                    with atomic_write(folder) as made:
                        _convert(path, parts, base, made)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be converted into {cache} ({error}); free space there, or set XDG_CACHE_HOME"
            ) from error
    return SD3Folder.read(folder, path.stem)


def _parts(path: Path, shapes: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The components of a file: the names of their tensors without prefix, and the full names."""
    prefixes = dict(_PREFIXES)
    others = ("model.", "first_stage_model.", _TEXT)
    if not any(name.startswith(prefixes["transformer"]) for name in shapes):
        if "joint_blocks.0.x_block.attn.qkv.weight" not in shapes:
            raise TeacherError(
                f"{path} holds no transformer of Stable Diffusion 3 in the original layout (joint_blocks...); give "
                "such a checkpoint, or a folder"
            )
        prefixes["transformer"] = ""
    parts: dict[str, dict[str, str]] = {}
    for part, prefix in prefixes.items():
        names = [name for name in shapes if name.startswith(prefix) and (prefix or not name.startswith(others))]
        if names:
            parts[part] = {name.removeprefix(prefix): name for name in names}
    return parts


def _published(shapes: Mapping[str, Any]) -> str:
    """The published model of a file's kind."""
    if any(".attn2." in name for name in shapes):
        return "stabilityai/stable-diffusion-3.5-medium"
    if any(".attn.ln_q." in name for name in shapes):
        return "stabilityai/stable-diffusion-3.5-large"
    return "stabilityai/stable-diffusion-3-medium-diffusers"


def _is_quantized(path: Path, names: Collection[str]) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(file.get_slice(name).get_dtype() not in PLAIN_DTYPES for name in names)


def _check_geometry(
    path: Path, part: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], base: SD3Folder
) -> None:
    """Raise TeacherError, naming the first tensor, unless a file's component fits the configuration of `base`."""
    kind = _KINDS[part]
    with torch.device("meta"):
        state = kind.from_config(kind.load_config(base.path / part, local_files_only=True)).state_dict()
    tensors = transformer_tensors(state) if part == "transformer" else vae_tensors(state)
    expected = {tensor.name: tuple(tensor.build(state.__getitem__).shape) for tensor in tensors}
    prefix = _PREFIXES[part]
    for name, shape in expected.items():
        if name not in names:
            raise TeacherError(f"{path} lacks {prefix}{name}, which {base.name} has; give the base of the same model")
        given = shapes[names[name]]
        if _squeezed(given) != _squeezed(shape):
            raise TeacherError(
                f"{path} holds {names[name]} as {given}, and {base.name} has it as {shape}; give the base of the same "
                "model"
            )
    if unknown := next((full for name, full in names.items() if name not in expected), None):
        raise TeacherError(f"{path} holds {unknown}, which {base.name} lacks; give the base of the same model")


def _squeezed(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A shape without the kernel of 1x1 that some files have and others leave out."""
    return shape[:2] if shape is not None and shape[2:] == (1, 1) else shape


def _convert(path: Path, parts: Mapping[str, Mapping[str, str]], base: SD3Folder, made: Path) -> None:
    """Write the folder: one component after the other in the file's precision."""
    made.mkdir()
    for part, names in parts.items():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(full) for name, full in names.items()}
        kind = _KINDS[part]
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
        if part in ("transformer", "vae"):
            own: dict[str, Any] = {"config": str(base.path), "subfolder": part, "local_files_only": True}
            model = kind.from_single_file(tensors, torch_dtype=dtype, **own)
        else:
            config = kind.config_class.from_pretrained(base.path / part, local_files_only=True)
            if part == "text_encoder":
                tensors[_PROJECTION] = torch.eye(config.projection_dim, config.hidden_size, dtype=dtype)
            options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
            model, info = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)
            if (name := first_missing(info)) is not None:
                raise TeacherError(
                    f"{path} lacks {_PREFIXES[part]}{name} in the shape that {base.name} has; give the base of the "
                    "same model"
                )
        model.save_pretrained(made / part)
        shutil.copyfile(base.path / part / "config.json", made / part / "config.json")
    for name in (*COMPONENTS, "README.md"):
        if name not in parts and (base.path / name).exists():
            (made / name).symlink_to(base.path / name)
    (made / "model_index.json").write_text(json.dumps(dict(base.index), indent=2) + "\n")
    record = {"max_sequence_length": base.max_sequence_length, "guidance": base.guidance}
    (made / RECORD).write_text(json.dumps(record) + "\n")


def write_single_file(folder: SD3Folder, out: Path, text_encoders: bool = False) -> Path:
    """Write a folder's transformer and autoencoder, and if wanted its text encoders, into one file, atomically.

    Each tensor has the precision that it has in the folder, and only one is in memory at a time. Raises TeacherError
    for text encoders that the original layout cannot hold.
    """
    parts = ["transformer", "vae"]
    if text_encoders:
        check_projection(folder)
        parts += ["text_encoder", "text_encoder_2", *(["text_encoder_3"] if folder.has_t5 else [])]
    with ExitStack() as files:
        shapes: dict[str, Tensor] = {}
        builds: dict[str, Callable[[], Tensor]] = {}
        for part in parts:
            component = _Component(folder.path / part, files)
            for tensor in _original_tensors(part, component):
                name = _PREFIXES[part] + tensor.name
                shapes[name] = tensor.build(component.shape)
                builds[name] = partial(tensor.build, component.read)
        metadata = {"format": "pt", "software": MARK, "modelspec.title": folder.name}
        with atomic_write(out) as made:
            write_tensors(made, shapes, lambda name: builds[name](), metadata)
    return out


def check_projection(folder: SD3Folder) -> None:
    """Raise TeacherError if the first CLIP has a projection, because single files have none."""
    with ExitStack() as files:
        component = _Component(folder.path / "text_encoder", files)
        projection = component.read(_PROJECTION)
        if not projection.equal(torch.eye(*projection.shape, dtype=projection.dtype)):
            raise TeacherError(
                f"{component.folder}: {_PROJECTION} is not the identity, which programs that read single files take it "
                "for; write the file without text encoders"
            )


class _Component:
    """The tensors of a component's folder, read one at a time while `files` is open."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        opened = [files.enter_context(safe_open(path, framework="pt")) for path in find_weights(folder).files]
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118, it is no mapping

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> Tensor:
        """A tensor of the same shape and type without values."""
        found = self._files[name].get_slice(name)
        return torch.empty(found.get_shape(), dtype=_DTYPES[found.get_dtype()], device="meta")


def _original_tensors(part: str, component: _Component) -> list[OriginalTensor]:
    """The tensors of a component in the original."""
    names = component.names
    if part == "transformer":
        return transformer_tensors(names)
    if part == "vae":
        return vae_tensors(names)
    if part == "text_encoder":
        names.remove(_PROJECTION)
    return [OriginalTensor(name, (name,)) for name in names]
