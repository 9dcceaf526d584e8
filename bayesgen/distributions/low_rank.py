"""Normal and Student-t laws of low rank whose values may have missing entries, exact and cheap."""

from __future__ import annotations

import math
from typing import Protocol, Self, runtime_checkable

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from bayesgen.distributions._linalg import sample_gamma
from bayesgen.distributions._low_rank import LowRankForm, low_rank_form
from bayesgen.distributions._missing import ObservedForm
from bayesgen.distributions.partial import partial_real_vector, student_t_log_prob

__all__ = [
    "PartialLowRankMultivariateNormal",
    "PartialLowRankMultivariateStudentT",
    "Summed",
]

_LOG_2PI = math.log(2.0 * math.pi)


@runtime_checkable
class Summed(Protocol):
    """A distribution that adds up the log density of many rows faster than row by row."""

    def log_prob_sum(self, value: Tensor) -> Tensor:
        """The sum of ``log_prob(value)``, ``()``."""


def _row_form(value: Tensor, loc: Tensor, factor: Tensor, diag: Tensor) -> LowRankForm:
    """The form of values whose last batch dimension, if there is one, counts rows.

    ``factor`` and ``diag`` are those before broadcasting: rows that share them go together.
    """
    shift, missing = value - loc, torch.isnan(value)
    one_row = shift.dim() == 1
    own = (factor.dim() > 2 and factor.shape[-3] > 1) or (diag.dim() > 1 and diag.shape[-2] > 1)
    if not (one_row or own):
        factor = factor.squeeze(-3) if factor.dim() > 2 else factor
        diag = diag.squeeze(-2) if diag.dim() > 1 else diag
        return low_rank_form(shift, missing, factor, diag.sqrt())
    found = low_rank_form(shift.unsqueeze(-2), missing.unsqueeze(-2), factor, diag.sqrt())
    form = ObservedForm(*(part.squeeze(-1) for part in found.form))
    return LowRankForm(form, found.loc.squeeze(-2), found.precision_tril.squeeze(-3))


def _moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number and mean ``(d,)`` of rows, and a root ``(d, d)`` of their scatter around it."""
    exact = rows.double()
    mean = exact.mean(0)
    root = torch.linalg.qr(exact - mean).R
    return len(rows), mean.to(rows.dtype), root.to(rows.dtype)


def _noise(shape: Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


class _LowRank(TorchDistribution):
    """An elliptical law with scale matrix ``cov_factor @ cov_factor.T + diag(cov_diag)``."""

    arg_constraints: dict[str, constraints.Constraint] = {
        "loc": constraints.real_vector,
        "cov_factor": constraints.independent(constraints.real, 2),
        "cov_diag": constraints.independent(constraints.positive, 1),
    }
    support = partial_real_vector

    def __init__(
        self,
        loc: Tensor,
        cov_factor: Tensor,
        cov_diag: Tensor,
        batch: Size,
        validate_args: bool | None,
    ) -> None:
        if cov_factor.shape[-2:-1] != loc.shape[-1:] or cov_diag.shape[-1:] != loc.shape[-1:]:
            raise ValueError(
                f"{type(self).__name__}: loc {tuple(loc.shape)}, cov_factor "
                f"{tuple(cov_factor.shape)} and cov_diag {tuple(cov_diag.shape)} must be "
                "(..., d), (..., d, q) and (..., d)."
            )
        self.loc, self.cov_factor, self.cov_diag = loc, cov_factor, cov_diag
        self._unbroadcasted_loc = loc
        batch = torch.broadcast_shapes(
            batch, loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1]
        )
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def _expanded(self, new: Self, batch: Size) -> Self:
        new.loc = self.loc.expand(batch + self.event_shape)
        # Factors stay as they are: rows that share them are taken together.
        new._unbroadcasted_loc = self._unbroadcasted_loc
        new.cov_factor, new.cov_diag = self.cov_factor, self.cov_diag
        TorchDistribution.__init__(new, batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale_matrix(self) -> Tensor:
        """``cov_factor @ cov_factor.T + diag(cov_diag)``, ``(..., d, d)``."""
        matrix = self.cov_factor @ self.cov_factor.mT + torch.diag_embed(self.cov_diag)
        return matrix.expand(self._batch_shape + 2 * self._event_shape)

    @property
    def _spread(self) -> Tensor:
        diagonal = self.cov_factor.square().sum(-1) + self.cov_diag
        return diagonal.expand(self._batch_shape + self._event_shape)

    def _form(self, value: Tensor) -> ObservedForm:
        if self._validate_args:
            self._validate_sample(value)
        return _row_form(value, self.loc, self.cov_factor, self.cov_diag).form

    def _shift(self, shape: Size, generator: torch.Generator | None) -> Tensor:
        """Draws of the normal law around zero."""
        latent = _noise(Size((*shape[:-1], self.cov_factor.shape[-1])), self.loc, generator)
        signal = (self.cov_factor @ latent.unsqueeze(-1)).squeeze(-1)
        return signal + self.cov_diag.sqrt() * _noise(shape, self.loc, generator)


class PartialLowRankMultivariateNormal(_LowRank):
    r"""Multivariate normal of low-rank covariance whose values may have missing entries.

    .. math::
        \log p(x) = \log N(x_o \mid \mu_o, W_o W_o^\top + \Psi_{oo}), \qquad
        o = \{j : x_j \text{ is not NaN}\}.

    Nothing of size :math:`d \times d` is formed, with or without gaps: each row costs a factor of
    size :math:`q`. A row without any observed entry has ``log_prob`` 0. Draws are complete.

    References:
        Tipping and Bishop (1999). Probabilistic principal component analysis.

    Args:
        loc: Mean, ``(..., d)``.
        cov_factor: :math:`W`, ``(..., d, q)``. Leave factors that rows share unexpanded.
        cov_diag: Diagonal of :math:`\Psi`, ``(..., d)``, positive.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument, or an infinite entry of a value, is impossible.

    Example:
        >>> normal = PartialLowRankMultivariateNormal(
        ...     torch.zeros(2), torch.ones(2, 1), torch.ones(2)
        ... )
        >>> normal.log_prob(torch.tensor([[0.0, 0.0], [0.0, math.nan]]))
        tensor([-2.3872, -1.2655])
    """

    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        cov_factor: Tensor,
        cov_diag: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(loc, cov_factor, cov_diag, Size(), validate_args)

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(PartialLowRankMultivariateNormal, _instance)
        return self._expanded(new, Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        """The mean, ``(..., d)``."""
        return self.loc.expand(self._batch_shape + self._event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each column, ``(..., d)``."""
        return self._spread

    def log_prob(self, value: Tensor) -> Tensor:
        form = self._form(value)
        return -0.5 * (form.square + form.size * _LOG_2PI) - form.half_log_det

    def log_prob_sum(self, value: Tensor) -> Tensor:
        """The sum of ``log_prob(value)``, ``()``.

        Rows without gaps that share all parameters enter by their mean and a root of their
        scatter: ``d + 1`` rows of the same distance, however many there are.
        """
        loc, factor, diag = self._unbroadcasted_loc, self.cov_factor, self.cov_diag
        dims = (value.dim(), loc.dim(), factor.dim(), diag.dim())
        is_short = value.dim() == 2 and len(value) <= value.shape[-1] + 1
        if dims != (2, 1, 2, 1) or is_short or bool(torch.isnan(value).any()):
            return self.log_prob(value).sum()
        count, mean, root = _moments(value)
        shift = torch.cat([root, math.sqrt(count) * (mean - loc).unsqueeze(0)])
        nothing = torch.zeros(shift.shape, dtype=torch.bool, device=shift.device)
        form = low_rank_form(shift, nothing, factor, diag.sqrt()).form
        constant = form.half_log_det[..., 0] + 0.5 * loc.shape[-1] * _LOG_2PI
        return -0.5 * form.square.sum() - count * constant

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch, d)``, from ``generator`` when one is given."""
        return self.loc + self._shift(self._extended_shape(Size(sample_shape)), generator)

    def sample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator)


class PartialLowRankMultivariateStudentT(_LowRank):
    r"""Multivariate Student-t of low-rank scale matrix whose values may have missing entries.

    .. math::
        u \sim \mathrm{Gamma}(\nu/2, \nu/2), \qquad
        x \mid u \sim N\bigl(\mu, (W W^\top + \Psi) / u\bigr)

    with missing entries, marked by NaN, integrated out exactly.

    References:
        Kotz and Nadarajah (2004). Multivariate t Distributions and Their Applications. Archambeau,
        Delannay and Verleysen (2006). Robust probabilistic projections.

    Args:
        df: Degrees of freedom, ``(...)``, positive.
        loc: Location, ``(..., d)``.
        cov_factor: :math:`W`, ``(..., d, q)``. Leave factors that rows share unexpanded.
        cov_diag: Diagonal of :math:`\Psi`, ``(..., d)``, positive.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument, or an infinite entry of a value, is impossible.

    Example:
        >>> student = PartialLowRankMultivariateStudentT(
        ...     3.0, torch.zeros(2), torch.zeros(2, 1), torch.ones(2)
        ... )
        >>> student.log_prob(torch.tensor([math.nan, 0.0]))
        tensor(-1.0009)
    """

    arg_constraints = {"df": constraints.positive, **_LowRank.arg_constraints}

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        cov_factor: Tensor,
        cov_diag: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device)
        super().__init__(loc, cov_factor, cov_diag, self.df.shape, validate_args)

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(PartialLowRankMultivariateStudentT, _instance)
        new.df = self.df
        return self._expanded(new, Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        """The location, where it is the mean: NaN for at most one degree of freedom."""
        loc = self.loc.expand(self._batch_shape + self._event_shape)
        return torch.where((self.df > 1.0).unsqueeze(-1), loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of each column; infinite, or NaN, where it does not exist."""
        df = self.df.unsqueeze(-1)
        factor = torch.where(df > 2.0, df / (df - 2.0), torch.inf)
        return self._spread * torch.where(df > 1.0, factor, torch.nan)

    def log_prob(self, value: Tensor) -> Tensor:
        return student_t_log_prob(self._form(value), self.df)

    def sample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch, d)``, from ``generator`` when one is given."""
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            half = (0.5 * self.df).expand(shape[:-1])
            scale = (sample_gamma(half, generator) / half).rsqrt()
            return self.loc + scale.unsqueeze(-1) * self._shift(shape, generator)
