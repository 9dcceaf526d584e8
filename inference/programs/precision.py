"""Programs with parts made elsewhere, under another default dtype: they run in the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Converted", "InOneDtype", "in_one_dtype"]

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
        args = tuple(self._cast(v) for v in args)
        return func(*args, **{k: self._cast(v) for k, v in (kwargs or {}).items()})

    def _cast(self, value: Any) -> Any:
        if type(value) in (tuple, list):  # and no torch.Size, which is no tuple to torch
            return type(value)(self._cast(v) for v in value)
        if not isinstance(value, Tensor) or not (value.requires_grad and value.is_leaf):
            return value
        is_other = value.is_floating_point() and value.dtype != self.dtype
        return value.to(self.dtype) if is_other else value


def _tells_or_writes(func: Any) -> bool:
    """Whether a function is about the tensor itself, or writes into it."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func.__self__.__name__ not in _NEW_TENSORS
    if name == "contiguous":  # Pyro's store keeps the tensor itself, by which it is found again
        return True
    return name in ("__set__", "__setitem__") or (name.endswith("_") and name[-2:] != "__")


@contextmanager
def in_one_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, programs see latents and trainable tensors in one precision.

    For the first run of a program and its guide, which finds out what there is to train: networks
    that were made elsewhere, and guides that take their start from priors made elsewhere.
    """
    with Converted(dtype), _Trainable(dtype):
        yield


@final
class InOneDtype:
    """A program of which latents and trainable tensors are used in one precision."""

    def __init__(self, run: Callable[[], Any], dtype: torch.dtype) -> None:
        self.run, self.dtype = run, dtype

    def __call__(self) -> Any:
        with in_one_dtype(self.dtype):
            return self.run()
