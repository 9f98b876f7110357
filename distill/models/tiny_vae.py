"""A tiny autoencoder that decodes in place of a student's VAE: much faster, with less fine detail."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from distill.errors import ConfigError, TeacherError
from distill.models.sd3_files import read_json
from distill.models.weights import check_finite

_KIND = "AutoencoderTiny"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_tiny_vae(
    folder: Path, latent_channels: int, scale_factor: int, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderTiny, str]:
    """Load an autoencoder, and the digest of its files. Raises ConfigError, naming `tiny_vae`, if it does not fit."""
    try:
        config = read_json(folder / "config.json")
        weights = (folder / _WEIGHTS).read_bytes()
    except (TeacherError, OSError) as error:
        raise ConfigError(f"tiny_vae {folder} is not a complete {_KIND}: {error}; give the folder of one") from None
    if config.get("_class_name") != _KIND:
        raise ConfigError(f"tiny_vae {folder} holds {config.get('_class_name')}; give the folder of an {_KIND}")
    try:
        vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
        check_finite(vae, folder)
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ConfigError(f"tiny_vae {folder} cannot be loaded: {error}; fetch it again") from error
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    if (vae.config.latent_channels, factor) != (latent_channels, scale_factor):
        raise ConfigError(
            f"tiny_vae {folder} decodes {vae.config.latent_channels} channels at {factor} pixels per latent, and the "
            f"student has {latent_channels} at {scale_factor}; give one that was made for the student's VAE"
        )
    digest = hashlib.sha256((folder / "config.json").read_bytes() + weights).hexdigest()
    return vae.to(device).eval().requires_grad_(False), digest
