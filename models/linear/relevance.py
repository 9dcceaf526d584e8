r"""The law of how much each latent direction matters: its loadings' common prior precision.

Direction :math:`k` has loadings :math:`w_{jk} \sim N(0, 1/\alpha_k)` in every column :math:`j`.
Automatic relevance determination gives :math:`\alpha_k` a Gamma prior; the horseshoe gives
:math:`\alpha_k^{-1/2}` a half-Cauchy, which is a Gamma whose rate is itself Gamma:

.. math::
    \alpha_k \mid r_k \sim \mathrm{Gamma}(c, r_k), \qquad
    r_k \sim \mathrm{Gamma}(1/2, A^{-2}), \qquad c = 1/2.

References:
    MacKay (1994). Bayesian non-linear modelling for the prediction competition. Bishop (1999).
    Bayesian PCA. Carvalho, Polson & Scott (2010). The horseshoe estimator for sparse signals.
    Makalic & Schmidt (2016). A simple sampler for the horseshoe estimator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["Relevance", "gamma_kl", "gamma_log_prob"]

_HALF = 0.5


def gamma_log_prob(value: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """Density of the logarithm of a Gamma variate."""
    return shape * (rate * value).log() - torch.lgamma(shape) - rate * value


def gamma_kl(a: Tensor, b: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """``KL(Gamma(a, b) || Gamma(shape, rate))``."""
    return (
        (a - shape) * torch.digamma(a)
        - torch.lgamma(a)
        + torch.lgamma(shape)
        + shape * (b / rate).log()
        + a * (rate / b - 1.0)
    )


@dataclass(frozen=True, eq=False)
class Relevance:
    """Prior of the precisions ``(q,)`` of all directions.

    Args:
        shape: Of the Gamma prior, ``(q,)``; a half under the horseshoe.
        rate: Of the Gamma prior, ``(q,)``; under the horseshoe :math:`A^{-2}`, the rate of the
            rates' own prior.
        is_horseshoe: Whether rates are learned.
    """

    shape: Tensor
    rate: Tensor
    is_horseshoe: bool = False

    # ------------------------------------------------------------ given the precisions
    def log_prior(self, precision: Tensor) -> Tensor:
        """Density of the logarithms of the precisions, rates integrated out, ``(...)``."""
        if not self.is_horseshoe:
            return gamma_log_prob(precision, self.shape, self.rate).sum(-1)
        odds = (precision / self.rate).log()  # of a Beta(1/2, 1/2) variate
        return (0.5 * odds - torch.nn.functional.softplus(odds) - math.log(math.pi)).sum(-1)

    def expected_rate(self, precision: Tensor) -> Tensor:
        """Mean of the rates given the precisions."""
        if not self.is_horseshoe:
            return self.rate.expand(precision.shape)
        return (_HALF + self.shape) / (self.rate + precision)

    def draw_rate(self, precision: Tensor, *, generator: torch.Generator) -> Tensor:
        """Rates ``(..., q)`` given the precisions."""
        if not self.is_horseshoe:
            return self.rate.expand(precision.shape)
        shape = (_HALF + self.shape).expand(precision.shape)
        return rng.gamma(shape, generator) / (self.rate + precision)

    def draw(
        self, rate: Tensor, square: Tensor, num_columns: int, *, generator: torch.Generator
    ) -> Tensor:
        """Precisions given rates and the squared lengths ``(..., q)`` of columns of loadings."""
        shape = (self.shape + 0.5 * num_columns).expand(square.shape)
        return rng.gamma(shape, generator) / (rate + 0.5 * square)

    def log_marginal(self, rate: Tensor, square: Tensor, num_columns: int) -> Tensor:
        """Log density of columns of loadings by squared length, precisions integrated out.

        Up to a constant, by direction: a Student-t.
        """
        return -(self.shape + 0.5 * num_columns) * (rate + 0.5 * square).log()

    def mode(self, previous: Tensor, square: Tensor, num_columns: int) -> Tensor:
        """The mode in the basis of logarithms; a step of EM over the rates."""
        return (self.shape + 0.5 * num_columns) / (self.expected_rate(previous) + 0.5 * square)

    # ------------------------------------------------------------ variational Bayes
    def update(
        self, previous: Tensors | None, square: Tensor, num_columns: int
    ) -> dict[str, Tensor]:
        """Posterior of precisions given expected squared lengths; rates first, by the previous."""
        found: dict[str, Tensor] = {}
        rate = self.rate
        if self.is_horseshoe:
            # A first guess of the precisions: what the lengths alone suggest.
            guess = num_columns / square.clamp_min(torch.finfo(square.dtype).tiny)
            expected = guess if previous is None else self.expected(previous)
            found["rate_concentration"] = (_HALF + self.shape).expand(square.shape)
            found["rate_rate"] = self.rate + expected
            rate = found["rate_concentration"] / found["rate_rate"]
        found["relevance_concentration"] = (self.shape + 0.5 * num_columns).expand(square.shape)
        found["relevance_rate"] = rate + 0.5 * square
        return found

    @staticmethod
    def expected(posterior: Tensors) -> Tensor:
        """Mean of the precisions."""
        return posterior["relevance_concentration"] / posterior["relevance_rate"]

    @staticmethod
    def expected_log(posterior: Tensors) -> Tensor:
        """Mean of their logarithms."""
        return (
            torch.digamma(posterior["relevance_concentration"]) - posterior["relevance_rate"].log()
        )

    def kl(self, posterior: Tensors) -> Tensor:
        """``KL(q || prior)`` of precisions and rates, ``(...)``."""
        a, b = posterior["relevance_concentration"], posterior["relevance_rate"]
        if not self.is_horseshoe:
            return gamma_kl(a, b, self.shape, self.rate).sum(-1)
        c, e = posterior["rate_concentration"], posterior["rate_rate"]
        mean, log = c / e, torch.digamma(c) - e.log()
        # E_q(rate) of the Kullback-Leibler divergence given the rate.
        given = gamma_kl(a, b, self.shape, mean) + self.shape * (mean.log() - log)
        half = torch.full_like(c, _HALF)
        return (given + gamma_kl(c, e, half, self.rate)).sum(-1)

    def draw_posterior(self, posterior: Tensors, *, generator: torch.Generator) -> Tensor:
        """Precisions from their variational posterior."""
        shape = posterior["relevance_concentration"]
        return rng.gamma(shape, generator) / posterior["relevance_rate"]
