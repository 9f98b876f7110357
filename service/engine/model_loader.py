"""Loads student folders as backends. Of the engine, this file alone imports `distill`: the pipeline and its tuning."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.pipeline import SHIPPED_STUDENT, Adapter, OneStepPipeline, RuntimeOptions
from distill.student.tuning import tuned_choice
from service.engine.backend import BatchLimits, DeviceLost, EncodedPrompts, ModelInfo, Pixels
from service.engine.embeddings import UNSHARED, SharedEmbeddings
from service.engine.messages import Tuning
from service.errors import StartError

MAX_STEPS = 50  # of any-step students, so that one request cannot occupy a device without bound


class StudentBackend:
    """A `OneStepPipeline` behind the backend's protocol.

    On a GPU each stage has its own stream and ends by waiting for it, so its output is complete and the memory that it
    frees is no longer read.
    """

    def __init__(
        self, folder: Path, name: str | None, device: torch.device, options: RuntimeOptions, tuning: Tuning | None
    ) -> None:
        if tuning is None:
            self._pipeline = OneStepPipeline.load(folder, device, options)
        else:
            choice = tuned_choice(folder, device, options, Path(tuning.folder), tuning.seconds, tuning.max_batch)
            self._pipeline = OneStepPipeline.load(folder, device, choice)
        self._device = device
        blank = self._pipeline.encode([""])
        self.text_bytes = blank.embeds.nbytes + blank.pooled.nbytes
        self._shape = blank.to("meta")  # of every prompt's conditions
        self._adapters: dict[str, Adapter] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for stage in ("text", "model", "vae"):
                self._streams[stage] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # the weights are there for every stream
        spec, choice = self._pipeline.spec, self._pipeline.choice
        recorded = choice.options.compile or choice.options.cuda_graphs
        self.slow_first_runs: Sequence[int] = choice.options.batch_buckets if recorded else ()
        self.info = ModelInfo(
            name=name or spec.name,
            owner=spec.teacher,
            created=spec.created,
            digest=spec.digest,
            sizes=spec.sizes,
            pixels_per_token=spec.vae_scale_factor * spec.patch_size,
            token_limit=spec.token_limit,
            batches=tuple(BatchLimits(each.network, each.network[-1]) for each in choice.sizes),
            max_steps=MAX_STEPS if spec.any_step else 1,
            runtime_fingerprint=self._pipeline.fingerprint,
            decoder=self._pipeline.decoder,
            decoder_digest=self._pipeline.small_decoder,
            description=spec.description,
            examples=spec.examples,
        )
        where = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{torch.get_num_threads()}-threads"
        )
        self.environment = f"{where}-{self._pipeline.fingerprint}-torch-{torch.__version__}"

    def encode(self, prompts: Sequence[str], shared: SharedEmbeddings = UNSHARED) -> EncodedPrompts:
        """As in the protocol. All embeddings pass through host memory, where `shared` has them."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        dtype = self._shape.embeds.dtype
        with self._stage("text"):
            rows = torch.empty(
                len(index), self.text_bytes // dtype.itemsize, dtype=dtype, pin_memory=bool(self._streams)
            )
            buffers = rows.view(torch.uint8).numpy()
            facts = {prompt: fact for prompt, i in index.items() if (fact := shared.read(prompt, buffers[i]))}
            hits = len(facts)
            if new := [prompt for prompt in index if prompt not in facts]:
                packed = self._pipeline.encode(new).pack().cpu()
                encoded = zip(new, packed, self._pipeline.count_tokens(new), self._pipeline.truncated(new), strict=True)
                for prompt, row, tokens, truncated in encoded:
                    rows[index[prompt]] = row
                    facts[prompt] = tokens, truncated
                    shared.write(prompt, buffers[index[prompt]], tokens, truncated)
            conditions = self._shape.unpack(rows.to(self._device, non_blocking=True)[[index[p] for p in prompts]])
        counts, cuts = zip(*(facts[prompt] for prompt in prompts), strict=True)
        return EncodedPrompts(conditions, counts, cuts, hits)

    def add_adapter(self, name: str, path: str) -> None:
        """Read an adapter while batches run. Only `adapt` changes the weights."""
        try:
            adapter = self._pipeline.read_adapter(path)
        except Exception as error:  # such as another file format or too little memory; it must not end the server
            raise StartError(f"adapter {path}: {error}") from error
        self._adapters[name] = adapter
        self.info = replace(self.info, adapters=self.info.adapters | {name: adapter.digest})

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. Its tensors are freed when another one is merged."""
        del self._adapters[name]
        self.info = replace(self.info, adapters={n: a.digest for n, a in self._adapters.items()})

    def adapt(self, name: str | None, scale: float) -> None:
        """Merge an adapter into the transformer's weights, in the network's stream."""
        with self._stage("model"):
            self._pipeline.adapt(None if name is None else self._adapters[name], scale)

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Any:
        """Return noise (B, C, h, w) on the device."""
        with self._stage("text"):
            return self._pipeline.noise(seeds, width, height)

    def denoise(self, conditions: Any, noise: Any, steps: int = 1) -> Any:
        """Return latents (B, C, h, w) on the device."""
        with self._stage("model"):
            latents = self._pipeline.latents(conditions, noise, steps)
            if not latents.isfinite().all():
                raise FloatingPointError("the network gave latents that are not finite")
            return latents

    def decode(self, latents: Any) -> Pixels:
        with self._stage("vae"):
            pixels: Pixels = np.asarray(self._pipeline.decode(latents))
            return pixels

    def memory_bytes(self) -> int:
        """Return the memory that torch holds on a GPU, or the resident memory of the process."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        status = Path("/proc/self/status")
        found = status.read_text().partition("VmRSS:")[2].split() if status.exists() else []
        return int(found[0]) * 1024 if found else 0

    def close(self) -> None:
        """Free the weights and torch's cached GPU memory."""
        del self._pipeline, self._adapters
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Use the stage's stream, and raise torch's errors as those of the protocol."""
        stream = self._streams.get(name)
        try:
            with torch.cuda.stream(stream):  # None changes nothing
                yield
                if stream is not None:
                    stream.synchronize()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from error
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error


def load_backend(
    folder: str | None, name: str | None, device: str, runtime: Mapping[str, Any] = {}, tuning: Tuning | None = None
) -> StudentBackend:
    """Return a backend for a student folder, the shipped one if None, under its own name or another. Slow.

    `runtime` is `RuntimeOptions` as JSON. Raises StartError for a folder that cannot be loaded.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options = RuntimeOptions(**runtime)
        return StudentBackend(Path(folder or SHIPPED_STUDENT), name, torch.device(device), options, tuning)
    except Exception as error:  # such as no such device or too little memory; it must not end the server
        raise StartError(f"model {folder or SHIPPED_STUDENT} on {device}: {error}") from error
