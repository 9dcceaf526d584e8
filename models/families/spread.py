"""How far each column spreads once the others are known: the scale of the default priors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesgen.data import Dataset

__all__ = ["conditional_scales", "within_share"]

_BATCH_SIZE = 65_536


def within_share(num_components: int, num_columns: int) -> float:
    """How far components are expected to spread, as a share of the spread of the whole data.

    Half as far; less where so many components would not fit side by side.
    """
    return min(0.5, num_components ** (-1.0 / num_columns))


def conditional_scales(data: Dataset, centre: Tensor, scale: Tensor) -> Tensor:
    r"""Standard deviation of each column given all others, ``(d,)``, under one Gaussian.

    With the correlation matrix :math:`R` of the data, shrunk by one pseudo-row without
    correlation,

    .. math:: s_j = \text{scale}_j \, \big((R^{-1})_{jj}\big)^{-1/2}

    Missing entries count as uncorrelated. One pass over the rows, whether in memory or streamed.

    Args:
        data: The rows.
        centre: Mean of each column, ``(d,)``.
        scale: Standard deviation of each column, ``(d,)``, positive.
    """
    d = len(centre)
    total = torch.zeros((d, d), dtype=torch.float64)
    for rows in data.batches(_BATCH_SIZE):
        standard = torch.nan_to_num((rows - centre) / scale, nan=0.0)
        total += standard.mT @ standard
    # One pseudo-row: n R + I over n + 1. The diagonal is one, whatever is missing or constant.
    correlation = total / (data.num_rows + 1.0)
    correlation.diagonal().fill_(1.0)
    # Duplicate columns in large data: the pseudo-row alone would leave them no spread at all.
    correlation.diagonal().add_(1e-6)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    return scale / precision.diagonal().sqrt()
