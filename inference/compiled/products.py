"""Running products whose gradient is a few plain operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainProducts"]


class PlainProducts(TorchFunctionMode):
    """Running products by doubling: torch's own gradient of them treats zeros by fifty steps."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.cumprod, Tensor.cumprod) and args[0].requires_grad:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, int) and args[0].ndim:
                return _running_product(args[0], dim)
        return func(*args, **kwargs)


def _running_product(value: Tensor, dim: int) -> Tensor:
    size, shift = value.shape[dim], 1
    while shift < size:
        moved = value.narrow(dim, shift, size - shift) * value.narrow(dim, 0, size - shift)
        value = torch.cat((value.narrow(dim, 0, shift), moved), dim)
        shift *= 2
    return value
