"""Power-scaling: a closed form, a planted conflict, a prior that rules; checks of programs."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.calibration import posterior_predictive_check
from bayesgen.inference import NUTS
from bayesgen.predictive import log_prior
from bayesgen.sensitivity import cumulative_distance, power_scaled_weights, sensitivity
from bayesgen.toys import UnitMixture, pretend
from tests.posteriordb.hierarchical import eight_schools

__all__: list[str] = []

ENGINE = NUTS(num_samples=1000, num_warmup=100, num_chains=2)
X = torch.tensor([2.0, 3.0, 2.5, 1.5], dtype=torch.float64)


def normal(x, prior_loc=0.0, prior_scale=2.0):
    loc = pyro.sample("loc", dist.Normal(prior_loc, prior_scale))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def exact(prior=1.0, likelihood=1.0, prior_loc=0.0, prior_scale=2.0):
    """Mean and standard deviation under powers of prior and likelihood."""
    precision = prior / prior_scale**2 + likelihood * len(X)
    mean = (prior * prior_loc / prior_scale**2 + likelihood * float(X.sum())) / precision
    return mean, precision**-0.5


@pytest.fixture(scope="module")
def fit():
    return ENGINE.run(normal, X, seed=0)


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.25, 2.0])
def test_weights_give_the_power_scaled_posterior(fit, alpha):
    loc = fit.draws["loc"].flatten()
    likelihood = fit.model.log_likelihood(fit.draws)["x"].sum(-1).flatten()
    for which, log_density in (("prior", log_prior(fit)["loc"]), ("likelihood", likelihood)):
        weights, k = power_scaled_weights(log_density.flatten(), alpha)
        mean, sd = exact(**{which: alpha})
        found = float((weights * loc).sum())
        spread = float((weights * (loc - found) ** 2).sum()) ** 0.5
        assert k < 0.7
        assert found == pytest.approx(mean, abs=5 * sd / 1000**0.5)
        assert spread == pytest.approx(sd, rel=0.1)


def distance_of_normals(first, second):
    """The cumulative Jensen-Shannon distance by integration on a grid."""

    def one(a, b):
        grid = np.linspace(a[0] - 8 * a[1], a[0] + 8 * a[1], 40_001)
        p, q = (
            torch.distributions.Normal(m, s).cdf(torch.tensor(grid)).numpy() for m, s in (a, b)
        )
        inside = p < 1 - 1e-3  # draws end at the largest one
        p, q, step = p[inside], q[inside], grid[1] - grid[0]
        middle = 0.5 * (p + q)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.nan_to_num(p * np.log2(p / middle)) + np.nan_to_num(q * np.log2(q / middle))
        return math.sqrt(max(0.0, terms.sum() * step) / ((p + q).sum() * step))

    flipped = [(-m, s) for m, s in (first, second)]
    return max(one(first, second), one(*flipped))


def test_the_distance_is_the_integral():
    levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    base = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    for mean, sd in ((0.1, 1.0), (0.5, 1.0), (0.0, 1.2)):
        log_ratio = torch.distributions.Normal(mean, sd).log_prob(base) + 0.5 * base**2
        weights = log_ratio.softmax(0)
        expected = distance_of_normals((0.0, 1.0), (mean, sd))
        assert cumulative_distance(base, weights) == pytest.approx(expected, rel=0.12)
    assert cumulative_distance(base, torch.full((4000,), 1 / 4000)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("prior_loc", "prior_scale", "diagnosis"),
    [
        (0.0, 10.0, ""),  # the data rule
        (10.0, 1.0, "prior-data conflict possible"),  # planted: far away and as sure as the data
        (2.3, 0.05, "strong prior or weak data"),
    ],
)
def test_diagnoses(prior_loc, prior_scale, diagnosis):
    fit = ENGINE.run(normal, (X, prior_loc, prior_scale), seed=1)
    found = sensitivity(fit)
    assert found.table.loc["loc", "diagnosis"] == diagnosis, str(found)
    assert found.sites == ("loc",)
    alpha = 1.01
    for which in ("prior", "likelihood"):
        ends = [
            exact(**{which: power}, prior_loc=prior_loc, prior_scale=prior_scale)
            for power in (1 / alpha, alpha)
        ]
        base = exact(prior_loc=prior_loc, prior_scale=prior_scale)
        expected = sum(distance_of_normals(base, end) for end in ends) / (2 * math.log2(alpha))
        assert found.table.loc["loc", which] == pytest.approx(expected, rel=0.25, abs=0.005)


def test_the_top_of_a_hierarchical_model_is_scaled():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)

    def centred(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    few = NUTS(num_samples=100, num_warmup=50, num_chains=1)
    found = sensitivity(few.run(centred, y, seed=0))
    assert found.sites == ("mu", "tau")
    assert "theta[3]" in found.table.index
    data = {"J": 4, "y": y, "sigma": torch.full((4,), 10.0).double()}
    schools = few.run(eight_schools, data, seed=0)
    chosen = sensitivity(schools)  # non-centred: its noise is nobody's prior
    assert chosen.sites == ("mu", "tau")
    assert "'raw' is left out" in str(chosen)
    assert schools.sensitivity(sites=["raw"]).sites == ("raw",)
    with pytest.raises(ValueError, match="no latent site 'sigma'; known are mu, tau, raw"):
        sensitivity(schools, sites=["sigma"])


def test_noise_of_groups_is_named_and_coefficients_stay():
    """By its graph alone, a non-centred effect of groups looks like coefficients."""
    group = torch.arange(12) % 3
    y = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)

    def grouped(y):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("group", 3):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((spread * raw)[group], 1.0), obs=y)

    found = sensitivity(NUTS(num_samples=100, num_warmup=50, num_chains=1).run(grouped, y, seed=0))
    assert set(found.sites) == {"spread", "raw"}
    assert "give sites=['spread']" in str(found)


def test_models_of_ours():
    x = rng.standard_normal((40, 1), rng.make_generator(0)) + 1.0
    weak = sensitivity(pretend(UnitMixture(1), x, num_draws=500))
    assert weak.table.loc["mean[0]", "diagnosis"] == ""
    model = UnitMixture(1, prior_scale=0.2)  # the mean is five prior standard deviations off
    strong = sensitivity(pretend(model, x, num_draws=500))
    assert strong.table.loc["mean[0]", "diagnosis"] == "prior-data conflict possible"
    assert "prior of weights, loc" in str(strong)


# ---------------------------------------------------------------- predictive checks of programs
def test_a_program_is_checked_against_its_data():
    generator = rng.make_generator(0)
    skewed = torch.empty(200, dtype=torch.float64).exponential_(generator=generator)
    engine = NUTS(num_samples=200, num_warmup=100, num_chains=2)

    def scaled(x, law):
        scale = pyro.sample("scale", dist.HalfNormal(3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(scale), obs=x)

    wrong = engine.run(scaled, (skewed, lambda s: dist.Normal(0.0, s)), seed=0)
    right = engine.run(scaled, (skewed, lambda s: dist.Exponential(1 / s)), seed=0)
    bad = posterior_predictive_check(wrong).p_values
    assert bad["skewness x"] < 0.02
    assert bad["min x"] < 0.02
    good = posterior_predictive_check(right).p_values
    assert min(good.values()) > 0.02
    own = posterior_predictive_check(right, {"range": lambda x: x.amax(-2) - x.amin(-2)})
    assert list(own.observed) == ["range x"]
    assert own.observed["range x"] == pytest.approx(float(skewed.max() - skewed.min()))
