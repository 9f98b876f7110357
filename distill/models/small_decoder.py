"""The small decoder: an `AutoencoderTiny` of diffusers that decodes in place of the VAE, much faster.

Only its decoder is used and trained. diffusers needs an encoder to load the folder: it is as small as possible and
zero, so that it encodes every image to zeros instead of to something that looks like latents.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import nn

from distill.errors import ConfigError
from distill.models.sd3_files import read_decoder
from distill.models.weights import check_finite

# `AutoencoderTiny` begins with 3 tanh(x / 3). Half of the transformer's latents, of standard deviation 1, stay where
# that is nearly linear, whatever the scale of the VAE's own latents is.
LATENT_SCALE = 2.0
_ENCODER_WIDTH = 4


def make_small_decoder(latent_channels: int, scale_factor: int, width: int, blocks: Sequence[int]) -> AutoencoderTiny:
    """Build an untrained small decoder of `width` channels, with so many residual blocks at each resolution.

    `blocks` begins with the resolution of the latents; each further one is twice as high, up to that of the image, so
    there are log2(scale_factor) + 1 of them. Raises ConfigError for another number.
    """
    stages = scale_factor.bit_length()
    if len(blocks) != stages:
        raise ConfigError(
            f"blocks names {len(blocks)} resolutions, and a decoder by a factor of {scale_factor} has {stages}; give "
            "as many numbers, from the resolution of the latents to that of the image"
        )
    vae = AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(_ENCODER_WIDTH,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=(0,) * stages,
        num_decoder_blocks=tuple(blocks),
        scaling_factor=LATENT_SCALE,
        shift_factor=0.0,
    )
    for parameter in vae.encoder.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)  # gray
    return vae


def load_small_decoder(
    folder: Path, latent_channels: int, scale_factor: int, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderTiny, str]:
    """Load a small decoder, and the digest of its files. Raises ConfigError, naming `decoder`, if it does not fit."""
    digest = read_decoder(folder)
    try:
        vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
        check_finite(vae, folder)
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ConfigError(f"decoder {folder} cannot be loaded: {error}; fetch it again") from error
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    if (vae.config.latent_channels, factor) != (latent_channels, scale_factor):
        raise ConfigError(
            f"decoder {folder} decodes {vae.config.latent_channels} channels at {factor} pixels per latent, and the "
            f"model has {latent_channels} at {scale_factor}; give one that was made for the model's VAE"
        )
    for module in vae.decoder.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # the same numbers, without another tensor
    return vae.to(device).eval().requires_grad_(False), digest
