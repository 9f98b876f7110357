"""Safetensors files, written one tensor at a time: safetensors' own writer needs all of them in memory at once."""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {  # the names of types in the file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file and return its checksum. One tensor at a time is copied to the host.

    With `read`, which returns the values of a tensor by name, `tensors` give shapes and types only and may be on the
    device `meta`. Raises OSError.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # readers need aligned tensors
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values = tensors[name] if read is None else read(name)
            write(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
