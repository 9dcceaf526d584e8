"""What the linear models keep of a batch of rows: sums where those suffice, else rows with masks.

Everything is relative to the model's offset, the mean of each column, so that second moments lose
no digits to a large one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "Sums", "pool", "sum_rows", "take_rows"]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sufficient statistics of complete rows: an iteration needs no pass over the rows.

    Args:
        count: Number of rows, ``()``.
        total: Sum of the rows, ``(d,)``.
        matrix: Sum of their outer products ``(d, d)``; or, for fewer rows than columns, the rows.
        is_root: Whether ``matrix`` holds rows.
    """

    count: Tensor
    total: Tensor
    matrix: Tensor
    is_root: bool

    def times(self, right: Tensor) -> Tensor:
        """The sum of outer products times ``(..., d, q)``."""
        if self.is_root:
            return self.matrix.mT @ (self.matrix @ right)
        return self.matrix @ right

    @cached_property
    def squares(self) -> Tensor:
        """Sum of squares of each column, ``(d,)``."""
        return self.matrix.square().sum(0) if self.is_root else self.matrix.diagonal()

    @cached_property
    def root(self) -> Tensor:
        """``(r, d + 1)`` of full rank whose Gram matrix is that of the rows with a one appended.

        What a projection of the rows on noise depends on.
        """
        if self.is_root:
            return torch.cat([self.matrix, torch.ones_like(self.matrix[:, :1])], -1)
        border = self.total.unsqueeze(-1)
        gram = torch.cat(
            [
                torch.cat([self.matrix, border], -1),
                torch.cat([border.mT, self.count.reshape(1, 1)], -1),
            ]
        )
        # The columns' scales may differ by orders of magnitude: ranks are told apart at one scale.
        scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        values, vectors = torch.linalg.eigh(gram / (scale * scale.unsqueeze(-1)))
        keep = values > 1e-12 * values[-1]
        return values[keep].sqrt().unsqueeze(-1) * vectors[:, keep].mT * scale


class Rows(NamedTuple):
    """Rows one by one."""

    values: Tensor
    """``(n, d)``, zero where missing."""
    weight: Tensor | None
    """``(n, d)`` one where observed, zero where missing; None when all are complete."""
    total: Tensor
    """Sum of each column, ``(d,)``."""
    square: Tensor
    """Sum of squares of each column, ``(d,)``."""
    observed: Tensor
    """Observed entries of each column, ``(d,)``."""


def sum_rows(centred: Tensor, dtype: torch.dtype, *, is_root: bool) -> Sums:
    """Sums of complete rows ``(b, d)`` in float64, multiplied in ``dtype``, added in float64."""
    rows = centred.to(dtype)
    matrix = rows if is_root else _gram(rows)
    count = torch.tensor(float(len(centred)), dtype=torch.float64, device=centred.device)
    return Sums(count, centred.new_ones(len(centred)) @ centred, matrix.double(), is_root)


def _gram(rows: Tensor) -> Tensor:
    """``rows.T @ rows``; numpy computes only half of the symmetric product, torch all of it."""
    if rows.device.type != "cpu":
        return rows.mT @ rows
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)


def pool(left: Sums, right: Sums) -> Sums:
    """The sums of both sets of rows."""
    if left.is_root:
        matrix = torch.cat([left.matrix, right.matrix])
    else:
        matrix = left.matrix + right.matrix
    return Sums(left.count + right.count, left.total + right.total, matrix, left.is_root)


def take_rows(centred: Tensor, dtype: torch.dtype, *, complete: bool) -> Rows:
    """Rows ``(b, d)`` with their gaps, in ``dtype``; sums are kept in float64."""
    if complete:
        filled, weight = centred, None
        count = centred.new_full((), float(centred.shape[-2])).expand(centred.shape[-1])
    else:
        weight = (centred == centred).to(dtype)
        filled = centred.nan_to_num(nan=0.0)
        count = (weight.new_ones((1, weight.shape[-2])) @ weight).double().squeeze(-2)
    values, one = filled.to(dtype), filled.new_ones((1, filled.shape[-2]))
    total, square = (one @ filled).squeeze(-2), (one @ filled.square()).squeeze(-2)
    return Rows(values, weight, total, square, count)
