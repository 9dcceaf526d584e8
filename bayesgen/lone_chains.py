r"""Of many chains, do a few sit where the others never go?

R-hat measures the whole spread between chains. Three chains of 256 that are caught in a mode of
their own, eight standard deviations away, give 1.009 and pass, while the mean is off by a tenth of
a standard deviation. Here each chain is asked alone: with :math:`m_k` the median of chain
:math:`k` and :math:`\tilde m` their median, chain :math:`k` is apart if

.. math::
    |m_k - \tilde m| > \max(s,\; 6 \cdot 1.4826 \, \mathrm{median}_j |m_j - \tilde m|),

where :math:`s` is the standard deviation of a normal with the quartiles of all draws. Medians make
both sides blind to heavy tails, and the second term to chains that all mix slowly, which is what
R-hat is for.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = ["MIN_CHAINS", "LoneChains", "lone_chains"]

MIN_CHAINS = 8
"""Of fewer, R-hat notices a single one."""
_TO_SD = 1.4826  # from a median distance, or half the distance of quartiles, of a normal
_FACTOR = 6.0
_ENTRIES = 4096  # looked at together


@final
class LoneChains(NamedTuple):
    """Which chains are apart, and how far."""

    chains: tuple[int, ...]
    """Apart in any entry."""
    entry: int
    """Flat index of the entry where a chain is farthest away."""
    distance: float
    """How far, in standard deviations of the posterior."""


def lone_chains(values: Tensor) -> LoneChains | None:
    """Chains that are apart from the others; None if there are none, or fewer than eight chains.

    Args:
        values: Draws ``(chain, draw, *event)``.

    Example:
        >>> draws = torch.randn(256, 50, 2, generator=torch.Generator().manual_seed(0))
        >>> lone_chains(draws) is None
        True
        >>> draws[[7, 30], :, 1] += 8.0
        >>> lone_chains(draws).chains
        (7, 30)
    """
    chains, draws = values.shape[:2]
    if chains < MIN_CHAINS:
        return None
    flat = values.detach().double().reshape(chains, draws, -1)
    found = [_distances(part) for part in flat.split(_ENTRIES, 2)]
    distances = torch.cat(found, 1)
    if not bool((distances > 0).any()):
        return None
    apart = tuple(distances.amax(1).nonzero().flatten().tolist())
    entry = int(distances.amax(0).argmax())
    return LoneChains(apart, entry, float(distances.max()))


def _distances(flat: Tensor) -> Tensor:
    """In standard deviations, ``(chain, entry)``; zero where a chain is among the others."""
    medians = flat.quantile(0.5, dim=1)
    away = (medians - medians.quantile(0.5, dim=0)).abs()
    ordered = flat.flatten(0, 1).sort(0).values  # quantile refuses more than 16 million
    count = len(ordered) - 1
    spread = 0.5 * _TO_SD * (ordered[round(0.75 * count)] - ordered[round(0.25 * count)])
    noise = _FACTOR * _TO_SD * away.quantile(0.5, dim=0)
    apart = away > torch.maximum(spread, noise)
    return torch.where(apart, away / spread.clamp_min(1e-300), 0.0)
