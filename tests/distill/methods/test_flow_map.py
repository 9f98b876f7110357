"""Flow maps: exact maps of Gaussians, derivatives of the real network, and students of one or several steps."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gaussians import gaussian_field
from tiny import PROMPTS, distilled
from torch import Tensor

from distill.config import Full, Lora, load_config
from distill.errors import ConfigError, TeacherError
from distill.flow import between, jump, noise, one_step
from distill.methods.base import Loss, TrainedNetworks, TrainingBatch, Velocities
from distill.methods.flow_map import OBJECTIVES, FlowMapConfig
from distill.methods.policies import TeacherGuidance
from distill.models.sd3 import load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.two_times import FILE, add_second_time, split
from distill.philox import Draw
from distill.pipeline import OneStepPipeline
from distill.student.export import export_student
from distill.training import checkpoint
from distill.training.networks import build

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
M, S = 0.7, 0.5
RECIPE = {"name": "tiny-flow-map", "method": "flow_map", "images_seen": 12}
# torch's forward mode scripts some of its own derivatives when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
both_objectives = pytest.mark.parametrize("objective", sorted(OBJECTIVES))


def gaussian_map(mean: float | Tensor, std: float | Tensor):
    """The mean velocity of data N(mean, std^2), along whose ODE (x - (1 - t) mean) / sigma_t is constant."""

    def student(x: Tensor, times: Tensor, cond: object = None) -> Tensor:
        t, s = times.to(x).unsqueeze(-1).unbind(1)
        sigma_t, sigma_s = (((1 - time) ** 2 * std**2 + time**2).sqrt() for time in (t, s))
        growth = (s + t - std**2 * (2 - s - t)) / (sigma_s + sigma_t)  # (sigma_s - sigma_t) / (s - t), at s = t too
        return growth / sigma_t * (x - (1 - t) * mean) - mean

    return student


def gaussian_loss(objective: str, mean: float | Tensor, std: float | Tensor, images: range) -> Loss:
    config = FlowMapConfig(objective=objective, weight="uniform", guidance=TeacherGuidance(scale=1))
    draw = Draw(0, "x", images)
    teacher = gaussian_field(M, S)
    nets = Velocities(gaussian_map(mean, std), lambda x, t, cond: teacher(x, t.to(x)), teacher, None)
    return config.student_loss(nets, TrainingBatch(draw.normal((1,)).double(), None, draw))


@both_objectives
def test_the_loss_is_zero_at_the_exact_map_and_only_there(objective):
    assert gaussian_loss(objective, M, S, range(256)).value.item() < 1e-12
    for mean, std in ((M + 0.1, S), (M, S + 0.1), (-0.4, 1.3)):
        assert gaussian_loss(objective, mean, std, range(256)).value.item() > 1e-3


@both_objectives
def test_the_gradient_leads_to_the_exact_map(objective):
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.4, 1.3))
    optimizer = torch.optim.Adam([mean, std], lr=0.05)
    for step in range(100):
        optimizer.zero_grad()
        gaussian_loss(objective, mean, std, range(32 * step, 32 * step + 32)).value.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(M, abs=0.02)
    assert std.item() == pytest.approx(S, abs=0.02)


def test_where_jumps_start_and_end():
    config = FlowMapConfig(from_noise=0.25, guidance=TeacherGuidance(scale=1))
    asked = []

    def student(x: Tensor, times: Tensor, cond: object) -> Tensor:
        asked.append(times)
        return x

    draw = Draw(0, "x", range(400))
    nets = Velocities(student, lambda x, t, cond: x, lambda *_: None, None)
    config.student_loss(nets, TrainingBatch(draw.normal((1,)), None, draw))
    t, s = asked[-1].unbind(1)
    assert (t == 1).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert ((s >= 0) & (s < t)).all()
    assert torch.equal(asked[0], between(torch.ones(400), t))  # states are the student's own, from noise
    with pytest.raises(ConfigError, match="from_noise below 1"):
        load_config("scenes-debug", ["method={name: flow_map, objective: eulerian, from_noise: 1}"])


@pytest.fixture(scope="module")
def cond(teacher: Path):
    return SD3TextEncoder.load(SD3Folder.read(teacher)).encode(PROMPTS)


def moved(teacher: Path, kind: Full | Lora):
    """Networks whose student of two times is no longer its teacher, in any of its weights."""
    torch.manual_seed(3)
    networks = build(SD3Folder.read(teacher), kind, torch.float32, CPU, TrainedNetworks(("student",), two_times=True))
    weights = networks.trainable("student")
    for tensor in weights.values():
        tensor.data += 0.05 * torch.randn(tensor.shape)
    return networks


@pytest.mark.parametrize("kind", [Full(), Lora(rank=4, alpha=8, gradient_checkpointing=True)])
def test_it_starts_as_the_teacher_for_every_s_and_the_second_time_learns(kind, teacher, cond):
    networks = build(SD3Folder.read(teacher), kind, torch.float32, CPU, TrainedNetworks(("student",), two_times=True))
    student, x = networks.velocity("student"), noise(range(4), SHAPE)
    t, s = torch.tensor([1.0, 1.0, 0.6, 0.3]), torch.tensor([0.0, 0.7, 0.5, 0.1])
    expected = networks.velocity("teacher")(x, t, cond)
    assert torch.equal(student(x, between(t, s), cond), expected)

    nets = Velocities(student, networks.field("teacher"), networks.field("fake"), cond[2])
    with networks.using("student"):
        draw = Draw(0, "x", range(4))
        FlowMapConfig(guidance=TeacherGuidance(scale=2)).student_loss(
            nets, TrainingBatch(x, cond, draw)
        ).value.backward()
    _, second = split(networks.trainable("student"))
    assert len(second) == 4
    assert second["time_text_embed.second_time.linear_2.weight"].grad.abs().max() > 0
    own = {name for name, tensor in networks.trainable("student").items() if tensor.grad is not None}
    assert len(own - second.keys()) > 20

    for tensor in networks.trainable("student").values():
        tensor.data += 0.05 * torch.randn(tensor.shape)
    assert (student(x, between(t, s), cond) - student(x, t, cond)).abs().max() > 0.01
    assert torch.equal(student(x, between(t, 0 * s), cond), student(x, t, cond))
    assert torch.equal(networks.velocity("teacher")(x, t, cond), expected)


@both_objectives
def test_derivatives_are_those_of_finite_differences(objective, teacher, cond):
    """With a constant field w each target leaves only the derivative, through adapters and checkpointed blocks."""
    networks = moved(teacher, Lora(rank=4, alpha=8, gradient_checkpointing=True))
    v, x, w = networks.velocity("student"), noise(range(4), SHAPE), noise(range(4, 8), SHAPE)
    t, s = torch.tensor([1.0, 0.9, 0.6, 0.3]), torch.tensor([0.1, 0.7, 0.5, 0.1])
    with torch.no_grad():
        target = OBJECTIVES[objective](v, lambda *_: w, x, t, s, cond)
        if objective == "eulerian":
            h = 1e-4  # the teacher's time embedding turns by 1000 radians over [0, 1]
            ends = [v(x + h * w, between(t + h, s), cond), v(x - h * w, between(t - h, s), cond)]
            sign = 1
        else:
            h = 1e-2
            ends = [v(x, between(t, s + h), cond), v(x, between(t, s - h), cond)]
            sign = -1
    slope = (ends[0] - ends[1]) / (2 * h)
    found = sign * (target - w) / (s - t).view(-1, 1, 1, 1)
    assert slope.abs().max() > 0.01
    torch.testing.assert_close(found, slope, rtol=0.02, atol=0.02 * slope.abs().max().item())


@pytest.mark.parametrize("kind", [Full(), Lora(rank=4, alpha=8)])
def test_the_exported_student_is_plain_in_one_step_and_takes_any_number(kind, teacher, cond, tmp_path):
    networks = moved(teacher, kind)
    weights = networks.trainable("student")
    lora = kind if isinstance(kind, Lora) else None
    out = export_student(SD3Folder.read(teacher), weights, tmp_path / "out", RECIPE, lora, torch.float32)
    z, student = noise(range(4), SHAPE), networks.velocity("student")
    plain = load_transformer(SD3Folder.read(out))  # as stock diffusers loads it: every key is known to it
    with torch.no_grad():
        own = one_step(student, z, cond)
        stock = one_step(lambda x, t, cond: velocity(plain, x, t, cond), z, cond)
        x = z
        for t, s in pairwise((1.0, 0.75, 0.5, 0.25, 0.0)):
            x = jump(student, x, torch.full((4,), t), torch.full((4,), s), cond)
    exact = {"rtol": 0.0, "atol": 0.0} if isinstance(kind, Full) else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(stock, own, **exact)
    pipeline = OneStepPipeline.load(out)
    torch.testing.assert_close(pipeline.latents(cond, z), own, **exact)
    torch.testing.assert_close(pipeline.latents(cond, z, steps=4), x, **exact)
    assert (x - own).abs().max() > 0.01


def test_steps_that_a_student_was_not_made_for_are_refused(teacher, cond, tmp_path):
    transformer = load_transformer(SD3Folder.read(teacher))
    add_second_time(transformer)
    out = export_student(SD3Folder.read(teacher), dict(transformer.named_parameters()), tmp_path / "out", RECIPE)
    z = noise(range(4), SHAPE)
    with pytest.raises(ConfigError, match="from 1, not 0"):
        OneStepPipeline.load(out).latents(cond, z, steps=0)
    single = shutil.copytree(out, tmp_path / "single")
    record = json.loads((single / "onestep.json").read_text())
    (single / "onestep.json").write_text(json.dumps({**record, "any_step": False}))
    with pytest.raises(ConfigError, match="set steps to 1"):
        OneStepPipeline.load(single).latents(cond, z, steps=2)
    (out / FILE).write_bytes(b"cut")
    with pytest.raises(TeacherError, match=FILE):
        OneStepPipeline.load(out)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_whole_run_learns_keeps_and_exports_the_second_time(kind, teacher, tmp_path):
    out = distilled(teacher, tmp_path, "method={name: flow_map}", f"networks.kind={kind}")
    tensors, _ = checkpoint.load(out / "checkpoints" / checkpoint.state_name(16))
    name = "time_text_embed.second_time.linear_2.weight"
    assert tensors[f"student/{name}"].abs().max() > 0
    assert tensors[f"average/{name}"].abs().max() > 0
    pipeline = OneStepPipeline.load(out / "student")
    assert pipeline(PROMPTS[:1], [0], steps=2).shape == (1, 16, 16, 3)
