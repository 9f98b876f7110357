"""Products of low rank, which a LoRA adapter adds to the weights of a layer, and the layers that have one."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def is_target(layer: str, target: str) -> bool:
    """Whether a target of an adapter names a layer: it is the layer's name or its end after a dot, as peft has it."""
    return layer == target or layer.endswith(f".{target}")


def nearest_product(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in), whose product is nearest to `change` (out, in).

    The distance is the Frobenius norm (Eckart and Young, 1936). The rows of `down` are orthonormal, so that both
    factors have gradients even where `change` is 0. Beyond the smaller side of `change` both are 0. The computation is
    in fp64, the result in fp32.
    """
    matrix = change.double()
    rows, columns = matrix.shape
    used = min(rank, rows, columns)
    if columns <= rows:
        basis = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -used:]
    else:
        basis = matrix.T @ torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -used:]
    down = torch.linalg.qr(basis).Q.T
    up = matrix @ down.T
    return pad(up, (0, rank - used)).float(), pad(down, (0, 0, 0, rank - used)).float()
