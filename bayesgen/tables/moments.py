"""Moments of columns that add up: over batches, shards and machines, exact at any offset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ColumnSummary", "summarise"]


@dataclass(frozen=True, eq=False)
class ColumnSummary:
    r"""Moments of the observed entries of each column, in float64, each ``(d,)``.

    Two summaries merge by Chan's formula, which never subtracts large numbers: with
    :math:`\delta = \bar x_b - \bar x_a`,

    .. math::

        \bar x = \bar x_a + \delta\,\frac{n_b}{n}, \qquad
        S = S_a + S_b + \delta^2\,\frac{n_a n_b}{n}.

    References:
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.

    Args:
        columns: Names of the columns.
        count: Number of observed entries.
        mean: Their mean; NaN for a column without observed entries.
        sum_squares: Sum of squared deviations from the mean.
        min: Smallest observed entry, ``inf`` without any.
        max: Largest observed entry, ``-inf`` without any.
    """

    columns: tuple[str, ...]
    count: Tensor
    mean: Tensor
    sum_squares: Tensor
    min: Tensor
    max: Tensor

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
        left, right = self.mean.nan_to_num(), other.mean.nan_to_num()
        delta = torch.where((self.count > 0) & (other.count > 0), right - left, 0.0)
        mean = torch.where(self.count > 0, left + delta * share, other.mean)
        return ColumnSummary(
            columns=self.columns,
            count=count,
            mean=mean,
            sum_squares=self.sum_squares + other.sum_squares + delta.square() * self.count * share,
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
        )


def _summarise_block(block: Tensor, columns: tuple[str, ...]) -> ColumnSummary:
    """Two passes over one block of rows, with the rounding of the mean corrected."""
    x = block.to(torch.float64)
    observed = ~x.isnan()
    count = observed.sum(0).to(torch.float64)
    # A row near the others as origin: sums of values at offset 1e8 would already lose digits.
    origin = torch.where(observed, x, torch.inf).amin(0)
    origin = torch.where(count > 0, origin, torch.nan)
    shift = torch.where(observed, x - origin, 0.0).sum(0) / count
    mean = origin + shift
    deviation = torch.where(observed, x - mean, 0.0)
    residual = deviation.sum(0)
    sum_squares = deviation.square().sum(0) - residual.square() / count.clamp(min=1)
    return ColumnSummary(
        columns=columns,
        count=count,
        mean=mean,
        sum_squares=sum_squares.clamp(min=0.0),
        min=torch.where(observed, x, torch.inf).amin(0),
        max=torch.where(observed, x, -torch.inf).amax(0),
    )


def summarise(blocks: Iterable[Tensor], columns: tuple[str, ...]) -> ColumnSummary:
    """Summarise blocks of rows ``(b, d)``, NaN = missing, holding one block at a time."""
    total: ColumnSummary | None = None
    for block in blocks:
        part = _summarise_block(block, columns)
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no rows to summarise.")
    return total
