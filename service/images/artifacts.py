"""Images that are answered with as links. They are stored in any place that fsspec knows; signed links expire."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import fsspec

from service.errors import StartError, Unavailable, without_credentials
from service.temporary_folders import make_folder, remove_folder

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 32  # they only wait for a disk or a network
_NAME = re.compile(r"(\d{10})-[0-9a-f]{32}\.(png|jpeg|webp)", re.ASCII)


class ArtifactStore:
    """Files of encoded images. All methods raise Unavailable while the store does not answer.

    A name holds the time at which it expires, so that a sweep needs no other record, and its signature covers both:
    a name that a client sends reaches the store only if this server, or one with the same secret, made it up.
    """

    def __init__(self, url: str | None, secret: bytes, lifetime: int, clock: Callable[[], float] = time.time) -> None:
        """`url` is a folder or what fsspec takes (`s3://bucket/folder`); None is a folder that ends with the store.

        Links last `lifetime` seconds. Raises StartError for a store that does not answer.
        """
        self._secret = secret
        self._lifetime = lifetime
        self._clock = clock
        # Threads of its own, so that a slow store occupies no others.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="artifacts")
        self._temporary = None if url else make_folder("fgm-artifacts-")
        place = self._temporary or url
        try:
            self._files, self._root = fsspec.url_to_fs(place, use_listings_cache=False)  # other servers write there too
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # every store has exceptions of its own
            message = f"artifacts: {place} cannot be used ({error}); name a folder or a URL of fsspec's"
            raise StartError(without_credentials(message)) from error

    async def save(self, data: bytes, output_format: str, lifetime: int | None = None) -> str:
        """Store an image for `lifetime` seconds, by default for those of the store; returns its name."""
        expires = int(self._clock()) + (lifetime or self._lifetime)
        name = f"{expires:010d}-{secrets.token_hex(16)}.{output_format}"
        await self._run(self._files.pipe_file, f"{self._root}/{name}", data)
        return name

    def sign(self, name: str) -> str:
        """Return the signature of a name, which `read` needs."""
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()

    def link(self, base: str, name: str) -> str:
        """Return the URL of an image, below the server's base URL."""
        return f"{base.rstrip('/')}/v1/artifacts/{name}?signature={self.sign(name)}"

    async def read(self, name: str, signature: str) -> tuple[bytes, str] | None:
        """Return an image and its format; None for a name that has expired, is unknown, or has a wrong signature."""
        found = _NAME.fullmatch(name)
        if not hmac.compare_digest(self.sign(name).encode(), signature.encode()) or found is None:
            return None
        if self._clock() >= int(found[1]):
            return None
        data = await self._run(self._read, f"{self._root}/{name}")
        return None if data is None else (data, found[2])

    async def sweep(self) -> int:
        """Delete expired files and return their number. Files that are not images of a store stay."""
        return await self._run(self._sweep)

    async def sweep_periodically(self) -> None:
        """Sweep until cancelled. If the store does not answer, the next period tries again."""
        while True:
            with contextlib.suppress(Unavailable):  # which is logged
                await self.sweep()
            await asyncio.sleep(max(60, self._lifetime / 10))

    def close(self) -> None:
        """Stop without waiting for a store that does not answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._temporary:
            remove_folder(self._temporary)

    def _read(self, path: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            data: bytes = self._files.cat_file(path)
            return data
        return None

    def _sweep(self) -> int:
        swept = 0
        with contextlib.suppress(FileNotFoundError):  # an object store knows no empty folder
            for path in self._files.ls(self._root, detail=False):
                found = _NAME.fullmatch(path.rsplit("/", 1)[-1])
                if found is not None and self._clock() >= int(found[1]):
                    with contextlib.suppress(FileNotFoundError):  # another server was faster
                        self._files.rm_file(path)
                        swept += 1
        return swept

    async def _run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **options))
        except Exception as error:  # each kind of store has exceptions of its own
            log.warning("the store of linked images does not answer: %s", without_credentials(repr(error)))
            raise Unavailable("the store of linked images does not answer; try again") from error
