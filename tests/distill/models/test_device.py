"""Where bf16 is fast by what the processor says of itself, and copies between devices."""

from pathlib import Path

import pytest
import torch

from distill.models.device import autocast, fast_bfloat16, to_device, to_host

CPU = torch.device("cpu")
INFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not INFO.exists(), reason="needs Linux")
def test_bf16_is_fast_with_matrix_units_and_only_used_there():
    flags = set(INFO.read_text().partition("\nflags")[2].partition("\n")[0].split())
    fast = not flags.isdisjoint({"amx_tile", "avx512_bf16"})
    assert fast_bfloat16(CPU) is fast
    assert fast_bfloat16(torch.device("cuda"))
    x = torch.randn(4, 4)
    with autocast(CPU):
        assert (x @ x).dtype == (torch.bfloat16 if fast else torch.float32)
    assert (x @ x).dtype == torch.float32


def test_copies_on_the_cpu_are_the_tensor_itself():
    x = torch.randn(3, 5)
    assert to_device(x, CPU) is to_host(x) is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_a_gpu_and_back_are_complete():
    x = torch.randn(1 << 20)
    doubled = to_device(x, torch.device("cuda")) * 2
    back = to_host(doubled)
    assert back.is_pinned()
    assert back.equal(2 * x)
