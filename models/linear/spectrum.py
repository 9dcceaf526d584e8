r"""The maximum of the likelihood of probabilistic PCA in closed form, exact or randomised.

.. math::
    \sigma^2 = \frac{1}{d - q} \sum_{k > q} l_k, \qquad
    W = U_q (L_q - \sigma^2 I)^{1/2},

with the eigenvalues :math:`l_k` and eigenvectors of the covariance (divided by ``n``). Either from
the matrix of second moments, in one pass; or, when that is too large, from a random subspace that
a few passes of multiplication turn towards the leading directions.

References:
    Tipping & Bishop (1999). Probabilistic principal component analysis. Halko, Martinsson & Tropp
    (2011). Finding structure with randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgen import rng

__all__ = ["Spectrum", "exact_spectrum", "probabilistic", "randomised_spectrum"]

_EXTRA, _ITERATIONS = 10, 5

Passes = Callable[[], Iterable[Tensor]]


class Spectrum(NamedTuple):
    """Leading eigenvalues of a covariance, with what is left."""

    values: Tensor
    """``(q,)``, decreasing."""
    vectors: Tensor
    """``(d, q)``."""
    rest: Tensor
    """Sum of all other eigenvalues, ``()``."""


def exact_spectrum(matrix: Tensor, count: Tensor, num: int, *, is_root: bool) -> Spectrum:
    """From the sum of centred outer products ``(d, d)``, or from the centred rows ``(n, d)``."""
    if is_root:
        _, roots, vectors = torch.linalg.svd(matrix, full_matrices=False)
        values, vectors = roots.square() / count, vectors.mT
        short = max(0, num - len(values))
        if short:
            values = torch.nn.functional.pad(values, (0, short))
            vectors = torch.nn.functional.pad(vectors, (0, short))
    else:
        values, vectors = torch.linalg.eigh(matrix / count)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(-1)
    return Spectrum(values[:num], vectors[:, :num], values[num:].sum())


def randomised_spectrum(
    passes: Passes,
    centre: Tensor,
    total: Tensor,
    count: Tensor,
    num: int,
    *,
    generator: torch.Generator,
) -> Spectrum:
    """By subspace iteration: ``total`` is the sum of all eigenvalues, ``(n, d)`` stay in batches.

    A pass multiplies a ``(d, num + 10)`` basis by the covariance; the last one projects on it.
    """
    width = min(num + _EXTRA, len(centre))
    basis = rng.standard_normal((len(centre), width), generator, device=centre.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(_multiply(passes, centre, basis)).Q
    product = _multiply(passes, centre, basis) / count
    values, inside = torch.linalg.eigh(basis.mT @ product)
    values, vectors = values.flip(0)[:num].clamp_min(0.0), (basis @ inside.flip(-1))[:, :num]
    return Spectrum(values, vectors, (total - values.sum()).clamp_min(0.0))


def _multiply(passes: Passes, centre: Tensor, basis: Tensor) -> Tensor:
    out = torch.zeros_like(basis)
    for rows in passes():
        centred = rows - centre
        out += centred.mT @ (centred @ basis)
    return out


def probabilistic(spectrum: Spectrum, num_columns: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Loadings ``(d, q)`` and the variance of the noise, no smaller than ``floor``.

    The sign of each column is that which makes its largest loading positive.
    """
    values, vectors, rest = spectrum
    variance = torch.maximum(rest / (num_columns - len(values)), floor)
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed = vectors * torch.where(peak < 0, -1.0, 1.0)
    return signed * (values - variance).clamp_min(0.0).sqrt(), variance
