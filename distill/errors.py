"""Everything that `distill` raises on purpose. The command line prints the message and exits with 2.

Each message names the file, field or flag at fault and how to mend it.
"""


class DistillError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(DistillError):
    """A preset, file or override that is not a valid configuration."""


class TeacherError(DistillError):
    """A teacher or student folder that is missing, truncated, or in another format."""


class PromptError(DistillError):
    """A prompt source that cannot be read as prompts."""


class ImageError(DistillError):
    """A source of real images that cannot be read as images with captions."""


class CacheError(DistillError):
    """A cache of prompts or images that is partial, damaged, or made by another teacher."""


class CheckpointError(DistillError):
    """A checkpoint that is damaged or belongs to another configuration."""


class ClaimedError(CheckpointError):
    """A run folder that another live process writes to. The command line exits with 75: try again later."""


class DivergedError(DistillError):
    """Training, or a student at work, produced a number that is not finite."""


class SizeError(DistillError):
    """An image size that the model was not made for."""


class ScorerError(DistillError):
    """A package or weights that a figure needs and that are not there, or images that it cannot be taken of."""


class OutputError(DistillError):
    """The place of an output holds a file or folder that this program did not write; it is left unchanged."""


class RunError(DistillError):
    """A folder that holds no run, or a file in it that is in another form."""


class ParityError(DistillError):
    """A student folder of which stock diffusers makes something else than we do."""


class RemoteError(DistillError):
    """A server that refuses what it was asked."""


class AwayError(RemoteError):
    """A server that does not answer, or not now."""
