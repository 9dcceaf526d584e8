"""Both Hamiltonian samplers on 1,000 data sets at once; a scale 20 % too small is caught."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen.inference import NUTS, ManyChains, calibrate_engine

__all__: list[str] = []

ENGINES = {
    "nuts": NUTS(num_chains=4, num_samples=100, num_warmup=100),
    "many-chains": ManyChains(num_chains=32, num_superchains=4, num_samples=25, num_warmup=60),
}


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.5), obs=x)


class Narrow:
    """An engine whose posteriors have a scale 20 % too small."""

    def __init__(self, engine):
        self.engine = engine

    def run(self, model, data=None, *, seed=0):
        fit = self.engine.run(model, data, seed=seed)
        draws = {}
        for name, value in fit.draws.items():
            mean = value.mean((0, 1))
            draws[name] = mean + 0.8 * (value - mean)
        return dataclasses.replace(fit, draws=draws)


@pytest.mark.parametrize("name", ENGINES)
def test_a_thousand_simulations(name):
    x = torch.zeros(6, dtype=torch.float64)
    settings = {"num_simulations": 1000, "batched": True, "seed": 1}
    good = calibrate_engine(conjugate, x, ENGINES[name], **settings)
    assert len(good.ranks["loc"]) == 1000
    assert good.p_value > 0.005, str(good)
    bad = calibrate_engine(conjugate, x, Narrow(ENGINES[name]), **settings)
    assert bad.p_value < 0.002, str(bad)  # 2,000 replications tell no less
