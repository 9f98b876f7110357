"""`DEVICES`, the GPUs that a plan knows by name, and the share of their peaks that training reaches."""

from dataclasses import dataclass

GIB = 2**30
# Share of the peak in a training step. Eager: measured on an H200, 1.53 images/s of 168.5 TFLOP, a LoRA step of
# SD3-medium's geometry at 1024 px, batch 4, with gradient checkpointing. Compiled blocks: an estimate, not measured.
UTILIZATION = {"eager": 0.26, "compiled": 0.35}
MATRIX_SHARE = 0.75  # of the peak, by a large matrix product on that H200: 741 TFLOP/s


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
