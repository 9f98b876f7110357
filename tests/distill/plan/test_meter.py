"""The meter counts the bytes of storages and the FLOP of matrix products."""

import pytest
import torch
from tiny import make_transformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from distill.plan.meter import Meter, without_data


def test_each_storage_is_counted_while_something_holds_it():
    given = torch.ones(100)  # is not the meter's
    with Meter() as meter:
        a = given * 2
        assert (meter.live, meter.peak) == (400, 400)
        view = a.view(10, 10)[2:].T
        a.add_(1)
        assert (meter.live, meter.peak) == (400, 400)  # both share its storage
        b = a.double()
        assert (meter.live, meter.peak) == (1200, 1200)
        del a
        assert meter.live == 1200  # by the view
        del view
        assert (meter.live, meter.peak) == (800, 1200)
        c = torch.empty(50)
    assert (meter.live, meter.peak) == (1000, 1200)
    del b, c
    assert meter.live == 0


def test_tensors_without_data_count_as_much():
    with FakeTensorMode(), Meter() as meter:
        held = torch.empty(1 << 20, 1 << 10, dtype=torch.bfloat16)
        assert (held @ held.T).shape == (1 << 20, 1 << 20)
    assert (meter.live, meter.peak) == (2 << 30, (2 << 30) + (2 << 40))
    assert meter.flop == 2 << 50


def test_products_and_convolutions_cost_what_torch_counts():
    x, kernel = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3, requires_grad=True)
    counted = []
    for counter in (Meter(), FlopCounterMode(display=False)):
        with counter:
            (torch.conv2d(x, kernel).flatten(1) @ torch.ones(180, 7)).sum().backward()
        counted.append(counter.flop if isinstance(counter, Meter) else counter.get_total_flops())
        kernel.grad = None
    assert counted[0] == counted[1] > 2 * 2 * 180 * 7


@pytest.mark.parametrize(("keys", "values"), [(6, 16), (11, 16)])
def test_attention_on_a_cpu_costs_its_products(keys, values):
    query = torch.randn(2, 3, 6, 16, requires_grad=True)
    key, value = (torch.randn(2, 3, keys, width, requires_grad=True) for width in (16, values))
    with Meter() as meter:
        out = scaled_dot_product_attention(query, key, value)
    product = 2 * 2 * 3 * 6 * keys * 16
    assert meter.flop == 2 * product  # scores, and their mean of the values
    with Meter() as meter:
        out.sum().backward()
    assert meter.flop == 5 * product  # the scores again, and a gradient for each of four matrices


def test_a_model_without_data_keeps_its_parameters_and_their_kinds():
    with torch.device("meta"):
        model = make_transformer()
    model.proj_out.bfloat16().requires_grad_(False)
    before = {name: (id(x), x.shape, x.dtype, x.requires_grad) for name, x in model.named_parameters()}
    with FakeTensorMode():
        without_data(model)
        assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cpu"}
        after = {name: (id(x), x.shape, x.dtype, x.requires_grad) for name, x in model.named_parameters()}
        assert after == before
        with torch.autocast("cpu", torch.bfloat16):
            (out,) = model(
                torch.empty(1, 4, 8, 8), torch.empty(1, 5, 48), torch.empty(1, 40), torch.empty(1), return_dict=False
            )
    assert (out.shape, out.dtype) == ((1, 4, 8, 8), torch.bfloat16)
