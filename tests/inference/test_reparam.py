"""A program reparametrised by Pyro is the program: its sites are latent, and no data."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam

from bayesgen.comparison import compare
from bayesgen.inference import NUTS, SVI, ManyChains, prior_predictive

__all__: list[str] = []

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def hyperparameters():
    return pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))


def by_hand(y, centred):
    mu, tau = hyperparameters()
    with pyro.plate("school", 8):
        raw = pyro.sample("raw", dist.Normal(centred * mu, tau**centred))
        theta = pyro.deterministic("theta", mu + tau ** (1 - centred) * (raw - centred * mu))
        pyro.sample("obs", dist.Normal(theta, SIGMA), obs=y)


def schools(y):
    mu, tau = hyperparameters()
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, SIGMA), obs=y)


def transformed(y):
    mu, tau = hyperparameters()
    line = dist.transforms.AffineTransform(mu, tau)
    with pyro.plate("school", 8):
        law = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([8]), [line])
        pyro.sample("obs", dist.Normal(pyro.sample("theta", law), SIGMA), obs=y)


PROGRAMS = {
    "noncentred": (
        0.0,
        "theta_decentered",
        poutine.reparam(schools, {"theta": LocScaleReparam(0.0)}),
    ),
    "half-way": (
        0.5,
        "theta_decentered",
        poutine.reparam(schools, {"theta": LocScaleReparam(0.5)}),
    ),
    "transformed": (
        0.0,
        "theta_base",
        poutine.reparam(transformed, {"theta": TransformReparam()}),
    ),
}
ENGINES = {
    "NUTS": NUTS(num_chains=4, num_samples=1000, num_warmup=500),
    "ManyChains": ManyChains(num_chains=64, num_samples=100, num_warmup=300),
    "SVI": SVI("AutoMultivariateNormal", num_steps=3000, num_samples=4000, learning_rate=0.02),
}


@functools.cache
def wanted(engine, centred):
    return ENGINES[engine].run(by_hand, (Y, centred), seed=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_reparametrised_site_is_latent(name, engine):
    centred, moved, program = PROGRAMS[name]
    fit, hand = ENGINES[engine].run(program, Y, seed=0), wanted(engine, centred)
    assert set(fit.draws) == {"mu", "tau", "theta", moved}
    assert fit.model.dims["theta"] == ("school",)
    groups = fit.arviz
    for group in ("log_likelihood", "observed_data"):
        assert list(groups[group].data_vars) == ["obs"]
    assert set(fit.model.observed) == {"obs"}
    ours, theirs = fit.draws["theta"], hand.draws["theta"]
    torch.testing.assert_close(ours.mean((0, 1)), theirs.mean((0, 1)), atol=0.6, rtol=0)
    torch.testing.assert_close(ours.std((0, 1)), theirs.std((0, 1)), atol=1.0, rtol=0)
    table = compare({"ours": fit, "by hand": hand}).table
    elpd = list(table["elpd"])
    assert elpd[0] == pytest.approx(elpd[1], abs=0.3)


def test_the_prior_and_the_graph_of_a_reparametrised_program():
    *_, program = PROGRAMS["noncentred"]
    found = prior_predictive(program, Y, num_samples=50)
    assert set(found.prior) == {"mu", "tau", "theta", "theta_decentered"}
    assert set(found.predictive) == {"obs"}
    fit = NUTS(num_chains=1, num_samples=10, num_warmup=10).run(program, Y, seed=0)
    kinds = {node.name: node.kind for node in fit.graph().nodes}
    assert kinds["theta"] == "deterministic"
    assert kinds["theta_decentered"] == "latent"
    assert ("theta", "obs") in fit.graph().edges
