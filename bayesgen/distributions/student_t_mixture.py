"""Mixtures of multivariate Student-t distributions: the exact predictive of a Bayesian mixture."""

from __future__ import annotations

import math
from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from bayesgen.distributions._linalg import (
    as_parameter,
    check_cholesky,
    sample_gamma,
    solve_lower,
)
from bayesgen.distributions._missing import observed_form, split_factor
from bayesgen.distributions._special import student_t_cdf
from bayesgen.distributions.constraints import cholesky_factor
from bayesgen.distributions.partial import (
    block_factor,
    check_columns,
    check_condition,
    partial_real_vector,
    student_t_log_prob,
)

__all__ = ["StudentTMixture"]


def _as_logits(owner: str, weights: Tensor | None, logits: Tensor | None, like: Tensor) -> Tensor:
    if weights is not None and logits is None:
        # A negative weight becomes NaN, which the checks then report.
        return as_parameter(weights, like).log()
    if logits is not None and weights is None:
        return as_parameter(logits, like)
    raise ValueError(f"{owner}: give exactly one of weights and logits.")


def _check(owner: str, logits: Tensor, df: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
    """Raise ``ValueError`` that names the first impossible argument."""
    check_cholesky(owner, "scale_tril", scale_tril)
    if not bool(torch.isfinite(torch.logsumexp(logits, -1)).all()):
        raise ValueError(
            f"{owner}: weights must be finite, not negative, and not all of them zero; logits "
            f"must not be NaN or inf, and not all of them -inf."
        )
    if not bool(torch.isfinite(loc).all()):
        raise ValueError(f"{owner}: loc holds NaN or infinite entries; it must be finite.")
    if not bool((torch.isfinite(df) & (df > 0)).all()):
        raise ValueError(
            f"{owner}: df must be positive and finite, but the smallest given is "
            f"{df.min().item():g} and the largest {df.max().item():g}."
        )


class StudentTMixture(TorchDistribution):
    r"""Mixture of multivariate Student-t distributions, with missing entries integrated out.

    .. math::
        p(x) = \sum_{k=1}^K w_k \, t_{\nu_k}(x_o \mid m_k, L_k L_k^\top),
        \qquad o = \{j : x_j \text{ is not NaN}\}.

    Infinite degrees of freedom are not accepted: a Gaussian component is what ``df = 1e10`` is.

    References:
        Peel and McLachlan (2000). Robust mixture modelling using the t distribution.

    Args:
        weights: Weights of the components, ``(..., K)``, rescaled to sum to one; None if
            ``logits`` is given.
        df: Degrees of freedom, ``(..., K)`` or a number.
        loc: Locations, ``(..., K, d)``.
        scale_tril: Lower Cholesky factors of the scale matrices, ``(..., K, d, d)``.
        logits: Logarithms of unnormalised weights, ``(..., K)``, in place of ``weights``.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument is impossible, saying which and why.

    Example:
        >>> mixture = StudentTMixture(
        ...     torch.tensor([0.5, 0.5]), 3.0, torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1)
        ... )
        >>> mixture.mean, mixture.cdf(torch.zeros(1))
        (tensor([0.]), tensor(0.5000))
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "df": constraints.independent(constraints.positive, 1),
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(cholesky_factor, 1),
    }
    support = partial_real_vector

    def __init__(
        self,
        weights: Tensor | None,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        *,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        validate: bool = self._validate_args if validate_args is None else validate_args
        if scale_tril.dim() < 3 or scale_tril.shape[-1] != scale_tril.shape[-2]:
            raise ValueError(
                f"{owner}: scale_tril has shape {tuple(scale_tril.shape)}, but it must be "
                f"(..., K, d, d)."
            )
        loc, df = as_parameter(loc, scale_tril), as_parameter(df, scale_tril)
        logits = _as_logits(owner, weights, logits, scale_tril)
        if validate:
            _check(owner, logits, df, loc, scale_tril)
        self._set(logits, df, loc, scale_tril)
        self._validate_args: bool = validate

    def _set(self, logits: Tensor, df: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        dim = scale_tril.shape[-1]
        try:
            full = torch.broadcast_shapes(
                logits.shape, df.shape, loc.shape[:-1], scale_tril.shape[:-2]
            )
            loc = loc.expand((*full, dim))
        except RuntimeError as error:
            raise ValueError(
                f"{type(self).__name__}: logits or weights {tuple(logits.shape)}, df "
                f"{tuple(df.shape)}, loc {tuple(loc.shape)} and scale_tril "
                f"{tuple(scale_tril.shape)} do not fit (..., K), (..., K), (..., K, d), "
                f"(..., K, d, d)."
            ) from error
        # Kept unexpanded beside: one factorisation for each factor, however large the batch.
        self._factor, self._location = scale_tril, loc
        self.logits = torch.log_softmax(logits.expand(full), -1)
        self.df, self.loc = df.expand(full), loc
        self.scale_tril = scale_tril.expand((*full, dim, dim))
        super().__init__(full[:-1], Size((dim,)), validate_args=False)

    @property
    def weights(self) -> Tensor:
        """Weights of the components, ``(..., K)``; they sum to one."""
        return self.logits.exp()

    @property
    def num_components(self) -> int:
        """How many components there are."""
        return self.logits.shape[-1]

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(StudentTMixture, _instance)
        full = (*Size(batch_shape), self.num_components)
        dim = self.event_shape[0]
        new._factor, new._location = self._factor, self._location
        new.logits, new.df = self.logits.expand(full), self.df.expand(full)
        new.loc = self.loc.expand((*full, dim))
        new.scale_tril = self.scale_tril.expand((*full, dim, dim))
        super(StudentTMixture, new).__init__(
            Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def sample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw complete rows ``(*sample_shape, *batch, d)``."""
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            device, dtype = self.loc.device, self.loc.dtype
            weights = self.weights.expand((*shape[:-1], self.num_components)).flatten(0, -2)
            label = torch.multinomial(weights, 1, generator=generator).reshape(shape[:-1])
            pick = label.unsqueeze(-1)
            df = self.df.expand((*shape[:-1], -1)).gather(-1, pick).squeeze(-1)
            noise = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            chi = 2.0 * sample_gamma(0.5 * df, generator)
            noise = noise * (df / chi).sqrt().unsqueeze(-1)
            return self._place(noise, label)

    def _place(self, noise: Tensor, label: Tensor) -> Tensor:
        """``loc[label] + scale_tril[label] @ noise`` without a factor for each draw."""
        place = noise.new_empty(noise.shape)
        for k in range(self.num_components):
            mapped = (noise.unsqueeze(-2) @ self.scale_tril[..., k, :, :].mT).squeeze(-2)
            here = (label == k).unsqueeze(-1)
            place = torch.where(here, self.loc[..., k, :] + mapped, place)
        return place

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log density of the observed entries under each component, ``(..., K)``, unweighted."""
        form = observed_form(value.unsqueeze(-2), self._location, self._factor)
        return student_t_log_prob(form, self.df)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return torch.logsumexp(self.logits + self.component_log_prob(value), -1)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Probability that each component made the row, ``(..., K)``."""
        return torch.softmax(self.logits + self.component_log_prob(value), -1)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function of one column, at ``(..., 1)``; see :meth:`marginal`."""
        if self.event_shape[0] != 1:
            raise ValueError(
                f"{type(self).__name__}: cdf needs one column, but there are "
                f"{self.event_shape[0]}. Call marginal([column]) first."
            )
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc[..., 0]) / self.scale_tril[..., 0, 0]
        return (self.weights * student_t_cdf(z, self.df)).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean, ``(..., d)``; NaN where a component of positive weight has ``df <= 1``."""
        mean = (self.weights.unsqueeze(-1) * self.loc).sum(-2)
        return torch.where(self._exists(1.0).unsqueeze(-1), mean, math.nan)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance, ``(..., d, d)``; NaN if a component of positive weight has ``df <= 2``."""
        centred = self.loc - (self.weights.unsqueeze(-1) * self.loc).sum(-2, keepdim=True)
        ratio = (self.df / (self.df - 2.0))[..., None, None]
        inner = ratio * (self.scale_tril @ self.scale_tril.mT)
        inner = torch.where((self.weights > 0)[..., None, None], inner, 0.0)
        total = inner + centred.unsqueeze(-1) * centred.unsqueeze(-2)
        covariance = (self.weights[..., None, None] * total).sum(-3)
        return torch.where(self._exists(2.0)[..., None, None], covariance, math.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of each column, ``(..., d)``."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def _exists(self, degrees: float) -> Tensor:
        return ((self.df > degrees) | (self.weights == 0)).all(-1)

    def marginal(self, columns: Tensor | list[int]) -> StudentTMixture:
        """The distribution of some columns, in that order, by number or boolean mask."""
        index = check_columns(type(self).__name__, columns, self.event_shape[0])
        return StudentTMixture(
            None,
            self.df,
            self._location[..., index],
            block_factor(self._factor, index),
            logits=self.logits,
            validate_args=self._validate_args,
        )

    def condition(self, x: Tensor, observed: Tensor) -> StudentTMixture:
        """The mixture of the columns outside ``observed`` given those inside.

        Args:
            x: Rows, ``(..., d)``; entries outside the mask are not read.
            observed: One boolean mask ``(d,)`` for all rows, with at least one False.
        """
        observed = check_condition(type(self).__name__, x, observed, self.event_shape[0])
        seen, cross, rest = split_factor(self._factor, observed)
        shift = (x[..., observed].unsqueeze(-2) - self.loc[..., observed]).unsqueeze(-1)
        whitened = solve_lower(seen, shift)
        df = self.df + float(observed.sum())
        spread = ((self.df + whitened.square().sum((-2, -1))) / df).sqrt()
        partial = torch.where(observed, x, math.nan)
        return StudentTMixture(
            None,
            df,
            self.loc[..., ~observed] + (cross @ whitened).squeeze(-1),
            rest * spread[..., None, None],
            logits=self.logits + self.component_log_prob(partial),
            validate_args=self._validate_args,
        )
