"""SVI under flat priors: every guide starts in the support, and the answer is the likelihood's."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide

from bayesgen.inference import SVI
from bayesgen.rng import make_generator

__all__: list[str] = []

D64 = torch.float64
NOISE = 0.5


def rows():
    generator = make_generator(0)
    x = torch.randn((50, 2), generator=generator, dtype=D64)
    noise = torch.randn(50, generator=generator, dtype=D64)
    return x, x @ torch.tensor([1.0, -2.0], dtype=D64) + NOISE * noise


def flat_line(x, y):
    slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (2,), ()).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, NOISE), obs=y)


def masked_line(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, NOISE), obs=y)


def flat_scale(x, y):
    with pyro.plate("columns", 2):
        slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    weights = pyro.sample("weights", dist.ImproperUniform(constraints.simplex, (), (3,)))
    pyro.sample("counts", dist.Multinomial(9, weights), obs=torch.tensor([3.0, 4.0, 2.0]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


@pytest.mark.parametrize("model", [flat_line, masked_line])
def test_the_posterior_and_its_constant_are_those_of_least_squares(model):
    x, y = rows()
    gram = x.T @ x
    best = torch.linalg.solve(gram, x.T @ y)
    fit = SVI("AutoMultivariateNormal", learning_rate=0.03, num_steps=4000).run(model, (x, y))
    draws = fit.draws["slope"][0]
    scale = NOISE * gram.inverse().diagonal().sqrt()
    assert bool(((draws.mean(0) - best).abs() < 0.2 * scale).all())
    assert bool(((draws.std(0) / scale - 1).abs() < 0.12).all())
    # The integral of the likelihood over all slopes, to which an exact guide brings the bound.
    top = dist.Normal(x @ best, NOISE).log_prob(y).sum()
    wanted = top + math.log(2 * math.pi) + 2 * math.log(NOISE) - 0.5 * torch.logdet(gram)
    assert abs(fit.attrs["elbo"] - float(wanted)) < 0.02
    assert any("bounds no evidence" in message for message in fit.attrs["messages"])


GUIDES = [
    *("AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoStructured"),
    *("AutoLowRankMultivariateNormal", "AutoDelta", "AutoLaplaceApproximation"),
    autoguide.AutoNormal(flat_scale),
]


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_every_guide_starts_in_the_support(guide):
    x, y = rows()
    fit = SVI(guide, learning_rate=0.03, num_steps=1920, num_samples=100).run(flat_scale, (x, y))
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert abs(float(fit.draws["scale"].mean()) - NOISE) < 0.15
    assert bool((fit.draws["slope"].mean((0, 1)) - torch.tensor([1.0, -2.0])).abs().max() < 0.3)
    total = fit.draws["weights"].sum(-1)
    assert torch.allclose(total, torch.ones_like(total))
