"""Bytes of tensors, to tell one from another by a hash."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tensor_bytes"]


def tensor_bytes(value: Tensor) -> bytes:
    """The entries of a tensor in order, as bytes; neither strides nor device count.

    Args:
        value: Of any shape, dtype and device.

    Example:
        >>> import torch
        >>> tensor_bytes(torch.ones(2).expand(3, 2)) == tensor_bytes(torch.ones(3, 2))
        True
    """
    # ``contiguous`` keeps a single entry of stride zero, which no view as bytes allows.
    flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()
