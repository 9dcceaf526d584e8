r"""What hundreds of chains learn from each other in warm-up: metric, step size, path length.

**Metric.** Between two moments every chain has moved by :math:`\Delta q` and its gradient by
:math:`\Delta g`. For a normal posterior :math:`\Delta g = -\Sigma^{-1}\Delta q` exactly, wherever
the chains are, so that the Fisher divergence is least for
:math:`s_i^4 = E \Delta q_i^2 / E \Delta g_i^2`, and with correlations for the geometric mean of
:math:`E\Delta q\Delta q^\top` and the inverse of :math:`E\Delta g\Delta g^\top`. Differences
within chains see the width of a mode, not the distance between modes, and a stuck chain (no
difference) leaves the ratio alone.

**Step size.** Stochastic approximation of the acceptance rate, a mean over groups of chains that
are near the median: stuck chains do not set the pace.

**Path length.** Some trajectories are scanned: after each leapfrog the correlation of
:math:`f(q_0)` and :math:`f(q_t)` is averaged over chains, for every coordinate and its square,
acceptance included. The length is the one of

.. math:: \max_T \min_f \frac{1 - \bar\rho_f(T)}{1 + \bar\rho_f(T)} \Big/ (\bar L(T) + \kappa),

effective draws for a gradient of the slowest function, :math:`\bar\rho` an average over the jitter
and :math:`\kappa` the cost of a transition besides its leapfrogs.

References:
    Hoffman, Radul, Sountsov (2021). An adaptive-MCMC scheme for setting trajectory lengths in
    Hamiltonian Monte Carlo.
    Sountsov, Hoffman (2021). Focusing on difficult directions for learning HMC trajectory
    lengths.
    Seyboldt, Carlson, Carpenter (2026). Preconditioning Hamiltonian Monte Carlo by minimizing
    Fisher divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "JITTER",
    "Differences",
    "Pace",
    "Schedule",
    "best_length",
    "correlations",
    "factor_of",
    "group_acceptance",
    "jitter",
    "typical",
]

JITTER = 0.5
"""Paths are this share longer and shorter than the mean length."""

_DENSE = 300  # coordinates up to which correlations are learned
_WORTH = 2.0  # ratio of extreme eigenvalues above which they are used
_ENOUGH = 3  # moves a coordinate before correlations are believed
_FLOOR, _CEILING = 1e-20, 1e20
_FAR = 0.2  # of an acceptance rate from the median's


class Schedule(NamedTuple):
    """Which iteration of warm-up does what.

    Windows grow; each ends with scans of the path length and then takes up a new metric. The last
    window has no new metric at its end: the step size settles.
    """

    ends: tuple[int, ...]
    """First iteration after each window."""
    scans: tuple[int, ...]
    """Scanned iterations at the end of each window, or in the last one after its first half."""

    @classmethod
    def of(cls, num_warmup: int) -> Schedule:
        """For ``num_warmup`` iterations."""
        ends, scans, done = list[int](), list[int](), 0.0
        for share, number in zip(_SHARES, _SCANS, strict=True):
            done += share
            end = min(num_warmup, round(done * num_warmup))
            start = ends[-1] if ends else 0
            ends.append(end)
            scans.append(min(number, (end - start) // 3))
        ends[-1] = num_warmup
        return cls(tuple(ends), tuple(scans))

    def window(self, tick: int) -> int:
        """The window that an iteration belongs to."""
        return sum(end <= tick for end in self.ends[:-1])

    def start(self, window: int) -> int:
        """Its first iteration."""
        return self.ends[window - 1] if window else 0

    def is_scan(self, tick: int) -> bool:
        """Whether the path of an iteration is scanned."""
        window = self.window(tick)
        last = self.scan_end(window)
        return last - self.scans[window] <= tick < last

    def scan_end(self, window: int) -> int:
        """The iteration before which the scans of a window are over."""
        if window < len(self.ends) - 1:
            return self.ends[window]
        return (self.start(window) + self.ends[window] + 1) // 2

    def is_middle(self, tick: int) -> bool:
        """Whether differences are taken amid a window too, before this iteration."""
        window = self.window(tick)
        return tick == (self.start(window) + self.ends[window]) // 2


_SHARES = (0.06, 0.06, 0.08, 0.12, 0.16, 0.24, 0.28)
_SCANS = (0, 0, 2, 3, 4, 4, 8)


class Pace(NamedTuple):
    """The step size, and what moves it."""

    log_step: float
    log_sum: float = 0.0
    """Sum of the logarithms since the average was begun."""
    averaged: int = 0
    number: int = 0
    """Updates since the last change of the metric."""

    def update(self, acceptance: float, target: float) -> Pace:
        """After one trajectory of every chain."""
        gain = 2.0 / (self.number + 2.0) ** 0.75
        log_step = self.log_step + gain * max(-0.5, min(0.5, 2.0 * (acceptance - target)))
        return Pace(log_step, self.log_sum + log_step, self.averaged + 1, self.number + 1)

    def restart(self) -> Pace:
        """After a change of the metric: move fast again, and forget the average."""
        return Pace(self.log_step)

    def forget(self) -> Pace:
        """Begin the average anew."""
        return self._replace(log_sum=0.0, averaged=0)

    @property
    def settled(self) -> Pace:
        """At the average."""
        return Pace(self.log_sum / self.averaged) if self.averaged else self

    @property
    def step_size(self) -> float:
        """Of the next trajectory."""
        return math.exp(self.log_step)


def group_acceptance(rates: Tensor, own: Tensor, num_groups: int) -> tuple[float, Tensor]:
    """The mean acceptance rate of groups that set the pace, and shares for the others.

    Stuck chains share a start, and so a group. One that is far below the median stands where the
    density is narrower than elsewhere (a funnel): it goes on with a smaller share of the common
    step size until it is out, and does not slow down the others.

    Args:
        rates: Of every chain, ``(c,)``.
        own: Logarithms of the chains' shares, ``(c,)``, none above zero.
        num_groups: Of consecutive chains.

    Returns:
        The rate, and new shares.
    """
    means = rates.reshape(num_groups, -1).mean(1)
    shares = own.reshape(num_groups, -1)
    ahead = means - means.quantile(0.5)
    near = (ahead.abs() <= _FAR) & (shares.amin(1) == 0)
    if not bool(near.any()):
        near = ahead.abs() <= _FAR
    new = (shares + (ahead + _FAR)[:, None]).clamp(max=0.0)
    return float(means[near].mean()), new.reshape(-1)


def typical(lp: Tensor) -> Tensor:
    """Chains ``(c,)`` whose log density is not far below what the better half has."""
    middle, high = lp.quantile(0.5), lp.quantile(0.9)
    return lp >= middle - 8.0 * (high - middle) - 5.0


class Differences(NamedTuple):
    """Weighted second moments of the moves of positions and gradients."""

    weight: float
    squares: Tensor
    """``(2, D)``."""
    products: Tensor
    """``(2, D, D)``, or ``(2, 0, 0)`` where correlations are not learned."""

    @classmethod
    def empty(cls, like: Tensor) -> Differences:
        """No moves yet; ``like`` is ``(D,)``."""
        d = like.shape[0]
        k = d if d <= _DENSE else 0
        return cls(0.0, like.new_zeros(2, d), like.new_zeros(2, k, k))

    def add(self, moves: Tensor, gradients: Tensor) -> Differences:
        """With the moves ``(m, D)`` of chains, and of their gradients."""
        both = torch.stack((moves, gradients))
        finite = both.isfinite().all(-1).all(0) & (moves != 0).any(-1)
        both = both[:, finite]
        if both.shape[1] == 0:
            return self
        # A chain in transit moves further than all others together: no chain counts for more than
        # 9 times the median.
        size = (
            both.square() / both.square().median(1, keepdim=True).values.clamp(min=_FLOOR)
        ).mean(-1)
        limit = 9.0 * size.median(1, keepdim=True).values
        share = (limit / size).clamp(max=1.0).amin(0).sqrt()
        both = both * share[:, None]
        products = self.products
        if products.shape[1]:
            products = products + both.mT @ both
        return Differences(
            self.weight + both.shape[1], self.squares + both.square().sum(1), products
        )

    def faded(self, share: float) -> Differences:
        """Counting for less."""
        return Differences(self.weight * share, self.squares * share, self.products * share)


def factor_of(moves: Differences, *, dense: bool = True) -> Tensor:
    """The metric's factor: ``(D,)`` scales, or ``(D, D)`` where correlations are worth it.

    Args:
        moves: What chains and their gradients have moved by.
        dense: Whether correlations may be used.
    """
    positions, gradients = moves.squares.clamp(_FLOOR, _CEILING)
    scale = (positions / gradients).clamp(_FLOOR, _CEILING).sqrt().sqrt()
    if not dense or not moves.products.shape[1] or moves.weight < _ENOUGH * len(scale):
        return scale
    unit = torch.stack((1.0 / scale, scale))
    scaled = moves.products * unit[:, :, None] * unit[:, None, :] / moves.weight
    scaled = scaled / scaled.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(_geometric_mean(*scaled))
    values = values.clamp(min=_FLOOR)
    if float(values[-1] / values[0]) < _WORTH**2:
        return scale
    root = (vectors * values.sqrt()) @ vectors.mT
    return scale[:, None] * root


def _geometric_mean(positions: Tensor, gradients: Tensor) -> Tensor:
    """The matrix between ``positions`` and the inverse of ``gradients``."""
    root, inverse_root = _roots(gradients)
    inner, _ = _roots(root @ positions @ root)
    return inverse_root @ inner @ inverse_root


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-12 * float(values[-1])).sqrt()
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


# ---------------------------------------------------------------- path length
def jitter(index: int) -> float:
    """Length of a path over the mean length: van der Corput's sequence, spread evenly."""
    value, base = 0.0, 0.5
    index += 1
    while index:
        value += base * (index & 1)
        index >>= 1
        base /= 2
    return 1.0 - JITTER + 2.0 * JITTER * value


def correlations(start: Tensor, now: Tensor, acceptance: Tensor) -> Tensor:
    """Sums over chains of ``a (f(q_0) - f(q_t))**2 / 2``, ``f`` the coordinates and squares.

    Args:
        start: Standardised positions ``(c, D)`` at the start.
        now: After some leapfrogs.
        acceptance: Probability ``(c,)`` of taking what is there now.

    Returns:
        ``(2 D,)``; divided by the sums of squares of ``f`` about its mean it is one minus the
        correlation, and never negative.
    """
    a = 0.5 * acceptance.unsqueeze(0)
    moved, other = (start - now).square(), (start.square() - now.square()).square()
    return torch.cat((a @ moved, a @ other), -1)[0]


def best_length(curves: Sequence[Tensor] | Tensor, overhead: float) -> float:
    """The mean number of leapfrogs that gives most effective draws a gradient.

    Args:
        curves: ``(K, F)``, one minus the correlation after 1 ... K leapfrogs, for each function.
        overhead: Cost of a transition beside its leapfrogs, in leapfrogs.
    """
    moved = torch.as_tensor(curves)
    longest = len(moved)
    weights = torch.tensor(
        [1.0 - JITTER + 2.0 * JITTER * (k + 0.5) / 16 for k in range(16)],
        dtype=moved.dtype,
        device=moved.device,
    )
    lengths = torch.arange(
        1.0, max(1.0, longest / (1 + JITTER)) + 1e-9, 0.25, dtype=moved.dtype, device=moved.device
    )
    steps = (lengths[:, None] * weights).round().clamp(1, longest).long()
    mean = moved[steps - 1].mean(1).clamp(1e-6, 2.0 - 1e-6)
    rate = (mean / (2.0 - mean)).amin(1) / (steps.to(moved.dtype).mean(1) + overhead)
    return float(lengths[int(rate.argmax())])
