"""Every component family with data, with and without holes, for the tests of their contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesgen.data import as_dataset
from bayesgen.models.families.base import Family
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.models.families.categorical import Categorical
from bayesgen.models.families.diagonal import DiagonalGaussian
from bayesgen.models.families.gaussian import Gaussian
from bayesgen.models.families.poisson import Poisson
from bayesgen.models.families.product import Product
from bayesgen.models.families.student_t import StudentT
from bayesgen.priors import HierarchicalNormalInverseWishart

__all__: list[str] = []

NUM_ROWS, NUM_COLUMNS, NUM_COMPONENTS = 23, 3, 2


@dataclass(frozen=True)
class Case:
    """A family bound to complete data."""

    name: str
    family: Family
    x: Tensor
    """``(n, d)``, complete."""
    holes: Tensor
    """The same with NaN in a fifth of the entries, and one row without any."""

    @property
    def is_tight(self) -> bool:
        """Whether one component's bound is its evidence: no local scale, nothing hierarchical."""
        return "student" not in self.name and "learned" not in self.name

    def internal(self, generator: torch.Generator, *lead: int) -> dict[str, Tensor]:
        """Draws of the block's sites given some of the rows, ``(*lead, K, ...)``."""
        block = self.family.block
        values = block.draw(self.statistics(generator, *lead), None, generator=generator)
        return block.draw(self.statistics(generator, *lead), values, generator=generator)

    def values(self, generator: torch.Generator, *lead: int) -> dict[str, Tensor]:
        """The same in public."""
        return self.family.export(self.internal(generator, *lead))

    def responsibilities(self, generator: torch.Generator, *lead: int) -> Tensor:
        logits = torch.randn(
            (*lead, NUM_COMPONENTS, NUM_ROWS), generator=generator, dtype=torch.float64
        )
        return torch.softmax(logits, -2)

    def statistics(self, generator: torch.Generator, *lead: int) -> dict[str, Tensor]:
        observed = self.family.observe(self.x)
        weights = self.responsibilities(generator, *lead)
        return self.family.statistics(observed, weights, None, None)


def _real(generator: torch.Generator) -> Tensor:
    noise = torch.randn((NUM_ROWS, NUM_COLUMNS), generator=generator, dtype=torch.float64)
    mix = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 2.0]], dtype=torch.float64)
    return noise @ mix + torch.tensor([10.0, -3.0, 0.5], dtype=torch.float64)


def _codes(sizes: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        columns = [torch.randint(size, (NUM_ROWS,), generator=generator) for size in sizes]
        return torch.stack(columns, 1).double()

    return draw


def _counts(generator: torch.Generator) -> Tensor:
    rate = torch.tensor([0.7, 3.0, 20.0], dtype=torch.float64).expand(NUM_ROWS, -1)
    return torch.poisson(rate, generator=generator)


def _mixed(generator: torch.Generator) -> Tensor:
    parts = [_real(generator)[:, :1], _codes((2, 3))(generator), _counts(generator)[:, 1:2]]
    return torch.cat([*parts, _real(generator)[:, 1:2]], 1)


def _learned(loc: float = 0.0) -> HierarchicalNormalInverseWishart:
    rate = torch.full((NUM_COLUMNS,), 0.8, dtype=torch.float64)
    return HierarchicalNormalInverseWishart(torch.full_like(rate, loc), 0.3, 5.0, 2.0, rate)


def _product(real: Family) -> Product:
    return Product(
        {
            "number": (real, [0, 4]),
            "flag": (Bernoulli(), [1]),
            "kind": (Categorical(), [2]),
            "visits": (Poisson(), [3]),
        }
    )


CASES: dict[str, tuple[Family, Callable[[torch.Generator], Tensor], dict[str, Any]]] = {
    "full": (Gaussian(), _real, {}),
    "tied": (Gaussian(tied=True), _real, {}),
    "full learned": (Gaussian(), _real, {"components": _learned()}),
    "diagonal": (DiagonalGaussian(), _real, {}),
    "spherical": (DiagonalGaussian(spherical=True), _real, {}),
    "diagonal learned": (DiagonalGaussian(), _real, {"components": _learned()}),
    "spherical learned": (DiagonalGaussian(spherical=True), _real, {"components": _learned()}),
    "student": (StudentT(), _real, {}),
    "student tied": (StudentT(tied=True), _real, {}),
    "student fixed": (StudentT(df=4.0), _real, {}),
    "bernoulli": (Bernoulli(), _codes((2, 2, 2)), {}),
    "poisson": (Poisson(), _counts, {}),
    "categorical": (Categorical(), _codes((2, 4, 3)), {}),
    "product": (_product(Gaussian()), _mixed, {}),
    "product tied": (_product(Gaussian(tied=True)), _mixed, {}),
    "product student": (_product(StudentT()), _mixed, {}),
}


def make_case(name: str, num_components: int = NUM_COMPONENTS) -> Case:
    generator = torch.Generator().manual_seed(1)
    family, draw, priors = CASES[name]
    x = draw(generator)
    family = family.bind(as_dataset(x, kinds="real"), num_components, priors)
    hidden = torch.rand(x.shape, generator=generator) < 0.2
    hidden[0], hidden[1] = True, False
    return Case(name, family, x, x.masked_fill(hidden, torch.nan))


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each family in turn, two components."""
    return make_case(request.param)


@pytest.fixture(params=[name for name in CASES if make_case(name).is_tight])
def conjugate(request: pytest.FixtureRequest) -> Case:
    """Each family whose posterior is exact, one component."""
    return make_case(request.param, 1)


@pytest.fixture
def cases() -> Callable[..., Case]:
    """Make a case by name."""
    return make_case
