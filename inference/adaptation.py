r"""Warm-up: a step size by dual averaging, a diagonal mass matrix from draws and gradients.

All chains feed one adaptation. The variance of coordinate ``i`` is estimated as

.. math:: \sqrt{\mathrm{Var}(q_i) / \mathrm{Var}(\partial_i \ell)}

which is exact for a normal posterior after few draws, and minimises the Fisher divergence between
the posterior and a normal one with that variance.

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

__all__ = ["Adaptation", "Moments", "StepSize", "first_step_size", "start_adaptation"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_GAMMA, _T0 = 0.05, 10.0
_EARLY, _FINAL = 0.3, 0.85  # shares of the warm-up: short windows until, step size alone from
_SHORT, _LONG = 10, 60  # draws of a chain in a window
_FLOOR, _CEILING = 1e-20, 1e20


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


class Moments(NamedTuple):
    """Running mean and sum of squares of positions and gradients, ``(2, D)``."""

    number: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Moments:
        """No draws yet; ``like`` is ``(D,)``."""
        zero = torch.zeros((2, *like.shape), dtype=like.dtype, device=like.device)
        return cls(0, zero, zero)

    def add(self, pairs: Tensor) -> Moments:
        """With ``pairs (m, 2, D)`` of position and gradient, merged by Chan's formula."""
        new = pairs.shape[0]
        if new == 0:
            return self
        number = self.number + new
        mean = pairs.mean(0)
        gap = mean - self.mean
        squares = self.squares + (pairs - mean).square().sum(0)
        return Moments(
            number,
            self.mean + gap * (new / number),
            squares + gap.square() * (self.number * new / number),
        )

    def variance(self) -> Tensor:
        """The variance of each coordinate that draws and gradients agree on best."""
        positions, gradients = self.squares.clamp(_FLOOR, _CEILING)
        return (positions / gradients).sqrt().clamp(_FLOOR, _CEILING)


class Adaptation(NamedTuple):
    """Everything that warm-up learns."""

    tick: int
    step_size: StepSize
    inverse_mass: Tensor
    window: Moments
    next_window: Moments
    since: int
    """Ticks since the windows last moved on."""

    def update(
        self, pairs: Tensor, acceptance: float, *, target: float, num_warmup: int
    ) -> Adaptation:
        """After one trajectory of each chain, on average.

        Args:
            pairs: Positions and gradients ``(m, 2, D)`` of the trajectories that ended.
            acceptance: Their mean acceptance rate.
            target: The acceptance rate wanted.
            num_warmup: Ticks of the whole warm-up.
        """
        tick = self.tick + 1
        step_size = self.step_size.update(acceptance, target)
        if tick >= _FINAL * num_warmup:
            if self.tick < _FINAL * num_warmup:
                # A plain mean of what follows: restarting dual averaging would swing anew.
                step_size = step_size._replace(averaged=1, log_average=step_size.log_step)
            return self._replace(tick=tick, step_size=step_size)
        finite = pairs[pairs.isfinite().flatten(1).all(1)]
        window, following = self.window.add(finite), self.next_window.add(finite)
        since = self.since + 1
        early = tick < _EARLY * num_warmup
        if since >= (_SHORT if early else _LONG):
            window, following, since = following, Moments.empty(self.inverse_mass), 0
        mass = window.variance() if window.number >= 10 else self.inverse_mass
        return Adaptation(tick, step_size, mass, window, following, since)

    def current(self, num_warmup: int) -> float:
        """The step size to use now: the last one in warm-up, the averaged one after it."""
        done = self.tick >= num_warmup and self.step_size.number > 0
        return math.exp(self.step_size.log_average if done else self.step_size.log_step)


def start_adaptation(position: Tensor, gradient: Tensor, step_size: float) -> Adaptation:
    """Before the first trajectory: the variance from the size of the gradients alone."""
    mass = first_inverse_mass(gradient)
    window = Moments.empty(position[0])
    return Adaptation(0, StepSize.at(step_size), mass, window, window, 0)


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
