"""Tiny teachers that all tests share and only read, and fixtures that apply to every test."""

import gc
import os

gc.disable()  # while libraries and tests are imported: looking for garbage among them takes seconds, and finds none
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the libraries: nothing here may reach for a network
os.environ["SERVICE_DATA"] = "none"  # servers keep nothing, but where a test gives them a folder
os.environ["SERVICE_ENGINE__TUNING_SECONDS"] = "0"  # nothing is measured at the start of a server
os.environ["OMP_NUM_THREADS"] = "1"  # here as in every process that a test starts: all round their sums alike
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)  # nobody is trusted; each client would read them all anew

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tiny import make_clip, make_teacher

# What takes longest begins first, so that no process is left with it when the others have nothing more to do.
LONG = (
    "test_cluster",
    "test_failures",
    "test_jobs",
    "test_docs",
    "test_teacher",
    "test_run",
    "test_student",
    "test_estimate",
    "test_distributed",
    "test_demo",
    "test_experiments",
    "test_soak_jobs",
    "test_openapi",
    "test_networks",
    "test_embedding_cache",
    "test_remote",
    "test_browser",
    "test_drills",
    "test_sources",
    "test_dataset_comparison",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))  # stable: a file's own order stays


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not looked through again
    gc.enable()


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher without T5 and without its tokens, with shift 3 and images of 16x16 pixels."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


@pytest.fixture(scope="session")
def teacher_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with all three text encoders and 6 T5 tokens."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "tiny-t5", t5=True, max_sequence_length=6)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model's folder, named tiny-clip."""
    return make_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
