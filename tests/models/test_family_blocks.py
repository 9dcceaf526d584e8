"""The conjugate blocks of the families: one posterior behind EM, variational Bayes and Gibbs."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, special

from bayesgen.data import as_dataset
from bayesgen.distributions import NormalInverseGamma, NormalInverseWishart
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.models.families.categorical import Categorical
from bayesgen.models.families.diagonal import DiagonalGaussian
from bayesgen.models.families.gaussian import Gaussian
from bayesgen.models.families.poisson import Poisson

__all__: list[str] = []

MANY = 20_000


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def of_all_rows(case, x=None):
    """Statistics of one component that has every row."""
    x = case.x if x is None else x
    weights = torch.ones((1, len(x)), dtype=torch.float64)
    return case.family.statistics(case.family.observe(x), weights, None, None)


# ------------------------------------------------------------------ exact where conjugacy is
def test_bound_of_one_component_is_its_evidence(conjugate):
    block, family = conjugate.family.block, conjugate.family
    statistics = of_all_rows(conjugate)
    posterior = block.update(statistics)
    message = block.message(posterior)
    evidence = block.log_evidence(statistics, {}).sum()
    bound = family.inner(message, statistics) - block.kl(posterior)
    close(bound, evidence)
    scores = family.evaluate(family.observe(conjugate.x), message).scores
    close(scores.sum() - block.kl(posterior), evidence)


def test_update_without_rows_is_the_prior(case):
    block = case.family.block
    nothing = {name: torch.zeros_like(v) for name, v in of_all_rows(case).items()}
    nothing = {name: v.expand(2, *v.shape[1:]).clone() for name, v in nothing.items()}
    posterior = block.update(nothing)
    if "learned" not in case.name:  # one pass moves the hyperparameters
        close(block.kl(posterior), torch.zeros((), dtype=torch.float64), 1e-9)
        evidence = block.log_evidence(nothing, block.maximise(nothing))
        close(evidence, torch.zeros_like(evidence), 1e-9)


def test_predictive_is_the_ratio_of_evidences(conjugate):
    block, family = conjugate.family.block, conjugate.family
    statistics = of_all_rows(conjugate)
    x = conjugate.x if "full" in conjugate.name else conjugate.holes
    if conjugate.name in ("tied", "product", "product tied"):
        x = conjugate.x
    got = family.log_predictive(x, block.update(statistics))
    before = block.log_evidence(statistics, {}).sum()
    for i, row in enumerate(x):
        own = of_all_rows(conjugate, row.unsqueeze(0))
        more = {name: value + own[name] for name, value in statistics.items()}
        close(got[0, i], block.log_evidence(more, {}).sum() - before, 1e-9)


@pytest.mark.parametrize("name", ["full", "tied", "product"])
def test_predictive_of_holes_is_a_mean_over_draws(cases, name, generator):
    case = cases(name, 1)
    block, family = case.family.block, case.family
    posterior = block.update(of_all_rows(case))
    draws = family.export(block.sample(posterior, MANY, generator=generator))
    got = family.log_predictive(case.holes, posterior)[0]
    density = family.log_prob(case.holes, draws)[:, 0].exp()
    z = (density.mean(0) - got.exp()) / (density.std(0) / math.sqrt(MANY) + 1e-12)
    assert float(z.abs().max()) < 4.5


def test_student_t_has_no_closed_predictive(cases, generator):
    case = cases("student", 1)
    posterior = case.family.block.update(of_all_rows(case))
    assert case.family.log_predictive(case.x, posterior) is None


# ------------------------------------------------------------------ the KL, the draws
def test_kl_is_the_expected_log_ratio(conjugate, generator):
    """``log q - log p`` is the complete-data likelihood less the evidence, for conjugate q."""
    block, family = conjugate.family.block, conjugate.family
    statistics = of_all_rows(conjugate)
    posterior = block.update(statistics)
    draws = block.sample(posterior, MANY, generator=generator)
    likelihood = family.inner(block.natural(draws), statistics)
    ratio = likelihood - block.log_evidence(statistics, {}).sum()
    z = (ratio.mean() - block.kl(posterior)) / (ratio.std() / math.sqrt(MANY))
    assert abs(float(z)) < 4.0


def test_draws_have_the_posteriors_expectations(case, generator):
    """Gibbs draws against what variational Bayes states: E[natural parameters], to MC error."""
    block = case.family.block
    statistics = case.statistics(generator)
    if "learned" in case.name:  # hold the hyperparameters at a value
        sites = block.maximise(statistics)
        previous = {"column_scale": sites["column_scale"]}
    else:
        previous = None
    wide = {name: value.expand(MANY, *value.shape) for name, value in statistics.items()}
    wide_previous = previous and {k: v.expand(MANY, *v.shape) for k, v in previous.items()}
    drawn = block.natural(block.draw(wide, wide_previous, generator=generator))
    sampled = block.natural(
        block.sample(block.update(statistics, previous), MANY, generator=generator)
    )
    expected = block.message(block.update(statistics, previous))
    for name, value in expected.items():
        for values in (drawn, sampled):
            error = values[name].std(0) / math.sqrt(MANY) + 1e-9 * (1 + value.abs())
            # The first draw of the degrees of freedom is uniform within its cell of the grid.
            slack = 0.02 * value.abs() if "df" in name else 0.0
            z = ((values[name].mean(0) - value).abs() - slack) / error
            assert float(z.max()) < 5.0, name


def test_draws_of_a_learned_scale_follow_its_conditional(cases, generator):
    for name in ("full learned", "diagonal learned", "spherical learned"):
        block = cases(name).family.block
        statistics = cases(name).statistics(generator)
        wide = {k: v.expand(MANY, *v.shape) for k, v in statistics.items()}
        values = block.draw(wide, None, generator=generator)
        if "full" in name:
            precision = torch.cholesky_inverse(values["scale_tril"])
            total = torch.diagonal(precision, dim1=-2, dim2=-1).sum(-2)
            shape, rate = 2.0 + 0.5 * 5.0 * 2, 0.8 + 0.5 * total
        else:
            shape, rate = 2.0 + 1.5 * 2, 0.8 + 0.5 * (1.0 / values["variance"]).sum(-2)
        scaled = values["column_scale"] * rate  # Gamma(shape, 1), whatever the rest
        z = (scaled.mean(0) - shape) / math.sqrt(shape / MANY)
        assert float(z.abs().max()) < 4.5, name
        assert float((scaled.var(0) / shape - 1.0).abs().max()) < 0.1, name


def test_hyperparameters_climb_the_bound(cases, generator):
    for name in ("full learned", "diagonal learned", "spherical learned"):
        case = cases(name)
        block, statistics = case.family.block, case.statistics(generator)
        posterior, bounds = block.update(statistics), []
        for _ in range(30):
            message = block.message(posterior)
            bounds.append(float(case.family.inner(message, statistics) - block.kl(posterior)))
            posterior = block.update(statistics, posterior)
        steps = torch.tensor(bounds).diff()
        assert float(steps.min()) > -1e-9, name
        assert bounds[-1] > bounds[0], name
        assert float(steps[-1]) < 1e-6 * abs(bounds[-1]), name
        for _ in range(300):
            posterior = block.update(statistics, posterior)
        free = {
            key: posterior[key].clone().requires_grad_() for key in ("hyper_shape", "hyper_rate")
        }
        slopes = torch.autograd.grad(block.kl({**posterior, **free}), list(free.values()))
        assert max(float(slope.abs().max()) for slope in slopes) < 1e-7, name


def test_learned_kl_is_its_expected_log_ratio(cases, generator):
    """Hyperparameters included: log q of every factor less the log of the joint prior."""
    case = cases("diagonal learned")
    block = case.family.block
    posterior = block.update(case.statistics(generator))
    draws = block.sample(posterior, MANY, generator=generator)
    nig = NormalInverseGamma(
        posterior["loc"],
        posterior["mean_precision"],
        posterior["concentration"],
        posterior["rate"],
    )
    log_q = nig.log_prob(nig.pack(draws["loc"], draws["variance"])).sum((-2, -1))
    gamma = torch.distributions.Gamma(posterior["hyper_shape"], posterior["hyper_rate"])
    log_q = log_q + gamma.log_prob(draws["column_scale"]).sum(-1)
    ratio = log_q - block.log_prior(draws)
    z = (ratio.mean() - block.kl(posterior)) / (ratio.std() / math.sqrt(MANY))
    assert abs(float(z)) < 4.0


# ------------------------------------------------------------------ the mode
def _free(block, mode):
    """The block's values as a differentiable function of unconstrained offsets."""
    offsets = {name: torch.zeros_like(value) for name, value in mode.items()}

    def rebuild(offset):
        values = {}
        for name, value in mode.items():
            if name.endswith("scale_tril"):
                values[name] = value + torch.tril(offset[name])
            elif name.endswith("log_probs"):
                own = block.levels if name == "log_probs" else block.blocks["kind"].levels
                logits = value + offset[name]
                total = torch.logsumexp(own.pad(logits, -torch.inf), -1)
                values[name] = logits - own.spread(total)
            elif name.endswith(("variance", "df", "column_scale")):
                values[name] = value * offset[name].exp()
            else:
                values[name] = value + offset[name]
        return values

    return offsets, rebuild


@pytest.mark.parametrize("flat", [False, True], ids=["posterior", "likelihood"])
def test_maximise_is_the_optimum(case, generator, flat):
    family, block, statistics = case.family, case.family.block, case.statistics(generator)
    mode = block.maximise(statistics, flat=flat)
    for _ in range(200 if "learned" in case.name and not flat else 0):
        mode = block.maximise(statistics, mode)
    offsets, rebuild = _free(block, mode)

    def objective(offset):
        values = rebuild(offset)
        height = family.inner(block.natural(values), statistics)
        return height if flat else height + block.log_prior(values)

    free = {name: value.requires_grad_() for name, value in offsets.items()}
    gradient = torch.autograd.grad(objective(free), list(free.values()))
    for name, value in zip(free, gradient, strict=True):
        tolerance = 1e-4 if name.endswith(("df", "column_scale")) or flat else 1e-7
        own = torch.tril(value) if name.endswith("scale_tril") else value
        assert float(own.abs().max()) < tolerance * (1 + float(statistics_size(statistics))), name
    top = float(objective({name: torch.zeros_like(value) for name, value in free.items()}))
    for _ in range(20):
        step = {
            name: 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in free.items()
        }
        assert float(objective(step)) < top + 1e-7


def statistics_size(statistics):
    return max(float(value.abs().max()) for value in statistics.values()) ** 0.5


def test_maximise_of_nothing_is_finite(case, generator):
    block = case.family.block
    statistics = case.statistics(generator)
    nothing = {name: torch.zeros_like(value) for name, value in statistics.items()}
    for flat in (False, True):
        values = block.maximise(nothing, flat=flat)
        assert all(bool(torch.isfinite(value).all()) for value in values.values())
        message = block.natural(values)
        scores = case.family.evaluate(case.family.observe(case.x), message).scores
        assert bool(torch.isfinite(scores).all())


# ------------------------------------------------------------------ one dimension, by quadrature
def one_column(family, x, **priors):
    family = family.bind(as_dataset(x.unsqueeze(-1), kinds="real"), 1, priors)
    weights = torch.ones((1, len(x)), dtype=torch.float64)
    statistics = family.statistics(family.observe(x.unsqueeze(-1)), weights, None, None)
    return family, statistics, float(family.block.log_evidence(statistics, {}).sum())


def test_bernoulli_evidence_and_predictive():
    x = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64)
    family, statistics, evidence = one_column(Bernoulli(), x)
    a, b = float(family.block.a), float(family.block.b)

    def density(p):
        return p ** (a + 3 - 1) * (1 - p) ** (b + 2 - 1) / special.beta(a, b)

    assert evidence == pytest.approx(math.log(integrate.quad(density, 0, 1)[0]), abs=1e-8)
    every = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    total = family.log_predictive(every, family.block.update(statistics)).exp().sum()
    close(total, torch.ones((), dtype=torch.float64))


def test_poisson_evidence_and_predictive():
    x = torch.tensor([1.0, 0, 4, 2], dtype=torch.float64)
    family, statistics, evidence = one_column(Poisson(), x)
    a, b = float(family.block.a), float(family.block.b)

    def density(rate):
        prior = b**a * rate ** (a - 1) * math.exp(-b * rate) / math.gamma(a)
        likelihood = math.prod(
            math.exp(-rate) * rate ** int(v) / math.factorial(int(v)) for v in x
        )
        return prior * likelihood

    assert evidence == pytest.approx(math.log(integrate.quad(density, 0, 60)[0]), abs=1e-8)
    every = torch.arange(400.0, dtype=torch.float64).unsqueeze(-1)
    total = family.log_predictive(every, family.block.update(statistics)).exp().sum()
    close(total, torch.ones((), dtype=torch.float64))


def test_categorical_predictive_sums_to_one():
    x = torch.tensor([1.0, 0, 2, 2], dtype=torch.float64)
    family, statistics, _ = one_column(Categorical(), x)
    every = torch.arange(3.0, dtype=torch.float64).unsqueeze(-1)
    total = family.log_predictive(every, family.block.update(statistics)).exp().sum()
    close(total, torch.ones((), dtype=torch.float64))


def test_two_levels_are_a_bernoulli(generator):
    x = torch.randint(0, 2, (20, 3), generator=generator).double()
    x[3, 1] = torch.nan
    parts = []
    for family in (Bernoulli(), Categorical()):
        family = family.bind(as_dataset(x, kinds="real"), 1, {})
        weights = torch.ones((1, 20), dtype=torch.float64)
        statistics = family.statistics(family.observe(x), weights, None, None)
        posterior = family.block.update(statistics)
        parts.append(
            torch.cat(
                [
                    family.block.log_evidence(statistics, {}),
                    family.block.kl(posterior).unsqueeze(0),
                    family.log_predictive(x, posterior)[0],
                ]
            )
        )
    close(*parts)


GAUSSIANS = [Gaussian(), DiagonalGaussian(), DiagonalGaussian(spherical=True)]


@pytest.mark.parametrize("family", GAUSSIANS, ids=["full", "diagonal", "spherical"])
def test_gaussian_evidence_and_predictive(family):
    x = torch.tensor([0.3, -1.0, 2.2, 0.9], dtype=torch.float64)
    loc, kappa, a, b = 0.5, 0.7, 1.8, 1.3
    one = torch.ones(1, dtype=torch.float64)
    if isinstance(family, Gaussian):
        prior = NormalInverseWishart(
            loc * one, kappa * one[0], 2 * a * one[0], (2 * b) ** 0.5 * one[:, None]
        )
    else:
        prior = NormalInverseGamma(loc * one, kappa, a, b)
    bound, statistics, evidence = one_column(family, x, components=prior)

    def density(mu, log_v):
        v = math.exp(log_v)
        log = a * math.log(b) - math.lgamma(a) - (a + 1) * log_v - b / v
        log += 0.5 * math.log(kappa / (2 * math.pi * v)) - 0.5 * kappa * (mu - loc) ** 2 / v
        for value in x.tolist():
            log += -0.5 * math.log(2 * math.pi * v) - 0.5 * (value - mu) ** 2 / v
        return math.exp(log + log_v)

    total = integrate.dblquad(density, -6, 8, -12, 12, epsabs=1e-12, epsrel=1e-10)[0]
    assert evidence == pytest.approx(math.log(total), abs=1e-7)
    posterior = bound.block.update(statistics)

    def predictive(value):
        point = torch.tensor([[value]], dtype=torch.float64)
        return float(bound.log_predictive(point, posterior).exp())

    mass = integrate.quad(predictive, -math.inf, math.inf, epsabs=1e-10)[0]
    assert mass == pytest.approx(1.0, abs=1e-6)


def test_default_priors_agree_in_one_dimension():
    x = torch.tensor([0.3, -1.0, 2.2, 0.9, 7.0], dtype=torch.float64)
    found = [one_column(family, x)[2] for family in GAUSSIANS]
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)
