"""Bad programs get help: the site, what it has, what to do. The messages are exact."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from bayesgen.inference import NUTS
from bayesgen.inference.complaints import ProgramError

__all__: list[str] = []

Y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
RUN = {"num_chains": 2, "num_samples": 4, "num_warmup": 4}


def loc():
    return pyro.sample("loc", dist.Normal(0.0, 1.0))


def nothing_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y[0])


def a_parameter():
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(loc(), scale), obs=Y[0])


def endless_discrete():
    count = pyro.sample("count", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(count, 1.0), obs=Y[0])


def name_twice():
    pyro.sample("loc", dist.Normal(loc(), 1.0))


def subsampled():
    mean = loc()
    with pyro.plate("data", 3, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y[rows])


def missing_values():
    pyro.sample("y", dist.Normal(loc(), 1.0), obs=torch.tensor(torch.nan))


def outside_support():
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Exponential(rate), obs=Y - 2.0)


def shapes_that_cross():
    pyro.sample("y", dist.Normal(loc() * torch.ones(3), 1.0).to_event(1), obs=Y.unsqueeze(-1))


def plate_of_another_size():
    mean = loc()
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(mean * torch.ones(3), 1.0), obs=Y)


def no_bijection():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def bad_argument():
    pyro.sample("y", dist.Normal(loc(), -1.0), obs=Y[0])


def nan_at_the_start():
    mean = loc()
    pyro.sample("y", dist.Normal(mean * 1e200, 1.0), obs=Y[0])


TABLE = [
    (
        nothing_latent,
        "the program has no continuous latent site: every pyro.sample is observed or discrete, "
        "so there is "
        "nothing to sample. Give a parameter a prior, such as pyro.sample('loc', Normal(0, 1)).",
    ),
    (
        a_parameter,
        "pyro.param 'scale' in the model: a sampler draws from a posterior and does not "
        "optimise. Give it a "
        "prior with pyro.sample('scale', ...), or pass a fixed tensor.",
    ),
    (
        endless_discrete,
        "site 'count' is a latent Poisson: discrete with endless values, so it can be neither "
        "moved along a "
        "gradient nor summed out. Observe it (obs=...), marginalise it by hand (Gamma-Poisson is "
        "a "
        "NegativeBinomial), or bound it with a Categorical.",
    ),
    (
        name_twice,
        "the site name 'loc' is used twice (at test_bad_programs.py:{line}: {source}): every "
        "pyro.sample needs "
        "its own name. In a Python loop write f'loc_{{i}}', or use a pyro.plate.",
    ),
    (
        subsampled,
        "plate 'data' takes a random subsample of 2 of its 3 rows, and a sampler needs them all. "
        "Leave out "
        "subsample_size, or fit by SVI.",
    ),
    (
        missing_values,
        "site 'y': 1 of 1 observed values are NaN. Drop those rows, or make them latent with "
        "pyro.sample(..., obs=values, obs_mask=~missing).",
    ),
    (
        outside_support,
        "site 'y': 1 of 3 observed values lie outside the support of Exponential, "
        "GreaterThanEq(lower_bound=0.0). Transform the data, or choose a distribution that "
        "allows them.",
    ),
    (
        shapes_that_cross,
        "site 'y': the distribution has shape (3,) and the observed values (3, 1), which "
        "broadcast to a third "
        "shape and so count values several times. Reshape one, for example values.squeeze(-1).",
    ),
]


@pytest.mark.parametrize(("program", "message"), TABLE, ids=[p.__name__ for p, _ in TABLE])
def test_exact_messages(program, message):
    with pytest.raises(ProgramError) as caught:
        NUTS(**RUN).run(program)
    if "{line}" in message:
        line = program.__code__.co_firstlineno + 1
        source = 'pyro.sample("loc", dist.Normal(loc(), 1.0))'
        message = message.format(line=line, source=source)
    assert str(caught.value) == message


PARTS = [
    (
        plate_of_another_size,
        ["plate('data') at site y dim -1, 5 vs 3", "test_bad_programs.py", "The size of a plate"],
    ),
    (no_bijection, ["site 'direction'", "ProjectedNormal", "biject_to.register"]),
    (bad_argument, ["scale", "test_bad_programs.py", "Normal"]),
    (nan_at_the_start, ["no starting point of finite density", "'y' (-inf)"]),
]


@pytest.mark.parametrize(("program", "parts"), PARTS, ids=[p.__name__ for p, _ in PARTS])
def test_messages_that_quote_pyro(program, parts):
    with pytest.raises(ProgramError) as caught:
        NUTS(**RUN).run(program)
    for part in parts:
        assert part in str(caught.value)


def test_what_is_no_program():
    with pytest.raises(TypeError, match="needs a model with the capability Program"):
        NUTS(**RUN).run(3.0, Y)


def test_rows_outside_a_plate_are_noted():
    def program():
        pyro.sample("y", dist.Normal(loc(), torch.ones(3)), obs=Y)

    fit = NUTS(**RUN).run(program)
    assert any("write `with pyro.plate('data', 3):` around it" in m for m in fit.attrs["messages"])
