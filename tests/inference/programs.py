"""Pyro programs of well-known posteriors, and their reference draws."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

__all__ = ["PROGRAMS", "data_of", "reference"]


def data_of(shared_data, name):
    """A posteriordb data set, lists as tensors."""
    path = shared_data / "posteriordb" / "data" / f"{name}.json.gz"
    raw = json.loads(gzip.decompress(path.read_bytes()))
    return {
        k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v
        for k, v in raw.items()
    }


def reference(shared_data, name):
    """Reference draws by Stan's names: ``(10, 1000)`` each."""
    for folder in ("draws", "draws_computed_here"):
        path = shared_data / "posteriordb" / folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as file:
                names = [str(n) for n in file["params"]]
                draws = file["draws"].astype(np.float64)
            return {n: draws[..., k] for k, n in enumerate(names)}
    raise FileNotFoundError(name)


def flat(size):
    """A flat prior on ``size`` real numbers."""
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def eight_schools(J, y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", J):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_momiq(data):
    x = torch.stack([torch.ones_like(data["mom_iq"]), data["mom_iq"]], -1)
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(x)):
        pyro.sample("kid_score", dist.Normal(x @ beta, sigma), obs=data["kid_score"])


def ordered(name, size, log_prior):
    value = pyro.sample(name, dist.ImproperUniform(constraints.ordered_vector, (), (size,)))
    pyro.factor(name + "_prior", log_prior(value).sum())
    return value


def low_dim_gauss_mix(data):
    mu = ordered("mu", 2, dist.Normal(0.0, 2.0).log_prob)
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(data["y"])):
        z = pyro.sample("z", dist.Bernoulli(1 - theta)).long()
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=data["y"])


def hmm_example(data):
    rows = [pyro.sample(f"theta{k}", dist.Dirichlet(torch.ones(2))) for k in (1, 2)]
    prior = dist.Normal(torch.tensor([3.0, 10.0]), 1.0)
    mu = ordered("mu", 2, prior.log_prob)
    emissions = dist.Normal(mu, 1.0).log_prob(data["y"].unsqueeze(-1))
    steps = torch.stack(rows).log() + emissions[1:].unsqueeze(-2)
    while len(steps) > 1:  # products of neighbours, so that the graph is of logarithmic length
        pairs = steps[: len(steps) // 2 * 2].unflatten(0, (-1, 2))
        joined = (pairs[:, 0].unsqueeze(-1) + pairs[:, 1].unsqueeze(-3)).logsumexp(-2)
        steps = torch.cat([joined, steps[len(steps) // 2 * 2 :]])
    pyro.factor("y", (emissions[0].unsqueeze(-1) + steps[0]).logsumexp((0, 1)))


def entry(site, k=None):
    return lambda draws: draws[site] if k is None else draws[site][..., k]


PROGRAMS = {
    "eight_schools-eight_schools_noncentered": (
        eight_schools,
        lambda data: data,
        {"mu": entry("mu"), "tau": entry("tau")}
        | {f"theta[{k + 1}]": entry("theta", k) for k in range(8)},
    ),
    "kidiq-kidscore_momiq": (
        kidscore_momiq,
        lambda data: (data,),
        {"beta[1]": entry("beta", 0), "beta[2]": entry("beta", 1), "sigma": entry("sigma")},
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": (
        low_dim_gauss_mix,
        lambda data: (data,),
        {f"{s}[{k + 1}]": entry(s, k) for s in ("mu", "sigma") for k in (0, 1)}
        | {"theta": entry("theta")},
    ),
    "hmm_example-hmm_example": (
        hmm_example,
        lambda data: (data,),
        {f"{s}[{k + 1}]": entry(s, k) for s in ("mu", "theta1", "theta2") for k in (0, 1)},
    ),
}
"""Name: program, its arguments from the data, and reference parameters from draws."""
