"""A fifth of the entries missing at random: what linear models lose by it, and fill in."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from bayesgen import rng
from bayesgen.inference import VB
from bayesgen.models import PPCA, BayesianPCA, FactorAnalysis, RobustPCA

__all__: list[str] = []

DIM, LATENTS = 10, 3


def simulate(seed):
    """Rows, their true loadings, and which entries are hidden."""
    generator = rng.make_generator(seed)
    loadings = rng.standard_normal((DIM, LATENTS), generator)
    latents = rng.standard_normal((400, LATENTS), generator)
    x = latents @ loadings.mT + 0.5 * rng.standard_normal((400, DIM), generator)
    return x, loadings, torch.rand(x.shape, generator=generator) < 0.2


def subspace_error(fit, loadings):
    """Largest principal angle to the truth, of the leading directions of the posterior mean."""
    drawn = fit.draws["loadings"].flatten(0, 1)
    ours = torch.linalg.eigh((drawn @ drawn.mT).mean(0)).eigenvectors[:, -LATENTS:]
    cosines = torch.linalg.svdvals(ours.mT @ torch.linalg.qr(loadings).Q)
    return float(cosines.clamp_max(1.0).min().arccos())


MODELS = {
    "PPCA": PPCA(LATENTS),
    "FactorAnalysis": FactorAnalysis(LATENTS),
    "BayesianPCA": BayesianPCA(2 * LATENTS),
    "RobustPCA": RobustPCA(LATENTS),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_fifth_of_the_entries_missing(name):
    x, loadings, hidden = simulate(1)
    holed = x.masked_fill(hidden, torch.nan)
    complete, fit = (VB().run(MODELS[name], rows, seed=0) for rows in (x, holed))
    assert subspace_error(fit, loadings) < 2.0 * subspace_error(complete, loadings)
    filled = fit.impute(holed, num_samples=400)[:, hidden]
    low, high = torch.quantile(filled, torch.tensor([0.05, 0.95]).to(filled), dim=0)
    inside = (x[hidden] > low) & (x[hidden] < high)
    assert 0.85 < float(inside.double().mean()) < 0.95


@pytest.mark.parametrize("name", ["PPCA", "FactorAnalysis", "BayesianPCA"])
def test_rows_with_holes_have_the_exact_marginal_density(name):
    x, _, hidden = simulate(0)
    holed = x.masked_fill(hidden, torch.nan)
    fit = VB(num_samples=1).run(MODELS[name], holed, seed=0)
    draw = {site: value[0, 0] for site, value in fit.draws.items()}
    noise = torch.diag(draw["noise_scale"].expand(DIM).square())
    covariance = draw["loadings"] @ draw["loadings"].mT + noise
    wanted = [
        MultivariateNormal(draw["loc"][seen], covariance[seen][:, seen]).log_prob(row[seen])
        for row, seen in zip(holed[:50], ~hidden[:50], strict=True)
    ]
    torch.testing.assert_close(fit.log_prob(holed[:50]), torch.stack(wanted), rtol=0.0, atol=1e-10)
