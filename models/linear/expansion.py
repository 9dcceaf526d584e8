r"""Gibbs moves along what the likelihood does not see: the latents' location, shape and rotation.

Given the latents, loadings are known to the noise's precision; given the loadings, so are the
latents. Where the signal is strong, plain Gibbs therefore crawls. But the likelihood depends on
:math:`W z_i + \mu` alone, which for any lower triangular :math:`R` and any :math:`t` equals

.. math::
    (W R^{-1})(R z_i + t) + (\mu - W R^{-1} t),

and the posterior along this group is known up to the prior of the loadings. With :math:`\bar z`
and :math:`S = L L^\top` the mean and scatter of the latents, standard normal latents would have
a new mean :math:`m \sim \mathrm{N}(0, I/n)` and a new factor :math:`T` of their scatter by
Bartlett's decomposition; the move proposes the element that takes the old ones there,
:math:`R = T L^{-1}, t = m - R \bar z`, and accepts it with probability

.. math::
    \min\Bigl(1, |R|^{-d}\,
    \frac{p(W R^{-1}, \mu - W R^{-1} t)}{p(W, \mu)}\Bigr).

It is an independence sampler on the group's orbit (left Haar measure), exact for any prior. The
triangle is ordered by the prior's precisions, so that directions that are switched off are not
mixed into those that live; that order does not depend on what moves. A few directions at a time
are moved so, the others staying where they are. Where rows have scales
:math:`u_i` of their own and :math:`z_i \sim \mathrm{N}(0, I / u_i)`, means and scatter are
weighted by them and :math:`m \sim \mathrm{N}(0, I / \sum_i u_i)`, but Bartlett's degrees of
freedom still count rows.

Rotations have a move of their own, since those of the triangle are small and a prior with learned
precisions holds columns where they are: pairs of directions are turned by a uniform angle, and the
turn is judged by the prior with the precisions integrated out.

References:
    Liu & Sabatti (2000). Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian
    computation. Biometrika 87. Ghosh & Dunson (2009). Default prior distributions and efficient
    posterior computation in Bayesian factor analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions._low_rank import pack, unpack

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["expand_latents", "rotate_latents"]


_BLOCK = 4  # directions moved at once: many would rarely be accepted together


class _Element(NamedTuple):
    """A group element by chain."""

    matrix: Tensor
    """``R``, ``(..., q, q)``."""
    shift: Tensor
    """``t``, ``(..., q, 1)``."""
    log_det: Tensor
    """``(...)``."""


def expand_latents(
    statistics: Tensors,
    loadings: Tensor,
    log_prior: Callable[[Tensor], Tensor],
    order: Tensor,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Statistics of the latents after the move; where it is refused, as they were.

    The loadings that go with them are not returned: they are drawn next, given the statistics.

    Args:
        statistics: Of drawn latents, as :class:`~bayesgen.models.linear.latents.Latents` has them.
        loadings: Augmented loadings ``(..., d, q + 1)`` under which they were drawn.
        log_prior: Log prior density of augmented loadings, ``(...)``, up to a constant.
        order: Permutation ``(..., q)`` of the directions, independent of what moves.
        generator: Source of randomness.
    """
    size, d = loadings.shape[-1], loadings.shape[-2]
    moments = unpack(statistics["latent"], size)
    count = statistics.get("rows", moments[..., -1, -1:])
    if float(count.min()) <= size:
        return dict(statistics)  # too few rows for a scatter of full rank
    place, total = order.argsort(-1), _eye(moments).expand(moments.shape)
    shuffled = torch.rand(size - 1, generator=generator, device=loadings.device).argsort()
    for block in shuffled.split(_BLOCK):
        inside = torch.cat([block, block.new_tensor([size - 1])])
        part = moments[..., inside, :][..., inside]
        element = _propose(part, count, place[..., block].argsort(-1), generator)
        weights = torch.linalg.solve(element.matrix.mT, loadings[..., block].mT).mT
        moved = loadings.clone()
        moved[..., block] = weights
        moved[..., -1:] -= weights @ element.shift
        ratio = log_prior(moved) - log_prior(loadings) - d * element.log_det
        uniform = torch.rand(
            ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device
        )
        accepted = (uniform.log() < ratio)[..., None, None]
        matrix = _eye(moments).repeat(*ratio.shape, 1, 1)
        matrix[..., block[:, None], block] = element.matrix
        matrix[..., block, -1] = element.shift.squeeze(-1)
        matrix = torch.where(accepted, matrix, _eye(moments))
        loadings = torch.where(accepted, moved, loadings)
        moments, total = matrix @ moments @ matrix.mT, matrix @ total
    return _mapped(statistics, total)


def _mapped(statistics: Tensors, matrix: Tensor) -> dict[str, Tensor]:
    """Statistics of the latents ``matrix @ (z, 1)``."""
    size, each = matrix.shape[-1], matrix.unsqueeze(-3)
    return {
        **statistics,
        "latent": pack(matrix @ unpack(statistics["latent"], size) @ matrix.mT),
        "second": pack(each @ unpack(statistics["second"], size) @ each.mT),
        "cross": statistics["cross"] @ matrix.mT,
    }


def rotate_latents(
    statistics: Tensors,
    loadings: Tensor,
    log_prior: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and augmented loadings after random pairs of directions have been turned.

    Args:
        statistics: Of drawn latents.
        loadings: Augmented loadings ``(..., d, q + 1)``.
        log_prior: Log prior density, up to a constant, of columns of loadings by their squared
            lengths ``(..., q)``: ``(..., q)``.
        generator: Source of randomness.
    """
    lead, q = loadings.shape[:-2], loadings.shape[-1] - 1
    pairs = q // 2
    if pairs == 0:
        return dict(statistics), loadings
    where: dict[str, Any] = {"dtype": loadings.dtype, "device": loadings.device}
    order = torch.rand((*lead, q), generator=generator, **where).argsort(-1)
    angle = 2.0 * math.pi * torch.rand((*lead, pairs), generator=generator, **where)
    cosine, sine = angle.cos(), angle.sin()
    blocks = torch.eye(q, **where).repeat(*lead, 1, 1)
    even = torch.arange(0, 2 * pairs, 2, device=loadings.device)
    odd = even + 1
    blocks[..., even, even] = blocks[..., odd, odd] = cosine
    blocks[..., even, odd], blocks[..., odd, even] = sine, -sine
    places = torch.nn.functional.one_hot(order, q).to(loadings.dtype)
    weights = loadings[..., :-1] @ places.mT  # columns in the order of the pairs
    before = log_prior((weights @ places).square().sum(-2))
    after = log_prior((weights @ blocks @ places).square().sum(-2))
    gain = (places @ (after - before).unsqueeze(-1)).squeeze(-1)[..., : 2 * pairs]
    ratio = gain.unflatten(-1, (pairs, 2)).sum(-1)
    uniform = torch.rand(ratio.shape, generator=generator, **where)
    refused = (uniform.log() >= ratio).repeat_interleave(2, -1)
    refused = torch.nn.functional.pad(refused, (0, q - 2 * pairs))
    blocks = torch.where(refused.unsqueeze(-2), torch.eye(q, **where), blocks)
    turn = torch.eye(q + 1, **where).repeat(*lead, 1, 1)
    turn[..., :q, :q] = places.mT @ blocks @ places
    return _mapped(statistics, turn.mT), loadings @ turn


def _propose(
    moments: Tensor, count: Tensor, order: Tensor, generator: torch.Generator
) -> _Element:
    """The element that gives the latents of ``count (..., 1)`` rows a fresh mean and scatter."""
    q = moments.shape[-1] - 1
    mass = moments[..., -1:, -1:]
    mean = moments[..., :q, -1:] / mass
    scatter = moments[..., :q, :q] - mass * mean @ mean.mT
    places = torch.nn.functional.one_hot(order, q).to(moments.dtype)
    tril = torch.linalg.cholesky(places @ scatter @ places.mT)
    degrees = count - torch.arange(1, q + 1, dtype=count.dtype, device=count.device)
    diagonal = rng.chi2(degrees, generator).sqrt()
    below = rng.standard_normal(tril.shape, generator, moments.dtype, moments.device).tril(-1)
    fresh = below + torch.diag_embed(diagonal)
    inside = torch.linalg.solve_triangular(tril.mT, fresh.mT, upper=True).mT  # T L^-1
    matrix = places.mT @ inside @ places
    noise = rng.standard_normal(mean.shape, generator, moments.dtype, moments.device)
    log_det = (diagonal.log() - tril.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return _Element(matrix, noise / mass.sqrt() - matrix @ mean, log_det)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
