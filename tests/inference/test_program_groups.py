"""Plain programs: data replicated from draws, the prior, and all groups of ArviZ."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.diagnostics import to_arviz
from bayesgen.inference import NUTS, SVI, VB
from bayesgen.predictive import log_prior, replicated, sample_prior
from bayesgen.replay import log_priors, simulate
from tests.posteriordb.hierarchical import eight_schools

__all__: list[str] = []

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
ENGINE = NUTS(num_samples=100, num_warmup=50, num_chains=2)


@pytest.fixture(scope="module")
def schools():
    return ENGINE.run(eight_schools, {"J": 8, "y": Y, "sigma": SIGMA}, seed=0)


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-4.0, 4.0]), 1.0))
    with pyro.plate("data", len(x)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[label], 1.0), obs=x)


def test_every_group_of_a_plain_program(schools):
    data = to_arviz(schools, posterior_predictive=20, prior=30, seed=3)
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert data["posterior_predictive"]["y"].shape == (2, 20, 8)
    assert data["prior"]["theta"].shape == (1, 30, 8)
    assert data["prior_predictive"]["y"].dims == ("chain", "draw", "school")
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    assert "lp" in data["sample_stats"]
    again = to_arviz(schools, posterior_predictive=20, prior=30, seed=3)
    for group in ("posterior_predictive", "prior_predictive"):
        np.testing.assert_array_equal(data[group]["y"], again[group]["y"])


def test_replicated_data_have_the_moments_of_the_program(schools):
    theta = torch.zeros(4000, 8, dtype=torch.float64)
    draws = {"mu": theta[:, 0], "tau": theta[:, 0] + 1.0, "raw": theta + 3.0}
    new = schools.model.replicate(draws, generator=rng.make_generator(0))["y"]
    error = SIGMA / 4000**0.5
    assert bool(((new.mean(0) - 3.0).abs() < 4 * error).all())
    assert bool(((new.std(0) / SIGMA - 1).abs() < 4 / 8000**0.5).all())
    correlation = torch.corrcoef(new.T)
    assert float((correlation - torch.eye(8)).abs().max()) < 0.08  # noise of its own everywhere


def test_a_mixture_draws_its_labels_anew():
    x = torch.cat([torch.full((30,), -4.0), torch.full((10,), 4.0)]).double()
    fit = NUTS(num_samples=5, num_warmup=5, num_chains=1).run(mixture, x, seed=0)
    draws = {"weights": torch.tensor([[0.75, 0.25]]), "loc": torch.tensor([[-4.0, 4.0]])}
    many = {name: value.double().repeat(200, 1) for name, value in draws.items()}
    copies = fit.model.replicate(many, generator=rng.make_generator(0))["x"]
    assert float((copies < 0).double().mean()) == pytest.approx(0.75, abs=0.02)
    assert bool(((copies < 0).sum(0) < 190).all())  # a row is not tied to its own component
    assert replicated(fit, 3)["x"].shape == (1, 3, 40)
    assert to_arviz(fit)["log_likelihood"]["x"].dims == ("chain", "draw", "data")


LAWS = {
    "normal": lambda: dist.Normal(1.0, 2.0),
    "normal on a plate": lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1),
    "log-normal": lambda: dist.LogNormal(0.0, 0.5),
    "half-normal": lambda: dist.HalfNormal(2.0),
    "exponential": lambda: dist.Exponential(2.0),
    "gamma": lambda: dist.Gamma(2.0, 3.0),
    "inverse gamma": lambda: dist.InverseGamma(6.0, 3.0),
    "beta": lambda: dist.Beta(0.5, 2.0),
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([0.2, 1.0, 3.0])),
    "student": lambda: dist.StudentT(8.0, 1.0, 2.0),
    "laplace": lambda: dist.Laplace(1.0, 2.0),
    "weibull": lambda: dist.Weibull(2.0, 1.5),
    "uniform": lambda: dist.Uniform(-1.0, 3.0),
    "poisson": lambda: dist.Poisson(3.0),
    "binomial": lambda: dist.Binomial(10, 0.3),
    "bernoulli": lambda: dist.Bernoulli(0.3),
    "negative binomial": lambda: dist.NegativeBinomial(4.0, 0.4),
    "categorical": lambda: dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
    "multivariate normal": lambda: dist.MultivariateNormal(
        torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    ),
    "correlation (one by one)": lambda: dist.LKJCholesky(3, 2.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_of_a_program_are_those_of_its_distributions(name):
    """Each family has the moments of torch's own sampler, which does not run under vmap."""

    def program():
        pyro.sample("x", LAWS[name]())

    count = 300 if "one by one" in name else 4000
    found = simulate(program, {}, ["x"], num_runs=count, generator=rng.make_generator(1))["x"]
    with rng.fork(rng.make_generator(2)):
        own = LAWS[name]().sample((20_000,))
    found, own = found.double().reshape(count, -1), own.double().reshape(len(own), -1)
    for power in (1, 2):
        a, b = found**power, own**power
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt().clamp_min(1e-12)
        assert float(((a.mean(0) - b.mean(0)) / error).abs().max()) < 4.5


def test_observed_without_a_plate_get_noise_each():
    def program():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(5))

    draws = {"loc": torch.zeros(100)}
    found = simulate(program, draws, ["y"], num_runs=100, generator=rng.make_generator(0))["y"]
    assert found.shape == (100, 5)
    assert len(found.unique()) == 500


def test_a_program_that_vmap_cannot_follow_runs_one_by_one():
    def branching():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sign = 1.0 if float(loc) > 0 else -1.0
        pyro.sample("y", dist.Normal(10 * sign, 0.1), obs=torch.tensor(0.0))

    found = simulate(branching, {}, ["loc", "y"], num_runs=50, generator=rng.make_generator(0))
    assert bool((found["y"].sign() == found["loc"].sign()).all())


def test_the_prior_s_log_density(schools):
    draws = schools.draws
    found = log_prior(schools)
    expected = dist.Normal(0.0, 5.0).log_prob(draws["mu"])
    torch.testing.assert_close(found["mu"], expected)
    expected = dist.Normal(0.0, 1.0).log_prob(draws["raw"]).sum(-1)
    torch.testing.assert_close(found["raw"], expected)
    assert set(found) == {"mu", "tau", "raw"}


def test_priors_that_have_no_draws_are_refused(schools):
    def flat(x):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def weighed():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("push", loc)

    with pytest.raises(ValueError, match=r"site 'loc' has a flat prior") as caught:
        ENGINE.run(flat, torch.tensor(1.0), seed=0).prior_predictive()
    assert str(caught.value) == (
        "site 'loc' has a flat prior (ImproperUniform), which cannot be drawn from. Give a proper "
        "one: with_priors(program, {'loc': ...})."
    )
    with pytest.raises(ValueError, match="factor 'push' weighs"):
        simulate(weighed, {}, ["loc"], num_runs=2, generator=rng.make_generator(0))
    with pytest.raises(ValueError, match="lack the site 'loc'"):
        log_priors(weighed, {"other": torch.zeros(3)})


def test_labels_come_from_frames_and_from_arguments_named_like_plates():
    def regression(frame, y, school):
        x = torch.tensor(frame.to_numpy())
        with pyro.plate("column", x.shape[1]):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("school", len(y)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    frame = pd.DataFrame({"height": [0.0, 1.0, 2.0], "width": [1.0, 0.0, 1.0]})
    data = {"frame": frame, "y": torch.zeros(3).double(), "school": ["A", "B", "C"]}
    few = NUTS(num_chains=1, num_samples=5, num_warmup=5)
    fit = few.run(regression, data, seed=0)
    assert list(fit.arviz["posterior"]["slope"].coords["column"].values) == ["height", "width"]
    assert list(fit.arviz["observed_data"]["y"].coords["school"].values) == ["A", "B", "C"]
    named = to_arviz(fit, coords={"school": ["a", "b", "c"]})
    assert list(named["observed_data"]["y"].coords["school"].values) == ["a", "b", "c"]

    def rows(table):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(table)):
            values = torch.tensor(table.to_numpy())
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=values)

    fit = few.run(rows, (frame,), seed=0)
    assert list(fit.arviz["observed_data"]["x"].coords["x_dim_1"].values) == ["height", "width"]


def test_frames_that_differ_in_the_middle_have_another_fingerprint():
    from bayesgen.inference.programs.program import Arguments

    long = pd.DataFrame({"a": np.zeros(1000)})
    other = long.copy()
    other.loc[500, "a"] = 1.0
    prints = {Arguments((frame,), {}).fingerprint() for frame in (long, other, long.copy())}
    assert len(prints) == 2


def test_models_of_ours_have_a_prior_too():
    from bayesgen.models import GaussianMixture

    x = rng.standard_normal((30, 2), rng.make_generator(0))
    fit = VB(num_starts=1, moves=False, num_samples=20).run(GaussianMixture(2), x, seed=0)
    found = sample_prior(fit.model, fit.data, num_samples=40)
    assert found.predictive["x"].shape == (1, 40, 30, 2)
    assert found.prior["loc"].shape == (1, 40, 2, 2)
    density = log_prior(fit)
    assert {"weights", "loc", "scale_tril"} <= set(density)
    wanted = dist.Dirichlet(
        torch.full((2,), fit.model.all_priors["weights"].concentration).double()
    )
    torch.testing.assert_close(density["weights"], wanted.log_prob(fit.draws["weights"]))


def test_every_group_of_a_variational_fit():
    """One chain, Pareto k-hat in place of R-hat."""
    engine = SVI("AutoMultivariateNormal", num_steps=500, num_samples=200, learning_rate=0.05)

    def schools(y, sigma, school):
        eight_schools(y, sigma)

    given = {"y": Y, "sigma": SIGMA, "school": list("ABCDEFGH")}
    fit = engine.run(schools, given, seed=0)
    data = to_arviz(fit, posterior_predictive=20, prior=10)
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["log_likelihood"]["y"].shape == (1, 200, 8)
    assert data["posterior_predictive"]["y"].shape == (1, 20, 8)
    assert data["prior_predictive"]["y"].shape == (1, 10, 8)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    assert list(data["posterior"].coords["school"].values) == list("ABCDEFGH")
    text = str(fit.verdict())
    assert "k-hat" in text
    assert "R-hat" not in text
    assert ("theta", "y") in fit.graph().edges
    assert set(log_prior(fit)) == {"mu", "tau", "raw"}
