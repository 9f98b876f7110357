"""What the server and a worker say to each other: msgpack over a socket, each message after its length."""

import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from service.engine.backend import ModelInfo, Timing
from service.engine.embeddings import EmbeddingSlot

_LENGTH = struct.Struct("<I")
Fault = Literal["memory", "error"]


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    """To the worker: load a student beside the others, and run it once."""

    folder: str | None  # None is the student that ships, or a backend that the worker was given
    name: str | None = None  # that it is served by; None is its own
    adapters: Mapping[str, str] = {}  # their folders by name


class UnloadModel(msgspec.Struct, frozen=True, tag=True):
    """To the worker: let go of a model; none of its batches is on the way any more."""

    name: str


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """To the worker: read an adapter for a model that it has."""

    model: str
    name: str
    folder: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """To the worker: let go of an adapter; none of its batches is on the way any more."""

    model: str
    name: str


class Profiling(msgspec.Struct, frozen=True):
    """Which batch sizes a worker runs of each model before it takes work."""

    timed_batches: Sequence[int] = ()  # none is one padded batch alone
    warm_up_batches: Sequence[int] = ()  # run even where a profile holds their times
    folder: str | None = None  # of the profiles


class WorkerConfig(msgspec.Struct, frozen=True):
    """What a worker process is told on its command line, as JSON."""

    device: str
    models: Sequence[LoadModel]
    runtime: Mapping[str, Any] = {}  # `RuntimeOptions` as JSON
    profiling: Profiling = Profiling()
    simulated_profile: str | None = None


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """To the worker: make these images, and put their pixels into this slot of the shared memory."""

    batch: int
    model: str
    prompts: Sequence[str]
    embedding_slots: Sequence[EmbeddingSlot | None]  # of each prompt's embedding; None is not kept
    seeds: Sequence[int]
    width: int
    height: int
    pixel_slot: int
    adapter: str | None = None
    scale: float = 0.0
    steps: int = 1  # network evaluations per image


class ModelLoaded(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the model of a `Load` is there and has run once, or has the adapter of a `LoadAdapter`.

    Both are answered in their order.
    """

    info: ModelInfo
    environment: str  # as the backend's
    text_bytes: int  # likewise
    timings: Sequence[Timing]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From the worker: its first models are there."""

    models: Sequence[ModelLoaded]


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the model or adapter is not there, and why."""

    reason: str


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker: it cannot start, and why."""

    reason: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """From the worker, every second: it lives, and holds so many bytes of its device."""

    memory_bytes: int


class NetworkDone(msgspec.Struct, frozen=True, tag=True):
    """From the worker: a batch has left the network for the VAE, so there is room for one more behind it."""

    batch: int


class BatchDone(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the pixels lie in the slot, rows of uint8 (H, W, 3)."""

    batch: int
    tokens: Sequence[int]  # of each prompt, as the model sees it
    truncated: Sequence[bool]  # whether the model saw only the prompt's beginning
    seconds: dict[str, float]  # by stage: text, model, vae
    began: dict[str, float]  # by stage, on the monotonic clock, which is one for the machine
    prompt_hits: int  # prompts whose embeddings were there


class BatchFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the batch raised."""

    batch: int
    fault: Fault


Command = RunBatch | LoadModel | UnloadModel | LoadAdapter | UnloadAdapter
Reply = Ready | StartFailed | ModelLoaded | LoadFailed | Heartbeat | NetworkDone | BatchDone | BatchFailed
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_orders: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_encoder = msgspec.msgpack.Encoder()


def frame(message: Command | Reply) -> bytes:
    """A message as it goes over the socket."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def length(header: bytes) -> int:
    """Bytes of the message behind a header."""
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
        """Say something to the server; raises OSError when it is gone."""
        with self._sending:
            self._connection.sendall(frame(message))

    def next_order(self) -> Command | None:
        """Wait for what the server wants next; None when it has hung up."""
        body = self._read()
        return None if body is None else _orders.decode(body)

    def next_reply(self) -> Reply | None:
        """Wait for what the worker says; None when it is gone. Raises TimeoutError as the socket is set."""
        body = self._read()
        return None if body is None else read_reply(body)

    def close(self) -> None:
        """Hang up, also for a thread that waits in `next_order`."""
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
