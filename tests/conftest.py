"""Tiny teachers that the tests share; made once a run, and only read."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the libraries: nothing here may reach for a network
os.environ["SERVICE_DATA"] = "none"  # servers keep nothing, but where a test gives them a folder

from pathlib import Path

import pytest
from tiny import make_clip, make_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5 and without its slots, shift 3, 16x16 images."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


@pytest.fixture(scope="session")
def teacher_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all three text encoders and 6 T5 tokens."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "tiny-t5", t5=True, max_sequence_length=6)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model's folder, named tiny-clip."""
    return make_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
