r"""A Gibbs move along what the likelihood does not see: location, scale and shear of the latents.

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
mixed into those that live; that order does not depend on what moves. Where rows have scales
:math:`u_i` of their own and :math:`z_i \sim \mathrm{N}(0, I / u_i)`, means and scatter are
weighted by them and :math:`m \sim \mathrm{N}(0, I / \sum_i u_i)`, but Bartlett's degrees of
freedom still count rows.

References:
    Liu & Sabatti (2000). Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian
    computation. Biometrika 87. Ghosh & Dunson (2009). Default prior distributions and efficient
    posterior computation in Bayesian factor analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions._low_rank import pack, unpack

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["expand_latents"]


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
    element = _propose(moments, count, order, generator)
    weights = torch.linalg.solve(element.matrix.mT, loadings[..., :-1].mT).mT
    moved = torch.cat([weights, loadings[..., -1:] - weights @ element.shift], -1)
    ratio = log_prior(moved) - log_prior(loadings) - d * element.log_det
    uniform = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
    accepted = uniform.log() < ratio
    matrix = torch.where(accepted[..., None, None], _affine(element), _eye(moments))
    each = matrix.unsqueeze(-3)
    return {
        **statistics,
        "latent": pack(matrix @ moments @ matrix.mT),
        "second": pack(each @ unpack(statistics["second"], size) @ each.mT),
        "cross": statistics["cross"] @ matrix.mT,
    }


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


def _affine(element: _Element) -> Tensor:
    """``(R z + t, 1)`` as a matrix on ``(z, 1)``."""
    top = torch.cat([element.matrix, element.shift], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., -1] = 1.0
    return torch.cat([top, bottom], -2)
