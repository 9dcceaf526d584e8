"""The conjugate prior of a Gaussian's mean and covariance, parametrised by Cholesky factors."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from pyro.distributions import MultivariateNormal, MultivariateStudentT, TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints, register_kl

from bayesgen.distributions._linalg import (
    as_parameter,
    check_cholesky,
    log_diagonal,
    solve_lower,
    square_norm,
)
from bayesgen.distributions.constraints import cholesky_factor, loc_cholesky
from bayesgen.distributions.inverse_wishart import (
    InverseWishartCholesky,
    _kl_factor,
    _square,
    check_degrees,
)

__all__ = ["NaturalExpectations", "NormalInverseWishart"]


class NaturalExpectations(NamedTuple):
    r"""Expected natural parameters of a Gaussian likelihood with precision :math:`\Lambda`."""

    precision: Tensor
    r""":math:`E[\Lambda]`, ``(..., d, d)``."""
    precision_loc: Tensor
    r""":math:`E[\Lambda\mu]`, ``(..., d)``."""
    loc_precision_loc: Tensor
    r""":math:`E[\mu^\top\Lambda\mu]`, ``(...)``."""
    log_det_precision: Tensor
    r""":math:`E[\log|\Lambda|]`, ``(...)``."""


class NormalInverseWishart(TorchDistribution):
    r"""Normal-inverse-Wishart distribution of a Gaussian's mean and covariance.

    .. math::
        \Sigma \sim IW(\nu, \Psi), \qquad \mu \mid \Sigma \sim N(m, \Sigma/\kappa).

    One event is the ``(d, d + 1)`` tensor ``[mu | L]`` with :math:`\Sigma = LL^\top`; see
    :meth:`pack` and :meth:`unpack`. ``log_prob`` is a density of the :math:`d + d(d+1)/2` free
    entries.

    References:
        Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013). Bayesian Data Analysis, ch. 3.6.
        Murphy (2007). Conjugate Bayesian analysis of the Gaussian distribution.

    Args:
        loc: Prior mean :math:`m`, ``(..., d)``.
        mean_precision: :math:`\kappa > 0`, how many observations the mean is worth, ``(...)``.
        df: Degrees of freedom :math:`\nu > d - 1`, ``(...)``.
        scale_tril: Lower Cholesky factor of :math:`\Psi`, ``(..., d, d)``; sets dtype and device.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument is impossible, saying which and why.

    Example:
        >>> prior = NormalInverseWishart(torch.zeros(2), 1.0, 4.0, torch.eye(2))
        >>> prior.event_shape
        torch.Size([2, 3])
        >>> loc, scale_tril = prior.unpack(prior.mode)
        >>> (scale_tril @ scale_tril.mT)[0, 0]
        tensor(0.1250)
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "mean_precision": constraints.positive,
        "df": constraints.positive,
        "scale_tril": cholesky_factor,
    }
    support = loc_cholesky
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        mean_precision: Tensor | float,
        df: Tensor | float,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        dim = _square(owner, scale_tril)
        loc, df = as_parameter(loc, scale_tril), as_parameter(df, scale_tril)
        mean_precision = as_parameter(mean_precision, scale_tril)
        if loc.dim() and loc.shape[-1] not in (1, dim):
            raise ValueError(
                f"{owner}: loc has {loc.shape[-1]} entries, but scale_tril is {dim} x {dim}."
            )
        if self._validate_args if validate_args is None else validate_args:
            check_cholesky(owner, "scale_tril", scale_tril)
            check_degrees(owner, df, dim)
            if not bool((torch.isfinite(mean_precision) & (mean_precision > 0)).all()):
                raise ValueError(
                    f"{owner}: mean_precision must be positive and finite, but the smallest given "
                    f"is {mean_precision.min().item():g}."
                )
        batch = torch.broadcast_shapes(
            loc.shape[:-1], mean_precision.shape, df.shape, scale_tril.shape[:-2]
        )
        self._scale = InverseWishartCholesky(df, scale_tril, validate_args=False).expand(batch)
        self.df, self.scale_tril = self._scale.df, self._scale.scale_tril
        self.loc = loc.expand((*batch, dim))
        self.mean_precision = mean_precision.expand(batch)
        super().__init__(batch, Size((dim, dim + 1)), validate_args=validate_args)

    @staticmethod
    def pack(loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Join a mean ``(..., d)`` and a factor ``(..., d, d)`` into ``(..., d, d + 1)``."""
        batch = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2])
        loc = loc.expand((*batch, loc.shape[-1])).unsqueeze(-1)
        return torch.cat([loc, scale_tril.expand((*batch, *scale_tril.shape[-2:]))], -1)

    @staticmethod
    def unpack(value: Tensor) -> tuple[Tensor, Tensor]:
        """Split an event into the mean ``(..., d)`` and the factor ``(..., d, d)``."""
        return value[..., 0], value[..., 1:]

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(NormalInverseWishart, _instance)
        batch = Size(batch_shape)
        new._scale = self._scale.expand(batch)
        new.df, new.scale_tril = new._scale.df, new._scale.scale_tril
        new.loc = self.loc.expand((*batch, self.loc.shape[-1]))
        new.mean_precision = self.mean_precision.expand(batch)
        super(NormalInverseWishart, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch, d, d + 1)``, from ``generator`` when one is given."""
        factor = self._scale.rsample(sample_shape, generator=generator)
        noise = torch.randn(
            factor.shape[:-1], dtype=factor.dtype, device=factor.device, generator=generator
        )
        shrink = self.mean_precision.rsqrt().unsqueeze(-1)
        step = (factor @ noise.unsqueeze(-1)).squeeze(-1) * shrink
        return torch.cat([(self.loc + step).unsqueeze(-1), factor], -1)

    def sample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, factor = self.unpack(value)
        dim = self.event_shape[0]
        shift = self.mean_precision.sqrt().unsqueeze(-1) * (loc - self.loc)
        scale = self.scale_tril.expand((*shift.shape[:-1], dim, dim))
        # One triangular solve serves both the trace and the mean's quadratic form.
        whitened = solve_lower(factor, torch.cat([scale, shift.unsqueeze(-1)], -1))
        return (
            dim * math.log(2.0)
            - self.log_normalizer()
            - ((self._scale._powers() + 1.0) * log_diagonal(factor)).sum(-1)
            - 0.5 * square_norm(whitened)
        )

    def log_normalizer(self) -> Tensor:
        r"""Log integral of the unnormalised density over :math:`(\mu, \Sigma)`, in nats.

        .. math::
            \log\int |\Sigma|^{-(\nu+d+2)/2} \exp\bigl(-\tfrac12\mathrm{tr}(\Psi\Sigma^{-1})
            - \tfrac\kappa2 (\mu-m)^\top\Sigma^{-1}(\mu-m)\bigr) d\mu\, d\Sigma.

        The log evidence of ``n`` rows is that of the posterior less that of the prior, less
        :math:`\tfrac{nd}{2}\log 2\pi`.
        """
        dim = self.event_shape[0]
        loc_part = 0.5 * dim * (math.log(2.0 * math.pi) - self.mean_precision.log())
        return self._scale.log_normalizer() + loc_part

    def entropy(self) -> Tensor:
        """Differential entropy of the free entries of the event, in nats."""
        loc_part = (
            0.5 * self.event_shape[0] * (1.0 + math.log(2.0 * math.pi) - self.mean_precision.log())
        )
        return self._scale.entropy() + loc_part + self._scale.expected_log_diagonal().sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean of the packed event; NaN in the factor unless ``df > d``."""
        return self.pack(self.loc, self._scale.mean)

    @property
    def mode(self) -> Tensor:
        r"""Packed mode over :math:`(\mu, \Sigma)`: :math:`m` and :math:`\Psi/(\nu+d+2)`.

        The density over :math:`(\mu, L)` has another maximum: :attr:`factor_mode`.
        """
        shrink = (self.df + self.event_shape[0] + 2.0).rsqrt()[..., None, None]
        return self.pack(self.loc, self.scale_tril * shrink)

    @property
    def factor_mode(self) -> Tensor:
        r"""Where ``log_prob`` is largest, :math:`A\,\mathrm{diag}((\nu+i+1)^{-1/2})`."""
        shrink = (self._scale._powers() + 1.0).rsqrt().unsqueeze(-2)
        return self.pack(self.loc, self.scale_tril * shrink)

    def scale_tril_marginal(self) -> InverseWishartCholesky:
        """The marginal distribution of the covariance's Cholesky factor."""
        return self._scale

    def loc_marginal(self) -> MultivariateStudentT:
        """The marginal distribution of the mean: a Student-t, degrees ``df - d + 1``."""
        return self._student(1.0 / self.mean_precision)

    def loc_given(self, scale_tril: Tensor) -> MultivariateNormal:
        """The distribution of the mean given the covariance's Cholesky factor ``(..., d, d)``."""
        shrink = self.mean_precision.rsqrt()[..., None, None]
        return MultivariateNormal(
            self.loc, scale_tril=scale_tril * shrink, validate_args=self._validate_args
        )

    def posterior(self, count: Tensor | float, mean: Tensor, scatter: Tensor) -> Self:
        r"""The conjugate posterior after (weighted) Gaussian rows, given their statistics.

        Args:
            count: Number of rows or sum of their weights, at least 0, ``(...)``.
            mean: Their mean :math:`\bar x`, ``(..., d)``; not read where ``count`` is 0.
            scatter: :math:`\sum_i w_i (x_i-\bar x)(x_i-\bar x)^\top`, ``(..., d, d)``. Centred,
                because raw sums of squares lose all their digits when the data lie far from 0.

        Returns:
            A distribution of the same class.
        """
        count = as_parameter(count, self.scale_tril)
        total = self.mean_precision + count
        shift = torch.where(count.unsqueeze(-1) > 0, mean - self.loc, 0.0)
        loc = self.loc + (count / total).unsqueeze(-1) * shift
        spread = (self.mean_precision * count / total)[..., None, None]
        psi = (
            self.scale_tril @ self.scale_tril.mT
            + scatter
            + spread * shift.unsqueeze(-1) * shift.unsqueeze(-2)
        )
        return type(self)(
            loc,
            total,
            self.df + count,
            torch.linalg.cholesky(psi),
            validate_args=self._validate_args,
        )

    def expected_natural(self) -> NaturalExpectations:
        """Expected natural parameters of the Gaussian likelihood: what variational Bayes reads."""
        precision = self._scale.expected_precision()
        whitened = solve_lower(self.scale_tril, self.loc.unsqueeze(-1))
        precision_loc = (precision @ self.loc.unsqueeze(-1)).squeeze(-1)
        quadratic = self.event_shape[0] / self.mean_precision + self.df * square_norm(whitened)
        return NaturalExpectations(
            precision, precision_loc, quadratic, self._scale.expected_log_det_precision()
        )

    def predictive(self) -> MultivariateStudentT:
        """The distribution of one new row with mean and covariance integrated out: a Student-t."""
        return self._student((self.mean_precision + 1.0) / self.mean_precision)

    def _student(self, spread: Tensor) -> MultivariateStudentT:
        free = self.df - self.event_shape[0] + 1.0
        scale = self.scale_tril * (spread / free).sqrt()[..., None, None]
        return MultivariateStudentT(free, self.loc, scale, validate_args=self._validate_args)


@register_kl(NormalInverseWishart, NormalInverseWishart)
def _kl(p: NormalInverseWishart, q: NormalInverseWishart) -> Tensor:
    ratio = q.mean_precision / p.mean_precision
    shift = solve_lower(p.scale_tril, (p.loc - q.loc).unsqueeze(-1))
    loc_part = p.event_shape[0] * (ratio - 1.0 - ratio.log())
    loc_part = loc_part + q.mean_precision * p.df * square_norm(shift)
    return _kl_factor(p._scale, q._scale) + 0.5 * loc_part
