"""Simulation-based calibration of Gibbs on the linear models, in what no rotation changes."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Gamma, Normal

from bayesgen import rng
from bayesgen.calibration import simulation_based_calibration
from bayesgen.data import as_dataset
from bayesgen.distributions import (
    PartialLowRankMultivariateNormal,
    PartialLowRankMultivariateStudentT,
    RootInverseGamma,
)
from bayesgen.inference import Gibbs
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.gibbs import GibbsState, Work
from bayesgen.inference.run import Task
from bayesgen.models import PPCA, FactorAnalysis, RobustPCA
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom
from bayesgen.models.linear import cells
from bayesgen.models.linear.block import LoadingsBlock
from bayesgen.models.linear.rows import take_rows

__all__: list[str] = []

N, D, Q = 12, 3, 2
WIDTH = 0.8
F64 = {"dtype": torch.float64}

MODELS = {
    "PPCA": lambda priors, bound: PPCA(Q, priors, bound),
    "FactorAnalysis": lambda priors, bound: FactorAnalysis(Q, priors, bound),
    "RobustPCA": lambda priors, bound: RobustPCA(Q, {**priors, "df": Gamma(4.0, 0.8)}, bound),
    "RobustPCA cells": lambda priors, bound: RobustPCA(
        Q, {**priors, "df": Gamma(4.0, 0.8)}, bound, scales="cells"
    ),
    "RobustPCA df=4": lambda priors, bound: RobustPCA(Q, priors, bound, df=4.0),
}


def noise_shape(name):
    return (D,) if name == "FactorAnalysis" else ()


def bound_model(name):
    """On rows centred on zero, so that the offset is none."""
    wide, columns = torch.full((D, Q), WIDTH, **F64), torch.ones(D, **F64)
    shape = torch.full(noise_shape(name), 3.0, **F64)
    priors = {
        "loadings": Normal(0.0 * wide, wide),
        "loc": Normal(0.5 * columns, columns),
        "noise_scale": RootInverseGamma(shape, 2.0 * shape / 3.0),
    }
    rows = as_dataset([[-1.0] * D, [1.0] * D] * (N // 2))
    bound = PPCA(Q).bind(rows).bound._replace(is_complete=False)
    bound.scales.offset.zero_()
    return MODELS[name](priors, bound), rows


def prior(name, size, generator):
    """From the distributions, not from the block under test."""
    shape = (size, *(noise_shape(name) or (1,)))
    values = {
        "loadings": WIDTH * rng.standard_normal((size, D, Q), generator),
        "loc": 0.5 + rng.standard_normal((size, D), generator),
        "variance": 2.0 / rng.gamma(torch.full(shape, 3.0, **F64), generator),
    }
    if name in ("RobustPCA", "RobustPCA cells"):
        shape = (size, D if name.endswith("cells") else 1)
        df = rng.gamma(torch.full(shape, 4.0, **F64), generator) / 0.8
        values["df"] = df.clamp(0.1, 1000.0)  # beyond lies 1e-5 of the prior
    return values


def law(name, values):
    """The rows' law, of the draws' shape and one dimension for rows.

    That of cells has no closed form: calibration holds of any function of draws and rows, so the
    law of rows whose degrees of freedom are the mean over the columns stands in for it.
    """
    lead = values["loc"].shape[:-1]
    loc, factor = values["loc"].unsqueeze(-2), values["loadings"].unsqueeze(-3)
    diag = values["variance"].expand(*lead, D).unsqueeze(-2)
    if not name.startswith("RobustPCA"):
        return PartialLowRankMultivariateNormal(loc, factor, diag, validate_args=False)
    df = values.get("df", torch.full((*lead, 1), 4.0, **F64)).mean(-1, keepdim=True)
    return PartialLowRankMultivariateStudentT(df, loc, factor, diag, validate_args=False)


def simulate(name, values, generator, gaps):
    size = len(values["loc"])
    noise = rng.standard_normal((size, N, D), generator)
    latents = rng.standard_normal((size, N, Q), generator)
    noise = values["variance"].sqrt().unsqueeze(-2) * noise
    if name.startswith("RobustPCA"):
        df = values.get("df", torch.full((size, 1), 4.0, **F64)).unsqueeze(-2)
        stretch = (df / rng.chi2(df.expand(size, N, -1), generator)).sqrt()
        noise = noise * stretch
        latents = latents if name.endswith("cells") else latents * stretch
    x = latents @ values["loadings"].mT + noise + values["loc"].unsqueeze(-2)
    hidden = torch.rand((size, N, D), generator=generator, **F64) < gaps
    return x.masked_fill(hidden, torch.nan)


def quantities(name):
    """Invariant, and bounded or with light tails."""

    def about(values, x):
        lead = values["loc"].shape[:-1]
        loadings = values["loadings"]
        noise = values["variance"].expand(*lead, D)
        sigma = loadings @ loadings.mT + torch.diag_embed(noise)
        found = {
            "log_density": torch.tanh(law(name, values).log_prob(x).mean(-1) / 4),
            "covariance": torch.tanh(sigma[..., *torch.tril_indices(D, D)] / 4),
            "log_det": torch.logdet(sigma),
            "mean": values["loc"],
            "noise": values["variance"].log(),
        }
        return {**found, "df": values["df"].log()} if "df" in values else found

    return about


def posterior(name, x, generator, *, num_draws=31, thinning=8, num_warmup=120):
    """Every chain has data of its own, and starts from the prior, not from the truth."""
    model, rows = bound_model(name)
    task = Task(model, rows, generator, torch.device("cpu"), torch.float64)
    source = Source(model, rows)
    source._kept = [take_rows(x, torch.float64, complete=False)]
    work, engine = Work(source, None, None), Gibbs(num_chains=len(x))
    values, left, kept = prior(name, len(x), generator), None, []
    for step in range(num_warmup + num_draws * thinning):
        state = GibbsState({"loadings": values}, {}, {}, 0, torch.zeros(len(x), **F64), left)
        state = engine.step(task, work, state)[0]
        values, left = state.values["loadings"], state.left
        if step >= num_warmup and (step - num_warmup) % thinning == 0:
            kept.append(values)
    return {site: torch.stack([v[site] for v in kept]) for site in values}


def sbc(name, num_simulations, *, gaps=0.2, **settings):
    def joint(size, generator):
        values = prior(name, size, generator)
        return values, simulate(name, values, generator, gaps)

    return simulation_based_calibration(
        joint,
        lambda x, generator: posterior(name, x, generator, **settings),
        num_simulations=num_simulations,
        quantities=quantities(name),
        seed=7,
    )


@pytest.mark.parametrize("name", MODELS)
def test_gibbs_is_calibrated(name):
    ranks = sbc(name, 200)
    assert ranks.p_value > 0.02, ranks


def test_half_the_noise_of_the_loadings_is_caught(monkeypatch):
    right = LoadingsBlock._draw_loadings
    monkeypatch.setattr(
        LoadingsBlock,
        "_draw_loadings",
        staticmethod(lambda law, generator: 0.5 * law.loc + 0.5 * right(law, generator)),
    )
    ranks = sbc("PPCA", 200)
    assert ranks.p_value < 0.02, ranks


def test_degrees_of_freedom_of_other_rows_are_caught(monkeypatch):
    """Each row counted sixteen times in the degrees of freedom alone."""
    right = DegreesOfFreedom._sums
    monkeypatch.setattr(
        DegreesOfFreedom,
        "_sums",
        staticmethod(lambda statistics: tuple(16.0 * part for part in right(statistics))),
    )
    ranks = sbc("RobustPCA", 200)
    assert ranks.p_value < 0.02, ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "RobustPCA cells"])
def test_gibbs_is_calibrated_at_length(name):
    ranks = sbc(name, 2000, num_draws=63, thinning=10, num_warmup=200)
    assert ranks.p_value > 0.02, ranks


def cells_at_length():
    return sbc("RobustPCA cells", 2000, num_draws=15, thinning=6, num_warmup=60)


@pytest.mark.slow
def test_gibbs_is_calibrated_at_length_with_scales_of_cells():
    ranks = cells_at_length()
    assert ranks.p_value > 0.02, ranks


@pytest.mark.slow
def test_residuals_a_fifth_too_large_in_the_degrees_of_freedom_are_caught(monkeypatch):
    right = cells.tail_sums
    monkeypatch.setattr(
        cells, "tail_sums", lambda distance, observed: right(1.2 * distance, observed)
    )
    ranks = cells_at_length()
    assert ranks.p_value < 0.02, ranks
