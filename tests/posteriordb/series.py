"""Series: autoregression, moving average, hidden Markov models, an ODE, a Gaussian process."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from tests.posteriordb.priors import flat, ordered

__all__ = [
    "arma",
    "autoregression",
    "gp_regression",
    "hmm",
    "hmm_drive",
    "lotka_volterra",
    "solve",
]


def autoregression(y, K, **_):
    """K lags."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(K), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, K, 1)[:-1].flip(-1)  # y[t - 1], ..., y[t - K]
    with pyro.plate("time", len(y) - K):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def arma(y, **_):
    """ARMA(1, 1): errors solve e[t] = c[t] - theta e[t - 1], by doubling."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    before = torch.cat([mu.reshape(1), y[:-1]])
    errors, weight, step = y - mu - phi * before, -theta, 1
    while step < len(y):  # errors[t] + weight * errors[t - step]
        shifted = torch.nn.functional.pad(errors[:-step], (step, 0))
        errors, weight, step = errors + weight * shifted, weight.square(), 2 * step
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(y - errors, sigma), obs=y)


def hmm(y, **_):
    """Two states of normal emissions; any state may be the first."""
    theta = [pyro.sample(f"theta{k}", dist.Dirichlet(torch.ones(2))) for k in (1, 2)]
    prior = dist.Normal(torch.tensor([3.0, 10.0]), 1.0)
    mu = ordered("mu", prior, positive=True)
    _sequence(y, torch.stack(theta), dist.Normal(mu, 1.0))


def hmm_drive(u, v, alpha, **_):
    """Two states of two exponential emissions."""
    theta = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k])) for k in (0, 1)]
    prior = dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
    rates = [ordered(name, prior, positive=True) for name in ("phi", "lambda")]
    emission = dist.Exponential(torch.stack(rates, -1)).to_event(1)
    _sequence(torch.stack([u, v], -1), torch.stack(theta), emission)


def _sequence(y, transition, emission):
    """The first value from either state, the rest by a scan of logarithmic length."""
    start = dist.Categorical(torch.ones(2))
    pyro.sample("first", dist.MixtureSameFamily(start, emission), obs=y[0])
    state = emission.log_prob(y[0].unsqueeze(0) if y.ndim > 1 else y[0])
    pyro.sample("rest", dist.DiscreteHMM(state, transition.log(), emission), obs=y[1:])


def gp_regression(x, y, **_):
    """A squared exponential kernel; the noise variance is called sigma."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    kernel = alpha.square() * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho.square()))
    law = dist.MultivariateNormal(torch.zeros(len(x)), kernel + sigma * torch.eye(len(x)))
    pyro.sample("y", law, obs=y)


STEPS = 4  # of Runge-Kutta in a year


def solve(theta, start, years):
    """Lynx and hare: logarithms ``(years, 2)`` at the ends of the years, by Runge-Kutta steps."""
    level = torch.stack([theta[0], -theta[2]])
    slope = torch.stack([-theta[1], theta[3]])

    def change(z):
        return level + slope * z.exp().flip(-1)

    z, h, path = start.log(), 1 / STEPS, []
    for step in range(years * STEPS):
        k1 = change(z)
        k2 = change(z + h / 2 * k1)
        k3 = change(z + h / 2 * k2)
        k4 = change(z + h * k3)
        z = z + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        if (step + 1) % STEPS == 0:
            path.append(z)
    return torch.stack(path)


def lotka_volterra(y_init, y, **_):
    """Pelts of lynx and hare in twenty years, with errors of a factor."""
    # Rates in units of their prior's centre, on a scale where chains start within a factor of two:
    # far from it there is a second mode, without cycles.
    centre, spread = torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 1.0, 0.5, 1.0])
    scaled = pyro.sample("scaled", flat(4))
    relative = (scaled / 4).exp()
    prior = dist.Normal(1.0, spread).log_prob(relative)
    pyro.factor("rates", (prior + scaled / 4).sum())
    theta = pyro.deterministic("theta", centre * relative)
    raw = pyro.sample("raw", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    z_init = pyro.deterministic("z_init", 10.0 * raw.exp())
    sigma = pyro.sample("sigma", dist.LogNormal(-torch.ones(2), 1.0).to_event(1))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    with pyro.plate("year", len(y)):
        law = dist.LogNormal(solve(theta, z_init, len(y)), sigma)
        pyro.sample("y", law.to_event(1), obs=y)
