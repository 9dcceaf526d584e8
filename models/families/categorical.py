"""Components of independent categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayesgen import rng
from bayesgen.models.families.dirichlet_columns import DirichletColumnsBlock, Levels
from bayesgen.models.families.factorised import (
    Batch,
    Entries,
    Factorised,
    Layout,
    by_component,
    check_entries,
    column_prior,
    one_prior,
    per_row,
    sample_site,
)
from bayesgen.priors import SymmetricDirichlet, describe

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = ["Categorical"]

_MOST_LEVELS = 1000


class _Codes(torch.distributions.Categorical):
    """Categorical codes with a mean, so that mixtures of them have one."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * self._codes).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * self._codes.square()).sum(-1) - self.mean.square()

    @property
    def _codes(self) -> Tensor:
        return torch.arange(self.probs.shape[-1], device=self.probs.device, dtype=self.probs.dtype)


def _entries(sizes: tuple[int, ...]) -> Entries:
    def bad(x: Tensor) -> Tensor:
        return (x < 0) | (x >= torch.tensor(sizes, device=x.device)) | (x != x.floor())

    return Entries(
        "Categorical",
        tuple(f"a whole code from 0 to {size - 1}" for size in sizes),
        "Pass the labels themselves as text, or codes as they were at fitting.",
        bad,
    )


_CODES = Entries(
    "Categorical",
    (f"a whole code from 0 to {_MOST_LEVELS - 1}",),
    "Pass the labels themselves as text, or recode the column by pandas.factorize.",
    lambda x: (x < 0) | (x >= _MOST_LEVELS) | (x != x.floor()),
)


def _count_levels(data: Dataset) -> tuple[Levels, Tensor]:
    """Number of levels of each column, and how often each level occurs, packed ``(S,)``."""
    sizes = [len(names) if names is not None else 0 for names in data.schema.levels]
    counts = torch.zeros((data.num_columns, _MOST_LEVELS), dtype=torch.float64)
    for block in data.batches(1 << 16):
        check_entries(block, data.columns, _CODES)
        for j, column in enumerate(block.T):
            codes = column[~torch.isnan(column)].long().cpu()
            counts[j] += torch.bincount(codes, minlength=_MOST_LEVELS)
    for j, kind in enumerate(data.kinds):
        used = counts[j].nonzero()
        floor = 2 if kind == "binary" else 1
        sizes[j] = max(floor, sizes[j], int(used[-1]) + 1 if len(used) else 0)
    levels = Levels(tuple(sizes))
    return levels, levels.pack(counts[:, : levels.most])


@dataclass(frozen=True, eq=False)
class Categorical(Factorised):
    r"""Components of independent categories, missing entries dropped exactly.

    .. math::
        p_{kj} \sim \mathrm{Dirichlet}(\alpha_j), \quad
        x_j \mid k \sim \mathrm{Categorical}(p_{kj})

    Columns hold codes from 0 and may have different numbers of levels, read from the data's
    schema (or the largest code); ``probs (K, d, levels)`` is padded with zeros. The default prior
    is worth two observations at the data's own shares of the levels.

    Priors: ``"components"`` (or ``"probs"``) is a :class:`~bayesgen.priors.SymmetricDirichlet`, or
    a Dirichlet of the most levels that a column has, of batch ``()`` or ``(d,)``; any other
    distribution on the simplex serves NUTS and SVI when all columns have the same number of
    levels.

    References:
        Lazarsfeld & Henry (1968). Latent structure analysis.

    Example:
        >>> from bayesgen.models import Mixture
        >>> Mixture(Categorical(), num_components=3).num_components
        3
    """

    sizes: tuple[int, ...] = ()
    shares: Tensor | None = None

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        levels, counts = _count_levels(data)
        smooth = counts + 1.0 / levels.spread(torch.tensor(levels.sizes, dtype=torch.float64))
        return replace(
            self,
            num_components=num_components,
            columns=data.columns,
            sizes=levels.sizes,
            shares=smooth / levels.spread(levels.sum(smooth)),
            given=self._checked(priors, levels),
        )

    @staticmethod
    def _checked(priors: Mapping[str, Any], levels: Levels) -> dict[str, Any]:
        given, prior = dict(priors), one_prior(priors, "probs", None)
        if prior is None:
            return given
        key = "components" if "components" in given else "probs"
        shape = (len(levels.sizes), levels.most)
        given[key] = column_prior(
            key, prior, shape, support=constraints.simplex, allowed=(SymmetricDirichlet,)
        )
        ragged = len(set(levels.sizes)) > 1
        conjugate = isinstance(given[key], SymmetricDirichlet | torch.distributions.Dirichlet)
        if ragged and not conjugate:
            raise ValueError(
                f"prior of site {key!r}: the columns have {levels.sizes} levels; where these "
                "differ the prior must be a SymmetricDirichlet or a Dirichlet."
            )
        return given

    @property
    def _shares(self) -> Tensor:
        if self.shares is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.shares

    @property
    def _levels(self) -> Levels:
        return Levels(self.sizes)

    @property
    def prior_sites(self) -> tuple[str, ...]:
        return ("components", "probs")

    @property
    def priors(self) -> dict[str, Any]:
        if self.given:
            return dict(self.given)
        return {"components": dist.Dirichlet(self._levels.pad(2.0 * self._shares, 1.0))}

    @property
    def _concentration(self) -> Tensor | None:
        """Concentrations of a conjugate prior, packed ``(S,)``."""
        prior = one_prior(self.priors, "probs", None)
        if isinstance(prior, SymmetricDirichlet):
            return torch.full_like(self._shares, float(prior.concentration))
        if isinstance(prior, torch.distributions.Dirichlet):
            return self._levels.pack(prior.concentration.to(self._shares))
        return None

    @property
    def block(self) -> DirichletColumnsBlock:
        concentration = self._concentration
        if concentration is None:
            shown = ", ".join(describe(prior) for prior in self.priors.values())
            raise TypeError(
                f"the prior {shown} of the probabilities is not conjugate, so EM, VB and "
                "Gibbs cannot use it. Give priors={'components': SymmetricDirichlet(1.0)}, or fit "
                "with NUTS or SVI."
            )
        return DirichletColumnsBlock(self.num_components, self._levels, concentration)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {"probs": ("component", "column", "level")}

    def coords(self) -> dict[str, list[Any]]:
        return {"column": list(self.columns), "level": list(range(self._levels.most))}

    @property
    def row_size(self) -> int:
        return 1 + sum(self.sizes)

    def to_config(self) -> dict[str, Any]:
        return {
            "num_components": self.num_components,
            "columns": list(self.columns),
            "sizes": list(self.sizes),
            "shares": self.shares,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        tuples = {name: tuple(config[name]) for name in ("columns", "sizes")}
        return cls(**{**config, **tuples}, given=cls._checked(priors, Levels(tuples["sizes"])))

    @property
    def device(self) -> torch.device:
        return self._shares.device

    def to(self, device: torch.device) -> Self:
        return replace(self, shares=self._shares.to(device))

    @property
    def invariant_dims(self) -> dict[str, tuple[str, ...]]:
        return {"marginal_probs": ("column", "level")}

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        return {"marginal_probs": (weights[..., None, None] * values["probs"]).sum(-3)}

    # ------------------------------------------------------------ data -> scores -> statistics
    @property
    def _layout(self) -> Layout:
        return Layout(1, 0)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
        check_entries(x, self.columns, _entries(self.sizes))
        hot = self._levels.indicators(x).to(dtype)
        return Batch(torch.cat([torch.ones_like(hot[:1]), hot]), complete=True)

    def _natural(self, values: Tensors) -> Tensor:
        probs = self._levels.pack(values["probs"])
        return _pack(probs.clamp_min(torch.finfo(probs.dtype).tiny).log())

    def embed(self, x: Tensor) -> Tensor:
        levels, shares = self._levels, self._shares.to(x)
        scale = (1.0 - levels.sum(shares.square())).sqrt()
        scale = torch.where(scale > 1e-6, scale, 1.0)
        centred = (levels.indicators(x).to(x) - shares.unsqueeze(-1)).T / levels.spread(scale)
        return centred.masked_fill(torch.isnan(levels.spread(x)), 0.0)

    # ------------------------------------------------------------ densities and draws
    def export(self, values: Tensors) -> dict[str, Tensor]:
        return {"probs": self._levels.pad(values["log_probs"].exp(), 0.0)}

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor:
        concentration, levels = posterior["concentration"], self._levels
        total = levels.spread(levels.sum(concentration))
        return self._product(self.observe(x), _pack(concentration.log() - total.log()))

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        probs = per_row(values["probs"][..., ~observed, :], len(x), event_dim=2)
        return torch.distributions.Independent(
            _Codes(probs, validate_args=False), 1, validate_args=False
        )

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        probs = by_component(values, "probs", labels)
        return rng.categorical(probs.log(), generator, dim=-1).to(probs.dtype)

    # ------------------------------------------------------------ the Pyro program
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        prior, levels = one_prior(self.priors, "probs", None), self._levels
        concentration = self._concentration
        if concentration is None or len(set(self.sizes)) == 1:
            if concentration is not None:
                prior = dist.Dirichlet(levels.pad(concentration, 1.0))
            return {"probs": sample_site(prefix + "probs", prior, 2, plate)}
        parts = [
            torch.nn.functional.pad(
                sample_site(f"{prefix}probs_{j}", dist.Dirichlet(part), 1, plate),
                (0, levels.most - len(part)),
            )
            for j, part in enumerate(concentration.split(self.sizes))
        ]
        probs = torch.stack(parts, dim=-2)
        return {"probs": pyro.deterministic(prefix + "probs", probs, event_dim=2)}


def _pack(log_probs: Tensor) -> Tensor:
    """Coefficients of ``(1, indicators)``."""
    return torch.cat([torch.zeros_like(log_probs[..., :1]), log_probs], dim=-1)
