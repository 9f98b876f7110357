"""Every runtime option: images near those of the defaults, and an error that names an unsupported option."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import PROMPTS, stock_pipeline, undistilled

from distill.errors import ConfigError
from distill.models.small_decoder import LATENT_SCALE, make_small_decoder
from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline, RuntimeOptions, read_student
from distill.student.runtime import fingerprint, unmeasured

CPU = torch.device("cpu")
SPEC = read_student(SHIPPED_STUDENT)
SEEDS = range(4)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def named(options: RuntimeOptions, vae: str | None = None) -> str:
    return fingerprint(unmeasured(options, CPU, SPEC), vae)


@pytest.fixture(scope="module")
def student(teacher_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undistilled(teacher_t5, tmp_path_factory.mktemp("students") / "t5")


@pytest.fixture(scope="module")
def plain(student: Path) -> torch.Tensor:
    return OneStepPipeline.load(student)(PROMPTS, SEEDS).int()


def small_decoder(folder: Path, channels: int = 4, factor: int = 2) -> Path:
    torch.manual_seed(0)
    make_small_decoder(channels, factor, 8, (1,) * factor.bit_length()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        (RuntimeOptions(precision="bf16"), 8),
        (RuntimeOptions(precision="fp16"), 1),
        (RuntimeOptions(attention="math"), 1),
        (RuntimeOptions(channels_last=True), 1),
        (RuntimeOptions(t5="cpu"), 2),
    ],
    ids=lambda value: named(value) if isinstance(value, RuntimeOptions) else None,
)
def test_images_stay_within_so_many_of_255_levels(
    options: RuntimeOptions, levels: int, student: Path, plain: torch.Tensor
) -> None:
    images = OneStepPipeline.load(student, options=options)(PROMPTS, SEEDS).int()
    assert (images - plain).abs().max() <= levels


def test_a_dropped_t5_gives_what_stock_gives_without_it(student: Path) -> None:
    pipeline = OneStepPipeline.load(student, options=RuntimeOptions(t5="none"))
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


def test_a_small_decoder_decodes_the_students_latents(student: Path, tmp_path: Path) -> None:
    folder = small_decoder(tmp_path / "small")
    pipeline = OneStepPipeline.load(student, options=RuntimeOptions(decoder=folder))
    assert pipeline.decoder == "small"
    latents = pipeline.latents(pipeline.encode(PROMPTS), pipeline.noise(SEEDS))
    with torch.no_grad():
        pixels = AutoencoderTiny.from_pretrained(folder).decode(latents / LATENT_SCALE).sample
    expected = (127.5 * (pixels + 1)).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert (pipeline.decode(latents).float() - expected).abs().max() <= 1
    assert pipeline.fingerprint != OneStepPipeline.load(student).fingerprint


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder, student: folder / "nothing", "nothing has no config.json"),
        (lambda folder, student: student / "vae", "holds AutoencoderKL"),
        (lambda folder, student: small_decoder(folder, channels=16), "decodes 16 channels"),
        (lambda folder, student: small_decoder(folder, factor=4), "at 4 pixels per latent"),
    ],
)
def test_a_folder_that_is_no_small_decoder_of_the_student_is_refused(make, sentence, student, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"decoder .*{sentence}"):
        OneStepPipeline.load(student, options=RuntimeOptions(decoder=make(tmp_path, student)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (RuntimeOptions(cuda_graphs=True), "cuda_graphs needs a CUDA device, not cpu"),
        (RuntimeOptions(attention="xformers"), "attention xformers needs"),
        (RuntimeOptions(quantize="fp8"), "quantize fp8 needs"),
    ],
)
def test_what_a_cpu_cannot_do_is_named(options: RuntimeOptions, sentence: str, student: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        OneStepPipeline.load(student, options=options)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
@pytest.mark.parametrize("name", ["quantize", "t5"])
def test_a_package_that_is_missing_is_named(name: str, student: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} int8 needs the package torchao"):
        OneStepPipeline.load(student, options=RuntimeOptions.model_validate({name: "int8"}))


def test_a_choice_of_t5_for_a_student_without_one_is_refused(teacher: Path, tmp_path: Path) -> None:
    student = undistilled(teacher, tmp_path / "student")
    with pytest.raises(ConfigError, match="t5 none: the student has no T5"):
        OneStepPipeline.load(student, options=RuntimeOptions(t5="none"))


def test_every_option_changes_the_fingerprint() -> None:
    base = RuntimeOptions(batch_buckets=(4,))

    def changed(**options: Any) -> RuntimeOptions:
        return RuntimeOptions(**dict(base) | options)

    others = [
        changed(precision="bf16"),
        changed(batch_buckets=(1,)),
        changed(attention="math"),
        changed(quantize="int8"),
        changed(t5="none"),
        changed(channels_last=True),
        changed(compile=True),
        changed(cuda_graphs=True),
        changed(cudnn_benchmark=True),
    ]
    found = {named(each) for each in others} | {named(base, vae) for vae in ("0123", "4567")}
    assert len(found) == len(others) + 2
    assert named(base) == "fp32-text-4-64x64-network-4-decoder-4-attention-sdpa"


def test_eight_bits_stay_near_and_an_image_does_not_depend_on_its_company(student: Path, plain: torch.Tensor) -> None:
    pytest.importorskip("torchao")
    pipeline = OneStepPipeline.load(student, options=RuntimeOptions(quantize="int8", t5="int8"))
    images = pipeline(PROMPTS, SEEDS)
    assert 0 < (images.int() - plain).abs().max() <= 8
    assert pipeline(PROMPTS[2:3], [2])[0].equal(images[2])
    with pytest.raises(ConfigError, match="quantize int8: adapters"):
        pipeline.read_adapter(student)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "option",
    [
        {"cuda_graphs": True},
        {"precision": "fp16"},
        {"channels_last": True},
        {"attention": "flash"},
        {"compile": True},
        {"compile": True, "channels_last": True, "cuda_graphs": True},
    ],
    ids=str,
)
def test_a_gpus_images_stay_near_those_of_a_cpu_and_are_the_same_in_any_company(
    option: dict[str, Any], student: Path, plain: torch.Tensor
) -> None:
    pipeline = OneStepPipeline.load(student, "cuda", RuntimeOptions(**option))
    images = pipeline(PROMPTS, SEEDS)
    assert (images.int() - plain).abs().max() <= 8
    assert pipeline(PROMPTS[2:3], [2])[0].equal(images[2])
    assert pipeline(PROMPTS, SEEDS).equal(images)


@pytest.mark.gpu
@needs_cuda
def test_recorded_graphs_give_the_bits_of_the_calls_they_replay_and_follow_the_weights(student: Path) -> None:
    eager, replayed = (
        OneStepPipeline.load(student, "cuda", RuntimeOptions(cuda_graphs=recorded)) for recorded in (False, True)
    )
    cond = eager.encode(PROMPTS)
    for _ in range(2):
        latents = eager.latents(cond, eager.noise(SEEDS))
        assert replayed.latents(cond, replayed.noise(SEEDS)).equal(latents)
        assert replayed.decode(latents).equal(eager.decode(latents))
        for pipeline in (eager, replayed):
            pipeline._transformer.proj_out.weight.data.mul_(2)
