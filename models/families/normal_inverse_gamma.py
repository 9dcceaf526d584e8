r"""The conjugate block of Gaussian components with a diagonal or spherical covariance.

.. math::
    v_{kj} \sim \mathrm{InverseGamma}(a, b_j), \quad
    \mu_{kj} \mid v_{kj} \sim \mathrm{N}(m_j, v_{kj}/\kappa_j)

A spherical covariance is the same algebra with one variance for all columns: the tensors of the
variance then have a column dimension of size one, and everything broadcasts. With a Gamma
hyperprior :math:`b_j = s_j / 2` and :math:`s_j` is learned.

References:
    Murphy (2007). Conjugate Bayesian analysis of the Gaussian distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["NormalInverseGammaBlock", "diagonal_natural"]

_LOG_2PI = math.log(2.0 * math.pi)


def diagonal_natural(
    loc: Tensor, precision: Tensor, log_precision: Tensor, spread: Tensor | float = 0.0
) -> Tensor:
    """Coefficients of ``(1, mask, x, x^2)``, ``(..., K, 1 + 3d)``.

    Args:
        loc: Means ``(..., K, d)``.
        precision: Inverse variances ``(..., K, d or 1)``.
        log_precision: Their logarithms, or expectations of these.
        spread: Variance of ``loc`` times the precision; zero at fixed values.
    """
    precision, log_precision = precision.expand_as(loc), log_precision.expand_as(loc)
    constant = 0.5 * (log_precision - _LOG_2PI - precision * loc.square() - spread)
    zero = torch.zeros_like(loc[..., :1])
    return torch.cat([zero, constant, precision * loc, -0.5 * precision], dim=-1)


@dataclass(frozen=True)
class NormalInverseGammaBlock(MarginalBlock):
    """Conjugate block over ``loc`` and ``variance``; hyperparameters in centred coordinates.

    Args:
        num_components: Number of components ``K``.
        loc: Prior means, ``(d,)``.
        mean_precision: Observations that each prior mean is worth, ``(d,)``.
        concentration: Shape of the inverse-gamma, ``(c,)``: ``c = d``, or 1 if spherical.
        rate: Its rate, ``(c,)``; None when it is learned.
        hyper_shape: Shape of the Gamma hyperprior on twice the rate; None when fixed.
        hyper_rate: Its rates ``(c,)``.
        floor: ``(c,)`` variances added in maximum likelihood, where no prior forbids a collapse.
    """

    num_components: int
    loc: Tensor
    mean_precision: Tensor
    concentration: Tensor
    rate: Tensor | None
    hyper_shape: float | None
    hyper_rate: Tensor | None
    floor: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return ("loc", "variance") + (() if self.rate is not None else ("column_scale",))

    @property
    def _pooled(self) -> int:
        """Columns that share one variance."""
        return self.loc.shape[0] // self.concentration.shape[0]

    def _pool(self, value: Tensor) -> Tensor:
        """Sum a ``(..., d)`` quantity over the columns that share a variance."""
        return value if self._pooled == 1 else value.sum(-1, keepdim=True)

    def _expected_rate(self, previous: Tensors | None) -> tuple[Tensor, Tensor]:
        """``E[b]`` and ``E[log b]`` under the hyperparameters' posterior, ``(..., 1, c)``."""
        if self.rate is not None:
            return self.rate, torch.log(self.rate)
        assert self.hyper_shape is not None
        assert self.hyper_rate is not None
        if previous is not None and "column_scale" in previous:
            half = 0.5 * previous["column_scale"].unsqueeze(-2)
            return half, torch.log(half)
        a, b = torch.full_like(self.hyper_rate, self.hyper_shape), self.hyper_rate
        if previous is not None:
            a, b = previous["hyper_shape"].unsqueeze(-2), previous["hyper_rate"].unsqueeze(-2)
        return 0.5 * a / b, torch.digamma(a) - torch.log(2.0 * b)

    # ------------------------------------------------------------ the conjugate posterior
    def _conditional(
        self, statistics: Tensors, prior_rate: Tensor, *, flat: bool = False
    ) -> dict[str, Tensor]:
        """Posterior parameters given the rate; ``flat`` drops the prior."""
        d = self.loc.shape[0]
        weight, first, second = statistics["moments"].double()[..., 1:].split(d, dim=-1)
        kappa0 = torch.zeros_like(self.mean_precision) if flat else self.mean_precision
        kappa = kappa0 + weight
        loc = (kappa0 * self.loc + first) / kappa.clamp_min(1e-300)
        scatter = second + kappa0 * self.loc.square() - kappa * loc.square()
        scatter, count = self._pool(scatter.clamp_min(0.0)), self._pool(weight)
        return {
            "loc": loc,
            "mean_precision": kappa,
            "concentration": 0.5 * count if flat else self.concentration + 0.5 * count,
            "rate": 0.5 * scatter if flat else prior_rate + 0.5 * scatter,
        }

    # ------------------------------------------------------------ variational Bayes
    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        posterior = self._conditional(statistics, self._expected_rate(previous)[0])
        if self.rate is None:
            precision = posterior["concentration"] / posterior["rate"]
            shape, rate = self._hyper_conditional(precision)
            posterior["hyper_shape"], posterior["hyper_rate"] = shape, rate
        return posterior

    def _hyper_conditional(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        assert self.hyper_shape is not None
        assert self.hyper_rate is not None
        total = precision.sum(-2)
        shape = self.hyper_shape + self.num_components * self.concentration
        return shape.expand_as(total).clone(), self.hyper_rate + 0.5 * total

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        a, b = posterior["concentration"], posterior["rate"]
        log_precision = torch.digamma(a) - torch.log(b)
        spread = 1.0 / posterior["mean_precision"]
        return {"natural": diagonal_natural(posterior["loc"], a / b, log_precision, spread)}

    def kl(self, posterior: Tensors) -> Tensor:
        a, b, kappa = posterior["concentration"], posterior["rate"], posterior["mean_precision"]
        a0, (b0, log_b0) = self.concentration, self._expected_rate(posterior)
        variance = (
            (a - a0) * torch.digamma(a)
            - torch.lgamma(a)
            + torch.lgamma(a0)
            + a0 * (torch.log(b) - log_b0)
            + a / b * (b0 - b)
        )
        ratio, delta = self.mean_precision / kappa, posterior["loc"] - self.loc
        mean = 0.5 * (ratio - 1.0 - torch.log(ratio))
        mean = mean + 0.5 * self.mean_precision * (a / b) * delta.square()
        return variance.sum((-2, -1)) + mean.sum((-2, -1)) + self._hyper_kl(posterior)

    def _hyper_kl(self, posterior: Tensors) -> Tensor | float:
        if self.rate is not None:
            return 0.0
        assert self.hyper_shape is not None
        assert self.hyper_rate is not None
        q = torch.distributions.Gamma(posterior["hyper_shape"], posterior["hyper_rate"])
        p = torch.distributions.Gamma(
            torch.full_like(self.hyper_rate, self.hyper_shape), self.hyper_rate
        )
        return torch.distributions.kl_divergence(q, p).sum(-1)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        repeated = {k: v.expand(num_samples, *v.shape) for k, v in posterior.items()}
        values = self._draw(repeated, generator)
        if self.rate is None:
            shape = repeated["hyper_shape"]
            values["column_scale"] = rng.gamma(shape, generator) / repeated["hyper_rate"]
        return values

    @staticmethod
    def _draw(posterior: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        loc, kappa = posterior["loc"], posterior["mean_precision"]
        log_gamma = rng.log_gamma_sample(posterior["concentration"], generator)
        variance = posterior["rate"] * (-log_gamma).exp()
        noise = rng.standard_normal(loc.shape, generator, dtype=loc.dtype, device=loc.device)
        return {"loc": loc + noise * (variance / kappa).sqrt(), "variance": variance}

    # ------------------------------------------------------------ EM
    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        posterior = self._conditional(statistics, self._expected_rate(previous)[0], flat=flat)
        a, b = posterior["concentration"], posterior["rate"]
        if flat:
            return {"loc": posterior["loc"], "variance": b / a.clamp_min(1e-10) + self.floor}
        # The prior of each mean that the variance serves adds v^(-1/2).
        values = {"loc": posterior["loc"], "variance": b / (a + 1.0 + 0.5 * self._pooled)}
        if self.rate is None:
            shape, rate = self._hyper_conditional(1.0 / values["variance"])
            values["column_scale"] = (shape - 1.0).clamp_min(1e-6) / rate
        return values

    def log_prior(self, values: Tensors) -> Tensor:
        loc, v = values["loc"], values["variance"]
        a, (b, log_b) = self.concentration, self._expected_rate(values)
        variance = a * log_b - torch.lgamma(a) - (a + 1.0) * torch.log(v) - b / v
        square = self.mean_precision * (loc - self.loc).square() / v
        mean = 0.5 * (torch.log(self.mean_precision) - torch.log(v) - _LOG_2PI - square)
        return variance.sum((-2, -1)) + mean.sum((-2, -1)) + self._hyper_log_prior(values)

    def _hyper_log_prior(self, values: Tensors) -> Tensor | float:
        if self.rate is not None:
            return 0.0
        assert self.hyper_shape is not None
        assert self.hyper_rate is not None
        shape = torch.full_like(self.hyper_rate, self.hyper_shape)
        gamma = torch.distributions.Gamma(shape, self.hyper_rate)
        return gamma.log_prob(values["column_scale"]).sum(-1)

    # ------------------------------------------------------------ Gibbs
    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.rate is None and (previous is None or "column_scale" not in previous):
            assert self.hyper_shape is not None
            assert self.hyper_rate is not None
            lead = statistics["moments"].shape[:-2]
            shape = torch.full_like(self.hyper_rate, self.hyper_shape)
            shape = shape.expand(*lead, *self.hyper_rate.shape)
            previous = {"column_scale": rng.gamma(shape, generator) / self.hyper_rate}
        posterior = self._conditional(statistics, self._expected_rate(previous)[0])
        values = self._draw(posterior, generator)
        if self.rate is None:
            shape, rate = self._hyper_conditional(1.0 / values["variance"])
            values["column_scale"] = rng.gamma(shape, generator) / rate
        return values

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        precision = 1.0 / values["variance"]
        return {"natural": diagonal_natural(values["loc"], precision, torch.log(precision))}

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        prior_rate, log_b0 = self._expected_rate(values)
        posterior = self._conditional(statistics, prior_rate)
        a, b, a0 = posterior["concentration"], posterior["rate"], self.concentration
        variance = torch.lgamma(a) - torch.lgamma(a0) + a0 * log_b0 - a * torch.log(b)
        variance = variance - (a - a0) * _LOG_2PI
        mean = 0.5 * torch.log(self.mean_precision / posterior["mean_precision"])
        return variance.sum(-1) + mean.sum(-1)
