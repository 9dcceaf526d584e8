"""Inverse-Wishart distributions, parametrised by Cholesky factors."""

from __future__ import annotations

import math
from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints, register_kl

from bayesgen.distributions._linalg import (
    as_parameter,
    check_cholesky,
    log_diagonal,
    multivariate_lgamma,
    sample_gamma,
    solve_lower,
    square_norm,
)
from bayesgen.distributions.constraints import cholesky_factor

__all__ = ["InverseWishart", "InverseWishartCholesky"]


def _square(owner: str, scale_tril: Tensor) -> int:
    """The width of ``scale_tril``, which must be a batch of square floating point matrices."""
    if not isinstance(scale_tril, Tensor) or not scale_tril.is_floating_point():
        raise TypeError(f"{owner}: scale_tril must be a floating point tensor (..., d, d).")
    if scale_tril.dim() < 2 or scale_tril.shape[-1] != scale_tril.shape[-2]:
        raise ValueError(
            f"{owner}: scale_tril has shape {tuple(scale_tril.shape)}, but it must be (..., d, d)."
        )
    return scale_tril.shape[-1]


def check_degrees(owner: str, df: Tensor, dim: int) -> None:
    """Raise ``ValueError`` unless every ``df > dim - 1``: below that there is no density."""
    if not bool((torch.isfinite(df) & (df > dim - 1)).all()):
        raise ValueError(
            f"{owner}: df must be finite and larger than d - 1 = {dim - 1} for {dim} x {dim} "
            f"matrices, but the smallest given is {df.min().item():g}. Use df = d + 2 = {dim + 2} "
            f"for a weak prior whose mean exists."
        )


class InverseWishartCholesky(TorchDistribution):
    r"""Distribution of the Cholesky factor of an inverse-Wishart covariance matrix.

    :math:`\Sigma = LL^\top \sim IW(\nu, \Psi)`, the event is :math:`L`. With ``A = scale_tril``
    and :math:`\Psi = AA^\top`, the density of the distinct entries of :math:`\Sigma` is

    .. math::
        p(\Sigma) = \frac{|\Psi|^{\nu/2}}{2^{\nu d/2} \Gamma_d(\nu/2)} |\Sigma|^{-(\nu+d+1)/2}
        \exp\bigl(-\tfrac12 \mathrm{tr}(\Psi\Sigma^{-1})\bigr),

    and ``log_prob`` is the density of the :math:`d(d+1)/2` entries of :math:`L`, that is
    :math:`p(LL^\top) \, 2^d \prod_i L_{ii}^{d-i+1}`. Draws are :math:`L = AT^{-1}` with :math:`T`
    lower triangular, :math:`T_{ii}^2 \sim \chi^2_{\nu-d+i}` and :math:`T_{ij} \sim N(0, 1)`
    (Bartlett), so ``rsample`` is differentiable in both arguments and never factorises a matrix.

    References:
        Bartlett (1933). On the theory of statistical regression.
        Gupta and Nagar (2000). Matrix Variate Distributions, section 3.4.

    Args:
        df: Degrees of freedom :math:`\nu > d - 1`, ``(...)``.
        scale_tril: Lower Cholesky factor of :math:`\Psi`, ``(..., d, d)``; sets dtype and device.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When ``df`` or ``scale_tril`` is impossible, saying which and why.

    Example:
        >>> prior = InverseWishartCholesky(5.0, torch.eye(2, dtype=torch.float64))
        >>> prior.expected_precision()
        tensor([[5., 0.],
                [0., 5.]], dtype=torch.float64)
    """

    arg_constraints = {"df": constraints.positive, "scale_tril": cholesky_factor}
    support = cholesky_factor
    has_rsample = True

    def __init__(
        self, df: Tensor | float, scale_tril: Tensor, validate_args: bool | None = None
    ) -> None:
        owner = type(self).__name__
        dim = _square(owner, scale_tril)
        df = as_parameter(df, scale_tril)
        if self._validate_args if validate_args is None else validate_args:
            check_cholesky(owner, "scale_tril", scale_tril)
            check_degrees(owner, df, dim)
        batch = torch.broadcast_shapes(df.shape, scale_tril.shape[:-2])
        self.df = df.expand(batch)
        self.scale_tril = scale_tril.expand((*batch, dim, dim))
        super().__init__(batch, Size((dim, dim)), validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(InverseWishartCholesky, _instance)
        batch = Size(batch_shape)
        new.df = self.df.expand(batch)
        new.scale_tril = self.scale_tril.expand(batch + self.event_shape)
        super(InverseWishartCholesky, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _half_degrees(self) -> Tensor:
        """Half the degrees of freedom of the ``d`` chi-squares, ``(..., d)``: (df - d + i) / 2."""
        dim = self.event_shape[-1]
        order = torch.arange(1 - dim, 1, dtype=self.df.dtype, device=self.df.device)
        return 0.5 * (self.df.unsqueeze(-1) + order)

    def _powers(self) -> Tensor:
        """The density is a product of ``L_ii ** -(df + i)``: these ``df + i``, ``(..., d)``."""
        dim = self.event_shape[-1]
        order = torch.arange(1, dim + 1, dtype=self.df.dtype, device=self.df.device)
        return self.df.unsqueeze(-1) + order

    def log_normalizer(self) -> Tensor:
        r"""Log integral of the unnormalised density over :math:`\Sigma`, in nats.

        .. math::
            \log\int |\Sigma|^{-(\nu+d+1)/2}
            \exp\bigl(-\tfrac12\mathrm{tr}(\Psi\Sigma^{-1})\bigr) d\Sigma.
        """
        dim = self.event_shape[-1]
        return (
            0.5 * dim * math.log(2.0) * self.df
            + multivariate_lgamma(0.5 * self.df, dim)
            - self.df * log_diagonal(self.scale_tril).sum(-1)
        )

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw factors ``(*sample_shape, *batch, d, d)``, from ``generator`` when one is given."""
        return self._rsample(sample_shape, generator)

    def _rsample(
        self, sample_shape: Size | tuple[int, ...], generator: torch.Generator | None
    ) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        half = self._half_degrees().expand(shape[:-1])
        diagonal = (2.0 * sample_gamma(half, generator)).sqrt()
        noise = torch.randn(
            shape, dtype=diagonal.dtype, device=diagonal.device, generator=generator
        )
        bartlett = noise.tril(-1) + diagonal.diag_embed()
        return torch.linalg.solve_triangular(
            bartlett, self.scale_tril.expand(shape), upper=False, left=False
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
        whitened = solve_lower(value, self.scale_tril)
        return (
            self.event_shape[-1] * math.log(2.0)
            - self.log_normalizer()
            - (self._powers() * log_diagonal(value)).sum(-1)
            - 0.5 * square_norm(whitened)
        )

    def expected_precision(self) -> Tensor:
        r""":math:`E[\Sigma^{-1}] = \nu\Psi^{-1}`, ``(..., d, d)``."""
        eye = torch.eye(
            self.event_shape[-1], dtype=self.scale_tril.dtype, device=self.scale_tril.device
        )
        inverse = solve_lower(self.scale_tril, eye)
        return self.df[..., None, None] * (inverse.mT @ inverse)

    def expected_log_diagonal(self) -> Tensor:
        r""":math:`E[\log L_{ii}]`, ``(..., d)``."""
        chi = torch.digamma(self._half_degrees()) + math.log(2.0)
        return log_diagonal(self.scale_tril) - 0.5 * chi

    def expected_log_det_precision(self) -> Tensor:
        r""":math:`E[\log|\Sigma^{-1}|]`, ``(...)``."""
        return -2.0 * self.expected_log_diagonal().sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy of the free entries of the factor, in nats."""
        dim = self.event_shape[-1]
        return (
            self.log_normalizer()
            - dim * math.log(2.0)
            + (self._powers() * self.expected_log_diagonal()).sum(-1)
            + 0.5 * dim * self.df
        )

    @property
    def mean(self) -> Tensor:
        """Mean of the factor, ``A diag(E[1 / T_ii])``; NaN unless ``df > d``."""
        half = self._half_degrees()
        scale = torch.exp(torch.lgamma(half - 0.5) - torch.lgamma(half)) * math.sqrt(0.5)
        scale = torch.where(self.df[..., None] > self.event_shape[-1], scale, math.nan)
        return self.scale_tril * scale.unsqueeze(-2)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry of the factor; NaN unless ``df > d + 1``."""
        degrees = 2.0 * self._half_degrees()
        # E[(T^-1)_kj ** 2]: a telescoping product below the diagonal, an inverse chi-square on it.
        diagonal = 1.0 / (degrees - 2.0)
        below = diagonal / (degrees - 1.0)
        shape = self.scale_tril.shape
        second = below.unsqueeze(-2).expand(shape).tril(-1) + diagonal.diag_embed()
        moment = self.scale_tril.square() @ second
        exists = (self.df > self.event_shape[-1] + 1)[..., None, None]
        return torch.where(exists, moment - self.mean.square(), math.nan)

    @property
    def mode(self) -> Tensor:
        r"""Factor of the mode of the density of :math:`\Sigma`, :math:`\Psi/(\nu+d+1)`.

        The density of the factor has another maximum: :attr:`factor_mode`.
        """
        return self.scale_tril * (self.df + self.event_shape[-1] + 1.0).rsqrt()[..., None, None]

    @property
    def factor_mode(self) -> Tensor:
        r"""Where ``log_prob`` is largest: :math:`A\,\mathrm{diag}((\nu+i)^{-1/2})`."""
        return self.scale_tril * self._powers().rsqrt().unsqueeze(-2)


class InverseWishart(TorchDistribution):
    r"""Inverse-Wishart distribution of a covariance matrix, by the factor of its scale.

    The density is over the :math:`d(d+1)/2` distinct entries, as in ``scipy.stats.invwishart``:

    .. math::
        p(\Sigma) = \frac{|\Psi|^{\nu/2}}{2^{\nu d/2} \Gamma_d(\nu/2)} |\Sigma|^{-(\nu+d+1)/2}
        \exp\bigl(-\tfrac12 \mathrm{tr}(\Psi\Sigma^{-1})\bigr).

    Prefer :class:`InverseWishartCholesky` inside models: it never factorises :math:`\Sigma`.

    References:
        Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013). Bayesian Data Analysis, ch. 3.6.

    Args:
        df: Degrees of freedom :math:`\nu > d - 1`, ``(...)``.
        scale_tril: Lower Cholesky factor of :math:`\Psi`, ``(..., d, d)``; sets dtype and device.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When ``df`` or ``scale_tril`` is impossible, saying which and why.

    Example:
        >>> InverseWishart(7.0, 2.0 * torch.eye(2)).mean
        tensor([[1., 0.],
                [0., 1.]])
    """

    arg_constraints = {"df": constraints.positive, "scale_tril": cholesky_factor}
    support = constraints.positive_definite
    has_rsample = True

    def __init__(
        self, df: Tensor | float, scale_tril: Tensor, validate_args: bool | None = None
    ) -> None:
        owner = type(self).__name__
        dim = _square(owner, scale_tril)
        df = as_parameter(df, scale_tril)
        if self._validate_args if validate_args is None else validate_args:
            check_cholesky(owner, "scale_tril", scale_tril)
            check_degrees(owner, df, dim)
        self.factor = InverseWishartCholesky(df, scale_tril, validate_args=False)
        self.df, self.scale_tril = self.factor.df, self.factor.scale_tril
        super().__init__(
            self.factor.batch_shape, self.factor.event_shape, validate_args=validate_args
        )

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(InverseWishart, _instance)
        new.factor = self.factor.expand(batch_shape)
        new.df, new.scale_tril = new.factor.df, new.factor.scale_tril
        super(InverseWishart, new).__init__(
            Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def _order(self) -> Tensor:
        """Powers of ``L_ii`` in the Jacobian of ``L -> L L^T``: d, ..., 1."""
        dim = self.event_shape[-1]
        return torch.arange(dim, 0, -1, dtype=self.df.dtype, device=self.df.device)

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw matrices ``(*sample_shape, *batch, d, d)``, from ``generator`` if one is given."""
        factor = self.factor.rsample(sample_shape, generator=generator)
        return factor @ factor.mT

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
        factor = torch.linalg.cholesky(value)
        jacobian = (self._order() * log_diagonal(factor)).sum(-1)
        return self.factor.log_prob(factor) - jacobian - self.event_shape[-1] * math.log(2.0)

    def entropy(self) -> Tensor:
        """Differential entropy of the distinct entries of the matrix, in nats."""
        jacobian = (self._order() * self.factor.expected_log_diagonal()).sum(-1)
        return self.factor.entropy() + jacobian + self.event_shape[-1] * math.log(2.0)

    def expected_precision(self) -> Tensor:
        r""":math:`E[\Sigma^{-1}] = \nu\Psi^{-1}`, ``(..., d, d)``."""
        return self.factor.expected_precision()

    def expected_log_det_precision(self) -> Tensor:
        r""":math:`E[\log|\Sigma^{-1}|]`, ``(...)``."""
        return self.factor.expected_log_det_precision()

    def _psi(self) -> Tensor:
        return self.scale_tril @ self.scale_tril.mT

    @property
    def mean(self) -> Tensor:
        r""":math:`\Psi/(\nu-d-1)`; NaN unless ``df > d + 1``."""
        free = (self.df - self.event_shape[-1] - 1.0)[..., None, None]
        return torch.where(free > 0, self._psi() / free, math.nan)

    @property
    def mode(self) -> Tensor:
        r""":math:`\Psi/(\nu+d+1)`."""
        return self._psi() / (self.df + self.event_shape[-1] + 1.0)[..., None, None]

    @property
    def variance(self) -> Tensor:
        """Variance of each entry; NaN unless ``df > d + 3``."""
        psi = self._psi()
        free = (self.df - self.event_shape[-1])[..., None, None]
        diagonal = psi.diagonal(dim1=-2, dim2=-1)
        outer = diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)
        top = (free + 1.0) * psi.square() + (free - 1.0) * outer
        bottom = free * (free - 1.0).square() * (free - 3.0)
        return torch.where(free > 3.0, top / bottom, math.nan)


@register_kl(InverseWishartCholesky, InverseWishartCholesky)
def _kl_factor(p: InverseWishartCholesky, q: InverseWishartCholesky) -> Tensor:
    whitened = solve_lower(p.scale_tril, q.scale_tril)
    return (
        q.log_normalizer()
        - p.log_normalizer()
        + 0.5 * (p.df - q.df) * p.expected_log_det_precision()
        + 0.5 * p.df * (square_norm(whitened) - p.event_shape[-1])
    )


@register_kl(InverseWishart, InverseWishart)
def _kl_matrix(p: InverseWishart, q: InverseWishart) -> Tensor:
    # The Kullback-Leibler divergence does not depend on the coordinates.
    return _kl_factor(p.factor, q.factor)
