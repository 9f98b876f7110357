"""Reflow against Gaussians, whose teacher's pairs are an affine map, and a complete run."""

from pathlib import Path

import pytest
import torch
from gaussians import affine_student, gaussian_field
from tiny import distilled

from distill.methods.base import TrainingBatch, Velocities
from distill.methods.policies import TeacherGuidance
from distill.methods.reflow import ReflowConfig
from distill.models.sd3 import euler_times
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.pipeline import OneStepPipeline
from distill.training import checkpoint

M, S = 0.7, 0.5
CONFIG = ReflowConfig(teacher_steps=400, teacher_shift=1.0, guidance=TeacherGuidance(scale=1))


def loss(config: ReflowConfig, student, teacher=gaussian_field(M, S), count: int = 512):
    draw = Draw(0, "x", range(count))
    z = draw.normal((1,))
    return config.student_loss(Velocities(student, teacher, teacher, None), TrainingBatch(z, None, draw)), z


def test_one_step_regresses_onto_the_affine_map_of_the_teacher_s_ode():
    """Pairs are x_0 = m + s z, so a student that makes a + b z is off by (m - a) + (s - b) z."""
    a, b = (torch.tensor(value, requires_grad=True) for value in (-0.4, 1.3))
    off, z = loss(CONFIG, affine_student(a, b))
    expected = ((M - a) + (S - b) * z).square().mean()
    assert off.value.item() == pytest.approx(expected.item(), rel=0.01)
    for got, exact in zip(*(torch.autograd.grad(value, (a, b)) for value in (off.value, expected)), strict=True):
        assert got.item() == pytest.approx(exact.item(), rel=0.01)
    at, z = loss(CONFIG, affine_student(M, S))
    assert at.value.item() < 1e-4
    torch.testing.assert_close(at.x_0, M + S * z)


def test_reflow_is_at_its_optimum_where_every_pair_is_a_straight_line():
    """x_t = (1 - t) (m + s z) + t z has one z for each x_t, so the field that finds it has no error at any t."""

    def straight(x_t, t, cond=None):
        t = t.view(-1, 1)
        z = (x_t - (1 - t) * M) / ((1 - t) * S + t)
        return z - (M + S * z)

    config = CONFIG.model_copy(update={"stage": "reflow"})
    found, _ = loss(config, straight)
    assert found.value.item() < 1e-4
    assert found.metrics["t"].std() > 0.2
    assert loss(config, gaussian_field(M, S))[0].value.item() > 0.01  # the teacher's own paths bend


def test_an_image_keeps_its_guidance_scale_along_its_whole_path():
    """A teacher of constant velocity c, 0 without a prompt, moves noise by scale c, however many steps it takes."""
    count = 64
    cond = TextCondition(torch.ones(count, 1, 1), torch.ones(count, 1))
    null = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    draw = Draw(0, "x", range(count))
    nets = Velocities(lambda x, t, cond: torch.zeros_like(x), lambda x, t, cond: cond.pooled, lambda *_: None, null)
    config = ReflowConfig(teacher_steps=7, guidance=TeacherGuidance(scale=(2.0, 8.0)))
    moved = config.student_loss(nets, TrainingBatch(torch.zeros(count, 1), cond, draw)).metrics["regression"].sqrt()
    torch.testing.assert_close(moved, 2 + 6 * Draw(0, "x", range(count)).uniform())


def test_pairs_take_the_times_of_the_teacher_s_scheduler_and_skip_layers_only_at_those_in_the_interval():
    times, skipped = [], []

    def teacher(x_t, t, cond, skip_layers=()):
        (skipped if skip_layers else times).append(float(t[0]))
        return torch.zeros_like(x_t)

    cond, null = (TextCondition(torch.zeros(n, 1, 1), torch.zeros(n, 1)) for n in (2, 1))
    nets = Velocities(lambda x, t, cond: torch.zeros_like(x), teacher, lambda *_: None, null, shift=3.0)
    batch = TrainingBatch(torch.zeros(2, 1), cond, Draw(0, "x", range(2)))
    guidance = TeacherGuidance(skip_layers=(7, 8, 9))
    ReflowConfig(guidance=guidance).student_loss(nets, batch)
    assert times == euler_times(28, 3.0)[:-1].tolist()
    assert skipped == times[1:6]  # the stock pipeline's at 28 steps
    times.clear()
    ReflowConfig(guidance=guidance, teacher_steps=4, teacher_shift=1.5).student_loss(nets, batch)
    assert times == euler_times(4, 1.5)[:-1].tolist()


def test_whole_runs_of_both_stages_move_the_student_alone(teacher: Path, tmp_path: Path):
    straighter = distilled(teacher, tmp_path / "reflow", "method={name: reflow, stage: reflow, teacher_steps: 2}")
    tensors, record = checkpoint.load(straighter / "checkpoints" / checkpoint.state_name(16))
    assert record["images"] == 16
    assert not any(name.startswith("fake") for name in tensors)
    method = "method={name: reflow, teacher_steps: 2, guidance: {scale: 1}}"
    out = distilled(straighter / "student", tmp_path / "distillation", method)
    assert OneStepPipeline.load(out / "student")(["a red circle"], [0]).shape == (1, 16, 16, 3)
