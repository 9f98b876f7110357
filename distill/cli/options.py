"""Options that several commands share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from distill.errors import ConfigError
from distill.options import DecoderChoice

if TYPE_CHECKING:
    from distill.methods.policies import TeacherGuidance
    from distill.models.sd3_folder import SD3Folder
    from distill.student.spec import OneStepSpec

SOURCE = "A txt, json, jsonl, csv, tsv or parquet file, a folder of them, a saved dataset, `scenes`, or - for stdin."
TEACHER = "`scenes`, a folder or .safetensors file of Stable Diffusion 3, or a model of the hub: owner/name[@revision]."
TEACHER_STEPS = 28  # of the published models
LAST_SEED = 2**63 - 1  # highest first seed, from which further seeds count up
MOST = 10**10  # upper bound of options that count something


def print_version(wanted: bool) -> None:
    """Print the version and exit, if it is wanted."""
    if wanted:
        from distill.versions import NAME, version_of

        typer.echo(f"{NAME} {version_of(NAME)}")
        raise typer.Exit


Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. auto: a GPU if there is one.")]
Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
]


def finite(value: float | None) -> float | None:
    """Return the value of an option. Raises BadParameter for nan and inf, which range checks accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Seconds = Annotated[
    float | None,
    typer.Option(
        help="Budget in seconds of training, converted to images by the measured speed.",
        min=1,
        max=MOST,
        callback=finite,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale of the teacher; 1 is unguided. Default: the scale that its folder names.",
        min=1,
        max=100,
        callback=finite,
    ),
]


def block_indices(text: str) -> str:
    """Return the value of an option that lists blocks. Raises BadParameter for anything else."""
    if text and not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of block indices such as 7,8,9")
    return text


SkipLayers = Annotated[
    str,
    typer.Option(
        help="Blocks that skip-layer guidance of the teacher leaves out, such as 7,8,9 for SD3.5-medium.",
        callback=block_indices,
    ),
]
SkipScale = Annotated[
    float | None,
    typer.Option(
        help="Scale of skip-layer guidance. Default: as in diffusers' pipeline.", min=1e-3, max=100, callback=finite
    ),
]
TeacherBase = Annotated[
    str | None,
    typer.Option(help="For a teacher in a single file: the same model as a folder or on the hub."),
]
_DECODER = "full, the VAE; small, the student's small decoder; auto, its default; or the folder of one."
Decoder = Annotated[str, typer.Option("--decoder", help=f"Decoder: {_DECODER}")]
Decoders = Annotated[
    list[str] | None, typer.Option("--decoder", help=f"Decoder, repeated to evaluate several: {_DECODER}")
]


def decoder_choice(name: str) -> DecoderChoice:
    """The value of `RuntimeOptions.decoder` that an option gives: one of its names, or a folder."""
    return cast(DecoderChoice, name) if name in ("auto", "full", "small") else Path(name)


def check_decoder_choice(name: str, student: "OneStepSpec") -> None:
    """Raise ConfigError for a decoder that does not exist: of another name, or one that the student lacks."""
    from distill.models.sd3_files import read_decoder

    choice = decoder_choice(name)
    if isinstance(choice, Path):
        read_decoder(choice)
    elif choice == "small":
        student.check_small_decoder()


Column = Annotated[str | None, typer.Option(help="Column of the prompts. Default: prompt, caption or text.")]
TextLength = Annotated[
    int | None,
    typer.Option(
        "--max-sequence-length",
        help="T5 tokens of a prompt, a run's prompts.max_sequence_length. Default: the teacher's own number.",
        min=0,
        max=512,
    ),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example images=50000.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer.")]


def teacher_guidance(
    teacher: "SD3Folder", scale: float | None, skip_layers: str, skip_scale: float | None
) -> "TeacherGuidance":
    """Guidance of a teacher from options; a scale of None is that of its folder, or the default of `TeacherGuidance`.

    Raises ConfigError for blocks that the teacher lacks, and for skip-layer guidance of an unguided teacher.
    """
    from distill.methods.policies import TeacherGuidance

    scale = teacher.guidance if scale is None else scale
    layers = tuple(int(part) for part in skip_layers.split(",") if part.strip())
    if layers and scale == 1:
        raise ConfigError("--skip-layers needs guidance; give a --guidance above 1")
    guidance = TeacherGuidance(scale=scale, skip_layers=layers)
    if skip_scale is not None:
        guidance = guidance.model_copy(update={"skip_scale": skip_scale})
    guidance.check_layers(teacher.layers, "--skip-layers")
    return guidance


def open_given_teacher(
    teacher: str | None, base: str | None, opener: "Callable[[str, str | None], SD3Folder] | None" = None
) -> "SD3Folder | None":
    """Open the teacher of `--teacher` and `--teacher-base`, if one is given; `opener` is `open_teacher` by default.

    Raises ConfigError for a base alone.
    """
    from distill.models.teacher import open_teacher

    if teacher is not None:
        return (opener or open_teacher)(teacher, base)
    if base is not None:
        raise ConfigError("--teacher-base completes the single file of --teacher; give both, or neither")
    return None
