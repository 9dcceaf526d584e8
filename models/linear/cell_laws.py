"""Densities, latents and conditionals of rows whose every cell has a scale of its own.

None has a closed form: all come from weighted points of each row's latent, found by
:mod:`~bayesgen.models.linear.latent_integral` to a standard error of 0.01 nats.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from bayesgen.models.linear.latent_integral import (
    TOLERANCE,
    CellParameters,
    Points,
    log_integral,
    log_integrand,
    over_latents,
)

if TYPE_CHECKING:
    from torch.distributions.constraints import Constraint

__all__ = ["CellConditional", "CellLatents", "CellRows"]

_WARNED = (
    2.0 * TOLERANCE
)  # an error estimated from eight replicates passes the tolerance by chance


@dataclass(frozen=True, eq=False)
class CellRows:
    """Rows under draws of the parameters: every pair of a draw and a row.

    Args:
        x: Rows ``(n, d)``, ``NaN`` where missing.
        loc: ``(*draw, d)``.
        loadings: ``(*draw, d, q)``.
        noise: Scale of the noise, ``(*draw)``.
        df: Degrees of freedom of the columns, ``(*draw, d)``.
    """

    x: Tensor
    loc: Tensor
    loadings: Tensor
    noise: Tensor
    df: Tensor

    @property
    def lead(self) -> Size:
        """``(*draw, n)``."""
        return Size((*self.noise.shape, len(self.x)))

    def __len__(self) -> int:
        return self.lead.numel()

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, q = self.loadings.shape[-2:]
        noise = self.noise.double().reshape(-1, 1)
        return (
            self.loc.double().reshape(-1, d),
            self.loadings.double().reshape(-1, d, q) / noise.unsqueeze(-1),
            noise,
            self.df.double().reshape(-1, d),
        )

    def pick(self, index: Tensor) -> CellParameters:
        """The pairs of these numbers, draw by draw."""
        loc, loadings, noise, df = self._flat
        draw, row = index // len(self.x), index % len(self.x)
        x = self.x[row].double()
        y = torch.nan_to_num((x - loc[draw]) / noise[draw], nan=0.0)
        return CellParameters(y, (~x.isnan()).double(), loadings[draw], df[draw])

    def shaped(self, value: Tensor) -> Tensor:
        """A tensor ``(p, ...)`` of the pairs as ``(*draw, n, ...)``, in the rows' precision."""
        return value.reshape(*self.lead, *value.shape[1:]).to(self.x.dtype)

    @torch.no_grad()
    def log_prob(self) -> tuple[Tensor, Tensor]:
        """Log density of the observed entries of each row, and its standard error."""
        if len(self) == 0:
            return self.x.new_empty(self.lead), self.x.new_empty(self.lead)
        value, error = log_integral(self)
        value, error = value.reshape(self.lead), error.reshape(self.lead)
        count = (~self.x.isnan()).sum(-1)
        found = value - count * self.noise.double().log().unsqueeze(-1)
        empty = count == 0
        found, error = found.masked_fill(empty, 0.0), error.masked_fill(empty, 0.0)
        _warn(error)
        return found.to(self.x.dtype), error.to(self.x.dtype)

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``(*draw, n, q)`` and covariance of the latents, and expected scales of the cells.

        The scale of a missing cell, ``(*draw, n, d)``, is ``NaN``.
        """
        loc, covariance, scale = over_latents(self, _moments)
        scale = scale.reshape(*self.lead, -1).masked_fill(self.x.isnan(), torch.nan)
        return self.shaped(loc), self.shaped(covariance), scale.to(self.x.dtype)

    @torch.no_grad()
    def draw(self) -> Tensor:
        """A latent of each pair, one of its weighted points, ``(*draw, n, q)``."""
        return self.shaped(over_latents(self, _choose)[0])


def _warn(error: Tensor) -> None:
    above = error > _WARNED
    if bool(above.any()):
        warnings.warn(
            f"{int(above.sum())} of {above.numel()} log densities have a standard error above "
            f"{_WARNED} nats, the largest {float(error.max()):.3g}: their rows fit in several "
            "ways at once.",
            UserWarning,
            stacklevel=4,
        )


def _moments(pairs: CellParameters, points: Points) -> tuple[Tensor, Tensor, Tensor]:
    weight = points.log_weights.exp().unsqueeze(-1)
    loc = points.latents @ weight
    centred = points.latents - loc
    covariance = (centred * weight.mT) @ centred.mT
    residual = pairs.y.unsqueeze(-1) - pairs.loadings @ points.latents
    df = pairs.df.unsqueeze(-1)
    scale = ((df + 1.0) / (df + residual.square())) @ weight
    return loc.squeeze(-1), covariance, scale.squeeze(-1)


def _choose(pairs: CellParameters, points: Points) -> tuple[Tensor]:
    if not len(pairs.y):
        return (points.latents[..., 0],)
    index = torch.multinomial(points.log_weights.exp(), 1)
    index = index.unsqueeze(-2).expand(-1, points.latents.shape[-2], -1)
    return (points.latents.gather(-1, index).squeeze(-1),)


class CellLatents(Distribution):
    """The latents of rows given their observed cells, batch ``(*draw, n)``.

    Moments are those of the weighted points; a sample is one of them, so that it has their error.
    The density is the integrand over the integral.
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector

    def __init__(self, rows: CellRows) -> None:
        self.rows = rows
        super().__init__(rows.lead, Size((rows.loadings.shape[-1],)), validate_args=False)

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows.moments()

    @property
    def mean(self) -> Tensor:
        """``(*draw, n, q)``."""
        return self._found[0]

    @property
    def covariance_matrix(self) -> Tensor:
        """``(*draw, n, q, q)``."""
        return self._found[1]

    @property
    def variance(self) -> Tensor:
        """``(*draw, n, q)``."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        index = torch.arange(len(self.rows), device=value.device)
        value = value.expand(*self.rows.lead, -1).reshape(len(self.rows), -1, 1).double()
        joint = log_integrand(self.rows.pick(index), value).squeeze(-1)
        return self.rows.shaped(joint - log_integral(self.rows)[0])

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        drawn = [self.rows.draw() for _ in range(math.prod(sample_shape))]
        return torch.stack(drawn).reshape(*sample_shape, *drawn[0].shape)


class CellConditional(Distribution):
    """Some columns of rows given the others, batch ``(*draw, n)``, event ``(d_missing,)``.

    The density is the ratio of that of the whole row to that of the columns given, each with its
    standard error; a sample is a noisy row at a latent drawn by :class:`CellLatents`.

    Args:
        rows: With ``NaN`` outside the observed columns.
        observed: Which columns are given, ``(d,)``.
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector

    def __init__(self, rows: CellRows, observed: Tensor) -> None:
        self.rows, self.rest = rows, (~observed).nonzero()[:, 0]
        super().__init__(rows.lead, Size((len(self.rest),)), validate_args=False)

    def _rest(self, name: str, dim: int = -1) -> Tensor:
        """Parameters of the columns asked for, with a dimension for the rows."""
        value: Tensor = getattr(self.rows, name)
        return value.index_select(dim, self.rest).unsqueeze(self.rows.noise.ndim)

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows.moments()

    def _signal(self, latents: Tensor) -> Tensor:
        loadings = self._rest("loadings", -2)
        return (loadings @ latents.unsqueeze(-1)).squeeze(-1) + self._rest("loc")

    @property
    def mean(self) -> Tensor:
        """NaN for columns of at most one degree of freedom."""
        return self._signal(self._found[0]).masked_fill(self._rest("df") <= 1.0, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Infinite, or NaN, where it does not exist."""
        df, loadings = self._rest("df"), self._rest("loadings", -2)
        factor = torch.where(df > 2.0, df / (df - 2.0), torch.inf)
        noise = self.rows.noise[..., None, None].square() * factor
        spread = ((loadings @ self._found[1]) * loadings).sum(-1)
        return (spread + noise).masked_fill(df <= 1.0, torch.nan)

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        rows = self.rows
        if value.ndim > 2:
            raise ValueError(
                f"values of shape {tuple(value.shape)}, but the same rows (n, m) serve every draw."
            )
        whole = rows.x.clone()
        whole[:, self.rest] = value.to(whole)
        joint = CellRows(whole, rows.loc, rows.loadings, rows.noise, rows.df)
        return joint.log_prob()[0] - rows.log_prob()[0]

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        drawn = [self._draw() for _ in range(math.prod(sample_shape))]
        return torch.stack(drawn).reshape(*sample_shape, *drawn[0].shape)

    def _draw(self) -> Tensor:
        signal = self._signal(self.rows.draw())
        df = self._rest("df").expand(signal.shape).to(signal)
        noise: Any = torch.distributions.StudentT(df, validate_args=False).sample()
        return signal + self.rows.noise[..., None, None] * noise
