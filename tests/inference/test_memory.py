"""Memory stays flat over twenty fits of every engine: no tensor outlives one, and no text."""

from __future__ import annotations

import gc
import linecache
import mmap
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.inference import EM, NUTS, SVI, VB, ClosedForm, Gibbs, ManyChains
from bayesgen.models import PPCA, GaussianMixture, RobustPCA

__all__: list[str] = []

NUM_FITS = 20
_LIMIT = 2**18  # bytes a fit: the heap grows by steps
X = (
    rng.standard_normal((30, 2), rng.make_generator(0))
    + 8.0 * torch.arange(30).remainder(2)[:, None]
)


def program(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def two_groups(x):
    with pyro.plate("groups", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        group = pyro.sample("group", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(loc[group.long()], 1.0), obs=x)


_NUTS = NUTS(num_chains=2, num_samples=10, num_warmup=5)
_SVI = SVI(num_steps=48, num_samples=10)
_MANY = ManyChains(num_chains=8, num_samples=10, num_warmup=10, num_superchains=4)
CASES = {
    "EM": (EM(num_starts=1), GaussianMixture(2), X),
    "EM-PPCA": (EM(num_starts=1), PPCA(1), X),
    "VB": (VB(num_starts=1), GaussianMixture(2), X),
    "VB-RobustPCA": (VB(num_starts=1), RobustPCA(1), X),
    "Gibbs": (Gibbs(num_chains=1, num_samples=10, num_warmup=5), GaussianMixture(2), X),
    "ClosedForm": (ClosedForm(), PPCA(1), X),
    "SVI": (_SVI, program, X[:, 0]),
    "SVI-discrete": (_SVI, two_groups, X[:, 0]),
    "NUTS": (_NUTS, program, X[:, 0]),
    "NUTS-discrete": (_NUTS, two_groups, X[:, 0]),
    "NUTS-PPCA": (_NUTS, PPCA(1), X),
    "ManyChains": (_MANY, program, X[:, 0]),
    "ManyChains-PPCA": (_MANY, PPCA(1), X),
}


def resident():
    """Bytes of memory that the process takes; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


def num_sources():
    """Texts of graphs that torch keeps for tracebacks."""
    return sum(name.startswith("<eval_with_key>") for name in linecache.cache)


def num_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def grown(fit):
    """A fit: objects that Python still holds, bytes of the process, tensors left behind."""
    for seed in range(NUM_FITS):  # caches of torch, Pyro and ours fill up
        fit(seed)
    gc.collect()
    before = sys.getallocatedblocks(), resident(), num_tensors()
    for seed in range(NUM_FITS):
        fit(seed)
    gc.collect()
    after = sys.getallocatedblocks(), resident(), num_tensors()
    return [(b - a) / NUM_FITS for a, b in zip(before, after, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_fits(name):
    engine, model, data = CASES[name]
    engine.run(model, data)
    sources = num_sources()
    objects, memory, tensors = grown(lambda seed: engine.run(model, data, seed=seed))
    assert tensors <= 0
    assert objects < 16
    assert memory < _LIMIT
    assert num_sources() <= sources, "texts of graphs are kept"


@pytest.mark.parametrize("what", ["tensors", "pages", "objects"])
def test_what_is_kept_is_found(what):
    kept = []

    def fit(seed):
        if what == "tensors":
            kept.append(torch.zeros(3))
        elif what == "pages":
            kept.append(mmap.mmap(-1, 2**20))  # new ones, whatever is free on the heap
            kept[-1].write(b"x" * 2**20)
        else:
            kept.extend([seed, k] for k in range(20))

    objects, memory, tensors = grown(fit)
    found = {"tensors": tensors >= 1, "pages": memory >= _LIMIT, "objects": objects >= 16}
    assert found[what]
