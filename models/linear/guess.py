"""Where engines start: principal directions, and others around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.models.linear.spectrum import exact_spectrum, probabilistic

if TYPE_CHECKING:
    from bayesgen.models.linear.priors import Scales

__all__ = ["guess"]

# How far guesses of one noise are spread, in standard deviations of a column; the least noise.
_JIGGLE, _LEAST = 0.5, 1e-8
# Of a noise for each column: its share of the column's variance to begin with, the powers of ten
# over which others are spread, rounds of turns, columns up to which they take no time, the least
# share.
_SHARE, _DECADES, _ROUNDS, _COLUMNS, _UNIQUE = 0.5, 3.0, 50, 500, 1e-4


def guess(
    x: Tensor,
    scales: Scales,
    latent_dim: int,
    num: int,
    *,
    shared: bool,
    robust: bool = False,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``num`` guesses of loadings, mean and noise relative to the offset, from rows ``(n, d)``.

    The first is probabilistic PCA with gaps filled by the mean, or its like with a noise for each
    column; the others are scattered. ``robust`` ones are those of rows of which the farther half
    is pulled back to a sphere around the median, so that outliers have no more say than others.
    """
    unit = scales.scale
    filled = torch.nan_to_num(x.double() - scales.offset, nan=0.0)
    loc = filled.median(0).values if robust else filled.mean(0)
    standard = (filled - loc) / unit
    if robust:
        length = standard.square().sum(-1, keepdim=True).sqrt()
        standard = standard * (length.median() / length.clamp_min(_LEAST)).clamp_max(1.0)
    if shared:
        loadings, variance = _principal(standard, latent_dim)
        noise = rng.standard_normal((num, *loadings.shape), generator, device=loadings.device)
        noise[0] = 0.0
        loadings = loadings + _JIGGLE * noise
        variance = variance.expand(num, 1)
    else:
        loadings, variance = _factors(standard, latent_dim, num, generator)
    return {
        "loadings": loadings * unit.unsqueeze(-1),
        "loc": loc.expand(num, -1),
        "variance": variance * unit.square()[: variance.shape[-1]],
    }


def _principal(centred: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Loadings ``(d, q)`` and noise variance of probabilistic PCA."""
    n, d = centred.shape
    is_root = n < d
    matrix = centred if is_root else centred.mT @ centred
    spectrum = exact_spectrum(matrix, centred.new_tensor(float(n)), latent_dim, is_root=is_root)
    # A direction without loadings, or no noise at all, is a point that EM would never leave.
    floor = (_LEAST * spectrum.values[0]).clamp_min(_LEAST**2)
    loadings, variance = probabilistic(spectrum, d, floor)
    shortest = (_LEAST * variance).sqrt()
    short = loadings.square().sum(0).sqrt() < shortest
    return torch.where(short, shortest * spectrum.vectors, loadings), variance


def _factors(
    standard: Tensor, latent_dim: int, num: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loadings ``(num, d, q)`` and noise variances ``(num, d)`` of factor analysis.

    Given the noise the best loadings are principal directions; given these the noise is what they
    leave. A few such turns from noises of different shape end near different optima.
    """
    n, d = standard.shape
    matrix = standard.mT @ standard / n
    own = matrix.diagonal().clamp_min(_LEAST)
    power = torch.rand((num, d), generator=generator, device=generator.device, dtype=own.dtype)
    variance = own * 10.0 ** (-_DECADES * power.to(own.device))
    variance[0] = _SHARE * own
    loadings = variance.new_zeros((num, d, latent_dim))
    for _ in range(_ROUNDS if d <= _COLUMNS else 1):
        root = variance.sqrt().unsqueeze(-1)
        values, vectors = torch.linalg.eigh(matrix / (root * root.mT))
        excess = (values[..., -latent_dim:] - 1.0).clamp_min(_LEAST).sqrt()
        loadings = root * vectors[..., -latent_dim:] * excess.unsqueeze(-2)
        variance = torch.maximum(own - loadings.square().sum(-1), _UNIQUE * own)
    return loadings, variance
