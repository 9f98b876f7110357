"""Parity of stock diffusers and this package on a student folder: what `distill export --check` runs."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging

from distill.errors import ParityError
from distill.flow import noise
from distill.pipeline import OneStepPipeline, RuntimeOptions

PROMPTS = ("a red circle left of a blue square", "a photograph of a lighthouse at night, seen from the sea", "")
TOLERANCE = 1e-3  # of latents with a standard deviation of about 1, computed in fp32 by both


def check_parity(student: Path, device: torch.device | str = "cpu") -> float:
    """Return the largest difference between the latents of the stock pipeline and ours, over PROMPTS and seeds.

    Both compute in fp32, whatever the precision of the files. Raises ParityError above TOLERANCE.
    """
    ours = OneStepPipeline.load(student, device, RuntimeOptions(precision="fp32"))
    spec, seeds = ours.spec, range(len(PROMPTS))
    expected = ours.latents(ours.encode(PROMPTS), ours.noise(seeds)).cpu()
    del ours  # one model in memory at a time

    absent = {} if (student / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    logging.disable_progress_bar()  # of loading, which no argument turns off
    stock = StableDiffusion3Pipeline.from_pretrained(student, use_safetensors=True, local_files_only=True, **absent).to(
        device, torch.float32
    )
    stock.set_progress_bar_config(disable=True)
    width, height = spec.sizes[0]
    found = stock(
        list(PROMPTS),
        num_inference_steps=1,
        guidance_scale=0,
        latents=noise(seeds, tuple(expected.shape[1:])).to(device),
        height=height,
        width=width,
        max_sequence_length=spec.max_sequence_length,
        output_type="latent",
    ).images.cpu()
    largest = float((found - expected).abs().max())
    if not largest <= TOLERANCE:
        raise ParityError(
            f"the latents of {student} in stock diffusers differ by {largest:.2g}, more than {TOLERANCE:g}; "
            "its schedule or text length does not match onestep.json, so export the student again"
        )
    return largest
