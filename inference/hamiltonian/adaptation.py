r"""Warm-up: a step size by dual averaging, a mass matrix from draws and gradients.

All chains feed one adaptation. The variance of coordinate ``i`` is estimated as

.. math:: \sqrt{\mathrm{Var}(q_i) / \mathrm{Var}(\partial_i \ell)}

which is exact for a normal posterior after few draws, and minimises the Fisher divergence between
the posterior and a normal one with that variance. Where the rescaled posterior is still long in
some directions, these are taken in too: the mass matrix is then diagonal plus low rank.

References:
    Hoffman, Gelman (2014). The no-U-turn sampler, section 3.2.
    Seyboldt, Carlson, Carpenter (2026). Preconditioning Hamiltonian Monte Carlo by minimizing
    Fisher divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Adaptation", "StepSize", "first_step_size", "long_directions", "start_adaptation"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_GAMMA, _T0 = 0.05, 10.0
_EARLY, _FINAL = 0.3, 0.85  # shares of the warm-up: short windows until, step size alone from
_DIAGONAL = 0.15  # share of the warm-up before long directions are looked for
_SHORT, _LONG = 10, 60  # draws of a chain in a window
_FLOOR, _CEILING = 1e-20, 1e20
_NUMBERS_HELD = 2**22
_CUTOFF = 2.0  # eigenvalues between 1/2 and 2 are left to the diagonal
_RIDGE = 1e-5
_MAX_RANK = 64


class StepSize(NamedTuple):
    """State of dual averaging."""

    log_step: float
    log_average: float
    error: float
    number: int
    centre: float
    averaged: int = 0
    """Steps in the average."""

    @classmethod
    def at(cls, step_size: float) -> StepSize:
        """Start at a step size."""
        return cls(math.log(step_size), 0.0, 0.0, 0, math.log(2.0 * step_size))

    def update(self, acceptance: float, target: float) -> StepSize:
        """After trajectories of a mean acceptance rate."""
        number = self.number + 1
        weight = 1.0 / (number + _T0)
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_step = self.centre - math.sqrt(number) / _GAMMA * error
        averaged = self.averaged + 1
        average = self.log_average + (log_step - self.log_average) / averaged
        return StepSize(log_step, average, error, number, self.centre, averaged)


class Adaptation(NamedTuple):
    """Everything that warm-up learns."""

    tick: int
    """Trajectories of a chain, on average."""
    step_size: StepSize
    inverse_mass: Tensor
    basis: Tensor
    """``(D, r)``, long and short directions after rescaling."""
    stretch: Tensor
    """``(2, r)``, see :class:`bayesgen.inference.hamiltonian.trajectory.Metric`."""
    rows: Tensor
    """``(m, 2, D)``, positions and gradients of the window."""
    mark: int
    """Rows that leave with the next window."""
    since: int
    """Ticks since the window last moved on."""

    def accepted(self, acceptance: float, *, target: float, num_warmup: int) -> Adaptation:
        """After one trajectory of each chain, on average, with a mean acceptance rate."""
        tick = self.tick + 1
        step_size = self.step_size.update(acceptance, target)
        if self.tick < _FINAL * num_warmup <= tick:
            # A plain mean of what follows: restarting dual averaging would swing anew.
            step_size = step_size._replace(averaged=1, log_average=step_size.log_step)
        return self._replace(tick=tick, step_size=step_size)

    def learned(self, pairs: Tensor, ticks: int, *, num_warmup: int, low_rank: bool) -> Adaptation:
        """A new mass matrix after ``ticks``, until the last part of the warm-up.

        Args:
            pairs: Positions and gradients ``(m, 2, D)`` of the trajectories that ended.
            ticks: Trajectories of a chain in them, on average.
            num_warmup: Ticks of the whole warm-up.
            low_rank: Whether to look for long directions.
        """
        if self.tick >= _FINAL * num_warmup:
            return self._replace(rows=self.rows[:0], mark=0)
        finite = pairs[pairs.isfinite().flatten(1).all(1)]
        rows, mark, since = torch.cat((self.rows, finite)), self.mark, self.since + ticks
        if since >= (_SHORT if self.tick < _EARLY * num_warmup else _LONG):
            rows, since = rows[mark:], 0
            mark = len(rows)
        held = max(64, min(max(1024, 16 * ticks), _NUMBERS_HELD // rows.shape[-1]))
        dropped = max(0, len(rows) - held)
        rows, mark = rows[dropped:], max(0, mark - dropped)
        new = self._replace(rows=rows, mark=mark, since=since)
        if len(rows) < 10:
            return new
        mass = variance(rows)
        basis, stretch = self.basis[:, :0], self.stretch[:, :0]
        if low_rank and self.tick >= _DIAGONAL * num_warmup and len(rows) >= 20:
            basis, stretch = long_directions(rows, mass)
        return new._replace(inverse_mass=mass, basis=basis, stretch=stretch)

    def current(self, num_warmup: int) -> float:
        """The step size to use now: the last one in warm-up, the averaged one after it."""
        done = self.tick >= num_warmup and self.step_size.number > 0
        return math.exp(self.step_size.log_average if done else self.step_size.log_step)


def variance(rows: Tensor) -> Tensor:
    """The variance of each coordinate that positions and gradients ``(m, 2, D)`` agree on best."""
    positions, gradients = rows.var(0, correction=0).clamp(_FLOOR, _CEILING)
    return (positions / gradients).sqrt().clamp(_FLOOR, _CEILING)


def long_directions(rows: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    r"""Directions that a diagonal leaves long or short: basis ``(D, r)``, stretch ``(2, r)``.

    In rescaled coordinates, with covariances :math:`C_q, C_g` of positions and gradients, the
    inverse mass of least Fisher divergence is the geometric mean :math:`\Sigma` that solves
    :math:`\Sigma C_g \Sigma = C_q`; it is found in the span of the rows, and its eigenvalues
    outside (1/2, 2) are kept.
    """
    scale = mass.sqrt()
    centred = rows - rows.mean(0)
    positions, gradients = centred[:, 0] / scale, centred[:, 1] * scale
    d, m = positions.shape[1], positions.shape[0]
    if 2 * m < d:
        span, _ = torch.linalg.qr(torch.cat((positions, gradients)).mT)
        positions, gradients = positions @ span, gradients @ span
    else:
        span = torch.eye(d, dtype=rows.dtype, device=rows.device)
    ridge = _RIDGE * torch.eye(positions.shape[1], dtype=rows.dtype, device=rows.device)
    cov_q = positions.mT @ positions / m + ridge
    cov_g = gradients.mT @ gradients / m + ridge
    values, vectors = torch.linalg.eigh(cov_g)
    values = values.clamp_min(_FLOOR)
    root = vectors * values.sqrt() @ vectors.mT
    inverse_root = vectors * values.rsqrt() @ vectors.mT
    middle, turned = torch.linalg.eigh(root @ cov_q @ root)
    sigma = inverse_root @ (turned * middle.clamp_min(0.0).sqrt() @ turned.mT) @ inverse_root
    values, vectors = torch.linalg.eigh(0.5 * (sigma + sigma.mT))
    values = values.clamp(_RIDGE, 1 / _RIDGE)
    distance = values.log().abs()
    kept = distance.topk(min(_MAX_RANK, len(values))).indices
    kept = kept[distance[kept] > math.log(_CUTOFF)]
    values = values[kept]
    stretch = torch.stack((values - 1.0, values.rsqrt() - 1.0))
    return (span @ vectors[:, kept]).contiguous(), stretch.contiguous()


def start_adaptation(position: Tensor, gradient: Tensor, step_size: float) -> Adaptation:
    """Before the first trajectory: the variance from the size of the gradients alone."""
    mass = first_inverse_mass(gradient)
    d = position.shape[-1]
    return Adaptation(
        0,
        StepSize.at(step_size),
        mass,
        position.new_zeros(d, 0),
        position.new_zeros(2, 0),
        position.new_zeros(0, 2, d),
        0,
        0,
    )


def first_inverse_mass(gradient: Tensor) -> Tensor:
    """``1 / |gradient|`` over chains ``(c, D)``: between knowing nothing and a normal."""
    size = gradient.square().mean(0).sqrt()
    return torch.where(size > 0, 1.0 / size, 1.0).clamp(1e-10, 1e10)


def first_step_size(
    gradient_of: Gradient,
    position: Tensor,
    lp: Tensor,
    gradient: Tensor,
    inverse_mass: Tensor,
    normal: Tensor,
) -> float:
    """Double or halve until one leapfrog step is accepted with a mean probability of 0.8."""
    momentum = normal * inverse_mass.rsqrt()
    energy = 0.5 * normal.square().sum(-1) - lp
    step, direction = 0.1, 0
    for _ in range(60):
        half = momentum + 0.5 * step * gradient
        new_lp, new_gradient = gradient_of(position + step * inverse_mass * half)
        final = half + 0.5 * step * new_gradient
        delta = energy - (0.5 * (inverse_mass * final * final).sum(-1) - new_lp)
        rate = float(torch.nan_to_num(delta, nan=-torch.inf).clamp(max=0).exp().mean())
        turn = 1 if rate > 0.8 else -1
        if direction == -turn:
            break
        direction = turn
        step *= 2.0**direction
    return step
