"""All attention kernels of a transformer compute the same, and `auto` is one of them."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import make_transformer

from distill.models import attention


def step(model: SD3Transformer2DModel, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of a step."""
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8, 8), (3, 5, 48), (3, 40)))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = model(x, text, pooled, torch.tensor([10.0, 500.0, 990.0]), return_dict=False)[0]
    out.float().square().mean().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "more",
    [{"qk_norm": None}, {}, {"dual_attention_layers": (0,)}],
    ids=["sd3", "sd3.5-large", "sd3.5-medium"],
)
def test_matrix_attention_is_the_attention_of_the_fused_kernel(more):
    torch.manual_seed(0)
    model = make_transformer(**more)
    expected = step(model, torch.float32)
    attention.use("math", model)
    for name, found in step(model, torch.float32).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    rounded = step(model, torch.bfloat16)["out"].float()
    assert (rounded - expected["out"]).norm() < 0.03 * expected["out"].norm()


def test_auto_avoids_the_slow_backward_of_fused_attention_in_bf16_on_cpus():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert attention.resolve("auto", torch.bfloat16, cpu) == "math"
    assert attention.resolve("auto", torch.float32, cpu) == "sdpa"
    assert attention.resolve("auto", torch.bfloat16, cuda) == "sdpa"
    assert attention.resolve("flash", torch.bfloat16, cpu) == "flash"
