"""Simulation-based calibration of SVI: a thousand data sets in one run."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest

from bayesgen import rng
from bayesgen.calibration import simulation_based_calibration
from bayesgen.inference import SVI

__all__: list[str] = []


def sets(y):
    with pyro.plate("sets", y.shape[1]):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", y.shape[0]):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def simulate(count, generator):
    loc = 2.0 * rng.standard_normal(count, generator)
    return {"loc": loc}, loc + rng.standard_normal((5, count), generator)


def calibrated(shrink):
    def posterior_draws(y, generator):
        engine = SVI(learning_rate=0.02, num_samples=100, num_steps=3000)
        drawn = engine.run(sets, y, seed=4).draws["loc"][0]
        return {"loc": drawn.mean(0) + shrink * (drawn - drawn.mean(0))}

    return simulation_based_calibration(simulate, posterior_draws, num_simulations=1000, seed=2)


@pytest.mark.slow
def test_a_thousand_conjugate_posteriors():
    assert calibrated(1.0).p_value > 0.01
    assert calibrated(0.8).p_value < 1e-3  # a scale 20 % too small is caught
