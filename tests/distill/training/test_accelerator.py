"""What this machine or launch does not support is refused before training."""

import parity
import pytest
from accelerate import Accelerator

from distill.errors import ConfigError
from distill.training.accelerator import check


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
