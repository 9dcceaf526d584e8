"""Mixtures of two normals: labels enumerated, and summed out by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from tests.posteriordb.priors import ordered

__all__ = ["low_dim_gauss_mix", "normal_mixture"]


def low_dim_gauss_mix(y, **_):
    """Labels are discrete latents, which the engine sums out."""
    mu = ordered("mu", dist.Normal(torch.zeros(2), 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(1 - theta)).long()
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=y)


def normal_mixture(y, **_):
    """The mode of increasing means; its mirror image is left out by their order."""
    theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    mu = ordered("mu", dist.Normal(torch.zeros(2), 10.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(y)):
        law = dist.MixtureSameFamily(weights, dist.Normal(mu, torch.ones(2)))
        pyro.sample("y", law, obs=y)
