"""Opens the teacher that a configuration or a command names, whatever form it has."""

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import TeacherError
from distill.models.sd3_files import MODELS
from distill.models.sd3_folder import SD3Folder

if TYPE_CHECKING:
    from distill.models.hub import HubModel

ENDING = ".safetensors"  # of a single file
TEACHERS: dict[str, Path] = {}  # folders that ship with the package, by the name that a configuration gives
TRAINED_BY: dict[str, str] = {}  # commands that train a teacher, by the folder that they write to by default


def open_teacher(reference: str | Path, base: str | None = None, weights: Collection[str] = tuple(MODELS)) -> SD3Folder:
    """Open a teacher: a built-in name, a folder, a single file, or a model of the hub, which is fetched into its cache.

    A path that exists wins over a model of the hub. `base` is the teacher that completes a single file, and is given
    with one only. Weights are fetched and checked of the components in `weights`.

    Raises TeacherError for a reference that names nothing, a model that cannot be fetched, a folder that
    `SD3Folder.read` refuses, and a file that `open_single_file` refuses.
    """
    if is_single_file(reference, base):
        from distill.models.single_file import open_single_file  # which imports torch

        # Not resolved, because files in the hub's cache are links to nameless ones.
        file = Path(os.path.expanduser(reference)).absolute()
        return open_single_file(file, None if base is None else partial(open_teacher, base, None))
    if (found := find_teacher(reference, weights)) is None:
        raise _no_teacher(reference)
    return SD3Folder.read(*found, weights)


def open_tokenizers(reference: str | Path, base: str | None = None) -> SD3Folder:
    """Open a teacher as `open_teacher` does, for its tokenizers and numbers only: no weights are fetched or converted.

    A single file has those of its base.
    """
    if is_single_file(reference, base) and base is not None:
        reference = base
    return open_teacher(reference, weights=())


def is_single_file(reference: str | Path, base: str | None) -> bool:
    """Whether a teacher is a single file. Raises TeacherError for one that cannot be used, and for a wrong base."""
    if str(reference) not in TEACHERS:
        path = Path(os.path.expanduser(reference))
        if path.suffix == ENDING and not path.exists():
            raise TeacherError(f"there is no teacher {str(reference)!r}; that file does not exist")
        if path.is_file() and path.suffix != ENDING:
            raise TeacherError(
                f"{path} is no {ENDING} file; only safetensors are loaded, so convert it or give a folder"
            )
        if path.is_file():
            return True
    if base is not None:
        raise TeacherError(
            f"teacher_base (--teacher-base) completes a single file, and {reference} is none; leave it out"
        )
    return False


def find_teacher(
    reference: str | Path, weights: Collection[str] = tuple(MODELS)
) -> tuple[Path, str | None, str | None] | None:
    """Find the folder of a teacher, its name if that is not the folder's, and its commit if it is of the hub.

    A model of the hub is fetched, with the weights of some components. None if there is no such teacher.
    """
    if str(reference) in TEACHERS:
        return TEACHERS[str(reference)], str(reference), None
    path = Path(os.path.expanduser(reference))
    if path.is_dir():
        return path, None, None
    if (model := _hub_model(reference)) is None:
        return None
    from distill.models.hub import fetch

    commit = model.resolve()
    return fetch(commit, weights), commit.id, commit.revision


def pin_teacher(reference: str) -> str:
    """Name the commit that a model of the hub is at; other references are returned as they are."""
    model = None if _is_here(reference) else _hub_model(reference)
    return reference if model is None else str(model.resolve())


def check_named(reference: str) -> None:
    """Raise TeacherError for a reference that is not here and cannot be a model of the hub. Nothing is fetched."""
    if not _is_here(reference) and _hub_model(reference) is None:
        raise _no_teacher(reference)


def _is_here(reference: str) -> bool:
    return reference in TEACHERS or os.path.exists(os.path.expanduser(reference))


def _hub_model(reference: str | Path) -> "HubModel | None":
    """Read a reference that is not here as a model of the hub; None for text that can only be a path."""
    if (command := TRAINED_BY.get(str(reference))) is not None:
        raise TeacherError(
            f"there is no folder {reference}; train that teacher first with `{command}`, or name another one"
        )
    from distill.models.hub import HubModel  # here, because its libraries are slow to import

    return HubModel.parse(str(reference))


def _no_teacher(reference: str | Path) -> TeacherError:
    names = ", ".join([*TEACHERS, "a folder", "a .safetensors file", "or a model of the hub as owner/name"])
    return TeacherError(f"there is no teacher {str(reference)!r}; give {names}")
