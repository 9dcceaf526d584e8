"""The distributions under test, by name, for the contract tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from bayesgen.distributions import (
    InverseWishart,
    InverseWishartCholesky,
    NormalInverseGamma,
    NormalInverseWishart,
)

__all__ = ["CASES", "Make", "OTHERS", "factor", "flat", "flat_log_prob", "spread", "z_score"]

Make = Callable[[torch.dtype, torch.device], TorchDistribution]


def factor(dim: int, seed: int, *batch: int) -> Tensor:
    """A well-conditioned Cholesky factor, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*batch, dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.cholesky(noise @ noise.mT + torch.eye(dim, dtype=torch.float64))


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CASES: dict[str, Make] = {
    "factor-1": lambda t, d: InverseWishartCholesky(3.5, factor(1, 0).to(d, t)),
    "factor-2": lambda t, d: InverseWishartCholesky(4.5, factor(2, 0).to(d, t)),
    "factor-3-weak": lambda t, d: InverseWishartCholesky(2.7, factor(3, 0).to(d, t)),
    "factor-batch": lambda t, d: InverseWishartCholesky(
        _vector(5.0, 9.0).to(d, t), factor(2, 0).to(d, t)
    ),
    "matrix-2": lambda t, d: InverseWishart(6.5, factor(2, 0).to(d, t)),
    "matrix-batch": lambda t, d: InverseWishart(16.0, factor(3, 0, 2).to(d, t)),
    "niw-1": lambda t, d: NormalInverseWishart(0.5, 2.0, 4.0, factor(1, 0).to(d, t)),
    "niw-2": lambda t, d: NormalInverseWishart(
        _vector(0.5, -1.0), 0.7, 5.5, factor(2, 0).to(d, t)
    ),
    "niw-batch": lambda t, d: NormalInverseWishart(
        _vector(0.5, -1.0), _vector(0.5, 1.0, 2.0).unsqueeze(-1), 7.0, factor(2, 0, 2).to(d, t)
    ),
    "nig": lambda t, d: NormalInverseGamma(torch.tensor(0.3, dtype=t, device=d), 0.7, 2.5, 1.7),
    "nig-batch": lambda t, d: NormalInverseGamma(
        _vector(0.0, 3.0).to(d, t), 2.0, 3.0, _vector(1.0, 5.0).to(d, t)
    ),
}
"""What is tested, at its own parameters."""

OTHERS: dict[str, Make] = {
    "factor-1": lambda t, d: InverseWishartCholesky(2.5, factor(1, 1).to(d, t)),
    "factor-2": lambda t, d: InverseWishartCholesky(3.0, factor(2, 1).to(d, t)),
    "factor-3-weak": lambda t, d: InverseWishartCholesky(4.0, factor(3, 1).to(d, t)),
    "factor-batch": lambda t, d: InverseWishartCholesky(4.0, factor(2, 1).to(d, t)).expand([2]),
    "matrix-2": lambda t, d: InverseWishart(4.0, factor(2, 1).to(d, t)),
    "matrix-batch": lambda t, d: InverseWishart(5.0, factor(3, 1, 2).to(d, t)),
    "niw-1": lambda t, d: NormalInverseWishart(0.0, 1.0, 3.0, factor(1, 1).to(d, t)),
    "niw-2": lambda t, d: NormalInverseWishart(_vector(0.0, 0.3), 1.5, 3.5, factor(2, 1).to(d, t)),
    "niw-batch": lambda t, d: NormalInverseWishart(0.0, 1.0, 5.0, factor(2, 1).to(d, t)).expand(
        [3, 2]
    ),
    "nig": lambda t, d: NormalInverseGamma(torch.tensor(0.0, dtype=t, device=d), 1.2, 2.0, 2.0),
    "nig-batch": lambda t, d: NormalInverseGamma(
        _vector(0.5, 2.0).to(d, t), 1.0, 2.0, _vector(2.0, 3.0).to(d, t)
    ),
}
"""The same class at other parameters, for divergences."""


def flat(dist: TorchDistribution, value: Tensor) -> Tensor:
    """The value as an unconstrained vector."""
    return torch.distributions.biject_to(dist.support).inv(value)


def flat_log_prob(dist: TorchDistribution, vector: Tensor) -> Tensor:
    """Log density of the unconstrained vector."""
    transform = torch.distributions.biject_to(dist.support)
    value = transform(vector)
    return dist.log_prob(value) + transform.log_abs_det_jacobian(vector, value)


def spread(dist: TorchDistribution, num_samples: int, seed: int = 0) -> Tensor:
    """Draws from a generator of their own."""
    generator = torch.Generator(device=dist.mean.device).manual_seed(seed)
    return dist.sample((num_samples,), generator=generator)


def z_score(draws: Tensor, expected: Tensor) -> float:
    """The largest distance of the mean of independent draws from what is expected, in errors."""
    error = draws.std(0) / len(draws) ** 0.5
    return float(((draws.mean(0) - expected).abs() / error.clamp(min=1e-12)).max())
