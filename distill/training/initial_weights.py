"""The weights of `init_from`: the check that they fit, before anything is loaded, and their reading.

Adapters also start from full weights: each layer's adapter is the nearest one to the layer's change from the teacher.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill.config import Full, Lora, RunConfig
from distill.errors import ConfigError
from distill.models.low_rank import is_target, nearest_product
from distill.models.sd3 import load_transformer
from distill.models.sd3_files import find_weights
from distill.models.sd3_folder import SD3Folder
from distill.models.two_times import split
from distill.models.weights import tensor_shapes
from distill.training import checkpoint
from distill.training.networks import CRITIC

_Shapes = dict[str, tuple[int, ...]]
_Weights = dict[str, Tensor]
_POSITIONS = "pos_embed.pos_embed"  # a computed table, not a weight


def check_initial_weights(config: RunConfig, teacher: SD3Folder) -> None:
    """Raise ConfigError if `init_from` has no weights or those of other networks; TeacherError if they are damaged."""
    start = config.init_from
    if start is None:
        return
    given, second = split(_given_shapes(start))
    fitting = (trained_shapes(config, teacher), _shapes_of(teacher))
    if given not in fitting or bool(second) is not config.trained.two_times:
        raise ConfigError(f"init_from: {start} has other weights for the student; networks and teacher must be alike")
    if isinstance(config.networks, Lora) and _are_adapters(given):
        alpha = checkpoint.load_record(_newest(start)).get("config", {}).get("networks.alpha", config.networks.alpha)
        if alpha != config.networks.alpha:
            raise ConfigError(f"init_from: {start} was trained with networks.alpha {alpha}; set it to that")


def read_initial_weights(config: RunConfig, teacher: SD3Folder, device: torch.device | str) -> dict[str, _Weights]:
    """Read the weights of `init_from`, which are checked: "student", its "average", and "fake" if it is trained.

    They are those of a run's newest checkpoint, or the transformer of a student folder. Adapters that start from full
    weights are computed on `device`, and then the student starts from the average. Raises CheckpointError or
    TeacherError for damaged files.
    """
    start, kind = config.init_from, config.networks
    assert start is not None
    parts = {"average", *config.trained.roles}
    if isinstance(kind, Full) or _are_adapters(_given_shapes(start)):
        return {part: _read(start, part) for part in parts}
    base = load_transformer(teacher).state_dict()
    adapters = {part: _nearest_adapter(kind, _read(start, part), base, device) for part in parts - {"student"}}
    return {**adapters, "student": adapters["average"]}


def _read(start: Path, part: str) -> _Weights:
    """Read the full weights or the adapter of a role or of the average; a student folder has no fake."""
    if not _is_student(start):
        return checkpoint.load(_newest(start), part)[0]
    if part == "fake":
        return {}
    weights: _Weights = load_transformer(SD3Folder.read(start)).state_dict()
    weights.pop(_POSITIONS, None)
    return weights


def _nearest_adapter(kind: Lora, weights: _Weights, base: Mapping[str, Tensor], device: torch.device | str) -> _Weights:
    """The adapter nearest to the change of the base's layers, and what is trained beside one: second time and critic.

    Changes of biases, of norms and of layers without an adapter are left out.
    """
    if not weights:
        return {}
    plain, adapter = split(weights)
    adapter |= {name: tensor for name, tensor in plain.items() if name.startswith(CRITIC)}
    for module in _adapted(kind, base):
        change = weights[f"{module}.weight"].to(device) - base[f"{module}.weight"].to(device)
        up, down = nearest_product(change, kind.rank)
        adapter[f"{module}.lora_A.weight"] = down
        adapter[f"{module}.lora_B.weight"] = up * (kind.rank / kind.alpha)
    return adapter


def trained_shapes(config: RunConfig, teacher: SD3Folder) -> _Shapes:
    """The shapes of the weights that a role trains in this run, without those of a second time or a critic."""
    base = _shapes_of(teacher)
    if not isinstance(config.networks, Lora):
        return base
    shapes: _Shapes = {}
    for module in _adapted(config.networks, base):
        rows, columns = base[f"{module}.weight"]
        shapes[f"{module}.lora_A.weight"] = config.networks.rank, columns
        shapes[f"{module}.lora_B.weight"] = rows, config.networks.rank
    return shapes


def _adapted(kind: Lora, names: Iterable[str]) -> list[str]:
    """The layers that get an adapter, of a network whose weights have these names."""
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [layer for layer in layers if any(is_target(layer, target) for target in kind.targets)]


def _are_adapters(names: Iterable[str]) -> bool:
    return any(".lora_" in name for name in names)


def _is_student(start: Path) -> bool:
    return (start / "model_index.json").exists()


def _newest(start: Path) -> Path:
    """The newest checkpoint of the run that another one starts from."""
    newest = checkpoint.latest(start / "checkpoints")
    if newest is None:
        raise ConfigError(f"init_from: {start} has no checkpoint; give the folder of a run or of a student")
    return newest


def _given_shapes(start: Path) -> _Shapes:
    """The shapes of the student's weights in a student folder, or in a run's newest checkpoint."""
    if _is_student(start):
        return _shapes_of(SD3Folder.read(start))
    return checkpoint.shapes(_newest(start), "student")


def _shapes_of(folder: SD3Folder) -> _Shapes:
    shapes: _Shapes = {}
    for path in find_weights(folder.path / "transformer").files:
        shapes |= tensor_shapes(path)
    shapes.pop(_POSITIONS, None)
    return shapes
