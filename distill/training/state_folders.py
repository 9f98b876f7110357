"""The folders of a run's states, found by their names."""

from pathlib import Path


def states(folder: Path) -> list[Path]:
    """The states in a folder, the oldest first, including damaged ones. Folders with other names are ignored."""
    return sorted(
        path
        for path in folder.glob("[0-9]*")
        if path.name.isdecimal() and path.name == state_name(int(path.name)) and path.is_dir()
    )


def state_name(images: int) -> str:
    """The folder's name of a state; names sort by images."""
    return f"{images:012d}"


def has_checkpoint(out: Path) -> bool:
    """Whether a run has a checkpoint or a student, so that its configuration may no longer change."""
    return (out / "student").exists() or any(states(out / part) for part in ("checkpoints", "best"))
