"""Images that are answered with as links: kept in any place that fsspec knows, behind signed names that expire."""

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator

import fsspec

from service.errors import StartError, Unavailable

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{10})-[0-9a-f]{32}\.(png|jpeg|webp)", re.ASCII)


class Artifacts:
    """Files of encoded images. Every method blocks on the store: call them off the event loop.

    All raise Unavailable while the store does not answer.

    A name holds the time at which it ends, so that a sweep needs no other record, and its signature vouches for both:
    what a client sends reaches the store only if this server, or one with the same secret, made it up.
    """

    def __init__(self, url: str, secret: bytes, lifetime: int) -> None:
        """`url` is a folder or what fsspec takes (`s3://bucket/folder`); `lifetime` in seconds.

        Raises StartError for a store that does not answer.
        """
        self._secret = secret
        self._lifetime = lifetime
        try:
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)  # other servers write there too
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # every store has exceptions of its own
            raise StartError(
                f"artifacts: {url} cannot be used ({error}); name a folder or a URL of fsspec's"
            ) from error

    def save(self, data: bytes, output_format: str, now: float, lifetime: int | None = None) -> str:
        """Keep an image, for `lifetime` seconds if they are not those of all; returns its name."""
        name = f"{int(now) + (lifetime or self._lifetime):010d}-{secrets.token_hex(16)}.{output_format}"
        with _asking():
            self._files.pipe_file(f"{self._root}/{name}", data)
        return name

    def sign(self, name: str) -> str:
        """The signature that `read` asks for."""
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()

    def read(self, name: str, signature: str, now: float) -> tuple[bytes, str] | None:
        """An image and its format; None for a name that was never given, has expired, or is signed by someone else."""
        found = _NAME.fullmatch(name)
        if not hmac.compare_digest(self.sign(name).encode(), signature.encode()) or found is None:
            return None
        if now >= int(found[1]):
            return None
        with _asking(), contextlib.suppress(FileNotFoundError):
            return self._files.cat_file(f"{self._root}/{name}"), found[2]
        return None

    def sweep(self, now: float) -> int:
        """Delete what has expired and say how many files that was; leaves files alone that are not ours."""
        swept = 0
        with _asking(), contextlib.suppress(FileNotFoundError):  # an object store knows no empty folder
            for path in self._files.ls(self._root, detail=False):
                found = _NAME.fullmatch(path.rsplit("/", 1)[-1])
                if found is not None and now >= int(found[1]):
                    with contextlib.suppress(FileNotFoundError):  # another server was faster
                        self._files.rm_file(path)
                        swept += 1
        return swept


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Whatever the store raises, as Unavailable; each kind of store has exceptions of its own."""
    try:
        yield
    except Exception as error:
        log.warning("the store of linked images does not answer: %r", error)
        raise Unavailable("the store of linked images does not answer; try again") from error
