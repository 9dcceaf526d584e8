"""Hierarchical models, non-centred."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

__all__ = ["eight_schools", "radon_intercept", "radon_pooled"]


def eight_schools(y, sigma, **_):
    """Effects of coaching in eight schools."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _counties(count):
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    with pyro.plate("county", count):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        return pyro.deterministic("alpha", mu + sigma * raw)


def radon_pooled(log_radon, county_idx, J, **_):
    """Radon in the houses of 85 counties."""
    alpha, sigma = _counties(J), pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("house", len(log_radon)):
        pyro.sample("y", dist.Normal(alpha[county_idx.long() - 1], sigma), obs=log_radon)


def radon_intercept(log_radon, county_idx, J, log_uppm, floor_measure, **_):
    """Radon by county, uranium in the soil and floor."""
    alpha, sigma = _counties(J), pyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    mean = alpha[county_idx.long() - 1] + beta[0] * log_uppm + beta[1] * floor_measure
    with pyro.plate("house", len(log_radon)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=log_radon)
