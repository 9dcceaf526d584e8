"""Components of independent counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock
from bayesgen.models.families.base import refuse_categories
from bayesgen.models.families.factorised import (
    Batch,
    Entries,
    Layout,
    OneSite,
    by_component,
    check_entries,
    mean_and_covariance,
    per_row,
    stack_features,
)
from bayesgen.priors import describe

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = ["GammaBlock", "Poisson"]


def _pack(rate: Tensor, log_rate: Tensor) -> Tensor:
    """Coefficients ``(..., K, 2 + 2d)`` of ``(1, base measure, mask, x)``."""
    zero = torch.zeros_like(rate[..., :1])
    return torch.cat([zero, zero + 1.0, -rate, log_rate], dim=-1)


def _log_base(x: Tensor) -> Tensor:
    return -torch.lgamma(x + 1.0)


@dataclass(frozen=True)
class GammaBlock(MarginalBlock):
    r"""``rate ~ Gamma``, one a component and column; kept as ``log_rate``, exact near 0.

    Modes are taken in the basis of the log rate, where sparse priors too have an interior mode,
    :math:`(x + a) / (n + b)`; :meth:`log_prior` is the density in that basis.

    References:
        MacKay (1998). Choice of basis for Laplace approximation.

    Args:
        num_components: Number of components ``K``.
        a: ``(d,)`` shapes of the prior.
        b: ``(d,)`` rates of the prior.
    """

    num_components: int
    a: Tensor
    b: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return ("log_rate",)

    def _sums(self, statistics: Tensors) -> tuple[Tensor, Tensor]:
        """Weighted numbers of entries and their totals, ``(..., K, d)``."""
        observed, total = statistics["moments"].double()[..., 2:].split(len(self.a), dim=-1)
        return observed, total

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        observed, total = self._sums(statistics)
        return {"a": self.a + total, "b": self.b + observed}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        a, b = posterior["a"], posterior["b"]
        return {"natural": _pack(a / b, torch.digamma(a) - torch.log(b))}

    def kl(self, posterior: Tensors) -> Tensor:
        q = torch.distributions.Gamma(posterior["a"], posterior["b"])
        p = torch.distributions.Gamma(self.a, self.b)
        return torch.distributions.kl_divergence(q, p).sum((-2, -1))

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        shape = (num_samples, *posterior["a"].shape)
        return self._draw(posterior["a"].expand(shape), posterior["b"], generator)

    @staticmethod
    def _draw(a: Tensor, b: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"log_rate": rng.log_gamma_sample(a, generator) - torch.log(b)}

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        observed, total = self._sums(statistics)
        # Without a prior a column of zeros has its maximum at minus infinity; the floor is finite.
        a, b = (1e-10, 1e-10) if flat else (self.a, self.b)
        return {"log_rate": torch.log(total + a) - torch.log(observed + b)}

    def log_prior(self, values: Tensors) -> Tensor:
        log_rate = values["log_rate"]
        density = self.a * (log_rate + torch.log(self.b)) - self.b * log_rate.exp()
        return (density - torch.lgamma(self.a)).sum((-2, -1))

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        observed, total = self._sums(statistics)
        return self._draw(self.a + total, self.b + observed, generator)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return {"natural": _pack(values["log_rate"].exp(), values["log_rate"])}

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        observed, total = self._sums(statistics)
        a, b = self.a + total, self.b + observed
        evidence = torch.lgamma(a) - torch.lgamma(self.a)
        evidence = evidence + self.a * torch.log(self.b) - a * torch.log(b)
        return evidence.sum(-1) + statistics["moments"].double()[..., 1]


_ENTRIES = Entries(
    "Poisson",
    ("a whole number of at least 0",),
    "Recode it, or give the column another family, such as Gaussian.",
    lambda x: (x < 0) | (x != x.floor()),
)


@dataclass(frozen=True, eq=False)
class Poisson(OneSite):
    r"""Components of independent counts, missing entries dropped exactly.

    .. math::
        \lambda_{kj} \sim \mathrm{Gamma}(a_j, b_j), \quad
        x_j \mid k \sim \mathrm{Poisson}(\lambda_{kj})

    The default prior is exponential with the mean of the column. The predictive is negative
    binomial.

    Priors: ``"components"`` (or ``"rate"``) is a Gamma of batch ``(d,)`` or ``()``; any other
    distribution on the positive numbers serves NUTS and SVI.

    Example:
        >>> from bayesgen.models import Mixture
        >>> Mixture(Poisson(), num_components=3).num_components
        3
    """

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        refuse_categories(data, "Poisson")
        return super().bind(data, num_components, priors)

    @property
    def _site(self) -> str:
        return "rate"

    @property
    def _support(self) -> constraints.Constraint:
        return constraints.positive

    @property
    def _entries(self) -> Entries:
        return _ENTRIES

    @property
    def _default(self) -> torch.distributions.Distribution:
        return dist.Gamma(torch.ones_like(self._mean), 1.0 / self._mean)

    @property
    def block(self) -> GammaBlock:
        prior = self._prior
        if not isinstance(prior, torch.distributions.Gamma):
            raise TypeError(
                f"the prior {describe(prior)} of the rates is not conjugate, so EM, VB and Gibbs "
                "cannot use it. Give priors={'components': Gamma(shape, rate)}, or fit with NUTS "
                "or SVI."
            )
        a, b = prior.concentration.to(self._mean), prior.rate.to(self._mean)
        return GammaBlock(self.num_components, a, b)

    @property
    def row_size(self) -> int:
        return 2 + 2 * self._d

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        return mean_and_covariance(weights, values["rate"], values["rate"])

    # ------------------------------------------------------------ data -> scores -> statistics
    @property
    def _layout(self) -> Layout:
        return Layout(2, self._d)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
        check_entries(x, self.columns, _ENTRIES)
        return stack_features(x.to(dtype), torch.positive, base=_log_base)

    def _natural(self, values: Tensors) -> Tensor:
        rate = values["rate"]
        return _pack(rate, rate.clamp_min(torch.finfo(rate.dtype).tiny).log())

    def embed(self, x: Tensor) -> Tensor:
        # Square roots, whose noise does not grow with the rate; scaled to about unit variance.
        assert self.scale is not None
        centre, scale = self._mean.to(x), self.scale.to(x)
        root = 2.0 * ((x + 0.375).sqrt() - (centre + 0.375).sqrt())
        return torch.nan_to_num(root / (scale / centre.sqrt()).clamp_min(1.0), nan=0.0)

    # ------------------------------------------------------------ densities and draws
    def export(self, values: Tensors) -> dict[str, Tensor]:
        return {"rate": values["log_rate"].exp()}

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor:
        """Product of negative binomials."""
        check_entries(x, self.columns, _ENTRIES)
        a, log_b = posterior["a"], torch.log(posterior["b"])
        log_more = torch.log1p(posterior["b"])
        total = x.new_zeros((a.shape[0], len(x)), dtype=torch.float64)
        for j in range(self._d):
            count, shape = x[:, j].double(), a[:, j, None]
            part = torch.lgamma(count + shape) - torch.lgamma(shape) + _log_base(count)
            part = part + shape * (log_b - log_more)[:, j, None] - count * log_more[:, j, None]
            total = total + torch.nan_to_num(part, nan=0.0)
        return total.to(x.dtype)

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        rate = per_row(values["rate"][..., ~observed], len(x))
        return torch.distributions.Independent(
            torch.distributions.Poisson(rate, validate_args=False), 1, validate_args=False
        )

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.poisson(by_component(values, "rate", labels), generator=generator)
