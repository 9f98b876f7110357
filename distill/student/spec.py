"""`OneStepSpec`, the record of a student folder. Read without PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.errors import ConfigError, TeacherError
from distill.models.sd3_files import FORMAT, RECORD, read_json
from distill.models.sd3_folder import SD3Folder
from distill.options import DecoderChoice
from distill.student.card import description_of


@dataclass(frozen=True)
class OneStepSpec:
    """Describe a student, from its folder's `onestep.json`."""

    name: str
    digest: str
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels, the native one first
    latent_channels: int
    vae_scale_factor: int
    patch_size: int
    token_limit: int  # CLIP tokens of a prompt, with start and end token; longer prompts are truncated
    max_sequence_length: int  # T5 tokens
    teacher: str
    method: str
    images_seen: int
    created: int  # Unix time in seconds, of the record
    any_step: bool = False  # whether it also generates in several steps, with better images
    has_t5: bool = False
    decoder: Literal["full", "small"] = "full"  # that it is used with by default
    small_decoder: str | None = None  # digest of the small decoder in its folder
    description: str = ""  # the first paragraph of the folder's card
    examples: tuple[str, ...] = ()  # prompts of the card

    @property
    def image_tokens(self) -> int:
        """Return the transformer's tokens for an image of the native size."""
        width, height = self.sizes[0]
        return width * height // (self.vae_scale_factor * self.patch_size) ** 2

    def is_small(self, decoder: DecoderChoice) -> bool:
        """Return whether this value of `RuntimeOptions.decoder` is a small decoder for the student."""
        return (self.decoder if decoder == "auto" else decoder) != "full"

    def check_small_decoder(self) -> None:
        """Raise ConfigError unless the student has a small decoder."""
        if self.small_decoder is None:
            raise ConfigError(
                f"decoder small: {self.name} has no small decoder; make one with `distill decoder`, or take full"
            )

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError unless the student supports this number of steps: 1, or any for an any-step student."""
        if steps < 1 or (steps > 1 and not self.any_step):
            supported = "any number of steps from 1" if self.any_step else "one step; set steps to 1"
            raise ConfigError(f"{self.name} makes images in {supported}, not {steps}")


def is_student(folder: SD3Folder) -> bool:
    """Whether a folder is a student's, not a teacher's."""
    path = folder.path / RECORD
    return path.exists() and "start_time" in read_json(path)


def read_student(folder: Path | str) -> OneStepSpec:
    """Check a student folder and read its record. Raises TeacherError if it is missing, incomplete or no student."""
    return read_record(SD3Folder.read(folder))


def read_record(folder: SD3Folder) -> OneStepSpec:
    """A student folder's record. Raises TeacherError for a folder that is no student."""
    path = folder.path / RECORD
    record = read_json(path) if path.exists() else {}
    if "start_time" not in record:
        raise TeacherError(f"{folder.path} is a teacher, not a one-step student; distill it with `distill run` first")
    if record["start_time"] != 1.0 or record.get("format") != FORMAT:
        raise TeacherError(f"{path} is of another format; export the student again with this version")
    description, examples = description_of(folder.path)
    try:
        small = record.get("decoder") or {}
        return OneStepSpec(
            name=str(record["name"]),
            digest=folder.digest,
            sizes=tuple((int(width), int(height)) for width, height in record["sizes"]),
            latent_channels=folder.latent_channels,
            vae_scale_factor=folder.vae_scale_factor,
            patch_size=folder.patch_size,
            token_limit=folder.clip_length,
            max_sequence_length=int(record["max_sequence_length"]),
            teacher=str(record["teacher"]),
            method=str(record["method"]),
            images_seen=int(record["images_seen"]),
            created=int(path.stat().st_mtime),
            any_step=bool(record.get("any_step", False)),
            has_t5=folder.has_t5,
            decoder="small" if small.get("default") == "small" else "full",
            small_decoder=str(small["digest"]) if small else None,
            description=description,
            examples=examples,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{path} lacks or garbles {error}; export the student again") from None
