"""Student-t components: local scales by quadrature, degrees of freedom, robustness."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, optimize, stats

from bayesgen.data import as_dataset
from bayesgen.models.families import degrees_of_freedom
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom, log_constant
from bayesgen.models.families.gaussian import full_log_prob
from bayesgen.models.families.quadratic import unpack_moments
from bayesgen.models.families.student_t import StudentT

__all__: list[str] = []

CPU = torch.device("cpu")


def scales(df, num, generator):
    half = torch.full((num,), 0.5 * df, dtype=torch.float64)
    return torch._standard_gamma(half, generator=generator) / (0.5 * df)


def of_scales(u):
    """Statistics of one component whose rows have these local scales."""
    return {
        "count": torch.tensor([float(len(u))], dtype=torch.float64),
        "log_scale": u.log().sum().reshape(1),
        "moments": u.sum().reshape(1, 1),
    }


# ------------------------------------------------------------------ local scales
def test_scores_and_statistics_integrate_the_scale_out(cases, generator):
    """Against quadrature over the scale, under an expected message as well as at a point."""
    case = cases("student")
    family, block = case.family, case.family.block
    observed = family.observe(case.holes)
    points = block.natural(case.internal(generator))
    expected = block.message(block.update(case.statistics(generator)))
    for message in (points, expected):
        evaluation = family.evaluate(observed, message)
        hot = torch.zeros((2, len(case.x)), dtype=torch.float64)
        for k, i in ((0, 1), (1, 5), (0, 0)):
            hot.zero_()[k, i] = 1.0
            df, constant = float(message["df"][k]), float(message["df_constant"][k])

            def scaled(u, i=i, k=k, message=message):
                # A Gaussian whose precision is u times the expected one.
                own = {
                    "natural": u * message["natural"],
                    "log_det": message["log_det"] + 3 * math.log(u),
                }
                return float(full_log_prob(family.observe(case.holes[i : i + 1]), own)[k, 0])

            def weight(log_u, df=df, constant=constant, scaled=scaled):
                u = math.exp(log_u)
                return math.exp(constant + 0.5 * df * (log_u - u) + scaled(u))

            total, mean, mean_log = (
                integrate.quad(lambda t, w=weight, f=f: f(t) * w(t), -20, 5)[0]
                for f in (lambda t: 1.0, math.exp, lambda t: t)
            )
            assert float(evaluation.scores[k, i]) == pytest.approx(math.log(total), abs=1e-7)
            statistics = family.statistics(observed, hot, evaluation, message)
            got = float(statistics["log_scale"][k])
            assert got == pytest.approx(mean_log / total, abs=1e-6)
            got = float(statistics["moments"][k, 0])
            assert got == pytest.approx(mean / total, abs=1e-6)


def test_variational_scores_are_below_the_expected_likelihood(cases, generator):
    """Jensen: the normaliser under expected parameters is no more than the mean density's log."""
    case = cases("student")
    family, block = case.family, case.family.block
    posterior = block.update(case.statistics(generator))
    message = block.message(posterior)
    bound = family.evaluate(family.observe(case.holes), message).scores
    draws = family.export(block.sample(posterior, 4000, generator=generator))
    density = torch.logsumexp(family.log_prob(case.holes, draws), 0) - math.log(4000)
    assert bool((bound < density + 0.05).all())


def test_drawn_rows_are_student_t(generator):
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    family = StudentT().bind(as_dataset(x), 2, {})
    many = 4000
    tril = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    values = {
        "loc": torch.tensor([[5.0, -1.0], [0.0, 0.0]], dtype=torch.float64).expand(many, 2, 2),
        "scale_tril": tril.expand(many, 2, 2, 2),
        "df": torch.tensor([3.0, 50.0], dtype=torch.float64).expand(many, 2),
    }
    rows = family.draw(values, torch.zeros(many, dtype=torch.int64), generator=generator)
    for column, scale in ((0, 2.0), (1, math.sqrt(1.25))):
        law = stats.t(3.0, values["loc"][0, 0, column], scale)
        assert stats.kstest(rows[:, column].numpy(), law.cdf).pvalue > 1e-3
        assert stats.kstest(rows[:, column].numpy(), stats.norm(*law.args[1:]).cdf).pvalue < 1e-3


def test_holes_of_an_outlying_row_are_drawn_wider(generator):
    """The drawn hole is Student-t given what is seen: the local scale is drawn first."""
    family = StudentT(df=3.0).bind(as_dataset(torch.eye(2, dtype=torch.float64)), 1, {})
    values = {
        "loc": torch.zeros((1, 2), dtype=torch.float64),
        "scale_tril": torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64),
    }
    many = 4000
    x = torch.tensor([[4.0, torch.nan]], dtype=torch.float64)
    message = family.block.natural({k: v.expand(many, *v.shape) for k, v in values.items()})
    observed, ones = family.observe(x), torch.ones((many, 1, 1), dtype=torch.float64)
    drawn = family.statistics(
        observed, ones, family.evaluate(observed, message), message, generator=generator
    )
    weight, first, _ = unpack_moments(drawn["moments"][:, 0], 2)
    holes = first[:, 1] / weight
    seen = float(x[0, 0] - family.gaussian.offset[0])
    scale = 0.8 * math.sqrt((3.0 + seen**2) / 4.0)
    law = stats.t(4.0, 0.6 * seen, scale)
    assert stats.kstest(holes.numpy(), law.cdf).pvalue > 1e-3
    assert stats.kstest(holes.numpy(), stats.norm(0.6 * seen, 0.8).cdf).pvalue < 1e-6


# ------------------------------------------------------------------ degrees of freedom
PRIOR = dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 0.1)


@pytest.mark.parametrize("true", [1.5, 6.0, 40.0])
def test_mode_of_the_degrees_of_freedom(generator, true):
    u = scales(true, 400, generator)
    degrees = DegreesOfFreedom.learned(PRIOR, CPU)

    def height(log_df, flat):
        df = math.exp(float(log_df))
        value = stats.gamma(0.5 * df, scale=2.0 / df).logpdf(u.numpy()).sum()
        return -(value + (0.0 if flat else stats.gamma(2, scale=10).logpdf(df) + log_df))

    for flat in (False, True):
        best = optimize.minimize_scalar(
            height, bounds=(-2, 6.5), args=(flat,), method="bounded", options={"xatol": 1e-9}
        )
        got = float(degrees.maximise(of_scales(u), flat=flat))
        assert math.log(got) == pytest.approx(best.x, abs=1e-5)


def test_posterior_of_the_degrees_of_freedom(generator):
    """Grid and Metropolis draws against quadrature of the continuous posterior."""
    u = scales(5.0, 60, generator)
    statistics = of_scales(u)
    degrees = DegreesOfFreedom.learned(PRIOR, CPU)

    def density(log_df, power=0):
        df = math.exp(log_df)
        value = stats.gamma(0.5 * df, scale=2.0 / df).logpdf(u.numpy()).sum()
        value += stats.gamma(2, scale=10).logpdf(df) + log_df
        return math.exp(value + 60.0) * df**power

    def quad(power):
        return integrate.quad(density, -1, 5, args=(power,), epsabs=0, limit=200)[0]

    total, mean = quad(0), quad(1) / quad(0)
    spread = math.sqrt(quad(2) / total - mean**2)
    message = degrees.message(degrees.update(statistics))
    assert float(message["df"]) == pytest.approx(mean, rel=1e-3)
    evidence = float(degrees.log_evidence(statistics))
    assert evidence == pytest.approx(math.log(total) - 60.0, abs=1e-2)
    bound = evidence + float(statistics["log_scale"])
    kl = float(degrees.kl(degrees.update(statistics)))
    inner = float(
        message["df_constant"] * 60.0
        + 0.5 * message["df"] * (statistics["log_scale"] - statistics["moments"][:, 0])
    )
    assert inner - kl == pytest.approx(bound, abs=1e-9)
    chains = 4000
    wide = {name: value.expand(chains, *value.shape) for name, value in statistics.items()}
    values = None
    for _ in range(20):
        df = degrees.draw(wide, values, generator=generator)
        values = {"df": df}
    z = (df.mean() - mean) / (spread / math.sqrt(chains))
    assert abs(float(z)) < 4.5
    assert float(df.std()) == pytest.approx(spread, rel=0.1)
    assert len(df.unique()) > 0.9 * chains  # not the points of the grid
    drawn = degrees.sample(degrees.update(wide), 1, generator=generator)
    assert abs(float((drawn.mean() - mean) / (spread / math.sqrt(chains)))) < 4.5


@pytest.mark.parametrize("cells", [128, 12])
def test_draws_of_a_narrow_posterior(generator, monkeypatch, cells):
    """Narrower than a step of the grid; with few cells the Metropolis step has to put it right."""
    monkeypatch.setattr(degrees_of_freedom, "_CELLS", cells)
    u, chains = scales(5.0, 200_000, generator), 4000
    degrees, statistics = DegreesOfFreedom.learned(PRIOR, CPU), of_scales(u)
    excess = float(statistics["log_scale"] - statistics["moments"][:, 0])

    def log_density(df):
        return 2e5 * float(log_constant(torch.tensor(df).double())) + 0.5 * df * excess

    df = float(degrees.maximise(statistics, flat=False))
    step = 1e-3
    curvature = log_density(df * (1 + step)) + log_density(df * (1 - step)) - 2 * log_density(df)
    spread = math.sqrt(-(step**2) / curvature)
    assert spread < 0.3 * float(degrees.grid[1] / degrees.grid[0] - 1.0)
    wide = {name: value.expand(chains, *value.shape) for name, value in statistics.items()}
    values = {"df": torch.full((chains, 1), df, dtype=torch.float64)}
    for _ in range(30):
        values = {"df": degrees.draw(wide, values, generator=generator)}
    log_ratio = (values["df"] / df).log()
    assert float(log_ratio.std()) == pytest.approx(spread, rel=0.06)
    assert abs(float(log_ratio.mean())) < 5 * spread / math.sqrt(chains) + 1e-4


def test_a_prior_with_bounds_is_kept_to(generator):
    degrees = DegreesOfFreedom.learned(dist.Uniform(2.0, 30.0), CPU)
    gaussian = of_scales(scales(500.0, 300, generator))
    heavy = of_scales(scales(0.7, 300, generator))
    for statistics in (gaussian, heavy):
        wide = {name: value.expand(500, *value.shape) for name, value in statistics.items()}
        df = degrees.draw(wide, None, generator=generator)
        for _ in range(5):
            df = degrees.draw(wide, {"df": df}, generator=generator)
            assert bool(((df >= 2.0) & (df <= 30.0)).all())
        assert 2.0 <= float(degrees.maximise(statistics, flat=False)) <= 30.0
    with pytest.raises(ValueError, match="hardly any value"):
        DegreesOfFreedom.learned(dist.Uniform(1e-4, 1e-3), CPU)


def test_fixed_degrees_have_nothing_to_learn(generator):
    degrees = DegreesOfFreedom.fixed(4.0, CPU)
    statistics = of_scales(scales(4.0, 10, generator))
    posterior = degrees.update(statistics)
    assert float(degrees.kl(posterior)) == 0.0
    assert float(degrees.message(posterior)["df"]) == 4.0
    assert float(degrees.maximise(statistics, flat=True)) == 4.0
    assert float(degrees.draw(statistics, None, generator=generator)) == 4.0
    assert float(degrees.log_prior({})) == 0.0
    constant = float(log_constant(torch.tensor(4.0, dtype=torch.float64)))
    assert constant == pytest.approx(2 * math.log(2.0) - math.lgamma(2.0))


# ------------------------------------------------------------------ whole fits of one component
def one_component_fit(x, family, *, flat=False, num_steps=150):
    """EM of one component; returns the values and the heights it climbed."""
    bound = family.bind(as_dataset(x), 1, {})
    observed, ones = bound.observe(x), torch.ones((1, len(x)), dtype=torch.float64)
    statistics, heights, values = bound.statistics(observed, ones, None, None), [], None
    for _ in range(num_steps):
        values = bound.block.maximise(statistics, values, flat=flat)
        message = bound.block.natural(values)
        evaluation = bound.evaluate(observed, message)
        prior = 0.0 if flat else float(bound.block.log_prior(values))
        heights.append(float(evaluation.scores.sum()) + prior)
        statistics = bound.statistics(observed, ones, evaluation, message)
    return bound.export(values), torch.tensor(heights, dtype=torch.float64)


def test_em_never_falls_and_finds_the_maximum_likelihood(generator):
    u = scales(3.0, 300, generator)
    x = (torch.randn(300, generator=generator, dtype=torch.float64) / u.sqrt()).unsqueeze(-1)
    values, heights = one_component_fit(x, StudentT(), flat=True, num_steps=600)
    assert float(heights.diff().min()) > -1e-8
    df, loc, scale = stats.t.fit(x.numpy().ravel())
    best = stats.t(df, loc, scale).logpdf(x.numpy().ravel()).sum()
    assert float(heights[-1]) > best - 1e-4
    assert float(values["df"][0]) == pytest.approx(df, rel=0.02)
    holes = x.expand(-1, 2).clone()
    holes[:, 1] += torch.randn(300, generator=generator, dtype=torch.float64)
    holes[::4, 1] = torch.nan
    _, heights = one_component_fit(holes, StudentT(), num_steps=100)
    assert float(heights.diff().min()) > -1e-8


def test_outliers_do_not_pull_the_location(generator):
    x = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    x[:10] = 50.0
    values, _ = one_component_fit(x, StudentT())
    assert abs(float(values["loc"][0, 0])) < 0.3
    gaussian, _ = one_component_fit(x, StudentT(df=1e6))
    assert abs(float(gaussian["loc"][0, 0])) > 2.0


def test_variational_bound_never_falls(generator):
    u = scales(3.0, 80, generator)
    x = torch.randn(80, 2, generator=generator, dtype=torch.float64) / u.sqrt().unsqueeze(-1)
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.2, torch.nan)
    family = StudentT().bind(as_dataset(x), 1, {})
    block, observed = family.block, family.observe(x)
    ones = torch.ones((1, 80), dtype=torch.float64)
    statistics, bounds = family.statistics(observed, ones, None, None), []
    for _ in range(100):
        posterior = block.update(statistics)
        message = block.message(posterior)
        evaluation = family.evaluate(observed, message)
        bounds.append(float(evaluation.scores.sum() - block.kl(posterior)))
        statistics = family.statistics(observed, ones, evaluation, message)
    steps = torch.tensor(bounds).diff()
    assert float(steps.min()) > -1e-9
    assert float(steps[-1]) < 1e-6
    assert float(message["df"]) < 12.0
