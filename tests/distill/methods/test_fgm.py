"""FGM against closed forms, against autograd, and end to end on a mixture of Gaussians."""

import logging
import math

import pytest
import torch
from gaussians import FixedDraw, affine_student, gaussian_field
from torch import nn

from distill.flow import interpolate
from distill.methods.base import Real, TrainingBatch, Velocities
from distill.methods.dmd import DMDConfig
from distill.methods.fgm import FGMConfig, RealUID
from distill.methods.policies import WEIGHTS, Guidance, Times
from distill.models.text import TextCondition
from distill.philox import Draw

SEED = 0


class BatchDraw(Draw):
    """Draws of one generator for the whole batch: what a toy needs, at a toy's speed."""

    def __init__(self, count):
        self.count, self.generator = count, torch.Generator().manual_seed(SEED)

    def normal(self, shape):
        return torch.randn(self.count, *shape, generator=self.generator)

    def uniform(self):
        return torch.rand(self.count, generator=self.generator)


def gaussian_gap(mean, std, m, s, t):
    """E|u - v_theta|^2 at the student's x_t, in one dimension, exactly: both fields are linear in x_t."""
    variance = (1 - t) ** 2 * std**2 + t**2
    slope_v = (t - (1 - t) * std**2) / variance
    slope_u = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    # x_t = (1 - t) mean + sqrt(variance) n, so that u - v = a + b n
    a = slope_u * (1 - t) * (mean - m) - m + mean
    b = (slope_u - slope_v) * variance.sqrt()
    return (a**2 + b**2).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_gradient_is_that_of_the_distance_to_the_student_s_own_field(alpha):
    """With alpha = 0.5 twice the loss has the gradient of E|u - v_theta|^2; the others differ by (1 - 2 alpha) L1's."""
    m, s = 0.7, 0.5
    mean = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(SEED)
    count = 400_000
    z = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    t = 0.02 + 0.96 * torch.rand(count, generator=generator, dtype=torch.float64)
    eps = torch.randn(count, 1, generator=generator, dtype=torch.float64)

    config = FGMConfig(
        alpha=alpha, weight="velocity-uniform", times=Times(distribution="uniform"), guidance=Guidance(scale=1)
    )
    fake = gaussian_field(mean.detach(), std.detach())
    nets = Velocities(affine_student(mean, std), gaussian_field(m, s), fake, None)
    loss = config.student_loss(nets, TrainingBatch(z, None, FixedDraw(t, eps))).value
    found = torch.autograd.grad(2 * loss, (mean, std))

    exact = torch.autograd.grad(gaussian_gap(mean, std, m, s, t), (mean, std))
    x_t = interpolate(mean + std * z, eps, t)
    first = (gaussian_field(m, s)(x_t, t) - fake(x_t, t)).square().mean()  # L1 with the fake held
    partial = torch.autograd.grad(first, (mean, std))
    for got, whole, part in zip(found, exact, partial, strict=True):
        assert got.item() == pytest.approx((whole + (1 - 2 * alpha) * part).item(), rel=0.03, abs=0.01)


REAL, MADE = (0.7, 0.5), (-0.4, 1.3)  # mean and standard deviation of the real images, and of the student's


def best_fake(a, b, x, t, mean, std):
    """RealUID's fake at its optimum, and the density (a p + (1 - a) p*) of what it was trained on; x and t (N, 1)."""

    def density(mean, std):
        variance = (1 - t) ** 2 * std**2 + t**2
        return torch.exp(-((x - (1 - t) * mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()

    p, q = density(mean, std), density(*REAL)
    v, w = gaussian_field(mean, std)(x, t), gaussian_field(*REAL)(x, t)
    return (b * p * v + (1 - b) * q * w) / (a * p + (1 - a) * q), a * p + (1 - a) * q


def even_normals(count, columns):
    """Times (count,) and columns of normals (count, 1), spread evenly: means over them are nearly exact."""
    points = torch.quasirandom.SobolEngine(columns + 1, scramble=True, seed=SEED).draw(count, dtype=torch.float64)
    normals = torch.special.ndtri(points[:, 1:].clamp(1e-9, 1 - 1e-9))
    return 0.02 + 0.96 * points[:, 0], *normals.unsqueeze(-1).unbind(1)


@pytest.mark.parametrize(("a", "b"), [(0.9, 0.96), (0.95, 0.89)])
def test_realuid_descends_the_distance_to_its_best_fake(a, b):
    """Twice the loss has the gradient of E_t of the integral of (a p + (1 - a) p*) |u - v|^2 over x_t."""
    teacher = gaussian_field(0.5, 0.8)  # no perfect one: not the field of the real images
    config = FGMConfig(
        alpha=0.5,
        weight="velocity-uniform",
        times=Times(distribution="uniform"),
        guidance=Guidance(scale=1),
        realuid=RealUID(a=a, b=b),
    )
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in MADE)
    t, z, eps = even_normals(1 << 15, 2)
    fake = lambda x, t, cond: best_fake(a, b, x, t.view(-1, 1), *MADE)[0]  # noqa: E731
    nets = Velocities(affine_student(mean, std), teacher, fake, None)
    found = torch.autograd.grad(
        2 * config.student_loss(nets, TrainingBatch(z, None, FixedDraw(t, eps))).value, (mean, std)
    )

    times = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    at, x = (column.reshape(-1, 1) for column in torch.meshgrid(times, grid, indexing="ij"))
    v, density = best_fake(a, b, x, at, mean, std)
    gap = (density * (teacher(x, at) - v) ** 2).view(97, 801)
    exact = torch.autograd.grad(torch.trapezoid(torch.trapezoid(gap, grid), times) / 0.96, (mean, std))
    for got, expected in zip(found, exact, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=0.01)


def test_realuid_s_fake_learns_from_both_kinds_of_images():
    """At its best no direction lowers the loss; at the student's own field, plain FGM's best, some do."""
    a, b = 0.9, 0.96
    config = FGMConfig(alpha=0.5, times=Times(distribution="uniform"), realuid=RealUID(a=a, b=b))
    t, z, other, eps = even_normals(1 << 15, 3)
    real = Real(REAL[0] + REAL[1] * other, None)

    def slopes(field):
        steps = torch.zeros(4, dtype=torch.float64, requires_grad=True)

        def fake(x, t, cond):
            ways = torch.cat([torch.ones_like(x), x, (3 * x).sin(), t.view(-1, 1) * x], 1)
            return field(x, t) + (ways @ steps).unsqueeze(1)

        nets = Velocities(affine_student(*MADE), gaussian_field(*REAL), fake, None)
        loss = config.fake_loss(nets, TrainingBatch(z, None, FixedDraw(t, eps), real)).value
        return torch.autograd.grad(loss, steps)[0].abs()

    best = slopes(lambda x, t: best_fake(a, b, x, t.view(-1, 1), *MADE)[0])
    assert best.max() < 0.004
    assert slopes(gaussian_field(*MADE)).max() > 0.03


def test_realuid_without_real_images_is_fgm():
    nets, _ = small_networks()
    plain = FGMConfig(alpha=0.5, guidance=Guidance(scale=1))
    same = plain.model_copy(update={"realuid": RealUID(a=1, b=1)})
    assert not any(phase.real for phase in same.update_phases())
    z = torch.randn(8, 2)
    for name in ("student_loss", "fake_loss"):
        one, other = (
            getattr(config, name)(nets, TrainingBatch(z, None, Draw(SEED, "x", range(8)))).value
            for config in (plain, same)
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 1.0, "realuid": {"a": 0.95, "b": 0.9}}, "alpha 0.5, not 1.0"),
        ({"alpha": 0.5, "realuid": {"a": 1, "b": 0.9}}, "b must be 1 too, not 0.9"),
        ({"alpha": 0.5, "realuid": {"a": 0.8, "b": 0.9}}, "greater than or equal to 0.85"),
        ({"alpha": 0.5, "realuid": {"a": 0.9, "b": 1.1}}, "less than or equal to 1"),
    ],
)
def test_realuid_is_refused_where_nothing_justifies_it(values, words):
    with pytest.raises(ValueError, match=words):
        FGMConfig.model_validate(values)


def test_equal_shares_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        RealUID(a=0.9, b=0.9)
    assert "adds nothing" in caplog.text


@pytest.mark.parametrize(
    ("scale", "a", "warned"), [(4.5, 0.95, True), ((2, 8), 0.95, True), (1, 0.95, False), (4.5, 1, False)]
)
def test_realuid_with_a_guided_teacher_is_warned_of(scale, a, warned, caplog):
    with caplog.at_level(logging.WARNING):
        FGMConfig(alpha=0.5, guidance=Guidance(scale=scale), realuid=RealUID(a=a, b=1))
    assert ("set guidance.scale to 1" in caplog.text) == warned


def small_networks():
    torch.manual_seed(SEED)
    teacher, fake, student = (nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(3))

    def field(net):
        return lambda x, t, cond: net(torch.cat([x, t.view(-1, 1)], 1))

    return Velocities(field(student), field(teacher), field(fake), None), student


@pytest.mark.parametrize(("alpha", "paper"), [(0.5, lambda l1, l2: (l1 + l2) / 2), (1.0, lambda l1, l2: l2 / 2)])
def test_autograd_agrees_with_the_paper_s_own_terms(alpha, paper):
    nets, student = small_networks()
    config = FGMConfig(alpha=alpha, weight="velocity-uniform", guidance=Guidance(scale=1))
    z = torch.randn(64, 2)

    def gradient(loss):
        return torch.autograd.grad(loss, list(student.parameters()))

    ours = gradient(config.student_loss(nets, TrainingBatch(z, None, Draw(SEED, "x", range(64)))).value)

    draw = Draw(SEED, "x", range(64))
    t, eps, x_0 = config.times.sample(draw), draw.normal((2,)), z - nets.student(z, torch.ones(64), None)
    x_t = interpolate(x_0, eps, t)
    u, v, w = nets.teacher(x_t, t, None), nets.fake(x_t, t, None), eps - x_0
    theirs = gradient(paper((u - v).square().mean(), 2 * ((u - v) * (v - w)).mean()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_fake_learns_by_flow_matching_on_fresh_noise():
    nets, student = small_networks()
    z = torch.randn(64, 2)
    loss = FGMConfig().fake_loss(nets, TrainingBatch(z, None, Draw(SEED, "fake", range(64))))
    draw = Draw(SEED, "fake", range(64))
    t, eps, x_0 = FGMConfig().times.sample(draw), draw.normal((2,)), z - nets.student(z, torch.ones(64), None)
    expected = (nets.fake(interpolate(x_0, eps, t), t, None) - (eps - x_0)).square().mean()
    torch.testing.assert_close(loss.value, expected)
    assert all(g is None for g in torch.autograd.grad(loss.value, list(student.parameters()), allow_unused=True))


def test_weights_are_what_their_names_say_and_per_image():
    t = torch.tensor([0.2, 0.8])
    x_0, x_t, u = torch.randn(3, 2, 4)
    assert torch.equal(WEIGHTS["velocity-uniform"](x_0, x_t, t, u), torch.ones(2))
    torch.testing.assert_close(WEIGHTS["one-minus-t"](x_0, x_t, t, u), t**2 * (1 - t))
    error = (x_0 - (x_t - t.view(-1, 1) * u)).abs().mean(1)
    torch.testing.assert_close(WEIGHTS["inverse-l1"](x_0, x_t, t, u), t**2 / error)
    alone = WEIGHTS["inverse-l1"](x_0[:1], x_t[:1], t[:1], u[:1])
    torch.testing.assert_close(alone, WEIGHTS["inverse-l1"](x_0, x_t, t, u)[:1])


def test_guidance_is_a_policy():
    t = torch.tensor([0.1, 0.5, 0.9])
    draw = Draw(SEED, "guidance", range(3))
    assert Guidance(scale=4.0, interval=(0.3, 0.7)).scale_at(t, 4.0).tolist() == [1.0, 4.0, 1.0]
    drawn = Guidance(scale=(2.0, 8.0)).sample_scale(draw)
    assert ((drawn >= 2) & (drawn <= 8)).all()
    assert len(set(drawn.tolist())) == 3
    with pytest.raises(ValueError, match="low to high"):
        Guidance(scale=(8.0, 2.0))


def test_guided_fields_are_null_plus_scale_times_the_difference():
    seen = {}

    def field(name):
        def velocity(x, t, cond):
            seen[name] = len(x)
            return cond.embeds.mean((1, 2)).view(-1, 1) * x

        return velocity

    cond = TextCondition(torch.full((4, 1, 1), 2.0), torch.zeros(4, 1))
    null = TextCondition(torch.full((1, 1, 1), 1.0), torch.zeros(1, 1))
    x_0 = torch.randn(4, 2)
    for guided, rows in ((False, 4), (True, 8)):
        config = FGMConfig(weight="velocity-uniform", guidance=Guidance(scale=3.0, guide_fake=guided))
        nets = Velocities(affine_student(0.0, 1.0), field("u"), field("v"), null)
        loss = config.student_loss(nets, TrainingBatch(x_0, cond, Draw(SEED, "x", range(4))))
        assert (seen["u"], seen["v"]) == (8, rows)
        draw = Draw(SEED, "x", range(4))
        t, eps = config.times.sample(draw), draw.normal((2,))
        x_t, w = interpolate(x_0, eps, t), eps - x_0
        u, v = (1 + 3 * (2 - 1)) * x_t, (4 if guided else 2) * x_t
        expected = ((u - v) * (u - w)).mean(1) - (u - v).square().mean(1)
        torch.testing.assert_close(loss.value, expected.mean())


@pytest.mark.parametrize("method", [FGMConfig(weight="velocity-uniform"), DMDConfig(normalize=False)])
@pytest.mark.parametrize("guided", [False, True])
def test_the_student_is_that_of_the_guided_teacher_whether_or_not_the_fake_is_guided(method, guided):
    """Teacher N(m c, s^2) and student N(theta c, s^2) of a caption c; c = 0 is the empty prompt. Guided: N(g m c, s^2).

    Velocities of Gaussians of one width are affine in the mean, so all guided fields are exact too.
    """
    m, s, scale, count = 0.5, 0.6, 3.0, 128
    theta, mean_of_fake = (torch.tensor(m, requires_grad=True) for _ in range(2))  # both start as the teacher
    cond = TextCondition(torch.zeros(count, 1, 1), torch.tensor([-1.0, 1.0]).repeat(count // 2).view(-1, 1))
    null = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))

    def teacher(x_t, t, cond):
        return gaussian_field(m * cond.pooled, s)(x_t, t)

    def fake(x_t, t, cond):
        return gaussian_field(mean_of_fake * cond.pooled, s)(x_t, t)

    def student(z, t, cond):
        return affine_student(theta * cond.pooled, s)(z, t)

    config = method.model_copy(update={"guidance": Guidance(scale=scale, guide_fake=guided)})
    nets, draw = Velocities(student, teacher, fake, null), BatchDraw(count)
    fake_adam, student_adam = torch.optim.Adam([mean_of_fake], 0.1), torch.optim.Adam([theta], 0.05)
    for _ in range(120):
        for adam, loss in ((fake_adam, config.fake_loss), (student_adam, config.student_loss)):
            adam.param_groups[0]["lr"] *= 0.98
            adam.zero_grad()
            loss(nets, TrainingBatch(draw.normal((1,)), cond, draw)).value.backward()
            adam.step()
    assert theta.item() == pytest.approx(scale * m, rel=0.1)
    assert mean_of_fake.item() == pytest.approx(m if guided else scale * m, rel=0.1)


def test_a_mixture_of_gaussians_is_distilled_end_to_end():
    """Four modes in the plane: the exact teacher's field, a student and a fake of two small layers, seconds."""
    centers = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]])
    std = 0.25

    def teacher(x_t, t, cond):
        t = t.view(-1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        offset = x_t.unsqueeze(1) - (1 - t) * centers
        share = torch.softmax(-(offset.square().sum(-1, keepdim=True) / (2 * variance)), dim=1)
        fields = (t - (1 - t) * std**2) / variance * offset - centers
        return (share * fields).sum(1)

    torch.manual_seed(SEED)

    def network(inputs):
        return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    student, fake_net = network(2), network(3)
    fake = lambda x, t, cond: fake_net(torch.cat([x, t.view(-1, 1)], 1))  # noqa: E731
    config = FGMConfig(alpha=0.5, weight="inverse-l1", guidance=Guidance(scale=1), fake_steps=4)
    nets = Velocities(lambda z, t, cond: student(z), teacher, fake, None)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), 3e-3, betas=(0.0, 0.999)),
        "fake": torch.optim.Adam(fake_net.parameters(), 6e-3, betas=(0.0, 0.999)),
    }
    draw = BatchDraw(128)
    steps = 500
    for step in range(steps):
        for phase in config.update_phases():
            full = 3e-3 if phase.role == "student" else 6e-3
            optimizers[phase.role].param_groups[0]["lr"] = full * (1 - step / steps)
            for _ in range(phase.steps):
                loss = phase.loss(nets, TrainingBatch(draw.normal((2,)), None, draw)).value
                optimizers[phase.role].zero_grad()
                loss.backward()
                optimizers[phase.role].step()
    z = torch.randn(2000, 2)
    made = (z - student(z)).detach()
    distance, nearest = torch.cdist(made, centers).min(1)
    shares = torch.bincount(nearest, minlength=4) / len(made)
    assert shares.min() > 0.1  # no mode is lost
    # The data are at 1, pure noise is at 2.7; a continuous map of one Gaussian must bridge the modes somewhere.
    assert distance.square().mean().sqrt() < 1.75 * std * math.sqrt(2)
