"""Moments of columns that add up: over batches, shards and machines, exact at any offset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["ColumnSummary", "summarise", "summarise_products"]

_PIECE = 2**17
"""Numbers summarised at once."""
_CANCELLED = 1e-2
"""Share that is left of a sum of squares, below which its digits are worth a second pass."""

Visit = Callable[[Tensor, bool], None]
"""Called with each piece of rows while it is in the processor's cache, and whether it has gaps."""


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
        origin: One of the observed entries, or a number among them; NaN for a column without any,
            as is all that follows from it.
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
    visit: Visit | None = None,
) -> ColumnSummary:
    """Summarise blocks of rows ``(b, d)``, NaN = missing, holding one block at a time."""
    total: ColumnSummary | None = None
    for x in _pieces(blocks):
        part = _summarise_block(x, columns)
        if visit is not None:
            visit(x, bool((part.count < len(x)).any()))
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no rows to summarise.")
    return total


def summarise_products(
    blocks: Iterable[Tensor], columns: tuple[str, ...], visit: Visit
) -> tuple[ColumnSummary, Tensor] | None:
    """The summary of complete rows on the CPU, and the sums of products of deviations ``(d, d)``.

    One product of matrices gives both. All deviations are from the mean of the first rows, so
    that sums over pieces just add; None where those are no use as an origin (some column's mean
    lies further from it than the column spreads, which costs digits), and where there are gaps.
    """
    d, count = len(columns), 0
    origin, total, matrix = np.zeros(d), np.zeros(d), np.zeros((d, d))
    # Memory that is used again and again stays in the cache; products in numpy, which computes
    # only half of a symmetric one.
    space, ones = np.empty((0, d)), np.empty(0)
    for piece in _pieces(blocks):
        x = piece.detach().numpy()
        if len(x) > len(space):
            space, ones = np.empty(x.shape), np.ones(len(x))
        if count == 0:
            origin = x[0] + (x - x[0]).mean(0)
        deviation = np.subtract(x, origin, out=space[: len(x)])
        here = ones[: len(x)] @ deviation
        if not np.isfinite(here).all():
            return None
        total += here
        matrix += deviation.T @ deviation
        count += len(x)
        visit(piece, False)
    shift = total / count
    if bool((count * shift**2 > 0.5 * matrix.diagonal()).any()):
        return None
    matrix -= total[:, None] * shift
    products = torch.from_numpy(matrix)
    counts = torch.full((d,), float(count), dtype=torch.float64)
    near = (torch.from_numpy(origin), torch.from_numpy(shift))
    return ColumnSummary(columns, counts, *near, products.diagonal().clamp(min=0.0)), products


def _pieces(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows in float64, as many at once as stay in the processor's cache."""
    for block in blocks:
        for piece in block.tensor_split(-(-block.numel() // _PIECE) or 1):
            yield piece.to(torch.float64)
