"""The network calls that a plan counts are those that a loss makes."""

import math
from statistics import NormalDist

import pytest

from distill.config import load_config
from distill.methods import flow_map
from distill.methods.dmd import DMDConfig, Gan
from distill.methods.fgm import FGMConfig
from distill.methods.policies import Guidance
from distill.plan.step_cost import network_calls, skip_share

# torch's forward mode scripts some of its own derivatives when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def test_a_derivative_is_taken_as_the_loss_takes_it(teacher):
    (phase,) = flow_map.FlowMapConfig().update_phases()
    # A jump from noise, its derivative there, the teacher's field, and the forward that the student learns from.
    found = [(each.role, each.backward, each.forward_mode) for each in network_calls(phase)]
    student = [("student", False, False), ("student", False, True), ("student", True, False)]
    assert [each for each in found if each[0] == "student"] == student
    assert {each for each in found if each[0] != "student"} == {("teacher", False, False)}


def test_skip_layer_guidance_is_a_third_call_of_the_teacher_without_those_blocks():
    role, (_, phase) = "teacher", FGMConfig(guidance=Guidance(guide_fake=True, skip_layers=(0,))).update_phases()
    calls = [(call.rows, call.backward, call.skip_layers) for call in network_calls(phase) if call.role == role]
    assert calls == [(2, True, ()), (1, True, (0,))]


def test_skip_layer_calls_count_by_the_share_of_micro_batches_that_need_one():
    method = load_config("sd3.5-medium-lora").method
    fake, student = method.update_phases()
    low, times = method.guidance.skip_interval[0], method.times
    # Times are clamped to 0.98, which is inside of the interval, so only its low end decides.
    outside = NormalDist(times.mean, times.std).cdf(math.log(low / (1 - low)))
    assert skip_share(student, 1) == pytest.approx(1 - outside, abs=0.06)
    assert skip_share(student, 4) == pytest.approx(1 - outside**4, abs=0.09)
    assert skip_share(fake, 4) == 1.0  # it has none
    _, with_critic = DMDConfig(gan=Gan(), times=times, guidance=method.guidance).update_phases()
    assert skip_share(with_critic, 4) == skip_share(student, 4)
    calls = network_calls(student, range(4))
    assert {call.rows for call in calls} <= {1, 2}
