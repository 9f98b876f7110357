"""The math of rectified flow, compared with diffusers' scheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from distill.flow import (
    interpolate,
    noise,
    one_step,
    shift_time,
    x_0_from_velocity,
)


def test_interpolation_is_the_scheduler_s():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_0, eps = torch.randn(2, 6, 4, 8, 8)
    timesteps = scheduler.timesteps[[0, 10, 250, 500, 900, 999]]
    t = timesteps / 1000
    torch.testing.assert_close(interpolate(x_0, eps, t), scheduler.scale_noise(x_0, timesteps, eps))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_is_the_scheduler_s_single_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(1)
    assert scheduler.sigmas.tolist() == [1.0, 0.0]
    z, v = torch.randn(2, 3, 4, 8, 8)
    stepped = scheduler.step(v, scheduler.timesteps[0], z).prev_sample
    torch.testing.assert_close(one_step(lambda x, t, c: v, z, None), stepped)


def test_x_0_is_read_off_the_velocity():
    x_0, eps = torch.randn(2, 5, 3)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    x_t = interpolate(x_0, eps, t)
    torch.testing.assert_close(x_0_from_velocity(x_t, eps - x_0, t), x_0)


def test_a_shift_adds_its_logarithm_to_the_logit():
    t = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(torch.logit(shift_time(t, 3.0)), torch.logit(t) + torch.log(torch.tensor(3.0)))


def test_noise_depends_on_the_image_s_seed_alone():
    batch = noise([5, 3, 2**40, 9], (4, 2, 2))
    assert torch.equal(batch[1:2], noise([3], (4, 2, 2)))
    assert torch.equal(batch[2:3], noise([2**40], (4, 2, 2)))


def test_every_bit_of_a_seed_counts():
    seeds = [7, 2**31 + 7, 2**32 - 1, *(7 + 2**bit for bit in range(32, 64)), 2**64 - 1]
    made = noise(seeds, (4, 8, 8)).flatten(1)
    correlation = torch.corrcoef(made) - torch.eye(len(seeds))
    assert correlation.abs().max() < 5 / made.shape[1] ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"from 0 to 2\^64 - 1, not"):
        noise([seed], (4,))


@pytest.mark.parametrize("seed", [7.5, "7", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(TypeError, match="integer"):
        noise([seed], (4,))
