"""Why a job failed, as its client sees it."""

from service.errors import shortened


class JobFailed(Exception):
    """Why a job failed, as its client sees it."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        message = shortened(message)  # the error of a run may repeat text of the training file
        super().__init__(message)
        self.error = {"code": code, "message": message, "param": param}


def refusal(error: str) -> JobFailed:
    """Return the failure for the error of a command that was refused."""
    if "No space left" in error:
        return JobFailed(error, "disk_full")
    if error.startswith("prompts."):
        return JobFailed(error, "invalid_training_file", "training_file")
    return JobFailed(error, "distillation_failed", "distillation")
