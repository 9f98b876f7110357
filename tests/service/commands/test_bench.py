"""`fgm-service bench` and `profile`: their counts and output."""

import subprocess
import sys

import pytest

from service.commands.bench import measure_engine, measure_server, read_metrics
from service.engine.profile import read_profile
from service.errors import StartError
from service.settings import Settings


def test_every_answer_of_a_server_is_counted(serve):
    url = serve(http={"api_keys": ("key-of-ann-in-tests",)})
    load = measure_server(url, 2, 0.1, "key-of-ann-in-tests")
    assert (load.refused, load.clients) == (0, 2)
    assert load.quantile(0.5) <= load.quantile(0.99) <= load.seconds
    assert read_metrics(url)["fgm_batch_images_sum"] == len(load.latencies) + 2  # and one of each client before
    assert measure_server(url, 1, 0.01, "wrong").latencies == []


def test_the_engine_alone_is_measured_in_the_same_way():
    assert measure_engine(Settings(engine={"devices": "simulator"}), 2, 0.1).rate > 0


def test_an_unreachable_server_gives_a_one_line_error():
    with pytest.raises(StartError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        measure_server("http://127.0.0.1:9", 2, 0.1)


def test_profile_writes_what_a_server_reads(tmp_path):
    command = [sys.executable, "-m", "service.cli", "profile", str(tmp_path), "--device", "simulator"]
    shown = subprocess.run([*command, "--max-batch", "2"], check=True, capture_output=True, text=True).stdout
    (path,) = tmp_path.iterdir()
    timings = read_profile(path).timings
    assert [(timing.width, timing.batch) for timing in timings] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert len(shown.splitlines()) == 1 + len(timings)
