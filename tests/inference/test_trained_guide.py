"""The trained guide in the fit: more draws, k-hat again, new rows, files."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import bayesgen
from bayesgen.inference import SVI, TrainedGuide
from bayesgen.models import GaussianMixture

__all__: list[str] = []

D64 = torch.float64
X = torch.tensor([1.0, 2.0, 3.5, 2.2], dtype=D64)
FAST = {"num_steps": 960, "learning_rate": 0.03, "compile": False, "num_samples": 200}


def program(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def wide_guide(x):
    at = pyro.param("at", torch.tensor(2.0))
    spread = pyro.param("spread", torch.tensor(1.0)).exp()
    pyro.sample("loc", dist.Normal(at, spread))
    pyro.sample("scale", dist.LogNormal(pyro.param("s", torch.tensor(0.0)), 0.5))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "name",
    ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoLaplaceApproximation"],
)
def test_a_reload_draws_the_same_bits(name, tmp_path):
    fit = SVI(guide=name, **FAST | {"num_steps": 2400}).run(program, X, seed=0)
    fit.guide.save(tmp_path / "guide")
    again = TrainedGuide.load(tmp_path / "guide", program, X)
    first, second = fit.guide.draw(50, seed=3), again.draw(50, seed=3)
    assert equal(first.values, second.values)
    assert torch.equal(first.log_weights, second.log_weights)
    assert not equal(first.values, fit.guide.sample(50, seed=4))
    assert fit.guide.k_hat(400) == again.k_hat(400)


def test_more_draws_have_the_law_of_the_first():
    fit = SVI(**FAST).run(program, X, seed=0)
    more = fit.guide.sample(4000, seed=1)
    for site, value in fit.draws.items():
        error = more[site].std() * (1 / 200 + 1 / 4000) ** 0.5
        assert abs(float(value.mean() - more[site].mean())) < 4.5 * float(error)
    assert abs(fit.guide.k_hat(2000) - fit.attrs["k_hat"]) < 0.5


def test_a_guide_of_code_is_asked_for(tmp_path):
    fit = SVI(guide=wide_guide, **FAST).run(program, X, seed=0)
    fit.guide.save(tmp_path / "guide")
    bare = TrainedGuide.load(tmp_path / "guide", program, X)
    with pytest.raises(ValueError, match="the guide wide_guide is code, which no file holds"):
        bare.sample(5)
    again = TrainedGuide.load(tmp_path / "guide", program, X, wide_guide)
    assert equal(again.sample(20), fit.guide.sample(20))
    wrong = TrainedGuide.load(tmp_path / "guide", program, X, partial(AutoNormal))
    with pytest.raises(ValueError, match="this guide has 4 parameters, but 3 were trained"):
        wrong.sample(5)


def test_a_saved_fit_keeps_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator, dtype=D64)
    fit = SVI(**FAST).run(GaussianMixture(2, "diagonal"), x, seed=0)
    fit.save(tmp_path / "fit")
    again = bayesgen.load(tmp_path / "fit")
    assert equal(fit.guide.sample(20, seed=5), again.guide.sample(20, seed=5))
    fit.save(tmp_path / "bare", include_data=False)
    bare = bayesgen.load(tmp_path / "bare")
    with pytest.raises(ValueError, match="saved without the training data"):
        bare.guide.sample(5)
    told = bare.guide.given(bare.model, x)
    assert equal(fit.guide.sample(20, seed=5), told.sample(20, seed=5))


def test_an_amortised_guide_encodes_new_rows(tmp_path):
    """Of the linear-Gaussian model, whose exact posterior mean is half of each row."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.loc = torch.nn.Linear(1, 1, dtype=D64)
            self.log_scale = torch.nn.Parameter(torch.zeros((), dtype=D64))

        def forward(self, x, num_rows=None):
            pyro.module("encoder", self)
            with pyro.plate("data", num_rows or len(x), subsample=x):
                at = self.loc(x[:, None])[:, 0]
                pyro.sample("z", dist.Normal(at, self.log_scale.exp()))

    def model(x, num_rows=None):
        with pyro.plate("data", num_rows or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    rows = torch.linspace(-2, 2, 32, dtype=D64)
    fit = SVI(guide=Encoder(), **FAST | {"num_steps": 2400}).run(model, rows, seed=0)
    new = torch.tensor([-1.0, 0.5, 3.0], dtype=D64)
    found = fit.guide.encode(new)["z"]
    assert torch.equal(fit.encode(new), found)
    torch.testing.assert_close(found, new / 2, atol=0.1, rtol=0.0)
    fit.guide.save(tmp_path / "guide")
    again = TrainedGuide.load(tmp_path / "guide", model, rows, Encoder())
    assert torch.equal(again.encode(new)["z"], found)
    auto = SVI(**FAST | {"num_steps": 96}).run(model, rows, seed=0)
    with pytest.raises(TypeError, match="is not amortised"):
        auto.encode(new)


@pytest.mark.parametrize(
    "guide",
    [
        *("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"),
        *("AutoLowRankMultivariateNormal", "AutoLaplaceApproximation", wide_guide),
    ],
)
def test_the_density_at_given_values_is_that_of_the_draws(guide):
    """The importance weights of draws are the joint density of the model over it."""
    fit = SVI(guide=guide, **FAST | {"num_steps": 1920}).run(program, X, seed=0)
    drawn = fit.guide.draw(20, seed=3)
    loc, scale = drawn.values["loc"], drawn.values["scale"]
    joint = dist.Normal(0.0, 10.0).log_prob(loc) + dist.LogNormal(0.0, 1.0).log_prob(scale)
    joint = joint + dist.Normal(loc[:, None], scale[:, None]).log_prob(X).sum(-1)
    found = fit.guide.log_prob(drawn.values)
    torch.testing.assert_close(found, joint - drawn.log_weights, atol=1e-6, rtol=1e-6)


def test_values_that_do_not_fit_are_refused():
    fit = SVI(**FAST | {"num_steps": 48}).run(program, X, seed=0)
    with pytest.raises(ValueError, match=r"values are of \['loc'\], but the guide has"):
        fit.guide.log_prob({"loc": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'loc' have shape \(3, 2\), but must have \(n, \)"):
        fit.guide.log_prob({"loc": torch.zeros(3, 2), "scale": torch.ones(3)})
    point = SVI("AutoDelta", **FAST | {"num_steps": 48}).run(program, X, seed=0)
    with pytest.raises(TypeError, match="AutoDelta is a point"):
        point.guide.log_prob({"loc": torch.zeros(3), "scale": torch.ones(3)})


def test_trained_parameters_by_name():
    fit = SVI(guide=wide_guide, **FAST).run(program, X, seed=0)
    found = fit.guide.parameters
    assert set(found) == {"at", "spread", "s"}
    assert abs(float(found["at"] - fit.draws["loc"].mean())) < 0.5
