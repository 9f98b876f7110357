"""The exceptions of `distill`. The command line prints their message and exits with status 2.

Each message names the file, field or flag and the fix.
"""


class DistillError(Exception):
    """Base class of all errors that a user can fix."""


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
    """A run folder that another process writes to. The command line exits with status 75: try again later."""


class DivergedError(DistillError):
    """A number that is not finite, in training or in a student's output."""


class SizeError(DistillError):
    """An image size that the model does not support."""


class ScorerError(DistillError):
    """A missing package or weights file of a metric, or images that it cannot score."""


class OutputError(DistillError):
    """An output path with a file or folder that this program did not write; it is left unchanged."""


class RunError(DistillError):
    """A folder without a run, or with a file in another format."""


class ParityError(DistillError):
    """A student folder whose images differ between stock diffusers and this package."""


class RemoteError(DistillError):
    """A request that a server refused."""


class ServerUnavailableError(RemoteError):
    """A server that does not answer, or is temporarily unavailable."""
