"""When a noisy bound has stopped rising."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plateau", "plateau"]

_MIN_BLOCKS = 30
_R_HAT = 1.1


class Plateau(NamedTuple):
    """The last third of a run against the third before it."""

    rise: float
    """Nats by which the mean of the bound rose."""
    error: float
    """Standard error of the rise, from the spread of block means."""
    r_hat: float
    """R-hat of the iterates between the two thirds, exceeded by one parameter in twenty."""
    reached: bool


def plateau(blocks: Sequence[float], threshold: float, iterates: Tensor | None = None) -> Plateau:
    r"""Compare the last two thirds of a series of block means, and of iterates.

    The plateau is reached when the rise of the bound is not significant (below two standard
    errors), the comparison is sharp enough to have seen a rise of ``threshold`` (two standard
    errors are below it), and the iterates of the two thirds mix (R-hat below 1.1): a bound is
    flat around its maximum long before the parameters have arrived. Windows grow with the run, so
    that noise only delays the verdict.

    References:
        Dhaka, Catalina, Andersen, Magnusson, Huggins & Vehtari (2020). Robust, accurate stochastic
        optimization for variational inference.

    Args:
        blocks: Means of the bound over successive blocks of steps, in nats.
        threshold: Rise that matters, in nats.
        iterates: Parameters after each block, ``(blocks, P)``; None where they are too many.

    Example:
        >>> plateau([-100.0 + k for k in range(30)], 1.0).reached
        False
        >>> plateau([-1.0, -1.1] * 15, 1.0).reached
        True
    """
    size = len(blocks) // 3
    if len(blocks) < _MIN_BLOCKS:
        return Plateau(math.nan, math.nan, math.nan, False)
    before, after = blocks[-2 * size : -size], blocks[-size:]
    rise = statistics.fmean(after) - statistics.fmean(before)
    spread = statistics.variance(before) + statistics.variance(after)
    error = math.sqrt(spread / size)
    r_hat = _r_hat(iterates, size) if iterates is not None else 1.0
    reached = rise <= 2 * error <= threshold and r_hat < _R_HAT
    return Plateau(rise, error, r_hat, reached)


def _r_hat(iterates: Tensor, size: int) -> float:
    windows = iterates[-2 * size :].double().unflatten(0, (2, size))
    within = windows.var(1).mean(0)
    between = windows.mean(1).var(0)
    ratio = (1.0 - 1.0 / size + between / within).sqrt()
    # A parameter that never moves, such as one that the bound does not depend on, is settled.
    ratio = torch.where(between == 0, 1.0, ratio)
    return float(ratio.quantile(0.95))
