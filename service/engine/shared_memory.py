"""Complete reads and writes of shared memory: one system call may transfer fewer bytes than requested."""

import os


def read(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill a buffer of bytes from an offset. Raises EOFError when the memory ends before that, OSError on an error."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            raise EOFError(f"the shared memory ends at byte {offset}; {len(target)} more bytes were expected")
        target, offset = target[count:], offset + count


def write(descriptor: int, source: memoryview, offset: int) -> None:
    """Write all bytes of a buffer at an offset. Raises OSError if they cannot be written."""
    while source:
        count = os.pwrite(descriptor, source, offset)
        source, offset = source[count:], offset + count
