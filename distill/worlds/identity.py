"""An identity autoencoder in AutoencoderKL's format, with which a pixel-space model is handled as a latent model."""

import torch
from diffusers import AutoencoderKL

_ANCHOR = 256.0  # far beyond any pixel value; exact in every floating point format


def identity_autoencoder(side: int, shift: float, scale: float) -> AutoencoderKL:
    """Build an autoencoder whose latents are (pixels - shift) * scale, for pixels (3, side, side) in [-1, 1].

    AutoencoderKL ends in a group norm and a SiLU. Each color channel x has its own group, of x, -x, A and -A. Its mean
    is 0, and its variance is A^2 / 2 for any image (with a relative error of x^2 / A^2, about 1e-5), which the gain of
    the norm undoes. Then SiLU(x) - SiLU(-x) = x. All layers between have zero weights in their residual branches.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(12,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=3,
        sample_size=side,
        shift_factor=shift,
        scaling_factor=scale,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for half in (vae.encoder, vae.decoder):
            half.conv_norm_out.weight.fill_(_ANCHOR / 2**0.5)
            for color in range(3):
                plus, minus, high, low = range(4 * color, 4 * color + 4)
                half.conv_in.weight[plus, color, 1, 1] = half.conv_out.weight[color, plus, 1, 1] = 1
                half.conv_in.weight[minus, color, 1, 1] = half.conv_out.weight[color, minus, 1, 1] = -1
                half.conv_in.bias[high], half.conv_in.bias[low] = _ANCHOR, -_ANCHOR
        vae.encoder.conv_out.bias[3:] = -30  # the posterior's log variance
    return vae.eval()
