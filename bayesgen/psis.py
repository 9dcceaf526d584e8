r"""Pareto-smoothed importance sampling: how far is an approximation from what it stands for?

The upper tail of the weights :math:`p(\theta, y) / q(\theta)` is fitted by a generalised Pareto
distribution; its shape :math:`\hat k` says how many moments the weights have. Above 0.7 the
approximation misses mass that no practical number of draws makes up for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["k_hat", "smooth", "weight_efficiency"]

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
    return float(smooth(log_weights.flatten())[1])


def weight_efficiency(log_weights: Tensor) -> float:
    r"""Effective share of weighted draws, :math:`(\sum w)^2 / (S \sum w^2)`: one if all are equal.

    References:
        Kong (1992). A note on importance sampling using standardized weights.

    Args:
        log_weights: ``(num_draws,)``, up to a constant, in nats.

    Example:
        >>> round(weight_efficiency(torch.zeros(100)), 9)
        1.0
        >>> round(weight_efficiency(torch.tensor([0.0, -1e3])), 9)
        0.5
    """
    flat = log_weights.detach().double().flatten()
    return float((2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp() / len(flat))


def smooth(log_weights: Tensor, *, efficiency: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Importance weights whose largest ones are replaced by quantiles of their fitted tail.

    The tail holds :math:`\min(S / 5, 3 \sqrt{S / r})` weights of :math:`S` draws.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024). Pareto smoothed importance sampling.

    Args:
        log_weights: ``(num_draws, *)``, up to a constant, in nats; each column by itself.
        efficiency: Effective sample size of the draws over their number, ``r``.

    Returns:
        Log weights that sum to one, of the same shape, and :math:`\hat k` ``(*)`` of each column,
        as :func:`k_hat` gives it.
    """
    raw = log_weights.detach().double()
    columns = raw.reshape(len(raw), -1)
    pairs = [_smooth(column, efficiency) for column in columns.unbind(-1)]
    smoothed = torch.stack([weights for weights, _ in pairs], -1).reshape(raw.shape)
    return smoothed, torch.tensor([k for _, k in pairs], dtype=raw.dtype).reshape(raw.shape[1:])


def _smooth(values: Tensor, efficiency: float) -> tuple[Tensor, float]:
    count = len(values)
    size = int(min(count / 5, math.ceil(3 * math.sqrt(count / efficiency))))
    if bool((values == math.inf).any() | values.isnan().any()):
        return values - values.logsumexp(0), math.inf
    if size < _MIN_TAIL:
        return values - values.logsumexp(0), math.nan
    ordered, order = values.sort()
    top = ordered[-1]
    if float(top - ordered[-size]) < 1e-10 * max(1.0, float(values.abs().max())):
        return values - values.logsumexp(0), -math.inf
    cutoff = (ordered[-size - 1] - top).exp()
    k, sigma = _pareto((ordered[-size:] - top).exp() - cutoff)
    shares = (torch.arange(size, dtype=values.dtype, device=values.device) + 0.5) / size
    growth = torch.log1p(-shares)
    tail = -sigma * growth if abs(k) < 1e-12 else sigma * torch.expm1(-k * growth) / k
    result = values.clone()
    result[order[-size:]] = ((tail + cutoff).log() + top).clamp(max=float(top))
    return result - result.logsumexp(0), k


def _pareto(x: Tensor) -> tuple[float, float]:
    """Shape, shrunk towards 0.5, and scale: profile posterior means, of sorted ``x (n,)``."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    quartile = x[int(n / 4 + 0.5) - 1].clamp(min=torch.finfo(x.dtype).tiny)
    theta = (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile) + 1 / x[-1]
    shape = torch.log1p(-theta[:, None] * x).mean(-1)
    profile = n * ((-theta / shape).log() - shape - 1)
    weights = torch.softmax(profile.nan_to_num(-math.inf), 0)
    kept = weights > 10 * torch.finfo(torch.float64).eps
    theta_hat = (weights * theta)[kept].sum() / weights[kept].sum()
    k = float(torch.log1p(-theta_hat * x).mean())
    return (n * k + 5.0) / (n + 10.0), -k / float(theta_hat)
