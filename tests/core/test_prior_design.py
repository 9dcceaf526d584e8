"""The law of the number of clusters against enumeration and simulation, and its inversion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bayesgen import occupancy, prior_design, priors, rng
from bayesgen.distributions import NormalInverseGamma, NormalInverseWishart

__all__: list[str] = []


def enumerate_clusters(log_prob, num_rows, num_components):
    """Sum the exact probability of every one of ``K**n`` labellings."""
    pmf = torch.zeros(num_components + 1, dtype=torch.float64)
    for labels in itertools.product(range(num_components), repeat=num_rows):
        counts = [labels.count(k) for k in range(num_components)]
        pmf[sum(c > 0 for c in counts)] += math.exp(log_prob(counts))
    return pmf


def dirichlet_multinomial(a, counts):
    total = a * len(counts)
    log_prob = math.lgamma(total) - math.lgamma(sum(counts) + total)
    return log_prob + sum(math.lgamma(a + c) - math.lgamma(a) for c in counts)


def stick_multinomial(alpha, counts):
    log_prob, left = 0.0, sum(counts)
    for c in counts[:-1]:
        left -= c
        log_prob += math.log(alpha) + math.lgamma(1 + c) + math.lgamma(alpha + left)
        log_prob -= math.lgamma(1 + alpha + c + left)
    return log_prob


@pytest.mark.parametrize("a", [0.02, 0.5, 3.0])
@pytest.mark.parametrize(("n", "k"), [(1, 3), (6, 3), (4, 5), (7, 1)])
def test_dirichlet_equals_enumeration(a, n, k):
    expected = enumerate_clusters(lambda counts: dirichlet_multinomial(a, counts), n, k)
    pmf = occupancy.dirichlet_clusters(a, num_rows=n, num_components=k)
    assert torch.allclose(pmf, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.02, 1.0, 7.0])
@pytest.mark.parametrize(("n", "k"), [(1, 3), (6, 3), (4, 5), (7, 1)])
def test_stick_breaking_equals_enumeration(alpha, n, k):
    expected = enumerate_clusters(lambda counts: stick_multinomial(alpha, counts), n, k)
    pmf = occupancy.stick_breaking_clusters(alpha, num_rows=n, num_components=k)
    assert torch.allclose(pmf, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("a", [0.01, 0.3])
def test_the_shortcut_for_many_rows_equals_the_plain_recursion(a):
    n, k = 5000, 8
    counts = torch.arange(k + 1, dtype=torch.float64)
    pmf = torch.zeros(k + 1, dtype=torch.float64)
    pmf[0] = 1.0
    for m in range(n):
        new = (pmf * (k - counts) * a)[:-1]
        pmf = pmf * (m + counts * a)
        pmf[1:] += new
        pmf /= m + k * a
    found = occupancy.dirichlet_clusters(a, num_rows=n, num_components=k)
    assert torch.allclose(found, pmf, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 50, 10**9])
@pytest.mark.parametrize("a", [1e-4, 0.05, 2.0])
def test_expectation_of_the_dirichlet_law(n, a):
    pmf = occupancy.dirichlet_clusters(a, num_rows=n, num_components=30)
    closed = occupancy.expected_clusters(a, num_rows=n, num_components=30)
    assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(pmf @ torch.arange(31.0, dtype=torch.float64)) == pytest.approx(closed, abs=1e-9)


@pytest.mark.parametrize("n", [1, 40, 3000])
@pytest.mark.parametrize("alpha", [0.05, 1.0, 30.0])
def test_expectation_of_the_stick_breaking_law(n, alpha):
    pmf = occupancy.stick_breaking_clusters(alpha, num_rows=n, num_components=12)
    quadrature = occupancy.expected_clusters(
        alpha, num_rows=n, num_components=12, kind="stick-breaking"
    )
    mean = float(pmf @ torch.arange(13.0, dtype=torch.float64))
    assert quadrature == pytest.approx(mean, abs=1e-7)


def test_untruncated_sticks_are_antoniak():
    # The Dirichlet process: E K = sum_i alpha / (alpha + i - 1), truncation far out of reach.
    pmf = occupancy.stick_breaking_clusters(0.7, num_rows=25, num_components=60)
    expected = sum(0.7 / (0.7 + i) for i in range(25))
    assert float(pmf @ torch.arange(61.0, dtype=torch.float64)) == pytest.approx(
        expected, abs=1e-9
    )
    # Stirling numbers of the first kind by their recursion.
    law = torch.zeros(61, dtype=torch.float64)
    law[0] = 1.0
    for i in range(25):
        moved = law * i / (0.7 + i)
        moved[1:] += law[:-1] * 0.7 / (0.7 + i)
        law = moved
    assert torch.allclose(pmf, law, atol=1e-9)


PRIORS = {
    "dirichlet": priors.SymmetricDirichlet(0.2),
    "gamma": priors.GammaDirichlet(1.0, 10.0),
    "wide gamma": priors.GammaDirichlet(0.2, 0.1),
    "sticks": priors.StickBreaking(1.5),
    "learned sticks": priors.StickBreaking(shape=2.0, rate=2.0),
}


def draw_weights(prior, num, k, generator):
    """An independent sampler of the weights of each description."""
    ones = torch.ones(num, k, dtype=torch.float64)
    if isinstance(prior, priors.StickBreaking):
        if prior.concentration is None:
            alpha = rng.gamma(ones[:, :1] * prior.shape, generator) / prior.rate
        else:
            alpha = ones[:, :1] * prior.concentration
        v = 1.0 - torch.rand(num, k, generator=generator, dtype=torch.float64) ** (1.0 / alpha)
        v[:, -1] = 1.0
        return v * torch.cat([ones[:, :1], (1 - v[:, :-1]).cumprod(-1)], -1)
    if isinstance(prior, priors.GammaDirichlet):
        a = rng.gamma(ones[:, :1] * prior.shape, generator) / prior.rate
        return rng.log_dirichlet(a.clamp_min(1e-30) * ones, generator).exp()
    return rng.log_dirichlet(prior.concentration * ones, generator).exp()


@pytest.mark.parametrize("name", PRIORS)
def test_exploration_agrees_with_simulated_labels(name, generator):
    n, k, num = 60, 7, 20_000
    weights = draw_weights(PRIORS[name], num, k, generator)
    labels = torch.multinomial(weights, n, replacement=True, generator=generator)
    counts = torch.zeros(num, k).scatter_add_(1, labels, torch.ones(num, n))
    simulated = torch.bincount((counts > 0).sum(-1), minlength=k + 1) / num
    found = prior_design.explore(PRIORS[name], num_rows=n, num_components=k)
    assert found.standard_error is None
    error = (found.pmf * (1 - found.pmf) / num).sqrt().clamp_min(1 / num)
    assert float(((simulated - found.pmf) / error).abs().max()) < 4.5


@pytest.mark.parametrize(
    "prior",
    [
        torch.distributions.Dirichlet(torch.full((5,), 0.3, dtype=torch.float64)),
        lambda: torch.distributions.Dirichlet(torch.full((5,), 0.3, dtype=torch.float64)),
    ],
)
def test_any_distribution_by_monte_carlo_with_its_error(prior):
    found = prior_design.explore(prior, num_rows=30, num_components=5, num_samples=3000, seed=1)
    exact = occupancy.dirichlet_clusters(0.3, num_rows=30, num_components=5)
    assert found.standard_error is not None
    z = (found.pmf - exact) / found.standard_error.clamp_min(1e-3)
    assert float(z.abs().max()) < 4.5


def test_many_rows_fall_back_to_monte_carlo(monkeypatch):
    exact = prior_design.explore(priors.StickBreaking(2.0), num_rows=200, num_components=8)
    monkeypatch.setattr(prior_design, "_EXACT_STICKS", 1.0)
    drawn = prior_design.explore(priors.StickBreaking(2.0), num_rows=200, num_components=8)
    assert exact.standard_error is None
    assert drawn.standard_error is not None
    z = (drawn.pmf - exact.pmf) / drawn.standard_error.clamp_min(1e-3)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("kind", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("wanted", [1.2, 4.0, 7.5])
def test_solved_concentration_gives_the_wanted_number(kind, wanted):
    sizes = {"num_rows": 500, "num_components": 15}
    found = prior_design.solve_concentration(wanted, **sizes, kind=kind)
    weights = (
        priors.SymmetricDirichlet(found) if kind == "dirichlet" else priors.StickBreaking(found)
    )
    law = prior_design.explore(weights, **sizes)
    assert law.expected_clusters == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize(
    ("wanted", "n", "k"), [(1.0, 100, 10), (0.5, 100, 10), (10.5, 100, 10), (6.0, 5, 10)]
)
def test_impossible_numbers_are_refused(kind, wanted, n, k):
    with pytest.raises(ValueError, match="less than"):
        prior_design.solve_concentration(wanted, num_rows=n, num_components=k, kind=kind)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        prior_design.solve_concentration(2.0, num_rows=100, num_components=1)
    with pytest.raises(ValueError, match="kind"):
        prior_design.solve_concentration(2.0, num_rows=100, num_components=4, kind="dp")
    with pytest.raises(ValueError, match="num_rows"):
        prior_design.explore(priors.SymmetricDirichlet(1.0), num_rows=0, num_components=4)
    with pytest.raises(TypeError, match="SymmetricDirichlet"):
        prior_design.explore("flat", num_rows=5, num_components=4)  # type: ignore[arg-type]
    dirichlet = torch.distributions.Dirichlet(torch.ones(3))
    with pytest.raises(ValueError, match="num_components"):
        prior_design.explore(dirichlet, num_rows=5, num_components=4)
    with pytest.raises(ValueError, match="scale"):
        prior_design.explore(
            priors.SymmetricDirichlet(1.0),
            num_rows=5,
            num_components=4,
            components=NormalInverseWishart(torch.zeros(2), 1.0, 4.0, torch.eye(2)),
            scale=torch.ones(3),
        )


def explore_components(components, **settings):
    found = prior_design.explore(
        priors.SymmetricDirichlet(1.0),
        num_rows=10,
        num_components=3,
        components=components,
        num_samples=20_000,
        **settings,
    )
    assert found.covariance is not None
    return found


def test_shapes_of_a_normal_inverse_wishart():
    from scipy import stats

    scale_tril = torch.diag(torch.tensor([2.0, 5.0], dtype=torch.float64))
    niw = NormalInverseWishart(torch.zeros(2, dtype=torch.float64), 0.25, 6.0, scale_tril)
    found = explore_components(niw, scale=torch.tensor([1.0, 10.0]))
    shapes = found.covariance
    # A diagonal entry is inverse-Gamma((df - d + 1) / 2, Psi_jj / 2).
    for j, psi in enumerate((4.0, 25.0)):
        law = stats.invgamma(2.5, scale=psi / 2)
        expected = torch.tensor([law.ppf(q) ** 0.5 for q in prior_design.LEVELS])
        assert torch.allclose(shapes.standard_deviation[j].float(), expected.float(), rtol=0.03)
    ratio = shapes.standard_deviation / shapes.relative_deviation
    assert torch.allclose(ratio, torch.tensor([[1.0], [10.0]]).double().expand(2, 3))
    # |mean - prior mean| / sd is half-normal with scale 1 / sqrt(mean_precision).
    half = torch.tensor([2.0 * stats.halfnorm.ppf(q) for q in prior_design.LEVELS])
    assert torch.allclose(shapes.separation[0], half, rtol=0.06, atol=0.02)
    assert float(shapes.correlation[1]) == pytest.approx(0.0, abs=0.03)
    assert float(shapes.condition_number[0]) >= 1.0
    assert "condition number" in str(found)


def test_other_component_priors():
    gamma = NormalInverseGamma(torch.zeros(3), 1.0, 3.0, 2.0)
    shapes = explore_components(gamma).covariance
    assert torch.allclose(shapes.condition_number, torch.ones(3, dtype=torch.float64))
    one = priors.HierarchicalNormalInverseWishart(torch.zeros(1), 1.0, 3.0, 50.0, torch.ones(1))
    shapes = explore_components(one).covariance
    assert shapes.correlation is None
    # df = 3 and scale about 50: the median variance is near 50 / chi2_3 median.
    assert float(shapes.standard_deviation[0, 1]) == pytest.approx((50 / 2.366) ** 0.5, rel=0.05)
    with pytest.raises(TypeError, match="NormalInverseWishart"):
        explore_components("round")


def test_reachable_from_priors_and_printable():
    found = priors.explore(priors.SymmetricDirichlet(0.1), num_rows=100, num_components=10)
    assert isinstance(found, prior_design.PriorExploration)
    text = str(found)
    assert "SymmetricDirichlet" in text
    assert "exact" in text
    a = priors.solve_concentration(3.0, num_rows=100, num_components=10)
    assert occupancy.expected_clusters(a, num_rows=100, num_components=10) == pytest.approx(3.0)


def test_same_seed_same_shapes():
    niw = NormalInverseWishart(torch.zeros(2), 0.25, 6.0, torch.eye(2))
    first, second = explore_components(niw, seed=5), explore_components(niw, seed=5)
    assert torch.equal(first.covariance.standard_deviation, second.covariance.standard_deviation)
