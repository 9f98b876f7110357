"""`Meter` counts FLOP and the bytes of live tensors, also of tensors without data."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# FLOP of an operation from its arguments. The CPU's attention keeps and costs the same as CUDA's fused kernels.
_FLOP = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOP and bytes of the storages that operations allocate: those `live` now, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flop = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in _FLOP:
            self.flop += _FLOP[func._overloadpacket](*args, **kwargs, out_val=out)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made:  # more than half of all calls only read attributes of tensors without data
            before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in made:
                # A result that shares storage with an argument is a view of it, or the argument itself.
                if x.untyped_storage()._cdata not in before:
                    self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def without_data(model: nn.Module) -> None:
    """Turn a model on the meta device into one on the CPU without data; only in a FakeTensorMode.

    The meta device has no autocast, and its attention builds the (tokens, tokens) matrix. Parameters remain the same
    objects, because networks have listed them.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shape, dtype, learns = parameter.shape, parameter.dtype, parameter.requires_grad
            empty = torch.empty(shape, dtype=dtype, requires_grad=learns)
            torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
