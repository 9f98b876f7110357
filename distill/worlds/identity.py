"""An autoencoder that changes nothing, in AutoencoderKL's own format: with it a pixel-space model is a latent one."""

import torch
from diffusers import AutoencoderKL

_ANCHOR = 256.0  # far beyond any pixel; a number of every floating point format


def identity_autoencoder(side: int, shift: float, scale: float) -> AutoencoderKL:
    """Latents are the pixels (3, side, side), which lie in [-1, 1], less `shift`, times `scale`.

    AutoencoderKL ends in a group norm and a SiLU. Each color enters its group as x and -x beside the constants A and
    -A: the mean is 0, and the variance A^2 / 2 whatever the image (to x^2 / A^2, a hundred-thousandth), so that the
    norm's gain undoes it; and SiLU(x) - SiLU(-x) = x. Everything between adds nothing.
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
