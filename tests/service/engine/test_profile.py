"""Times per size and batch: measured, stored, used for estimates, and replayed by the simulator."""

import dataclasses

import pytest

from service.engine.backend import BatchLimits, ModelInfo, Timing
from service.engine.messages import Profiling
from service.engine.profile import (
    FORMAT,
    Profile,
    batch_cap,
    growing_sizes,
    measure,
    profile_path,
    read_profile,
    recall,
)
from service.engine.simulator import Simulator
from service.engine.worker import make_timer
from service.errors import StartError


class Blocks(Simulator):
    """A model that computes two images at once and has memory for four."""

    def __init__(self):
        info = ModelInfo(
            "blocks",
            "simulator",
            0,
            "0123456789abcdef0123",
            ((64, 64), (128, 64)),
            16,
            77,
            (BatchLimits((2,), 16),) * 2,
        )
        super().__init__(0, 0, info=info)
        self.batches = []

    def denoise(self, conditions, noise, steps=1):
        self.batches.append((noise.shape[2], len(noise)))
        if len(noise) > 4:
            raise MemoryError
        return super().denoise(conditions, noise, steps)


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_the_sizes_ends_at_the_largest_batch(most, sizes):
    assert growing_sizes(most) == sizes


def test_every_size_is_timed_in_whole_blocks_as_far_as_memory_goes():
    timings = measure(Blocks(), [1, 2, 3, 8, 16])
    assert [(timing.width, timing.batch) for timing in timings] == [(64, 2), (64, 4), (128, 2), (128, 4)]
    assert all(set(timing.seconds) == {"text", "model", "vae"} for timing in timings)


def test_too_little_memory_for_one_block_keeps_the_worker_from_starting():
    class Full(Blocks):
        def denoise(self, conditions, noise, steps=1):
            raise MemoryError("of this device")

    with pytest.raises(StartError, match="blocks fails at 64x64: of this device"):
        measure(Full(), [2])


def test_what_was_measured_is_kept_by_setup_and_model_and_only_warmed_up_for_again(tmp_path):
    first = recall(Blocks(), [4], tmp_path)
    again = Blocks()
    again.info = dataclasses.replace(again.info, name="renamed")
    assert recall(again, [4], tmp_path) == [dataclasses.replace(timing, model="renamed") for timing in first]
    assert set(again.batches) == {(64, 2), (128, 2)}
    other = Blocks()
    other.environment = "another device"
    recall(other, [4], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "simulator.0123456789abcdef.3.json",
        "another-device.0123456789abcdef.3.json",
    }


def test_a_batch_above_the_largest_that_gains_is_neither_timed_nor_sent():
    small = Blocks()
    small.info = dataclasses.replace(small.info, batches=(BatchLimits((2,), 2), BatchLimits((4,), 4)))
    assert [(timing.width, timing.batch) for timing in measure(small, [1, 2, 8])] == [(64, 2), (128, 4)]


@pytest.mark.parametrize("known", [False, True])
def test_batches_whose_first_run_is_slow_run_before_a_request_also_where_a_profile_has_their_times(known, tmp_path):
    if known:
        recall(Blocks(), [4], tmp_path)
    backend = Blocks()
    backend.slow_first_runs = (2, 4)
    make_timer(Profiling(folder=str(tmp_path) if known else None))(backend)
    assert set(backend.batches) == {(64, 2), (64, 4), (128, 2), (128, 4)}


def test_a_file_that_is_no_profile_is_named(tmp_path):
    path = profile_path(tmp_path, Blocks())
    path.write_text('{"format": 2}')
    with pytest.raises(StartError, match=r"simulator\.0123456789abcdef\.3\.json is not a profile"):
        read_profile(path)


def timing(batch: int, seconds: float) -> Timing:
    return Timing("a", 64, 64, batch, {"text": 0.0, "model": seconds, "vae": seconds}, 0)


@pytest.mark.parametrize(("seconds", "cap"), [(None, 8), (1.0, 4), (0.7, 2), (0.01, 2)])
def test_the_cap_is_the_largest_batch_that_is_fast_enough(seconds, cap):
    assert batch_cap([timing(2, 0.3), timing(4, 0.4), timing(8, 0.6)], seconds) == cap


def test_the_simulator_takes_the_times_of_a_profile():
    seconds = {"text": 0.0, "model": 0.004, "vae": 0.008}
    info = dataclasses.replace(Blocks().info, sizes=((64, 64),), batches=(BatchLimits((2,), 16),))
    known = [Timing("blocks", 64, 64, 2, seconds, 0), Timing("blocks", 64, 64, 4, seconds, 0)]
    profile = Profile(FORMAT, "a device", info, known)
    measured = measure(Simulator(info=profile.info, timings=profile.timings), [2, 4])
    assert [timing.batch for timing in measured] == [2, 4]
    assert all(timing.seconds["model"] >= 0.004 and timing.seconds["vae"] >= 0.008 for timing in measured)
