"""Where numbers lie in memory: it decides how products and sums of them round.

Matrix libraries choose their kernels by strides and by the address of the first number, so that
equal values may give results that differ in the last bit. Runs of one seed are equal bit by bit
because data and the states of engines always lie alike: contiguous, from a multiple of 64 bytes
on, as torch allocates memory. Numpy's starts at any multiple of 16 bytes, and so do the tensors
that safetensors reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["aligned", "settled"]

_BYTES = 64
# Larger blocks get pages of their own from the C library, and so the same offset in every process.
_LARGEST = 2**26


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy that starts at a multiple of 64 bytes; strides stay.

    Tensors above 64 MiB stay where they are.
    """
    if x.data_ptr() % _BYTES == 0 or x.numel() * x.element_size() > _LARGEST:
        return x
    return x.clone()


def settled(value: Any) -> Any:
    """Nested dicts and lists with every tensor contiguous and aligned.

    What is so already stays the very object that it was.
    """
    if isinstance(value, Tensor):
        if value.is_contiguous() and value.data_ptr() % _BYTES == 0:
            return value
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {k: settled(v) for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor | dict | list):
        return [settled(v) for v in value]
    return value
