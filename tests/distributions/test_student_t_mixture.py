"""Mixtures of multivariate Student-t distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy import stats
from torch import Tensor

from bayesgen.distributions import StudentTMixture
from bayesgen.distributions._special import student_t_cdf
from tests.distributions.cases import factor, z_score

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
DEGREES = torch.tensor([6.0, 9.0, 30.0], dtype=F64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixture(dim: int = 2) -> StudentTMixture:
    return StudentTMixture(WEIGHTS, DEGREES, 3.0 * draw(3, dim), factor(dim, 0, 3))


def holes(x: Tensor) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    return torch.where(noise < 0.4, math.nan, x)


@pytest.mark.parametrize("dim", [1, 3])
def test_log_prob_is_scipys(dim):
    dist, x = mixture(dim), holes(5.0 * draw(40, dim, seed=1))
    matrix = dist.scale_tril @ dist.scale_tril.mT
    for row, value in zip(x, dist.log_prob(x), strict=True):
        seen = ~torch.isnan(row)
        if not seen.any():
            assert float(value) == pytest.approx(0.0, abs=1e-12)
            continue
        density = 0.0
        for k in range(3):
            shape = matrix[k][seen][:, seen].numpy()
            peer = stats.multivariate_t(dist.loc[k, seen].numpy(), shape, float(DEGREES[k]))
            density += float(WEIGHTS[k]) * peer.pdf(row[seen].numpy())
        assert float(value) == pytest.approx(math.log(density), abs=1e-10)


def test_samples_fit_the_density():
    dist = mixture()
    draws = dist.sample((20_000,), generator=torch.Generator().manual_seed(0))
    assert auto_goodness_of_fit(draws, dist.log_prob(draws).exp()) > 1e-3
    wrong = StudentTMixture(WEIGHTS, DEGREES, dist.loc + 0.3, dist.scale_tril)
    assert auto_goodness_of_fit(draws, wrong.log_prob(draws).exp()) < 1e-6
    assert z_score(draws, dist.mean) < 4.5
    centred = draws - dist.mean
    outer = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert z_score(outer, dist.covariance_matrix) < 4.5
    torch.testing.assert_close(dist.variance, dist.covariance_matrix.diagonal())


def test_samples_of_a_batch():
    dist = StudentTMixture(WEIGHTS, 8.0, 3.0 * draw(4, 1, 3, 2), factor(2, 0, 5, 3))
    assert dist.batch_shape == (4, 5)
    draws = dist.sample((8000,), generator=torch.Generator().manual_seed(0))
    assert draws.shape == (8000, 4, 5, 2)
    assert z_score(draws, dist.mean) < 4.8
    assert torch.equal(draws, dist.sample((8000,), generator=torch.Generator().manual_seed(0)))


def test_integrates_to_one():
    """In two dimensions, with steps that grow as sinh; in one by the distribution function."""
    dist = mixture()
    steps = torch.linspace(-8.0, 8.0, 900, dtype=F64)
    grid = torch.cartesian_prod(steps, steps)
    density = dist.log_prob(dist.mean + torch.sinh(grid)).exp() * torch.cosh(grid).prod(-1)
    assert float(density.sum() * (steps[1] - steps[0]) ** 2) == pytest.approx(1.0, abs=1e-5)


def test_batches_and_expand():
    loc = 3.0 * draw(4, 1, 3, 2)
    dist = StudentTMixture(WEIGHTS, DEGREES, loc, factor(2, 0, 3))
    x = holes(draw(4, 6, 2, seed=2))
    got = dist.log_prob(x)
    assert got.shape == (4, 6)
    for i in range(4):
        one = StudentTMixture(WEIGHTS, DEGREES, loc[i, 0], factor(2, 0, 3))
        torch.testing.assert_close(got[i], one.log_prob(x[i]), **TIGHT)
    wide = dist.expand(torch.Size((4, 6)))
    torch.testing.assert_close(wide.log_prob(x), got, **TIGHT)
    assert wide.sample(generator=torch.Generator().manual_seed(0)).shape == (4, 6, 2)
    torch.testing.assert_close(wide.mean[:, 0], dist.mean[:, 0])


def test_marginal_condition_and_responsibilities():
    dist, x = mixture(4), draw(15, 4, seed=3)
    observed = torch.tensor([False, True, True, False])
    marginal = dist.marginal(observed).log_prob(x[:, observed])
    condition = dist.condition(torch.where(observed, x, math.nan), observed)
    total = marginal + condition.log_prob(x[:, ~observed])
    torch.testing.assert_close(total, dist.log_prob(x), **TIGHT)
    torch.testing.assert_close(
        condition.weights, dist.responsibilities(torch.where(observed, x, math.nan)), **TIGHT
    )
    assert dist.marginal([2, 0]).event_shape == (2,)


def test_cdf_is_scipys_and_its_derivative_the_density():
    dist = mixture(1)
    x = torch.linspace(-30.0, 30.0, 61, dtype=F64).unsqueeze(-1).requires_grad_()
    got = dist.cdf(x)
    expected = sum(
        float(w) * stats.t(float(df), float(m), float(s)).cdf(x.detach().numpy()[:, 0])
        for w, df, m, s in zip(WEIGHTS, DEGREES, dist.loc, dist.scale_tril, strict=True)
    )
    torch.testing.assert_close(got.detach(), torch.as_tensor(expected), **TIGHT)
    (slope,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(slope[:, 0], dist.log_prob(x).exp().detach(), **TIGHT)


@pytest.mark.parametrize("df", [0.1, 1.0, 3.3, 29.9, 30.1, 1e3, 1e6, 1e12])
def test_student_t_cdf_in_both_tails(df):
    z = torch.as_tensor(np.concatenate([-np.logspace(-3, 6, 60), [0.0], np.logspace(-3, 3, 20)]))
    degrees = torch.tensor(df, dtype=F64)
    expected = torch.as_tensor(stats.t(df).cdf(z.numpy()))
    got = student_t_cdf(z, degrees)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-13)
    large = expected > 1e-290
    torch.testing.assert_close(got[large], expected[large], rtol=1e-11, atol=0.0)
    narrow = student_t_cdf(z.float(), degrees.float()).double()
    torch.testing.assert_close(narrow, expected, rtol=0.0, atol=1e-6)
    ends = student_t_cdf(torch.tensor([-math.inf, math.inf]), torch.tensor(df))
    assert ends.tolist() == [0.0, 1.0]


def test_student_t_cdf_gradients():
    z = torch.tensor([-30.0, -0.7, 0.2, 1.1, 4.0], dtype=F64, requires_grad=True)
    df = torch.tensor([0.7, 2.0, 4.5, 40.0, 500.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(student_t_cdf, (z, df))
    zero = torch.zeros(2, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(student_t_cdf(zero, torch.tensor([3.0, 50.0])).sum(), zero)[0]
    torch.testing.assert_close(slope, torch.as_tensor(stats.t([3.0, 50.0]).pdf(0.0)))


def test_gradients():
    x = holes(draw(5, 2, seed=4))
    start = (draw(3), draw(3).exp() + 1.0, draw(3, 2), factor(2, 0, 3))
    start = tuple(each.clone().requires_grad_() for each in start)

    def run(logits, df, loc, scale_tril):
        return StudentTMixture(None, df, loc, scale_tril.tril(), logits=logits).log_prob(x)

    assert torch.autograd.gradcheck(run, start)


def test_float32_and_empty_components():
    narrow = StudentTMixture(WEIGHTS.float(), DEGREES, mixture().loc, factor(2, 0, 3).float())
    x = draw(20, 2)
    assert narrow.log_prob(x.float()).dtype == torch.float32
    torch.testing.assert_close(
        narrow.log_prob(x.float()).double(), mixture().log_prob(x), rtol=1e-4, atol=1e-4
    )
    one = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    degrees = torch.tensor([6.0, 0.5, 1.5], dtype=F64)  # an empty component may lack moments
    dist = StudentTMixture(one, degrees, mixture().loc, factor(2, 0, 3))
    torch.testing.assert_close(dist.mean, mixture().loc[0])
    assert torch.isfinite(dist.covariance_matrix).all()
    assert torch.isfinite(dist.log_prob(x)).all()
    heavy = StudentTMixture(WEIGHTS, 2.0, mixture().loc, factor(2, 0, 3))
    assert torch.isfinite(heavy.mean).all()
    assert torch.isnan(heavy.variance).all()


LOC, SCALE = torch.zeros(3, 2, dtype=F64), factor(2, 0, 3)
IMPOSSIBLE = [
    (lambda: StudentTMixture(None, 3.0, LOC, SCALE), "exactly one"),
    (lambda: StudentTMixture(WEIGHTS, 3.0, LOC, SCALE, logits=WEIGHTS), "exactly one"),
    (lambda: StudentTMixture(-WEIGHTS, 3.0, LOC, SCALE), "weights must be finite, not negative"),
    (lambda: StudentTMixture(0 * WEIGHTS, 3.0, LOC, SCALE), "not all of them zero"),
    (lambda: StudentTMixture(None, 3.0, LOC, SCALE, logits=WEIGHTS * math.nan), "logits"),
    (lambda: StudentTMixture(WEIGHTS, 0.0, LOC, SCALE), "df must be positive"),
    (lambda: StudentTMixture(WEIGHTS, math.inf, LOC, SCALE), "df must be positive"),
    (lambda: StudentTMixture(WEIGHTS, 3.0, LOC + math.nan, SCALE), "loc holds NaN"),
    (lambda: StudentTMixture(WEIGHTS, 3.0, LOC, SCALE.mT), "lower triangular"),
    (lambda: StudentTMixture(WEIGHTS, 3.0, LOC, SCALE[0]), "must be"),
    (lambda: StudentTMixture(WEIGHTS[:2], 3.0, LOC, SCALE), "do not fit"),
    (lambda: mixture(2).cdf(LOC[0]), "needs one column"),
    (lambda: mixture(2).log_prob(LOC[0] + math.inf), "support"),
]


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
