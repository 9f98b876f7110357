"""The critic on the fake's features: its gradients are those of a plain composition, on one base or on copies."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.config import Full, Lora
from distill.methods.base import Real, TrainedNetworks, TrainingBatch, Velocities
from distill.methods.dmd import DMDConfig, Gan
from distill.methods.policies import Guidance
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.philox import Draw
from distill.training.networks import Networks, build

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
CONFIG = DMDConfig(guidance=Guidance(scale=1), gan=Gan(fake=1, student=1))


@pytest.fixture(scope="module")
def cond(teacher: Path) -> TextCondition:
    return SD3TextEncoder.load(SD3Folder.read(teacher)).encode(["a red circle", "a blue square", "circle"])


def made(teacher: Path, kind: Full | Lora) -> Networks:
    torch.manual_seed(0)
    networks = build(SD3Folder.read(teacher), kind, torch.float32, CPU, TrainedNetworks(critic=True))
    for role in networks.roles:  # adapters and the critic start as zero maps; make them matter, and differ
        for tensor in networks.trainable(role).values():
            tensor.data += 0.05 * torch.randn(tensor.shape)
    return networks


def gradients(role: str, velocities: Velocities, networks: Networks, cond: TextCondition) -> dict[str, Tensor | None]:
    draw = Draw(0, role, range(3))
    batch = TrainingBatch(draw.normal(SHAPE), cond, draw, Real(draw.normal(SHAPE), cond[[2, 0, 1]]))
    loss = {phase.role: phase.loss for phase in CONFIG.update_phases()}[role](velocities, batch)
    loss.value.backward()
    return {name: tensor.grad for name, tensor in networks.trainable(role).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ["fake", "student"])
def test_one_base_has_the_gradients_of_copies(teacher, cond, role, checkpointing):
    one = made(teacher, Lora(rank=4, alpha=8, gradient_checkpointing=checkpointing))
    fields = [one.velocity(name) if name == role else one.field(name) for name in ("student", "teacher", "fake")]
    with one.using(role):
        found = gradients(role, Velocities(*fields, cond[0], one.critic(role == "fake")), one, cond)

    a, b, c = (made(teacher, Lora(rank=4, alpha=8)) for _ in range(3))  # each is asked for one role alone
    plain = Velocities(c.velocity("student"), a.velocity("teacher"), b.velocity("fake"), cond[0], b.critic(True))
    expected = gradients(role, plain, {"fake": b, "student": c}[role], cond)
    assert found.keys() == expected.keys()
    assert any(name.startswith("critic.") for name in found) is (role == "fake")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    other = one.trainable("student" if role == "fake" else "fake")
    assert all(tensor.grad is None for tensor in other.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_into_images_is_that_of_a_plain_composition(teacher, cond, checkpointing):
    networks = made(teacher, Full(gradient_checkpointing=checkpointing))
    x_t = torch.randn(3, *SHAPE, requires_grad=True)
    t = torch.tensor([0.1, 0.5, 0.9])
    found = networks.critic(False)(x_t, t, cond)
    (gradient,) = torch.autograd.grad(found.sum(), x_t)
    assert all(tensor.grad is None for tensor in networks.trainable("fake").values())

    weights = networks.trainable("fake")
    model = load_transformer(SD3Folder.read(teacher))
    model.load_state_dict({name: weights[name] for name, _ in model.named_parameters()}, strict=False)
    last: list[Tensor] = []
    model.transformer_blocks[-1].register_forward_hook(lambda block, inputs, outputs: last.append(outputs[1]))
    model(x_t, cond.embeds, cond.pooled, 1000 * t)
    norm, token, logit = ([weights[f"critic.{name}.{kind}"] for kind in ("weight", "bias")] for name in _LAYERS)
    hidden = torch.nn.functional.layer_norm(last[0], last[0].shape[-1:], *norm)
    tokens = torch.nn.functional.silu(hidden @ token[0].T + token[1])
    expected = (tokens.mean(1) @ logit[0].T + logit[1]).squeeze(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x_t)[0])


_LAYERS = ("norm", "token", "logit")


def test_a_fresh_critic_moves_nobody_and_is_the_fake_s_alone(teacher, cond):
    networks = build(SD3Folder.read(teacher), Full(), torch.float32, CPU, TrainedNetworks(critic=True))
    x_t = torch.randn(3, *SHAPE, requires_grad=True)
    logits = networks.critic(False)(x_t, torch.full((3,), 0.5), cond)
    assert torch.equal(logits, torch.zeros(3))
    assert torch.autograd.grad(logits.sum(), x_t)[0].abs().max() == 0
    beside = networks.trainable("fake").keys() - networks.trainable("student").keys()
    assert beside == {f"critic.{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")}
