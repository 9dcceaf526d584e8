"""The arguments of a Pyro program, their tensors apart: inputs of a graph, cut into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Call"]

_TENSOR = object()


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of model and guide.

    Args:
        tensors: Tensor leaves of the arguments.
        leaves: All leaves, with a mark where a tensor stands.
        spec: How the leaves make ``(args, kwargs)``.
        rowwise: Which tensors have an entry for each row of the data: they are cut into batches.
        num_rows: Rows of the data: the leading size of the first tensor that has one.
    """

    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    rowwise: tuple[bool, ...]
    num_rows: int

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Take the arguments of a call apart."""
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        tensors = tuple(v for v in leaves if isinstance(v, Tensor))
        sizes = [v.shape[0] for v in tensors if v.ndim]
        rows = sizes[0] if sizes else 0
        return cls(
            tensors,
            tuple(_TENSOR if isinstance(v, Tensor) else v for v in leaves),
            spec,
            tuple(bool(v.ndim) and v.shape[0] == rows for v in tensors),
            rows,
        )

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with ``tensors`` in place of the original ones."""
        given = iter(tensors)
        leaves = [next(given) if v is _TENSOR else v for v in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def rows(self, index: Tensor) -> tuple[Tensor, ...]:
        """The tensors of some rows."""
        pairs = zip(self.tensors, self.rowwise, strict=True)
        return tuple(v[index] if cut else v for v, cut in pairs)
