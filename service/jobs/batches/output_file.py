"""`OutputFile`: the output or error file of a batch, before it has a row."""

from collections.abc import Iterable
from typing import NamedTuple

from service.jobs.file_store import FileStore, new_id


class OutputFile(NamedTuple):
    """A written file of a batch."""

    id: str
    lines: int
    bytes: int


def write_output(files: FileStore, lines: Iterable[tuple[str, bool]]) -> tuple[OutputFile, OutputFile]:
    """Write each line to the error file if its flag says so, else to the output file.

    The ids are new in each call, so that no call overwrites a file that clients can see.
    """
    ids = (new_id("file-"), new_id("file-"))
    counts = [0, 0]
    with files.writing(ids[0]) as output, files.writing(ids[1]) as errors:
        for text, is_error in lines:
            (errors if is_error else output).write(text.encode() + b"\n")
            counts[is_error] += 1
    first, second = (
        OutputFile(file_id, count, files.path(file_id).stat().st_size)
        for file_id, count in zip(ids, counts, strict=True)
    )
    return first, second
