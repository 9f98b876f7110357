"""The cost of evaluations: network evaluations of teacher and student, and the autoencoder both ways."""

import pytest

from distill.evaluate.sampler import Sampling
from distill.methods.policies import TeacherGuidance
from distill.models.geometry import read_geometry
from distill.plan.evaluation import evaluation_cost
from distill.plan.flop import velocity_flop


def test_the_teacher_costs_its_steps_twice_with_guidance(teacher) -> None:
    geometry = read_geometry(str(teacher))
    unguided, guided = (Sampling(10, TeacherGuidance(scale=scale)) for scale in (1, 4))
    costs = [evaluation_cost(geometry, (16, 16), sampling, 40) for sampling in (unguided, guided)]
    per_step = 40 * velocity_flop(geometry, (16, 16))
    assert costs[0].evaluation == costs[1].evaluation > per_step
    assert [cost.references - cost.evaluation for cost in costs] == pytest.approx([9 * per_step, 19 * per_step])
    large = evaluation_cost(geometry, (32, 16), unguided, 40)
    autoencoder = costs[0].evaluation - per_step
    assert large.evaluation - 40 * velocity_flop(geometry, (32, 16)) == pytest.approx(2 * autoencoder, rel=0.1)
    decoded = evaluation_cost(geometry, (16, 16), unguided, 40, encodes=False)
    assert per_step < decoded.evaluation < costs[0].evaluation
