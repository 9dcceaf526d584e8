r"""The local step of linear models whose every cell has a scale of its own.

.. math::
    z_i \sim \mathrm{N}(0, I), \quad u_{ij} \sim \mathrm{Gamma}(\nu_j / 2, \nu_j / 2), \quad
    x_{ij} \mid z_i, u_{ij} \sim \mathrm{N}(w_j^\top z_i + \mu_j, \sigma^2 / u_{ij})

Given the scales of its cells a row's latent is normal; given the latent the scales are independent
Gammas; together they have no law of their own. Expectations are those of the best product
:math:`q(z_i) \prod_j q(u_{ij})`, found by coordinate ascent; draws alternate. Either way a step
goes on from the scales that the last one left.

With the scales at their best the bound has :math:`E_q[(x_{ij} - w_j^\top z_i - \mu_j)^2]` where
the log density of a Student-t has the square itself: it lies below the log likelihood by Jensen's
inequality for the concave :math:`\log(1 + r^2 / \nu)`, and by what the latent's law differs from a
normal.

References:
    Luttinen, Ilin & Karhunen (2012). Bayesian robust PCA of incomplete data. Neural Processing
    Letters 36.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions._low_rank import pack, pack_outer, unpack
from bayesgen.models.linear.latents import Latents

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.models.linear.rows import Rows

__all__ = ["Cells", "from_cells"]

_LOG_2PI = math.log(2.0 * math.pi)
# Rounds of coordinate ascent of a step that goes on, and of one that starts.
_ROUNDS, _FIRST_ROUNDS = 2, 10


class Cells(NamedTuple):
    """What the local step gives back."""

    found: Latents
    """Statistics as those of rows with scales, but ``scale``, ``log_scale`` and ``volume`` are
    ``(..., d)``, by column, and ``latent`` is not weighted."""
    scales: Tensor
    """Scales of the cells, ``(..., n, d)``, zero where missing: where the next step goes on."""


class _Law(NamedTuple):
    """Latents given the scales of the cells."""

    mean: Tensor
    """``(..., n, q)``."""
    tril: Tensor
    """Cholesky factors of the precisions, ``(..., n, q, q)``."""


class _Step:
    """The batch and the message in one precision, and the two halves of a round."""

    def __init__(self, rows: Rows, message: Tensors) -> None:
        values = rows.values
        self.values, self.size = values, message["linear"].shape[-1]
        self.observed = torch.ones_like(values) if rows.weight is None else rows.weight
        names = ("gram", "linear", "precision", "log_precision", "df", "df_constant")
        moved = {name: message[name].to(values.dtype) for name in names}
        self.gram, self.linear = moved["gram"], moved["linear"]
        self.precision, self.log_precision = moved["precision"], moved["log_precision"]
        # A leading dimension of starts or chains comes before that of the rows.
        self.df, self.df_constant = moved["df"].unsqueeze(-2), moved["df_constant"]
        twice = 2.0 - torch.eye(self.size, dtype=values.dtype, device=values.device)
        self.folded = self.gram * pack(twice)

    def latents(self, scales: Tensor) -> _Law:
        """Latents ``(..., n, q)`` given the scales of the cells ``(..., n, d)``."""
        q = self.size - 1
        gram = unpack(scales @ self.gram, self.size)
        eye = torch.eye(q, dtype=gram.dtype, device=gram.device)
        tril = torch.linalg.cholesky(gram[..., :q, :q] + eye)
        pull = (scales * self.values) @ self.linear[..., :q] - gram[..., :q, q]
        return _Law(torch.cholesky_solve(pull.unsqueeze(-1), tril).squeeze(-1), tril)

    def second(self, mean: Tensor, covariance: Tensor | None) -> Tensor:
        """Packed second moments of ``(z, 1)``, ``(..., n, p)``."""
        packed = pack_outer(torch.cat([mean, torch.ones_like(mean[..., :1])], -1))
        if covariance is None:
            return packed
        return packed + pack(torch.nn.functional.pad(covariance, (0, 1, 0, 1)))

    def distance(self, mean: Tensor, second: Tensor) -> Tensor:
        """Expected squared residuals in units of the noise, ``(..., n, d)``."""
        one = torch.cat([mean, torch.ones_like(mean[..., :1])], -1)
        fitted = second @ self.folded.mT
        crossed = self.values * (one @ self.linear.mT)
        square = self.precision.unsqueeze(-2) * self.values.square()
        return (square - 2.0 * crossed + fitted).clamp_min(0.0)

    def expected(self, distance: Tensor) -> Tensor:
        """Expected scales of cells."""
        return self.observed * (self.df + 1.0) / (self.df + distance)

    def first(self) -> Tensor:
        """Scales given latents at their prior, then some rounds of ascent."""
        q, lead = self.size - 1, self.linear.shape[:-2]
        mean = self.values.new_zeros((*lead, self.values.shape[-2], q))
        eye = torch.eye(q, dtype=mean.dtype, device=mean.device)
        scales = self.expected(self.distance(mean, self.second(mean, eye)))
        return self.rounds(scales, _FIRST_ROUNDS)

    def rounds(self, scales: Tensor, num: int) -> Tensor:
        """Scales after rounds of coordinate ascent."""
        for _ in range(num):
            law = self.latents(scales)
            second = self.second(law.mean, torch.cholesky_inverse(law.tril))
            scales = self.expected(self.distance(law.mean, second))
        return scales


def from_cells(
    rows: Rows,
    message: Tensors,
    scales: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Cells:
    """The local step: expectations of a batch, or with ``generator`` draws.

    Args:
        rows: The batch, in one precision.
        message: What the block of the loadings and of the degrees of freedom says.
        scales: What the last step left; None to start from the message alone.
        generator: Source of the draws. The bound is then the log density of rows and latents
            together, the cells' scales integrated out.
    """
    step = _Step(rows, message)
    if scales is None:
        scales = step.first()
    elif generator is None:
        scales = step.rounds(scales, _ROUNDS - 1)
    law = step.latents(scales)
    if generator is None:
        mean, covariance = law.mean, torch.cholesky_inverse(law.tril)
    else:
        mean, covariance = _draw(law, generator), None
    second = step.second(mean, covariance)
    rate = 0.5 * (step.df + step.distance(mean, second))
    power = (0.5 * (step.df + 1.0)).expand(rate.shape)
    if generator is None:
        log_scale = torch.digamma(power) - rate.log()
        scales = power / rate
    else:
        log_scale = rng.log_gamma_sample(power, generator) - rate.log()
        scales = log_scale.exp()
    scales, log_scale = scales * step.observed, log_scale * step.observed
    bound = _bound(step, rows, power, rate) + _of_latents(second, law, covariance)
    return Cells(Latents(_statistics(step, rows, mean, second, scales, log_scale), bound), scales)


def _draw(law: _Law, generator: torch.Generator) -> Tensor:
    mean = law.mean
    noise = rng.standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)
    step = torch.linalg.solve_triangular(law.tril.mT, noise.unsqueeze(-1), upper=True)
    return mean + step.squeeze(-1)


def _bound(step: _Step, rows: Rows, power: Tensor, rate: Tensor) -> Tensor:
    """Of the cells, their scales at their best or integrated out, ``(...)``."""
    constant = 0.5 * (step.log_precision - _LOG_2PI) + step.df_constant
    each = (torch.lgamma(power) - power * rate.log()) * step.observed
    return (constant.double() * rows.observed).sum(-1) + each.sum(-1).double().sum(-1)


def _of_latents(second: Tensor, law: _Law, covariance: Tensor | None) -> Tensor:
    """Of the latents: less their divergence from the prior, or their log prior density."""
    n, q = law.mean.shape[-2:]
    trace = unpack(second.double().sum(-2), q + 1, leading=q).diagonal(dim1=-2, dim2=-1).sum(-1)
    if covariance is None:
        return -0.5 * (trace + n * q * _LOG_2PI)
    log_det = law.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).double().sum(-1)
    return 0.5 * (n * q - trace) - log_det


def _statistics(
    step: _Step, rows: Rows, mean: Tensor, second: Tensor, scales: Tensor, log_scale: Tensor
) -> dict[str, Tensor]:
    one = torch.cat([mean, torch.ones_like(mean[..., :1])], -1)
    weighted = scales * step.values
    sums = {
        "scale": scales.double().sum(-2),
        "log_scale": log_scale.double().sum(-2),
    }
    return {
        "second": (scales.mT @ second).double(),
        "latent": second.double().sum(-2),
        "cross": (weighted.mT @ one).double(),
        "square": (weighted * step.values).double().sum(-2),
        "count": rows.observed.expand(*scales.shape[:-2], -1),
        "volume": 0.5 * sums["log_scale"],
        **sums,
    }
