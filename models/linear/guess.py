"""Where engines start: principal directions, and others around them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.models.linear.medians import median_spread
from bayesgen.models.linear.spectrum import exact_spectrum, probabilistic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayesgen.models.linear.priors import Scales

    Array = NDArray[np.float64]

__all__ = ["guess"]

# How far guesses of one noise are spread, in standard deviations of a column; the least noise.
_JIGGLE, _LEAST = 0.5, 1e-8
# Of a noise for each column: its share of the column's variance to begin with, the powers of ten
# over which others are spread, the least share; steps of the climb, more of them and candidates
# for the first guess up to so many columns, none above the last number.
_SHARE, _DECADES, _UNIQUE = 0.5, 4.0, 1e-6
# Standard deviations at which cells are clipped.
_CLIP = 2.0
_STEPS, _MANY_STEPS, _CANDIDATES, _FEW, _COLUMNS = 30, 150, 24, 50, 500


def guess(
    x: Tensor,
    scales: Scales,
    latent_dim: int,
    num: int,
    *,
    shared: bool,
    robust: str | None = None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``num`` guesses of loadings, mean and noise relative to the offset, from rows ``(n, d)``.

    The first is probabilistic PCA with gaps filled by the mean, or its like with a noise for each
    column; the others are scattered. ``robust`` ones are those of rows of which the farther half
    is pulled back to a sphere around the median (``"rows"``), or of cells that are pulled back to
    a few of their column's standard deviations (``"cells"``), so that outliers have no more say
    than others.
    """
    unit = scales.scale
    centred = x.double() - scales.offset
    filled = torch.nan_to_num(centred, nan=0.0)
    if robust == "cells":
        loc, filled = _clipped(centred)
    else:
        loc = filled.mean(0) if robust is None else filled.median(0).values
    standard = (filled - loc) / unit
    if robust == "rows":
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


def _clipped(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Medians ``(d,)``, and cells no farther from them than a few robust standard deviations.

    References:
        Raymaekers & Rousseeuw (2021). Fast robust correlation for high-dimensional data.
        Technometrics 63.
    """
    loc, spread = median_spread(centred)
    # Where half the cells are equal there is no spread to go by: nothing is clipped.
    width = torch.where(spread > 0, _CLIP * spread, torch.inf)
    filled = torch.where(centred.isnan(), loc, centred)
    return loc, loc + (filled - loc).clamp(-width, width)


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

    Given the noise the best loadings are principal directions, which leaves a function of the
    noise to climb. From noises of different shape that ends near different optima; where columns
    are few, the first guess is the likeliest of many.
    """
    n, d = standard.shape
    matrix = standard.mT @ standard / n
    own = matrix.diagonal().clamp_min(_LEAST)
    total = num + (_CANDIDATES if d <= _FEW else 0)
    power = torch.rand((total, d), generator=generator, device=generator.device, dtype=own.dtype)
    share = 10.0 ** (-_DECADES * power.to(own.device))
    share[0] = _SHARE
    if d <= _COLUMNS:
        scale = own.sqrt()
        climbed = [
            _climb(matrix / (scale * scale.unsqueeze(-1)), one, latent_dim) for one in share
        ]
        share = torch.stack([where for where, _ in climbed])
        best = min(range(total), key=lambda i: climbed[i][1])
        share = torch.cat([share[best : best + 1], share[1:num]])
    variance = own * share
    root = variance.sqrt().unsqueeze(-1)
    values, vectors = torch.linalg.eigh(matrix / (root * root.mT))
    excess = (values[..., -latent_dim:] - 1.0).clamp_min(_LEAST).sqrt()
    return root * vectors[..., -latent_dim:] * excess.unsqueeze(-2), variance


def _climb(correlation: Tensor, share: Tensor, latent_dim: int) -> tuple[Tensor, float]:
    """The noise's share of each column near an optimum, and minus twice its log likelihood.

    References:
        Jöreskog (1967). Some contributions to maximum likelihood factor analysis.
        Psychometrika 32.
    """
    from scipy.optimize import minimize

    matrix, size = correlation.cpu().numpy(), len(share)

    def profile(log_share: Array) -> tuple[float, Array]:
        root = np.exp(0.5 * log_share)
        values, vectors = np.linalg.eigh(matrix / np.outer(root, root))
        # A direction of variance above one is explained; of the others the form is left.
        explained = np.where(np.arange(size) >= size - latent_dim, values > 1.0, False)
        pull = np.where(explained, 1.0, values)
        deviance = log_share.sum() + np.log(values[explained]).sum() + pull.sum()
        return float(deviance), 1.0 - np.square(vectors) @ pull

    found = minimize(
        profile,
        share.log().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(math.log(_UNIQUE), 0.0)] * size,
        options={"maxiter": _MANY_STEPS if size <= _FEW else _STEPS, "maxcor": 20},
    )
    return torch.from_numpy(np.exp(found.x)).to(share), float(found.fun)
