r"""The local step of linear models: the latent of each row given a message about the loadings.

The augmented loadings :math:`\lambda_j = (w_j, \mu_j)` of a column and its noise precision
:math:`\tau_j` reach a row through

.. math::
    G_j = E[\tau_j \lambda_j \lambda_j^\top], \quad \ell_j = E[\tau_j \lambda_j], \quad
    E[\tau_j], \quad E[\log \tau_j];

at fixed values the expectations are plain products. Given the observed columns of a row
its latent is Gaussian with precision :math:`M_i = I + \sum_j G_j^{zz}` and mean
:math:`M_i^{-1} \sum_j (x_{ij} \ell_j^z - G_j^{z\mu})`. Complete rows share :math:`M`, and all that
is asked of them follows from their sums; a Gibbs draw included, since noise enters only through
its projection on the rows, whose law is a matrix normal and a Wishart.

References:
    Tipping & Bishop (1999). Probabilistic principal component analysis. Ilin & Raiko (2010).
    Practical approaches to principal component analysis in the presence of missing values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions._low_rank import pack, pack_outer, unpack

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.models.linear.rows import Rows, Sums

__all__ = ["Latents", "from_rows", "from_sums", "inner"]

_LOG_2PI = math.log(2.0 * math.pi)


class Latents(NamedTuple):
    """What a local step gives back."""

    statistics: dict[str, Tensor]
    """``second (..., 1 or d, p)`` and ``latent (..., p)``: packed second moments of ``(z, 1)``, by
    observed column and of all rows; ``cross (..., d, q + 1)``; ``square`` and ``count``, ``(...,
    d)``."""
    bound: Tensor
    """``(...)`` in nats."""


class _Parts(NamedTuple):
    """A Gram matrix of the augmented loadings, or a packed batch of them."""

    latent: Tensor
    """``(..., q, q)``."""
    cross: Tensor
    """``(..., q)``, latent by mean."""
    mean: Tensor
    """``(...)``, mean by mean."""


def _parts(packed: Tensor, size: int) -> _Parts:
    # Upper triangles row by row: the last entry of each row belongs to the mean.
    last = (size - torch.arange(size - 1, device=packed.device)).cumsum(0) - 1
    latent = unpack(packed, size, leading=size - 1)
    return _Parts(latent, packed.index_select(-1, last), packed[..., -1])


def _precision(gram: Tensor) -> Tensor:
    """Cholesky factor of ``I + gram``."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + eye)


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for rows ``(n, d)`` and ``(..., d, k)``, as one product of two matrices.

    A batched product of the same numbers takes several times as long.
    """
    if left.dim() > 2 or right.dim() == 2:
        return left @ right
    lead, (d, k) = right.shape[:-2], right.shape[-2:]
    folded = right.reshape(-1, d, k).movedim(0, 1).reshape(d, -1)
    return (left @ folded).reshape(len(left), -1, k).movedim(1, 0).reshape(*lead, len(left), k)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _second(latent: Tensor, cross: Tensor, mean: Tensor) -> Tensor:
    """Packed second moments of ``(z, 1)`` from those of ``z``, its sum, and the number of ones."""
    top = torch.cat([latent, cross.unsqueeze(-1)], -1)
    bottom = torch.cat([cross, mean.unsqueeze(-1)], -1).unsqueeze(-2)
    return pack(torch.cat([top, bottom], -2))


# ------------------------------------------------------------ complete rows, by their sums
def from_sums(
    sums: Sums, message: Tensors, *, generator: torch.Generator | None = None
) -> Latents:
    """The local step of complete rows: ``O(d^2 q)`` operations, however many rows there are."""
    size = message["linear"].shape[-1]
    gram = _parts(message["gram"].sum(-2), size)
    tril = _precision(gram.latent)
    covariance = torch.cholesky_inverse(tril)
    slope, shift = message["linear"][..., : size - 1], gram.cross
    projected = sums.times(slope)
    cross = projected - _outer(sums.total, shift)
    along = (slope * sums.total.unsqueeze(-1)).sum(-2)
    total = along - sums.count * shift
    mixed = _outer(along, shift)
    second = slope.mT @ projected - mixed - mixed.mT + sums.count * _outer(shift, shift)
    bound = _fixed_bound(message, sums, gram.mean) + 0.5 * (covariance * second).sum((-2, -1))
    bound = bound - sums.count * _log_diagonal(tril)
    mean = (covariance @ total.unsqueeze(-1)).squeeze(-1)
    outer = covariance @ second @ covariance
    cross = cross @ covariance
    if generator is None:
        outer = outer + sums.count * covariance
    else:
        noise = _projected_noise(sums, tril, generator)
        crossed = covariance @ (slope.mT @ noise.rows - _outer(shift, noise.total))
        outer = outer + crossed + crossed.mT + noise.outer
        mean, cross = mean + noise.total, cross + noise.rows
    lead = mean.shape[:-1]
    packed = _second(outer, mean, sums.count.expand(lead))
    d = len(sums.total)
    statistics = {
        "second": packed.unsqueeze(-2),
        "latent": packed,
        "cross": torch.cat([cross, sums.total.expand(*lead, d).unsqueeze(-1)], -1),
        "square": sums.squares.expand(*lead, d),
        "count": sums.count.expand(*lead, d),
    }
    return Latents(statistics, bound)


def _fixed_bound(message: Tensors, sums: Sums, mean: Tensor) -> Tensor:
    """What does not involve the latents."""
    normaliser = 0.5 * (message["log_precision"] - _LOG_2PI).sum(-1) * sums.count
    square = 0.5 * (message["precision"] * sums.squares).sum(-1)
    linear = (message["linear"][..., -1] * sums.total).sum(-1)
    return normaliser - square + linear - 0.5 * sums.count * mean


class _Noise(NamedTuple):
    """Sums over rows of the noise of their latents, by itself and with the rows."""

    rows: Tensor
    """``(..., d, q)``."""
    total: Tensor
    """``(..., q)``."""
    outer: Tensor
    """``(..., q, q)``."""


def _projected_noise(sums: Sums, tril: Tensor, generator: torch.Generator) -> _Noise:
    r"""Sums of :math:`\epsilon_i \sim N(0, M^{-1})`, drawn without drawing any of them.

    With an orthonormal basis of the rows' column space, the noise within it is iid normal, and
    the rest enters only through its Gram matrix, a Wishart.
    """
    root = sums.root
    rank, lead, q = len(root), tril.shape[:-2], tril.shape[-1]
    inside = rng.standard_normal((*lead, rank, q), generator, device=root.device)
    crossed = root.mT @ inside
    outer = inside.mT @ inside + _wishart(int(sums.count) - rank, lead, q, generator, root)
    # White noise e becomes M^(-1/2) e: on the right by the inverse of the factor.
    unit = torch.eye(q, dtype=tril.dtype, device=tril.device)
    inverse = torch.linalg.solve_triangular(tril, unit.expand(tril.shape), upper=False)
    return _Noise(
        crossed[..., :-1, :] @ inverse,
        (crossed[..., -1:, :] @ inverse).squeeze(-2),
        inverse.mT @ outer @ inverse,
    )


def _wishart(
    df: int, lead: torch.Size, size: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Draws ``(*lead, size, size)`` of a standard Wishart by Bartlett; singular below ``size``."""
    if df < size:
        noise = rng.standard_normal((*lead, max(df, 0), size), generator, device=like.device)
        return noise.mT @ noise
    degrees = float(df) - torch.arange(size, dtype=torch.float64, device=like.device)
    diagonal = rng.chi2(degrees.expand(*lead, size), generator).sqrt()
    below = rng.standard_normal((*lead, size, size), generator, device=like.device).tril(-1)
    factor = below + torch.diag_embed(diagonal)
    return factor @ factor.mT


# ------------------------------------------------------------ rows one by one
class _Posterior(NamedTuple):
    """The latents of rows given a message."""

    mean: Tensor
    """``(..., n, q)``."""
    tril: Tensor
    """Cholesky factor of their precision, ``(..., n, q, q)``; ``n = 1`` where all rows share it.
    """
    explained: Tensor
    """What the latents take off the rows' squared distances, less the means', ``(..., n)``."""


def _posterior(rows: Rows, message: Tensors) -> _Posterior:
    size, dtype = message["linear"].shape[-1], rows.values.dtype
    q, packed = size - 1, message["gram"].to(dtype)
    pull = _times(rows.values, message["linear"][..., :q].to(dtype))
    if rows.weight is None:
        gram = _parts(packed.sum(-2, keepdim=True), size)
        tril = _precision(gram.latent)
        pull = pull - gram.cross
        mean = torch.cholesky_solve(pull.mT, tril.squeeze(-3)).mT
    else:
        gram = _parts(_times(rows.weight, packed), size)
        tril = _precision(gram.latent)
        pull = pull - gram.cross
        mean = torch.cholesky_solve(pull.unsqueeze(-1), tril).squeeze(-1)
    return _Posterior(mean, tril, (pull * mean).sum(-1) - gram.mean)


def from_rows(
    rows: Rows, message: Tensors, *, generator: torch.Generator | None = None
) -> Latents:
    """The local step row by row: with gaps, two matrix products and a small factor for each row.

    With ``df`` in the message each row has a scale of its own: ``u ~ Gamma(df / 2, df / 2)``
    multiplies its precisions, its latent's included. Statistics are then weighted by it, and
    ``rows``, ``scale``, ``log_scale`` and ``volume`` ``(..., 1)`` are sums over rows of 1, ``u``,
    ``log u``, and ``log u`` times half the number of observed entries and latents.
    """
    found = _posterior(rows, message)
    if "df" in message:
        return _scaled(rows, message, found, generator)
    mean = found.mean if generator is None else _draw(found, None, generator)
    covariance = torch.cholesky_inverse(found.tril) if generator is None else None
    one = torch.ones_like(mean[..., :1])
    statistics = _moments(rows, mean, one, covariance)
    lead = mean.shape[:-2]
    statistics["square"] = rows.square.expand(*lead, -1)
    statistics["count"] = rows.observed.expand(*lead, -1)
    distance = (
        message["precision"] * rows.square - 2.0 * message["linear"][..., -1] * rows.total
    ).sum(-1) - found.explained.double().sum(-1)
    normaliser = (0.5 * (message["log_precision"] - _LOG_2PI) * rows.observed).sum(-1)
    n = mean.shape[-2] if rows.weight is None else 1
    log_det = n * _log_diagonal(found.tril).double().sum(-1)
    return Latents(statistics, normaliser - 0.5 * distance - log_det)


def _draw(found: _Posterior, scale: Tensor | None, generator: torch.Generator) -> Tensor:
    """Latents drawn from their posterior, given the rows' scales."""
    mean = found.mean
    noise = rng.standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)
    noise = noise if scale is None else noise * scale.rsqrt().unsqueeze(-1)
    step = torch.linalg.solve_triangular(found.tril.mT, noise.unsqueeze(-1), upper=True)
    return mean + step.squeeze(-1)


def _moments(
    rows: Rows, mean: Tensor, scale: Tensor, covariance: Tensor | None
) -> dict[str, Tensor]:
    """Second moments of latents ``mean`` whose covariance is ``covariance / scale (..., n, 1)``.

    No covariance counts as none.
    """
    scaled = scale * mean
    if rows.weight is None:
        outer = scaled.mT @ mean
        if covariance is not None:
            outer = outer + mean.shape[-2] * covariance.squeeze(-3)
        sums = scaled.double().sum(-2), scale.double().sum((-2, -1))
        latent = _second(outer.double(), *sums)
        second = latent.unsqueeze(-2)
    else:
        packed = pack_outer(torch.cat([mean, torch.ones_like(scale)], -1)) * scale
        if covariance is not None:
            packed = packed + pack(torch.nn.functional.pad(covariance, (0, 1, 0, 1)))
        second = _times(rows.weight.mT, packed).double()
        latent = packed.double().sum(-2)
    cross = _times(rows.values.mT, torch.cat([scaled, scale], -1)).double()
    return {"second": second, "latent": latent, "cross": cross}


def _scaled(
    rows: Rows, message: Tensors, found: _Posterior, generator: torch.Generator | None
) -> Latents:
    """Rows with scales of their own, whose law given the row is a Gamma."""
    dtype, q = rows.values.dtype, found.mean.shape[-1]
    square = rows.values.square()
    precision, along = message["precision"].to(dtype), message["linear"][..., -1:].to(dtype)
    distance = _times(square, precision.unsqueeze(-1)) - 2.0 * _times(rows.values, along)
    distance = (distance.squeeze(-1) - found.explained).clamp_min(0.0)
    constant = 0.5 * (message["log_precision"] - _LOG_2PI).to(dtype)
    if rows.weight is None:
        constant = constant.sum(-1, keepdim=True)
        size = distance.new_full((), float(rows.values.shape[-1]))
    else:
        constant = _times(rows.weight, constant.unsqueeze(-1)).squeeze(-1)
        size = rows.weight.sum(-1)
    df = message["df"].to(dtype)
    power, rate = (0.5 * (df + size)).expand(distance.shape), 0.5 * (df + distance)
    scores = (
        constant
        - _log_diagonal(found.tril)
        + message["df_constant"].to(dtype)
        + torch.lgamma(power)
        - power * rate.log()
    )
    if generator is None:
        scale, log_scale = power / rate, torch.digamma(power) - rate.log()
        mean, covariance = found.mean, torch.cholesky_inverse(found.tril)
    else:
        log_scale = rng.log_gamma_sample(power, generator) - rate.log()
        scale = log_scale.exp()
        mean, covariance = _draw(found, scale, generator), None
    sums = {
        "rows": torch.ones_like(scale),
        "scale": scale,
        "log_scale": log_scale,
        "volume": 0.5 * (size + q) * log_scale,
    }
    statistics = {
        **_moments(rows, mean, scale.unsqueeze(-1), covariance),
        "square": (scale.unsqueeze(-2) @ square).squeeze(-2).double(),
        "count": rows.observed.expand(*scale.shape[:-1], -1),
        **{name: value.double().sum(-1, keepdim=True) for name, value in sums.items()},
    }
    return Latents(statistics, scores.double().sum(-1))


def inner(message: Tensors, statistics: Mapping[str, Tensor]) -> Tensor:
    """Expected complete-data log density that the statistics carry, ``(...)``: linear in them."""
    size = message["linear"].shape[-1]
    likelihood = (
        0.5 * statistics["count"] * (message["log_precision"] - _LOG_2PI)
        - 0.5 * statistics["square"] * message["precision"]
        + (message["linear"] * statistics["cross"]).sum(-1)
    ).sum(-1)
    product = unpack(message["gram"], size) * unpack(statistics["second"], size)
    latent = _parts(statistics["latent"], size)
    spread = latent.latent.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = likelihood - 0.5 * product.sum((-3, -2, -1)) - 0.5 * spread
    if "df" not in message:
        return total - 0.5 * (size - 1) * _LOG_2PI * latent.mean
    half = 0.5 * message["df"]
    # As many scales as rows, or as observed cells.
    count = statistics.get("rows", statistics["count"])
    scales = (
        (message["df_constant"] - 0.5 * (size - 1) * _LOG_2PI) * count
        + statistics["volume"]
        + (half - 1.0) * statistics["log_scale"]
        - half * statistics["scale"]
    )
    return total + scales.sum(-1)
