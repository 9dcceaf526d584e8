"""Where columns lie and how far they spread, whatever a minority of their cells says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng

if TYPE_CHECKING:
    from bayesgen.data import Dataset

__all__ = ["Spread", "find_spread", "median_spread"]

# Standard deviations of a normal in one median absolute deviation.
_NORMAL = 1.4826
# Enough rows to know a spread to a hundredth, far finer than a prior needs.
_ROWS = 20_000


class Spread(NamedTuple):
    """Robust place and spread of columns, each ``(d,)``."""

    loc: Tensor
    """Medians; zero for a column without entries."""
    spread: Tensor
    """Median absolute deviations as standard deviations of a normal; of a column of which half is
    equal, by the other cells alone; zero for a constant one."""
    is_sure: Tensor
    """Whether at least half the cells tell of the spread."""


def find_spread(data: Dataset) -> Spread:
    """Of the columns of data; of large data by some rows, always the same, in one pass."""
    if data.num_rows > _ROWS:
        index = torch.randint(data.num_rows, (_ROWS,), generator=rng.make_generator(0))
        data = data.subset(index.unique())
    rows = torch.cat(list(data.batches(_ROWS)))
    loc, spread = median_spread(rows)
    away = (rows - loc).abs()
    others = _NORMAL * _median(away.masked_fill(away == 0.0, torch.nan))
    return Spread(loc, torch.where(spread > 0.0, spread, others), spread > 0.0)


def median_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Medians of columns ``(n, d)`` and their absolute deviations as a normal's, ``(d,)`` each.

    Gaps are left out. The spread of a column of which half the cells are equal is zero; both are
    zero for a column without any.
    """
    loc = _median(x)
    return loc, _NORMAL * _median((x - loc).abs())


def _median(x: Tensor) -> Tensor:
    """Halfway between the lower and the upper median."""
    middle = 0.5 * (x.nanmedian(0).values - (-x).nanmedian(0).values)
    return middle.nan_to_num(nan=0.0)
