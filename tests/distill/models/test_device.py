"""Devices with fast bf16, memory of tensors on the CPU, and copies between devices."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from distill.models.device import autocast, fast_bfloat16, resolve_device, to_device, to_host

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_process_that_computes_on_the_cpu_keeps_the_memory_of_freed_tensors():
    """Each page fault takes a page from the system."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.zeros(24 << 20, dtype=torch.uint8) for _ in range(8)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    resolve_device("cpu")
    first = faults()
    assert sum(faults() for _ in range(10)) < 4 * first  # 10 times as many if memory is returned each time


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
