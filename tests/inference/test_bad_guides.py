"""Bad guides, and programs that leave the reals under one, get help. The messages are exact."""

from __future__ import annotations

import inspect
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

from bayesgen.inference import SVI

__all__: list[str] = []

Y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def loc(start=0.0):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(start)), 1.0))


def scale():
    pyro.sample("scale", dist.LogNormal(pyro.param("b", torch.tensor(0.0)), 1.0))


def misses_a_site(y):
    loc()


def has_an_extra_site(y):
    loc()
    scale()
    pyro.sample("lco", dist.Normal(0.0, 1.0))


def samples_what_is_observed(y):
    loc()
    scale()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def leaves_the_support(y):
    loc()
    pyro.sample("scale", dist.Normal(pyro.param("b", torch.tensor(0.0)), 1.0))


def has_nothing_to_train(y):
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def starts_at_nan(y):
    at = pyro.param("a", torch.tensor(float("nan")))
    pyro.sample("loc", dist.Normal(at, 1.0))  # HERE
    scale()


def mixture(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[label], 1.0), obs=y)


def has_rows_outside_plates(y):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.zeros(2)), 1.0))


TABLE = {
    misses_a_site: (
        "the guide has no site for the model's latent 'scale': add pyro.sample('scale', ...) to "
        "it, or observe the site in the model (obs=...)."
    ),
    has_an_extra_site: (
        "the guide's site 'lco' is not in the model: give both the same name, or mark it "
        "infer={'is_auxiliary': True}."
    ),
    samples_what_is_observed: (
        "the guide samples 'y', which the model observes: take it out of the guide."
    ),
    leaves_the_support: (
        "the guide's site 'scale' can take any value of Real(), but the model's only of "
        "GreaterThan(lower_bound=0.0): outside it the density is zero. Give the guide a "
        "distribution on the model's support (LogNormal or Gamma for what is positive, Beta on "
        "the unit interval)."
    ),
    has_nothing_to_train: (
        "SVI: the guide has no parameters, so there is nothing to optimise. Use pyro.param in it, "
        "a module, or one of the autoguides."
    ),
    starts_at_nan: (
        "loc of Normal must satisfy Real(), but is nan. Where it comes from a latent, give that a "
        "prior on this support (HalfNormal, LogNormal or Gamma for what is positive), or "
        "transform it (.exp(), torch.sigmoid)."
    ),
}


@pytest.mark.parametrize("guide", TABLE, ids=lambda guide: guide.__name__)
def test_exact_messages(guide):
    with pytest.raises(ValueError, match="guide|must satisfy") as caught:
        SVI(guide=guide, num_steps=48).run(model, Y, seed=0)
    lines, first = inspect.getsourcelines(guide)
    marked = [k for k, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
    at = ""
    if marked:
        at = f"\n  at test_bad_guides.py:{first + marked[0]}: {lines[marked[0]].strip()}"
    assert str(caught.value) == TABLE[guide] + at


def test_a_narrower_support_and_a_point_are_fine():
    def narrow(y):
        loc()
        pyro.sample("scale", dist.Uniform(0.5, pyro.param("b", torch.tensor(1.5))))

    def point(y):
        pyro.sample("loc", dist.Delta(pyro.param("a", torch.tensor(0.0))))
        pyro.sample("scale", dist.Delta(pyro.param("b", torch.tensor(1.0)).exp()))

    for guide in (narrow, point):
        assert SVI(guide=guide, num_steps=48, num_samples=5).run(model, Y, seed=0).draws


def test_the_site_that_is_infinite_at_the_start_is_named():
    def program(y):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(low, low + 0.001), obs=y[0])

    with pytest.raises(ValueError, match="stopped being finite") as caught:
        SVI(num_steps=48).run(program, Y, seed=0)
    assert str(caught.value) == (
        "SVI: the bound or its gradient stopped being finite at step 1. The first culprit is site "
        "'y' of the model: its log density is not finite. Start elsewhere (init_loc_fn of the "
        "autoguide), or rescale the data."
    )


def test_the_site_that_becomes_nan_later_is_named():
    """The mean is a logarithm, and the data pull its argument below zero."""

    def program(y):
        at = pyro.sample("at", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((1.0 + at).log(), 0.1), obs=y - 8.0)

    at = init_to_value(values={"at": torch.tensor(0.0)})
    start = partial(AutoNormal, init_scale=0.01, init_loc_fn=at)
    with pytest.raises(ValueError, match="stopped being finite") as caught:
        SVI(guide=start, num_steps=4800, learning_rate=0.05).run(program, Y, seed=0)
    text = str(caught.value)
    assert "SVI: the bound or its gradient stopped being finite at step " in text
    assert "at step 1." not in text
    assert text.endswith(
        " The first culprit is site 'y' of the model: its log density is not finite. Lower "
        "learning_rate, give max_norm=10.0, or rescale the data."
    )


def test_a_latent_without_plate_under_a_guide():
    """Pyro's words are of packing tensors."""
    with pytest.raises(ValueError, match="dimensions") as caught:
        SVI(guide=has_rows_outside_plates, num_steps=48).run(mixture, Y, seed=0)
    assert str(caught.value) == (
        "site 'loc' has log densities of shape (2,), but plates and the discrete latents that are "
        "summed out take the dimensions (none) alone. Write .to_event(...) where the others are "
        "parts of one value, or a pyro.plate around the site where they are rows."
    )
