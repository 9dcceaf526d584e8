"""Calibration of engines on programs: right ones pass, a posterior 20 % too narrow is caught."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen.distributions import NormalInverseWishart
from bayesgen.inference import NUTS, SVI, VB, calibrate_engine
from bayesgen.models import GaussianMixture
from bayesgen.priors import SymmetricDirichlet

__all__: list[str] = []

FEW = NUTS(num_samples=100, num_warmup=50, num_chains=2)


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.5), obs=x)


def regression(x, y):
    """Sites of every kind: an event, a plate, a computed value."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(y)):
        mean = pyro.deterministic("mean", (slope * x).sum(-1))
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


class Scaled:
    """An engine whose draws are too close to their mean, or too far."""

    def __init__(self, engine, factor):
        self.engine, self.factor = engine, factor

    def run(self, model, data=None, *, seed=0):
        fit = self.engine.run(model, data, seed=seed)
        draws = {}
        for name, value in fit.draws.items():
            mean = value.mean((0, 1))
            draws[name] = mean + self.factor * (value - mean)
        return dataclasses.replace(fit, draws=draws)


def test_nuts_passes_and_a_narrow_posterior_is_caught():
    x = torch.zeros(6, dtype=torch.float64)
    good = calibrate_engine(conjugate, x, FEW, num_simulations=300, batched=True)
    assert set(good.ranks) == {"loc", "log_likelihood"}
    assert good.p_value > 0.01, str(good)
    bad = calibrate_engine(conjugate, x, Scaled(FEW, 0.7), num_simulations=300, batched=True)
    assert bad.p_value < 0.01, str(bad)


def test_svi_passes():
    x = torch.zeros(6, dtype=torch.float64)
    engine = SVI(learning_rate=0.1, num_steps=1500)
    ranks = calibrate_engine(conjugate, x, engine, num_simulations=100, batched=True)
    assert ranks.num_draws == 199
    assert ranks.p_value > 0.01, str(ranks)


def test_one_by_one_gives_the_same_question():
    """The truth is the same in both ways, and so is its log likelihood."""
    x = torch.zeros(6, dtype=torch.float64)
    short = NUTS(num_samples=60, num_warmup=30, num_chains=1)
    both = [
        calibrate_engine(conjugate, x, short, num_simulations=4, num_draws=19, batched=way)
        for way in (True, False)
    ]
    assert both[0].ranks.keys() == both[1].ranks.keys()
    for name in both[0].ranks:
        difference = both[0].ranks[name] - both[1].ranks[name]
        assert int(difference.abs().max()) <= 9


def test_entries_of_events_and_plates():
    x, y = torch.eye(2).repeat(3, 1).double(), torch.zeros(6, dtype=torch.float64)
    ranks = calibrate_engine(
        regression,
        (x, y),
        NUTS(num_samples=60, num_warmup=60, num_chains=2),
        num_simulations=60,
        num_draws=19,
        batched=True,
    )
    assert set(ranks.ranks) == {"slope[0]", "slope[1]", "scale", "log_likelihood"}
    assert ranks.p_value > 0.001, str(ranks)


def test_a_program_that_cannot_stand_under_a_plate_runs_one_by_one():
    def rigid(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        first = loc[0]  # of the first simulation, under a plate
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(first, 1.0), obs=y)

    y = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot stand under one more plate.*x\[\.\.\., k\]"):
        calibrate_engine(rigid, y, FEW, batched=True)
    short = NUTS(num_samples=40, num_warmup=30, num_chains=1)
    ranks = calibrate_engine(rigid, y, short, num_simulations=3, num_draws=19)
    assert len(ranks.ranks["loc[0]"]) == 3


def test_models_of_ours():
    one = torch.ones(1, dtype=torch.float64)
    prior = NormalInverseWishart(
        loc=0.0 * one, mean_precision=one[0], df=6.0 * one[0], scale_tril=2.0 * one[:, None]
    )
    x = torch.zeros(20, 1, dtype=torch.float64)
    x[:, 0] = torch.arange(20.0)
    model = GaussianMixture(1, priors={"weights": SymmetricDirichlet(1.0), "components": prior})
    engine = VB(num_starts=1, moves=False, num_samples=99)
    ranks = calibrate_engine(model, x, engine, num_simulations=100)
    assert "mean[0]" in ranks.ranks
    assert ranks.p_value > 0.01, str(ranks)
    bad = calibrate_engine(model, x, Scaled(engine, 0.6), num_simulations=100)
    assert bad.p_value < 0.01, str(bad)
    with pytest.raises(ValueError, match="default priors of this model are scaled"):
        calibrate_engine(GaussianMixture(1), x, engine)


def test_too_few_independent_draws_are_refused():
    def slow(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    tiny = NUTS(num_samples=10, num_warmup=10, num_chains=1)
    with pytest.raises(ValueError, match="effectively independent"):
        calibrate_engine(slow, torch.tensor(0.0), tiny, num_simulations=20)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [NUTS(num_samples=400, num_warmup=200), SVI()])
def test_a_thousand_simulations(engine):
    x = torch.zeros(6, dtype=torch.float64)
    good = calibrate_engine(conjugate, x, engine, num_simulations=1000, batched=True, seed=1)
    assert good.p_value > 0.01, str(good)
    bad = calibrate_engine(
        conjugate, x, Scaled(engine, 0.8), num_simulations=1000, batched=True, seed=1
    )
    assert bad.p_value < 0.001, str(bad)
