"""ManyChains draws from the posterior: closed forms, bad starts, resume, wrong rules caught."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.inference import ManyChains, many_chains
from bayesgen.inference.hamiltonian import paths
from bayesgen.inference.hamiltonian.cross_chain import (
    Differences,
    Schedule,
    best_length,
    factor_of,
    group_acceptance,
    jitter,
    typical,
)
from bayesgen.inference.hamiltonian.leapfrog import leapfrog, width_of
from bayesgen.inference.programs.trace import trace

__all__: list[str] = []

X = torch.tensor([1.0, 3.0, 2.5, 0.5], dtype=torch.float64)
CORRELATED = 0.999 + 0.001 * torch.eye(8, dtype=torch.float64)
SMALL = {"num_chains": 16, "num_superchains": 4, "num_samples": 25, "num_warmup": 30}


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.5), obs=x)


MEAN, SD = 7.0 / 2.25 / (0.25 + 4 / 2.25), (0.25 + 4 / 2.25) ** -0.5


def collinear():
    """A normal law with correlations of 0.999 and scales from 0.001 to 1000."""
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)
    covariance = (0.999 + 0.001 * torch.eye(8, dtype=torch.float64)) * scale * scale[:, None]

    def model():
        law = dist.MultivariateNormal(3.0 * scale, covariance)
        pyro.sample("x", law)

    return model, 3.0 * scale, scale


def z_scores(draws, mean, sd):
    """How far mean and standard deviation of ``(chain, draw)`` are off, in Monte Carlo errors."""
    arviz, values = import_arviz(), np.asarray(draws)
    assert arviz.ess(values) > 400
    return (
        abs(values.mean() - mean) / arviz.mcse(values),
        abs(values.std() - sd) / arviz.mcse(values, method="sd"),
    )


@pytest.fixture(scope="module")
def fit():
    return ManyChains(num_chains=64, num_samples=50, num_warmup=60).run(conjugate, X, seed=1)


# ---------------------------------------------------------------- the right posterior
def test_a_conjugate_posterior_and_a_narrower_one(fit):
    assert max(z_scores(fit.draws["loc"], MEAN, SD)) < 4
    # the test can tell a posterior that is 20 % too narrow
    narrow = MEAN + 0.8 * (fit.draws["loc"] - MEAN)
    assert max(z_scores(narrow, MEAN, SD)) > 4


def test_a_wrong_acceptance_rule_is_caught(monkeypatch):
    """Accepting every path keeps the error of large steps."""
    settings = {"num_chains": 64, "num_samples": 60, "num_warmup": 60, "target_accept": 0.6}
    engine = ManyChains(**settings, compile=False)
    assert max(z_scores(engine.run(conjugate, X).draws["loc"], MEAN, SD)) < 4
    monkeypatch.setattr(many_chains, "_metropolis", lambda delta, _: delta > -torch.inf)
    assert max(z_scores(engine.run(conjugate, X).draws["loc"], MEAN, SD)) > 4


def test_correlations_and_scales_are_learned():
    model, mean, scale = collinear()
    fit = ManyChains(num_chains=64, num_samples=60).run(model, seed=0)
    assert fit.attrs["is_metric_dense"]
    assert float(fit.sample_stats["n_steps"].double().mean()) < 8
    for k in range(8):
        assert max(z_scores(fit.draws["x"][..., k], mean[k], scale[k])) < 4.5
    assert fit.verdict(), fit.verdict()


def test_two_modes_are_found_and_told():
    """No path crosses from one to the other: superchains disagree, and the verdict says so."""

    def modes():
        with pyro.poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(0.0, 5.0))
        pyro.factor("f", torch.logaddexp(-50 * (x - 1.5) ** 2, -50 * (x + 1.5) ** 2))

    fit = ManyChains(num_chains=64, num_samples=20, num_warmup=50).run(modes, seed=0)
    x = fit.draws["x"]
    assert bool((x > 1).any())
    assert bool((x < -1).any())
    assert abs(float(x[x > 0].std()) - 0.1) < 0.02
    # the metric is the width of a mode, not the distance between them
    assert 0.03 < fit.attrs["metric"][0] < 0.3
    assert not fit.verdict()
    assert "nested R-hat" in str(fit.verdict())


def test_bad_starts_do_not_ruin_the_others():
    """A plateau far below on a tenth of the starting region."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("cliff", torch.where(x[0] < -1.6, -1e4 - 1e6 * (x[1] - 5.0) ** 2, 0.0))

    fit = ManyChains(num_chains=128, num_samples=40).run(model, seed=3)
    assert float(fit.attrs["step_size"] * fit.attrs["metric"][0]) > 0.1
    assert 0.8 < float(fit.sample_stats["acceptance_rate"].median())
    inside = fit.draws["x"][..., 0]
    assert float((inside < -1.6).double().mean()) < 0.01


# ---------------------------------------------------------------- the fit
def test_what_the_fit_holds(fit):
    stats = fit.sample_stats
    assert set(stats) == {
        "lp",
        "energy",
        "acceptance_rate",
        "n_steps",
        "diverging",
        "step_size",
    }
    assert abs(float(stats["acceptance_rate"].mean()) - 0.9) < 0.08
    assert bool((stats["energy"] >= -stats["lp"]).all())
    lp, _ = fit.model.density.value_and_grad(fit.draws["loc"].reshape(-1, 1))
    torch.testing.assert_close(lp, stats["lp"].flatten())
    # all chains share the number of leapfrogs, and it varies
    assert bool((stats["n_steps"] == stats["n_steps"][:1]).all())
    assert len(stats["n_steps"][0].unique()) > 1
    assert fit.arviz["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert fit.verdict(), fit.verdict()
    assert "nested R-hat at most" in str(fit.verdict())


@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_run_is_the_same_bit_by_bit(cut, tmp_path):
    whole = ManyChains(**SMALL).run(conjugate, X, seed=3)
    early = pytest.raises(ValueError, match="before the first draw")
    with early if cut < 3 else contextlib.nullcontext():
        ManyChains(**SMALL).run(
            conjugate, X, seed=3, resume=tmp_path, callbacks=[lambda p: p.step >= cut]
        )
    again = ManyChains(**SMALL).run(conjugate, X, seed=3, resume=tmp_path)
    assert torch.equal(whole.draws["loc"], again.draws["loc"])
    assert whole.history == again.history


def test_interrupted_draws_are_kept():
    def stop(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    fit = ManyChains(**SMALL).run(conjugate, X, callbacks=[stop])
    assert fit.draws["loc"].shape == (16, 10)
    assert any("interrupted" in m for m in fit.attrs["messages"])


def test_pyros_own_python_draws_the_same():
    slow = ManyChains(**{**SMALL, "num_warmup": 10}, trace=False).run(conjugate, X, seed=3)
    fast = ManyChains(**{**SMALL, "num_warmup": 10}).run(conjugate, X, seed=3)
    torch.testing.assert_close(slow.draws["loc"][:, :3], fast.draws["loc"][:, :3])
    assert not slow.attrs["is_traced"]


def test_the_compiled_warm_up_is_the_eager_one():
    compiled = ManyChains(**SMALL, compile=True).run(conjugate, X, seed=3)
    eager = ManyChains(**SMALL, compile=False).run(conjugate, X, seed=3)
    assert compiled.attrs["is_compiled"], compiled.attrs["speed"]
    assert compiled.attrs["step_size"] == pytest.approx(eager.attrs["step_size"], rel=1e-6)
    assert compiled.attrs["metric"] == pytest.approx(eager.attrs["metric"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "num_chains=0, but it must be a whole number"),
        ({"num_chains": 24}, "num_chains=24 is no multiple of num_superchains=16"),
        ({"num_warmup": -1}, "num_warmup=-1, but"),
        ({"target_accept": 1.0}, "target_accept=1.0, but it must lie between 0 and 1"),
        ({"compile": "yes"}, "compile='yes', but it must be True, False or 'auto'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ManyChains(**settings)


# ---------------------------------------------------------------- the parts
@pytest.mark.parametrize("compile", [False, True])
def test_paths_are_textbook_leapfrogs(compile):
    """In blocks of chains, and in C++ with lanes to spare."""
    density = trace(lambda: conjugate(X), generator=rng.make_generator(0))
    work = leapfrog(density, 11, compile=compile, num_steps=1)
    assert work.is_compiled == compile, work.reason
    q, r = (rng.standard_normal((11, 1), rng.make_generator(k)) for k in (1, 2))
    lp, g = density.value_and_grad(q)
    factor = torch.tensor([0.7], dtype=torch.float64)
    wanted = [q, r, lp, g]
    for _ in range(3):
        half = wanted[1] + 0.5 * 0.3 * factor * wanted[3]
        wanted[0] = wanted[0] + 0.3 * factor * half
        wanted[2:] = density.value_and_grad(wanted[0])
        wanted[1] = half + 0.5 * 0.3 * factor * wanted[3]
    own = torch.full((11, 1), 0.3, dtype=torch.float64)
    for found in (
        work.integrate(q, r, g, factor, 0.3, 3),
        work.integrate(q, r, g, factor[None], 0.3, 3),
        work.integrate(q, r, g, factor, own, 3),
    ):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_dense_metric_is_used_the_right_way_round():
    """Time reversal: back from the end with the momentum turned."""
    model, _, scale = collinear()
    density = trace(model, generator=rng.make_generator(0))
    generator = rng.make_generator(1)
    factor = scale[:, None] * (torch.eye(8) + torch.rand(8, 8, generator=generator)).double()
    q, r = (rng.standard_normal((8, 8), generator) * scale for _ in range(2))
    r = r / scale
    lp, g = density.value_and_grad(q)
    ends = []
    for compile in (False, True):
        work = leapfrog(density, 8, compile=compile, num_steps=1)
        ends.append(work.integrate(q, r, g, factor, 0.01, 5))
        new, momentum, _, slope = ends[-1]
        back = work.integrate(new, -momentum, slope, factor, 0.01, 5)
        torch.testing.assert_close(back[0] / scale, q / scale, rtol=1e-6, atol=1e-6)
        energy = 0.5 * momentum.square().sum(-1) - ends[-1][2]
        start = 0.5 * r.square().sum(-1) - lp
        assert float((energy - start).abs().max()) < 0.3 * float(lp.abs().max())
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_compiled_transitions_are_those_of_tensors(is_dense, num_threads, monkeypatch):
    """The same random numbers through :meth:`ManyChains._transition`'s rule, step by step."""
    monkeypatch.setattr(paths, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    density = trace(collinear()[0], generator=rng.make_generator(0))
    compiled = leapfrog(density, 19, compile=True, num_steps=1)
    assert compiled.move is not None, compiled.reason
    scale = collinear()[2]
    factor = 0.5 * (scale[:, None] * torch.linalg.cholesky(CORRELATED) if is_dense else scale)
    step = 1.2 if is_dense else 0.05
    q = 3.0 * scale + 0.1 * scale * rng.standard_normal((19, 1), rng.make_generator(1))
    lp, g = density.value_and_grad(q)
    draws, statistics = torch.zeros(19, 4, 8).double(), torch.zeros(19, 4, 6).double()
    points = torch.stack((q, g))
    ends, end_lp = compiled.move(points, lp, factor, step, [3, 1, 2], 12345, draws, statistics, 1)
    width = compiled.integrate.density.width
    tapes = [compiled.integrate.noise(12345, first, 3) for first in range(0, 19, width)]
    numbers = torch.cat(tapes, -1)[..., :19].transpose(1, 2)
    eager, taken = leapfrog(density, 19, compile=False, num_steps=1), []
    for k, steps in enumerate([3, 1, 2]):
        normal, log_uniform = numbers[k, :, :-1], numbers[k, :, -1]
        new, r, new_lp, new_g = eager.integrate(q, normal, g, factor, step, steps)
        start, end = 0.5 * normal.square().sum(-1) - lp, 0.5 * r.square().sum(-1) - new_lp
        accepted = log_uniform < start - end
        taken.append(accepted)
        q, g = (torch.where(accepted[:, None], a, b) for a, b in ((new, q), (new_g, g)))
        lp = torch.where(accepted, new_lp, lp)
        torch.testing.assert_close(draws[:, k + 1], q, rtol=1e-6, atol=1e-9)
        wanted = [lp, torch.where(accepted, end, start), (start - end).clamp(max=0.0).exp()]
        wanted += [torch.full_like(lp, v) for v in (steps, 0.0, step)]
        torch.testing.assert_close(
            statistics[:, k + 1], torch.stack(wanted, -1), rtol=1e-5, atol=1e-6
        )
    assert 0.1 < float(torch.stack(taken).double().mean()) < 0.99
    torch.testing.assert_close(ends[0], q, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(end_lp, lp, rtol=1e-6, atol=1e-6)
    assert not draws[:, 0].any()


def test_random_numbers_of_the_compiled_paths():
    """Normal, uniform, not correlated, and the same of a chain in any company."""
    density = trace(lambda: conjugate(X), generator=rng.make_generator(0))
    many = leapfrog(density, 64, compile=True, num_steps=1).integrate
    few = leapfrog(density, 4, compile=True, num_steps=1).integrate
    one, other, third = many.noise(7, 0, 4000), few.noise(7, 4, 4000), many.noise(8, 0, 4000)
    torch.testing.assert_close(one[..., 4 % many.density.width], other[..., 0])
    both = [torch.cat((v[:, 0], v[:, 1].exp()), -1).numpy() for v in (one, third)]
    width = many.density.width
    for value in both:
        normal, uniform = value[:, :width], value[:, width:]
        assert stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
        assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
        assert stats.kstest(1.02 * normal.ravel(), "norm").pvalue < 0.1
    whole = np.concatenate(both, 1)
    off = np.corrcoef(whole.T) - np.eye(whole.shape[1])
    lagged = [np.corrcoef(v[1:], v[:-1])[0, 1] for v in whole.T]
    assert np.abs(off).max() < 4.5 / 4000**0.5
    assert np.abs(lagged).max() < 4.5 / 4000**0.5


def test_blocks_of_chains():
    assert width_of(256, 10) == 256
    assert width_of(256, 1000) == 64
    assert width_of(256, 10**6) == 16
    assert width_of(7, 10**6) == 7


def test_the_metric_of_a_normal_law_is_exact_wherever_chains_are():
    generator = rng.make_generator(0)
    root = rng.standard_normal((4, 4), generator)
    covariance = root @ root.T + 0.1 * torch.eye(4)
    moves = rng.standard_normal((40, 4), generator) * torch.tensor([5.0, 1.0, 0.1, 3.0])
    gradients = -torch.linalg.solve(covariance, moves.T).T
    factor = factor_of(Differences.empty(moves[0]).add(moves, gradients))
    found = factor @ factor.T
    torch.testing.assert_close(found / found[0, 0], covariance / covariance[0, 0])
    # without correlations: one scale a coordinate
    independent = factor_of(Differences.empty(moves[0]).add(moves, -moves / 4.0))
    torch.testing.assert_close(independent, torch.full((4,), 2.0, dtype=torch.float64))


def test_the_best_path_of_a_normal_law_is_a_quarter_turn():
    """Phases: coordinates forget at a quarter period, and squares with them."""
    phase = torch.arange(1, 41, dtype=torch.float64) * 0.1
    curves = torch.stack((1 - phase.cos(), 1 - phase.cos().square()), 1)
    assert abs(0.1 * best_length(curves, 0.0) - math.pi / 2) < 0.25


def test_stuck_groups_do_not_count():
    rates = torch.full((16,), 0.9)
    rates[:4] = 0.0
    rate, own = group_acceptance(rates, torch.zeros(16), 4)
    assert rate == pytest.approx(0.9)
    torch.testing.assert_close(own, torch.tensor([-0.7] * 4 + [0.0] * 12))
    # Out of the funnel, it has its share of the step size back.
    for _ in range(4):
        _, own = group_acceptance(torch.full((16,), 0.9), own, 4)
    assert own.eq(0).all()
    lp = torch.cat((-0.5 * torch.linspace(-2, 2, 60).square(), torch.tensor([-1e3])))
    assert typical(lp).tolist() == [True] * 60 + [False]


def test_the_schedule_ends_where_it_should():
    for num_warmup in (0, 1, 7, 30, 100, 1000):
        schedule = Schedule.of(num_warmup)
        assert schedule.ends[-1] == num_warmup
        scans = [t for t in range(num_warmup) if schedule.is_scan(t)]
        assert len(scans) == sum(schedule.scans)
    mean = sum(jitter(k) for k in range(64)) / 64
    assert abs(mean - 1.0) < 0.02
