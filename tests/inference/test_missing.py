"""Missing data of plain programs: their posterior is the posterior predictive, and no data."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from bayesgen import rng
from bayesgen.comparison import leave_one_out
from bayesgen.inference import NUTS, SVI, ManyChains, prior_predictive
from bayesgen.predictive import log_prior, replicated

__all__: list[str] = []

N, GAPS = 30, [2, 7, 20]
ENGINES = {
    "NUTS": NUTS(num_chains=4, num_samples=2000, num_warmup=500),
    "ManyChains": ManyChains(num_chains=64, num_samples=100, num_warmup=200),
    "SVI": SVI("AutoMultivariateNormal", num_steps=4000, num_samples=4000, learning_rate=0.02),
}
FEW = NUTS(num_chains=1, num_samples=100, num_warmup=100)


def data(scale=2.0, shape=(N,)):
    y = 3.0 + scale * rng.standard_normal(shape, rng.make_generator(0))
    y[GAPS] = math.nan
    return y


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y, obs_mask=~y.isnan())


@functools.cache
def fitted(engine):
    return ENGINES[engine].run(normal, data(), seed=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_imputed_values_have_the_posterior_predictive(engine):
    y = data()
    known = y[~y.isnan()]
    precision = 1 / 100 + len(known) / 4
    mean, variance = float(known.sum() / 4 / precision), 1 / precision
    fit = fitted(engine)
    assert {k: v.shape[2:] for k, v in fit.draws.items()} == {
        "mu": (),
        "y_unobserved": (3,),
        "y": (N,),
    }
    assert float(fit.draws["mu"].mean()) == pytest.approx(mean, abs=0.05)
    assert float(fit.draws["mu"].std()) == pytest.approx(variance**0.5, rel=0.08)
    new = fit.draws["y_unobserved"]
    assert new.mean((0, 1)).tolist() == pytest.approx([mean] * 3, abs=0.2)
    assert new.std((0, 1)).tolist() == pytest.approx([(variance + 4) ** 0.5] * 3, rel=0.08)
    together = torch.corrcoef(new.flatten(0, 1).T)[0, 1]
    assert float(together) == pytest.approx(variance / (variance + 4), abs=0.06)
    torch.testing.assert_close(fit.draws["y"][..., GAPS], new)
    assert bool((fit.draws["y"][..., ~y.isnan()] == known).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_missing_is_no_data(engine):
    y = data()
    known = y[~y.isnan()]
    fit = fitted(engine)
    assert fit.model.density.is_traced, fit.model.density.message
    groups, mu = fit.arviz, fit.draws["mu"]
    assert groups["posterior"]["y"].dims == ("chain", "draw", "data")
    assert list(groups["posterior"].coords["y_unobserved_dim_0"].values) == GAPS
    rows = [k for k in range(N) if k not in GAPS]
    for group in ("log_likelihood", "observed_data"):
        assert list(groups[group].data_vars) == ["y_observed"]
        assert list(groups[group].coords["y_observed_row"].values) == rows
    wanted = dist.Normal(mu.unsqueeze(-1), 2.0).log_prob(known)
    found = fit.model.log_likelihood(fit.draws)
    torch.testing.assert_close(found["y_observed"], wanted)
    assert len(leave_one_out(fit).elpd) == N - 3
    assert replicated(fit, 5)["y_observed"].shape == (fit.num_chains, 5, N - 3)
    assert set(log_prior(fit)) == {"mu"}
    assert ("mu", "y_unobserved") in fit.graph().edges
    assert not fit.attrs["messages"]


def test_draws_from_the_prior_have_the_same_shapes():
    found = prior_predictive(normal, data(), num_samples=4000)
    assert found.predictive["y_observed"].shape == (1, 4000, N - 3)
    assert found.observed["y_observed"].shape == (N - 3,)
    assert found.prior["y_unobserved"].shape == (1, 4000, 3)
    spread = found.prior["y_unobserved"].std()
    assert float(spread) == pytest.approx(104**0.5, rel=0.06)


def test_rows_of_several_columns():
    """Correlated columns, whole rows missing, and a code in place of NaN."""
    y = data(shape=(N, 2))
    y = y.nan_to_num(nan=-999.0)
    seen = y[:, 0] != -999.0
    tril = torch.tensor([[1.0, 0.0], [1.2, 0.9]], dtype=torch.float64)

    def program(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", N):
            law = dist.MultivariateNormal(mu, scale_tril=tril)
            pyro.sample("y", law, obs=y, obs_mask=seen)

    fit = NUTS(num_chains=4, num_samples=1000, num_warmup=500).run(program, y, seed=0)
    new = fit.draws["y_unobserved"]
    assert new.shape[2:] == (3, 2)
    centred = (new - fit.draws["mu"].unsqueeze(-2)).flatten(0, 2)
    torch.testing.assert_close(torch.cov(centred.T), tril @ tril.T, atol=0.2, rtol=0)
    assert fit.arviz["observed_data"]["y_observed"].shape == (N - 3, 2)
    wanted = dist.MultivariateNormal(fit.draws["mu"].unsqueeze(-2), scale_tril=tril)
    found = fit.model.log_likelihood(fit.draws)["y_observed"]
    torch.testing.assert_close(found, wanted.log_prob(y[seen]))


@pytest.mark.parametrize("engine", ["NUTS", "SVI"])
def test_a_mixture_with_missing_rows(engine):
    """Discrete latents are summed out row by row; a missing row is drawn from the mixture."""
    x = torch.tensor([-4.0] * 9 + [4.0] * 3 + [math.nan], dtype=torch.float64)

    def program(x):
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(8.0 * label - 4.0, 1.0), obs=x, obs_mask=~x.isnan())

    fit = ENGINES[engine].run(program, x, seed=0)
    weight = fit.draws["weight"]
    found = next(iter(fit.model.log_likelihood(fit.draws).values()))
    assert found.shape[-1] == 12
    torch.testing.assert_close(
        found[..., 0],
        (weight * dist.Normal(4.0, 1.0).log_prob(x[0]).exp()
         + (1 - weight) * dist.Normal(-4.0, 1.0).log_prob(x[0]).exp()).log(),
    )  # fmt: skip
    if engine == "NUTS":  # no normal guide has two modes
        assert float(weight.mean()) == pytest.approx(4 / 14, abs=0.02)  # Beta(4, 10)
        new = fit.draws["x_unobserved"][..., 0]
        label = fit.draws["label"][..., -1]
        assert bool(((new > 0) == (label > 0)).double().mean() > 0.99)


def test_labels_that_are_missing():
    """A missing coin is summed out, and the coins that are seen keep their density."""
    y = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    seen = torch.tensor([True, True, True, True, False])

    def program(y):
        chance = pyro.sample("chance", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Bernoulli(chance), obs=y, obs_mask=seen)

    fit = NUTS(num_chains=4, num_samples=1000, num_warmup=500).run(program, y, seed=0)
    chance = fit.draws["chance"]
    assert float(chance.mean()) == pytest.approx(5 / 8, abs=0.02)
    found = next(iter(fit.model.log_likelihood(fit.draws).values()))
    torch.testing.assert_close(found, dist.Bernoulli(chance.unsqueeze(-1)).log_prob(y[seen]))
    assert float(fit.draws["y"][..., -1].mean()) == pytest.approx(5 / 8, abs=0.03)


def test_a_support_with_latent_ends():
    """Every row has a latent with its own prior there, and all are proper."""
    y = torch.tensor([0.5, 0.9, 0.2, 0.0], dtype=torch.float64)
    seen = torch.tensor([True, True, True, False])

    def program(y):
        end = pyro.sample("end", dist.Uniform(0.9, 2.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Uniform(0.0, end), obs=y, obs_mask=seen)

    fit = NUTS(num_chains=4, num_samples=1000, num_warmup=500).run(program, y, seed=0)
    end = fit.draws["end"]  # density proportional to end^-3
    low, high = 0.9**-2, 2.0**-2
    assert float(end.mean()) == pytest.approx(2 * (0.9**-1 - 2.0**-1) / (low - high), abs=0.02)
    assert float((fit.draws["y"][..., -1] / end).mean()) == pytest.approx(0.5, abs=0.03)


def test_masked_rows_are_no_data():
    """``poutine.mask`` says the same of rows that are nobody's latents."""
    y = data().nan_to_num(nan=-999.0)
    seen = y != -999.0

    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    fit = FEW.run(program, y, seed=0)
    found = fit.model.log_likelihood(fit.draws)["y"]
    assert found.shape == (1, 100, N - 3)
    assert fit.arviz["observed_data"]["y"].shape == (N - 3,)
    assert len(leave_one_out(fit).elpd) == N - 3


def test_nothing_and_everything_missing():
    y = data()
    whole = FEW.run(normal, y.nan_to_num(nan=3.0), seed=0)
    assert set(whole.draws) == {"mu", "y"}
    assert whole.model.observed["y_observed"].shape == (N,)
    none = FEW.run(normal, torch.full((3,), math.nan), seed=0)
    assert none.draws["y_unobserved"].shape == (1, 100, 3)
