"""Opens the teacher that a configuration or a command names, whatever form it has."""

from pathlib import Path

from distill.errors import TeacherError
from distill.models.sd3_folder import SD3Folder

TEACHERS: dict[str, Path] = {}  # folders that ship with the package, by the name that a configuration gives


def open_teacher(reference: str | Path, base: str | None = None) -> SD3Folder:
    """Open a teacher: a built-in name or a folder. `base` is the teacher that completes a single file.

    Raises TeacherError for a reference that names nothing, and for a folder that `SD3Folder.read` refuses.
    """
    if (built_in := TEACHERS.get(str(reference))) is not None:
        return SD3Folder.read(built_in, str(reference))
    path = Path(reference).expanduser().resolve()
    if path.is_dir():
        return SD3Folder.read(path)
    names = f" or one of {', '.join(TEACHERS)}" if TEACHERS else ""
    raise TeacherError(f"teacher {str(reference)!r} is not a folder; give the folder of a Stable Diffusion 3{names}")
