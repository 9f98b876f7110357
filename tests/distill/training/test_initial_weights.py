"""Adapters that start from full weights."""

from functools import partial

import parity
import pytest
import torch
from parity import SHAPE, Prompts
from tiny import make_teacher

from distill.models.sd3 import load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.training import checkpoint
from distill.training.initial_weights import read_initial_weights
from distill.training.networks import CRITIC, build
from distill.training.run_checkpoint import copy_tensors

KIND = {"networks.kind": "lora", "networks.rank": 64, "networks.alpha": 16}


@pytest.fixture(scope="module")
def changed(teacher, tmp_path_factory):
    """A folder of the teacher with other weights in all linear layers."""
    folder = make_teacher(tmp_path_factory.mktemp("changed"))
    transformer = load_transformer(SD3Folder.read(teacher))
    generator = torch.Generator().manual_seed(0)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight += 0.05 * torch.randn(module.weight.shape, generator=generator)
    transformer.save_pretrained(folder / "transformer")
    return folder, transformer


@torch.no_grad()
def at_a_point(v):
    x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    return v(x_t, torch.tensor([0.3, 1.0]), Prompts().rows([0, 1]))


def test_adapters_of_full_rank_are_the_student_that_they_start_from(teacher, changed):
    folder, transformer = changed
    config = parity.run(init_from=folder, **KIND)
    parts = read_initial_weights(config, SD3Folder.read(teacher), parity.CPU)
    assert not parts["fake"]  # it starts from the teacher
    networks = build(SD3Folder.read(teacher), config.networks, torch.float32, parity.CPU)
    before = at_a_point(networks.velocity("fake"))
    copy_tensors(parts["student"], networks.trainable("student"))
    expected = at_a_point(partial(velocity, transformer))
    torch.testing.assert_close(at_a_point(networks.velocity("student")), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_a_point(networks.velocity("fake")), before)


def test_from_a_run_of_full_copies_student_and_average_are_its_average(teacher, changed, tmp_path):
    folder, transformer = changed
    same = load_transformer(SD3Folder.read(teacher)).state_dict()
    full, critic = transformer.state_dict(), {f"{CRITIC}x": torch.ones(3)}
    for weights in (same, full):
        weights.pop("pos_embed.pos_embed")
    of_roles = {"student": same, "average": full, "fake": full | critic}
    packed = {
        name: tensor for part, weights in of_roles.items() for name, tensor in checkpoint.pack(part, weights).items()
    }
    checkpoint.save(tmp_path / "checkpoints" / "000000000008", packed, {})
    config = parity.run(init_from=tmp_path, **KIND)
    parts = read_initial_weights(config, SD3Folder.read(teacher), parity.CPU)
    expected = read_initial_weights(parity.run(init_from=folder, **KIND), SD3Folder.read(teacher), parity.CPU)
    torch.testing.assert_close(parts["student"], expected["student"])
    torch.testing.assert_close(parts["average"], expected["student"])
    torch.testing.assert_close(parts["fake"], expected["student"] | critic)
