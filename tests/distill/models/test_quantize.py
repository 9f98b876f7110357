"""The matrices that are quantized are those that multiply tokens in a block."""

import pytest
import torch
from tiny import make_transformer
from torch import nn

from distill.models import quantize

SD3_5 = {"dual_attention_layers": (0,)}


@pytest.mark.parametrize("kind", [{"qk_norm": None}, SD3_5], ids=["sd3", "sd3.5"])
def test_the_matrices_of_a_block_that_multiply_tokens_are_chosen(kind):
    transformer = make_transformer(**kind)
    tokens = set()
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks."):
            # A vector of modulation for each image has two dimensions, and a sequence of tokens three.
            module.register_forward_pre_hook(lambda _, args, name=name: tokens.add(name) if args[0].ndim == 3 else None)
    with torch.no_grad():
        transformer(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.randn(2, 40), torch.ones(2))
    chosen = {name for name, module in transformer.named_modules() if quantize._processes_tokens(module, name)}
    assert chosen == tokens
    assert len(chosen) > 20


def test_nothing_is_needed_and_changed_without_it():
    transformer = make_transformer()
    before = {name: type(module) for name, module in transformer.named_modules()}
    quantize.check("none", torch.float32, torch.device("cpu"), "quantize")
    quantize.use("none", transformer)
    assert {name: type(module) for name, module in transformer.named_modules()} == before
