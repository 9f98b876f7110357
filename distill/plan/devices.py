"""`DEVICES`, the GPUs that a plan knows by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanDevice:
    """A device: memory in GiB, as PyTorch reports it, and peak TFLOP/s of dense bf16 matrices and of fp32."""

    memory: float
    bf16: float
    fp32: float


# Peaks are those of NVIDIA's data sheets, without sparsity; the RTX 4090's in bf16 accumulates in fp32.
DEVICES = {
    "a100-40": PlanDevice(memory=39.4, bf16=312, fp32=19.5),
    "a100-80": PlanDevice(memory=79.2, bf16=312, fp32=19.5),
    "h100": PlanDevice(memory=79.1, bf16=989, fp32=67),
    "h200": PlanDevice(memory=139.7, bf16=989, fp32=67),
    "rtx-4090": PlanDevice(memory=23.6, bf16=165.2, fp32=82.6),
}
