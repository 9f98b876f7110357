"""The shapes of a run's trained weights, and the check that those of `init_from` fit, before anything is loaded."""

from pathlib import Path

from distill.config import Lora, RunConfig
from distill.errors import ConfigError
from distill.models.sd3_files import find_weights
from distill.models.sd3_folder import SD3Folder
from distill.models.two_times import split
from distill.models.weights import tensor_shapes
from distill.training import checkpoint

_Shapes = dict[str, tuple[int, ...]]
_POSITIONS = "pos_embed.pos_embed"  # a computed table, not a weight


def check_initial_weights(config: RunConfig, teacher: SD3Folder) -> None:
    """Raise ConfigError if `init_from` has no weights or those of other networks; TeacherError if they are damaged."""
    start = config.init_from
    if start is None:
        return
    two_times = any(turn.two_times for turn in config.method.turns())
    read = _of_student if (start / "model_index.json").exists() else _of_run
    given, second = split(read(config, start))
    if given != trained_shapes(config, teacher) or bool(second) is not two_times:
        raise ConfigError(f"init_from: {start} has other weights for the student; networks and teacher must be alike")


def _of_student(config: RunConfig, start: Path) -> _Shapes:
    """The shapes of a student folder's transformer."""
    if isinstance(config.networks, Lora):
        raise ConfigError(
            f"init_from: {start} is a student's folder, which only full copies start from; give the run "
            "that made it, or set networks.kind to full"
        )
    return _shapes_of(SD3Folder.read(start))


def _of_run(config: RunConfig, start: Path) -> _Shapes:
    """The shapes of the student in a run's newest checkpoint."""
    newest = checkpoint.latest(start / "checkpoints")
    if newest is None:
        raise ConfigError(f"init_from: {start} has no checkpoint; give the folder of a run or of a student")
    if isinstance(config.networks, Lora):
        alpha = checkpoint.load_record(newest).get("config", {}).get("networks.alpha", config.networks.alpha)
        if alpha != config.networks.alpha:
            raise ConfigError(f"init_from: {start} was trained with networks.alpha {alpha}; set it to that")
    return checkpoint.shapes(newest, "student")


def trained_shapes(config: RunConfig, teacher: SD3Folder) -> _Shapes:
    """The shapes of the weights that a role trains in this run, without those of a second time or a critic."""
    base = _shapes_of(teacher)
    if not isinstance(config.networks, Lora):
        return base
    rank, targets = config.networks.rank, config.networks.targets
    shapes: _Shapes = {}
    for name, shape in base.items():
        module = name.removesuffix(".weight")
        if module != name and any(f".{module}".endswith(f".{target}") for target in targets):
            shapes[f"{module}.lora_A.weight"] = rank, shape[1]
            shapes[f"{module}.lora_B.weight"] = shape[0], rank
    return shapes


def _shapes_of(folder: SD3Folder) -> _Shapes:
    shapes: _Shapes = {}
    for path in find_weights(folder.path / "transformer").files:
        shapes |= tensor_shapes(path)
    shapes.pop(_POSITIONS, None)
    return shapes
