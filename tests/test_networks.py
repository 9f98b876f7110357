"""Two adapters on one base learn exactly as three separate copies would, with and without checkpointing."""

from pathlib import Path

import pytest
import torch

from distill.config import Full, Lora
from distill.flow import Draw
from distill.methods import Batch, Velocities
from distill.methods.fgm import Config
from distill.networks import ROLES, FullCopies, SharedBase, build
from distill.policies import Guidance
from distill.teacher import load_transformer
from distill.text import SD3TextEncoder

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def conditions(teacher: Path):
    encoder = SD3TextEncoder.load(teacher)
    return encoder.encode(["a red circle", "a blue square", "circle"]), encoder.encode([""])


def shared(teacher: Path, checkpointing: bool) -> SharedBase:
    torch.manual_seed(0)
    networks = build(teacher, Lora(rank=4, alpha=8, checkpointing=checkpointing), torch.float32, CPU)
    assert isinstance(networks, SharedBase)
    for role in ROLES:  # adapters start as zero maps; make them matter, and differ
        for tensor in networks.trainable(role).values():
            tensor.data += 0.05 * torch.randn(tensor.shape)
    return networks


def separate(teacher: Path) -> tuple[SharedBase, SharedBase, SharedBase]:
    """Three models with storage of their own; each is asked for one role only."""
    return tuple(shared(teacher, checkpointing=False) for _ in range(3))


def gradients(velocities, trainable, role, conditions):
    cond, null = conditions
    config = Config(guidance=Guidance(teacher=3.0, fake="alike"))
    turn = {turn.role: turn for turn in config.turns()}[role]
    draw = Draw(0, role, range(3))
    turn.loss(Velocities(*velocities, null), Batch(draw.normal(SHAPE), cond, draw)).value.backward()
    return {name: tensor.grad for name, tensor in trainable.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ROLES)
def test_one_base_has_the_gradients_of_three_copies(teacher, conditions, role, checkpointing):
    one = shared(teacher, checkpointing)
    student, fake = (one.velocity(name) if name == role else one.field(name) for name in ("student", "fake"))
    with one.using(role):
        found = gradients((student, one.field("teacher"), fake), one.trainable(role), role, conditions)

    a, b, c = separate(teacher)
    plain = (c.velocity("student"), a.velocity("teacher"), b.velocity("fake"))
    copies = {"fake": b, "student": c}[role]
    expected = gradients(plain, copies.trainable(role), role, conditions)
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    other = "student" if role == "fake" else "fake"
    assert all(tensor.grad is None for tensor in one.trainable(other).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_copies_pass_gradient_on_and_keep_none(teacher, conditions, checkpointing):
    networks = build(teacher, Full(checkpointing=checkpointing), torch.float32, CPU)
    assert isinstance(networks, FullCopies)
    velocities = (networks.velocity("student"), networks.field("teacher"), networks.field("fake"))
    found = gradients(velocities, networks.trainable("student"), "student", conditions)
    assert all(tensor.grad is None for tensor in networks.trainable("fake").values())

    copies = [load_transformer(teacher) for _ in range(2)]
    again = build(teacher, Full(), torch.float32, CPU)
    plain = [
        lambda x, t, cond, model=model: model(x, cond.embeds, cond.pooled, 1000 * t, return_dict=False)[0]
        for model in copies
    ]
    expected = gradients([again.velocity("student"), *plain], again.trainable("student"), "student", conditions)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_roles_start_as_the_teacher_and_adapters_are_fp32_on_a_bf16_base(teacher, conditions):
    cond, _ = conditions
    networks = build(teacher, Lora(rank=4, alpha=4), torch.bfloat16, CPU)
    x, t = torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 1.0])
    expected = networks.velocity("teacher")(x, t, cond)
    for role in ROLES:
        torch.testing.assert_close(networks.velocity(role)(x, t, cond), expected)
        assert {tensor.dtype for tensor in networks.trainable(role).values()} == {torch.float32}
        assert all(tensor.requires_grad for tensor in networks.trainable(role).values())
    assert networks.trainable("fake").keys() == networks.trainable("student").keys()
