"""Two processes learn what one does: gradients of three copies, whole and sharded, and runs on either number."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from parity import IMAGES, SHAPE, Prompts, assert_same, expected
from PIL import Image
from safetensors.torch import load_file

from distill.methods.base import ROLES
from distill.pipeline import read_student
from distill.report.run_folder import read_run
from distill.run import accelerator, run
from distill.training import checkpoint, trainer

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory) -> Path:
    """The output folder of two processes."""
    out = tmp_path_factory.mktemp("two")
    (out / "prompts.txt").write_text("a red circle\na blue square\ncircle and square\nred\nleft of a circle\n")
    done = subprocess.run([sys.executable, parity.__file__, str(teacher), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The last state of a run by one process."""
    return finished(teacher, tmp_path_factory.mktemp("alone"))


def finished(teacher: Path, out: Path) -> dict[str, torch.Tensor]:
    """Continue a run to its end in this process, and return its last state."""
    list(trainer.train(parity.run(), out, parity.shared(teacher), Prompts(), [SHAPE], Accelerator(cpu=True)))
    return last(out)


def last(out: Path, images: int = 4 * IMAGES) -> dict[str, torch.Tensor]:
    state = checkpoint.latest(out / "checkpoints")
    assert state is not None
    assert int(state.name) == images
    return checkpoint.load(state)[0]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_two_processes_find_the_gradients_of_three_copies(teacher, two, form, checkpointing, role):
    assert_same(load_file(two / f"{form}-{checkpointing}-{role}.safetensors"), expected(teacher, role))


def test_a_sharded_base_is_held_in_parts(teacher, two):
    networks = parity.shared(teacher)
    base = sum(tensor.numel() for tensor in networks._base.parameters())
    adapters = sum(tensor.numel() for role in ROLES for tensor in networks.trainable(role).values())
    for rank in range(2):
        held = int((two / f"held-{rank}").read_text()) - adapters
        assert held == pytest.approx((base - adapters) / 2, rel=0.02)


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_a_run_ends_alike_on_any_number_of_processes(teacher, two, alone, form, tmp_path):
    if form == "whole":  # two processes were stopped half way; one goes on
        shutil.copytree(two / form, tmp_path, dirs_exist_ok=True)
        assert checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))[1]["processes"] == 2
        found = finished(teacher, tmp_path)
    else:
        found = last(two / form)
    for name, tensor in alone.items():
        if name.startswith("average/"):
            torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_processes_of_a_sharded_base_sample_together_and_one_of_them_encodes(two):
    assert [int((two / f"prompts-{rank}").read_text()) for rank in range(2)] == [2, 0]
    with Image.open(two / "sharded" / "samples" / f"{4 * IMAGES:012d}.png") as grid:
        grid.load()


def test_processes_wait_for_work_of_the_main_one(two):
    assert [(two / f"waited-{rank}").read_text() for rank in range(2)] == ["done", "done"]


def test_a_whole_run_ends_alike_on_two_processes(teacher, two, tmp_path):
    config = parity.whole(teacher, two / "prompts.txt", "evaluation.evaluator=none")  # which changes no weight
    list(run(config, tmp_path, accelerator(config, tmp_path)))
    assert checkpoint.load_record(checkpoint.latest(two / "full" / "checkpoints"))["processes"] == 2
    expected, found = last(tmp_path, 96), last(two / "full", 96)
    for name, tensor in expected.items():
        if name.startswith("average/"):
            torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    moved = max(
        (tensor - expected[name.replace("student/", "average/")]).abs().max()
        for name, tensor in found.items()
        if name.startswith("student/")
    )
    assert moved > 1e-5  # it did learn
    lines = [read_run(folder).metrics for folder in (tmp_path, two / "full")]
    for one, other in zip(*lines, strict=True):
        for name in ("gap", "flow_matching", "loss/fake", "loss/student", "latent/saturated"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=2e-5), (name, one["images"])
    assert read_student(two / "full" / "student").images_seen == 96


def test_a_signal_to_any_process_of_a_run_stops_and_saves_all_of_it(two):
    assert [int((two / f"status-{rank}").read_text()) for rank in range(2)] == [128 + signal.SIGTERM] * 2
    saved = checkpoint.latest(two / "stopped" / "checkpoints")
    assert saved is not None
    assert f"Stopped after {int(saved.name)} images" in (two / "said-0").read_text()
    assert int(saved.name) < 96
    assert (two / "said-1").read_text() == ""


def test_a_batch_that_two_processes_cannot_share_is_refused(two):
    assert (two / "refused").read_text() == "batch 3 does not divide over 2 processes; take a multiple of 2"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path, monkeypatch):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "1gpu": 1, "2x8gpu-fsdp2": 16}.get(path.stem, 8)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")  # what the launcher sets is put back
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    assert arguments.use_fsdp is ("fsdp" in path.stem)
    if arguments.use_fsdp:
        environment = prepare_multi_gpu_env(arguments)
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert arguments.use_parallelism_config is (config.num_machines > 1 and arguments.use_fsdp)
