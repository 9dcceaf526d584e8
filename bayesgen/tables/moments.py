"""Moments of columns that add up: over batches, shards and machines, exact at any offset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["ColumnSummary", "summarise"]

_PIECE = 2**17
"""Numbers summarised at once."""
_CANCELLED = 1e-2
"""Share that is left of a sum of squares, below which its digits are worth a second pass."""


@dataclass(frozen=True, eq=False)
class ColumnSummary:
    r"""Moments of the observed entries of each column, in float64, each ``(d,)``.

    Two summaries merge by Chan's formula, which never subtracts large numbers: with
    :math:`\delta = \bar x_b - \bar x_a`,

    .. math::

        \bar x = \bar x_a + \delta\,\frac{n_b}{n}, \qquad
        S = S_a + S_b + \delta^2\,\frac{n_a n_b}{n}.

    Means are kept as a distance from an entry of the column, so that :math:`\delta` is not rounded
    to the precision of a large offset either.

    References:
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.

    Args:
        columns: Names of the columns.
        count: Number of observed entries.
        origin: One of the observed entries; NaN for a column without any, as is all that follows
            from it.
        shift: Mean of the observed entries minus ``origin``.
        sum_squares: Sum of squared deviations from the mean.
    """

    columns: tuple[str, ...]
    count: Tensor
    origin: Tensor
    shift: Tensor
    sum_squares: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean of the observed entries."""
        return self.origin + self.shift

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean (divided by ``count``), in squared units."""
        return self.sum_squares / self.count

    @property
    def scale(self) -> Tensor:
        """Standard deviation: the square root of :attr:`variance`."""
        return self.variance.sqrt()

    def merge(self, other: ColumnSummary) -> ColumnSummary:
        """The summary of both sets of rows together."""
        if self.columns != other.columns:
            raise ValueError(
                f"summaries of the columns {self.columns} and {other.columns} cannot be merged."
            )
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0.0)
        delta = (other.origin - self.origin) + (other.shift - self.shift)
        delta = torch.where((self.count > 0) & (other.count > 0), delta, 0.0)
        filled = self.count > 0
        return ColumnSummary(
            columns=self.columns,
            count=count,
            origin=torch.where(filled, self.origin, other.origin),
            shift=torch.where(filled, self.shift + delta * share, other.shift),
            sum_squares=self.sum_squares + other.sum_squares + delta.square() * self.count * share,
        )


def _summarise_block(x: Tensor, columns: tuple[str, ...]) -> ColumnSummary:
    """Deviations from one entry first, so that no digits are lost to an offset."""
    if len(x):
        found = _summarise_complete(x, columns)
        if bool(found.shift.isfinite().all()):  # NaN anywhere would be there
            return found
    observed = ~x.isnan()
    count = observed.sum(0).to(torch.float64)
    low = torch.where(observed, x, torch.inf).amin(0)
    origin = torch.where(count > 0, low, torch.nan)
    centred = torch.where(observed, x - origin, 0.0)
    shift = centred.sum(0) / count
    deviation = torch.where(observed, centred - shift, 0.0)
    residual = deviation.sum(0)
    sum_squares = deviation.square().sum(0) - residual.square() / count.clamp(min=1)
    return ColumnSummary(columns, count, origin, shift, sum_squares.clamp(min=0.0))


def _summarise_complete(x: Tensor, columns: tuple[str, ...]) -> ColumnSummary:
    """The same without gaps, where sums over rows are products with ones: several times faster."""
    n, ones = float(len(x)), x.new_ones(len(x))
    deviation = x - x[0]
    shift = ones @ deviation / n
    square = _squares(deviation)
    sum_squares = square - n * shift.square()
    if bool((sum_squares < _CANCELLED * square).any()):  # the first entry lies far out
        deviation -= shift
        residual = ones @ deviation
        sum_squares = _squares(deviation) - residual.square() / n
        shift = shift + residual / n
    count = torch.full_like(shift, n)
    return ColumnSummary(columns, count, x[0].clone(), shift, sum_squares.clamp(min=0.0))


def _squares(x: Tensor) -> Tensor:
    """Sum of squares of each column; numpy needs no second matrix on the CPU."""
    if x.device.type != "cpu":
        return x.square().sum(0)
    array = x.detach().numpy()
    return torch.from_numpy(np.einsum("ij,ij->j", array, array))


def summarise(
    blocks: Iterable[Tensor],
    columns: tuple[str, ...],
    visit: Callable[[Tensor, bool], None] | None = None,
) -> ColumnSummary:
    """Summarise blocks of rows ``(b, d)``, NaN = missing, holding one block at a time.

    ``visit`` is called with each piece that is looked at, in float64 and while it is in the
    processor's cache, and whether it has gaps.
    """
    total: ColumnSummary | None = None
    for block in blocks:
        for piece in block.split(max(1, _PIECE // max(1, block.shape[1]))):
            x = piece.to(torch.float64)
            part = _summarise_block(x, columns)
            if visit is not None:
                visit(x, bool((part.count < len(x)).any()))
            total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no rows to summarise.")
    return total
