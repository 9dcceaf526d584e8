"""Leave-one-out: ArviZ's numbers, the exact answer, refusals; Pareto smoothing by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz, is_datatree
from bayesgen.comparison import compare, leave_one_out
from bayesgen.inference import NUTS
from bayesgen.psis import k_hat, smooth
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


def rows(num_rows=60, seed=0):
    generator = rng.make_generator(seed)
    shift = 6.0 * torch.randint(0, 2, (num_rows, 1), generator=generator)
    return rng.standard_normal((num_rows, 1), generator) + shift


def arviz_loo(fit, efficiency):
    """Total, by row, and Pareto shapes, with either line of ArviZ."""
    found = import_arviz().loo(fit.arviz, pointwise=True, reff=efficiency)
    rows = found.elpd_i if is_datatree() else found.loo_i
    return np.asarray(rows), np.asarray(found.pareto_k)


@pytest.fixture(scope="module")
def pair():
    x = rows()
    return [pretend(UnitMixture(k), x, num_chains=2, num_draws=500) for k in (1, 2)]


def test_the_numbers_are_arviz_s(pair):
    for fit in pair:
        elpd, k = arviz_loo(fit, 0.8)
        ours = leave_one_out(fit, efficiency=0.8)
        loose = is_datatree()  # ArviZ 1.x fits the tail with a grid of its own
        np.testing.assert_allclose(ours.elpd, elpd, rtol=1e-4 if loose else 1e-6)
        np.testing.assert_allclose(ours.k_hat, k, atol=0.05 if loose else 1e-6)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3.1
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_differences_are_arviz_s(pair):
    found = compare(one=pair[0], two=pair[1])
    table = import_arviz().compare({"one": pair[0].arviz, "two": pair[1].arviz})
    assert list(found.table.index) == list(table.index) == ["two", "one"]
    name = "elpd" if is_datatree() else "elpd_loo"
    expected = float(table.loc["one", name]) - float(table.loc["two", name])
    assert found.table.loc["one", "difference"] == pytest.approx(expected, rel=0.02)
    assert found.table.loc["one", "dse"] == pytest.approx(float(table.loc["one", "dse"]), rel=0.05)
    assert found.table.loc["two", "difference"] == 0.0


def test_the_exact_answer_of_a_conjugate_model():
    """Refitting without each row in closed form."""
    x = rng.standard_normal((30, 1), rng.make_generator(1))
    fit = pretend(UnitMixture(1), x, num_chains=4, num_draws=1000)
    precision = 29 + 0.01
    mean = (x.sum() - x) / precision
    law = torch.distributions.Normal(mean, (1 + 1 / precision) ** 0.5)
    exact = law.log_prob(x)[:, 0]
    found = leave_one_out(fit)
    torch.testing.assert_close(found.elpd, exact, atol=0.02, rtol=0)
    assert found.num_bad == 0
    assert 0.5 < found.effective_parameters < 1.6


def regression(x, y, slope=True):
    b = pyro.sample("b", dist.Normal(0.0, 2.0)) if slope else 0.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


@pytest.fixture(scope="module")
def programs():
    generator = rng.make_generator(3)
    x = rng.standard_normal(40, generator)
    y = 1.5 * x + rng.standard_normal(40, generator)
    engine = NUTS(num_samples=300, num_warmup=100, num_chains=2)

    def alone(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("value", dist.Normal(loc, 1.0), obs=y)

    return engine.run(regression, (x, y), seed=0), engine.run(alone, y, seed=0), engine, x, y


def test_plain_programs_whatever_their_sites_are_called(programs):
    line, flat, *_ = programs
    found = compare(line, flat)
    assert list(found.table.index) == ["NUTS", "NUTS 2"]
    assert found.table.loc["NUTS 2", "difference"] < -10
    assert "elpd" in str(found)
    ours = compare({"flat": flat, "ours": pretend(UnitMixture(1), programs[4][:, None])})
    assert abs(ours.table["difference"].iloc[1]) < 0.5  # the same model, but for its prior


def test_sites_of_one_row_count_once(programs):
    *_, engine, x, y = programs

    def both(x, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    assert leave_one_out(engine.run(both, (x, y), seed=0)).elpd.shape == (40,)


def test_incomparable_fits_are_refused(programs, pair):
    line, _, engine, x, y = programs
    other = engine.run(regression, (x, y + 0.001), seed=0)
    with pytest.raises(ValueError, match="'b' was fitted to other data than 'a'"):
        compare(a=line, b=other)
    with pytest.raises(ValueError, match="at least two fits"):
        compare(line)

    def loose(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]), obs=y)

    def sequence(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)

    few = NUTS(num_samples=60, num_warmup=30, num_chains=2)
    with pytest.raises(ValueError, match=r"in no plate.*pyro.plate\('data', 40\)"):
        leave_one_out(few.run(loose, y, seed=0))
    with pytest.raises(ValueError, match="one row"):
        leave_one_out(few.run(sequence, y, seed=0))

    def nothing():
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    prior = NUTS(num_samples=60, num_warmup=30, num_chains=2).run(nothing, seed=0)
    with pytest.raises(ValueError, match="the program has none: no site is observed"):
        compare(a=prior, b=prior)
    short = {name: value[:, :20] for name, value in pair[0].draws.items()}
    with pytest.raises(ValueError, match="at least 100 draws"):
        leave_one_out(dataclasses.replace(pair[0], draws=short))


def test_a_row_that_rules_its_fit_is_named():
    x = torch.cat([rng.standard_normal((20, 1), rng.make_generator(1)), torch.tensor([[9.0]])])
    good = pretend(UnitMixture(1), x, num_chains=4, num_draws=500)
    wild = {
        **good.draws,
        "loc": good.draws["loc"] * 1.0
        + 2.0 * torch.sinh(2 * rng.standard_normal((4, 500, 1, 1), rng.make_generator(2))),
    }
    found = compare(good=good, wild=dataclasses.replace(good, draws=wild))
    assert any("'wild': k-hat is above 0.7" in warning for warning in found.warnings)
    assert found.table.loc["wild", "bad_k"] > 0


# ---------------------------------------------------------------- smoothing
@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_shape_of_a_known_tail_is_found(shape):
    uniform = torch.rand(20_000, generator=rng.make_generator(0), dtype=torch.float64)
    weights = (1 - uniform) ** -shape  # a Pareto law
    assert k_hat(weights.log()) == pytest.approx(shape, abs=0.12)


def test_smoothing_keeps_order_sum_and_the_body():
    raw = 1.5 * rng.standard_normal((1000, 3), rng.make_generator(0))
    smoothed, k = smooth(raw)
    assert k.shape == (3,)
    torch.testing.assert_close(smoothed.logsumexp(0), torch.zeros(3).double())
    assert float(smoothed.gather(0, raw.argsort(0)).diff(dim=0).min()) > -1e-12
    shift = smoothed - raw
    body = raw.argsort(0)[:800]
    assert bool((shift.gather(0, body).std(0) < 1e-12).all())
    flat, k = smooth(torch.zeros(100))
    assert float(k) == -np.inf
    torch.testing.assert_close(flat, torch.full((100,), -np.log(100)).double())
