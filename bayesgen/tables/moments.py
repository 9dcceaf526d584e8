"""Moments of columns that add up: over batches, shards and machines, exact at any offset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ColumnSummary", "summarise"]

_PIECE = 2**16
"""Numbers summarised at once."""


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
        min: Smallest observed entry, ``inf`` without any.
        max: Largest observed entry, ``-inf`` without any.
    """

    columns: tuple[str, ...]
    count: Tensor
    origin: Tensor
    shift: Tensor
    sum_squares: Tensor
    min: Tensor
    max: Tensor

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
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
        )


def _summarise_block(block: Tensor, columns: tuple[str, ...]) -> ColumnSummary:
    """Two passes over one block of rows, with the rounding of the mean corrected."""
    x = block.to(torch.float64)
    if len(x):
        low, high = _ends(x)
        if bool((high - low).isfinite().all()):  # NaN anywhere would be both
            return _summarise_complete(x, low, high, columns)
    observed = ~x.isnan()
    count = observed.sum(0).to(torch.float64)
    low = torch.where(observed, x, torch.inf).amin(0)
    origin = torch.where(count > 0, low, torch.nan)
    centred = torch.where(observed, x - origin, 0.0)
    shift = centred.sum(0) / count
    deviation = torch.where(observed, centred - shift, 0.0)
    residual = deviation.sum(0)
    sum_squares = deviation.square().sum(0) - residual.square() / count.clamp(min=1)
    return ColumnSummary(
        columns=columns,
        count=count,
        origin=origin,
        shift=shift,
        sum_squares=sum_squares.clamp(min=0.0),
        min=low,
        max=torch.where(observed, x, -torch.inf).amax(0),
    )


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each column; numpy's take less time than torch's."""
    if x.device.type != "cpu":
        low, high = torch.aminmax(x, dim=0)
        return low, high
    array = x.detach().numpy()
    return torch.from_numpy(array.min(0)), torch.from_numpy(array.max(0))


def _summarise_complete(
    x: Tensor, low: Tensor, high: Tensor, columns: tuple[str, ...]
) -> ColumnSummary:
    """The same without gaps, where sums over rows are products with ones: several times faster."""
    n = float(len(x))
    ones = x.new_ones(len(x))
    deviation = x - low
    shift = ones @ deviation / n
    deviation -= shift
    residual = ones @ deviation
    sum_squares = ones @ deviation.square() - residual.square() / n
    return ColumnSummary(
        columns=columns,
        count=torch.full_like(low, n),
        origin=low,
        shift=shift + residual / n,
        sum_squares=sum_squares.clamp(min=0.0),
        min=low,
        max=high,
    )


def summarise(blocks: Iterable[Tensor], columns: tuple[str, ...]) -> ColumnSummary:
    """Summarise blocks of rows ``(b, d)``, NaN = missing, holding one block at a time."""
    total: ColumnSummary | None = None
    for block in blocks:
        # Pieces that fit the processor's cache: half a dozen copies of each are needed.
        for piece in block.split(max(1, _PIECE // max(1, block.shape[1]))):
            part = _summarise_block(piece, columns)
            total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no rows to summarise.")
    return total
