"""`RuntimeOptions`: how a student is computed. One type for Python callers, the service's settings and its workers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


DecoderChoice = Literal["auto", "full", "small"] | Annotated[Path, AfterValidator(Path.absolute)]


class RuntimeOptions(BaseModel):
    """Options of `OneStepPipeline.load`. Defaults give the student's own images, independent of their batch.

    Every option may change an image's last bits. `quantize`, `t5` and `decoder` visibly change images.
    Importing this module imports no torch. `OneStepPipeline.load` refuses what a device or student cannot do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of weights and activations. `auto` is bf16 on GPUs and fp32 on CPUs."""
    batch_buckets: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending)] = ()
    """Batch sizes that the networks run with; each batch is padded to the next one.

    With one size, an image is bit-identical alone and in any batch. With several, small batches cost less, and an
    image's last bits depend on the size of its batch. Empty means one size, chosen for the student's resolution.
    """
    attention: Literal["sdpa", "math", "flash", "xformers"] = "sdpa"
    """Attention kernel of the transformer. `sdpa` lets torch choose."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8-bit matrix products in the transformer, by torchao. Excludes LoRA adapters."""
    t5: Literal["full", "int8", "cpu", "none"] = "full"
    """`int8` quantizes T5's weights by torchao, `cpu` runs T5 on the CPU, `none` replaces its output by zeros."""
    decoder: DecoderChoice = "auto"
    """`full` is the student's VAE, `small` the small decoder in its folder, `auto` the one that its record names.

    A path is the folder of another `AutoencoderTiny` for the same latents.
    """
    channels_last: bool = False
    """Memory format of the VAE's convolutions."""
    compile: bool = False
    """Compile the transformer and the VAE decoder with torch.compile, once for each batch bucket and image size."""
    cuda_graphs: bool = False
    """Record the transformer and the VAE decoder as CUDA graphs, once for each batch bucket and image size."""
