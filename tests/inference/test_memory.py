"""Memory stays flat over twenty fits: a few kilobytes of a fit outlive it, and no tensor."""

from __future__ import annotations

import gc
import tracemalloc

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen.inference import NUTS, SVI

__all__: list[str] = []

ENGINES = {
    "NUTS": NUTS(num_chains=2, num_samples=10, num_warmup=5),
    "SVI": SVI(num_steps=10, num_samples=10),
}


def program(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_fits(engine):
    x = torch.arange(4.0)

    def fit(count):
        for seed in range(count):
            ENGINES[engine].run(program, x, seed=seed)
        gc.collect()

    fit(5)  # caches of torch, Pyro and ours fill up
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    tracemalloc.start()
    try:
        fit(1)
        before = tracemalloc.get_traced_memory()[0]
        fit(14)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors
    assert grown < 14 * 8192, f"{grown / 14:.0f} bytes a fit"
