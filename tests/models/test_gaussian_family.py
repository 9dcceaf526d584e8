"""Gaussian components: missing entries by brute force, offsets, degenerate data, priors."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import bayesgen
from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.distributions import NormalInverseGamma, NormalInverseWishart
from bayesgen.inference import EM
from bayesgen.models import GaussianMixture
from bayesgen.models.families.diagonal import DiagonalGaussian
from bayesgen.models.families.gaussian import Gaussian
from bayesgen.models.families.quadratic import safe_cholesky, unpack_moments
from bayesgen.models.families.student_t import StudentT
from bayesgen.priors import HierarchicalNormalInverseWishart

__all__: list[str] = []


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ holes, by brute force
def conditional_moments(x, mean, covariance, weight, count):
    """One row's E[x] and E[x x'] in numpy: the textbook formulas of Ghahramani & Jordan."""
    seen = ~np.isnan(x)
    full, second = mean.copy(), np.zeros((len(x), len(x)))
    full[seen] = x[seen]
    if (~seen).any():
        gain = covariance[np.ix_(~seen, seen)] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
        full[~seen] = mean[~seen] + gain @ (x[seen] - mean[seen])
        rest = covariance[np.ix_(~seen, ~seen)] - gain @ covariance[np.ix_(seen, ~seen)]
        second[np.ix_(~seen, ~seen)] = rest * count
    return weight, weight * full, weight * np.outer(full, full) + second


@pytest.mark.parametrize("name", ["full", "tied", "student"])
def test_expected_statistics_are_the_textbooks(cases, generator, name):
    case = cases(name)
    family, internal = case.family, case.internal(generator)
    message = family.block.natural(internal)
    observed = family.observe(case.holes)
    weights = case.responsibilities(generator)
    evaluation = family.evaluate(observed, message)
    statistics = family.statistics(observed, weights, evaluation, message)
    gaussian = family if isinstance(family, Gaussian) else family.gaussian
    x = (case.holes - gaussian.offset).numpy()
    for k in range(2):
        tril = internal["scale_tril"][0 if name == "tied" else k].numpy()
        loc, covariance = internal["loc"][k].numpy(), tril @ tril.T
        total = [0.0, np.zeros(3), np.zeros((3, 3))]
        for i, row in enumerate(x):
            scale, seen = 1.0, ~np.isnan(row)
            if name == "student":
                df, delta = float(internal["df"][k]), (row - loc)[seen]
                own = covariance[np.ix_(seen, seen)]
                distance = delta @ np.linalg.inv(own) @ delta if seen.any() else 0.0
                scale = (df + seen.sum()) / (df + distance)
            r = float(weights[k, i])
            parts = conditional_moments(row, loc, covariance, r * scale, r)
            total = [left + right for left, right in zip(total, parts, strict=True)]
        got = unpack_moments(statistics["moments"][k], 3)
        for left, right in zip(got, total, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)


def test_em_with_holes_climbs_to_the_maximum_likelihood(generator):
    """One component: the fixed point of the two steps is where the observed likelihood is flat."""
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.8], [0.0, 0.5]], dtype=torch.float64
    )
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, torch.nan)
    family = Gaussian().bind(as_dataset(x), 1, {})
    observed, ones = family.observe(x), torch.ones((1, 60), dtype=torch.float64)
    values, last = None, -math.inf
    statistics = family.statistics(observed, ones, None, None)
    for _ in range(300):
        values = family.block.maximise(statistics, values, flat=True)
        message = family.block.natural(values)
        evaluation = family.evaluate(observed, message)
        height = float(evaluation.scores.sum())
        assert height > last - 1e-9
        last = height
        statistics = family.statistics(observed, ones, evaluation, message)
    free = {name: value.clone().requires_grad_() for name, value in values.items()}
    total = family.evaluate(observed, family.block.natural(free)).scores.sum()
    gradients = torch.autograd.grad(total, list(free.values()))
    assert max(float(torch.tril(g).abs().max()) for g in gradients) < 1e-5


def test_holes_are_drawn_from_their_conditional(generator):
    """Mean, variance and covariance with what is seen, of one row drawn many times."""
    x = torch.tensor([[1.0, torch.nan, torch.nan]], dtype=torch.float64)
    family = Gaussian().bind(as_dataset(torch.eye(3, dtype=torch.float64)), 1, {})
    tril = torch.tensor(
        [[[1.0, 0.0, 0.0], [0.7, 0.9, 0.0], [-0.4, 0.3, 1.5]]], dtype=torch.float64
    )
    values = {"loc": torch.zeros((1, 3), dtype=torch.float64), "scale_tril": tril}
    many = 40_000
    message = family.block.natural({k: v.expand(many, *v.shape) for k, v in values.items()})
    observed, ones = family.observe(x), torch.ones((many, 1, 1), dtype=torch.float64)
    drawn = family.statistics(
        observed, ones, family.evaluate(observed, message), message, generator=generator
    )
    _, first, second = unpack_moments(drawn["moments"][:, 0], 3)
    holes = first[:, 1:]
    close(second, first.unsqueeze(-1) * first.unsqueeze(-2), 1e-9)
    covariance = tril[0] @ tril[0].mT
    given = x[0, 0] - family.offset[0]
    mean = covariance[1:, 0] / covariance[0, 0] * given
    rest = covariance[1:, 1:] - torch.outer(covariance[1:, 0], covariance[0, 1:])
    z = (holes.mean(0) - mean) / (holes.std(0) / math.sqrt(many))
    assert float(z.abs().max()) < 4.5
    torch.testing.assert_close(torch.cov(holes.T), rest, rtol=0.05, atol=0.02)


# ------------------------------------------------------------------ offsets and degenerate data
@pytest.mark.parametrize(
    "family", [Gaussian(), Gaussian(tied=True), DiagonalGaussian(), DiagonalGaussian(True)]
)
def test_an_offset_costs_no_digits(family, generator):
    # Multiples of 2^-20 stay exact when 1e8 is added.
    x = torch.randint(-(2**20), 2**20, (200, 2), generator=generator).double() / 2**20
    ones = torch.ones((1, 200), dtype=torch.float64)
    found = []
    for offset in (0.0, 1e8):
        bound = family.bind(as_dataset(x + offset), 1, {})
        statistics = bound.statistics(bound.observe(x + offset), ones, None, None)
        posterior = bound.block.update(statistics)
        found.append(bound.log_predictive(x + offset, posterior))
    close(found[0], found[1], 1e-6)


@pytest.mark.parametrize("family", [Gaussian(), DiagonalGaussian(), DiagonalGaussian(True)])
@pytest.mark.parametrize("kind", ["constant", "empty", "duplicate", "one row", "huge"])
def test_degenerate_columns_give_finite_scores(family, kind, generator):
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    schema = as_dataset(x).schema  # with it, a column may be empty in one data set
    match kind:
        case "constant":
            x[:, 1] = 7.0
        case "empty":
            x[:, 1] = torch.nan
        case "duplicate":
            x[:, 1] = x[:, 0]
        case "one row":
            x = x[:1]
        case "huge":
            x = x * 1e120
    bound = family.bind(as_dataset(x, schema=schema), 2, {})
    statistics = bound.statistics(
        bound.observe(x), torch.full((2, len(x)), 0.5, dtype=torch.float64), None, None
    )
    block = bound.block
    for flat in (False, True):
        values = block.maximise(statistics, flat=flat)
        scores = bound.evaluate(bound.observe(x), block.natural(values)).scores
        assert bool(torch.isfinite(scores).all())
    values = block.draw(statistics, None, generator=generator)
    assert bool(torch.isfinite(bound.log_prob(x, bound.export(values))).all())
    assert bool(torch.isfinite(bound.log_predictive(x, block.update(statistics))).all())


def test_safe_cholesky_uses_the_smallest_jitter_that_works():
    good, singular = torch.eye(2, dtype=torch.float64), torch.ones((2, 2), dtype=torch.float64)
    factor = safe_cholesky(torch.stack([4.0 * good, singular]))
    close(factor[0], 2.0 * good)
    assert float((factor[1] @ factor[1].mT - singular).abs().max()) < 2e-8
    with pytest.raises(ValueError, match="not positive definite"):
        safe_cholesky(-good)


def test_collapse_is_seen(generator):
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    for family in (Gaussian(), DiagonalGaussian(), DiagonalGaussian(True), StudentT()):
        bound = family.bind(as_dataset(x), 2, {})
        hot = torch.zeros((2, 50), dtype=torch.float64)
        hot[0, 0], hot[1, 1:] = 1.0, 1.0
        statistics = bound.statistics(bound.observe(x), hot, None, None)
        assert bool(bound.collapsed(bound.block.maximise(statistics, flat=True)))
        assert not bool(bound.collapsed(bound.block.maximise(statistics)))


# ------------------------------------------------------------------ priors
X = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 0.0]], dtype=torch.float64)


def test_wrong_priors_are_refused():
    two = torch.eye(2).double()
    wishart = NormalInverseWishart(two[0], two[0, 0], two[0, 0] * 5, two)
    inverse_gamma = NormalInverseGamma(torch.zeros(2).double(), 1.0, 2.0, 1.0)
    learned = HierarchicalNormalInverseWishart(torch.zeros(3), 1.0, 5.0, 2.0, torch.ones(3))
    uneven = NormalInverseGamma(torch.zeros(2).double(), 1.0, 2.0, torch.tensor([1.0, 2.0]))
    normal = dist.Normal(torch.zeros(2), 1.0)
    refused = [
        (Gaussian(), {"components": inverse_gamma}, "shape"),
        (Gaussian(), {"components": learned}, "3 entries"),
        (Gaussian(), {"components": wishart, "loc": normal}, "both"),
        (Gaussian(), {"loc": normal}, "together"),
        (DiagonalGaussian(), {"components": wishart}, "shape"),
        (DiagonalGaussian(), {"components": learned}, "3 entries"),
        (DiagonalGaussian(), {"components": inverse_gamma, "loc": normal}, "both"),
        (DiagonalGaussian(), {"variance": normal}, "together"),
        (DiagonalGaussian(), {"loc": normal, "variance": normal}, "support"),
        (DiagonalGaussian(spherical=True), {"components": uneven}, "same in every column"),
        (StudentT(df=3.0), {"df": dist.Gamma(2.0, 0.1)}, "drop one"),
        (StudentT(), {"df": dist.Normal(0.0, 1.0)}, "positive"),
        (StudentT(), {"df": dist.Gamma(torch.ones(2), 0.1)}, "one positive number"),
    ]
    for family, priors, message in refused:
        with pytest.raises(ValueError, match=message):
            family.bind(as_dataset(X), 2, priors)
    with pytest.raises(ValueError, match="positive finite"):
        StudentT(df=0.0)
    with pytest.raises(TypeError, match="prior of site"):
        Gaussian().bind(as_dataset(X), 2, {"components": "wide"})


def test_priors_that_are_not_conjugate_say_who_can_use_them():
    loc = dist.Normal(torch.zeros(2), 1.0)
    bound = DiagonalGaussian().bind(
        as_dataset(X), 2, {"loc": loc, "variance": dist.LogNormal(torch.zeros(2), 1.0)}
    )
    with pytest.raises(TypeError, match="NUTS or SVI"):
        _ = bound.block
    bound = StudentT().bind(as_dataset(X), 2, {"df": lambda: dist.Gamma(2.0, 0.1)})
    with pytest.raises(TypeError, match="NUTS or SVI"):
        _ = bound.block


def test_a_given_prior_is_used_in_the_datas_units():
    loc = torch.tensor([100.0, -50.0], dtype=torch.float64)
    prior = NormalInverseWishart(
        loc, torch.tensor(1e6).double(), torch.tensor(9.0).double(), torch.eye(2).double()
    )
    bound = Gaussian().bind(as_dataset(X), 1, {"components": prior})
    ones = torch.ones((1, 3), dtype=torch.float64)
    statistics = bound.statistics(bound.observe(X), ones, None, None)
    values = bound.export(bound.block.maximise(statistics))
    torch.testing.assert_close(values["loc"][0], loc, rtol=1e-3, atol=1e-3)
    prior = NormalInverseGamma(loc, 1e6, 9.0, 1.0).to_event(0)
    bound = DiagonalGaussian().bind(as_dataset(X), 1, {"components": prior})
    statistics = bound.statistics(bound.observe(X), ones, None, None)
    values = bound.export(bound.block.maximise(statistics))
    torch.testing.assert_close(values["loc"][0], loc, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_a_hierarchical_prior_left_open_is_scaled_to_the_data(covariance, tmp_path) -> None:
    """Its hyperprior expects what the default prior fixes; units of the columns do not matter."""
    x = torch.randn((40, 2), dtype=torch.float64, generator=rng.make_generator(3))
    x = x * torch.tensor([1.0, 1.0 if covariance == "spherical" else 1e4]) + 7.0
    prior = HierarchicalNormalInverseWishart(shape=2.0)
    model = GaussianMixture(3, covariance, priors={"components": prior})
    bound = model.bind(as_dataset(x))
    numbers = bound.priors["components"].numbers
    torch.testing.assert_close(numbers.loc, x.mean(0))
    assert numbers.df == 4.0
    expected = numbers.shape / numbers.rate
    default = GaussianMixture(3, covariance).bind(as_dataset(x)).all_priors["components"]
    if covariance in ("full", "tied"):
        torch.testing.assert_close(expected, default.scale_tril.diagonal().square())
    else:
        torch.testing.assert_close(0.5 * expected, default.rate.expand(2))
    fit = EM(num_starts=1, max_steps=3).run(model, x)
    fit.save(tmp_path)
    assert torch.equal(bayesgen.load(tmp_path).log_prob(x), fit.log_prob(x))


def test_open_hierarchical_priors_say_what_they_need() -> None:
    with pytest.raises(ValueError, match="no data are known here"):
        _ = HierarchicalNormalInverseWishart().numbers
    wrong = HierarchicalNormalInverseWishart(loc=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(d,\)"):
        GaussianMixture(2, priors={"components": wrong}).bind(as_dataset(torch.eye(2)))
