"""Programs with parts made elsewhere, under another default dtype: they run in the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Converted", "in_one_dtype"]

_NEW_TENSORS = ("T", "mT", "H", "mH")  # attributes that are computed; others tell of the tensor


@final
class Converted(Messenger):
    """Give a program the values of its latents in one precision, whatever that of their priors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.is_floating_point() and not msg["is_observed"]:
            msg["value"] = value.to(self.dtype)


@final
class _Trainable(TorchFunctionMode):
    """Where a trainable tensor of another precision is used, use it in this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _tells_or_writes(func):
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if any(map(self._is_other, tree_leaves((args, kwargs)))):  # a mapped torch.Size is a tuple
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        return func(*args, **kwargs)

    def _is_other(self, value: Any) -> bool:
        if not (isinstance(value, Tensor) and value.requires_grad and value.is_leaf):
            return False
        return value.is_floating_point() and value.dtype != self.dtype

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if self._is_other(value) else value


def _tells_or_writes(func: Any) -> bool:
    """Whether a function is about the tensor itself, or writes into it."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func.__self__.__name__ not in _NEW_TENSORS
    return name in ("__set__", "__setitem__") or (name.endswith("_") and name[-2:] != "__")


@contextmanager
def in_one_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, programs see latents and trainable tensors in one precision.

    For the first run of a program and its guide, which finds out what there is to train: networks
    that were made elsewhere, and guides that take their start from priors made elsewhere.
    """
    with Converted(dtype), _Trainable(dtype):
        yield
