r"""Constraints of the events in this package, and their bijections from flat real vectors.

Importing this module registers ``biject_to`` and ``transform_to`` for them, and ``biject_to`` for
PyTorch's own ``constraints.lower_cholesky`` and ``constraints.positive_definite``, for which
neither PyTorch nor Pyro registers one. PyTorch's ``LowerCholeskyTransform`` starts from a matrix:
the entries above the diagonal are free, have no density, and wander off under NUTS. Ours maps from
exactly the :math:`d(d+1)/2` free numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

__all__ = [
    "CholeskyFactorTransform",
    "LocCholeskyTransform",
    "LocVarianceTransform",
    "PositiveDefiniteTransform",
    "cholesky_factor",
    "loc_cholesky",
    "loc_variance",
]


class _CholeskyFactor(constraints.Constraint):
    """Lower triangular ``(..., d, d)`` with a positive diagonal."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        lower = (value.tril() == value).flatten(-2).all(-1)
        return lower & (value.diagonal(dim1=-2, dim2=-1) > 0).all(-1)


class _LocCholesky(constraints.Constraint):
    """``[loc | scale_tril]``, ``(..., d, d + 1)``: a real vector beside a Cholesky factor."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        finite = torch.isfinite(value[..., 0]).all(-1)
        return finite & cholesky_factor.check(value[..., 1:])


class _LocVariance(constraints.Constraint):
    """``(loc, variance)``, ``(..., 2)``: a real number and a positive one."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(value[..., 0]) & (value[..., 1] > 0)


cholesky_factor = _CholeskyFactor()
loc_cholesky = _LocCholesky()
loc_variance = _LocVariance()


# The indices are built anew at each call: if kept, they could be the fake tensors of a tracer.
def _gather_index(dim: int, device: torch.device) -> Tensor:
    """For each entry of a matrix, where the flat lower triangle holds it; 0 above the diagonal."""
    order = torch.arange(dim, device=device)
    rows = order * (order + 1) // 2
    return (rows.unsqueeze(-1) + order).tril().flatten()


def _lower_index(dim: int, device: torch.device) -> Tensor:
    """Where the entries of the lower triangle lie in the flattened matrix, row by row."""
    rows, columns = torch.tril_indices(dim, dim, device=device)
    return rows * dim + columns


def _triangular_root(length: int) -> int:
    dim = (math.isqrt(1 + 8 * length) - 1) // 2
    if dim * (dim + 1) // 2 != length or dim == 0:
        raise ValueError(
            f"A vector of {length} numbers does not fill a lower triangle: the length must be "
            f"d (d + 1) / 2 for some d >= 1."
        )
    return dim


def _triangle(dim: int, columns: int) -> int:
    if dim != columns:
        raise ValueError(f"Expected a square matrix, got {dim} x {columns}.")
    return dim * (dim + 1) // 2


def _fill(flat: Tensor) -> Tensor:
    """Lower triangular matrix from its flat entries: gathers, so that vmap and tracing work."""
    dim = _triangular_root(flat.shape[-1])
    gather = _gather_index(dim, flat.device)
    return flat.index_select(-1, gather).unflatten(-1, (dim, dim)).tril()


def _flatten(matrix: Tensor) -> Tensor:
    lower = _lower_index(matrix.shape[-1], matrix.device)
    return matrix.flatten(-2).index_select(-1, lower)


def _exp_diagonal(matrix: Tensor) -> Tensor:
    return matrix.tril(-1) + matrix.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def _log_diagonal(matrix: Tensor) -> Tensor:
    return matrix.tril(-1) + matrix.diagonal(dim1=-2, dim2=-1).log().diag_embed()


class CholeskyFactorTransform(Transform):
    r"""From :math:`\mathbb{R}^{d(d+1)/2}` to Cholesky factors, the diagonal by ``exp``.

    The flat vector holds the lower triangle row by row.

    Example:
        >>> CholeskyFactorTransform()(torch.zeros(3))
        tensor([[1., 0.],
                [0., 1.]])
    """

    domain = constraints.real_vector
    codomain = cholesky_factor
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CholeskyFactorTransform)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return _exp_diagonal(_fill(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return _flatten(_log_diagonal(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        dim = _triangular_root(shape[-1])
        return torch.Size((*shape[:-1], dim, dim))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], _triangle(*shape[-2:])))


class PositiveDefiniteTransform(Transform):
    r"""From :math:`\mathbb{R}^{d(d+1)/2}` to positive definite matrices.

    :math:`x \mapsto L(x) L(x)^\top` with :math:`L` from :class:`CholeskyFactorTransform`. The
    Jacobian is taken on the :math:`d(d+1)/2` distinct entries of the symmetric matrix.

    Example:
        >>> PositiveDefiniteTransform()(torch.tensor([0.0, 1.0, 0.0]))
        tensor([[1., 1.],
                [1., 2.]])
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PositiveDefiniteTransform)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        factor = _exp_diagonal(_fill(x))
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return _flatten(_log_diagonal(torch.linalg.cholesky(y)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # Read from x, not from a Cholesky of y: exact, and free. The diagonal of L is exp(x_ii),
        # which adds one power of L_ii to the d - i + 1 of the map L -> L L^T.
        dim = y.shape[-1]
        order = torch.arange(dim + 1, 1, -1, dtype=x.dtype, device=x.device)
        return (order * _fill(x).diagonal(dim1=-2, dim2=-1)).sum(-1) + dim * math.log(2.0)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        dim = _triangular_root(shape[-1])
        return torch.Size((*shape[:-1], dim, dim))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], _triangle(*shape[-2:])))


class LocCholeskyTransform(Transform):
    r"""From :math:`\mathbb{R}^{d + d(d+1)/2}` to ``[loc | scale_tril]``: ``loc`` first, unchanged.

    Example:
        >>> LocCholeskyTransform()(torch.tensor([3.0, 4.0, 0.0, 1.0, 0.0]))
        tensor([[3., 1., 0.],
                [4., 1., 1.]])
    """

    domain = constraints.real_vector
    codomain = loc_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocCholeskyTransform)

    __hash__ = Transform.__hash__

    @staticmethod
    def _dim(length: int) -> int:
        # d + d (d + 1) / 2 = (d + 1)(d + 2) / 2 - 1
        return _triangular_root(length + 1) - 1

    def _call(self, x: Tensor) -> Tensor:
        dim = self._dim(x.shape[-1])
        return torch.cat([x[..., :dim, None], _exp_diagonal(_fill(x[..., dim:]))], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., 0], _flatten(_log_diagonal(y[..., 1:]))], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y[..., 1:].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        dim = self._dim(shape[-1])
        return torch.Size((*shape[:-1], dim, dim + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        dim = shape[-2]
        return torch.Size((*shape[:-2], dim + _triangle(dim, shape[-1] - 1)))


class LocVarianceTransform(Transform):
    r"""From :math:`\mathbb{R}^2` to ``(loc, variance)``: the second entry is exponentiated.

    Example:
        >>> LocVarianceTransform()(torch.tensor([3.0, 0.0]))
        tensor([3., 1.])
    """

    domain = constraints.real_vector
    codomain = loc_variance
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocVarianceTransform)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., 0], x[..., 1].exp()], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.stack([y[..., 0], y[..., 1].log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., 1]


@biject_to.register(cholesky_factor)
@biject_to.register(constraints.lower_cholesky)
@transform_to.register(cholesky_factor)
def _to_cholesky_factor(constraint: constraints.Constraint) -> Transform:
    return CholeskyFactorTransform()


@biject_to.register(constraints.positive_definite)
def _to_positive_definite(constraint: constraints.Constraint) -> Transform:
    return PositiveDefiniteTransform()


@biject_to.register(loc_cholesky)
@transform_to.register(loc_cholesky)
def _to_loc_cholesky(constraint: constraints.Constraint) -> Transform:
    return LocCholeskyTransform()


@biject_to.register(loc_variance)
@transform_to.register(loc_variance)
def _to_loc_variance(constraint: constraints.Constraint) -> Transform:
    return LocVarianceTransform()
