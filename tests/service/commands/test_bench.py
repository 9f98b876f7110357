"""`fgm-service bench` and `profile`: what they count, and what they say."""

import subprocess
import sys

import pytest

from service.commands.bench import load_engine, load_server, samples
from service.engine.profile import read_profile
from service.errors import StartError
from service.settings import Settings


def test_every_answer_of_a_server_is_counted(serve):
    url = serve(http={"api_keys": ("key-of-ann-in-tests",)})
    load = load_server(url, 2, 0.1, "key-of-ann-in-tests")
    assert (load.refused, load.clients) == (0, 2)
    assert load.quantile(0.5) <= load.quantile(0.99) <= load.seconds
    assert samples(url)["fgm_batch_images_sum"] == len(load.latencies) + 2  # and one of each client before
    assert load_server(url, 1, 0.01, "wrong").latencies == []


def test_the_engine_alone_is_loaded_in_the_same_way():
    assert load_engine(Settings(engine={"devices": "simulator"}), 2, 0.1).rate > 0


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(StartError, match=r"http://127\.0\.0\.1:9 cannot be loaded"):
        load_server("http://127.0.0.1:9", 2, 0.1)


def test_profile_writes_what_a_server_reads(tmp_path):
    command = [sys.executable, "-m", "service.cli", "profile", str(tmp_path), "--device", "simulator"]
    shown = subprocess.run([*command, "--max-batch", "2"], check=True, capture_output=True, text=True).stdout
    (path,) = tmp_path.iterdir()
    timings = read_profile(path).timings
    assert [(timing.width, timing.batch) for timing in timings] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert len(shown.splitlines()) == 1 + len(timings)
