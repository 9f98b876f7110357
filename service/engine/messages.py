"""Messages between the server and a worker: msgpack over a socket, each message after its length."""

import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from service.engine.backend import ModelInfo, Timing
from service.engine.batcher import BatchKey
from service.engine.embeddings import EmbeddingSlot

_LENGTH = struct.Struct("<I")
Fault = Literal["memory", "error"]


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    """To the worker: load a student and run it once."""

    folder: str | None  # None is the shipped student, or a backend that the worker was given
    name: str | None = None  # None is the student's own
    adapters: Mapping[str, str] = {}  # their folders by name


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """To the worker: load an adapter, a file or folder, for a model."""

    model: str
    name: str
    path: str


class Unload(msgspec.Struct, frozen=True, tag=True):
    """To the worker: free a model, or one adapter of it. No batch in progress uses it."""

    model: str
    adapter: str | None = None


class Profiling(msgspec.Struct, frozen=True):
    """Batch sizes that a worker runs of each model before it takes requests."""

    timed_batches: Sequence[int] = ()  # none is one padded batch alone
    folder: str | None = None  # of the profiles


class Tuning(msgspec.Struct, frozen=True):
    """How long a worker measures what is fastest for a model, and where the choice is kept."""

    folder: str
    seconds: float
    max_batch: int


class WorkerConfig(msgspec.Struct, frozen=True):
    """The configuration of a worker process, passed on its command line as JSON."""

    device: str
    models: Sequence[LoadModel]
    runtime: Mapping[str, Any] = {}  # `RuntimeOptions` as JSON
    profiling: Profiling = Profiling()
    tuning: Tuning | None = None  # None takes the choices that need no measurement
    simulated_profile: str | None = None
    log_format: Literal["json", "text", "auto"] = "auto"
    log_level: str = "info"


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """To the worker: generate images and write their pixels into a slot of the shared memory."""

    batch: int
    key: BatchKey
    prompts: Sequence[str]
    embedding_slots: Sequence[EmbeddingSlot | None]  # one for each prompt; None is not shared
    seeds: Sequence[int]
    pixel_slot: int


class ModelLoaded(msgspec.Struct, frozen=True, tag=True):
    """From the worker: a `LoadModel` or `LoadAdapter` succeeded. Replies come in the order of the commands."""

    info: ModelInfo
    environment: str  # of the backend
    text_bytes: int  # of the backend
    timings: Sequence[Timing]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From the worker: its first models are loaded."""

    models: Sequence[ModelLoaded]


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker: a model or adapter could not be loaded. If it is one of the first models, the worker ends."""

    reason: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """From the worker, every second, with the device memory that it holds."""

    memory_bytes: int


class NetworkDone(msgspec.Struct, frozen=True, tag=True):
    """From the worker: a batch has left the network, so there is room for another one."""

    batch: int


class BatchDone(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the pixels are in the slot, uint8 (B, H, W, 3)."""

    batch: int
    tokens: Sequence[int]  # of each prompt, as the model sees it
    truncated: Sequence[bool]  # whether the model saw only the beginning of the prompt
    seconds: dict[str, float]  # by stage: text, model, vae
    began: dict[str, float]  # by stage, on the monotonic clock, which all processes of a machine share
    prompt_hits: int  # prompts whose embeddings were shared already


class BatchFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker: a batch failed."""

    batch: int
    fault: Fault


Command = RunBatch | LoadModel | LoadAdapter | Unload
Reply = Ready | ModelLoaded | LoadFailed | Heartbeat | NetworkDone | BatchDone | BatchFailed
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_encoder = msgspec.msgpack.Encoder()


def frame(message: Command | Reply) -> bytes:
    """Encode a message for the socket."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def length(header: bytes) -> int:
    """Return the bytes of the message after a header."""
    size: int = _LENGTH.unpack(header)[0]
    return size


HEADER_BYTES = _LENGTH.size
read_reply = _replies.decode


class Channel:
    """A worker's end of the socket, and the server's while a worker starts. Sending is safe from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Reply) -> None:
        """Send a message to the server. Raises OSError when it is gone."""
        with self._sending:
            self._connection.sendall(frame(message))

    def next_command(self) -> Command | None:
        """Wait for the next command. None when the server has closed the connection."""
        body = self._read()
        return None if body is None else _commands.decode(body)

    def next_reply(self) -> Reply | None:
        """Wait for the next reply. None when the worker is gone. Raises TimeoutError after the socket's timeout."""
        body = self._read()
        return None if body is None else read_reply(body)

    def close(self) -> None:
        """Close the connection, also for a thread that waits in `next_command`."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes | None:
        header = self._exactly(HEADER_BYTES)
        return None if header is None else self._exactly(length(header))

    def _exactly(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._connection.recv(size - len(parts))
            except ConnectionResetError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)
