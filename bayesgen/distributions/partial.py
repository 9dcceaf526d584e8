"""Elliptical distributions whose values may have missing entries, integrated out exactly."""

from __future__ import annotations

import math

import torch
from pyro.distributions import MultivariateNormal, MultivariateStudentT
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from bayesgen.distributions._linalg import solve_lower
from bayesgen.distributions._missing import (
    ObservedForm,
    observed_form,
    observed_mask,
    split_factor,
)

__all__ = [
    "PartialMultivariateNormal",
    "PartialMultivariateStudentT",
    "partial_real_vector",
    "student_t_log_prob",
]


class _PartialRealVector(constraints.Constraint):
    """Real vectors ``(..., d)`` in which NaN marks a missing entry."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).any(-1)


partial_real_vector = _PartialRealVector()


@biject_to.register(partial_real_vector)
@transform_to.register(partial_real_vector)
def _to_partial(constraint: constraints.Constraint) -> Transform:
    # A latent value is never missing.
    return biject_to(constraints.real_vector)


def block_factor(scale_tril: Tensor, columns: Tensor) -> Tensor:
    """Cholesky factor of the block ``columns`` of ``L L^T``, without forming it."""
    upper = torch.linalg.qr(scale_tril[..., columns, :].mT).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (upper * sign.unsqueeze(-1)).mT.tril()


def check_columns(owner: str, columns: Tensor | list[int], dim: int) -> Tensor:
    """``columns`` as a tensor of distinct indices, or ``ValueError`` saying what is wrong."""
    index = torch.as_tensor(columns)
    if index.dtype == torch.bool and index.shape == (dim,):
        index = index.nonzero()[:, 0]
    bad = index.dim() != 1 or index.is_floating_point() or index.is_complex()
    if bad or index.dtype == torch.bool or not len(index):
        raise ValueError(
            f"{owner}: columns must be a non-empty list of column numbers or a boolean mask of "
            f"shape ({dim},), but {columns!r} was given."
        )
    if int(index.min()) < -dim or int(index.max()) >= dim:
        raise ValueError(f"{owner}: columns {index.tolist()} reach outside the {dim} columns.")
    index = index % dim
    if len(index.unique()) != len(index):
        raise ValueError(f"{owner}: columns {index.tolist()} repeat a column.")
    return index


def student_t_log_prob(form: ObservedForm, df: Tensor) -> Tensor:
    """Log density of a multivariate Student-t over the observed entries."""
    total = 0.5 * (df + form.size)
    return (
        torch.lgamma(total)
        - torch.lgamma(0.5 * df)
        - 0.5 * form.size * (df.log() + math.log(math.pi))
        - form.half_log_det
        - total * torch.log1p(form.square / df)
    )


class PartialMultivariateNormal(MultivariateNormal):
    r"""Multivariate normal whose values may have missing entries, marked by NaN.

    .. math::
        \log p(x) = \log N(x_o \mid \mu_o, \Sigma_{oo}), \qquad o = \{j : x_j \text{ is not NaN}\},

    which is exact when entries are missing at random. Rows are grouped by pattern; a row without
    any observed entry has ``log_prob`` 0. All else, arguments included, is as in
    :class:`pyro.distributions.MultivariateNormal`; draws are complete.

    References:
        Little and Rubin (2019). Statistical Analysis with Missing Data, chapter 11.

    Args:
        loc: Mean, ``(..., d)``.
        covariance_matrix: Covariance, ``(..., d, d)``; give this or one of the next two.
        precision_matrix: Its inverse.
        scale_tril: Its lower Cholesky factor, which costs least and is the most accurate.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument, or an infinite entry of a value, is impossible.

    Example:
        >>> normal = PartialMultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2))
        >>> normal.log_prob(torch.tensor([[0.0, 0.0], [0.0, math.nan]]))
        tensor([-1.8379, -0.9189])
    """

    support = partial_real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        form = observed_form(value, self.loc, self._unbroadcasted_scale_tril)
        return -0.5 * (form.square + form.size * math.log(2.0 * math.pi)) - form.half_log_det

    def marginal(self, columns: Tensor | list[int]) -> PartialMultivariateNormal:
        """The distribution of some columns, in that order, by number or boolean mask."""
        index = check_columns(type(self).__name__, columns, self.event_shape[0])
        return PartialMultivariateNormal(
            self.loc[..., index],
            scale_tril=block_factor(self._unbroadcasted_scale_tril, index),
            validate_args=self._validate_args,
        )

    def condition(self, x: Tensor, observed: Tensor) -> MultivariateNormal:
        """The distribution of the columns outside ``observed`` given those inside.

        Args:
            x: Rows, ``(..., d)``; entries outside the mask are not read.
            observed: One boolean mask ``(d,)`` for all rows, with at least one False.
        """
        observed = check_condition(type(self).__name__, x, observed, self.event_shape[0])
        seen, cross, rest = split_factor(self._unbroadcasted_scale_tril, observed)
        shift = (x[..., observed] - self.loc[..., observed]).unsqueeze(-1)
        step = (cross @ solve_lower(seen, shift)).squeeze(-1)
        return MultivariateNormal(
            self.loc[..., ~observed] + step, scale_tril=rest, validate_args=self._validate_args
        )


def check_condition(owner: str, x: Tensor, observed: Tensor, dim: int) -> Tensor:
    observed = observed_mask(owner, observed, dim).to(x.device)
    if bool(observed.all()):
        raise ValueError(f"{owner}: every column is observed, so there is none to condition.")
    if bool(torch.isnan(x[..., observed]).any()):
        raise ValueError(
            f"{owner}: x has NaN in a column that `observed` declares observed. Condition the "
            f"rows of each missing pattern apart."
        )
    return observed


class PartialMultivariateStudentT(MultivariateStudentT):
    r"""Multivariate Student-t whose values may have missing entries, marked by NaN.

    The marginal of a Student-t keeps its degrees of freedom, so the missing entries are integrated
    out exactly. All else is as in :class:`pyro.distributions.MultivariateStudentT`.

    References:
        Kotz and Nadarajah (2004). Multivariate t Distributions and Their Applications.

    Args:
        df: Degrees of freedom, ``(...)``.
        loc: Location, ``(..., d)``.
        scale_tril: Lower Cholesky factor of the scale matrix, ``(..., d, d)``.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Raises:
        ValueError: When an argument, or an infinite entry of a value, is impossible.

    Example:
        >>> student = PartialMultivariateStudentT(3.0, torch.zeros(2), torch.eye(2))
        >>> student.log_prob(torch.tensor([math.nan, 0.0]))
        tensor(-1.0009)
    """

    support = partial_real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        form = observed_form(value, self.loc, self._unbroadcasted_scale_tril)
        return student_t_log_prob(form, self.df)

    def marginal(self, columns: Tensor | list[int]) -> PartialMultivariateStudentT:
        """The distribution of some columns, in that order, by number or boolean mask."""
        index = check_columns(type(self).__name__, columns, self.event_shape[0])
        return PartialMultivariateStudentT(
            self.df,
            self.loc[..., index],
            block_factor(self._unbroadcasted_scale_tril, index),
            validate_args=self._validate_args,
        )

    def condition(self, x: Tensor, observed: Tensor) -> MultivariateStudentT:
        """The distribution of the columns outside ``observed`` given those inside.

        Args:
            x: Rows, ``(..., d)``; entries outside the mask are not read.
            observed: One boolean mask ``(d,)`` for all rows, with at least one False.
        """
        observed = check_condition(type(self).__name__, x, observed, self.event_shape[0])
        seen, cross, rest = split_factor(self._unbroadcasted_scale_tril, observed)
        shift = (x[..., observed] - self.loc[..., observed]).unsqueeze(-1)
        whitened = solve_lower(seen, shift)
        df = self.df + float(observed.sum())
        spread = ((self.df + whitened.square().sum((-2, -1))) / df).sqrt()
        return MultivariateStudentT(
            df.expand(spread.shape),
            self.loc[..., ~observed] + (cross @ whitened).squeeze(-1),
            rest * spread[..., None, None],
            validate_args=self._validate_args,
        )
