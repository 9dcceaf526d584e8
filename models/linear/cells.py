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

Drawn scales say little of the degrees of freedom of a nearly normal column, and hold them where
they are. So these are drawn with the scales integrated out, between the latents and the scales:

.. math::
    z \mid u, \theta, \nu; \qquad \nu \mid z, \theta; \qquad u \mid z, \theta, \nu; \qquad
    \theta \mid z, u,

where the second and third are one draw of both given the latents. Each of the first two pairs
needs a pass over all rows: one draws latents and leaves them, the next draws scales and leaves
those.

References:
    Luttinen, Ilin & Karhunen (2012). Bayesian robust PCA of incomplete data. Neural Processing
    Letters 36. van Dyk & Park (2008). Partially collapsed Gibbs samplers. JASA 103.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions._low_rank import pack, pack_outer, unpack
from bayesgen.models.linear.latents import Latents
from bayesgen.models.linear.tails import tail_sums

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.models.linear.rows import Rows

__all__ = ["Cells", "draw_cells", "draw_latents", "draw_scales", "expect_cells"]

_LOG_2PI = math.log(2.0 * math.pi)
# Rounds of coordinate ascent of a step that goes on, and of one that starts.
_ROUNDS, _FIRST_ROUNDS = 2, 10


class Cells(NamedTuple):
    """What the local step gives back."""

    found: Latents
    """Statistics as those of rows with scales, but ``scale``, ``log_scale`` and ``volume`` are
    ``(..., d)``, by column, and ``latent`` is not weighted. Of latents that were drawn without
    scales they are ``count`` and ``tails (..., d, 32)``, for the degrees of freedom."""
    left: Tensor
    """Where the next step goes on: scales of the cells, ``(..., n, d)``, zero where missing; or
    latents ``(..., n, q)``."""


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

    def gammas(self, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Powers and rates ``(..., n, d)`` of the scales given moments of the latents."""
        rate = 0.5 * (self.df + self.distance(mean, second))
        return (0.5 * (self.df + 1.0)).expand(rate.shape), rate

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


def expect_cells(rows: Rows, message: Tensors, scales: Tensor | None = None) -> Cells:
    """Expectations of a batch under the best product of a normal and of Gammas.

    Args:
        rows: The batch, in one precision.
        message: What the block of the loadings and of the degrees of freedom says.
        scales: What the last step left; None to start from the message alone.
    """
    step = _Step(rows, message)
    scales = step.first() if scales is None else step.rounds(scales, _ROUNDS - 1)
    law = step.latents(scales)
    covariance = torch.cholesky_inverse(law.tril)
    second = step.second(law.mean, covariance)
    power, rate = step.gammas(law.mean, second)
    scales, log_scale = power / rate, torch.digamma(power) - rate.log()
    bound = _bound(step, rows, power, rate) + _less_divergence(second, law)
    return _cells(step, rows, law.mean, second, scales, log_scale, bound)


def draw_latents(
    rows: Rows, message: Tensors, scales: Tensor | None, *, generator: torch.Generator
) -> Cells:
    """Latents given scales, and what the degrees of freedom need once the scales are forgotten.

    The bound is the log density of rows and latents together, the scales integrated out.
    """
    step = _Step(rows, message)
    latents = _draw(step.latents(step.first() if scales is None else scales), generator)
    second = step.second(latents, None)
    distance = step.distance(latents, second)
    count = rows.observed.expand(*distance.shape[:-2], -1)
    statistics = {"tails": tail_sums(distance, step.observed), "count": count}
    bound = _bound(step, rows, *step.gammas(latents, second)) + _log_density(latents)
    return Cells(Latents(statistics, bound), latents)


def draw_scales(
    rows: Rows, message: Tensors, latents: Tensor, *, generator: torch.Generator
) -> Cells:
    """Scales given latents. The bound is as that of :func:`draw_latents`."""
    return _given_latents(_Step(rows, message), rows, latents, generator)


def draw_cells(
    rows: Rows, message: Tensors, scales: Tensor | None, *, generator: torch.Generator
) -> Cells:
    """Latents given scales, then scales given latents, under the same degrees of freedom."""
    step = _Step(rows, message)
    latents = _draw(step.latents(step.first() if scales is None else scales), generator)
    return _given_latents(step, rows, latents, generator)


def _given_latents(step: _Step, rows: Rows, latents: Tensor, generator: torch.Generator) -> Cells:
    second = step.second(latents, None)
    power, rate = step.gammas(latents, second)
    log_scale = rng.log_gamma_sample(power, generator) - rate.log()
    bound = _bound(step, rows, power, rate) + _log_density(latents)
    return _cells(step, rows, latents, second, log_scale.exp(), log_scale, bound)


def _cells(
    step: _Step,
    rows: Rows,
    mean: Tensor,
    second: Tensor,
    scales: Tensor,
    log_scale: Tensor,
    bound: Tensor,
) -> Cells:
    scales, log_scale = scales * step.observed, log_scale * step.observed
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


def _log_density(latents: Tensor) -> Tensor:
    """Of drawn latents under their prior, ``(...)``."""
    each = 0.5 * (latents.square().double() + _LOG_2PI)
    return -each.sum((-2, -1))


def _less_divergence(second: Tensor, law: _Law) -> Tensor:
    """Less the divergence of the latents' law from their prior, ``(...)``."""
    n, q = law.mean.shape[-2:]
    trace = unpack(second.double().sum(-2), q + 1, leading=q).diagonal(dim1=-2, dim2=-1).sum(-1)
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
