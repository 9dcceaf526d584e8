"""Small batched pieces shared by the distributions of this package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "as_parameter",
    "check_cholesky",
    "log_diagonal",
    "multivariate_lgamma",
    "sample_gamma",
    "solve_lower",
    "square_norm",
]


def as_parameter(value: Tensor | float, like: Tensor) -> Tensor:
    """Return ``value`` as a tensor with the dtype and device of ``like``."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def log_diagonal(matrix: Tensor) -> Tensor:
    """Logarithm of the diagonal of ``(..., d, d)``, as ``(..., d)``."""
    return matrix.diagonal(dim1=-2, dim2=-1).log()


def solve_lower(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``factor @ z = right`` for a lower triangular ``factor``; the batches broadcast."""
    return torch.linalg.solve_triangular(factor, right, upper=False)


def square_norm(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm of ``(..., r, c)``."""
    return matrix.square().sum((-2, -1))


def multivariate_lgamma(a: Tensor, dim: int) -> Tensor:
    """Log of the multivariate gamma function, with a NaN (not an exception) outside its domain."""
    offsets = 0.5 * torch.arange(dim, dtype=a.dtype, device=a.device)
    terms = torch.lgamma(a.unsqueeze(-1) - offsets).sum(-1)
    return terms + 0.25 * dim * (dim - 1) * math.log(math.pi)


def sample_gamma(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard gamma draws, differentiable in ``shape``; never exactly zero."""
    draws: Tensor = torch._standard_gamma(shape, generator=generator)
    return draws.clamp(min=torch.finfo(draws.dtype).tiny)


def check_cholesky(owner: str, name: str, factor: Tensor) -> None:
    """Raise ``ValueError`` unless ``factor`` is a Cholesky factor, saying what is wrong."""
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"{owner}: {name} holds NaN or infinite entries; it must be finite.")
    if bool((factor.triu(1) != 0).any()):
        raise ValueError(
            f"{owner}: {name} has entries above its diagonal, but it must be lower triangular. "
            f"Pass torch.linalg.cholesky(matrix) rather than the matrix itself."
        )
    if not bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all()):
        raise ValueError(
            f"{owner}: {name} has a diagonal entry that is not positive. "
            f"Pass torch.linalg.cholesky(matrix) of a positive definite matrix."
        )
