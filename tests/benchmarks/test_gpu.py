"""A short form of benchmarks/gpu.py runs on any machine, and keeps the results of other parts if one fails."""

import json
import math
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Figure, Setting

TINY = Setting("cpu", tiny=True, end=math.inf)
FOUND = Figure("train", "1024 px, eager", 1.5, "images/s", least=1)


@pytest.mark.parametrize(
    ("least", "most", "met"), [(None, None, None), (2, None, False), (1, 2, True), (1, 1.4, False)]
)
def test_a_target_is_met_or_missed(least, most, met):
    assert Figure("train", "x", 1.5, "", least, most).met is met


def test_a_training_step_is_measured_beside_its_plan(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what the part sets is put back
    found = {figure.name: figure for figure in gpu.train(TINY)}
    assert list(found) == ["matrix product, bf16", "16 px, eager", "16 px, eager: share of the matrix rate"]
    assert all(figure.value > 0 and figure.met is None for figure in found.values())


def test_stages_are_measured_beside_stock_diffusers():
    found = {figure.name: figure for figure in gpu.stages(replace(TINY, end=time.monotonic() + 60))}
    assert all(figure.value > 0 and figure.met is None for figure in found.values())
    assert {name for name in found if "one request" in name or "times as fast" in name} == {
        f"16 px, {decoder} decoder: {what}"
        for decoder in ("full", "small")
        for what in ("one request", "times as fast as stock")
    }


def test_the_toy_dataset_s_teacher_and_student_are_trained(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what the part sets is put back
    assert [(figure.name, figure.value > 0) for figure in gpu.scenes(TINY)] == [("teacher", True), ("student", True)]


def test_an_interruption_keeps_what_was_measured(monkeypatch, capsys, tmp_path):
    def parts(command, seconds):
        if "serve" in command:
            raise KeyboardInterrupt
        return [FOUND], ""

    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "run_part", parts)
    words = ["gpu.py", "--device", "cpu", "--tiny", "--only", "train, serve,train", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    found = json.loads(out.read_text())
    assert [figure["name"] for figure in found["figures"]] == [FOUND.name]
    assert "interrupted" in found["faults"]["all"]
    assert "| train | 1024 px, eager | 1.5 images/s | >= 1 | met |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--json", "nowhere/gpu.json"], ["--only", "trian"]])
def test_wrong_options_are_refused_before_anything_is_measured(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("then", "fault"), [("sys.exit(3)", "status 3"), ("signal.pause()", "stopped after 1 s"), ("", "")]
)
def test_what_a_part_measured_before_it_failed_is_kept(then, fault):
    code = f"import signal, sys; print('a notice'); print({json.dumps(asdict(FOUND))!r}, flush=True); {then}"
    found, said = gpu.run_part([sys.executable, "-S", "-c", code], 1)
    assert found == [FOUND]
    assert fault in said
    assert bool(said) == bool(fault)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert "not measured: no GPU" in capsys.readouterr().out
