"""SVI against closed forms: the gradient, the answer, and the ways to a guide."""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from bayesgen import rng
from bayesgen.inference import SVI
from bayesgen.inference.variational.setup import from_function, make_setup
from bayesgen.inference.variational.step import draw_noise, trace_pair
from bayesgen.models import GaussianMixture

__all__: list[str] = []

D64 = torch.float64


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, 0.5), obs=y)


def rows(count=20, seed=0):
    generator = rng.make_generator(seed)
    x = rng.standard_normal((count, 2), generator)
    x[:, 1] += 0.8 * x[:, 0]
    y = x @ torch.tensor([1.0, -0.5], dtype=D64) + 0.5 * rng.standard_normal(count, generator)
    return x, y


def exact(x, y):
    """Mean and covariance of the slope, and the log evidence."""
    precision = x.T @ x / 0.25 + torch.eye(2, dtype=D64) / 4.0
    covariance = precision.inverse()
    mean = covariance @ (x.T @ y / 0.25)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(len(y), dtype=D64), 0.25 * torch.eye(len(y), dtype=D64) + 4.0 * x @ x.T
    )
    return mean, covariance, float(marginal.log_prob(y))


def normal_guide(x, y):
    loc = pyro.param("loc", torch.tensor([0.3, 0.1]))
    scale = pyro.param("scale", torch.tensor([0.4, 0.2]), constraint=constraints.positive)
    pyro.sample("slope", dist.Normal(loc, scale).to_event(1))


def traced(model, guide, data, objective="trace", **settings):
    generator = rng.make_generator(1)
    source = from_function(model, data, {}, guide, settings.pop("batch_size", None))
    setup = make_setup(source, objective=objective, dtype=D64, start=None, generator=generator)
    found = trace_pair(setup.pair, setup.example(), is_fixed=True, generator=generator)
    return setup, found


def test_the_gradient_is_that_of_algebra():
    x, y = rows()
    setup, found = traced(line, normal_guide, (x, y))
    assert found.graph is not None, found.message
    normals, uniforms = draw_noise(found.noise, (), setup.pair, rng.make_generator(2))
    flat = setup.pair.start()
    value, gradient, _ = found.graph(flat, normals, uniforms, x, y)
    loc, raw = flat[:2], flat[2:]
    scale = raw.exp()
    slope = loc + scale * normals
    pull = x.T @ (y - x @ slope) / 0.25 - slope / 4.0
    # d/d loc and d/d log(scale) of log p(z, y) - log q(z), the draw's own score included
    torch.testing.assert_close(gradient[:2], pull, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient[2:], pull * scale * normals + 1.0, rtol=1e-10, atol=1e-10)
    half, two = torch.tensor(0.5, dtype=D64), torch.tensor(2.0, dtype=D64)
    likelihood = dist.Normal(x @ slope, half).log_prob(y).sum()
    joint = likelihood + dist.Normal(0 * two, two).log_prob(slope).sum()
    wanted = joint - dist.Normal(loc, scale).log_prob(slope).sum()
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "guide",
    [
        "AutoMultivariateNormal",
        AutoMultivariateNormal,
        partial(AutoMultivariateNormal, init_scale=0.3),
        AutoMultivariateNormal(line),
    ],
    ids=["name", "class", "partial", "instance"],
)
def test_a_conjugate_posterior_is_found(guide):
    x, y = rows()
    mean, covariance, evidence = exact(x, y)
    fit = SVI(guide=guide, learning_rate=0.02, num_samples=4000).run(line, (x, y), seed=3)
    assert fit.attrs["converged"]
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    slope = fit.draws["slope"][0]
    scale = covariance.diagonal().sqrt()
    # 0.05 of a posterior sd for the optimiser, four standard errors for 4,000 draws
    assert float(((slope.mean(0) - mean) / scale).abs().max()) < 0.05 + 4 / math.sqrt(4000)
    ratio = torch.linalg.solve(covariance, slope.T.cov())
    assert float((torch.linalg.eigvals(ratio).real - 1).abs().max()) < 0.15
    assert abs(fit.attrs["elbo"] - evidence) < 0.02 + 4 * fit.attrs["elbo_error"]
    assert fit.attrs["elbo"] < evidence + 4 * fit.attrs["elbo_error"]
    assert fit.attrs["k_hat"] < 0.7


def test_a_guide_that_cannot_fit_is_caught():
    """A mean-field guide of fixed small scale: the bound converges, and k-hat says no."""

    def narrow(x, y):
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("slope", dist.Normal(loc, 0.02).to_event(1))

    x, y = rows()
    fit = SVI(guide=narrow, learning_rate=0.02).run(line, (x, y))
    assert fit.attrs["converged"]
    assert fit.attrs["k_hat"] > 0.7
    assert [finding.code for finding in fit.verdict().failures] == ["k_hat"]


def test_an_instance_stays_as_it_was():
    x, y = rows()
    guide = AutoNormal(line)
    first = SVI(guide=guide, num_steps=100, num_samples=10).run(line, (x, y), seed=1)
    again = SVI(guide=guide, num_steps=100, num_samples=10).run(line, (x, y), seed=1)
    assert guide.prototype_trace is None
    assert torch.equal(first.draws["slope"], again.draws["slope"])


def test_a_mixture_of_ours():
    generator = rng.make_generator(0)
    x = rng.standard_normal((200, 2), generator)
    x += 6.0 * (torch.arange(200) % 4 == 0).double()[:, None]
    fit = SVI(learning_rate=0.03, num_steps=1000, num_samples=100).run(GaussianMixture(2), x)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    weights = fit.aligned.draws["weights"].mean((0, 1))
    assert abs(float(weights[1]) - 0.25) < 0.05
    assert bool(fit.log_prob(x).isfinite().all())
    assert len(fit.predict(x)) == 200
    assert fit.arviz["log_likelihood"]["x"].shape == (1, 100, 200)


def test_a_flow_as_a_guide():
    if importlib.util.find_spec("zuko") is None:
        pytest.skip("needs the extra 'flows'")
    from bayesgen.inference.variational.flow_guide import FlowGuide

    x, y = rows()
    mean, covariance, evidence = exact(x, y)
    guide = partial(FlowGuide, kind="MAF", hidden_features=(8,))
    fit = SVI(guide=guide, learning_rate=0.01, num_steps=2000).run(line, (x, y), seed=3)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert evidence - 0.2 < fit.attrs["elbo"] < evidence + 4 * fit.attrs["elbo_error"]
    with pytest.raises(ValueError, match="kind='magic', but it must be one of NSF"):
        FlowGuide(line, kind="magic")


def test_an_amortised_guide_trains_networks():
    generator = rng.make_generator(0)
    x = rng.standard_normal((64, 3), generator).float()

    class Coder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = torch.nn.Linear(3, 2), torch.nn.Linear(1, 3)

        def model(self, x, num_rows=None):
            pyro.module("coder", self)
            with pyro.plate("data", num_rows or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

        def guide(self, x, num_rows=None):
            with pyro.plate("data", num_rows or len(x), subsample=x):
                loc, raw = self.encode(x).split(1, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    with rng.fork(generator):
        coder = Coder()
    before = coder.decode.bias.detach().clone()
    engine = SVI(guide=coder.guide, batch_size=16, num_steps=480, dtype=torch.float32)
    fit = engine.run(coder.model, x + 2.0)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert torch.equal(coder.decode.bias, before)  # the user's module is left alone
    (bias,) = [v for k, v in fit.draws.items() if k.endswith("decode.bias")]
    assert float((bias[0, 0] - 2.0).abs().max()) < 0.6  # a point estimate is one draw
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]


def test_without_latents_the_draw_is_the_parameters_as_the_program_sees_them():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    _, x = rows()
    fit = SVI(learning_rate=0.05, num_steps=2000).run(model, x, seed=0)
    assert torch.allclose(fit.draws["scale"], x.square().mean().sqrt(), rtol=1e-3)
