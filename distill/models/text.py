"""Text conditions of Stable Diffusion 3: `TextCondition`, and the encoders that compute it.

The joint sequence is the features of the two CLIP encoders, concatenated by channel and zero-padded to the joint width,
followed by `max_sequence_length` T5 tokens, which are zeros if T5 is absent. A model is trained with one such length.
Token counts are the tokenizers' own, with start and end tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from distill.errors import PromptError, TeacherError
from distill.models import quantize
from distill.models.device import fast_bfloat16, to_device
from distill.models.sd3_files import find_weights
from distill.models.sd3_folder import SD3Folder
from distill.models.weights import check_finite, check_loading_info


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: `embeds` (B, L, D) for joint attention, `pooled` (B, P) for modulation."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: int | slice | Tensor) -> Self:
        """Select rows; an integer index gives a batch of one."""
        chosen: Any = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return type(self)(self.embeds[chosen], self.pooled[chosen])

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        return type(self)(self.embeds.to(device), self.pooled.to(device))

    def expand(self, n: int) -> Self:
        """Repeat one row n times, without a copy."""
        return type(self)(self.embeds.expand(n, -1, -1), self.pooled.expand(n, -1))

    def where(self, mask: Tensor, other: "TextCondition") -> Self:
        """Replace the rows where mask (B,) is true by the one row of `other`."""
        rows = mask.view(-1, 1)
        embeds = torch.where(rows[..., None], other.embeds, self.embeds)
        return type(self)(embeds, torch.where(rows, other.pooled, self.pooled))

    def pack(self) -> Tensor:
        """Flatten each prompt into one row (B, L * D + P)."""
        return torch.cat([self.embeds.flatten(1), self.pooled], dim=1)

    def unpack(self, rows: Tensor) -> Self:
        """Undo `pack` for rows of conditions with the shape of these."""
        width = self.embeds[0].numel()
        embeds = rows[:, :width].reshape(len(rows), *self.embeds.shape[1:])
        return type(self)(embeds, rows[:, width:].contiguous())

    @classmethod
    def cat(cls, parts: Sequence["TextCondition"]) -> Self:
        """Concatenate batches."""
        return cls(torch.cat([part.embeds for part in parts]), torch.cat([part.pooled for part in parts]))


@dataclass(eq=False)
class SD3TextEncoder:
    """The text encoders and tokenizers of an SD3 folder, as `StableDiffusion3Pipeline.encode_prompt` uses them."""

    clips: Sequence[CLIPTextModelWithProjection]
    clip_tokenizers: Sequence[CLIPTokenizer]
    t5: T5EncoderModel | None
    t5_tokenizer: T5TokenizerFast | None
    joint_dim: int
    max_sequence_length: int

    @classmethod
    def load(
        cls,
        folder: SD3Folder,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int | None = None,
        t5: Literal["full", "int8", "cpu", "none"] = "full",
    ) -> Self:
        """Load from the folder of a teacher or student; `max_sequence_length` None takes the folder's own length.

        T5 can be left out, stored in 8 bits, or computed on the CPU. Raises TeacherError for a folder that is not a
        complete SD3 pipeline, or whose weights are not finite or do not match its configurations.
        """

        def load(name: str) -> Any:
            return _load(CLIPTextModelWithProjection, folder.path / name, dtype).to(device).eval()

        has_t5 = folder.has_t5 and t5 != "none"
        return cls(
            [load(name) for name in ("text_encoder", "text_encoder_2")],
            [load_tokenizer(CLIPTokenizer, folder.path / name) for name in ("tokenizer", "tokenizer_2")],
            _load_t5(folder.path / "text_encoder_3", torch.device(device), dtype, t5) if has_t5 else None,
            load_tokenizer(T5TokenizerFast, folder.path / "tokenizer_3") if has_t5 else None,
            folder.joint_dim,
            folder.max_sequence_length if max_sequence_length is None else max_sequence_length,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts on the CLIP encoders' device and in their dtype; `truncated` says which are cut."""
        outputs = []
        for encoder, tokenizer in zip(self.clips, self.clip_tokenizers, strict=True):
            ids = _tokens(tokenizer, prompts, self.clip_length).to(encoder.device)
            outputs.append(encoder(ids, output_hidden_states=True))
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, clip_length, D1 + D2)
        clip = F.pad(clip, (0, self.joint_dim - clip.shape[-1]))  # (B, clip_length, D)
        if self.t5 is None or self.max_sequence_length == 0:
            t5 = clip.new_zeros(len(prompts), self.max_sequence_length, self.joint_dim)
        else:
            ids = _tokens(self.t5_tokenizer, prompts, self.max_sequence_length).to(self.t5.device)
            features = self.t5(ids)[0]  # no attention mask, as in stock: padding is attended to
            t5 = to_device(features.to(clip.dtype), clip.device)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)  # (B, P)
        return TextCondition(torch.cat([clip, t5], dim=1), pooled)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether any encoder cuts it."""
        lengths = [(tokenizer, self.clip_length) for tokenizer in self.clip_tokenizers]
        if self.t5 is not None and self.max_sequence_length > 0:
            lengths.append((self.t5_tokenizer, self.max_sequence_length))
        counts = [[len(ids) > limit for ids in _untruncated(tok, prompts)] for tok, limit in lengths]
        return [any(over) for over in zip(*counts, strict=True)]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the CLIP tokens of each prompt, with start and end, at most `clip_length`."""
        return [min(len(ids), self.clip_length) for ids in _untruncated(self.clip_tokenizers[0], prompts)]

    @property
    def clip_length(self) -> int:
        """Length of CLIP's token sequences; like stock, the first tokenizer's for both encoders."""
        return int(self.clip_tokenizers[0].model_max_length)


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Load a tokenizer of a checked folder. Raises TeacherError for invalid files."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises Exception itself
        raise TeacherError(f"{folder} holds no usable tokenizer ({error!r}); fetch or export it again") from error


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a text encoder of a checked folder on the CPU. Raises TeacherError for weights that do not match."""
    own: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": find_weights(folder).variant}
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = kind.from_pretrained(folder, dtype=dtype, **own, **options)
    check_loading_info(info, folder)
    check_finite(model, folder)
    return model


def _load_t5(folder: Path, device: torch.device, dtype: torch.dtype, kind: str) -> Any:
    """Load T5 for the device, in 8 bits there, or for the CPU in its fast dtype."""
    if kind == "cpu":
        device = torch.device("cpu")
        dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    t5 = _load(T5EncoderModel, folder, dtype)
    if kind == "int8":
        quantize.quantize_weights(t5, device)
    return t5.to(device).eval()


def _tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length), padded and truncated."""
    for prompt in prompts:
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise PromptError(f"the prompt {prompt[:80]!a} holds half of a character, as of a cut emoji; remove it")
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def _untruncated(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """All token ids of each prompt."""
    ids: list[list[int]] = tokenizer(list(prompts), verbose=False).input_ids
    return ids
