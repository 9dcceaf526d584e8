r"""Pareto-smoothed importance sampling: how far is an approximation from what it stands for?

The upper tail of the weights :math:`p(\theta, y) / q(\theta)` is fitted by a generalised Pareto
distribution; its shape :math:`\hat k` says how many moments the weights have. Above 0.7 the
approximation misses mass that no practical number of draws makes up for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["k_hat"]

_MIN_TAIL = 5


def k_hat(log_weights: Tensor) -> float:
    r"""Shape of the generalised Pareto tail of importance weights.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024). Pareto smoothed importance sampling.
        Yao, Vehtari, Simpson & Gelman (2018). Yes, but did it work? Evaluating variational
        inference. Zhang & Stephens (2009). A new and efficient estimation method for the
        generalized Pareto distribution.

    Args:
        log_weights: ``(num_draws,)`` log importance weights, up to a constant, in nats.

    Returns:
        :math:`\hat k`; NaN with fewer than 25 draws, infinite if a weight is not finite, and
        minus infinity if all weights are equal to rounding.

    Example:
        >>> k_hat(torch.zeros(100))
        -inf
        >>> tail = -torch.log1p(-(torch.arange(1000) + 0.5) / 1000)  # exponential: of shape one
        >>> abs(k_hat(tail.double()) - 1.0) < 0.1
        True
    """
    values = log_weights.detach().double().flatten()
    count = len(values)
    size = int(min(count // 5, math.ceil(3 * math.sqrt(count))))
    if size < _MIN_TAIL:
        return math.nan
    if bool((values == math.inf).any() | values.isnan().any()):
        return math.inf
    weights = (values - values.max()).exp().sort().values
    tail = weights[-size:] - weights[-size - 1]
    spread = float(values.max() - values.sort().values[-size])
    if spread < 1e-10 * max(1.0, float(values.abs().max())):
        return -math.inf
    return _pareto_shape(tail)


def _pareto_shape(x: Tensor) -> float:
    """Profile posterior mean of the shape, of sorted exceedances ``(n,)``, shrunk towards 0.5."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    grid = torch.arange(1, m + 1, dtype=torch.float64)
    quartile = x[int(n / 4 + 0.5) - 1].clamp(min=torch.finfo(x.dtype).tiny)
    theta = (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile) + 1 / x[-1]
    shape = torch.log1p(-theta[:, None] * x).mean(-1)
    profile = n * ((-theta / shape).log() - shape - 1)
    weights = torch.softmax(profile.nan_to_num(-math.inf), 0)
    kept = weights > 10 * torch.finfo(torch.float64).eps
    theta_hat = (weights * theta)[kept].sum() / weights[kept].sum()
    k = float(torch.log1p(-theta_hat * x).mean())
    return (n * k + 5.0) / (n + 10.0)
