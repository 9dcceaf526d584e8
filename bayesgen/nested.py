r"""Nested R-hat: have many short chains found the same posterior?

Chains come in superchains, groups that start at one point. With :math:`\bar\theta_k` the mean of
superchain :math:`k`,

.. math::
    n\hat R = \sqrt{1 + B / W}, \qquad B = \mathrm{Var}_k(\bar\theta_k), \qquad
    W = \mathrm{mean}_k \big(\mathrm{Var}_{m}(\bar\theta_{mk}) + \mathrm{mean}_m s_{mk}^2\big),

where :math:`s_{mk}^2` is the variance within chain :math:`m` of superchain :math:`k`. A chain's
own noise averages out within its superchain, so that chains of ten draws can pass 1.01, which
they cannot with plain R-hat; superchains that have not forgotten their start cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["nested_r_hat", "plain_ratio"]


def nested_r_hat(values: Tensor, num_superchains: int) -> Tensor:
    """Rank-normalised nested R-hat, the larger one of values and of distances from the median.

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman (2024). Nested R-hat:
        assessing the convergence of Markov chain Monte Carlo when running many short chains.
        Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021). Rank-normalization, folding, and
        localization: an improved R-hat.

    Args:
        values: Draws ``(chain, draw, *event)``, chains of a superchain next to each other.
        num_superchains: Groups of chains with a common start, at least two.

    Returns:
        ``(*event)``; NaN for entries that never change.

    Raises:
        ValueError: Chains that are no multiple of the superchains.

    Example:
        >>> draws = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        >>> bool(nested_r_hat(draws, 8) < 1.02)
        True
        >>> bool(nested_r_hat(draws + torch.arange(64)[:, None] // 8, 8) > 1.5)
        True
    """
    chains, draws = values.shape[:2]
    if num_superchains < 2 or chains % num_superchains:
        raise ValueError(
            f"num_superchains={num_superchains} of {chains} chains, but it must be at least 2 "
            "and divide the number of chains."
        )
    flat = values.detach().reshape(chains * draws, -1).cpu().double().numpy()
    shape = (num_superchains, chains // num_superchains, draws, flat.shape[1])
    folded = np.abs(flat - np.median(flat, 0))
    both = [plain_ratio(_normal_scores(v).reshape(shape)) for v in (flat, folded)]
    found = np.where(np.ptp(flat, 0) > 0, np.maximum(*both), np.nan)
    return torch.as_tensor(found).reshape(values.shape[2:])


def _normal_scores(values: NDArray[Any]) -> NDArray[Any]:
    from scipy import special, stats

    ranks = stats.rankdata(values, axis=0)
    scores: NDArray[Any] = special.ndtri((ranks - 0.375) / (len(values) + 0.25))
    return scores


def plain_ratio(values: NDArray[Any]) -> NDArray[Any]:
    """Nested R-hat, without ranks, of ``(superchain, chain, draw, entry)``, for every entry."""
    means = values.mean(2)
    between = means.mean(1).var(0, ddof=1)
    within = means.var(1, ddof=1).mean(0) if means.shape[1] > 1 else 0.0
    if values.shape[2] > 1:
        within = within + values.var(2, ddof=1).mean((0, 1))
    ratio: NDArray[Any] = np.sqrt(1.0 + between / np.maximum(within, 1e-300))
    return ratio
