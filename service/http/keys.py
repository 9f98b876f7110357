"""API keys and their scopes. A JSON file holds their hashes; the server reads it again when it changes."""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import json
import logging
import re
import secrets
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from filelock import FileLock

from service.errors import StartError, Unavailable
from service.files import PRIVATE, atomic_write
from service.http.daemon_thread import in_daemon_thread

log = logging.getLogger(__name__)

Scope = Literal["generate", "jobs", "admin"]
KEY_CHARACTERS = 16  # minimum length of a key
START_SECONDS = 10.0  # how long a command waits for a key file
READ_SECONDS = 1.0  # how long requests wait for it
MOUNT_AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_KEY = re.compile(rf"[A-Za-z0-9._~+/=-]{{{KEY_CHARACTERS},}}")  # the characters of a bearer token (RFC 6750)


@dataclass(frozen=True)
class ApiKey:
    """A stored key. Limits, logs and fair sharing go by `owner`, the name of its holder."""

    owner: Annotated[str, msgspec.Meta(pattern=r"\S")]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256; a slow hash adds nothing to random keys
    scopes: frozenset[Scope]
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, token: str, owner: str, scopes: Iterable[Scope]) -> "ApiKey":
        return cls(owner, _digest(token), frozenset(scopes))

    @classmethod
    def of_settings(cls, token: str) -> "ApiKey":
        """Return the key of a token in `api_keys`. Its owner is derived from the token, not from its position."""
        return cls.of(token, f"key-{_digest(f'owner {token}')[:8]}", ("generate", "jobs"))


@dataclass(frozen=True)
class _Contents:
    """The contents of a key file."""

    keys: tuple[ApiKey, ...]


def check_token(token: str) -> None:
    """Raise ValueError for text that cannot be an API key: empty, too short, or with other characters."""
    if not _KEY.fullmatch(token):
        raise ValueError(f"a key has at least {KEY_CHARACTERS} characters, of A-Z a-z 0-9 - . _ ~ + / =")


def find(keys: Sequence[ApiKey], token: str) -> ApiKey | None:
    """Return the key of a token, or None. All keys are compared, each in constant time."""
    if not _KEY.fullmatch(token):
        return None
    digest = _digest(token)
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return found[0] if found else None


class KeyFile:
    """The file of keys. It is replaced atomically, never written in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None  # inode and time of the version that was read
        self._keys: tuple[ApiKey, ...] = ()

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> tuple[ApiKey, ...]:
        """Return all keys, read again when the file has changed. Raises StartError for an invalid file.

        Raises OSError while the file's mount does not answer.
        """
        try:
            state = self._path.stat()
            version = (state.st_ino, state.st_mtime_ns)
            if version != self._read_at:
                self._keys = self._parse()
                self._read_at = version
        except FileNotFoundError:
            return ()
        except OSError as error:
            if error.errno in MOUNT_AWAY:
                raise
            raise StartError(f"{self._path} cannot be read: {error.strerror}") from None
        return self._keys

    def read_at_start(self) -> tuple[ApiKey, ...]:
        """Like `read`, for commands. Also raises StartError if the file's mount does not answer in time."""
        try:
            return in_daemon_thread(self.read, "keys").result(START_SECONDS)
        except OSError as error:  # TimeoutError is one
            raise StartError(f"{self._path} cannot be read: its file system does not answer ({error!r})") from None

    def existing(self) -> tuple[ApiKey, ...]:
        """Like `read_at_start`, but raises StartError for a missing file instead of returning no keys."""
        keys = self.read_at_start()
        if self._read_at is None:
            raise StartError(
                f"there is no {self._path}; correct --keys-file, or create the file with its first key: "
                f"`{shlex.join(['fgm-service', 'keys', 'create', 'NAME', '--keys-file', str(self._path)])}`"
            )
        return keys

    def create(self, owner: str, scopes: Iterable[Scope]) -> str:
        """Add a key and return its token, which cannot be shown again. Raises StartError for an invalid name."""
        if not owner.strip() or not owner.isprintable():
            raise StartError("a key needs a name of printable characters, because logs and limits go by it")
        token = f"fgm-{secrets.token_urlsafe(32)}"
        with self._locked():
            keys = self.read_at_start()
            if any(key.owner == owner for key in keys):
                raise StartError(f"{self._path} has a key named {owner!r} already; revoke it or take another name")
            self._write((*keys, ApiKey.of(token, owner, scopes)))
        return token

    def revoke(self, owner: str) -> None:
        """Delete a key. A running server refuses it from then on.

        Raises StartError for a missing file and for an unknown name.
        """
        self.existing()  # before the lock, which makes the folder
        with self._locked():
            keys = self.existing()
            if all(key.owner != owner for key in keys):
                raise StartError(
                    f"{self._path} has no key named {owner!r}; "
                    f"`fgm-service keys list --keys-file {self._path}` shows its keys"
                )
            self._write([key for key in keys if key.owner != owner])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the file for one writer. Raises StartError if the folder cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock"):
                yield
        except OSError as error:
            raise StartError(f"{self._path} cannot be written: {error.strerror}") from None

    def _parse(self) -> tuple[ApiKey, ...]:
        try:
            keys = msgspec.json.decode(self._path.read_text(encoding="utf-8-sig"), type=_Contents).keys
            for key in keys:
                if key.digest == _digest(""):
                    raise ValueError(f"the key of {key.owner!r} is empty")
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            message = f"{self._path} is not a file of API keys ({error}); create one with `fgm-service keys create`"
            raise StartError(message) from None
        return keys

    def _write(self, keys: Iterable[ApiKey]) -> None:
        records = [asdict(key) | {"scopes": sorted(key.scopes)} for key in keys]
        with atomic_write(self._path, PRIVATE) as file:
            file.write(json.dumps({"keys": records}, indent=1).encode())


class KeyReader:
    """Reads a key file for requests in separate threads, so a hanging mount blocks neither event loop nor shutdown."""

    def __init__(self, file: KeyFile) -> None:
        self._file = file
        self._last: tuple[ApiKey, ...] | None = None  # the keys that were read last
        self._reading: asyncio.Future[tuple[ApiKey, ...] | Exception] | None = None
        self._since = 0.0
        self._logged = ""  # the failure that was logged last

    async def read(self) -> tuple[ApiKey, ...]:
        """Return the file's keys, or, while its mount does not answer, those that were read last.

        Raises Unavailable if no keys were read yet or the file is invalid, so that no caller is accepted by mistake.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.wrap_future(in_daemon_thread(self._attempt, "keys"))
            self._since = time.monotonic()
        reading = self._reading
        limit = READ_SECONDS if self._last is not None else START_SECONDS
        await asyncio.wait([reading], timeout=max(0.0, self._since + limit - time.monotonic()))
        found = reading.result() if reading.done() else TimeoutError(f"{self._file} does not answer")
        if isinstance(found, tuple):
            self._last, self._logged = found, ""
            return found
        last = None if isinstance(found, StartError) else self._last
        if str(found) != self._logged:  # once, and not for each request
            self._logged = str(found)
            if last is None:
                log.error("no caller is accepted: %s", found)
            else:
                log.warning("the keys that were read last stay valid: %s", found)
        if last is None:
            raise Unavailable("the server cannot read its API keys; try again later")
        return last

    def _attempt(self) -> tuple[ApiKey, ...] | Exception:
        try:
            return self._file.read()
        except (StartError, OSError) as error:
            return error


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
