"""Optimisers as pure functions of flat vectors, learning-rate schedules, gradient clipping.

They maximise. The whole update is a part of the traced step, and so are its slots.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = [
    "OPTIMIZERS",
    "Adagrad",
    "Adam",
    "Constant",
    "Cosine",
    "Exponential",
    "Optimizer",
    "RMSprop",
    "SGD",
    "Schedule",
    "clip",
]


def _positive(owner: object, name: str, value: float, *, zero: bool = False) -> None:
    low = value >= 0 if zero else value > 0
    if not (low and math.isfinite(value)):
        limit = ">= 0" if zero else "> 0"
        raise ValueError(
            f"{type(owner).__name__}: {name}={value!r}, but it must be a finite number {limit}."
        )


def _fraction(owner: object, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{type(owner).__name__}: {name}={value!r}, but it must lie in [0, 1).")


# ---------------------------------------------------------------- optimisers
class Optimizer(ABC):
    """One ascent step of a flat parameter vector."""

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the vectors that it carries from step to step, zero at first."""

    def scalars(self, step: int) -> tuple[float, float]:
        """Numbers that depend on the step alone (from 1): bias corrections."""
        return 1.0, 1.0

    @abstractmethod
    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        rate: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New parameters and slots; ``first`` and ``second`` are :meth:`scalars`."""


@final
@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam; with ``weight_decay`` decoupled from the gradient, AdamW.

    References:
        Kingma & Ba (2015). Adam: a method for stochastic optimization. Loshchilov & Hutter (2019).
        Decoupled weight decay regularization.

    Args:
        beta1: Memory of the gradient's mean.
        beta2: Memory of its square.
        epsilon: Added to the root of the square.
        weight_decay: Shrinkage for each step and unit of learning rate.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _fraction(self, "beta1", self.beta1)
        _fraction(self, "beta2", self.beta2)
        _positive(self, "epsilon", self.epsilon)
        _positive(self, "weight_decay", self.weight_decay, zero=True)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean", "square")

    def scalars(self, step: int) -> tuple[float, float]:
        return 1.0 / (1.0 - self.beta1**step), 1.0 / math.sqrt(1.0 - self.beta2**step)

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        rate: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean = self.beta1 * slots["mean"] + (1.0 - self.beta1) * gradient
        square = self.beta2 * slots["square"] + (1.0 - self.beta2) * gradient * gradient
        if self.weight_decay:
            params = params - rate * self.weight_decay * params
        new = params + rate * first * mean / (square.sqrt() * second + self.epsilon)
        return new, {"mean": mean, "square": square}


@final
@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient ascent with momentum.

    Args:
        momentum: Memory of the velocity.
        nesterov: Whether to look ahead.
        weight_decay: Shrinkage for each step and unit of learning rate.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _fraction(self, "momentum", self.momentum)
        _positive(self, "weight_decay", self.weight_decay, zero=True)
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov=True needs momentum > 0, such as 0.9.")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("velocity",) if self.momentum else ()

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        rate: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.weight_decay:
            gradient = gradient - self.weight_decay * params
        if not self.momentum:
            return params + rate * gradient, {}
        velocity = self.momentum * slots["velocity"] + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return params + rate * direction, {"velocity": velocity}


@final
@dataclass(frozen=True)
class RMSprop(Optimizer):
    """Steps scaled by the root of a running mean of squared gradients.

    References:
        Tieleman & Hinton (2012). Lecture 6.5: RMSprop.

    Args:
        decay: Memory of the square.
        epsilon: Added to its root.
    """

    decay: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _fraction(self, "decay", self.decay)
        _positive(self, "epsilon", self.epsilon)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("square",)

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        rate: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        square = self.decay * slots["square"] + (1.0 - self.decay) * gradient * gradient
        return params + rate * gradient / (square.sqrt() + self.epsilon), {"square": square}


@final
@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Steps scaled by the root of the sum of squared gradients.

    References:
        Duchi, Hazan & Singer (2011). Adaptive subgradient methods for online learning and
        stochastic optimization.

    Args:
        epsilon: Added to the root.
    """

    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _positive(self, "epsilon", self.epsilon)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        rate: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = slots["sum"] + gradient * gradient
        return params + rate * gradient / (total.sqrt() + self.epsilon), {"sum": total}


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Adam(),
    "adamw": Adam(weight_decay=0.01),
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "rmsprop": RMSprop(),
    "adagrad": Adagrad(),
}
"""By name, with the usual settings."""


def clip(gradient: Tensor, norm: Tensor, max_norm: float | None) -> Tensor:
    """The gradient, shortened to ``max_norm`` where it is longer."""
    if max_norm is None:
        return gradient
    return gradient * (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)


# ---------------------------------------------------------------- schedules
class Schedule(ABC):
    """The learning rate of each step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step, which averaged iterates like best."""

    rate: float

    def __post_init__(self) -> None:
        _positive(self, "rate", self.rate)

    def __call__(self, step: int) -> float:
        return self.rate


@final
@dataclass(frozen=True)
class Exponential(Schedule):
    """From ``rate`` down by a factor ``decay`` after ``num_steps`` steps, and so on."""

    rate: float
    decay: float = 0.1
    num_steps: int = 1000

    def __post_init__(self) -> None:
        _positive(self, "rate", self.rate)
        _positive(self, "decay", self.decay)
        _positive(self, "num_steps", self.num_steps)

    def __call__(self, step: int) -> float:
        return float(self.rate * self.decay ** (step / self.num_steps))


@final
@dataclass(frozen=True)
class Cosine(Schedule):
    """Up to ``rate`` in ``num_warmup`` steps, then along a half cosine to ``final``.

    References:
        Loshchilov & Hutter (2017). SGDR: stochastic gradient descent with warm restarts.
    """

    rate: float
    num_steps: int
    num_warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "rate", self.rate)
        _positive(self, "final", self.final, zero=True)
        if not 0 <= self.num_warmup < self.num_steps:
            raise ValueError(
                f"Cosine: num_warmup={self.num_warmup} and num_steps={self.num_steps}, but "
                "0 <= num_warmup < num_steps is needed."
            )

    def __call__(self, step: int) -> float:
        if step < self.num_warmup:
            return self.rate * step / self.num_warmup
        done = min(1.0, (step - self.num_warmup) / (self.num_steps - self.num_warmup))
        return self.final + 0.5 * (self.rate - self.final) * (1.0 + math.cos(math.pi * done))
