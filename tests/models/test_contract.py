"""Every model meets the contract of `bayesgen.testing`: a new one adds a row to CASES."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import Gibbs
from bayesgen.models import (
    PPCA,
    BayesianPCA,
    FactorAnalysis,
    GaussianMixture,
    Mixture,
    RobustPCA,
)
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.models.families.categorical import Categorical
from bayesgen.models.families.poisson import Poisson
from bayesgen.models.families.product import Product
from bayesgen.models.families.student_t import StudentT
from bayesgen.priors import GammaDirichlet, HierarchicalNormalInverseWishart, StickBreaking
from bayesgen.testing import ModelCase, model_checks

__all__: list[str] = []


def real(num_columns, *, seed=0, num_rows=30):
    generator = rng.make_generator(seed)
    x = rng.standard_normal((num_rows, num_columns), generator)
    return x + 3.0 * torch.arange(num_rows).remainder(2)[:, None]


def discrete(num_columns, top, *, seed=0, num_rows=40):
    generator = rng.make_generator(seed)
    return torch.randint(0, top, (num_rows, num_columns), generator=generator).double()


def mixed(kinds):
    """One column of each of the kinds, as in a table."""
    columns = [real(1)[:, 0] if kind == "real" else discrete(1, 3)[:30, 0] for kind in kinds]
    names = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    named = {
        n: c.clamp_max(1.0) if "binary" in n else c for n, c in zip(names, columns, strict=True)
    }
    table = {n: c.numpy() for n, c in named.items()}
    return as_dataset(table, kinds=dict(zip(names, kinds, strict=True)))


def hierarchical():
    return HierarchicalNormalInverseWishart(
        torch.ones(2, dtype=torch.float64), 0.1, 5.0, 2.0, torch.ones(2, dtype=torch.float64)
    )


def levels(num_columns, top):
    return as_dataset(discrete(num_columns, top), kinds="category")


CASES = {
    "gaussian-1": (lambda: GaussianMixture(3), lambda: real(1)),
    "gaussian-2": (lambda: GaussianMixture(3), lambda: real(2)),
    "gaussian-5": (lambda: GaussianMixture(2), lambda: real(5)),
    "tied": (lambda: GaussianMixture(3, "tied"), lambda: real(2)),
    "diagonal": (lambda: GaussianMixture(3, "diagonal"), lambda: real(2)),
    "spherical": (lambda: GaussianMixture(3, "spherical"), lambda: real(2)),
    "offset": (lambda: GaussianMixture(2), lambda: real(2) + 1e6),
    "stick-breaking": (
        lambda: GaussianMixture(3, priors={"weights": StickBreaking(1.0)}),
        lambda: real(1),
    ),
    "learned-concentration": (
        lambda: GaussianMixture(3, priors={"weights": GammaDirichlet(1.0, 10.0)}),
        lambda: real(1),
    ),
    "hierarchical": (
        lambda: GaussianMixture(2, priors={"components": hierarchical()}),
        lambda: real(2),
    ),
    "hierarchical-diagonal": (
        lambda: GaussianMixture(2, "diagonal", priors={"components": hierarchical()}),
        lambda: real(2),
    ),
    "real-and-count": (lambda: Mixture(Product(), 2), lambda: mixed(("real", "count"))),
    "real-and-category": (lambda: Mixture(Product(), 2), lambda: mixed(("category", "real"))),
    "all-kinds": (
        lambda: Mixture(Product(), 2),
        lambda: mixed(("real", "category", "count", "real", "binary")),
    ),
    "student-t": (lambda: Mixture(StudentT(), 2), lambda: real(2)),
    "student-t-1": (lambda: Mixture(StudentT(), 2), lambda: real(1)),
    "bernoulli": (
        lambda: Mixture(Bernoulli(), 2),
        lambda: as_dataset(discrete(2, 2), kinds="binary"),
    ),
    "bernoulli-5": (
        lambda: Mixture(Bernoulli(), 3),
        lambda: as_dataset(discrete(5, 2), kinds="binary"),
    ),
    "categorical": (lambda: Mixture(Categorical(), 2), lambda: levels(2, 3)),
    "ppca-2": (lambda: PPCA(1), lambda: real(2)),
    "ppca-5": (lambda: PPCA(2), lambda: real(5)),
    "ppca-offset": (lambda: PPCA(1), lambda: real(2) + 1e6),
    "factor-analysis-2": (lambda: FactorAnalysis(1), lambda: real(2)),
    "robust-pca": (lambda: RobustPCA(1), lambda: real(2)),
    "robust-pca-cells": (lambda: RobustPCA(1, scales="cells"), lambda: real(3)),
    "robust-pca-fixed": (lambda: RobustPCA(2, df=5.0), lambda: real(4)),
    "ppca": (lambda: PPCA(2), lambda: real(4)),
    "factor-analysis": (lambda: FactorAnalysis(2), lambda: real(4)),
    "bayesian-pca": (lambda: BayesianPCA(3), lambda: real(4)),
    "bayesian-pca-2": (lambda: BayesianPCA(1), lambda: real(2)),
    "poisson": (
        lambda: Mixture(Poisson(), 2),
        lambda: as_dataset(discrete(2, 6), kinds="count"),
    ),
}


@cache
def case(name):
    """The case, with four draws from a few Gibbs sweeps."""
    model, data = CASES[name]
    engine = Gibbs(num_chains=2, num_samples=2, num_warmup=5, thinning=3, num_moves=0)
    fit = engine.run(model(), data(), seed=0)
    draws = {site: value.flatten(0, 1) for site, value in fit.draws.items()}
    return ModelCase(name, fit.model, fit.data, draws)


def pairs():
    """Each case with the checks that its capabilities call for; nothing is fitted here."""
    for name, (model, data) in CASES.items():
        rows = as_dataset(data())
        for check in model_checks(ModelCase(name, model().bind(rows), rows, {})):
            yield pytest.param(name, check, id=f"{name}-{check.__name__}")


@pytest.mark.parametrize(("name", "check"), list(pairs()))
def test_contract(name, check, device):
    check(case(name).to(device))
