r"""Quadratic forms of a diagonal plus a low-rank matrix, missing entries integrated out exactly.

With :math:`\Sigma = W W^\top + \Psi` the identity

.. math::
    y^\top \Sigma^{-1} y = \min_z \; \lVert \Psi^{-1/2} (y - W z) \rVert^2 + \lVert z \rVert^2

needs nothing of size :math:`d \times d`, and unlike Woodbury's difference of two large numbers
loses no digits where the noise is small. Its minimiser is the mean of the latent given the row.
A row's observed entries enter its :math:`q \times q` precision as a sum, so that all rows'
precisions are one product of their masks with the outer products of :math:`W`'s rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgen.distributions._linalg import log_diagonal
from bayesgen.distributions._missing import ObservedForm

__all__ = ["LowRankForm", "low_rank_form", "pack", "pack_outer", "unpack"]


class LowRankForm(NamedTuple):
    """The form of each row, and the law of its latent given its observed entries."""

    form: ObservedForm
    """Squared distance, half log determinant and number of observed entries, ``(..., n)`` each."""
    loc: Tensor
    """Mean of the latent, ``(..., n, q)``."""
    precision_tril: Tensor
    """Cholesky factor of its precision, ``(..., n, q, q)``; ``n = 1`` where all rows share it."""


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.triu_indices(size, size, device=device)
    return row, column


@cache
def _positions(size: int, leading: int) -> tuple[int, ...]:
    """Where each entry of a matrix lies in its packed upper triangle; numbers, for any trace."""
    start = [i * size - i * (i + 1) // 2 for i in range(size)]
    pairs = ((i, j) for i in range(leading) for j in range(leading))
    return tuple(start[min(i, j)] + max(i, j) for i, j in pairs)


def pack(matrix: Tensor) -> Tensor:
    """Upper triangles ``(..., s (s + 1) / 2)`` of symmetric matrices ``(..., s, s)``."""
    size = matrix.shape[-1]
    row, column = _places(size, matrix.device)
    return matrix.flatten(-2).index_select(-1, row * size + column)


def pack_outer(vector: Tensor) -> Tensor:
    """:func:`pack` of the outer products of vectors ``(..., s)`` with themselves."""
    row, column = _places(vector.shape[-1], vector.device)
    return vector.index_select(-1, row) * vector.index_select(-1, column)


def unpack(packed: Tensor, size: int, leading: int | None = None) -> Tensor:
    """The inverse of :func:`pack`; or only the first ``leading`` rows and columns."""
    part = size if leading is None else leading
    index = torch.tensor(_positions(size, part), device=packed.device)
    return packed.index_select(-1, index).unflatten(-1, (part, part))


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _complete(shift: Tensor, scaled: Tensor) -> LowRankForm:
    """Rows without gaps, in units of the noise: one precision for all."""
    tril = torch.linalg.cholesky(scaled.mT @ scaled + _eye(scaled, scaled.shape[-1]))
    loc = torch.cholesky_solve((shift @ scaled).mT, tril).mT
    rest = shift - loc @ scaled.mT
    square = rest.square().sum(-1) + loc.square().sum(-1)
    half_log_det = log_diagonal(tril).sum(-1, keepdim=True).expand(square.shape)
    size = torch.full_like(square, float(shift.shape[-1]))
    return LowRankForm(ObservedForm(square, half_log_det, size), loc, tril.unsqueeze(-3))


def _gapped(shift: Tensor, observed: Tensor, scaled: Tensor) -> LowRankForm:
    """Rows with gaps: ``shift`` is zero there."""
    q = scaled.shape[-1]
    weight = observed.to(shift.dtype)
    precision = unpack(weight @ pack_outer(scaled), q) + _eye(scaled, q)
    tril = torch.linalg.cholesky(precision)
    loc = torch.cholesky_solve((shift @ scaled).unsqueeze(-1), tril).squeeze(-1)
    rest = torch.where(observed, shift - loc @ scaled.mT, 0.0)
    square = rest.square().sum(-1) + loc.square().sum(-1)
    half_log_det = log_diagonal(tril).sum(-1).expand(square.shape)
    size = weight.sum(-1).expand(square.shape)
    return LowRankForm(ObservedForm(square, half_log_det, size), loc, tril)


def low_rank_form(shift: Tensor, missing: Tensor, factor: Tensor, scale: Tensor) -> LowRankForm:
    r"""The form of rows under ``factor @ factor.T + diag(scale ** 2)``.

    Args:
        shift: Rows minus their means, ``(..., n, d)``; what is missing is not read.
        missing: Which entries are missing: ``(n, d)``, or with leading dimensions.
        factor: ``(..., d, q)``.
        scale: Standard deviations of the noise, ``(..., d)``, positive.
    """
    scaled = factor / scale.unsqueeze(-1)
    # Before anything else: the derivative of NaN / scale is NaN even where it is not used.
    shift = torch.where(missing, 0.0, shift) / scale.unsqueeze(-2)
    log_scale = scale.log()
    if not bool(missing.any()):
        found = _complete(shift, scaled)
        return _with_scale(found, log_scale.sum(-1, keepdim=True))
    observed = ~missing
    lost = (observed.to(shift.dtype) * log_scale.unsqueeze(-2)).sum(-1)
    gaps = missing.any(-1)
    if gaps.dim() > 1 or bool(gaps.all()):
        return _with_scale(_gapped(shift, observed, scaled), lost)
    # Few rows with gaps among many without: only they need a precision of their own.
    with_gaps, without = gaps.nonzero()[:, 0], (~gaps).nonzero()[:, 0]
    back = torch.cat([without, with_gaps]).argsort()
    first = _complete(shift[..., without, :], scaled)
    second = _gapped(shift[..., with_gaps, :], observed[with_gaps], scaled)
    tril = first.precision_tril
    shared = tril.expand(*tril.shape[:-3], len(without), *tril.shape[-2:])
    form = ObservedForm(
        *(torch.cat(pair, -1)[..., back] for pair in zip(first.form, second.form, strict=True))
    )
    return _with_scale(
        LowRankForm(
            form,
            torch.cat([first.loc, second.loc], -2)[..., back, :],
            torch.cat([shared, second.precision_tril], -3)[..., back, :, :],
        ),
        lost,
    )


def _with_scale(found: LowRankForm, log_scale: Tensor) -> LowRankForm:
    form = found.form
    return found._replace(form=form._replace(half_log_det=form.half_log_det + log_scale))
