"""Two adapters on one base learn exactly as three separate copies would, however the base computes."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from parity import CPU, SHAPE, Prompts, asked, assert_same, expected, gradients, shared
from tiny import make_transformer
from torch._dynamo.utils import counters

from distill.config import Full, Lora
from distill.errors import ConfigError
from distill.methods.base import ROLES, Velocities
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.training.networks import FullCopies, SharedBase, build, compiles


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [{}, {"gradient_checkpointing": True}, {"attention": "math"}], ids=str)
def test_one_base_has_the_gradients_of_three_copies(teacher, kind, role):
    one = shared(teacher, **kind)
    with one.using(role):
        assert_same(gradients(asked(one, role), one.trainable(role), role), expected(teacher, role))
    other = "student" if role == "fake" else "fake"
    assert all(tensor.grad is None for tensor in one.trainable(other).values())
    assert all(tensor.requires_grad for role in ROLES for tensor in one.trainable(role).values())


@pytest.fixture
def traced() -> Iterator[None]:
    """Compile with a backend that only traces, because code generation takes minutes."""
    torch.compiler.reset()
    torch.compiler.set_default_backend("eager")
    yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it, unless it is an error
def test_compiled_blocks_have_the_same_gradients_and_compile_once(traced):
    """The student's update phase calls all three roles, with and without a skipped block, under checkpointing."""

    def networks(**kind):
        torch.manual_seed(0)
        base = make_transformer(dual_attention_layers=(0,))  # SD3.5-medium's kind of block, and the last one
        made = SharedBase(base, Lora(rank=4, alpha=8, gradient_checkpointing=True, **kind))
        for role in ROLES:
            for tensor in made.trainable(role).values():
                tensor.data += 0.05 * torch.randn(tensor.shape)
        return made

    def update(networks):
        with networks.using("student"):
            found = gradients(asked(networks, "student"), networks.trainable("student"), "student")
        for tensor in networks.trainable("student").values():
            tensor.grad = None
        return found

    compiled = networks(compile=True)
    assert_same(update(compiled), update(networks()))
    forms = counters["stats"]["unique_graphs"]
    assert 0 < forms <= 8  # two kinds of blocks for each role, and those of the teacher without a block
    update(compiled)
    assert counters["stats"]["unique_graphs"] == forms  # roles alternate without compiling again


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_copies_pass_gradient_on_and_keep_none(teacher, checkpointing):
    networks = build(SD3Folder.read(teacher), Full(gradient_checkpointing=checkpointing), torch.float32, CPU)
    assert isinstance(networks, FullCopies)
    found = gradients(asked(networks, "student"), networks.trainable("student"), "student")
    assert all(tensor.grad is None for tensor in networks.trainable("fake").values())
    assert all(tensor.requires_grad for tensor in networks.trainable("fake").values())

    copies = [load_transformer(SD3Folder.read(teacher)) for _ in range(2)]
    again = build(SD3Folder.read(teacher), Full(), torch.float32, CPU)
    plain = [
        lambda x, t, cond, skip=(), model=model: model(
            x, cond.embeds, cond.pooled, 1000 * t, return_dict=False, skip_layers=list(skip)
        )[0]
        for model in copies
    ]
    nets = Velocities(again.velocity("student"), *plain, Prompts().null)
    assert_same(found, gradients(nets, again.trainable("student"), "student"))


def test_weights_that_are_held_keep_no_activations(teacher):
    networks = build(SD3Folder.read(teacher), Full(), torch.float32, CPU)
    x, t, cond = torch.randn(2, *SHAPE, requires_grad=True), torch.full((2,), 0.5), Prompts().rows([0, 1])

    def kept(velocity):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            velocity(x, t, cond)
        return sum(sizes)

    assert kept(networks.field("fake")) == kept(networks.field("teacher")) < kept(networks.velocity("fake"))


def test_full_copies_are_not_sharded(teacher):
    with pytest.raises(ConfigError, match=r"networks\.kind full"):
        build(SD3Folder.read(teacher), Full(), torch.float32, CPU, mesh=object())


def test_targets_that_the_teacher_has_not_are_named(teacher):
    with pytest.raises(ConfigError, match=r"networks\.targets: the teacher has no layer 'to_kk'"):
        build(SD3Folder.read(teacher), Lora(targets=("to_q", "to_kk")), torch.float32, CPU)


def test_roles_start_as_the_teacher_and_adapters_are_fp32_on_a_bf16_base(teacher):
    cond = Prompts().rows(range(3))
    networks = build(SD3Folder.read(teacher), Lora(rank=4, alpha=4), torch.bfloat16, CPU)
    x, t = torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        expected = networks.velocity("teacher")(x, t, cond)
        for role in ROLES:
            torch.testing.assert_close(networks.velocity(role)(x, t, cond), expected)
    for role in ROLES:
        assert {tensor.dtype for tensor in networks.trainable(role).values()} == {torch.float32}
        assert all(tensor.requires_grad for tensor in networks.trainable(role).values())
    assert networks.trainable("fake").keys() == networks.trainable("student").keys()


def test_blocks_are_compiled_by_default_only_on_gpus_with_a_c_compiler(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles(choice, cpu) for choice in (True, False, "auto")] == [True, False, False]
    monkeypatch.setenv("CC", "cc")
    assert compiles("auto", gpu) is (find_spec("triton") is not None)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not compiles("auto", gpu)
