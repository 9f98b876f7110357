"""`Tuner`: measures how a student is computed fastest on a device, where its runtime options say `auto`."""

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.models.device import fast_bfloat16
from distill.options import RuntimeOptions
from distill.pipeline import OneStepPipeline, read_student
from distill.student.runtime import BatchSizes, RuntimeChoice, Size, SizeBatches, unmeasured

log = logging.getLogger(__name__)

GAIN = 0.95  # of the time so far; a value that takes more of it is not worth a change, and smaller changes are noise
WASTE = 1.3  # of the least time per image; the smallest batch within it is chosen, since a lone image pays for it
REPEATS = 5  # of which the fastest counts
SHARE = 0.05  # of the time for all measurements; a call that takes more is not repeated
Inputs = Callable[[int], Callable[[], Tensor]]  # a stage's call for so many images, which returns its outputs
_PROMPT = "a red circle left of a blue star, number {}"  # another one in each row


@dataclass
class Tuner:
    """Measures one option after the other, each with the best values of those before it."""

    student: Path  # whose folder is loaded
    device: torch.device
    options: RuntimeOptions
    max_batch: int
    seconds: float
    milliseconds: dict[str, float] = field(default_factory=dict)  # for each image, by what was measured

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    def seconds_taken(self) -> float:
        return time.monotonic() - self._began

    def time_left(self) -> float:
        return self.seconds - self.seconds_taken()

    def choose(self) -> RuntimeChoice:
        """Return the fastest choice that was found in the time."""
        spec = read_student(self.student)
        best, least = unmeasured(self.options, self.device, spec), math.inf
        for precision in self._precisions():
            options = self.options.model_copy(update={"precision": precision})
            start = unmeasured(options, self.device, spec)
            if start != best and self.time_left() <= 0:
                break
            pipeline = OneStepPipeline.load(self.student, self.device, start)
            found, cost = self.tune(pipeline)
            if cost < GAIN * least:
                best, least = found, cost
            del pipeline
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return best

    def tune(self, pipeline: OneStepPipeline) -> tuple[RuntimeChoice, float]:
        """Leave a pipeline computing as is fastest in its precision; the choice, and its seconds for each image."""
        start = pipeline.choice
        cost = self._trial(pipeline, start)
        if self.time_left() <= 0:
            return start, cost
        found, _ = self._switch(pipeline, start, cost, self._kernels())
        found = self._batches(pipeline, found)
        # Shapes are known now: on a GPU, compiling takes seconds for each.
        compilers = self._compilers() if self.device.type == "cuda" else ()
        return self._switch(pipeline, found, self._trial(pipeline, found), compilers)

    def _precisions(self) -> list[str]:
        if self.options.precision != "auto":
            return [self.options.precision]
        if self.device.type == "cuda":
            return ["bf16"]
        return ["fp32", "bf16"] if fast_bfloat16(self.device) else ["fp32"]

    def _kernels(self) -> list[tuple[str, object]]:
        """Return options and the value to try of each."""
        if self.device.type == "cuda":
            return [("attention", "flash"), ("cuda_graphs", True)]
        return [("attention", "math"), ("channels_last", True)]

    def _compilers(self) -> list[tuple[str, object]]:
        """Return the same for what needs fixed shapes, on GPUs alone: on CPUs, compiling takes minutes.

        Normalization in the memory format channels_last is only fast where it is compiled, so this comes last.
        """
        return [("compile", True), ("channels_last", True)]

    def _switch(
        self, pipeline: OneStepPipeline, best: RuntimeChoice, least: float, candidates: Sequence[tuple[str, object]]
    ) -> tuple[RuntimeChoice, float]:
        """Try values one after the other; return the choice with those that gain, and its seconds for each image."""
        for name, value in candidates:
            if getattr(self.options, name) != "auto":
                continue
            if self.time_left() <= (self.seconds / 2 if name == "compile" else 0):
                break
            found = best.model_copy(update={"options": best.options.model_copy(update={name: value})})
            try:
                cost = self._trial(pipeline, found)
            except Exception as error:  # no compiler, no kernel, too little memory: the value cannot be had
                log.warning("%s %s cannot be used here: %r", name, value, error)
                continue
            if cost < GAIN * least:
                best, least = found, cost
        pipeline.use(best)
        return best, least

    def _trial(self, pipeline: OneStepPipeline, choice: RuntimeChoice) -> float:
        """Return the seconds for each image of the native size, without text."""
        pipeline.use(choice)
        each = choice.sizes[0]
        network = self._seconds(pipeline, _network(pipeline, each.size), each.network[-1])
        decoder = self._seconds(pipeline, _decoder(pipeline, each.size), each.decoder[-1])
        self.milliseconds[choice.description] = 1000 * (network + decoder)
        return network + decoder

    def _batches(self, pipeline: OneStepPipeline, choice: RuntimeChoice) -> RuntimeChoice:
        """Return the choice with the best batch sizes of each stage and image size."""
        if self.options.batch_buckets:
            return choice
        precision = choice.options.precision
        for each in choice.sizes:
            name = f"{precision}, {each.size[0]}x{each.size[1]}"
            otherwise = _at_most(self.max_batch, each.network)
            stage = _network(pipeline, each.size)
            network = self._sizes(pipeline, f"network, {name}", stage, otherwise, self.max_batch)
            # A batch has as many images as the network computes at once; a larger decoder batch would be padded.
            otherwise = _at_most(network[-1], each.decoder)
            stage = _decoder(pipeline, each.size)
            decoder = self._sizes(pipeline, f"decoder, {name}", stage, otherwise, network[-1])
            best = SizeBatches(size=each.size, network=network, decoder=decoder)
            sizes = tuple(best if old.size == best.size else old for old in choice.sizes)
            choice = choice.model_copy(update={"sizes": sizes})
        most = max(each.network[-1] for each in choice.sizes)  # prompts that are encoded together
        text = self._sizes(pipeline, f"text, {precision}", _text(pipeline), _at_most(most, choice.text), most)
        choice = choice.model_copy(update={"text": text})
        pipeline.use(choice)
        return choice

    def _sizes(
        self, pipeline: OneStepPipeline, stage: str, inputs: Inputs, otherwise: BatchSizes, most: int
    ) -> BatchSizes:
        """Return the best batch size of a stage, and the other useful ones that compute the same bits.

        Not on GPUs, where a kernel is chosen for each shape and each size may have a CUDA graph, and not where each
        size is compiled.
        """
        chosen, useful = self.smallest(stage, otherwise, lambda batch: self._seconds(pipeline, inputs, batch), most)
        if not useful or self.device.type == "cuda" or pipeline.choice.options.compile or self.time_left() <= 0:
            return chosen
        return self.equal(pipeline, inputs, chosen[-1], useful)

    def equal(self, pipeline: OneStepPipeline, inputs: Inputs, chosen: int, sizes: BatchSizes) -> BatchSizes:
        """Return the batch sizes whose outputs are those of the chosen one to the bit, and the chosen one.

        Kernels add in an order that depends on shapes, not on values, so sizes that agree for a batch of random inputs
        agree for others. Outputs that are constant, as those of an untrained student may be, show nothing.
        """
        call = inputs(max((chosen, *sizes)))
        self._use_batch(pipeline, chosen)
        expected, found = call(), [chosen]
        if expected.min() == expected.max():
            return (chosen,)
        for batch in sizes:
            if batch != chosen and self.time_left() > 0:
                self._use_batch(pipeline, batch)
                if torch.equal(call(), expected):
                    found.append(batch)
        return tuple(sorted(found))

    def smallest(
        self, stage: str, otherwise: BatchSizes, seconds: Callable[[int], float], most: int
    ) -> tuple[BatchSizes, BatchSizes]:
        """Return the smallest batch, of at most so many, that takes little more for each image than the best one.

        The second tuple holds all sizes that were measured, up to the best one.
        """
        found: dict[int, float] = {}
        batch = 1
        while batch <= most and self.time_left() > 0:
            try:
                found[batch] = seconds(batch)
            except torch.OutOfMemoryError:
                break
            self.milliseconds[f"{stage}, batch {batch}"] = 1000 * found[batch]
            if batch > 1 and GAIN * found[batch] > found[batch // 2]:
                break
            batch *= 2
        if not found or (batch <= most and self.time_left() <= 0):
            return otherwise, ()  # unknown beyond what was measured
        best = min(found, key=found.__getitem__)
        chosen = min(batch for batch, each in found.items() if each <= WASTE * found[best])
        return (chosen,), tuple(batch for batch in found if batch <= best)

    def _use_batch(self, pipeline: OneStepPipeline, batch: int) -> None:
        """Compute every stage in batches of one size from now on, in the way that the pipeline computes already."""
        alike = tuple(
            each.model_copy(update={"network": (batch,), "decoder": (batch,)}) for each in pipeline.choice.sizes
        )
        pipeline.use(pipeline.choice.model_copy(update={"text": (batch,), "sizes": alike}))

    def _seconds(self, pipeline: OneStepPipeline, inputs: Inputs, batch: int) -> float:
        """Return the least seconds for each image of several calls.

        A first call only counts if the time ends with it.
        """
        self._use_batch(pipeline, batch)
        call = inputs(batch)
        began = time.monotonic()
        first = self._timed(call)
        if self.time_left() <= 0:
            return first / batch
        single = self._timed(call)
        if time.monotonic() - began > SHARE * self.seconds:
            return single / batch
        return min(single, *(self._timed(call) for _ in range(REPEATS - 1))) / batch

    def _timed(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call: of the device, or of this thread on a CPU that others use meanwhile."""
        if self.device.type == "cpu":
            began = time.thread_time()
            call()
            return time.thread_time() - began
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


# Stages


def _text(pipeline: OneStepPipeline) -> Inputs:
    return lambda rows: lambda: pipeline.encode(_prompts(rows)).pack()


def _network(pipeline: OneStepPipeline, size: Size) -> Inputs:
    def inputs(rows: int) -> Callable[[], Tensor]:
        cond, noise = pipeline.encode(_prompts(rows)), pipeline.noise(range(rows), *size)
        return lambda: pipeline.latents(cond, noise)

    return inputs


def _decoder(pipeline: OneStepPipeline, size: Size) -> Inputs:
    def inputs(rows: int) -> Callable[[], Tensor]:
        noise = pipeline.noise(range(rows), *size)
        return lambda: torch.cat(list(pipeline.pixels(noise)))

    return inputs


def _prompts(count: int) -> list[str]:
    return [_PROMPT.format(i) for i in range(count)]


def _at_most(most: int, sizes: BatchSizes) -> BatchSizes:
    return tuple(size for size in sizes if size <= most) or (most,)
