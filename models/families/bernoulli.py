"""Components of independent binary columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock
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

__all__ = ["Bernoulli", "BetaBlock"]


def _pack(log_probs: Tensor, log_rest: Tensor) -> Tensor:
    """Coefficients ``(..., K, 1 + 2d)`` of ``(1, mask, x)`` from ``log p`` and ``log (1 - p)``."""
    zero = torch.zeros_like(log_probs[..., :1])
    return torch.cat([zero, log_rest, log_probs - log_rest], dim=-1)


@dataclass(frozen=True)
class BetaBlock(MarginalBlock):
    r"""``probs ~ Beta``, one a component and column; kept as ``logits``, exact near 0 and 1.

    Modes are taken in the basis of the logits, where sparse priors too have an interior mode,
    :math:`p = (x + a) / (n + a + b)`; :meth:`log_prior` is the density in that basis.

    References:
        MacKay (1998). Choice of basis for Laplace approximation.

    Args:
        num_components: Number of components ``K``.
        a: ``(d,)`` pseudo-counts of ones.
        b: ``(d,)`` pseudo-counts of zeros.
    """

    num_components: int
    a: Tensor
    b: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return ("logits",)

    def _counts(self, statistics: Tensors) -> tuple[Tensor, Tensor]:
        """Weighted numbers of ones and of zeros, ``(..., K, d)``."""
        observed, ones = statistics["moments"].double()[..., 1:].split(len(self.a), dim=-1)
        return ones, (observed - ones).clamp_min(0.0)

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        ones, zeros = self._counts(statistics)
        return {"a": self.a + ones, "b": self.b + zeros}

    @staticmethod
    def _expected_logs(posterior: Tensors) -> tuple[Tensor, Tensor]:
        a, b = posterior["a"], posterior["b"]
        total = torch.digamma(a + b)
        return torch.digamma(a) - total, torch.digamma(b) - total

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {"natural": _pack(*self._expected_logs(posterior))}

    def kl(self, posterior: Tensors) -> Tensor:
        a, b = posterior["a"], posterior["b"]
        log_probs, log_rest = self._expected_logs(posterior)
        difference = _log_beta(self.a, self.b) - _log_beta(a, b)
        return (difference + (a - self.a) * log_probs + (b - self.b) * log_rest).sum((-2, -1))

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        shape = (num_samples, *posterior["a"].shape)
        return self._draw(posterior["a"].expand(shape), posterior["b"].expand(shape), generator)

    @staticmethod
    def _draw(a: Tensor, b: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        log_probs, log_rest = rng.log_beta_sample(a, b, generator)
        return {"logits": log_probs - log_rest}

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        ones, zeros = self._counts(statistics)
        # Without a prior a column of zeros has its maximum at infinity; the floor keeps it finite.
        a, b = (1e-10, 1e-10) if flat else (self.a, self.b)
        return {"logits": torch.log(ones + a) - torch.log(zeros + b)}

    def log_prior(self, values: Tensors) -> Tensor:
        logits = values["logits"]
        density = self.a * logsigmoid(logits) + self.b * logsigmoid(-logits)
        return (density - _log_beta(self.a, self.b)).sum((-2, -1))

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        ones, zeros = self._counts(statistics)
        return self._draw(self.a + ones, self.b + zeros, generator)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        logits = values["logits"]
        return {"natural": _pack(logsigmoid(logits), logsigmoid(-logits))}

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        ones, zeros = self._counts(statistics)
        return (_log_beta(self.a + ones, self.b + zeros) - _log_beta(self.a, self.b)).sum(-1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


_ENTRIES = Entries(
    "Bernoulli",
    ("0 or 1",),
    "Recode it, or give the column another family.",
    lambda x: (x != 0) & (x != 1),
)


@dataclass(frozen=True, eq=False)
class Bernoulli(OneSite):
    r"""Components of independent binary columns, missing entries dropped exactly.

    .. math:: p_{kj} \sim \mathrm{Beta}(a_j, b_j), \quad x_j \mid k \sim \mathrm{Bernoulli}(p_{kj})

    The default prior is worth two observations at the data's own share of ones,
    :math:`a_j = 2 m_j`, :math:`b_j = 2 (1 - m_j)` with :math:`m_j` the smoothed mean of the
    column, so that rare ones stay rare in small components.

    Priors: ``"components"`` (or ``"probs"``) is a Beta of batch ``(d,)`` or ``()``; any other
    distribution on the unit interval serves NUTS and SVI.

    Example:
        >>> from bayesgen.models import Mixture
        >>> Mixture(Bernoulli(), num_components=3).num_components
        3
    """

    # ------------------------------------------------------------ description
    @property
    def _site(self) -> str:
        return "probs"

    @property
    def _support(self) -> constraints.Constraint:
        return constraints.unit_interval

    @property
    def _entries(self) -> Entries:
        return _ENTRIES

    @property
    def _default(self) -> torch.distributions.Distribution:
        return dist.Beta(2.0 * self._mean, 2.0 * (1.0 - self._mean))

    @property
    def block(self) -> BetaBlock:
        prior = self._prior
        if not isinstance(prior, torch.distributions.Beta):
            raise TypeError(
                f"the prior {describe(prior)} of the probabilities is not conjugate, so EM, VB "
                "and Gibbs cannot use it. Give priors={'components': Beta(a, b)}, or fit with "
                "NUTS or SVI."
            )
        a, b = prior.concentration1, prior.concentration0
        return BetaBlock(self.num_components, a.to(self._mean), b.to(self._mean))

    @property
    def row_size(self) -> int:
        return 1 + 2 * self._d

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        probs = values["probs"]
        return mean_and_covariance(weights, probs, probs * (1.0 - probs))

    # ------------------------------------------------------------ data -> scores -> statistics
    @property
    def _layout(self) -> Layout:
        return Layout(1, self._d)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
        check_entries(x, self.columns, _ENTRIES)
        return stack_features(x.to(dtype), torch.positive)

    def _natural(self, values: Tensors) -> Tensor:
        probs = values["probs"]
        tiny = torch.finfo(probs.dtype).tiny
        return _pack(
            probs.clamp_min(tiny).log(),
            torch.log1p(-probs.clamp_max(1.0 - torch.finfo(probs.dtype).eps)),
        )

    def embed(self, x: Tensor) -> Tensor:
        mean = self._mean.to(x)
        return torch.nan_to_num((x - mean) / (mean * (1.0 - mean)).sqrt(), nan=0.0)

    # ------------------------------------------------------------ densities and draws
    def export(self, values: Tensors) -> dict[str, Tensor]:
        return {"probs": torch.sigmoid(values["logits"])}

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor:
        a, b = posterior["a"], posterior["b"]
        total = torch.log(a + b)
        return self._product(self.observe(x), _pack(a.log() - total, b.log() - total))

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        probs = per_row(values["probs"][..., ~observed], len(x))
        return torch.distributions.Independent(
            torch.distributions.Bernoulli(probs, validate_args=False), 1, validate_args=False
        )

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(by_component(values, "probs", labels), generator=generator)
