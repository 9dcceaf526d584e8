"""Hyperparameters that a callable prior samples are parameters of the fit, whatever the model."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesgen
from bayesgen.inference import NUTS, SVI, ManyChains
from bayesgen.models import PPCA, GaussianMixture
from bayesgen.priors import StickBreaking

__all__: list[str] = []

ENGINES = {
    "NUTS": NUTS(num_chains=2, num_warmup=150, num_samples=200),
    "ManyChains": ManyChains(num_chains=16, num_warmup=150, num_samples=25),
    "SVI": SVI(num_steps=1920, learning_rate=0.03, num_samples=400),
}


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    x[:40] += 6.0
    return x


def weights():
    """An exponential hyperprior: its posterior given two weights is known by quadrature."""
    one = torch.ones((), dtype=torch.float64)
    concentration = pyro.sample("concentration", dist.Gamma(2 * one, 2 * one))
    return dist.Dirichlet(concentration * one.expand(2))


def loc():
    zeros = torch.zeros(2, dtype=torch.float64)
    scale = pyro.sample("loc_scale", dist.LogNormal(zeros, 1.0).to_event(1))
    return dist.Normal(zeros, scale).to_event(1)


MODELS = {
    "mixture": (lambda: GaussianMixture(2, "diagonal", priors={"weights": weights}), {
        "concentration": (),
    }),
    "linear": (lambda: PPCA(1, priors={"loc": loc}), {"loc_scale": (2,)}),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_they_are_in_draws_summary_arviz_and_file(engine, model, tmp_path):
    make, wanted = MODELS[model]
    fit = ENGINES[engine].run(make(), rows(), seed=0)
    fit.save(tmp_path / "fit")
    again = bayesgen.load(tmp_path / "fit")
    names = list(fit.summary().table.index)
    for name, shape in wanted.items():
        assert fit.draws[name].shape[2:] == shape
        assert name in fit.arviz.posterior
        assert sum(n.split("[")[0] == name for n in names) == max(1, sum(shape))
        assert torch.equal(again.draws[name], fit.draws[name])
    assert torch.equal(again.log_prob(rows()), fit.log_prob(rows()))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_hyperparameter_has_its_posterior(engine):
    """Given the 40 and 20 rows of two far clusters, by a grid over the concentration."""
    make, _ = MODELS["mixture"]
    value = ENGINES[engine].run(make(), rows(), seed=1).draws["concentration"].double()
    grid = torch.linspace(1e-3, 12.0, 20_000, dtype=torch.float64)
    log_p = grid.log() - 2 * grid + torch.lgamma(2 * grid) - 2 * torch.lgamma(grid)
    log_p += torch.lgamma(grid + 40) + torch.lgamma(grid + 20) - torch.lgamma(2 * grid + 60)
    p = log_p.softmax(0)
    mean = float(p @ grid)
    sd = float(p @ (grid - mean).square()) ** 0.5
    assert abs(float(value.mean()) - mean) < 0.35 * sd
    assert abs(float(value.std()) / sd - 1) < 0.35


def test_steps_on_the_way_to_a_parameter_are_no_parameters():
    model = GaussianMixture(2, "diagonal", priors={"weights": StickBreaking(1.0)})
    for engine in (NUTS(num_warmup=20, num_samples=5, num_chains=2), SVI(num_steps=48)):
        assert not any("stick" in name for name in engine.run(model, rows(), seed=0).draws)
