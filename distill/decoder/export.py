"""Export of a small decoder: a folder that stock diffusers loads, with a model card."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from distill.decoder.recipe import DecoderConfig
from distill.errors import CheckpointError, DivergedError
from distill.files import atomic_write, reason
from distill.models.sd3_folder import SD3Folder
from distill.models.weights import first_nonfinite
from distill.student.card import decoder_card
from distill.student.decoder import README


def export_decoder(
    out: Path,
    config: DecoderConfig,
    model: SD3Folder,
    small: AutoencoderTiny,
    metrics: Mapping[str, float],
    images: int,
) -> None:
    """Write the decoder of `model` in fp16 to `out` atomically, in place of an older one.

    Raises DivergedError for weights that are not finite in fp16, CheckpointError if writing fails.
    """
    half = deepcopy(small).half()
    if (name := first_nonfinite(half.state_dict())) is not None:
        raise DivergedError(f"the decoder's {name} is not finite in fp16; lower learning_rate in a new --out")
    values = config.model_dump(mode="json")
    for key in ("prompts", "real"):  # a published record needs no paths of this machine
        values[key] = values[key] and Path(values[key]).name
    parameters = sum(tensor.numel() for tensor in half.decoder.parameters())
    try:
        with atomic_write(out) as made:
            half.save_pretrained(made)
            (made / README).write_text(decoder_card(values, model, parameters, images, metrics), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the decoder to {out}: {reason(error)}; free space and run again"
        ) from error
