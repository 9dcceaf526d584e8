"""Mixing weights: a prior as given, turned into a conjugate block and into Pyro statements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayesgen.models.families.weights import (
    DirichletBlock,
    GammaDirichletBlock,
    StickBreakingBlock,
    WeightsBlock,
)
from bayesgen.priors import (
    GammaDirichlet,
    StickBreaking,
    SymmetricDirichlet,
    check_prior,
    describe,
)

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["Mixing"]

_GRID_POINTS = 256
_SPARSE = 0.01
"""Malsiner-Walli, Frühwirth-Schnatter & Grün (2016): small enough to empty superfluous components.
"""


@dataclass(frozen=True, eq=False)
class Mixing:
    """The weights of ``num_components`` components under a prior.

    Args:
        num_components: Number of components.
        prior: As given by the user; None is the sparse ``SymmetricDirichlet(0.01)``.
    """

    num_components: int
    prior: Any = None

    def __post_init__(self) -> None:
        if self.prior is None:
            object.__setattr__(self, "prior", SymmetricDirichlet(_SPARSE))
        check_prior(
            "weights",
            self.prior,
            support=constraints.simplex,
            event_shape=(self.num_components,),
            allowed=(SymmetricDirichlet, GammaDirichlet, StickBreaking),
        )

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Event dimensions of the exported sites."""
        learned = isinstance(self.prior, GammaDirichlet) or (
            isinstance(self.prior, StickBreaking) and self.prior.concentration is None
        )
        return {"weights": ("component",), **({"concentration": ()} if learned else {})}

    def block(self, device: torch.device) -> WeightsBlock:
        """The conjugate block; ``TypeError`` for a prior without one."""
        prior, k = self.prior, self.num_components
        if isinstance(prior, SymmetricDirichlet):
            full = torch.full((k,), float(prior.concentration), dtype=torch.float64, device=device)
            return DirichletBlock(full)
        if isinstance(prior, dist.Dirichlet):
            concentration = prior.concentration.double().to(device)
            return DirichletBlock(concentration.reshape(-1)[-k:].clone())
        if isinstance(prior, StickBreaking):
            return StickBreakingBlock(k, prior.concentration, prior.shape, prior.rate)
        if isinstance(prior, GammaDirichlet):
            return self._gamma_block(prior, device)
        raise TypeError(
            f"the prior {describe(prior)} of the weights is not conjugate, so EM, VB and Gibbs "
            "cannot use it. Give a Dirichlet, SymmetricDirichlet, GammaDirichlet or "
            "StickBreaking, or fit with NUTS or SVI."
        )

    def _gamma_block(self, prior: GammaDirichlet, device: torch.device) -> GammaDirichletBlock:
        from scipy import stats

        law = stats.gamma(prior.shape, scale=1.0 / prior.rate)
        low, high = max(float(law.ppf(1e-6)), 1e-8), float(law.isf(1e-9))
        grid = np.geomspace(low, high, _GRID_POINTS)
        log_mass = law.logpdf(grid) + np.log(grid)
        log_mass -= np.logaddexp.reduce(log_mass)
        return GammaDirichletBlock(
            self.num_components,
            torch.as_tensor(grid, device=device),
            torch.as_tensor(log_mass, device=device),
            float(prior.shape),
            float(prior.rate),
        )

    @staticmethod
    def export(values: Tensors) -> dict[str, Tensor]:
        """The block's sites under their public names."""
        out = {"weights": values["log_weights"].exp()}
        if "concentration" in values:
            out["concentration"] = values["concentration"]
        return out

    def program(self) -> Tensor:
        """Pyro statements that sample the weights: ``(..., K)``."""
        prior, k = self.prior, self.num_components
        if isinstance(prior, StickBreaking):
            return self._stick_program(prior)
        if isinstance(prior, GammaDirichlet):
            shape = torch.tensor(prior.shape, dtype=torch.float64)
            concentration = pyro.sample("concentration", dist.Gamma(shape, prior.rate))
            prior = dist.Dirichlet(concentration.unsqueeze(-1).expand(*concentration.shape, k))
        elif isinstance(prior, SymmetricDirichlet):
            prior = dist.Dirichlet(torch.full((k,), prior.concentration, dtype=torch.float64))
        elif not isinstance(prior, dist.Distribution):
            prior = prior()
        weights: Tensor = pyro.sample("weights", prior)
        return weights

    def _stick_program(self, prior: StickBreaking) -> Tensor:
        alpha = torch.tensor(prior.concentration or 1.0, dtype=torch.float64)
        if prior.concentration is None:
            shape = torch.tensor(prior.shape, dtype=torch.float64)
            alpha = pyro.sample("concentration", dist.Gamma(shape, prior.rate))
        last = alpha.unsqueeze(-1).expand(*alpha.shape, self.num_components - 1)
        # underscore: a step on the way to the weights, not a parameter of its own
        sticks = pyro.sample("_sticks", dist.Beta(torch.ones_like(last), last).to_event(1))
        log_rest = torch.nn.functional.pad(torch.log1p(-sticks).cumsum(-1), (1, 0))
        log_stick = torch.nn.functional.pad(torch.log(sticks), (0, 1))
        weights: Tensor = pyro.deterministic("weights", (log_stick + log_rest).exp(), event_dim=1)
        return weights
