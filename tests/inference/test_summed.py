"""Rows added up at once: the same density as row by row, at a cost that does not grow."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.distributions import PartialLowRankMultivariateNormal, Summed
from bayesgen.inference import SVI
from bayesgen.inference.programs.record import record
from bayesgen.inference.programs.trace import trace
from bayesgen.models import PPCA, BayesianPCA, FactorAnalysis

__all__: list[str] = []


def rows(num_rows=80, num_columns=5, seed=0):
    generator = rng.make_generator(seed)
    mix = rng.standard_normal((num_columns, num_columns), generator)
    return 1e4 + rng.standard_normal((num_rows, num_columns), generator) @ mix


def law(x, *, small_noise=False):
    generator = rng.make_generator(1)
    d = x.shape[-1]
    noise = torch.linspace(1e-4 if small_noise else 0.3, 1.0, d, dtype=torch.float64)
    factor = rng.standard_normal((d, 2), generator)
    shift = rng.standard_normal((d,), generator)
    return PartialLowRankMultivariateNormal(x.nanmean(0) + shift, factor, noise.square())


@pytest.mark.parametrize("small_noise", [False, True])
@pytest.mark.parametrize("num_rows", [3, 6, 7, 80])
def test_the_sum_is_that_of_the_rows(num_rows, small_noise):
    x = rows(num_rows)
    found = law(x, small_noise=small_noise).expand((num_rows,))
    assert isinstance(found, Summed)
    wanted = found.log_prob(x).sum()
    torch.testing.assert_close(found.log_prob_sum(x), wanted, rtol=1e-10, atol=1e-10)
    x[0, 1] = torch.nan
    wanted = found.log_prob(x).sum()
    torch.testing.assert_close(found.log_prob_sum(x), wanted, rtol=1e-10, atol=1e-10)


def test_rows_with_parameters_of_their_own_are_added_one_by_one():
    x = rows(20)
    one = law(x)
    own = PartialLowRankMultivariateNormal(x - 0.5, one.cov_factor, one.cov_diag)
    torch.testing.assert_close(own.log_prob_sum(x), own.log_prob(x).sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("model", [PPCA(2), FactorAnalysis(2), BayesianPCA(3)])
def test_the_traced_program_is_the_sum_of_its_sites(model):
    x = rows()
    bound = model.bind(as_dataset(x))
    density = trace(lambda: bound.model(x), generator=rng.make_generator(0))
    assert density.is_traced
    # What the graph holds does not grow with the rows.
    assert max(b.numel() for b in density.single.buffers()) <= (x.shape[1] + 1) ** 2
    point = density._points(1)
    draws = density.constrain(point)
    by_row = density.log_likelihood(draws)["x"]
    assert by_row.shape == (1, len(x))
    priors = sum(v for k, v in density.terms(point[0]).items() if k != "x")
    values = density.constrain(point[0])
    jacobian = values["noise_scale"].log().sum()
    if "precision" in values:
        jacobian = jacobian + values["precision"].log().sum()
    wanted = by_row.sum() + priors + jacobian
    torch.testing.assert_close(density.value_and_grad(point)[0][0], wanted, rtol=1e-10, atol=1e-10)


def test_weighted_and_masked_rows_are_left_alone():
    x = rows(40)
    found = law(x)
    keep = torch.arange(40) % 2 == 0

    def program(change):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(5).double(), 1e4).to_event(1))
        own = PartialLowRankMultivariateNormal(loc, found.cov_factor, found.cov_diag)
        with pyro.plate("data", 40), change():
            pyro.sample("x", own, obs=x)

    point = torch.zeros(1, 5, dtype=torch.float64)
    by_row = PartialLowRankMultivariateNormal(point[0], found.cov_factor, found.cov_diag).log_prob(
        x
    )
    prior = dist.Normal(point[0], 1e4).log_prob(point[0]).sum()
    cases = (
        (lambda: poutine.scale(scale=3.0), 3.0 * by_row.sum()),
        (lambda: poutine.mask(mask=keep), by_row[keep].sum()),
    )
    for change, wanted in cases:
        density = trace(lambda c=change: program(c), generator=rng.make_generator(0))
        torch.testing.assert_close(density.value_and_grad(point)[0][0], wanted + prior)


def test_minibatches_of_variational_inference_see_rows():
    """A step on part of the rows is unbiased: its bound lies around that of all rows."""
    x = rows(400)
    kinds = {"num_steps": 600, "num_samples": 20}
    whole = SVI(**kinds).run(PPCA(2), x, seed=0)
    part = SVI(**kinds, batch_size=100).run(PPCA(2), x, seed=0)
    left, right = (sum(f.history["elbo"][-100:]) / 100 for f in (whole, part))
    assert abs(left - right) < 0.02 * abs(left)


def test_what_is_copied_into_a_tensor_has_a_rule_for_many_particles():
    """Torch has none for ``aten.copy``: it warned a dozen times in each run of SVI."""

    def function(x):
        out = torch.zeros(2, 3, dtype=torch.float32)
        out = out + 0.0 * x.float()
        out.copy_(x)
        return out

    x = torch.arange(3, dtype=torch.float64)
    graph = record(function, x)
    assert not any("aten.copy" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), function(x))
    assert graph(x).dtype == torch.float32
