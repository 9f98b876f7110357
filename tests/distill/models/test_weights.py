"""Weights that do not match their configuration are refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from distill.errors import TeacherError
from distill.models.sd3 import (
    check_parts,
    load_transformer,
    load_vae,
)
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WEIGHTS = "diffusion_pytorch_model.safetensors"


def _without(path: Path, *names: str) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, path, {"format": "pt"})


UNFIT = {
    "transformer lack proj_out.weight": lambda folder: _without(folder / "transformer" / WEIGHTS, "proj_out.weight"),
    "transformer hold transformer_blocks.*does not have": lambda folder: _edit(
        folder / "transformer/config.json", num_layers=1
    ),
    "transformer hold transformer_blocks.1.* requires": lambda folder: _edit(
        folder / "transformer/config.json", num_layers=3
    ),
    "transformer/config.json is not usable": lambda folder: _edit(folder / "transformer/config.json", qk_norm="x"),
    "vae lack decoder.conv_in.bias": lambda folder: _without(folder / "vae" / WEIGHTS, "decoder.conv_in.bias"),
    "vae hold .*conv_shortcut.* does not have": lambda folder: _edit(
        folder / "vae/config.json", block_out_channels=[8, 8]
    ),
}


@pytest.mark.parametrize("sentence", UNFIT)
def test_weights_that_a_configuration_does_not_call_for_are_refused(sentence: str, teacher: Path, tmp_path: Path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    UNFIT[sentence](folder)
    with pytest.raises(TeacherError, match=sentence):
        check_parts(SD3Folder.read(folder))
    with pytest.raises(TeacherError, match=sentence):
        load_transformer(SD3Folder.read(folder)) if "transformer" in sentence else load_vae(SD3Folder.read(folder))


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_no_weights_of_a_text_encoder_are_made_up(name: str, teacher_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_t5, tmp_path / "teacher")
    path = folder / name / "model.safetensors"
    _without(path, lost := sorted(load_file(path))[-2])
    with pytest.raises(TeacherError, match=f"{name} lack {lost}"):
        SD3TextEncoder.load(SD3Folder.read(folder))
