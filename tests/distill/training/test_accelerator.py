"""Settings that the machine or the launch does not support are refused before training."""

from contextlib import nullcontext

import parity
import pytest
from accelerate import Accelerator

from distill.errors import ConfigError
from distill.training.accelerator import check, check_processes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"optimizer.kind": "adam-8bit"}, r"optimizer\.kind adam-8bit needs the package bitsandbytes"),
        (
            {"networks.kind": "lora", "networks.attention": "xformers"},
            r"networks\.attention xformers needs the package xformers",
        ),
        (
            {"networks.kind": "lora", "networks.cuda_graph": True, "networks.gradient_checkpointing": True},
            r"networks\.cuda_graph needs a CUDA device, networks\.gradient_checkpointing false; set it to auto",
        ),
        (
            {"networks.kind": "lora", "networks.compile": True},
            r"networks\.compile needs a C\+\+ compiler but there is no c\+\+0",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_refused(override, words, monkeypatch):
    monkeypatch.setenv("CXX", "c++0")
    with pytest.raises(ConfigError, match=words):
        check(parity.run(**override), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1"}, True),  # accelerate launch --cpu
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, True),  # processes that did not find each other
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, False),  # accelerate launch of one process
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, False),  # torchrun of one process
        ({"MASTER_ADDR": "127.0.0.1"}, False),
    ],
)
def test_a_process_that_should_not_be_alone_is_refused(environment, refused, monkeypatch):
    machine = Accelerator(cpu=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="asked for several processes") if refused else nullcontext():
        check_processes(machine)
