"""A tiny autoencoder in the place of a student's VAE: decodes in a fraction of the time, and loses fine detail."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from distill.errors import ConfigError, TeacherError
from distill.models.finite import check_finite
from distill.models.sd3_folder import read_json

_KIND = "AutoencoderTiny"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_tiny_vae(
    folder: Path, latent_channels: int, scale_factor: int, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderTiny, str]:
    """The autoencoder of a folder in diffusers' format, and its files' digest.

    Raises ConfigError, naming `tiny_vae`, for a folder that is none or one of another latent space.
    """
    try:
        config = read_json(folder / "config.json")
        weights = (folder / _WEIGHTS).read_bytes()
    except (TeacherError, OSError) as error:
        raise ConfigError(f"tiny_vae {folder} is no whole {_KIND}: {error}; name the folder of one") from None
    if config.get("_class_name") != _KIND:
        raise ConfigError(f"tiny_vae {folder} holds {config.get('_class_name')}; name the folder of an {_KIND}")
    try:
        vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
        check_finite(vae, folder)
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise ConfigError(f"tiny_vae {folder} cannot be loaded: {error}; fetch it again") from error
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    if (vae.config.latent_channels, factor) != (latent_channels, scale_factor):
        raise ConfigError(
            f"tiny_vae {folder} decodes {vae.config.latent_channels} channels to {factor} times their size, and the "
            f"student makes {latent_channels} for {scale_factor} times; name one that was made for its VAE"
        )
    digest = hashlib.sha256((folder / "config.json").read_bytes() + weights).hexdigest()
    return vae.to(device).eval().requires_grad_(False), digest
