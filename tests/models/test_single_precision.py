"""Every linear model in single precision: the answer of double precision, to single rounding."""

from __future__ import annotations

import pytest
import torch

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB, Gibbs, ManyChains
from bayesgen.inference.programs.trace import trace
from bayesgen.models import PPCA, BayesianPCA, FactorAnalysis, GaussianMixture, RobustPCA

__all__: list[str] = []

LINEAR = {
    "PPCA": PPCA(2),
    "FactorAnalysis": FactorAnalysis(2),
    "BayesianPCA": BayesianPCA(3),
    "RobustPCA": RobustPCA(2),
    "RobustPCA-df": RobustPCA(2, df=4.0),
}
ENGINES = {
    # Rises of the objective below its single rounding end the ascent: tolerances are above it.
    "EM": lambda dtype: EM(num_starts=1, tolerance=1e-4, dtype=dtype),
    "VB": lambda dtype: VB(num_starts=1, tolerance=1e-4, dtype=dtype),
}
BOTH = (torch.float32, torch.float64)


def simulate(gaps):
    generator = rng.make_generator(0)
    loadings = rng.standard_normal((6, 2), generator)
    latents = rng.standard_normal((200, 2), generator)
    x = latents @ loadings.mT + 0.5 * rng.standard_normal((200, 6), generator)
    x = x + torch.tensor([0.0, 10.0, -100.0, 1000.0, 0.0, 0.0])
    hidden = torch.rand(x.shape, generator=generator) < 0.15
    return x.masked_fill(hidden, torch.nan) if gaps else x


@pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("model", list(LINEAR))
def test_the_answer_is_that_of_double_precision(model, engine, gaps):
    x = simulate(gaps)
    single, double = (ENGINES[engine](dtype).run(LINEAR[model], x, seed=0) for dtype in BOTH)
    assert single.draws["loadings"].dtype == torch.float64  # parameters are not rounded
    torch.testing.assert_close(single.log_prob(x), double.log_prob(x), rtol=0.0, atol=2e-2)


@pytest.mark.parametrize("model", ["FactorAnalysis", "RobustPCA"])
def test_gibbs_draws_the_same_posterior(model):
    """Rounding sends single chains elsewhere, not what they are draws of."""
    x, found = simulate(gaps=True), []
    for dtype in BOTH:
        engine = Gibbs(num_chains=2, num_samples=400, num_warmup=100, dtype=dtype)
        draws = engine.run(LINEAR[model], x, seed=0).draws
        scale = draws["noise_scale"].reshape(2, 400, -1).expand(draws["loc"].shape)
        noise = torch.diag_embed(scale.square())
        covariance = draws["loadings"] @ draws["loadings"].mT + noise
        found.append(covariance.flatten(0, 1))
    single, double = found
    off = (single.mean(0) - double.mean(0)) / double.std(0)
    assert float(off.abs().max()) < 0.5


@pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
@pytest.mark.parametrize("name", [*LINEAR, "GaussianMixture"])
def test_the_density_that_samplers_walk_on_is_that_of_double_precision(name, gaps):
    if name == "GaussianMixture" and gaps:
        pytest.skip("programs of mixtures take complete rows")
    data = as_dataset(simulate(gaps))
    model = (GaussianMixture(2) if name == "GaussianMixture" else LINEAR[name]).bind(data)
    found = []
    for dtype in BOTH:
        batch = data.tensor(dtype)
        density = trace(
            lambda b=batch: model.model(b), dtype=dtype, generator=rng.make_generator(0)
        )
        assert density.is_traced, density.message
        if not found:
            points = rng.standard_normal((3, density.num_params), rng.make_generator(1))
        value, gradient = density.value_and_grad(points.to(dtype))
        assert value.dtype == gradient.dtype == dtype
        found.append((value.double(), gradient.double()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
def test_many_chains_draw_in_single_precision(gaps):
    """Once a matrix of the prior, in double precision, met one of the data and the run stopped."""
    engine = ManyChains(num_chains=32, num_warmup=20, num_samples=2, dtype=torch.float32)
    fit = engine.run(PPCA(1), simulate(gaps)[:50, :3], seed=0)
    assert fit.draws["loadings"].dtype == torch.float32
    assert bool(fit.draws["loadings"].isfinite().all())
