"""Laplace: exact where the posterior is normal, Pyro's elsewhere, words where there is no mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation

from bayesgen import rng
from bayesgen.inference import NUTS, Laplace
from bayesgen.inference.programs import curvature
from bayesgen.inference.programs.curvature import bend, hessian, peak_of
from bayesgen.inference.programs.sites import quietly
from bayesgen.inference.programs.trace import trace
from bayesgen.psis import smooth

__all__: list[str] = []


def normal_numbers(*shape, seed=0):
    return rng.standard_normal(shape, rng.make_generator(seed))


def density_of(program, *data):
    return trace(lambda: program(*data), generator=rng.make_generator(0))


def mode_of(fit):
    mode = fit.attrs["mode"]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in mode.items()}


# ---------------------------------------------------------------- exact
def linear(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, 0.7), obs=y)


@pytest.fixture(scope="module")
def rows():
    x = normal_numbers(40, 4) * torch.tensor([1.0, 30.0, 0.01, 1.0])
    x[:, 3] += 5.0 * x[:, 0]  # nearly collinear
    return x, x @ torch.tensor([1.0, -0.1, 2.0, 0.5]).double() + 0.7 * normal_numbers(40, seed=1)


def exact(x, y):
    precision = x.T @ x / 0.49 + torch.eye(4).double() / 9.0
    covariance = torch.linalg.inv(precision)
    marginal = 9.0 * x @ x.T + 0.49 * torch.eye(len(y)).double()
    law = torch.distributions.MultivariateNormal(torch.zeros_like(y), marginal)
    return covariance @ (x.T @ y) / 0.49, covariance, float(law.log_prob(y))


def test_a_linear_gaussian_program_is_solved_exactly(rows):
    mean, covariance, evidence = exact(*rows)
    fit = Laplace(num_samples=100).run(linear, rows, seed=0)
    torch.testing.assert_close(mode_of(fit)["slope"], mean, rtol=1e-10, atol=1e-10)
    assert abs(fit.attrs["log_evidence"] - evidence) < 1e-10 * abs(evidence)
    density = density_of(linear, *rows)
    peak = peak_of(mean, 0.0, bend(hessian(density, mean)))
    torch.testing.assert_close(peak.factor @ peak.factor.T, covariance, rtol=1e-10, atol=1e-10)
    # all weights are alike, and the draws are those of that law
    assert fit.attrs["weight_ess"] == pytest.approx(100, rel=1e-6)
    assert len(fit.attrs["modes"]) == 1
    assert fit.attrs["modes"][0]["starts"] == 8
    assert fit.verdict()


def test_draws_have_the_posteriors_moments(rows):
    mean, covariance, _ = exact(*rows)
    draws = Laplace(num_samples=20_000).run(linear, rows, seed=1).draws["slope"][0]
    scale = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / scale).abs().max()) < 4 / math.sqrt(20_000)
    off = (draws.T.cov() - covariance) / scale / scale[:, None]
    assert float(off.abs().max()) < 0.06


# ---------------------------------------------------------------- beside Pyro
def logistic(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=scale * (x @ slope)), obs=y)


@pytest.fixture(scope="module")
def labels():
    x = normal_numbers(200, 3)
    return x, (x[:, 0] - x[:, 1] + normal_numbers(200, seed=2) > 0).double()


def test_mode_and_covariance_are_those_of_pyro(labels):
    fit = Laplace().run(logistic, labels, seed=0)
    density = density_of(logistic, *labels)
    mode = density.unconstrain(mode_of(fit))
    leaf = mode.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(density.pyro_log_prob(leaf), leaf)
    assert float(slope.abs().max()) < 1e-9
    with rng.fork(rng.make_generator(0)), quietly(torch.float64):
        guide = AutoLaplaceApproximation(logistic)
        guide(*labels)
        guide.loc = torch.nn.Parameter(mode.clone())
        final = guide.laplace_approximation(*labels)
        law = final.get_posterior()
        wanted = law.covariance_matrix.detach()
    pyro.clear_param_store()
    torch.testing.assert_close(law.mean.detach(), mode)
    peak = peak_of(mode, 0.0, bend(hessian(density, mode)))
    torch.testing.assert_close(peak.factor @ peak.factor.T, wanted, rtol=1e-8, atol=1e-12)


def test_weighted_draws_agree_with_nuts(labels):
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)

    fit = Laplace(num_samples=4000).run(model, labels, seed=0)
    wanted = NUTS(num_samples=1000).run(model, labels, seed=0).draws["slope"].flatten(0, 1)
    raw = torch.softmax(fit.sample_stats["log_weight"][0], 0)
    assert fit.attrs["weight_ess"] == pytest.approx(float(1 / raw.square().sum()))
    weights = smooth(fit.sample_stats["log_weight"][0])[0].exp()
    off = (weights @ fit.draws["slope"][0] - wanted.mean(0)) / wanted.std(0)
    error = (1 / fit.attrs["weight_ess"] + 1 / 1000) ** 0.5
    assert float(off.abs().max()) < 4 * error
    assert fit.attrs["k_hat"] < 0.7
    assert fit.verdict()


# ---------------------------------------------------------------- Hessians
def test_differences_stand_in_for_a_hessian_that_cannot_be_had(labels, monkeypatch):
    density = density_of(logistic, *labels)
    point = normal_numbers(4)
    wanted = hessian(density, point)
    for broken in (lambda *_, **__: lambda v: v.diag() * 0, raising):
        monkeypatch.setattr(curvature.torch.func, "jacrev", broken)
        torch.testing.assert_close(hessian(density, point), wanted, rtol=1e-6, atol=1e-6)


def raising(*_, **__):
    raise NotImplementedError("no second derivative")


def test_without_a_trace_the_answer_is_the_same(labels):
    traced = Laplace(num_starts=2).run(logistic, labels, seed=0)
    by_pyro = Laplace(num_starts=2, trace=False).run(logistic, labels, seed=0)
    assert not by_pyro.attrs["is_traced"]
    gap = by_pyro.attrs["log_evidence"] - traced.attrs["log_evidence"]
    assert abs(gap) < 1e-6


# ---------------------------------------------------------------- no mode
def neal():
    v = pyro.sample("v", dist.Normal(torch.tensor(0.0).double(), 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(v.new_zeros(9), (0.5 * v).exp()))


def centred(effect, error):
    mu = pyro.sample("mu", dist.Normal(effect.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(effect.new_tensor(5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


SCHOOLS = (
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]).double(),
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]).double(),
)


def test_a_funnel_is_refused_in_words():
    with pytest.raises(ValueError, match="funnel") as caught:
        Laplace().run(neal, None, seed=0)
    assert "'x'" in str(caught.value)
    assert "'v'" in str(caught.value)


def test_a_scale_that_goes_to_zero_is_refused_by_name():
    with pytest.raises(ValueError, match=r"funnel.*non-centred") as caught:
        Laplace().run(centred, SCHOOLS, seed=0)
    assert "'tau'" in str(caught.value)


def test_a_corner_of_the_density_is_refused_in_words():
    def program():
        pyro.sample("x", dist.Laplace(0.0, 1.0))

    with pytest.raises(ValueError, match="no smooth mode there.*the slope jumps"):
        Laplace().run(program, seed=0)


def test_a_direction_of_which_nothing_is_known_is_named():
    def model(y):
        with pyro.poutine.mask(mask=False):
            left = pyro.sample("left", dist.Normal(y.new_tensor(0.0), 1.0))
            right = pyro.sample("right", dist.Normal(y.new_tensor(0.0), 1.0))
        known = pyro.sample("known", dist.Normal(y.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(left - right + known, 1.0), obs=y)

    with pytest.raises(ValueError, match="does not fall along 'left', 'right'|'right', 'left'"):
        Laplace().run(model, normal_numbers(20), seed=0)


# ---------------------------------------------------------------- programs of every kind
def test_discrete_latents_are_summed_out_and_drawn_back():
    parts = normal_numbers(30) - 6.0, normal_numbers(10, seed=3) + 6.0
    y = torch.cat(parts)

    def model(y):
        share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), 2.0))
        with pyro.plate("groups", 2):
            loc = pyro.sample("loc", dist.Normal(y.new_tensor([-6.0, 6.0]), 1.0))
        with pyro.plate("data", len(y)):
            group = pyro.sample("group", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(loc[group.long()], 1.0), obs=y)

    fit = Laplace(num_samples=400).run(model, y, seed=0)
    assert fit.draws["group"].shape == (1, 400, 40)
    assert bool((fit.draws["group"][..., :30] == 0).all())
    assert abs(float(fit.draws["share"].mean()) - 12 / 44) < 0.03
    # as if the labels were known: a ratio of beta functions, and two normal marginals
    exact = sum(map(math.lgamma, (12, 32, 4))) - math.lgamma(44)
    for part, centre in zip(parts, (-6.0, 6.0), strict=True):
        spread = torch.eye(len(part)).double() + 1.0
        law = torch.distributions.MultivariateNormal(torch.full_like(part, centre), spread)
        exact += float(law.log_prob(part))
    assert fit.attrs["log_evidence"] == pytest.approx(exact, abs=0.05)


def test_flat_priors_are_said_to_have_no_evidence():
    y = 3.0 + 2.0 * normal_numbers(50)

    def model(y):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    fit = Laplace().run(model, y, seed=0)
    assert abs(fit.attrs["mode"]["loc"] - float(y.mean())) < 1e-8
    # of log scale, under the flat prior of the scale: sum of squares over n - 1
    wanted = float((y - y.mean()).square().sum() / 49) ** 0.5
    assert abs(fit.attrs["mode"]["scale"] - wanted) < 1e-8
    assert any("flat priors ('loc', 'scale')" in text for text in fit.attrs["messages"])


def test_modes_that_differ_are_reported():
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0).double(), 100.0))
        low = dist.Normal(-5.0, 1.0).log_prob(x) + math.log(0.2)
        high = dist.Normal(5.0, 1.0).log_prob(x) + math.log(0.8)
        pyro.factor("two", torch.logaddexp(low, high))

    fit = Laplace(num_starts=16).run(model, None, seed=0)
    evidences = [mode["log_evidence"] for mode in fit.attrs["modes"]]
    assert len(evidences) == 2
    assert evidences[0] - evidences[1] == pytest.approx(math.log(4.0), abs=0.01)
    assert float(fit.draws["x"].mean()) == pytest.approx(5.0, abs=0.2)
    assert any("2 modes differ" in text for text in fit.attrs["messages"])
    assert not fit.verdict()
    assert "modes" in {finding.code for finding in fit.verdict().failures}


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"num_starts": 0}, "num_starts=0"), ({"tolerance": -1.0}, "tolerance")],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Laplace(**settings)
