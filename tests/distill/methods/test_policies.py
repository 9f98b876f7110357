"""Policies that methods share: the distribution of times, and which images are guided."""

import pytest
import torch
from scipy import stats

from distill.flow import guided_velocity, shift_time
from distill.methods.policies import TeacherGuidance, Times
from distill.philox import Draw

COUNT = 20_000


def scales(guidance: TeacherGuidance, t: torch.Tensor, draw: Draw) -> torch.Tensor | None:
    return guidance.scale_at(t, guidance.sample_scale(draw))


def test_logit_normal_times_are_the_shifted_sigmoid_of_normal_numbers():
    times = Times(mean=0.7, std=0.8, shift=3.0, low=1e-6, high=1 - 1e-6).sample(Draw(0, "times", range(COUNT)))
    logits = torch.logit(times.double()) - torch.log(torch.tensor(3.0))  # a shift of s adds ln s to the logit
    assert stats.kstest(logits.numpy(), "norm", args=(0.7, 0.8)).pvalue > 1e-3


def test_uniform_times_are_clamped():
    times = Times(distribution="uniform", low=0.1, high=0.8).sample(Draw(0, "times", range(COUNT)))
    assert (float(times.min()), float(times.max())) == (pytest.approx(0.1), pytest.approx(0.8))
    inside = times[(times > 0.1) & (times < 0.8)].numpy()
    assert stats.kstest(inside, "uniform", args=(0.1, 0.7)).pvalue > 1e-3
    shifted = Times(distribution="uniform", shift=3.0, low=1e-6, high=1 - 1e-6).sample(Draw(0, "times", range(8)))
    torch.testing.assert_close(shifted, shift_time(Draw(0, "times", range(8)).uniform(), 3.0))


def test_guidance_holds_inside_of_its_interval_with_a_scale_for_each_image():
    t = torch.tensor([0.1, 0.4, 0.9])
    constant = scales(TeacherGuidance(scale=2.5, interval=(0.2, 0.8)), t, Draw(0, "g", range(3)))
    assert constant.tolist() == [1.0, 2.5, 1.0]
    drawn = scales(TeacherGuidance(scale=(2, 6)), t, Draw(0, "g", range(3)))
    torch.testing.assert_close(drawn, 2 + 4 * Draw(0, "g", range(3)).uniform())


def test_a_teacher_without_guidance_is_not_asked_for_its_null_prompt():
    t = torch.tensor([0.5])
    assert scales(TeacherGuidance(scale=1), t, Draw(0, "g", range(1))) is None
    x_t = torch.ones(1, 2)
    assert guided_velocity(lambda x, t, cond: 2 * x, None, x_t, t, None, None).equal(2 * x_t)
