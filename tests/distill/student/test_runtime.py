"""Every way of computing a student: near the plain one where it should be, and refused by name where it cannot be."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import PROMPTS, stock_pipeline

from distill.errors import ConfigError
from distill.models.teacher import load_transformer
from distill.pipeline import OneStepPipeline, Runtime
from distill.student.export import export_student

CPU = torch.device("cpu")
SEEDS = range(4)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def exported(teacher: Path, folder: Path) -> Path:
    weights = dict(load_transformer(teacher).named_parameters())
    return export_student(teacher, weights, folder, {"name": "tiny", "method": "fgm", "images_seen": 0})


@pytest.fixture(scope="module")
def student(teacher_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(teacher_t5, tmp_path_factory.mktemp("students") / "t5")


@pytest.fixture(scope="module")
def plain(student: Path) -> torch.Tensor:
    return OneStepPipeline.load(student)(PROMPTS, SEEDS).int()


def tiny_vae(folder: Path, channels: int = 4, stages: int = 2) -> Path:
    torch.manual_seed(0)
    blocks, widths = (1,) * stages, (8,) * stages
    vae = AutoencoderTiny(
        latent_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("runtime", "levels"),
    [
        (Runtime(precision="bf16"), 8),
        (Runtime(precision="fp16"), 1),
        (Runtime(attention="math"), 1),
        (Runtime(channels_last=True), 1),
        (Runtime(t5="cpu"), 2),
    ],
    ids=lambda value: value.label(CPU) if isinstance(value, Runtime) else None,
)
def test_images_stay_within_so_many_of_255_levels(
    runtime: Runtime, levels: int, student: Path, plain: torch.Tensor
) -> None:
    images = OneStepPipeline.load(student, runtime=runtime)(PROMPTS, SEEDS).int()
    assert (images - plain).abs().max() <= levels


def test_a_dropped_t5_gives_what_stock_gives_without_it(student: Path) -> None:
    pipeline = OneStepPipeline.load(student, runtime=Runtime(t5="none"))
    stock = stock_pipeline(student)
    stock.text_encoder_3 = None
    length = pipeline.spec.max_sequence_length
    embeds, _, pooled, _ = stock.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    cond = pipeline.encode(PROMPTS)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.pooled, pooled)
    assert not cond.embeds[:, -length:].any()


def test_a_tiny_vae_decodes_the_students_latents(student: Path, tmp_path: Path) -> None:
    folder = tiny_vae(tmp_path / "tiny")
    pipeline = OneStepPipeline.load(student, runtime=Runtime(tiny_vae=folder))
    latents = pipeline.latents(pipeline.encode(PROMPTS), SEEDS)
    with torch.no_grad():
        pixels = AutoencoderTiny.from_pretrained(folder).decode(latents).sample
    expected = (127.5 * (pixels + 1)).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert (pipeline.decode(latents).float() - expected).abs().max() <= 1
    assert pipeline.computed != OneStepPipeline.load(student).computed


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder, student: folder / "nothing", "is no whole AutoencoderTiny"),
        (lambda folder, student: student / "vae", "holds AutoencoderKL"),
        (lambda folder, student: tiny_vae(folder, channels=16), "decodes 16 channels"),
        (lambda folder, student: tiny_vae(folder, stages=3), "to 4 times"),
    ],
)
def test_a_folder_that_is_no_tiny_vae_of_the_student_is_refused(make, sentence, student, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"tiny_vae .*{sentence}"):
        OneStepPipeline.load(student, runtime=Runtime(tiny_vae=make(tmp_path, student)))


@pytest.mark.parametrize(
    ("runtime", "sentence"),
    [
        (Runtime(cuda_graphs=True), "cuda_graphs needs a CUDA device, not cpu"),
        (Runtime(attention="xformers"), "attention xformers needs"),
        (Runtime(quantize="fp8"), "quantize fp8 needs"),
    ],
)
def test_what_a_cpu_cannot_do_is_named(runtime: Runtime, sentence: str, student: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        OneStepPipeline.load(student, runtime=runtime)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
@pytest.mark.parametrize("runtime", [Runtime(quantize="int8"), Runtime(t5="int8")], ids=["quantize", "t5"])
def test_a_package_that_is_missing_is_named(runtime: Runtime, student: Path) -> None:
    with pytest.raises(ConfigError, match=r"(quantize|t5) int8 needs the package torchao"):
        OneStepPipeline.load(student, runtime=runtime)


def test_a_choice_of_t5_for_a_student_without_one_is_refused(teacher: Path, tmp_path: Path) -> None:
    student = exported(teacher, tmp_path / "student")
    with pytest.raises(ConfigError, match="t5 none: the student has no T5"):
        OneStepPipeline.load(student, runtime=Runtime(t5="none"))


def test_every_choice_tells_images_apart() -> None:
    base = Runtime(ladder=(4,))
    others = [
        replace(base, precision="bf16"),
        replace(base, ladder=(1,)),
        replace(base, attention="math"),
        replace(base, quantize="int8"),
        replace(base, t5="none"),
        replace(base, channels_last=True),
        replace(base, compile=True),
        replace(base, cuda_graphs=True),
    ]
    labels = {runtime.label(CPU) for runtime in others} | {base.label(CPU, "0123"), base.label(CPU, "4567")}
    assert len(labels) == len(others) + 2
    assert base.label(CPU) == "fp32-blocks-4"


def test_eight_bits_stay_near_and_an_image_does_not_depend_on_its_company(student: Path, plain: torch.Tensor) -> None:
    pytest.importorskip("torchao")
    pipeline = OneStepPipeline.load(student, runtime=Runtime(quantize="int8", t5="int8"))
    images = pipeline(PROMPTS, SEEDS)
    assert 0 < (images.int() - plain).abs().max() <= 8
    assert pipeline(PROMPTS[2:3], [2])[0].equal(images[2])
    with pytest.raises(ConfigError, match="quantize int8: adapters"):
        pipeline.read_adapter(student)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "runtime",
    [Runtime(cuda_graphs=True), Runtime(precision="fp16"), Runtime(channels_last=True), Runtime(attention="flash")],
)
def test_a_gpus_images_stay_near_those_of_a_cpu_and_are_the_same_in_any_company(
    runtime: Runtime, student: Path, plain: torch.Tensor
) -> None:
    pipeline = OneStepPipeline.load(student, "cuda", runtime)
    images = pipeline(PROMPTS, SEEDS)
    assert (images.int() - plain).abs().max() <= 8
    assert pipeline(PROMPTS[2:3], [2])[0].equal(images[2])
    assert pipeline(PROMPTS, SEEDS).equal(images)


@pytest.mark.gpu
@needs_cuda
def test_recorded_graphs_give_the_bits_of_the_calls_they_replay_and_follow_the_weights(student: Path) -> None:
    eager, replayed = (
        OneStepPipeline.load(student, "cuda", runtime) for runtime in (Runtime(), Runtime(cuda_graphs=True))
    )
    cond = eager.encode(PROMPTS)
    for _ in range(2):
        latents = eager.latents(cond, SEEDS)
        assert replayed.latents(cond, SEEDS).equal(latents)
        assert replayed.decode(latents).equal(eager.decode(latents))
        for pipeline in (eager, replayed):
            pipeline._transformer.proj_out.weight.data.mul_(2)
