"""Autoguides against a conjugate posterior: every family that contains it, or its part of it."""

from __future__ import annotations

import importlib.util
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoStructured

from bayesgen import rng
from bayesgen.inference import SVI

__all__: list[str] = []

D64 = torch.float64


def rows():
    """Two predictors with correlation, so that the posterior has it as well."""
    generator = rng.make_generator(0)
    x = rng.standard_normal((40, 2), generator)
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    y = x @ torch.tensor([1.0, -0.5], dtype=D64) + 0.5 * rng.standard_normal(40, generator)
    return x, y


def line(x, y):
    first = pyro.sample("first", dist.Normal(0.0, 2.0))
    second = pyro.sample("second", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(first * x[:, 0] + second * x[:, 1], 0.5), obs=y)


def exact(x):
    """Covariance of the two slopes; their mean follows from it and the data."""
    return (x.T @ x / 0.25 + torch.eye(2, dtype=D64) / 4.0).inverse()


SETTINGS = {"num_steps": 9600, "learning_rate": 0.02, "num_samples": 4000, "num_particles": 4}
FULL = {
    "multivariate": "AutoMultivariateNormal",
    "low rank": partial(AutoLowRankMultivariateNormal, rank=1),
    "laplace": "AutoLaplaceApproximation",
    "structured": partial(
        AutoStructured,
        conditionals={"first": "normal", "second": "normal"},
        dependencies={"second": {"first": "linear"}},
    ),
    "autoregressive flow": "AutoIAFNormal",
}
MEAN_FIELD = {"normal": "AutoNormal", "diagonal": "AutoDiagonalNormal"}


def found(guide, **settings):
    x, y = rows()
    fit = SVI(guide=guide, **(SETTINGS | settings)).run(line, (x, y), seed=0)
    draws = torch.stack([fit.draws["first"][0], fit.draws["second"][0]], -1).double()
    covariance = exact(x)
    return draws, covariance @ (x.T @ y / 0.25), covariance, fit


def check_mean(draws, mean, covariance, error=0.12):
    """In posterior sds; the Monte Carlo error of 4,000 draws is 0.016."""
    off = (draws.mean(0) - mean) / covariance.diagonal().sqrt()
    assert float(off.abs().max()) < error, off


@pytest.mark.parametrize("name", FULL)
def test_families_that_contain_the_posterior_find_it(name):
    draws, mean, covariance, fit = found(FULL[name])
    check_mean(draws, mean, covariance)
    sd = covariance.diagonal().sqrt()
    torch.testing.assert_close(draws.std(0) / sd, torch.ones(2, dtype=D64), atol=0.08, rtol=0.0)
    wanted = float(covariance[0, 1] / (sd[0] * sd[1]))
    assert abs(float(torch.corrcoef(draws.T)[0, 1]) - wanted) < 0.06
    assert fit.attrs["k_hat"] < (0.7 if name == "autoregressive flow" else 0.5)


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_mean_fields_find_the_mean_and_the_conditional_scale(name):
    """The best independent normal has the precision's diagonal: too narrow, by a formula."""
    draws, mean, covariance, _ = found(MEAN_FIELD[name])
    check_mean(draws, mean, covariance)
    wanted = covariance.inverse().diagonal().rsqrt()
    assert float((wanted / covariance.diagonal().sqrt()).max()) < 0.75  # far from the margins
    torch.testing.assert_close(
        draws.std(0) / wanted, torch.ones(2, dtype=D64), atol=0.08, rtol=0.0
    )
    assert abs(float(torch.corrcoef(draws.T)[0, 1])) < 0.06


def test_a_point_is_the_mode():
    x, y = rows()
    fit = SVI(guide="AutoDelta", **SETTINGS).run(line, (x, y), seed=0)
    point = torch.stack([fit.draws["first"], fit.draws["second"]], -1).reshape(2)
    mean = exact(x) @ (x.T @ y / 0.25)
    torch.testing.assert_close(point, mean, atol=1e-4, rtol=0.0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="needs the extra 'flows'")
def test_a_flow_finds_it():
    """At the others' rate its last step would be 0.2 posterior sds off."""
    draws, mean, covariance, fit = found("FlowGuide", learning_rate=0.003)
    check_mean(draws, mean, covariance)
    ratio = draws.std(0) / covariance.diagonal().sqrt()
    torch.testing.assert_close(ratio, torch.ones(2, dtype=D64), atol=0.1, rtol=0.0)
    assert fit.attrs["k_hat"] < 0.7


def test_several_particles_of_a_low_rank_guide_are_quiet(capfd):
    """Torch warned at every step that it copies one particle after the other."""
    SVI(guide=FULL["low rank"], num_steps=48, num_particles=2).run(line, rows(), seed=0)
    assert "BatchedFallback" not in capfd.readouterr().err
