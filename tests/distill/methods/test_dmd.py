"""DMD against the KL divergence of Gaussians; and what makes a method one file."""

from pathlib import Path

import pytest
import torch
from gaussians import FixedDraw, affine_student, gaussian_field
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill import methods
from distill.methods.base import Real, TrainingBatch, Velocities
from distill.methods.dmd import DMDConfig, Gan
from distill.methods.policies import Guidance, Times
from distill.philox import Draw


def test_the_direction_descends_the_kl_divergence():
    m, s = 0.7, 0.5
    mean = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    z, eps = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    t = 0.02 + 0.68 * torch.rand(count, generator=generator, dtype=torch.float64)

    config = DMDConfig(normalize=False, times=Times(distribution="uniform"), guidance=Guidance(scale=1))
    nets = Velocities(affine_student(mean, std), gaussian_field(m, s), gaussian_field(mean.item(), std.item()), None)
    loss = config.student_loss(nets, TrainingBatch(z, None, FixedDraw(t, eps))).value
    found = torch.autograd.grad(loss, (mean, std))

    student = (1 - t) ** 2 * std**2 + t**2
    teacher = (1 - t) ** 2 * s**2 + t**2
    kl = 0.5 * ((teacher / student).log() + (student + (1 - t) ** 2 * (mean - m) ** 2) / teacher - 1)
    exact = torch.autograd.grad((t**2 / (1 - t) ** 2 * kl).mean(), (mean, std))
    for got, expected in zip(found, exact, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=0.02)


def test_the_divisor_is_each_image_s_own():
    z = torch.randn(4, 3)
    nets = Velocities(affine_student(0.0, 1.0), gaussian_field(0.5, 1.0), gaussian_field(0.0, 2.0), None)
    config = DMDConfig(guidance=Guidance(scale=1))

    def gradient(rows: range) -> Tensor:
        x = z[rows.start : rows.stop].requires_grad_(True)
        (loss,) = torch.autograd.grad(config.student_loss(nets, TrainingBatch(x, None, Draw(0, "x", rows))).value, x)
        return loss * len(rows)

    torch.testing.assert_close(gradient(range(4))[:1], gradient(range(1)))


def test_the_critic_learns_how_likely_an_image_is_real_and_the_student_follows_it():
    """Two round Gaussians in the plane: the best logit is linear in x_t, and known."""
    center, t = torch.tensor([1.0, -0.5]), 0.4
    made, other, eps = torch.randn(3, 4096, 2, generator=torch.Generator().manual_seed(0))
    draw = FixedDraw(torch.full((4096,), t), eps)
    config = DMDConfig(times=Times(distribution="uniform"), guidance=Guidance(scale=1), gan=Gan(fake=1, student=1e-3))
    head = nn.Linear(2, 1)
    mean = torch.zeros(2, requires_grad=True)
    nets = Velocities(
        affine_student(mean, 1.0),
        gaussian_field(0.0, 1.0),
        gaussian_field(0.0, 1.0),  # the teacher's, so that the critic alone moves the student
        None,
        lambda x_t, t, cond: head(x_t).squeeze(1),
    )
    batch = TrainingBatch(made, None, draw, Real(center + other, None))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = config.fake_loss(nets, batch).value
        loss.backward()
        return loss

    optimizer.step(closure)
    variance = (1 - t) ** 2 + t**2
    torch.testing.assert_close(head.weight[0], (1 - t) * center / variance, atol=0.06, rtol=0.05)
    torch.testing.assert_close(
        head.bias[0], -((1 - t) ** 2) * center.square().sum() / (2 * variance), atol=0.06, rtol=0
    )

    (found,) = torch.autograd.grad(config.student_loss(nets, batch).value, mean)
    x_t = (1 - t) * (mean + made) + t * eps
    (expected,) = torch.autograd.grad(1e-3 * 1024 / 2 * softplus(-head(x_t)).mean(), mean)
    torch.testing.assert_close(found, expected)
    assert torch.nn.functional.cosine_similarity(-found, center, dim=0) > 0.99


def test_real_images_with_the_student_s_prompts_count_as_the_student_s():
    center, t = torch.tensor([1.0, -0.5]), torch.full((16,), 0.4)
    made, other, eps, prompts, captions = torch.randn(5, 16, 2, generator=torch.Generator().manual_seed(0))
    field = gaussian_field(0.0, 1.0)
    nets = Velocities(affine_student(0.0, 1.0), field, field, None, lambda x_t, t, cond: (x_t * cond).sum(1))
    batch = TrainingBatch(made, prompts, FixedDraw(t, eps), Real(center + other, captions))

    def loss(mismatched: float) -> Tensor:
        gan = Gan(fake=0.5, mismatched=mismatched)
        return DMDConfig(guidance=Guidance(scale=1, caption_dropout=0), gan=gan).fake_loss(nets, batch).value

    real_t = 0.6 * (center + other) + 0.4 * eps
    torch.testing.assert_close(loss(2) - loss(0), 0.5 * 2 * softplus((real_t * prompts).sum(1)).mean())


def test_a_file_in_the_folder_is_all_that_a_method_needs():
    """No other module names a method, except the default of the configuration."""
    package = Path(methods.__file__).parents[1]
    assert set(methods.names()) == {path.stem for path in (package / "methods").glob("[!_]*.py")} - {"base", "policies"}
    for path in package.rglob("*.py"):
        assert not any(f"methods.{name}" in path.read_text() for name in methods.names()), path
