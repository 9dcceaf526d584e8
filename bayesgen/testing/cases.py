"""What the suites test, and the tools that their checks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen.capabilities import Model, Scored, Tensors

if TYPE_CHECKING:
    from bayesgen.data import Dataset
    from bayesgen.fit import Fit

__all__ = ["EngineCase", "ModelCase", "close", "grid", "log_prob", "nodes", "one", "scored"]

_TOLERANCE = 1e-8  # relative and absolute, float64


@dataclass(frozen=True, eq=False)
class ModelCase:
    """One bound model under test.

    Args:
        name: For messages.
        model: The bound model.
        data: Rows it was bound to; at least 3, complete.
        draws: A few draws of its parameters, ``(m, *event)`` by site, ``m >= 2``.
        program_sites: Whether the Pyro program's trace holds every site of ``draws`` by name.
        reach: Half width of the integration range in standard deviations of the data; heavy tails
            need more.
        max_count: Count columns are summed up to here.
    """

    name: str
    model: Model
    data: Dataset
    draws: Tensors
    program_sites: bool = True
    reach: float = 1000.0
    max_count: int = 400

    @property
    def x(self) -> Tensor:
        """The rows, on the draws' device."""
        some = next(iter(self.draws.values()))
        return self.data.tensor(some.dtype, some.device)

    @property
    def num_draws(self) -> int:
        """Number of draws."""
        return next(iter(self.draws.values())).shape[0]

    def to(self, device: torch.device) -> ModelCase:
        """The same case on another device."""
        draws = {name: value.to(device) for name, value in self.draws.items()}
        return replace(self, model=self.model.to(device), draws=draws)


@dataclass(frozen=True, eq=False)
class EngineCase:
    """One engine under test on one model.

    Args:
        name: For messages.
        engine: Makes the engine; called anew for each run.
        model: An unbound model that it can fit in a second or so.
        data: What it is fitted to.
        monotone: Names in the history that must never fall.
        seed: Of the runs.
        is_random: Whether another seed must give other draws.
        resume_after: Steps after which the run is cut and resumed; 0 for an engine of one step.
        fixed: Mean that the posterior of a site must have, with a tolerance, by site.
    """

    name: str
    engine: Callable[[], Any]
    model: Model
    data: Dataset
    monotone: tuple[str, ...] = ()
    seed: int = 0
    is_random: bool = True
    resume_after: int = 2
    fixed: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)

    def run(self, seed: int | None = None, **arguments: Any) -> Fit:
        """One run of a fresh engine."""
        where = self.seed if seed is None else seed
        fit: Fit = self.engine().run(self.model, self.data, seed=where, **arguments)
        return fit


# ---------------------------------------------------------------- tools
def close(left: Tensor, right: Tensor, what: str, tolerance: float = _TOLERANCE) -> None:
    """Assert equality up to rounding."""
    if left.dtype == torch.float32:
        tolerance = max(tolerance, 1e-4)
    torch.testing.assert_close(
        left, right.to(left), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def one(draws: Tensors, index: int) -> dict[str, Tensor]:
    """One of the draws, as a batch of one."""
    return {name: value[index : index + 1] for name, value in draws.items()}


def scored(case: ModelCase) -> Scored:
    """The model, which has a density."""
    assert isinstance(case.model, Scored)
    return case.model


def nodes(case: ModelCase, column: int, size: int) -> tuple[Tensor, Tensor]:
    """Points and weights that integrate (or sum) over one column."""
    x = case.x[:, column].double()
    kind = case.data.kinds[column]
    if kind != "real":
        levels = case.data.schema.levels[column]
        top = {"binary": 2, "category": len(levels or ()), "count": case.max_count}[kind]
        points = torch.arange(top, dtype=torch.float64)
        return points.to(x.device), torch.ones_like(points).to(x.device)
    # sinh spreads the points: dense in the middle, sparse far out in the tails
    scale = float(x.std()) / 4
    end = math.asinh(4 * case.reach)
    t = torch.linspace(-end, end, size, dtype=torch.float64)
    points, weights = x.mean().cpu() + scale * t.sinh(), scale * t.cosh() * (t[1] - t[0])
    return points.to(x.device), weights.to(x.device)


def grid(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Rows ``(g, d)`` and weights ``(g,)`` that integrate over all of one or two columns."""
    size = 20_001 if case.data.num_columns == 1 else 801
    parts = [nodes(case, j, size) for j in range(case.data.num_columns)]
    rows = torch.cartesian_prod(*(points for points, _ in parts)).reshape(-1, len(parts))
    weights = parts[0][1]
    for _, more in parts[1:]:
        weights = (weights[:, None] * more).flatten()
    return rows, weights


def log_prob(case: ModelCase, rows: Tensor, draws: Tensors) -> Tensor:
    """In chunks, float64."""
    dtype = next(iter(draws.values())).dtype
    parts = [scored(case).log_prob(part.to(dtype), draws) for part in rows.split(50_000)]
    return torch.cat(parts, dim=-1).double()
