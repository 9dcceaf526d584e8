"""Quadratic features of rows with holes: densities and statistics as one matrix product each.

A Gaussian log density is linear in ``(1, x_i, x_i x_j)``. Rows are grouped by which columns are
observed; within a group the missing columns are integrated out of the natural parameters, so a row
with holes costs no solve of its own. The same algebra serves fixed parameters (EM, Gibbs) and
expected ones (variational Bayes), whose exponential is an unnormalised Gaussian too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Condensed",
    "Group",
    "Quadratic",
    "conditional_maps",
    "features",
    "group_rows",
    "marginal_natural",
    "moments",
    "num_features",
    "pack_natural",
    "safe_cholesky",
    "unpack_moments",
    "unpack_natural",
]


class Group(NamedTuple):
    """Rows that share a pattern of observed columns."""

    rows: Tensor | None
    """Row numbers ``(m,)``; None when the group is the whole batch."""
    observed: Tensor
    """Observed columns ``(p,)``, ascending."""
    missing: Tensor
    """Missing columns ``(d - p,)``, ascending."""
    features: Tensor
    """``(F_p, m)`` quadratic features of the observed columns."""

    @property
    def columns(self) -> Tensor:
        """``(p, m)`` the observed columns themselves, a view."""
        return self.features[1 : 1 + len(self.observed)]


class Quadratic(NamedTuple):
    """A batch as groups of rows."""

    groups: tuple[Group, ...]
    num_rows: int
    num_columns: int

    def condensed(self) -> Condensed:
        """The columns alone, which give the same features again, to the bit."""
        parts = tuple(group._replace(features=group.columns.clone()) for group in self.groups)
        return Condensed(parts, self.num_rows, self.num_columns)


class Condensed(NamedTuple):
    """A batch without the products of its columns: as small as its rows."""

    groups: tuple[Group, ...]
    """As in :class:`Quadratic`, with the columns ``(p, m)`` in the place of their features."""
    num_rows: int
    num_columns: int

    def expanded(self) -> Quadratic:
        """The batch with its features."""
        parts = tuple(group._replace(features=_expand(group.features)) for group in self.groups)
        return Quadratic(parts, self.num_rows, self.num_columns)


def num_features(p: int) -> int:
    """Length of the feature vector of ``p`` columns."""
    return 1 + p + p * (p + 1) // 2


def features(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``(n, p)`` to ``(F, n)``: ones, columns, and products in the order of :func:`_pairs`."""
    return _expand(x.T, dtype)


def _expand(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Columns ``(p, n)`` to features ``(F, n)``."""
    p, n = x.shape
    whole, half = (p + 1) // 2, p // 2
    out = x.new_empty((num_features(p), n), dtype=dtype or x.dtype)
    out[0].fill_(1.0)
    columns = out[1 : 1 + p].copy_(x)
    # Windows over the columns and their beginning again: all products in one or two calls.
    windows = torch.cat([columns, columns[:half]]).unfold(0, p, 1)[:whole].transpose(1, 2)
    rounds = 1 + p + whole * p
    torch.mul(columns, windows, out=out[1 + p : rounds].view(whole, p, n))
    if p % 2 == 0:  # columns half way round meet from both sides: half of the last round is new
        torch.mul(columns[:half], columns[half:], out=out[rounds:])
    return out


def group_rows(x: Tensor, dtype: torch.dtype | None = None) -> Quadratic:
    """Group the rows ``(n, d)`` by their pattern of ``NaN``; features come in ``dtype``."""
    n, d = x.shape
    every = torch.arange(d, device=x.device)
    # A sum is NaN if an entry is: cheaper than a mask of all of them, and usually the end of it.
    if not bool(x.sum().isnan()):
        return Quadratic((Group(None, every, every[:0], features(x, dtype)),), n, d)
    patterns, inverse = torch.unique(torch.isnan(x), dim=0, return_inverse=True)
    groups = []
    for index, pattern in enumerate(patterns):
        rows = torch.nonzero(inverse == index).squeeze(-1)
        observed, missing = every[~pattern], every[pattern]
        part = features(x[rows][:, observed], dtype)
        groups.append(Group(rows, observed, missing, part))
    return Quadratic(tuple(groups), n, d)


def _pairs(p: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every pair of columns once: each with itself, with the next, with the second next, ..."""
    index = torch.arange(num_features(p) - 1 - p, device=device)
    left = index % max(p, 1)
    return left, (left + index // max(p, 1)) % max(p, 1)


def pack_natural(constant: Tensor, linear: Tensor, precision: Tensor) -> Tensor:
    r"""Coefficients ``(..., F)`` for ``constant + linear' x - x' precision x / 2``."""
    p = linear.shape[-1]
    i, j = _pairs(p, linear.device)
    scale = torch.where(i == j, -0.5, -1.0).to(linear.dtype)
    # By hand: torch.broadcast_shapes costs as much as the rest of this function.
    packed = precision[..., i, j] * scale
    shape = linear.shape[:-1]
    if packed.ndim > linear.ndim or constant.ndim > len(shape):
        shape = torch.broadcast_shapes(constant.shape, shape, packed.shape[:-1])
    return torch.cat(
        [
            constant.expand(shape).unsqueeze(-1),
            linear.expand(*shape, p),
            packed.expand(*shape, len(i)),
        ],
        dim=-1,
    )


def unpack_natural(natural: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`pack_natural`: constant, linear, precision."""
    i, j = _pairs(p, natural.device)
    scale = torch.where(i == j, -2.0, -1.0).to(natural.dtype)
    upper = natural[..., 1 + p :] * scale
    precision = natural.new_zeros((*natural.shape[:-1], p, p))
    precision[..., i, j] = upper
    precision[..., j, i] = upper
    return natural[..., 0], natural[..., 1 : 1 + p], precision


def unpack_moments(packed: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums ``(..., F)`` of features as weight, first ``(..., p)``, second ``(..., p, p)``."""
    i, j = _pairs(p, packed.device)
    second = packed.new_zeros((*packed.shape[:-1], p, p))
    second[..., i, j] = packed[..., 1 + p :]
    second[..., j, i] = packed[..., 1 + p :]
    return packed[..., 0], packed[..., 1 : 1 + p], second


def _pack_moments(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    i, j = _pairs(first.shape[-1], first.device)
    return torch.cat([weight.unsqueeze(-1), first, second[..., i, j]], dim=-1)


def safe_cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor; a relative jitter of 1e-8 ... 1e-4 where rounding made it singular.

    Raises:
        ValueError: The matrix is not positive definite even with a jitter of 1e-4 of its diagonal.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1).abs().mean(-1).clamp_min(1e-300)
    for jitter in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        bump = torch.diag_embed((jitter * diagonal).unsqueeze(-1).expand(matrix.shape[:-1]))
        retry, failed = torch.linalg.cholesky_ex(
            torch.where((info > 0)[..., None, None], matrix + bump, matrix)
        )
        if not bool(failed.any()):
            return retry
    raise ValueError(
        "a covariance matrix is not positive definite, even with a jitter of 1e-4 of its "
        "diagonal. Are "
        "there infinite or huge values in the data? Rescale the columns to comparable units."
    )


class Maps(NamedTuple):
    """Missing columns given observed ones: ``x_m = slope x_o + offset + noise``."""

    slope: Tensor
    """``(..., m, p)``."""
    offset: Tensor
    """``(..., m)``."""
    factor: Tensor
    """``(..., m, m)`` Cholesky factor of the missing block of the precision."""
    covariance: Tensor
    """``(..., m, m)``."""


def conditional_maps(natural: Tensor, group: Group, d: int) -> Maps:
    """Regression of a group's missing columns on its observed ones under natural parameters."""
    _, linear, precision = unpack_natural(natural, d)
    o, m = group.observed, group.missing
    factor = safe_cholesky(precision[..., m[:, None], m])
    slope = -torch.cholesky_solve(precision[..., m[:, None], o], factor)
    offset = torch.cholesky_solve(linear[..., m].unsqueeze(-1), factor).squeeze(-1)
    return Maps(slope, offset, factor, torch.cholesky_inverse(factor))


def marginal_natural(
    natural: Tensor, log_det: Tensor, group: Group, d: int
) -> tuple[Tensor, Tensor]:
    """Integrate a group's missing columns out of ``exp(natural' features) |precision|^(1/2)``.

    Args:
        natural: ``(..., F)`` packed natural parameters of all ``d`` columns.
        log_det: ``(...)`` log determinant of the precision, or its expectation.
        group: The group.
        d: Number of columns.

    Returns:
        The natural parameters of the observed columns, and the log determinant that goes with
        them.
    """
    if len(group.missing) == 0:
        return natural, log_det
    constant, linear, precision = unpack_natural(natural, d)
    o, m = group.observed, group.missing
    maps = conditional_maps(natural, group, d)
    cross = precision[..., o[:, None], m]
    inner_log_det = 2.0 * torch.log(torch.diagonal(maps.factor, dim1=-2, dim2=-1)).sum(-1)
    packed = pack_natural(
        constant + 0.5 * (linear[..., m] * maps.offset).sum(-1),
        linear[..., o] - (cross @ maps.offset.unsqueeze(-1)).squeeze(-1),
        precision[..., o[:, None], o] + cross @ maps.slope,
    )
    return packed, log_det - inner_log_det


def moments(
    batch: Quadratic,
    weights: Tensor,
    counts: Tensor,
    natural: Tensor | None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weighted sums of the full feature vector, holes filled by the conditional: ``(..., K, F)``.

    Args:
        batch: The rows.
        weights: ``(..., K, n)`` weights of the moments (responsibility times local precision
            scale).
        counts: ``(..., K, n)`` responsibilities: the conditional covariance of a row is divided by
            its local scale, so it enters with the responsibility alone.
        natural: ``(..., K, F)`` message that fills the holes; None fills with zero, the centre.
        generator: Draw the holes instead of averaging over them.
    """
    d = batch.num_columns
    total: Tensor | None = None
    for group in batch.groups:
        w = weights if group.rows is None else weights[..., group.rows]
        if len(group.missing) == 0:
            part = (w @ group.features.mT).double()
        elif generator is not None and natural is not None:
            c = counts[..., group.rows] if group.rows is not None else counts
            part = _drawn_moments(group, w, c, natural, d, generator)
        else:
            c = counts[..., group.rows] if group.rows is not None else counts
            part = _expected_moments(group, w, c, natural, d)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a batch without rows has no statistics.")
    return total


def _expected_moments(
    group: Group, weights: Tensor, counts: Tensor, natural: Tensor | None, d: int
) -> Tensor:
    o, m = group.observed, group.missing
    weight, first, second = unpack_moments((weights @ group.features.T).double(), len(o))
    full_first = first.new_zeros((*first.shape[:-1], d))
    full_second = first.new_zeros((*first.shape[:-1], d, d))
    full_first[..., o] = first
    full_second[..., o[:, None], o] = second
    if natural is not None:
        maps = conditional_maps(natural.double(), group, d)
        slope, offset = maps.slope, maps.offset
        filled = (slope @ first.unsqueeze(-1)).squeeze(-1) + offset * weight.unsqueeze(-1)
        cross = second @ slope.mT + first.unsqueeze(-1) * offset.unsqueeze(-2)
        spread = maps.covariance * counts.double().sum(-1)[..., None, None]
        full_first[..., m] = filled
        full_second[..., o[:, None], m] = cross
        full_second[..., m[:, None], o] = cross.mT
        full_second[..., m[:, None], m] = (
            slope @ cross + offset.unsqueeze(-1) * filled.unsqueeze(-2) + spread
        )
    return _pack_moments(weight, full_first, full_second)


def _drawn_moments(
    group: Group,
    weights: Tensor,
    labels: Tensor,
    natural: Tensor,
    d: int,
    generator: torch.Generator,
) -> Tensor:
    """Moments with holes drawn given one-hot ``labels``; weights carry the local scale."""
    o, m = group.observed, group.missing
    maps = conditional_maps(natural.double(), group, d)
    x = group.columns.double()
    hot = labels.double()
    mean = torch.einsum("...kn,...kmp,pn->...mn", hot, maps.slope, x) if len(o) else 0.0
    mean = mean + torch.einsum("...kn,...km->...mn", hot, maps.offset)
    noise = torch.randn(
        (*hot.shape[:-2], len(m), hot.shape[-1]),
        generator=generator,
        dtype=torch.float64,
        device=x.device,
    )
    # covariance = (L L')^-1, so L^-T noise has it; the local scale divides it.
    shaped = torch.einsum(
        "...kn,...kmj,...jn->...mn", hot, torch.linalg.inv(maps.factor).mT, noise
    )
    scale = weights.double().sum(-2, keepdim=True)
    drawn = mean + shaped / scale.sqrt()
    full = x.new_empty((*hot.shape[:-2], d, hot.shape[-1]))
    full[..., o, :] = x.expand(*hot.shape[:-2], len(o), hot.shape[-1])
    full[..., m, :] = drawn
    w = weights.double()
    return _pack_moments(
        w.sum(-1),
        w @ full.mT,
        torch.einsum("...kn,...in,...jn->...kij", w, full, full),
    )
