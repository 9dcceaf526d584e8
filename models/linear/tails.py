r"""What the degrees of freedom of a column need of its cells, their scales integrated out.

The residual :math:`r` of a cell in units of the noise is Student-t, and with
:math:`\delta = r^2` the log likelihood of a column's degrees of freedom is

.. math::
    n \Bigl(\log\Gamma\bigl(\tfrac{\nu + 1}2\bigr) - \log\Gamma\bigl(\tfrac\nu2\bigr)
    - \tfrac12 \log(\nu \pi)\Bigr) - \sum_i \tfrac{\nu + 1}2 \log(1 + \delta_i / \nu).

The sum has no sufficient statistics, but it is smooth in :math:`\log\nu`: each term is analytic
within :math:`\pi` of the real line, so the polynomial through 32 Chebyshev nodes has it to eight
digits everywhere between 0.1 and 1000. Sums at the nodes add up over batches, as statistics do.

References:
    Trefethen (2013). Approximation theory and approximation practice. SIAM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesgen.models.families.degrees_of_freedom import HIGH, LOW

__all__ = ["tail_likelihood", "tail_sums"]

_NODES = 32
_MIDDLE, _HALF = 0.5 * math.log(HIGH * LOW), 0.5 * math.log(HIGH / LOW)


def _angles(like: Tensor) -> Tensor:
    steps = torch.arange(_NODES, dtype=torch.float64, device=like.device)
    return math.pi * (steps + 0.5) / _NODES


def tail_sums(distance: Tensor, observed: Tensor) -> Tensor:
    """Sums of each column at the nodes, ``(..., d, 32)``.

    Args:
        distance: Squared residuals in units of the noise, ``(..., n, d)``.
        observed: One where a cell was observed, else zero, ``(n, d)``.
    """
    # Hundreds of degrees of freedom are told apart by differences that single precision has not.
    first, second, third, fourth = _products(distance.double() * observed)
    sums = []
    # Node by node: all at once would be many times the batch, which no longer fits the cache.
    for df in (_MIDDLE + _HALF * _angles(distance).cos()).exp().tolist():
        part = 1.0 / df
        total = (fourth * part).add_(third).mul_(part).add_(second).mul_(part).add_(first)
        sums.append(0.5 * (df + 1.0) * total.mul_(part).log1p_().sum(-2))
    return torch.stack(sums, -1)


def _products(distance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Coefficients of :math:`\prod (1 + \delta_i t) - 1` over rows by fours, ``(..., n / 4, d)``.

    So that four cells share one logarithm. All terms are positive: no digits are lost.
    """
    whole = torch.nn.functional.pad(distance, (0, 0, 0, -distance.shape[-2] % 4))
    a, b, c, d = whole.unflatten(-2, (4, -1)).unbind(-3)
    left, right = a + b, c + d
    low, high = a * b, c * d
    return left + right, low + high + left * right, low * right + left * high, low * high


def tail_likelihood(sums: Tensor, count: Tensor) -> Callable[[Tensor], Tensor]:
    """The log likelihood ``(..., d, m)`` as a function of ``log df (..., d, m)``.

    Args:
        sums: What :func:`tail_sums` gave, over all batches.
        count: Observed cells of each column, ``(..., d)``.
    """
    angles = _angles(sums)
    orders = torch.arange(_NODES, dtype=torch.float64, device=sums.device)
    series = sums @ (angles.unsqueeze(-1) * orders).cos() * (2.0 / _NODES)
    count = count.double().unsqueeze(-1)

    def log_likelihood(log_df: Tensor) -> Tensor:
        half = 0.5 * log_df.exp()
        constant = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * log_df
        constant = constant - 0.5 * math.log(math.pi)
        return count * constant - _clenshaw(series, (log_df - _MIDDLE) / _HALF)

    return log_likelihood


def _clenshaw(series: Tensor, place: Tensor) -> Tensor:
    """The Chebyshev series ``(..., k)``, its first term halved, at places ``(..., m)``."""
    before, last = torch.zeros_like(place), torch.zeros_like(place)
    for term in reversed(series.unsqueeze(-2).unbind(-1)[1:]):
        before, last = last, term + 2.0 * place * last - before
    return 0.5 * series[..., :1] + place * last - before
