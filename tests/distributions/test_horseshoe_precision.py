"""The horseshoe's precision: a half-Cauchy in disguise, and a Gamma of Gamma rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bayesgen import rng
from bayesgen.distributions import HorseshoePrecision
from bayesgen.models.linear.relevance import Relevance

__all__: list[str] = []

SCALES = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES.tolist())
def test_its_inverse_root_is_half_cauchy(scale):
    law = HorseshoePrecision(torch.tensor(scale, dtype=torch.float64))
    root = torch.tensor([1e-4, 0.3, 1.0, 7.0, 1e5], dtype=torch.float64) * scale
    expected = stats.halfcauchy(scale=scale).logpdf(root.numpy())
    found = law.log_prob(root.square().reciprocal()) + math.log(2.0) - 3.0 * root.log()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    draws = law.sample((4000,), generator=rng.make_generator(0)).rsqrt()
    assert stats.kstest(draws.numpy(), stats.halfcauchy(scale=scale).cdf).pvalue > 1e-3


def test_it_is_a_gamma_whose_rate_is_gamma():
    scale, precision = 2.0, 0.7
    rate = integrate.quad(
        lambda r: (
            stats.gamma(0.5, scale=1 / r).pdf(precision) * stats.gamma(0.5, scale=scale**2).pdf(r)
        ),
        0,
        np.inf,
    )[0]
    law = HorseshoePrecision(torch.tensor(scale, dtype=torch.float64))
    assert float(law.log_prob(torch.tensor(precision).double())) == pytest.approx(math.log(rate))


def test_batches_and_refusals():
    law = HorseshoePrecision(SCALES)
    assert law.batch_shape == (3,)
    assert law.expand([2, 3]).sample((4,), generator=rng.make_generator(0)).shape == (4, 2, 3)
    with pytest.raises(ValueError, match="scale"):
        HorseshoePrecision(torch.tensor(-1.0), validate_args=True)


@pytest.mark.parametrize("is_horseshoe", [False, True])
def test_the_block_s_prior_is_the_distribution(is_horseshoe):
    shape = torch.full((3,), 0.5 if is_horseshoe else 2.0, dtype=torch.float64)
    prior = Relevance(shape, SCALES.square().reciprocal(), is_horseshoe)
    precision = torch.tensor([3.0, 0.01, 7.0], dtype=torch.float64)
    law = (
        HorseshoePrecision(SCALES)
        if is_horseshoe
        else torch.distributions.Gamma(shape, prior.rate)
    )
    expected = (law.log_prob(precision) + precision.log()).sum()
    torch.testing.assert_close(prior.log_prior(precision), expected)


@pytest.mark.parametrize("is_horseshoe", [False, True])
def test_kl_of_precisions_and_rates(is_horseshoe):
    """Against the mean of log q - log p over draws of both."""
    shape = torch.full((3,), 0.5 if is_horseshoe else 2.0, dtype=torch.float64)
    prior = Relevance(shape, SCALES.square().reciprocal(), is_horseshoe)
    square = torch.tensor([4.0, 0.1, 30.0], dtype=torch.float64)
    posterior = prior.update(None, square, 5)
    posterior = prior.update(posterior, square, 5)
    size, generator, gamma = 100_000, rng.make_generator(1), torch.distributions.Gamma
    q = gamma(posterior["relevance_concentration"], posterior["relevance_rate"])
    alpha = rng.gamma(q.concentration.expand(size, 3), generator) / q.rate
    terms = q.log_prob(alpha)
    rate = prior.rate.expand(size, 3)
    if is_horseshoe:
        r = gamma(posterior["rate_concentration"], posterior["rate_rate"])
        rate = rng.gamma(r.concentration.expand(size, 3), generator) / r.rate
        terms = (
            terms
            + r.log_prob(rate)
            - gamma(0.5 * torch.ones(3).double(), prior.rate).log_prob(rate)
        )
    terms = (terms - gamma(shape, rate).log_prob(alpha)).sum(-1)
    error = float(terms.std()) / size**0.5
    assert abs(float(terms.mean() - prior.kl(posterior))) < 4 * error
