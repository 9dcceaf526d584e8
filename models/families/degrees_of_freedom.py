r"""Degrees of freedom of Student-t components: their prior, and all that the engines ask of them.

Given the local scales :math:`u_i \sim \mathrm{Gamma}(\nu/2, \nu/2)` the log likelihood of
:math:`\nu` is

.. math::
    n \bigl(\tfrac\nu2 \log\tfrac\nu2 - \log\Gamma(\tfrac\nu2)\bigr)
    + \tfrac\nu2 \sum_i (\log u_i - u_i) - \sum_i \log u_i.

Variational Bayes keeps the posterior on a grid of the logarithm, where each update is exact
coordinate ascent. EM climbs to the mode between the grid's points (on the grid alone it would
stall, because its steps are shorter than the grid's). Gibbs proposes from cells of such a grid
and accepts by Metropolis, so its draws follow the continuous prior. Where the scales are
integrated out it does the same by another likelihood of the degrees of freedom.

References:
    Liu & Rubin (1995). ML estimation of the t distribution using EM and its extensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesgen import rng

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["HIGH", "LOW", "DegreesOfFreedom", "default_df_prior", "log_constant"]

LOW, HIGH = 0.1, 1000.0
_POINTS = 256
# Each round of the search for a mode narrows the bracket to an eighth of itself.
_ROUNDS, _SECTIONS = 8, 16
_CELLS = 128


def default_df_prior(like: Tensor) -> Any:
    """``Gamma(2, 0.1)`` for every number of a tensor.

    References:
        Juárez & Steel (2010). Model-based clustering of non-Gaussian panel data based on skew-t
        distributions.
    """
    return dist.Gamma(torch.full_like(like, 2.0), 0.1)


def log_constant(df: Tensor) -> Tensor:
    """Log normaliser of ``Gamma(df / 2, df / 2)``."""
    half = 0.5 * df
    return half * torch.log(half) - torch.lgamma(half)


@dataclass(frozen=True)
class DegreesOfFreedom:
    """One ``df`` a component under a prior, or the same fixed number for all.

    Args:
        grid: ``(g,)`` values, evenly spaced in their logarithm; one when fixed.
        log_grid_prior: ``(g,)`` log prior mass of the grid.
        prior: A distribution on the positive numbers; None when fixed.
        log_mass: Log of the prior's mass within the grid.
    """

    grid: Tensor
    log_grid_prior: Tensor
    prior: Any
    log_mass: float

    @classmethod
    def fixed(cls, df: float, device: torch.device) -> Self:
        """The same number for all components."""
        grid = torch.tensor([df], dtype=torch.float64, device=device)
        return cls(grid, torch.zeros_like(grid), None, 0.0)

    @classmethod
    def learned(cls, prior: Any, device: torch.device) -> Self:
        """A prior given as a distribution; values beyond 0.1 and 1000 are left out."""
        ends = torch.tensor([LOW, HIGH], dtype=torch.float64).log()
        log_grid = torch.linspace(float(ends[0]), float(ends[1]), _POINTS, dtype=torch.float64)
        step = log_grid[1] - log_grid[0]
        log_grid = log_grid[prior.support.check(log_grid.exp())]
        if len(log_grid) < 2:
            raise ValueError(
                f"the prior {prior} of 'df' leaves hardly any value between {LOW} and {HIGH}: "
                "give a wider one, or fix it by StudentT(df=...)."
            )
        log_density = prior.log_prob(log_grid.exp()) + log_grid
        log_mass = float(torch.logsumexp(log_density, 0) + torch.log(step))
        log_prior = torch.log_softmax(log_density, 0)
        return cls(log_grid.exp().to(device), log_prior.to(device), prior, log_mass)

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to learn."""
        return self.prior is None

    def _log_density(self, log_df: Tensor) -> Tensor:
        """Prior density of the logarithm, normalised over the grid's range."""
        inside = self.prior.support.check(log_df.exp())
        safe = torch.where(inside, log_df, self.grid.log().mean())
        density = self.prior.log_prob(safe.exp()) + safe - self.log_mass
        return density.masked_fill(~inside, -torch.inf)

    @staticmethod
    def _sums(statistics: Tensors) -> tuple[Tensor, Tensor]:
        count = statistics["count"].double()
        return count, statistics["log_scale"].double() - statistics["moments"].double()[..., 0]

    def _log_grid_posterior(self, statistics: Tensors) -> Tensor:
        """Unnormalised, ``(..., K, g)``."""
        count, excess = (part.unsqueeze(-1) for part in self._sums(statistics))
        return self.log_grid_prior + count * log_constant(self.grid) + 0.5 * self.grid * excess

    # ------------------------------------------------------------ variational Bayes
    def update(self, statistics: Tensors) -> dict[str, Tensor]:
        """Posterior log mass of the grid, ``(..., K, g)``."""
        return {"log_df": torch.log_softmax(self._log_grid_posterior(statistics), -1)}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        """Expected ``df`` and normaliser, ``(..., K)``."""
        mass = posterior["log_df"].exp()
        return {
            "df": (mass * self.grid).sum(-1),
            "df_constant": (mass * log_constant(self.grid)).sum(-1),
        }

    def kl(self, posterior: Tensors) -> Tensor:
        """``KL(posterior || prior)`` on the grid, ``(...)``."""
        log_df = posterior["log_df"]
        # Mass that underflows has log mass -inf on neither side: the grid's prior is finite.
        return (log_df.exp() * (log_df - self.log_grid_prior)).sum((-2, -1))

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> Tensor:
        """Draws ``(num_samples, ..., K)`` from the grid."""
        log_df = posterior["log_df"]
        return self.grid[rng.categorical(log_df.expand(num_samples, *log_df.shape), generator, -1)]

    # ------------------------------------------------------------ EM
    def maximise(self, statistics: Tensors, *, flat: bool) -> Tensor:
        """The mode, in the basis of the logarithm; ``flat`` drops the prior."""
        if self.is_fixed:
            return self.grid.expand(statistics["count"].shape).clone()
        count, excess = self._sums(statistics)

        def height(log_df: Tensor) -> Tensor:
            df = log_df.exp()
            likelihood = count * log_constant(df) + 0.5 * df * excess
            # A component without rows keeps the prior's mode even in maximum likelihood.
            return likelihood + (1e-12 if flat else 1.0) * self._log_density(log_df)

        own = (-1, *[1] * count.ndim)
        points = self.grid.log().reshape(own).expand(-1, *count.shape)
        share = torch.linspace(0.0, 1.0, _SECTIONS + 1, dtype=count.dtype, device=count.device)
        for _ in range(_ROUNDS):
            peak = height(points).argmax(0, keepdim=True)
            low = points.gather(0, (peak - 1).clamp_min(0))
            high = points.gather(0, (peak + 1).clamp_max(len(points) - 1))
            points = low + (high - low) * share.reshape(own)
        return points[_SECTIONS // 2].exp()

    def log_prior(self, values: Tensors) -> Tensor | float:
        """Log prior density of the logarithms, ``(...)``."""
        return 0.0 if self.is_fixed else self._log_density(values["df"].log()).sum(-1)

    # ------------------------------------------------------------ Gibbs
    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> Tensor:
        """Given the local scales; see :meth:`draw_by`."""
        count, excess = (part.unsqueeze(-1) for part in self._sums(statistics))

        def log_likelihood(log_df: Tensor) -> Tensor:
            df = log_df.exp()
            return count * log_constant(df) + 0.5 * df * excess

        lead = statistics["count"]
        return self.draw_by(log_likelihood, lead.shape, previous, generator=generator)

    def draw_by(
        self,
        log_likelihood: Callable[[Tensor], Tensor],
        shape: torch.Size,
        previous: Tensors | None,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Metropolis with independent proposals: a cell of a grid, then a point within it.

        Args:
            log_likelihood: Of ``log df (..., K, m)``, the same shape.
            shape: ``(..., K)``.
            previous: Values to go on from, ``df`` among them; None to begin.
            generator: Source of randomness.
        """
        if self.is_fixed:
            return self.grid.expand(shape).clone()

        def height(log_df: Tensor) -> Tensor:
            return log_likelihood(log_df) + self._log_density(log_df)

        low, step = self._bulk(height, shape)
        where: dict[str, Any] = {"dtype": self.grid.dtype, "device": self.grid.device}
        cells = torch.arange(_CELLS, **where)
        masses = height(low.unsqueeze(-1) + step.unsqueeze(-1) * (cells + 0.5))
        uniform = torch.rand((2, *shape), generator=generator, **where)
        cell = rng.categorical(masses, generator, -1)
        proposal = low + step * (cell + uniform[0])
        if previous is None or "df" not in previous:
            return proposal.exp()
        current = previous["df"].log()
        both = torch.stack([proposal, current], -1)
        index = ((both - low.unsqueeze(-1)) / step.unsqueeze(-1)).floor().long()
        gap = height(both) - masses.gather(-1, index.clamp(0, _CELLS - 1))
        # Outside the cells the posterior has no mass to speak of: whatever is there moves in.
        outside = (current < low) | (current > low + step * _CELLS)
        accept = uniform[1].log() < gap[..., 0] - gap[..., 1]
        return torch.where(accept | outside, proposal, current).exp()

    def _bulk(
        self, height: Callable[[Tensor], Tensor], shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Start and width ``(..., K)`` of cells that cover all but ``exp(-30)`` of the posterior.

        The grid itself would be too coarse for a component of many rows.
        """
        log_grid = self.grid.log()
        posterior = height(log_grid.expand(*shape, -1))
        inside = posterior > posterior.amax(-1, keepdim=True) - 30.0
        last = len(log_grid) - 1
        first_in, last_in = inside.long().argmax(-1), last - inside.flip(-1).long().argmax(-1)
        low, high = log_grid[(first_in - 1).clamp_min(0)], log_grid[(last_in + 1).clamp_max(last)]
        return low, (high - low) / _CELLS

    def natural(self, df: Tensor) -> dict[str, Tensor]:
        """The message at fixed values ``(..., K)``."""
        return {"df": df, "df_constant": log_constant(df)}

    def log_evidence(self, statistics: Tensors) -> Tensor:
        """Log marginal likelihood of the local scales, ``(..., K)``."""
        evidence = torch.logsumexp(self._log_grid_posterior(statistics), -1)
        return evidence - statistics["log_scale"].double()
