"""The fastest options are measured once, kept and used; the caller's own choices are not changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, undistilled

from distill.errors import OutputError
from distill.pipeline import OneStepPipeline, RuntimeOptions, read_student
from distill.student.runtime import RuntimeChoice, unmeasured
from distill.student.tuner import WASTE, Tuner
from distill.student.tuning import tuned_choice

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undistilled(teacher, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture(scope="module")
def choices(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the measured choice of the student."""
    folder = tmp_path_factory.mktemp("choices")
    tuned_choice(student, CPU, RuntimeOptions(), folder, 60.0, 4)
    return folder


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def without_measurement(student: Path, options: RuntimeOptions) -> RuntimeChoice:
    return unmeasured(options, CPU, read_student(student))


def test_an_image_of_a_measured_choice_has_the_same_bits_alone_and_in_any_batch(student: Path, choices: Path) -> None:
    pipeline = OneStepPipeline.load(student, CPU, tuned_choice(student, CPU, RuntimeOptions(), choices, 60.0, 4))
    assert "auto" not in pipeline.choice.options.model_dump(exclude={"decoder"}).values()
    for each in pipeline.choice.sizes:  # a larger batch than the network's would only be padded
        assert max(*each.decoder, *pipeline.choice.text) <= max(each.network)
    images = pipeline(PROMPTS, range(len(PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        assert pipeline([prompt], [i])[0].equal(images[i])
    assert pipeline(PROMPTS[1:], range(1, len(PROMPTS))).equal(images[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_choice_for_a_gpu_keeps_images_near_those_of_a_cpu_and_independent_of_their_batch(
    student: Path, tmp_path: Path
) -> None:
    device = torch.device("cuda")
    pipeline = OneStepPipeline.load(
        student, device, tuned_choice(student, device, RuntimeOptions(), tmp_path, 120.0, 4)
    )
    images = pipeline(PROMPTS, range(len(PROMPTS)))
    plain = OneStepPipeline.load(student)(PROMPTS, range(len(PROMPTS)))
    assert (images.int() - plain.int()).abs().max() <= 8
    assert pipeline(PROMPTS[1:2], [1])[0].equal(images[1])


def test_a_kept_choice_is_read_and_another_one_is_made_for_other_options(student: Path, choices: Path) -> None:
    (path,) = kept(choices)
    record = json.loads(path.read_text())
    assert record["milliseconds"]
    record["choice"]["text"] = [3]
    path.write_text(json.dumps(record))
    read = tuned_choice(student, CPU, RuntimeOptions(), choices, 60.0, 4)
    assert read.text == (3,)
    tuned_choice(student, CPU, RuntimeOptions(attention="math"), choices, 0.001, 4)
    tuned_choice(student, CPU, RuntimeOptions(), choices, 0.001, 2)
    assert len(kept(choices)) == 3


def test_students_of_one_architecture_share_a_choice(student: Path, choices: Path, tmp_path: Path) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16", "transformers_version": "0"}))
    before = kept(choices)
    tuned_choice(other, CPU, RuntimeOptions(), choices, 0.001, 4)
    assert kept(choices) == before


def test_what_the_caller_chose_stays(student: Path, tmp_path: Path) -> None:
    options = RuntimeOptions(
        precision="fp32", attention="math", channels_last=False, compile=False, cuda_graphs=False, batch_buckets=(1, 2)
    )
    choice = tuned_choice(student, CPU, options, tmp_path, 60.0, 4)
    assert choice == without_measurement(student, options)
    assert choice.options == options


def test_without_time_the_choice_is_the_one_without_measurement_and_kept_with_a_warning(
    student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = RuntimeOptions()
    assert tuned_choice(student, CPU, options, tmp_path, 1e-6, 4) == without_measurement(student, options)
    (path,) = kept(tmp_path)
    written = path.read_bytes()
    caplog.clear()
    assert tuned_choice(student, CPU, options, tmp_path, 60.0, 4) == without_measurement(student, options)
    assert path.read_bytes() == written
    assert f"the search of {path} was cut short; delete the file to measure again" in caplog.text


def test_a_damaged_choice_is_made_again(student: Path, tmp_path: Path) -> None:
    options = RuntimeOptions(precision="fp32", attention="sdpa", channels_last=False, batch_buckets=(1,))
    choice = tuned_choice(student, CPU, options, tmp_path, 60.0)
    (path,) = kept(tmp_path)
    whole = path.read_text()
    record = json.loads(whole)
    no_batch, no_size = json.loads(whole), json.loads(whole)
    no_batch["choice"]["text"] = [0]
    no_size["choice"]["sizes"] = []
    for damaged in (whole[:-20], json.dumps(no_batch), json.dumps(no_size), "[" * 100_000):
        path.write_text(damaged)
        assert tuned_choice(student, CPU, options, tmp_path, 1e-6) == choice
        assert json.loads(path.read_text())["made_for"] == record["made_for"]


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(student: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"cannot be kept in {tmp_path}/file/choices: Not a directory"):
        tuned_choice(student, CPU, RuntimeOptions(), tmp_path / "file" / "choices", 60.0)


@pytest.mark.parametrize(
    ("seconds", "batch"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 1),  # nothing is gained
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.45}, 2 if WASTE * 0.45 >= 0.6 else 4),
        ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}, 8),
        ({1: 1.0, 2: 1.1}, 1),  # and larger ones are not tried
        ({1: 1.0, 2: 1.02, 4: 0.5, 8: 0.5}, 4),  # noise ends nothing
    ],
)
def test_the_batch_is_the_smallest_that_takes_little_more_for_each_image_than_the_best(
    seconds: dict[int, float], batch: int, student: Path
) -> None:
    tuner = Tuner(student, CPU, RuntimeOptions(), 16, 60.0)
    assert tuner.smallest("network", (4,), seconds.__getitem__, max(seconds))[0] == (batch,)


def test_batch_sizes_that_compute_other_bits_than_the_chosen_one_are_left_out(student: Path) -> None:
    pipeline = OneStepPipeline.load(student)
    tuner = Tuner(student, CPU, RuntimeOptions(), 16, 60.0)

    def inputs(rows: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.arange(rows) * (1.0 if pipeline.choice.text[0] in (4, 8) else 1.0 + torch.finfo().eps)

    assert tuner.equal(pipeline, inputs, 8, (1, 2, 4, 8)) == (4, 8)
    assert tuner.equal(pipeline, inputs, 2, (1, 2, 4, 8)) == (1, 2)
    assert tuner.equal(pipeline, inputs, 4, ()) == (4,)
    assert tuner.equal(pipeline, lambda rows: lambda: torch.zeros(rows), 8, (4, 8)) == (8,)  # which shows nothing
