"""Policies that methods share: the distribution of times, and which images are guided."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from distill.errors import ConfigError
from distill.flow import guided_velocity, shift_time
from distill.methods.base import TrainingBatch, Velocities
from distill.methods.policies import Guidance, TeacherGuidance, Times, guided_at, guided_velocities
from distill.models.sd3 import euler_times
from distill.models.text import TextCondition
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


def test_blocks_are_checked_against_the_teacher_and_need_guidance():
    TeacherGuidance(skip_layers=(0, 23)).check_layers(24)
    with pytest.raises(
        ConfigError, match=r"^method.guidance.skip_layers: .* block 24; the teacher's blocks are 0 to 23"
    ):
        TeacherGuidance(skip_layers=(7, 24)).check_layers(24)
    with pytest.raises(ValueError, match="skip_layers need a scale above 1"):
        TeacherGuidance(scale=1, skip_layers=(7,))


def skipped_steps(guidance: TeacherGuidance, steps: int, shift: float) -> list[int]:
    return [i for i, t in enumerate(euler_times(steps, shift)[:-1].tolist()) if guidance.skips_at(t)]


@pytest.mark.parametrize(
    ("shift", "start", "stop", "interval"),
    [
        (3.0, 0.01, 0.2, TeacherGuidance().skip_interval),  # diffusers' defaults and ours
        (1.0, 0.01, 0.2, (0.8, 0.99)),
        (5.0, 0.01, 0.5, (0.8333, 0.998)),
    ],
)
def test_an_interval_in_t_is_the_stock_pipeline_s_steps_from_start_to_stop(shift, start, stop, interval):
    """Its bounds are `shift_time` of 1 - start and 1 - stop, rounded; the pipeline counts steps, both ends excluded."""
    bounds = shift_time(torch.tensor([1 - stop, 1 - start]), shift)
    assert interval == pytest.approx(bounds.tolist(), abs=1e-4)
    guidance = TeacherGuidance(skip_layers=(0,), skip_interval=interval)
    for steps in range(1, 60):
        theirs = [i for i in range(steps) if steps * start < i < steps * stop]
        assert skipped_steps(guidance, steps, shift) == theirs, steps


def test_skip_layer_guidance_of_images_at_different_times_and_none_for_the_fake():
    """Networks of constant velocity: 1 for a prompt, 0 without one, and 0.25 without the skipped blocks."""
    calls = []

    def network(x_t, t, cond, skip_layers=()):
        calls.append((len(x_t), tuple(skip_layers)))
        return cond.pooled * (0.25 if skip_layers else 1.0)

    guidance = Guidance(scale=3, skip_layers=(1, 2), skip_scale=2, skip_interval=(0.5, 0.9), guide_fake=True)
    t, x_t, draw = torch.tensor([0.4, 0.6, 0.95]), torch.zeros(3, 1), Draw(0, "x", range(3))
    cond, null = (TextCondition(torch.full((n, 1, 1), v), torch.full((n, 1), v)) for n, v in ((3, 1.0), (1, 0.0)))
    nets = Velocities(network, network, network, null)
    u, v = guided_velocities(guidance, nets, x_t, t, TrainingBatch(x_t, cond, draw))
    assert u.flatten().tolist() == [3.0, 3.0 + 2 * 0.75, 3.0]
    assert v.flatten().tolist() == [3.0, 3.0, 3.0]
    assert calls == [(6, ()), (3, (1, 2)), (6, ())]  # teacher, teacher without blocks, fake

    calls.clear()
    nets = replace(nets, conditional_calls=True)
    assert torch.equal(guided_velocities(guidance, nets, x_t, t, TrainingBatch(x_t, cond, draw))[0], u)
    before, _ = guided_velocities(guidance, nets, x_t, t.clamp(max=0.4), TrainingBatch(x_t, cond, draw))
    assert before.flatten().tolist() == [3.0, 3.0, 3.0]
    assert calls == [(6, ()), (3, (1, 2)), (6, ()), (6, ()), (6, ())]  # without the call that no image needs

    calls.clear()
    sampled = guided_at(guidance, network, null, 3.0)
    assert [float(sampled(x_t, time, cond)[0]) for time in (0.4, 0.6, 0.95)] == u.flatten().tolist()
    assert calls == [(6, ()), (6, ()), (3, (1, 2)), (6, ())]
