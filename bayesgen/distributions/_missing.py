r"""Quadratic forms of rows with missing entries, exact, without a loop over rows or patterns.

Rows that miss the same entries share one factor. All patterns' factors come from one batched QR;
the rows are laid out in tiles of one pattern each, and all tiles go through one batched solve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Size, Tensor

from bayesgen.distributions._linalg import log_diagonal, solve_lower

__all__ = ["ObservedForm", "observed_form", "observed_mask", "split_factor"]

_BITS = 52


class ObservedForm(NamedTuple):
    """What the densities of elliptical distributions need, each of the broadcast batch shape."""

    square: Tensor
    """Squared Mahalanobis distance of the observed entries."""
    half_log_det: Tensor
    """Half the log determinant of the observed block of the scale matrix."""
    size: Tensor
    """Number of observed entries."""


class _Layout(NamedTuple):
    """Where the rows lie: ``position`` in the padded tiles; the group of each row and tile."""

    group: Tensor
    position: Tensor
    tile_group: Tensor
    width: int


def _group_rows(missing: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct pairs (block, pattern) of ``(n, d)`` rows; and one row of each."""
    group = block
    for bits in missing.split(_BITS, -1):
        powers = 2 ** torch.arange(bits.shape[-1], device=bits.device)
        code = torch.unique((bits * powers).sum(-1), return_inverse=True)[1]
        group = torch.unique(group * (code.max() + 1) + code, return_inverse=True)[1]
    rows = torch.arange(len(group), device=group.device)
    first = torch.zeros(int(group.max()) + 1, dtype=torch.long, device=group.device)
    return group, first.scatter_(0, group, rows)


def _lay_out(group: Tensor, num_groups: int) -> _Layout:
    """Tiles as wide as the mean group: at most twice as many as groups, so little padding."""
    width = -(-len(group) // num_groups)
    counts = torch.bincount(group, minlength=num_groups)
    tiles = (counts + width - 1) // width
    start = (counts.cumsum(0) - counts)[group]
    order = torch.argsort(group, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(group), device=group.device)
    position = (tiles.cumsum(0) - tiles)[group] * width + (rank - start)
    owner = torch.repeat_interleave(torch.arange(num_groups, device=group.device), tiles)
    return _Layout(group, position, owner, width)


def _factor_observed(factor: Tensor, missing: Tensor) -> Tensor:
    """Cholesky factor of the observed block, with an identity in the place of the missing one.

    By QR of the remaining rows, because forming the covariance would square its condition number.
    """
    kept = torch.where(missing.unsqueeze(-1), 0.0, factor)
    filler = missing.to(factor.dtype).diag_embed().expand_as(kept)
    upper = torch.linalg.qr(torch.cat([kept.mT, filler], -2)).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return torch.where(
        missing.any(-1)[..., None, None], (upper * sign.unsqueeze(-1)).mT.tril(), factor
    )


def _solve_tiles(factor: Tensor, shift: Tensor, layout: _Layout) -> Tensor:
    """Squared norms ``(outer, n)`` of the rows of ``shift`` whitened by their group's factor."""
    outer, _, dim = shift.shape
    size = len(layout.tile_group) * layout.width
    padded = shift.new_zeros(outer, size, dim).index_copy(1, layout.position, shift)
    right = padded.unflatten(1, (len(layout.tile_group), layout.width)).mT
    whitened = solve_lower(factor[:, layout.tile_group], right)
    return whitened.square().sum(-2).flatten(1).index_select(1, layout.position)


def _to_front(tensor: Tensor, order: list[int], sizes: tuple[int, ...], keep: int) -> Tensor:
    """Bring the batch dimensions in ``order`` and merge them into three groups of ``sizes``."""
    tail = list(range(tensor.dim() - keep, tensor.dim()))
    return tensor.permute(*order, *tail).reshape(*sizes, *tensor.shape[tensor.dim() - keep :])


def observed_form(value: Tensor, loc: Tensor, scale_tril: Tensor) -> ObservedForm:
    """Quadratic form of the entries of ``value`` that are not NaN.

    Args:
        value: Rows, ``(..., d)``; NaN marks what is missing.
        loc: Locations, ``(..., d)``.
        scale_tril: Lower Cholesky factors, ``(..., d, d)``. Leave shared factors unexpanded: one
            factorisation is made for each factor and pattern.
    """
    missing = torch.isnan(value)
    shift = torch.where(missing, 0.0, value - loc)
    batch = torch.broadcast_shapes(shift.shape[:-1], scale_tril.shape[:-2])
    dim = value.shape[-1]
    if not math.prod(batch):
        empty = (shift.sum(-1) + log_diagonal(scale_tril).sum(-1)).expand(batch)
        return ObservedForm(empty, empty, empty)
    # A batch dimension is `outer` when only the factors vary along it, `shared` when the patterns
    # do as well, and otherwise its entries are plain `rows`: all of them can share a factor.
    rank = len(batch)
    masks = Size((1,) * (rank + 1 - missing.dim()) + tuple(missing.shape[:-1]))
    factors = Size((1,) * (rank + 2 - scale_tril.dim()) + tuple(scale_tril.shape[:-2]))
    row = [i for i in range(rank) if factors[i] == 1]
    outer = [i for i in range(rank) if factors[i] > 1 and masks[i] == 1]
    shared = [i for i in range(rank) if factors[i] > 1 and masks[i] > 1]
    order = [*outer, *shared, *row]
    num_outer, num_shared, num_rows = (
        math.prod(batch[i] for i in dims) for dims in (outer, shared, row)
    )
    # Patterns (shared * rows, d), shifts (outer, shared * rows, d), factors (outer, shared, d, d).
    patterns = missing.expand([1 if i in outer else batch[i] for i in range(rank)] + [dim])
    patterns = _to_front(patterns, order, (num_shared * num_rows,), 1)
    shift = shift.expand((*batch, dim))
    shift = _to_front(shift, order, (num_outer, num_shared * num_rows), 1)
    factor = scale_tril.reshape(*factors, dim, dim)
    factor = _to_front(factor, order, (num_outer, num_shared), 2)

    block = torch.arange(num_shared, device=value.device).repeat_interleave(num_rows)
    group, first = _group_rows(patterns, block)
    layout = _lay_out(group, len(first))
    factor = _factor_observed(factor[:, block[first]], patterns[first])
    square = _solve_tiles(factor, shift, layout)
    half_log_det = log_diagonal(factor).sum(-1).index_select(1, group)
    count = (~patterns).sum(-1).to(square.dtype).expand_as(square)

    inverse = [order.index(i) for i in range(rank)]
    shape = [batch[i] for i in order]

    def restore(flat: Tensor) -> Tensor:
        return flat.reshape(shape).permute(inverse)

    return ObservedForm(restore(square), restore(half_log_det), restore(count))


def observed_mask(owner: str, observed: Tensor, dim: int) -> Tensor:
    """``observed`` as a boolean mask ``(d,)``, or ``ValueError`` saying what is wrong with it."""
    observed = torch.as_tensor(observed)
    if observed.dtype != torch.bool or observed.shape != (dim,):
        raise ValueError(
            f"{owner}: observed must be one boolean mask of shape ({dim},), but it has dtype "
            f"{observed.dtype} and shape {tuple(observed.shape)}."
        )
    return observed


def split_factor(scale_tril: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of the Cholesky factor after the observed columns are moved to the front.

    Returns:
        ``L_oo``, ``L_mo`` and ``L_mm``: then ``L_mo L_oo^-1`` regresses the missing entries on the
        observed ones, and ``L_mm`` is the factor of what remains.
    """
    order = torch.cat([observed.nonzero()[:, 0], (~observed).nonzero()[:, 0]])
    upper = torch.linalg.qr(scale_tril[..., order, :].mT).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    factor = (upper * sign.unsqueeze(-1)).mT.tril()
    size = int(observed.sum())
    return factor[..., :size, :size], factor[..., size:, :size], factor[..., size:, size:]
