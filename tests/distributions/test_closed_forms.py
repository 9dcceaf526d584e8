"""Covariance priors against scipy and against closed forms worked out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from bayesgen.distributions import (
    InverseWishart,
    InverseWishartCholesky,
    NormalInverseGamma,
    NormalInverseWishart,
)
from tests.distributions.cases import factor, spread, z_score

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def tensor(value) -> Tensor:
    return torch.as_tensor(np.asarray(value), dtype=F64)


def prior(dim: int = 3, df: float = 6.5) -> NormalInverseWishart:
    loc = torch.linspace(-1.0, 2.0, dim, dtype=F64)
    return NormalInverseWishart(loc, 1.7, df, factor(dim, 3))


@pytest.mark.parametrize(("dim", "df"), [(1, 0.5), (1, 30.0), (2, 1.2), (4, 9.0)])
def test_inverse_wishart_is_scipys(dim, df):
    dist = InverseWishart(df, factor(dim, 0))
    peer = stats.invwishart(df, (dist.scale_tril @ dist.scale_tril.mT).numpy())
    draws = spread(InverseWishart(dim + 3.0, dist.scale_tril), 30)
    expected = tensor([peer.logpdf(value.numpy()) for value in draws]).reshape(30)
    torch.testing.assert_close(dist.log_prob(draws), expected, **TIGHT)
    # Not peer.entropy(): SciPy 1.17 takes log|Psi| - log 2 for log|Psi / 2|, off by
    # (d + 1)(d - 1) / 2 log 2.
    half = 0.5 * df
    log_det = 2.0 * float(dist.scale_tril.diagonal().log().sum()) - dim * math.log(2.0)
    entropy = special.multigammaln(half, dim) + half * dim + 0.5 * (dim + 1) * log_det
    entropy -= 0.5 * (df + dim + 1) * special.digamma(half - 0.5 * np.arange(dim)).sum()
    torch.testing.assert_close(dist.entropy(), tensor(entropy), **TIGHT)
    torch.testing.assert_close(dist.mode, tensor(peer.mode()).reshape(dim, dim), **TIGHT)
    if df > dim + 3:
        torch.testing.assert_close(dist.mean, tensor(peer.mean()).reshape(dim, dim), **TIGHT)
        torch.testing.assert_close(dist.variance, tensor(peer.var()).reshape(dim, dim), **TIGHT)
    else:
        assert dist.variance.isnan().all()


def test_inverse_wishart_of_one_column_is_inverse_gamma():
    dist = InverseWishart(7.0, factor(1, 0))
    value = torch.linspace(0.1, 9.0, 20, dtype=F64).reshape(20, 1, 1)
    rate = float(dist.scale_tril.square()) / 2
    expected = stats.invgamma(3.5, scale=rate).logpdf(value[:, 0, 0].numpy())
    torch.testing.assert_close(dist.log_prob(value), tensor(expected), **TIGHT)


def test_expectations_of_the_precision():
    dist = InverseWishartCholesky(5.5, factor(3, 0))
    draws = spread(dist, 40_000)
    precision = torch.cholesky_inverse(draws)
    assert z_score(precision, dist.expected_precision()) < 4.5
    assert z_score(precision.logdet(), dist.expected_log_det_precision()) < 4.5
    inverse = torch.linalg.inv(dist.scale_tril @ dist.scale_tril.mT)
    torch.testing.assert_close(dist.expected_precision(), 5.5 * inverse, **TIGHT)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_modes_are_stationary(batch):
    dist = InverseWishartCholesky(5.5, factor(3, 0, *batch))
    at = dist.factor_mode.clone().requires_grad_()
    torch.autograd.backward(dist.log_prob(at).sum())
    torch.testing.assert_close(at.grad.tril(), torch.zeros_like(at), **TIGHT)

    matrix = InverseWishart(5.5, factor(3, 0, *batch))
    torch.testing.assert_close(dist.mode @ dist.mode.mT, matrix.mode, **TIGHT)
    at = dist.mode.clone().requires_grad_()  # stationary in any coordinates of the matrix
    torch.autograd.backward(matrix.log_prob(at @ at.mT).sum())
    torch.testing.assert_close(at.grad.tril(), torch.zeros_like(at), **TIGHT)


def test_normal_inverse_wishart_is_the_product_of_its_parts():
    dist = prior()
    value = spread(dist, 20)
    loc, scale_tril = dist.unpack(value)
    matrix = scale_tril @ scale_tril.mT
    psi = (dist.scale_tril @ dist.scale_tril.mT).numpy()
    jacobian = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    for i in range(20):
        expected = stats.invwishart(6.5, psi).logpdf(matrix[i].numpy())
        expected += stats.multivariate_normal(dist.loc, matrix[i] / 1.7).logpdf(loc[i].numpy())
        expected += float(jacobian @ scale_tril[i].diagonal().log()) + 3 * math.log(2.0)
        assert float(dist.log_prob(value[i])) == pytest.approx(expected, abs=1e-10)
    parts = dist.scale_tril_marginal().log_prob(scale_tril)
    parts = parts + dist.loc_given(scale_tril).log_prob(loc)
    torch.testing.assert_close(dist.log_prob(value), parts, **TIGHT)
    torch.testing.assert_close(dist.pack(loc, scale_tril), value)


def test_normal_inverse_wishart_modes_are_stationary():
    dist = prior()
    at = dist.factor_mode.clone().requires_grad_()
    torch.autograd.backward(dist.log_prob(at))
    torch.testing.assert_close(at.grad.tril(1), torch.zeros_like(at), **TIGHT)

    loc, scale_tril = dist.unpack(dist.mode)
    psi = dist.scale_tril @ dist.scale_tril.mT
    torch.testing.assert_close(scale_tril @ scale_tril.mT, psi / (6.5 + 3 + 2), **TIGHT)
    loc, scale_tril = loc.requires_grad_(), scale_tril.clone().requires_grad_()
    matrix = scale_tril @ scale_tril.mT
    density = InverseWishart(6.5, dist.scale_tril).log_prob(matrix)
    density = density + dist.loc_given(scale_tril).log_prob(loc)
    along_loc, along_scale = torch.autograd.grad(density, (loc, scale_tril))
    torch.testing.assert_close(along_loc, torch.zeros_like(loc), **TIGHT)
    torch.testing.assert_close(along_scale.tril(), torch.zeros_like(matrix), **TIGHT)


def test_expected_natural_parameters():
    dist = prior()
    loc, scale_tril = dist.unpack(spread(dist, 40_000))
    precision = torch.cholesky_inverse(scale_tril)
    weighted = (precision @ loc.unsqueeze(-1)).squeeze(-1)
    natural = dist.expected_natural()
    assert z_score(precision, natural.precision) < 4.5
    assert z_score(weighted, natural.precision_loc) < 4.5
    assert z_score((weighted * loc).sum(-1), natural.loc_precision_loc) < 4.5
    assert z_score(precision.logdet(), natural.log_det_precision) < 4.5


def test_expected_natural_parameters_are_derivatives_of_the_normaliser():
    """Of an exponential family; reaches 1e-10, where Monte Carlo does not."""
    dist = prior()
    psi, loc = dist.scale_tril @ dist.scale_tril.mT, dist.loc
    kappa, df = dist.mean_precision, dist.df
    eta = (psi + kappa * torch.outer(loc, loc), kappa * loc, kappa.clone(), df + 5.0)
    eta = tuple(t.detach().requires_grad_() for t in eta)

    def normaliser(second, first, weight, power):
        centre = first / weight
        scale = torch.linalg.cholesky(second - weight * torch.outer(centre, centre))
        return NormalInverseWishart(centre, weight, power - 5.0, scale).log_normalizer()

    second, first, weight, power = torch.autograd.grad(normaliser(*eta), eta)
    natural = dist.expected_natural()
    torch.testing.assert_close(-(second + second.mT), natural.precision, **TIGHT)
    torch.testing.assert_close(first, natural.precision_loc, **TIGHT)
    torch.testing.assert_close(-2.0 * weight, natural.loc_precision_loc, **TIGHT)
    torch.testing.assert_close(2.0 * power, natural.log_det_precision, **TIGHT)


def test_evidence_and_predictive_agree():
    """log p(x_1..n) from normalisers is the sum of one-step-ahead Student-t predictives."""
    dist = prior()
    x = torch.randn(12, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2.0 + 5.0
    mean = x.mean(0)
    posterior = dist.posterior(12.0, mean, (x - mean).mT @ (x - mean))
    evidence = posterior.log_normalizer() - dist.log_normalizer() - 18 * math.log(2 * math.pi)
    total, step = torch.zeros((), dtype=F64), dist
    for row in x:
        predictive = step.predictive()
        total = total + predictive.log_prob(row)
        shape = (predictive.scale_tril @ predictive.scale_tril.mT).numpy()
        peer = stats.multivariate_t(predictive.loc.numpy(), shape, float(predictive.df))
        assert float(predictive.log_prob(row)) == pytest.approx(
            peer.logpdf(row.numpy()), abs=1e-10
        )
        step = step.posterior(1.0, row, torch.zeros(3, 3, dtype=F64))
    torch.testing.assert_close(evidence, total, **TIGHT)
    torch.testing.assert_close(step.scale_tril, posterior.scale_tril, **TIGHT)
    torch.testing.assert_close(step.loc, posterior.loc, **TIGHT)


def test_posterior_without_data_is_the_prior_and_survives_an_offset():
    dist = prior()
    nothing = dist.posterior(
        0.0, torch.full((3,), math.nan, dtype=F64), torch.zeros(3, 3).double()
    )
    torch.testing.assert_close(nothing.scale_tril, dist.scale_tril, **TIGHT)
    torch.testing.assert_close(nothing.loc, dist.loc)
    x = torch.randn(50, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    scatter = (x - x.mean(0)).mT @ (x - x.mean(0))
    far = NormalInverseWishart(dist.loc + 1e8, 1.7, 6.5, dist.scale_tril)
    near, far = (
        dist.posterior(50.0, x.mean(0), scatter),
        far.posterior(50.0, x.mean(0) + 1e8, scatter),
    )
    torch.testing.assert_close(near.scale_tril, far.scale_tril, rtol=1e-6, atol=1e-6)


def test_marginal_of_the_mean():
    dist = prior(2, 7.0)
    loc, _ = dist.unpack(spread(dist, 4000))
    marginal = dist.loc_marginal()
    z = torch.linalg.solve_triangular(
        marginal.scale_tril, (loc - dist.loc).unsqueeze(-1), upper=False
    )[:, 0, 0]
    assert stats.kstest(z.numpy(), stats.t(float(marginal.df)).cdf).pvalue > 1e-3


def test_everything_broadcasts_over_batches():
    """One batched call equals the calls on its parts."""
    loc = torch.randn(4, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    kappa, df = tensor([0.5, 2.0]), tensor([[4.0], [5.0], [6.0], [7.0]])
    dist = NormalInverseWishart(loc, kappa, df, factor(3, 0, 2))
    assert dist.batch_shape == (4, 2)
    value = spread(dist, 5)
    log_prob, natural, predictive = (
        dist.log_prob(value),
        dist.expected_natural(),
        dist.predictive(),
    )
    for i in range(4):
        for j in range(2):
            one = NormalInverseWishart(loc[i, 0], kappa[j], df[i, 0], factor(3, 0, 2)[j])
            torch.testing.assert_close(log_prob[:, i, j], one.log_prob(value[:, i, j]), **TIGHT)
            for whole, part in zip(natural, one.expected_natural(), strict=True):
                torch.testing.assert_close(whole[i, j], part, **TIGHT)
            row = value[0, i, j, :, 0]
            expected = one.predictive().log_prob(row)
            torch.testing.assert_close(predictive.log_prob(row)[i, j], expected, **TIGHT)


def test_normal_inverse_gamma_is_scipys():
    dist = NormalInverseGamma(tensor(0.3), 1.7, 2.5, 0.8)
    peer = stats.normal_inverse_gamma(0.3, 1.7, 2.5, 0.8)
    loc, variance = dist.unpack(spread(dist, 20))
    expected = tensor(peer.logpdf(loc.numpy(), variance.numpy()))
    torch.testing.assert_close(dist.log_prob(dist.pack(loc, variance)), expected, **TIGHT)
    torch.testing.assert_close(dist.mean, tensor(peer.mean()), **TIGHT)
    torch.testing.assert_close(dist.variance, tensor(peer.var()), **TIGHT)


def test_normal_inverse_gamma_is_the_wishart_of_one_column():
    narrow = NormalInverseGamma(tensor(0.3), 1.7, 2.5, 0.8)
    wide = NormalInverseWishart(tensor([0.3]), 1.7, 5.0, tensor([[math.sqrt(1.6)]]))
    value = spread(wide, 10)
    loc, root = value[:, 0, 0], value[:, 0, 1]
    moved = narrow.log_prob(narrow.pack(loc, root.square())) + root.log() + math.log(2.0)
    torch.testing.assert_close(moved, wide.log_prob(value), **TIGHT)
    for a, b in zip(narrow.expected_natural(), wide.expected_natural(), strict=True):
        torch.testing.assert_close(a, b.squeeze(), **TIGHT)
    x = torch.linspace(-3.0, 3.0, 7, dtype=F64)
    torch.testing.assert_close(
        narrow.predictive().log_prob(x), wide.predictive().log_prob(x.unsqueeze(-1)), **TIGHT
    )
    torch.testing.assert_close(
        narrow.loc_marginal().log_prob(x), wide.loc_marginal().log_prob(x.unsqueeze(-1)), **TIGHT
    )
    scatter = (x - x.mean()).square().sum()
    left = narrow.posterior(7.0, x.mean(), scatter)
    right = wide.posterior(7.0, x.mean().reshape(1), scatter.reshape(1, 1))
    difference = (left.log_normalizer() - narrow.log_normalizer()) - (
        right.log_normalizer() - wide.log_normalizer()
    )
    torch.testing.assert_close(difference, torch.zeros((), dtype=F64), **TIGHT)
    torch.testing.assert_close(left.mode[0], right.mode[0, 0], **TIGHT)
    parts = narrow.variance_marginal().log_prob(root.square())
    parts = parts + narrow.loc_given(root.square()).log_prob(loc)
    torch.testing.assert_close(narrow.log_prob(narrow.pack(loc, root.square())), parts, **TIGHT)


EYE = torch.eye(3, dtype=F64)
IMPOSSIBLE = [
    (lambda: InverseWishartCholesky(2.0, EYE), "df must be finite and larger than d - 1 = 2"),
    (lambda: InverseWishartCholesky(math.nan, EYE), "df must be finite"),
    (lambda: InverseWishart(tensor([5.0, 1.0]), EYE), "smallest given is 1"),
    (lambda: InverseWishart(5.0, torch.ones(3, 3).double()), "lower triangular"),
    (lambda: InverseWishart(5.0, -EYE), "diagonal entry that is not positive"),
    (lambda: InverseWishart(5.0, EYE * math.inf), "NaN or infinite"),
    (lambda: InverseWishart(5.0, EYE[0]), "must be"),
    (lambda: InverseWishart(5.0, EYE[:2]), "must be"),
    (lambda: NormalInverseWishart(0.0, 0.0, 5.0, EYE), "mean_precision must be positive"),
    (lambda: NormalInverseWishart(EYE[0, :2], 1.0, 5.0, EYE), "loc has 2 entries"),
    (lambda: NormalInverseWishart(0.0, 1.0, 1.9, EYE), "larger than d - 1"),
    (lambda: NormalInverseWishart(tensor([0, 1, math.nan]), 1.0, 5.0, EYE), "loc"),
    (lambda: NormalInverseGamma(tensor(0.0), 1.0, -1.0, 1.0), "concentration must be positive"),
    (lambda: NormalInverseGamma(tensor(0.0), 1.0, 1.0, math.inf), "rate must be positive"),
    (lambda: InverseWishartCholesky(5.0, EYE).log_prob(torch.ones(3, 3).double()), "support"),
    (lambda: NormalInverseWishart(0.0, 1.0, 5.0, EYE).log_prob(-torch.ones(3, 4)), "support"),
    (lambda: NormalInverseGamma(tensor(0.0), 1.0, 1.0, 1.0).log_prob(tensor([0, -1])), "support"),
]


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_types_are_checked_and_validation_can_be_switched_off():
    with pytest.raises(TypeError, match="floating point"):
        InverseWishart(5.0, torch.eye(3, dtype=torch.long))
    quiet = InverseWishartCholesky(1.0, EYE, validate_args=False)
    assert not torch.isfinite(quiet.mean).any()
