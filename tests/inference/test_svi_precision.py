"""SVI of networks and priors that were made under another default dtype than the engine's."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from bayesgen.inference import SVI
from bayesgen.rng import fork, make_generator

__all__: list[str] = []

SLOPE = torch.tensor([1.0, -2.0, 0.5])


class BayesianRegression(PyroModule):
    """That of Pyro's tutorial."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = PyroModule[nn.Linear](in_features, out_features)
        weight = dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2)
        self.linear.weight = PyroSample(weight)
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


class HalfBayesian(PyroModule):
    """One layer with priors, one that is optimised."""

    def __init__(self):
        super().__init__()
        self.inner = PyroModule[nn.Linear](3, 4)
        one = torch.tensor(1.0)
        self.inner.weight = PyroSample(dist.Normal(0.0, one).expand([4, 3]).to_event(2))
        self.inner.bias = PyroSample(dist.Normal(0.0, one).expand([4]).to_event(1))
        self.outer = PyroModule[nn.Linear](4, 1)

    def forward(self, x, y=None):
        mean = self.outer(torch.tanh(self.inner(x))).squeeze(-1)
        scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)


def rows(dtype):
    generator = make_generator(0)
    x = torch.randn((60, 3), generator=generator)
    return x.to(dtype), (x @ SLOPE + 3 + 0.5 * torch.randn(60, generator=generator)).to(dtype)


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoLowRankMultivariateNormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_pyros_tutorial(guide, dtype, given):
    with fork(make_generator(0)):
        model = BayesianRegression(3, 1)
    settings = {"learning_rate": 0.05, "num_steps": 1200, "num_samples": 200}
    fit = SVI(guide, dtype=dtype, **settings).run(model, rows(given), seed=0)
    assert {value.dtype for value in fit.draws.values()} == {dtype}
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    found = fit.draws["linear.weight"].mean((0, 1, 2)).float()
    assert bool(((found - SLOPE).abs() < 0.25).all())
    assert abs(float(fit.draws["linear.bias"].mean()) - 3) < 0.25


def test_samplers_that_take_a_size_apart_are_left_alone():
    """torch's Cauchy draws by ``new(size)``, which takes a plain tuple for data."""

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(5.0))
        with pyro.plate("data", 8):
            pyro.sample("x", dist.Normal(0.0, scale), obs=torch.ones(8))

    assert SVI(num_steps=48, num_samples=4).run(model).draws["scale"].shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layer_that_is_optimised_goes_along(dtype):
    with fork(make_generator(0)):
        model = HalfBayesian()
    before = model.outer.weight.detach().clone()
    settings = {"learning_rate": 0.05, "num_steps": 1200, "num_samples": 50}
    fit = SVI(dtype=dtype, **settings).run(model, rows(torch.float64), seed=0)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 20
    assert model.outer.weight.dtype == torch.float32
    assert torch.equal(model.outer.weight, before)
