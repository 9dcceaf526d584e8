"""Networks from ``pyro.nn``: traced, in one precision, equal to the program written by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from bayesgen import rng
from bayesgen.inference import NUTS, ManyChains
from bayesgen.inference.programs.trace import trace

__all__: list[str] = []

NARROW = torch.float32


class Regression(PyroModule):
    """Pyro's tutorial, with priors made outside the program and in single precision."""

    def __init__(self, num_columns):
        super().__init__()
        with rng.fork(rng.make_generator(0)):
            self.linear = PyroModule[nn.Linear](num_columns, 1)
        one = torch.ones((), dtype=NARROW)
        self.linear.weight = PyroSample(
            dist.Normal(0.1 * one, one).expand([1, num_columns]).to_event(2)
        )
        self.linear.bias = PyroSample(dist.Normal(0.1 * one, 10 * one).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        loc = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, sigma), obs=y)
        return loc


def by_hand(x, y):
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    tenth = float(torch.tensor(0.1, dtype=NARROW))
    weight = pyro.sample("linear.weight", dist.Normal(tenth, 1.0).expand(x[:1].shape).to_event(2))
    bias = pyro.sample("linear.bias", dist.Normal(tenth, 10.0).expand([1]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight[0] + bias, sigma), obs=y)


def table():
    generator = rng.make_generator(0)
    x = rng.standard_normal((30, 3), generator)
    return x, x[:, 0] - 0.5 * x[:, 1] + 0.3 * rng.standard_normal(30, generator)


def test_a_network_of_samples_is_the_program_by_hand():
    x, y = table()
    model = Regression(3)
    densities = [
        trace(run, generator=rng.make_generator(0))
        for run in (lambda: model(x, y), lambda: by_hand(x, y))
    ]
    assert all(density.is_traced for density in densities), densities[0].message
    points = rng.standard_normal((4, 5), rng.make_generator(1))
    found, wanted = (density.batched(4)(points) for density in densities)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-6)  # log(10) in single precision


@pytest.mark.parametrize("engine", [NUTS(num_chains=2), ManyChains(num_chains=64, num_samples=60)])
def test_a_network_of_samples_runs_in_cpp(engine):
    x, y = table()
    fit = engine.run(Regression(3), (x, y), seed=0)
    assert fit.attrs["speed"].startswith("compiled to C++"), fit.attrs["speed"]
    exact = torch.linalg.lstsq(torch.cat((x, torch.ones(30, 1)), 1), y).solution
    draws = fit.draws["linear.weight"].flatten(0, 1)[:, 0]
    spread = draws.std(0)
    # the prior is wide beside the data: the posterior mean is the least-squares solution's
    assert bool(((draws.mean(0) - exact[:3]).abs() < 0.3 * spread).all())


def test_weights_of_a_network_made_elsewhere_are_used_in_the_engines_precision():
    x, y = table()
    with rng.fork(rng.make_generator(0)):
        network, wide = (nn.Linear(3, 4, dtype=d) for d in (NARROW, torch.float64))

    def program(x, y):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.relu(network(x)) @ weights, 0.5), obs=y)

    density = trace(lambda: program(x, y), generator=rng.make_generator(0))
    assert density.is_traced, density.message
    wide.load_state_dict(network.state_dict())
    network = wide
    wanted = trace(lambda: program(x, y), generator=rng.make_generator(0))
    points = rng.standard_normal((4, 4), rng.make_generator(1))
    torch.testing.assert_close(density.batched(4)(points), wanted.batched(4)(points))
