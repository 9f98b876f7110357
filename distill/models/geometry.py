"""`Geometry`, the configurations of a Stable Diffusion 3 model: of a folder, or of a published model by name."""

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from distill.errors import TeacherError
from distill.models.sd3_files import MODELS, RECORD, read_json
from distill.models.sd3_folder import check_size
from distill.models.teacher import find_teacher, is_single_file

if TYPE_CHECKING:
    from torch import nn

_STOCK_TOKENS = (77, 256)  # CLIP's and T5's
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
_NAMED: dict[str, dict[str, Any]] = {
    "sd3-medium": _SD3
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    "sd3.5-medium": _SD3
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd3.5-large": _SD3
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    | {"qk_norm": "rms_norm"},
}
NAMES = tuple(_NAMED)
# Their ids on the hub; a plan of one of these needs no file of it.
PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128} | {
    "feed_forward_proj": "gated-gelu"
}
_TEXT: dict[str, dict[str, Any]] = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}


@dataclass(frozen=True)
class Geometry:
    """Configurations of a model's components, and the lengths of an encoded prompt in CLIP's and in T5's tokens."""

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, dict[str, Any]]
    clip_tokens: int
    t5_tokens: int

    @property
    def tokens(self) -> int:
        """Length of an encoded prompt over all encoders."""
        return self.clip_tokens + self.t5_tokens

    def with_text(self, clip_tokens: int, t5_tokens: int) -> Self:
        """The same model with other lengths of an encoded prompt."""
        return replace(self, clip_tokens=clip_tokens, t5_tokens=t5_tokens)

    def with_blocks(self, dual: int, plain: int) -> Self:
        """The same model with so many transformer blocks of two attentions, and after them of one."""
        blocks = {"num_layers": dual + plain, "dual_attention_layers": tuple(range(dual))}
        return replace(self, transformer=self.transformer | blocks)

    @property
    def published(self) -> str | None:
        """The published model that has this transformer, one of NAMES, wherever its files are."""
        own = json.loads(json.dumps(self.transformer))  # files have lists where there are tuples here
        for name, transformer in _NAMED.items():
            if all(own.get(key) == value for key, value in json.loads(json.dumps(transformer)).items()):
                return name
        return None

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent pixel in image pixels."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def image_size(self) -> int:
        """Native height and width in image pixels."""
        return int(self.transformer["sample_size"]) * self.pixels_per_latent

    @property
    def parameters(self) -> int:
        """Parameters of the transformer."""
        import torch  # here, because a geometry is read and refused without it
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            return _count(SD3Transformer2DModel.from_config(self.transformer))

    @property
    def text_parameters(self) -> int:
        """Parameters of all text encoders."""
        import torch
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        with torch.device("meta"):
            return sum(
                _count(
                    T5EncoderModel(T5Config(**config))
                    if name == "text_encoder_3"
                    else CLIPTextModelWithProjection(CLIPTextConfig(**config))
                )
                for name, config in self.text.items()
            )

    @property
    def t5_matrix_parameters(self) -> int:
        """Parameters of T5's matrices, which can be stored in 8 bits; 0 without T5."""
        if (config := self.text.get("text_encoder_3")) is None:
            return 0
        width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        return int(config["num_layers"] * (4 * width * inner + 3 * width * config["d_ff"]))

    def check_size(self, size: int) -> None:
        """Raise SizeError unless images of `size` x `size` pixels can be made."""
        unit = self.pixels_per_latent * int(self.transformer["patch_size"])
        check_size(size, size, unit, int(self.transformer["pos_embed_max_size"]), self.name)


def read_geometry(teacher: str, base: str | None = None) -> Geometry:
    """Read the geometry of a published model, a teacher that ships, a folder, or a model of the hub, without weights.

    A single file has the geometry of its `base`. Components that a folder lacks have SD3's geometry. Raises
    TeacherError for an unknown name, a folder without an SD3 transformer, and a file without a base.
    """
    if is_single_file(teacher, base):
        if base is None:
            raise TeacherError(f"{teacher} is a single file; name the folder of the same model with --teacher-base")
        return replace(read_geometry(base), name=Path(teacher).stem)
    if teacher in _NAMED:
        return Geometry(teacher, _NAMED[teacher], _VAE, _TEXT, *_STOCK_TOKENS)
    if (found := find_teacher(teacher, weights=())) is None:
        close = difflib.get_close_matches(teacher, NAMES, len(NAMES), 0.5) or NAMES
        raise TeacherError(
            f"{teacher!r} is no folder, no known model and no name of the hub; the nearest are {', '.join(close)}"
        )
    folder, name, _ = found
    path = folder / "transformer" / "config.json"
    transformer = read_json(path)
    if transformer.get("_class_name") != MODELS["transformer"]:
        raise TeacherError(
            f"{path} is of a {transformer.get('_class_name')}, not of a {MODELS['transformer']}; "
            "give the folder of a Stable Diffusion 3"
        )
    missing = [key for key in _SD3 if key not in transformer and key != "out_channels"]
    if missing:
        raise TeacherError(f"{path} lacks {missing[0]}; save the pipeline again")

    def read(name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        path = folder / name
        return read_json(path) if path.exists() else otherwise

    # A folder with any text encoder says by what it lacks that it has no T5.
    text = {name: read_json(folder / name / "config.json") for name in _TEXT if (folder / name).is_dir()} or _TEXT
    clip, t5 = _STOCK_TOKENS
    clip = read("tokenizer/tokenizer_config.json", {}).get("model_max_length", clip)
    t5 = read(RECORD, {}).get("max_sequence_length", t5)
    return Geometry(name or folder.resolve().name, transformer, read("vae/config.json", _VAE), text, clip, t5)


def _count(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())
