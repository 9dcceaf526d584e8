"""The workloads as Pyro programs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from common import CENTRES

__all__ = ["program"]

D64 = {"dtype": torch.float64}


def program(workload, data):
    """The Pyro program of a workload, with its data; and the names of the sites compared."""
    return {"schools": schools, "logistic": logistic, "radon": radon, "mixture": mixture}[
        workload
    ]({k: torch.as_tensor(v) for k, v in data.items()})


def schools(data):
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * raw, data["sigma"]), obs=data["y"])

    return model


def logistic(data):
    x, y = data["x"], data["y"]
    zeros = torch.zeros(x.shape[1], **D64)

    def model():
        slope = pyro.sample("slope", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)

    return model


def radon(data):
    county, num_counties = data["county"].long(), int(data["num_counties"])
    zeros = torch.zeros(2, **D64)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        beta = pyro.sample("beta", dist.Normal(zeros, 10.0).to_event(1))
        with pyro.plate("county", num_counties):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        mean = (mu + spread * raw)[county] + beta[0] * data["uppm"] + beta[1] * data["floor"]
        with pyro.plate("home", len(county)):
            pyro.sample("y", dist.Normal(mean, noise), obs=data["y"])

    return model


def mixture(data):
    x, centres = data["x"], torch.as_tensor(CENTRES)

    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0, **D64)))
        with pyro.plate("component", 3):
            shift = pyro.sample("shift", dist.Normal(torch.zeros(2, **D64), 1.0).to_event(1))
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2, **D64), 0.5).to_event(1))
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        zero = torch.zeros_like(slope)
        tril = torch.stack(
            (torch.stack((scale[..., 0], zero), -1), torch.stack((slope, scale[..., 1]), -1)), -2
        )
        parts = dist.MultivariateNormal(centres + shift, scale_tril=tril)
        with pyro.plate("row", len(x)):
            law = dist.MixtureSameFamily(dist.Categorical(weights), parts)
            pyro.sample("x", law, obs=x)

    return model
