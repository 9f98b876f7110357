"""`RunCheckpoint`: saves and restores the state from which the training of a run resumes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.config import RunConfig
from distill.errors import ConfigError
from distill.training import checkpoint
from distill.training.networks import CRITIC


@dataclass(frozen=True)
class RunCheckpoint:
    """What a checkpoint holds: the trainable weights and the optimizer of each role, and the averaged student."""

    config: RunConfig
    folder: Path
    weights: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]
    adams: dict[str, torch.optim.Optimizer]

    def save(self, images: int, seconds: float, processes: int) -> None:
        """Write a checkpoint after so many images and seconds of training, and remove old ones."""
        tensors = checkpoint.pack("average", self.average)
        for role, weights in self.weights.items():
            tensors |= checkpoint.pack(role, weights)
            tensors |= checkpoint.pack(f"{role}-optimizer", checkpoint.optimizer_tensors(self.adams[role]))
        identity = self.config.identity()
        record = {"images": images, "seconds": seconds, "processes": processes, "config": identity}
        saved = self.folder / checkpoint.state_name(images)
        checkpoint.save(saved, tensors, record)
        checkpoint.prune(saved, self.config.cadence.keep_checkpoints)

    def restore(self) -> tuple[int, float]:
        """Restore the newest checkpoint; return its images and its seconds of training, 0 without one."""
        newest = checkpoint.latest(self.folder)
        if newest is None:
            return 0, 0.0
        tensors, record = checkpoint.load(newest)
        self.config.check_same(record["config"], newest)
        copy_tensors(checkpoint.unpack("average", tensors), self.average)
        for role, weights in self.weights.items():
            copy_tensors(checkpoint.unpack(role, tensors), weights)
            checkpoint.restore_optimizer(self.adams[role], checkpoint.unpack(f"{role}-optimizer", tensors))
        return int(record["images"]), float(record.get("seconds", 0))

    def begin(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy weights of other networks: "student", "average", and the fake if it is given.

        Optimizers and data start from the beginning. Raises ConfigError for other shapes.
        """
        for part, own in (("average", self.average), *self.weights.items()):
            given = parts.get(part, {})
            if not given and part != "student":
                continue  # a method that trained no such role
            # A critic that only one of the two runs has is not copied.
            critic = {name for name in given.keys() ^ own.keys() if name.startswith(CRITIC)}
            own, given = ({name: x for name, x in of.items() if name not in critic} for of in (own, given))
            if {name: tensor.shape for name, tensor in given.items()} != {name: own[name].shape for name in own}:
                raise ConfigError(
                    f"init_from: {self.config.init_from} has other weights for the {part}; networks and teacher must "
                    "be alike"
                )
            copy_tensors(given, own)


def copy_tensors(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Set weights to tensors of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)
