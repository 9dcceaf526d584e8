"""The conjugate block of categorical columns: one Dirichlet a component and column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["DirichletColumnsBlock", "Levels"]


@dataclass(frozen=True)
class Levels:
    """Columns of different numbers of levels, packed side by side: ``S`` levels in all.

    Args:
        sizes: Number of levels of each column.
    """

    sizes: tuple[int, ...]

    @property
    def most(self) -> int:
        """The most levels that a column has: the width of padded tensors."""
        return max(self.sizes)

    def _column(self, device: torch.device) -> Tensor:
        sizes = torch.tensor(self.sizes, device=device)
        return torch.repeat_interleave(torch.arange(len(self.sizes), device=device), sizes)

    def _level(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(size, device=device) for size in self.sizes])

    def spread(self, value: Tensor) -> Tensor:
        """Repeat ``(..., d)`` for each level: ``(..., S)``."""
        return value[..., self._column(value.device)]

    def sum(self, packed: Tensor) -> Tensor:
        """Sum ``(..., S)`` over the levels of each column: ``(..., d)``."""
        total = packed.new_zeros((*packed.shape[:-1], len(self.sizes)))
        return total.index_add_(-1, self._column(packed.device), packed)

    def pad(self, packed: Tensor, fill: float) -> Tensor:
        """``(..., S)`` as ``(..., d, most)``."""
        padded = packed.new_full((*packed.shape[:-1], len(self.sizes), self.most), fill)
        padded[..., self._column(packed.device), self._level(packed.device)] = packed
        return padded

    def pack(self, padded: Tensor) -> Tensor:
        """The inverse of :meth:`pad`."""
        return padded[..., self._column(padded.device), self._level(padded.device)]

    def indicators(self, x: Tensor) -> Tensor:
        """Which level each entry of ``(n, d)`` is, boolean ``(S, n)``; none where missing."""
        return x.T[self._column(x.device)] == self._level(x.device).unsqueeze(-1)


@dataclass(frozen=True)
class DirichletColumnsBlock(MarginalBlock):
    r"""``probs ~ Dirichlet``, one a component and column; kept as packed ``log_probs``.

    Modes are taken in the softmax basis, where sparse priors too have an interior mode,
    :math:`p_l \propto n_l + \alpha_l`; :meth:`log_prior` is the density in that basis.

    References:
        MacKay (1998). Choice of basis for Laplace approximation.

    Args:
        num_components: Number of components ``K``.
        levels: The columns' levels.
        concentration: ``(S,)`` packed.
    """

    num_components: int
    levels: Levels
    concentration: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return ("log_probs",)

    @staticmethod
    def _counts(statistics: Tensors) -> Tensor:
        return statistics["moments"].double()[..., 1:]

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        return {"concentration": self.concentration + self._counts(statistics)}

    def _expected_log(self, concentration: Tensor) -> Tensor:
        total = self.levels.spread(self.levels.sum(concentration))
        return torch.digamma(concentration) - torch.digamma(total)

    def _log_beta(self, concentration: Tensor) -> Tensor:
        """Log multivariate beta function, summed over columns: ``(...)``."""
        total = self.levels.sum(concentration)
        return torch.lgamma(concentration).sum(-1) - torch.lgamma(total).sum(-1)

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return _message(self._expected_log(posterior["concentration"]))

    def kl(self, posterior: Tensors) -> Tensor:
        concentration = posterior["concentration"]
        log_probs = self._expected_log(concentration)
        difference = self._log_beta(self.concentration) - self._log_beta(concentration)
        more = ((concentration - self.concentration) * log_probs).sum(-1)
        return (difference + more).sum(-1)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        concentration = posterior["concentration"]
        return self._draw(concentration.expand(num_samples, *concentration.shape), generator)

    def _draw(self, concentration: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"log_probs": self._normalised(rng.log_gamma_sample(concentration, generator))}

    def _normalised(self, logits: Tensor) -> Tensor:
        total = torch.logsumexp(self.levels.pad(logits, -torch.inf), dim=-1)
        return logits - self.levels.spread(total)

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        # Without a prior an unseen level has its maximum at minus infinity; the floor is finite.
        prior = 1e-10 if flat else self.concentration
        return {"log_probs": self._normalised(torch.log(self._counts(statistics) + prior))}

    def log_prior(self, values: Tensors) -> Tensor:
        density = (self.concentration * values["log_probs"]).sum(-1)
        return (density - self._log_beta(self.concentration)).sum(-1)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return self._draw(self.concentration + self._counts(statistics), generator)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return _message(values["log_probs"])

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        posterior = self.concentration + self._counts(statistics)
        return self._log_beta(posterior) - self._log_beta(self.concentration)


def _message(log_probs: Tensor) -> dict[str, Tensor]:
    zero = torch.zeros_like(log_probs[..., :1])
    return {"natural": torch.cat([zero, log_probs], dim=-1)}
