r"""The conjugate block of Gaussian components with full or tied covariance.

.. math::
    \Sigma_k \sim \mathrm{IW}(\nu_0, \Psi_0), \quad
    \mu_k \mid \Sigma_k \sim \mathrm{N}(m_0, \Sigma_k/\kappa_0)

A tied covariance is the same algebra with one covariance for all components: the tensors of the
covariance then have a component dimension of size one, and everything broadcasts. With a Gamma
hyperprior, :math:`\Psi_0 = \mathrm{diag}(s)` and :math:`s_j` is learned.

References:
    Murphy (2007). Conjugate Bayesian analysis of the Gaussian distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock
from bayesgen.distributions import InverseWishartCholesky
from bayesgen.models.families.quadratic import pack_natural, safe_cholesky, unpack_moments

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["NormalInverseWishartBlock", "gaussian_message", "point_message"]


def gaussian_message(
    loc: Tensor, precision: Tensor, log_det: Tensor, spread: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """What :mod:`quadratic` reads: ``natural`` without its normaliser, and ``log_det``.

    ``spread`` is the trace of precision times the variance of ``loc``, zero at fixed values.
    """
    linear = (precision @ loc.unsqueeze(-1)).squeeze(-1)
    constant = -0.5 * ((linear * loc).sum(-1) + spread)
    return {
        "natural": pack_natural(constant, linear, precision),
        "log_det": log_det.expand(constant.shape),
    }


def point_message(loc: Tensor, scale_tril: Tensor) -> dict[str, Tensor]:
    """The message at fixed ``loc (..., K, d)`` and ``scale_tril (..., K or 1, d, d)``."""
    return gaussian_message(loc, torch.cholesky_inverse(scale_tril), -_log_det(scale_tril))


def _log_det(factor: Tensor) -> Tensor:
    return 2.0 * torch.log(torch.diagonal(factor, dim1=-2, dim2=-1)).sum(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


@dataclass(frozen=True)
class NormalInverseWishartBlock(MarginalBlock):
    """Conjugate block over ``loc`` and ``scale_tril``; hyperparameters in centred coordinates.

    Args:
        num_components: Number of components ``K``.
        loc: Prior mean, ``(d,)``.
        mean_precision: Observations that the prior mean is worth.
        df: Degrees of freedom, above ``d - 1``.
        scale: Scale matrix ``(d, d)``; None when it is learned.
        shape: Shape of the Gamma hyperprior on the diagonal of the scale matrix; None when fixed.
        rate: Its rates ``(d,)``.
        tied: One covariance for all components.
        floor: ``(d,)`` variances added in maximum likelihood, where no prior forbids a collapse.
    """

    num_components: int
    loc: Tensor
    mean_precision: float
    df: float
    scale: Tensor | None
    shape: float | None
    rate: Tensor | None
    tied: bool
    floor: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return ("loc", "scale_tril") + (() if self.scale is not None else ("column_scale",))

    @property
    def _d(self) -> int:
        return self.loc.shape[0]

    @property
    def _num_covariances(self) -> int:
        return 1 if self.tied else self.num_components

    @cached_property
    def _scale_log_det(self) -> Tensor:
        assert self.scale is not None
        return torch.logdet(self.scale)

    def _expected_scale(self, previous: Tensors | None) -> tuple[Tensor, Tensor]:
        """``E[Psi_0]`` and ``E[log |Psi_0|]`` under the hyperparameters' posterior."""
        if self.scale is not None:
            return self.scale, self._scale_log_det
        assert self.shape is not None
        assert self.rate is not None
        if previous is not None and "column_scale" in previous:
            s = previous["column_scale"]
            return torch.diag_embed(s), torch.log(s).sum(-1)
        if previous is not None:
            a, b = previous["hyper_shape"], previous["hyper_rate"]
        else:
            a, b = (
                torch.as_tensor(self.shape, dtype=self.loc.dtype, device=self.loc.device),
                self.rate,
            )
        return torch.diag_embed(a / b), (torch.digamma(a) - torch.log(b)).sum(-1)

    # ------------------------------------------------------------ the conjugate posterior
    def _conditional(
        self, statistics: Tensors, prior_scale: Tensor, *, flat: bool = False
    ) -> dict[str, Tensor]:
        """Posterior parameters given the scale matrix; ``flat`` drops the prior."""
        weight, first, second = unpack_moments(statistics["moments"].double(), self._d)
        count = statistics["count"].double() if "count" in statistics else weight
        kappa0 = 0.0 if flat else self.mean_precision
        precision = kappa0 + weight
        safe = precision.clamp_min(1e-300).unsqueeze(-1)
        loc = (kappa0 * self.loc + first) / safe
        scatter = second + kappa0 * self.loc.unsqueeze(-1) * self.loc
        scatter = scatter - precision[..., None, None] * loc.unsqueeze(-1) * loc.unsqueeze(-2)
        if self.tied:
            scatter, count = scatter.sum(-3, keepdim=True), count.sum(-1, keepdim=True)
        psi = scatter if flat else scatter + prior_scale.unsqueeze(-3)
        return {
            "loc": loc,
            "mean_precision": precision,
            "df": count if flat else self.df + count,
            "scale": _symmetric(psi),
        }

    # ------------------------------------------------------------ variational Bayes
    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        expected, _ = self._expected_scale(previous)
        posterior = self._conditional(statistics, expected)
        posterior["scale_tril"] = safe_cholesky(posterior.pop("scale"))
        if self.scale is None:
            assert self.shape is not None
            assert self.rate is not None
            precision = self._covariance(posterior).expected_precision()
            diagonal = torch.diagonal(precision, dim1=-2, dim2=-1).sum(-2)
            shape = self.shape + 0.5 * self.df * self._num_covariances
            posterior["hyper_shape"] = torch.full_like(diagonal, shape)
            posterior["hyper_rate"] = self.rate + 0.5 * diagonal
        return posterior

    @staticmethod
    def _covariance(posterior: Tensors) -> InverseWishartCholesky:
        return InverseWishartCholesky(
            posterior["df"], posterior["scale_tril"], validate_args=False
        )

    def _log_normalizer(self, df: Tensor, log_det: Tensor) -> Tensor:
        """Log normaliser of the inverse-Wishart density whose scale has this log determinant."""
        d = self._d
        return 0.5 * df * (d * math.log(2.0) - log_det) + torch.special.multigammaln(0.5 * df, d)

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        precision = self._covariance(posterior).expected_precision()
        return gaussian_message(
            posterior["loc"],
            precision,
            self._covariance(posterior).expected_log_det_precision(),
            self._d / posterior["mean_precision"],
        )

    def kl(self, posterior: Tensors) -> Tensor:
        d, q = self._d, self._covariance(posterior)
        precision, log_det = q.expected_precision(), q.expected_log_det_precision()
        prior_scale, prior_log_det = self._expected_scale(posterior)
        df0 = torch.as_tensor(self.df, dtype=q.df.dtype, device=q.df.device)
        covariance = (
            self._log_normalizer(df0, prior_log_det.unsqueeze(-1))
            - q.log_normalizer()
            + 0.5 * (q.df - df0) * log_det
            - 0.5 * q.df * d
            + 0.5 * (prior_scale.unsqueeze(-3) * precision).sum((-2, -1))
        )
        kappa, delta = posterior["mean_precision"], posterior["loc"] - self.loc
        ratio = self.mean_precision / kappa
        quadratic = (delta * (precision @ delta.unsqueeze(-1)).squeeze(-1)).sum(-1)
        mean = 0.5 * (d * (ratio - 1.0 - torch.log(ratio)) + self.mean_precision * quadratic)
        return covariance.sum(-1) + mean.sum(-1) + self._hyper_kl(posterior)

    def _hyper_kl(self, posterior: Tensors) -> Tensor | float:
        if self.scale is not None:
            return 0.0
        assert self.shape is not None
        assert self.rate is not None
        q = torch.distributions.Gamma(posterior["hyper_shape"], posterior["hyper_rate"])
        p = torch.distributions.Gamma(torch.full_like(self.rate, self.shape), self.rate)
        return torch.distributions.kl_divergence(q, p).sum(-1)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        repeated = {k: v.expand(num_samples, *v.shape) for k, v in posterior.items()}
        values = self._draw(repeated, generator)
        if self.scale is None:
            shape = repeated["hyper_shape"]
            values["column_scale"] = rng.gamma(shape, generator) / repeated["hyper_rate"]
        return values

    # ------------------------------------------------------------ EM
    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        d, rows = self._d, 0.0 if self.tied else 1.0
        if flat:
            posterior = self._conditional(statistics, self.loc, flat=True)
            divisor = posterior["df"].clamp_min(1e-10)
            covariance = posterior["scale"] / divisor[..., None, None] + torch.diag(self.floor)
            return {"loc": posterior["loc"], "scale_tril": safe_cholesky(covariance)}
        expected, _ = self._expected_scale(previous)
        posterior = self._conditional(statistics, expected)
        # The means' prior adds |Sigma|^(-1/2) for each component that the covariance serves.
        divisor = posterior["df"] + d + 1 + (self.num_components if self.tied else rows)
        covariance = posterior["scale"] / divisor[..., None, None]
        values = {"loc": posterior["loc"], "scale_tril": safe_cholesky(covariance)}
        if self.scale is None:
            values["column_scale"] = self._hyper_mode(values["scale_tril"])
        return values

    def _hyper_conditional(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        assert self.shape is not None
        assert self.rate is not None
        precision = torch.cholesky_inverse(factor)
        diagonal = torch.diagonal(precision, dim1=-2, dim2=-1).sum(-2)
        shape = self.shape + 0.5 * self.df * self._num_covariances
        return torch.full_like(diagonal, shape), self.rate + 0.5 * diagonal

    def _hyper_mode(self, factor: Tensor) -> Tensor:
        shape, rate = self._hyper_conditional(factor)
        return (shape - 1.0).clamp_min(1e-6) / rate

    def log_prior(self, values: Tensors) -> Tensor:
        d, factor = self._d, values["scale_tril"]
        prior_scale, prior_log_det = self._expected_scale(values)
        precision, log_det = torch.cholesky_inverse(factor), _log_det(factor)
        df0 = torch.as_tensor(self.df, dtype=factor.dtype, device=factor.device)
        covariance = (
            -self._log_normalizer(df0, prior_log_det.unsqueeze(-1))
            - 0.5 * (df0 + d + 1) * log_det
            - 0.5 * (prior_scale.unsqueeze(-3) * precision).sum((-2, -1))
        )
        delta = values["loc"] - self.loc
        quadratic = (delta * (precision @ delta.unsqueeze(-1)).squeeze(-1)).sum(-1)
        mean = 0.5 * (
            d * math.log(self.mean_precision / (2.0 * math.pi))
            - log_det
            - self.mean_precision * quadratic
        )
        return covariance.sum(-1) + mean.sum(-1) + self._hyper_log_prior(values)

    def _hyper_log_prior(self, values: Tensors) -> Tensor | float:
        if self.scale is not None:
            return 0.0
        assert self.shape is not None
        assert self.rate is not None
        gamma = torch.distributions.Gamma(torch.full_like(self.rate, self.shape), self.rate)
        return gamma.log_prob(values["column_scale"]).sum(-1)

    # ------------------------------------------------------------ Gibbs
    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.scale is None and (previous is None or "column_scale" not in previous):
            assert self.shape is not None
            assert self.rate is not None
            lead = statistics["moments"].shape[:-2]
            shape = torch.full_like(self.rate, self.shape).expand(*lead, self._d)
            previous = {"column_scale": rng.gamma(shape, generator) / self.rate}
        expected, _ = self._expected_scale(previous)
        posterior = self._conditional(statistics, expected)
        posterior["scale_tril"] = safe_cholesky(posterior.pop("scale"))
        values = self._draw(posterior, generator)
        if self.scale is None:
            shape, rate = self._hyper_conditional(values["scale_tril"])
            values["column_scale"] = rng.gamma(shape, generator) / rate
        return values

    def _draw(self, posterior: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        loc = posterior["loc"]
        scale_tril = self._covariance(posterior).sample(generator=generator)
        noise = rng.standard_normal(loc.shape, generator, dtype=loc.dtype, device=loc.device)
        shift = (scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        return {
            "loc": loc + shift / posterior["mean_precision"].sqrt().unsqueeze(-1),
            "scale_tril": scale_tril,
        }

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return point_message(values["loc"], values["scale_tril"])

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        d = self._d
        prior_scale, prior_log_det = self._expected_scale(values)
        posterior = self._conditional(statistics, prior_scale)
        df = posterior["df"]
        df0 = torch.as_tensor(self.df, dtype=df.dtype, device=df.device)
        log_det = _log_det(safe_cholesky(posterior["scale"]))
        covariance = (
            self._log_normalizer(df, log_det)
            - self._log_normalizer(df0, prior_log_det.unsqueeze(-1))
            - 0.5 * (df - df0) * d * math.log(2.0 * math.pi)
        )
        mean = 0.5 * d * torch.log(self.mean_precision / posterior["mean_precision"])
        return (covariance.sum(-1) + mean.sum(-1)) if self.tied else covariance + mean
