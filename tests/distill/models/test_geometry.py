"""A geometry has the sizes of the models themselves: of published ones, and of a folder."""

from dataclasses import replace

import pytest
import torch

from distill.errors import SizeError
from distill.models.geometry import read_geometry
from distill.models.sd3 import decode_latents, load_transformer, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder

# Of openai/clip-vit-large-patch14 and laion/CLIP-ViT-bigG-14 with their text projections, and of google/t5-v1_1-xxl.
PUBLISHED = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_encoders_have_the_published_size(name):
    geometry = read_geometry("sd3-medium")
    assert replace(geometry, text={name: geometry.text[name]}).text_parameters == PUBLISHED[name]


def test_a_folder_s_geometry_is_that_of_its_models(teacher_t5):
    geometry, folder = read_geometry(str(teacher_t5)), SD3Folder.read(teacher_t5)
    assert geometry.name == teacher_t5.name
    assert geometry.parameters == sum(x.numel() for x in load_transformer(folder).parameters())
    encoder = SD3TextEncoder.load(folder)
    models = (*encoder.clips, encoder.t5)
    assert geometry.text_parameters == sum(x.numel() for model in models for x in model.parameters())
    assert (geometry.clip_tokens, geometry.t5_tokens) == (encoder.clip_length, encoder.max_sequence_length)
    assert geometry.tokens == encoder.encode(["a"]).embeds.shape[1]
    assert geometry.with_text(4, 3).tokens == 7
    with torch.no_grad():
        pixels = decode_latents(load_vae(folder), torch.zeros(1, *folder.latent_shape))
    assert pixels.shape[2:] == (geometry.image_size,) * 2
    assert geometry.pixels_per_latent == geometry.image_size // folder.latent_shape[1]


def test_a_folder_without_text_encoders_has_those_of_sd3(teacher_t5, tmp_path):
    (tmp_path / "transformer").symlink_to(teacher_t5 / "transformer")
    found, stock = read_geometry(str(tmp_path)), read_geometry("sd3-medium")
    assert (found.text, found.vae, found.tokens) == (stock.text, stock.vae, 77 + 256)
    (tmp_path / "text_encoder").symlink_to(teacher_t5 / "text_encoder")
    assert read_geometry(str(tmp_path)).text.keys() == {"text_encoder"}  # so it has no T5


def test_sizes_are_whole_patches_within_the_positions(teacher):
    geometry = read_geometry(str(teacher))  # patches of 4 pixels, 12 positions
    for size in (4, 16, 48):
        geometry.check_size(size)
    for size in (0, 18, 52):
        with pytest.raises(SizeError):
            geometry.check_size(size)
