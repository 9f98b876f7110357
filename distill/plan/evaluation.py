"""Arithmetic of evaluations, from configuration files alone."""

from dataclasses import dataclass

from distill.evaluate.sampler import Sampling
from distill.models.geometry import Geometry
from distill.plan.autoencoder import autoencoder_cost
from distill.plan.flop import velocity_flop
from distill.plan.step_cost import SHIFT


@dataclass(frozen=True)
class EvaluationCost:
    """FLOP of the teacher's images, which are made once, and of one evaluation of a student.

    Those of a CLIP model are not counted: at 512 pixels, an image takes 0.2 TFLOP of ViT-L/14 and 10 of SD3 and its
    autoencoder.
    """

    references: float
    evaluation: float


def evaluation_cost(
    geometry: Geometry, size: tuple[int, int], sampling: Sampling, count: int, encodes: bool = True
) -> EvaluationCost:
    """Compute the cost of `count` images of a (width, height) in pixels, of the teacher and of a student.

    `encodes` says whether images are encoded again, for features.
    """
    autoencoder = autoencoder_cost(geometry, size)
    network, coded = velocity_flop(geometry, size), autoencoder.decoding + autoencoder.encoding * encodes
    return EvaluationCost(count * (sampling.nfe(SHIFT) * network + coded), count * (network + coded))
