"""The smallest model that meets every contract: copy it to start a model, or test an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, final

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import (
    Conditional,
    Encoder,
    Generative,
    Model,
    Program,
    Scored,
    Symmetric,
    Tensors,
)
from bayesgen.symmetry import LabelPermutation

if TYPE_CHECKING:
    from bayesgen.data import Dataset
    from bayesgen.fit import Fit

__all__ = ["UnitMixture", "pretend"]


@final
class UnitMixture(Model, Program, Scored, Generative, Encoder, Conditional, Symmetric):
    r"""A mixture of normals of unit variance: only weights and means are unknown.

    .. math::
        w \sim \mathrm{Dirichlet}(1, \dots, 1), \quad \mu_{kj} \sim \mathrm{N}(0, s^2), \quad
        x_i \mid w, \mu \sim \sum_k w_k \mathrm{N}(\mu_k, I)

    With one component its posterior is a textbook's: :math:`\mu_j \mid x \sim
    \mathrm{N}\!\left(\frac{\sum_i x_{ij}}{n + s^{-2}}, \frac{1}{n + s^{-2}}\right)`.

    Args:
        num_components: How many components.
        prior_scale: Standard deviation ``s`` of the means' prior.
        columns: Names of the columns, set by :meth:`bind`.

    Example:
        >>> model = UnitMixture(2, columns=("a",))
        >>> draws = {"weights": torch.tensor([[0.5, 0.5]]), "loc": torch.tensor([[[0.0], [0.0]]])}
        >>> model.log_prob(torch.zeros(1, 1), draws)
        tensor([[-0.9189]])
    """

    def __init__(
        self, num_components: int, *, prior_scale: float = 10.0, columns: tuple[str, ...] = ()
    ) -> None:
        self.num_components = num_components
        self.prior_scale = prior_scale
        self.columns = columns

    def __str__(self) -> str:
        return (
            f"UnitMixture of {self.num_components} components\n"
            f"  weights ~ Dirichlet(1, ..., 1)\n  loc ~ Normal(0, {self.prior_scale:g})"
        )

    # ------------------------------------------------------------ Model
    def bind(self, data: Dataset) -> Self:
        return type(self)(self.num_components, prior_scale=self.prior_scale, columns=data.columns)

    def to(self, device: torch.device) -> Self:
        return self  # it holds no tensors

    @property
    def is_bound(self) -> bool:
        return bool(self.columns)

    @property
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        return {"weights": ("component",), "loc": ("component", "column")}

    def coords(self) -> Mapping[str, list[Any]]:
        return {"component": list(range(self.num_components)), "column": list(self.columns)}

    def to_config(self) -> dict[str, Any]:
        return {
            "num_components": self.num_components,
            "prior_scale": self.prior_scale,
            "columns": list(self.columns),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(
            config["num_components"],
            prior_scale=config["prior_scale"],
            columns=tuple(config["columns"]),
        )

    # ------------------------------------------------------------ Program
    def model(self, batch: Tensor | None, *, num_rows: int | None = None) -> None:
        size = (self.num_components, len(self.columns))
        zero = torch.zeros(size, dtype=torch.float64)
        weights = pyro.sample("weights", dist.Dirichlet(zero.new_ones(self.num_components)))
        loc = pyro.sample("loc", dist.Normal(zero, self.prior_scale).to_event(2))
        held = 1 if batch is None else batch.shape[0]
        with pyro.plate("data", num_rows or held, subsample_size=held):
            # Pyro's own mixture wants the components last but the event
            parts = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=batch)

    # ------------------------------------------------------------ densities
    def _scores(self, x: Tensor, draws: Tensors) -> Tensor:
        """``log w_k + log N(x_i | mu_k, I)`` over the observed entries, ``(*draw, n, K)``."""
        missing = x.isnan()
        error = x.nan_to_num(0.0)[:, None] - draws["loc"].unsqueeze(-3)
        square = (error.square() + math.log(2 * math.pi)).masked_fill(missing[:, None], 0.0)
        return draws["weights"].log().unsqueeze(-2) - 0.5 * square.sum(-1)

    def log_prob(self, x: Tensor, draws: Tensors) -> Tensor:
        return self._scores(x, draws).logsumexp(-1)

    def encode(self, x: Tensor, draws: Tensors) -> torch.distributions.Distribution:
        return torch.distributions.Categorical(logits=self._scores(x, draws))

    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        label = rng.categorical(draws["weights"].log(), generator, dim=-1)
        loc = draws["loc"][torch.arange(len(label), device=label.device), label]
        return loc + rng.standard_normal(loc.shape, generator, loc.dtype)

    def condition(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> torch.distributions.Distribution:
        shown = torch.where(observed, x, torch.nan)
        loc = draws["loc"][..., ~observed].unsqueeze(-3)
        loc = loc.expand(*loc.shape[:-3], x.shape[0], *loc.shape[-2:])
        parts = torch.distributions.Normal(loc, torch.ones_like(loc))
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=self._scores(shown, draws)),
            torch.distributions.Independent(parts, 1),
        )

    # ------------------------------------------------------------ Symmetric
    @property
    def symmetry(self) -> LabelPermutation:
        return LabelPermutation(self.num_components, {"weights": 0, "loc": 0})

    def invariants(self, draws: Tensors) -> Tensors:
        weights = draws["weights"]
        mean = (weights[..., None] * draws["loc"]).sum(-2)
        return {"mean": mean, "num_occupied": (weights > 0.01).sum(-1).to(weights.dtype)}


def pretend(
    model: UnitMixture,
    x: object,
    *,
    num_chains: int = 2,
    num_draws: int = 100,
    switch: bool = False,
    seed: int = 0,
) -> Fit:
    """A fit whose draws scatter about k-means-like centres, labels switched at will: for tests.

    With one component the draws are exact and independent draws of the posterior. Otherwise
    centres are evenly spaced rows along the first column, and draws scatter about them as a
    posterior would.
    """
    from bayesgen.data import as_dataset
    from bayesgen.fit import Fit

    data = as_dataset(x)
    rows, bound, k = data.tensor(), model.bind(data), model.num_components
    generator = rng.make_generator(seed)
    n, shape = len(rows) / k, (num_chains, num_draws)
    rows = rows.nan_to_num(0.0)
    groups = rows[rows[:, 0].argsort()].tensor_split(k)
    precision = n + model.prior_scale**-2
    centre = torch.stack([part.sum(0) / (len(part) + model.prior_scale**-2) for part in groups])
    noise = rng.standard_normal((*shape, k, rows.shape[1]), generator)
    counts = torch.tensor([len(part) + 1.0 for part in groups], dtype=torch.float64)
    draws = {
        "weights": rng.log_dirichlet(counts.expand(*shape, k), generator).exp(),
        "loc": centre + noise * precision**-0.5,
    }
    if switch:
        order = torch.rand(*shape, k, generator=generator).argsort(-1)
        draws = bound.symmetry.apply(draws, order)
    attrs = {"engine": "pretend", "seed": seed, "num_rows": data.num_rows}
    return Fit(bound, draws, data=data, attrs=attrs)
