"""`RuntimeOptions`: how a student is computed. One type for Python callers, the service's settings and its workers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SHIPPED_STUDENT = Path(__file__).parent / "worlds" / "scenes" / "weights" / "student"


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


DecoderChoice = Literal["auto", "full", "small"] | Annotated[Path, AfterValidator(Path.absolute)]
Switch = bool | Literal["auto"]


class RuntimeOptions(BaseModel):
    """Options of `OneStepPipeline.load`. Defaults give the student's own images, independent of their batch.

    Every option may change an image's last bits. `quantize`, `t5` and `decoder` visibly change images.
    `OneStepPipeline.load` takes a fixed value for `auto`; a server measures which value is fastest on its device.
    Importing this module imports no torch. `OneStepPipeline.load` refuses what a device or student cannot do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of weights and activations. `auto` is bf16 on GPUs and fp32 on CPUs; a server measures bf16 on CPUs."""
    batch_buckets: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending)] = ()
    """Batch sizes that all networks run with; each batch is padded to the next one.

    With one size, an image is bit-identical alone and in any batch. With several, small batches cost less, and an
    image's last bits depend on the size of its batch. Empty means one size for each network and image size.
    """
    attention: Literal["auto", "sdpa", "math", "flash", "xformers"] = "auto"
    """Attention kernel of the transformer. `sdpa` lets torch choose, and is what `auto` means without measurement."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8-bit matrix products in the transformer, by torchao. Excludes LoRA adapters."""
    t5: Literal["full", "int8", "cpu", "none"] = "full"
    """`int8` quantizes T5's weights by torchao, `cpu` runs T5 on the CPU, `none` replaces its output by zeros."""
    decoder: DecoderChoice = "auto"
    """`full` is the student's VAE, `small` the small decoder in its folder, `auto` the one that its record names.

    A path is the folder of another `AutoencoderTiny` for the same latents.
    """
    channels_last: Switch = "auto"
    """Memory format of the decoder's convolutions and of its input. `auto` is false without measurement."""
    compile: Switch = "auto"
    """Compile the transformer's blocks and the decoder with torch.compile, once for each batch and image size.

    `auto` is false without measurement, and on CPUs, where compiling takes minutes.
    """
    cuda_graphs: Switch = "auto"
    """Record the transformer and the decoder as CUDA graphs, once for each batch and image size.

    `auto` is false without measurement.
    """
    cudnn_benchmark: bool = False
    """cuDNN times its convolutions and takes the fastest, in the whole process.

    Two processes may take different ones, so the last bits of an image may differ between them.
    """
