r"""The integral over a row's latents of independent Student-t entries, by importance sampling.

With the entries in units of the noise, :math:`y_j = (x_j - \mu_j) / \sigma` and :math:`a_j = w_j /
\sigma`, the density of a row's observed entries is

.. math::
    \int \mathrm{N}(z; 0, I_q) \prod_j t_{\nu_j}(y_j - a_j^\top z)\, dz,

which has no closed form and may have several modes, one for each set of entries that agree. The
proposal is a mixture of normals: the prior, so that weights are bounded, and a narrow and a wide
normal around each mode. Modes are climbed to (by EM, each entry weighted by its own scale) from
the latents that each of many small sets of entries implies, from those that all entries imply, and
from zero: an outlying entry is in few of the sets. Points are scrambled Sobol points, in
independent replicates whose spread gives the standard error; rows above the tolerance get a
proposal that is fitted to their weighted points, and four times as many.

The points are the same for every row, so the estimate is a function of the row and the parameters.

References:
    Owen & Zhou (2000). Safe and effective importance sampling. JASA 95. Cappé, Douc, Guillin,
    Marin & Robert (2008). Adaptive importance sampling in general mixture classes. Owen (1997).
    Scrambled net variance for integrals of smooth functions. Fischler & Bolles (1981). Random
    sample consensus.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "TOLERANCE",
    "CellParameters",
    "Pairs",
    "Points",
    "log_integral",
    "log_integrand",
    "over_latents",
]

TOLERANCE = 0.01
"""Standard error, in nats, at which the number of points stops growing."""

_LOG_2PI, _LARGEST = math.log(2.0 * math.pi), 1e38
_SEED = 20_000_701
_REPLICATES = 8
_PILOT, _SIZES = 256, (512, 2048, 8192, 32768, 131072)
_BUDGET, _TOGETHER = 2**18, 2**19  # numbers alive at once: few enough for the cache
_SETS = 32  # small sets of entries that starts come from
_STARTS, _CLIMB, _CLIMB_ALL = 8, 3, 7
_NEAR = 0.5  # squared distance, in posterior variances, of modes that are one
_DROP = 14.0  # nats below the best at which a mode is left out
_PRIOR, _WIDE = 0.05, 0.3  # shares of the prior and of the wide normals
_NARROW_SCALE, _WIDE_SCALE = 1.0, 1.8
_LEAST, _TINY = 0.01, 1e-300  # share of a mode; what divides


class CellParameters(NamedTuple):
    """Rows beside the parameters that they are judged by, in units of the noise: one pair each."""

    y: Tensor
    """``(p, d)``; anything finite where missing."""
    observed: Tensor
    """``(p, d)``, one where observed, else zero."""
    loadings: Tensor
    """``(p, d, q)``."""
    df: Tensor
    """``(p, d)``."""

    def pick(self, index: Tensor) -> CellParameters:
        """Some of the pairs, by number or mask."""
        return CellParameters(*(part[index] for part in self))


class Pairs(Protocol):
    """Many pairs of a row and parameters, of which some are at hand at a time."""

    def __len__(self) -> int: ...

    def pick(self, index: Tensor) -> CellParameters:
        """The pairs of these numbers."""


class Points(NamedTuple):
    """Weighted latents of each pair, and the integral that they estimate."""

    latents: Tensor
    """``(p, q, m)``: along the points in memory, which sums over a few latents like."""
    log_weights: Tensor
    """``(p, m)``, normalised: their exponentials sum to one."""
    log_integral: Tensor
    """``(p,)`` nats."""
    error: Tensor
    """``(p,)`` standard error of it, by the replicates."""

    def pick(self, mask: Tensor) -> Points:
        """The points of some of the pairs."""
        return Points(*(part[mask] for part in self))


# ------------------------------------------------------------------ the integrand
def _log_constant(pairs: CellParameters) -> Tensor:
    """Log normalisers of the observed entries' Student-t, ``(p,)``."""
    df = pairs.df
    each = torch.lgamma(0.5 * (df + 1.0)) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log()
    return (each * pairs.observed).sum(-1)


def _residual(pairs: CellParameters, latents: Tensor) -> Tensor:
    """``(p, d, m)`` at latents ``(p, q, m)``."""
    return torch.baddbmm(pairs.y.unsqueeze(-1), pairs.loadings, latents, alpha=-1.0)


def _log_joint(pairs: CellParameters, latents: Tensor) -> Tensor:
    """Log integrand less :func:`_log_constant`, ``(p, m)``, at latents ``(p, q, m)``."""
    power = (0.5 * (pairs.df + 1.0) * pairs.observed).unsqueeze(-2)
    ratio = _residual(pairs, latents).square_().div_(pairs.df.unsqueeze(-1))
    # Logarithms are much of the work, and single precision is far within the tolerance.
    inside = power.float() @ ratio.clamp_max_(_LARGEST).float().log1p_()
    prior = -0.5 * (latents.square().sum(-2) + latents.shape[-2] * _LOG_2PI)
    return prior - inside.squeeze(-2).double()


# ------------------------------------------------------------------ modes
@cache
def _sets(d: int, q: int) -> tuple[tuple[int, ...], ...]:
    """Small sets of columns: all of size ``q`` if they are few, else some at random."""
    if math.comb(d, q) <= _SETS:
        return tuple(itertools.combinations(range(d), q))
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.rand((_SETS, d), generator=generator).argsort(-1)[:, :q]
    return tuple(tuple(row) for row in drawn.tolist())


def _implied(pairs: CellParameters, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Latents implied by weighted entries ``(p, m, d)``, and Cholesky factors of precisions."""
    p, m, d = weight.shape
    q = pairs.loadings.shape[-1]
    outer = (pairs.loadings.unsqueeze(-1) * pairs.loadings.unsqueeze(-2)).flatten(-2)
    eye = torch.eye(q, dtype=weight.dtype, device=weight.device)
    tril = torch.linalg.cholesky((weight @ outer).unflatten(-1, (q, q)) + eye)
    pull = (weight * pairs.y.unsqueeze(-2)) @ pairs.loadings
    return torch.cholesky_solve(pull.unsqueeze(-1), tril).squeeze(-1), tril


def _climb(pairs: CellParameters, latents: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Latents nearer to a mode, and factors of the precisions there."""
    df = pairs.df.unsqueeze(-2)
    tril = latents
    for _ in range(steps):
        weight = (df + 1.0) / (df + _residual(pairs, latents.mT).mT.square())
        latents, tril = _implied(pairs, weight * pairs.observed.unsqueeze(-2))
    return latents, tril


def _starts(pairs: CellParameters) -> Tensor:
    """The likeliest of the latents that sets of entries imply, ``(p, s, q)``."""
    d, q = pairs.loadings.shape[-2:]
    chosen = torch.tensor(_sets(d, q), device=pairs.y.device)
    member = torch.zeros((len(chosen) + 1, d), dtype=pairs.y.dtype, device=pairs.y.device)
    member[torch.arange(len(chosen), device=chosen.device).unsqueeze(-1), chosen] = 1.0
    member[-1] = 1.0
    found, _ = _implied(pairs, member * pairs.observed.unsqueeze(-2))
    found = torch.cat([found, torch.zeros_like(found[:, :1])], 1)
    best = _log_joint(pairs, found.mT).topk(min(_STARTS, found.shape[1]), -1).indices
    return found.gather(1, best.unsqueeze(-1).expand(-1, -1, q))


class _Mixture(NamedTuple):
    """A proposal: normals around modes, narrow and wide, and the prior."""

    loc: Tensor
    """``(p, k, q)``."""
    scale_tril: Tensor
    """``(p, k, q, q)``."""
    log_share: Tensor
    """``(p, k)`` shares of the modes, summing to one without the prior's; of none, ``-inf``."""

    def pick(self, index: Tensor) -> _Mixture:
        """The proposals of some of the pairs, by number or mask."""
        return _Mixture(*(part[index] for part in self))


def _modes(pairs: CellParameters) -> _Mixture:
    latents, _ = _climb(pairs, _starts(pairs), _CLIMB)
    # Where one start has gone is enough: the rest of the climb is for those that stand apart.
    latents, tril = _climb(pairs, latents, 1)
    height = _log_joint(pairs, latents.mT) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    order = height.argsort(-1, descending=True)
    q = latents.shape[-1]
    latents = latents.gather(1, order.unsqueeze(-1).expand(-1, -1, q))
    tril = tril.gather(1, order[..., None, None].expand(-1, -1, q, q))
    height = height.gather(1, order)
    kept = _distinct(latents, tril) & (height > height[:, :1] - _DROP)
    many = int(kept.sum(-1).max())
    index = (~kept).to(torch.int8).argsort(dim=-1, stable=True)[:, :many]
    latents = latents.gather(1, index.unsqueeze(-1).expand(-1, -1, q))
    alive = kept.gather(1, index)
    latents, tril = _climb(pairs, latents, _CLIMB_ALL)
    height = _log_joint(pairs, latents.mT) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _Mixture(latents, _scale_of(tril), _shares(height.masked_fill(~alive, -torch.inf)))


def _scale_of(precision_tril: Tensor) -> Tensor:
    """Lower Cholesky factors of the inverses of ``L L^T``."""
    return torch.linalg.cholesky(torch.cholesky_inverse(precision_tril))


def _distinct(latents: Tensor, tril: Tensor) -> Tensor:
    """Which of the latents ``(p, m, q)`` are not near one before them, ``(p, m)``."""
    apart = latents.unsqueeze(-2) - latents.unsqueeze(-3)
    square = (apart.unsqueeze(-2) @ tril.unsqueeze(-3)).square().sum((-2, -1))
    near = (square < _NEAR).tril(-1)
    return ~near.any(-1)


# ------------------------------------------------------------------ points
@cache
def _sobol(dim: int, num: int) -> Tensor:
    """Scrambled Sobol points in independent replicates one after the other, ``(num, dim)``."""
    each = num // _REPLICATES
    parts = []
    for index in range(_REPLICATES):
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=_SEED + 1009 * index + num)
        parts.append(engine.draw(each, dtype=torch.float64))
    tiny = 2.0**-40
    return torch.cat(parts).clamp(tiny, 1.0 - tiny)


def _draw(proposal: _Mixture, points: Tensor) -> Tensor:
    """Latents ``(p, q, m)`` at points ``(m, q + 1)``, the first of which chooses the normal."""
    noise = torch.special.ndtri(points[:, 1:].mT).to(proposal.loc)
    choice = points[:, 0].to(noise)
    prior, wide = choice < _PRIOR, choice < _PRIOR + (1.0 - _PRIOR) * _WIDE
    # What is left of the choice, stretched to (0, 1) within the prior, the wide and the narrow.
    start = torch.where(wide, _PRIOR, _PRIOR + (1.0 - _PRIOR) * _WIDE)
    length = torch.where(wide, (1.0 - _PRIOR) * _WIDE, (1.0 - _PRIOR) * (1.0 - _WIDE))
    choice = (choice - start) / length
    scaled = noise * torch.where(wide, _WIDE_SCALE, _NARROW_SCALE)
    latents = noise.expand(len(proposal.loc), -1, -1)
    edge = proposal.log_share.exp().cumsum(-1).unsqueeze(-1)
    for index in range(proposal.loc.shape[1]):
        moved = proposal.loc[:, index].unsqueeze(-1) + proposal.scale_tril[:, index] @ scaled
        if index == 0:
            latents = torch.where(prior, latents, moved)
        else:
            beyond = ~prior & (choice >= edge[:, index - 1])
            latents = torch.where(beyond.unsqueeze(-2), moved, latents)
    return latents.contiguous()


def _log_proposal(proposal: _Mixture, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of the mixture ``(p, m)``, and log shares of the modes in it ``(p, k, m)``."""
    q = latents.shape[-2]
    eye = torch.eye(q, dtype=latents.dtype, device=latents.device)
    inverse = torch.linalg.solve_triangular(proposal.scale_tril, eye, upper=False)
    log_det = proposal.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    parts = []
    for index in range(proposal.loc.shape[1]):
        white = inverse[:, index] @ (latents - proposal.loc[:, index].unsqueeze(-1))
        square = white.square_().sum(-2)
        narrow = (-0.5 / _NARROW_SCALE**2) * square + math.log1p(-_WIDE)
        wide = (-0.5 / _WIDE_SCALE**2) * square + math.log(_WIDE)
        each = torch.logaddexp(
            narrow - q * math.log(_NARROW_SCALE), wide - q * math.log(_WIDE_SCALE)
        )
        own = proposal.log_share[:, index : index + 1] - log_det[:, index : index + 1]
        parts.append(each + own + math.log1p(-_PRIOR))
    prior = -0.5 * latents.square().sum(-2) + math.log(_PRIOR)
    total = prior
    for part in parts:
        total = torch.logaddexp(total, part)
    return total - 0.5 * q * _LOG_2PI, torch.stack(parts, -2) - total.unsqueeze(-2)


def _weigh(pairs: CellParameters, proposal: _Mixture, num: int) -> tuple[Points, Tensor]:
    """Weighted points, and the log shares ``(p, k, m)`` of the modes in the proposal there."""
    latents = _draw(proposal, _sobol(proposal.loc.shape[-1] + 1, num).to(pairs.y.device))
    log_proposal, share = _log_proposal(proposal, latents)
    log_weights = _log_joint(pairs, latents) - log_proposal
    each = log_weights.unflatten(-1, (_REPLICATES, -1)).logsumexp(-1)
    total = each.logsumexp(-1)
    relative = (each - total.unsqueeze(-1)).exp() * _REPLICATES
    error = relative.std(-1) / math.sqrt(_REPLICATES)
    log_integral = total - math.log(num) + _log_constant(pairs)
    return Points(latents, log_weights - total.unsqueeze(-1), log_integral, error), share


def _refit(proposal: _Mixture, points: Points, share: Tensor) -> _Mixture:
    """The normals' parts in the weighted points give their new means, covariances and shares."""
    q = points.latents.shape[-2]
    weight = (points.log_weights.unsqueeze(-2) + share).exp()  # (p, k, m)
    mass = weight.sum(-1)
    inner = mass.clamp_min(_TINY).unsqueeze(-1)
    loc = weight @ points.latents.mT / inner
    centred = points.latents.unsqueeze(-3) - loc.unsqueeze(-1)  # (p, k, q, m)
    covariance = (centred * weight.unsqueeze(-2)) @ centred.mT / inner.unsqueeze(-1)
    effective = mass.square() / weight.square().sum(-1).clamp_min(_TINY)
    tril, info = torch.linalg.cholesky_ex(covariance)
    sound = (info == 0) & (effective > 4.0 * (q + 1)) & (mass > 1e-6)
    height = torch.where(sound, mass.log(), proposal.log_share)
    return _Mixture(
        torch.where(sound[..., None], loc, proposal.loc),
        torch.where(sound[..., None, None], tril, proposal.scale_tril),
        _shares(height.masked_fill(proposal.log_share == -torch.inf, -torch.inf)),
    )


def _shares(height: Tensor) -> Tensor:
    """Log shares from log masses ``(p, k)``: none vanishes but those of no mode, ``-inf``."""
    least = height.log_softmax(-1).clamp_min(math.log(_LEAST))
    return least.masked_fill(height == -torch.inf, -torch.inf).log_softmax(-1)


# ------------------------------------------------------------------ the integral
def over_latents(
    pairs: Pairs, find: Callable[[CellParameters, Points], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What ``find`` makes of the weighted points of each pair: tensors ``(p, ...)``, in order.

    Points are added until the standard error of the log integral is at most :data:`TOLERANCE`, or
    there are 131,072 of them.
    """
    first = pairs.pick(torch.arange(1))
    size = max(1, _TOGETHER // (_SETS * first.y.shape[-1]))
    found = [
        _over_chunk(pairs.pick(index), find)
        for index in torch.arange(len(pairs), device=first.y.device).split(size)
    ]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _over_chunk(
    pairs: CellParameters, find: Callable[[CellParameters, Points], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    proposal = _modes(pairs)
    # Rows of one mode, which are most, do not pay for those of several.
    single = (proposal.log_share > -torch.inf).sum(-1) <= 1
    order, found = [], []
    for mask, modes in ((single, 1), (~single, proposal.loc.shape[1])):
        index = mask.nonzero()[:, 0]
        if len(index):
            own = proposal.pick(index)
            own = _Mixture(own.loc[:, :modes], own.scale_tril[:, :modes], own.log_share[:, :modes])
            here, parts = _over_group(pairs.pick(index), own, find)
            order.append(index[here])
            found.append(parts)
    back = torch.cat(order).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(*found, strict=True))


def _over_group(
    pairs: CellParameters,
    proposal: _Mixture,
    find: Callable[[CellParameters, Points], tuple[Tensor, ...]],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The numbers of the pairs in the order of their tensors, and these."""
    active = torch.arange(len(pairs.y), device=pairs.y.device)
    order, found = [], []
    for num in _SIZES:
        left, refitted = [], []
        size = max(1, _BUDGET // (num * (pairs.y.shape[-1] + 2)))
        for part in torch.arange(len(active), device=active.device).split(size):
            here, own = active[part], proposal.pick(part)
            these = pairs.pick(here)
            if num == _SIZES[0]:
                own = _refit(own, *_weigh(these, own, _PILOT))
            points, share = _weigh(these, own, num)
            done = (points.error <= TOLERANCE) | (num == _SIZES[-1])
            order.append(here[done])
            found.append(find(these.pick(done), points.pick(done)))
            if not bool(done.all()):
                refitted.append(_refit(own.pick(~done), points.pick(~done), share[~done]))
                left.append(here[~done])
        if not left:
            break
        active = torch.cat(left)
        proposal = _Mixture(*(torch.cat(parts) for parts in zip(*refitted, strict=True)))
    return torch.cat(order), tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def log_integral(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The log integral ``(p,)`` in nats, and its standard error ``(p,)``."""
    value, error = over_latents(pairs, lambda _, points: (points.log_integral, points.error))
    return value, error


def log_integrand(pairs: CellParameters, latents: Tensor) -> Tensor:
    """Log density of entries and latents ``(p, m, q)`` together, ``(p, m)``."""
    return _log_joint(pairs, latents) + _log_constant(pairs).unsqueeze(-1)
