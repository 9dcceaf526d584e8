"""The conjugate prior of a univariate Gaussian's mean and variance, elementwise."""

from __future__ import annotations

import math
from typing import Self

import torch
from pyro.distributions import InverseGamma, Normal, StudentT, TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all

from bayesgen.distributions._linalg import sample_gamma
from bayesgen.distributions.constraints import loc_variance
from bayesgen.distributions.normal_inverse_wishart import NaturalExpectations

__all__ = ["NormalInverseGamma"]


class NormalInverseGamma(TorchDistribution):
    r"""Normal-inverse-gamma distribution of a Gaussian's mean and variance, elementwise.

    .. math::
        v \sim \mathrm{InverseGamma}(a, b), \qquad \mu \mid v \sim N(m, v/\kappa).

    One event is ``(mu, v)`` in a last dimension of 2; see :meth:`pack` and :meth:`unpack`. It is
    the normal-inverse-Wishart with :math:`d = 1`, :math:`\nu = 2a`, :math:`\Psi = 2b`, with the
    variance in the place of its root.

    References:
        Murphy (2007). Conjugate Bayesian analysis of the Gaussian distribution.

    Args:
        loc: Prior mean :math:`m`, ``(...)``.
        mean_precision: :math:`\kappa > 0`, how many observations the mean is worth, ``(...)``.
        concentration: :math:`a > 0`, ``(...)``.
        rate: :math:`b > 0`, in squared units of the data, ``(...)``.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument is impossible, saying which and why.

    Example:
        >>> prior = NormalInverseGamma(torch.zeros(3), 1.0, 2.0, 7.0)
        >>> prior.batch_shape, prior.event_shape
        (torch.Size([3]), torch.Size([2]))
        >>> prior.mode[0]
        tensor([0., 2.])
    """

    arg_constraints = {
        "loc": constraints.real,
        "mean_precision": constraints.positive,
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support = loc_variance
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        mean_precision: Tensor | float,
        concentration: Tensor | float,
        rate: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        parameters = broadcast_all(loc, mean_precision, concentration, rate)
        self.loc, self.mean_precision, self.concentration, self.rate = parameters
        if self._validate_args if validate_args is None else validate_args:
            for name in ("mean_precision", "concentration", "rate"):
                value = getattr(self, name)
                if not bool((torch.isfinite(value) & (value > 0)).all()):
                    raise ValueError(
                        f"{type(self).__name__}: {name} must be positive and finite, but the "
                        f"smallest given is {value.min().item():g}."
                    )
        super().__init__(self.loc.shape, Size((2,)), validate_args=validate_args)

    @staticmethod
    def pack(loc: Tensor, variance: Tensor) -> Tensor:
        """Join a mean and a variance of the same or broadcasting shapes into ``(..., 2)``."""
        return torch.stack(torch.broadcast_tensors(loc, variance), -1)

    @staticmethod
    def unpack(value: Tensor) -> tuple[Tensor, Tensor]:
        """Split an event ``(..., 2)`` into the mean and the variance."""
        return value[..., 0], value[..., 1]

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(NormalInverseGamma, _instance)
        batch = Size(batch_shape)
        new.loc, new.mean_precision = self.loc.expand(batch), self.mean_precision.expand(batch)
        new.concentration, new.rate = self.concentration.expand(batch), self.rate.expand(batch)
        super(NormalInverseGamma, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch, 2)``, from ``generator`` when one is given."""
        shape = self._extended_shape(Size(sample_shape))[:-1]
        variance = self.rate / sample_gamma(self.concentration.expand(shape), generator)
        noise = torch.randn(
            shape, dtype=variance.dtype, device=variance.device, generator=generator
        )
        return torch.stack(
            [self.loc + noise * (variance / self.mean_precision).sqrt(), variance], -1
        )

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
        loc, variance = self.unpack(value)
        energy = self.rate + 0.5 * self.mean_precision * (loc - self.loc).square()
        return (
            -self.log_normalizer()
            - (self.concentration + 1.5) * variance.log()
            - energy / variance
        )

    def log_normalizer(self) -> Tensor:
        r"""Log integral of the unnormalised density over :math:`(\mu, v)`, in nats.

        .. math::
            \log\int v^{-(a+3/2)} \exp\bigl(-(b + \tfrac\kappa2(\mu-m)^2)/v\bigr) d\mu\, dv.

        The log evidence of ``n`` numbers is that of the posterior less that of the prior, less
        :math:`\tfrac n2\log 2\pi`.
        """
        scale_part = torch.lgamma(self.concentration) - self.concentration * self.rate.log()
        return scale_part + 0.5 * (math.log(2.0 * math.pi) - self.mean_precision.log())

    def expected_log_variance(self) -> Tensor:
        r""":math:`E[\log v]`, ``(...)``."""
        return self.rate.log() - torch.digamma(self.concentration)

    def entropy(self) -> Tensor:
        """Differential entropy of ``(mu, v)``, in nats."""
        power = (self.concentration + 1.5) * self.expected_log_variance()
        return self.log_normalizer() + power + self.concentration + 0.5

    @property
    def mean(self) -> Tensor:
        """Packed mean; the variance's, ``rate / (concentration - 1)``, is NaN if infinite."""
        free = self.concentration - 1.0
        return self.pack(self.loc, torch.where(free > 0, self.rate / free, math.nan))

    @property
    def variance(self) -> Tensor:
        """Variances of ``(mu, v)``; NaN unless the concentration is above 1 and 2."""
        free = self.concentration - 1.0
        spread = torch.where(free > 0, self.rate / free, math.nan)
        second = torch.where(free > 1, spread.square() / (free - 1.0), math.nan)
        return self.pack(spread / self.mean_precision, second)

    @property
    def mode(self) -> Tensor:
        """Packed mode of the density: ``loc`` and ``rate / (concentration + 3/2)``."""
        return self.pack(self.loc, self.rate / (self.concentration + 1.5))

    def variance_marginal(self) -> InverseGamma:
        """The marginal distribution of the variance."""
        return InverseGamma(self.concentration, self.rate, validate_args=self._validate_args)

    def loc_marginal(self) -> StudentT:
        """The marginal distribution of the mean: a Student-t, ``df`` twice the concentration."""
        return self._student(1.0 / self.mean_precision)

    def loc_given(self, variance: Tensor) -> Normal:
        """The distribution of the mean given the variance."""
        scale = (variance / self.mean_precision).sqrt()
        return Normal(self.loc, scale, validate_args=self._validate_args)

    def posterior(self, count: Tensor | float, mean: Tensor, scatter: Tensor) -> Self:
        r"""The conjugate posterior after (weighted) Gaussian numbers, given their statistics.

        Args:
            count: How many, or the sum of their weights, at least 0, ``(...)``.
            mean: Their mean, ``(...)``; not read where ``count`` is 0.
            scatter: :math:`\sum_i w_i (x_i-\bar x)^2`, centred: no digits are lost, ``(...)``.

        Returns:
            A distribution of the same class.
        """
        count = torch.as_tensor(count, dtype=self.loc.dtype, device=self.loc.device)
        total = self.mean_precision + count
        shift = torch.where(count > 0, mean - self.loc, 0.0)
        spread = self.mean_precision * count / total * shift.square()
        return type(self)(
            self.loc + count / total * shift,
            total,
            self.concentration + 0.5 * count,
            self.rate + 0.5 * (scatter + spread),
            validate_args=self._validate_args,
        )

    def expected_natural(self) -> NaturalExpectations:
        r"""Expected natural parameters of the Gaussian likelihood, each ``(...)``.

        :math:`E[1/v]`, :math:`E[\mu/v]`, :math:`E[\mu^2/v]` and :math:`E[\log 1/v]`, in the
        fields of the same meaning as those of the normal-inverse-Wishart.
        """
        precision = self.concentration / self.rate
        quadratic = 1.0 / self.mean_precision + precision * self.loc.square()
        return NaturalExpectations(
            precision, precision * self.loc, quadratic, -self.expected_log_variance()
        )

    def predictive(self) -> StudentT:
        """One new number with mean and variance integrated out: a Student-t."""
        return self._student((self.mean_precision + 1.0) / self.mean_precision)

    def _student(self, spread: Tensor) -> StudentT:
        scale = (spread * self.rate / self.concentration).sqrt()
        return StudentT(
            2.0 * self.concentration, self.loc, scale, validate_args=self._validate_args
        )


@register_kl(NormalInverseGamma, NormalInverseGamma)
def _kl(p: NormalInverseGamma, q: NormalInverseGamma) -> Tensor:
    precision = p.concentration / p.rate
    ratio = q.mean_precision / p.mean_precision
    gamma = (
        q.log_normalizer()
        - p.log_normalizer()
        - 0.5 * (p.mean_precision.log() - q.mean_precision.log())
        + (p.concentration - q.concentration) * -p.expected_log_variance()
        + precision * (q.rate - p.rate)
    )
    shift = q.mean_precision * precision * (p.loc - q.loc).square()
    return gamma + 0.5 * (ratio - 1.0 - ratio.log() + shift)
