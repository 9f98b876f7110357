"""The images of a batch as one ZIP file, which is streamed: neither memory nor disk holds it."""

import io
import json
import re
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.concurrency import iterate_in_threadpool

from service.images.artifacts import ArtifactStore

NAME_CHARACTERS = 80  # of a custom_id, in the name of its images
_UNSAFE = re.compile(r"[^\w .,()+-]+")  # also in letters of other scripts: ZIP names are UTF-8


class _Pending(io.RawIOBase):
    """Collects what a ZIP writer writes, until it is taken. It cannot seek, so sizes follow the files."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


async def zip_images(output: Path, artifacts: ArtifactStore) -> AsyncIterator[bytes]:
    """Yield the bytes of a ZIP file with the images of a batch's output file, in its order.

    Images whose links have expired are listed in `expired.txt`. Raises Unavailable if the image store does not answer.
    """
    pending, expired, now = _Pending(), [], time.localtime()[:6]
    with zipfile.ZipFile(pending, "w") as archive, output.open("rb") as lines:  # images are compressed already
        number = 0
        async for line in iterate_in_threadpool(lines):
            number += 1
            answer = json.loads(line)
            for image in answer["response"]["body"]["data"]:
                link = urlsplit(image["url"])
                name = link.path.rpartition("/")[2]
                found = await artifacts.read(name, parse_qs(link.query)["signature"][0])
                title = _UNSAFE.sub("_", answer["custom_id"].removeprefix(f"{number} "))[:NAME_CHARACTERS].strip(" .")
                path = f"{number:05d} {title} seed {image['seed']}{Path(name).suffix}"
                if found is None:
                    expired.append(path)
                    continue
                archive.writestr(zipfile.ZipInfo(path, now), found[0])
                yield pending.take()
        if expired:
            archive.writestr(zipfile.ZipInfo("expired.txt", now), "\n".join(expired) + "\n")
    yield pending.take()
