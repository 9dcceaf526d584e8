"""NUTS draws from the posterior: closed forms, resume, messages; see tests/posteriordb too."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.diagnostics import agreement
from bayesgen.inference import NUTS, Gibbs
from bayesgen.models import GaussianMixture

__all__: list[str] = []

X = torch.tensor([1.0, 3.0, 2.5, 0.5], dtype=torch.float64)


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.5), obs=x)


def exact():
    """Mean and standard deviation of the location."""
    precision = 1 / 4.0 + len(X) / 2.25
    return float(X.sum()) / 2.25 / precision, precision**-0.5


def z_scores(draws, mean, sd, mean_error=0.0, sd_error=0.0):
    """How far mean and standard deviation of ``(chain, draw)`` are off, in Monte Carlo errors."""
    arviz = import_arviz()
    values = np.asarray(draws)
    return (
        abs(values.mean() - mean) / np.hypot(arviz.mcse(values), mean_error),
        abs(values.std() - sd) / np.hypot(arviz.mcse(values, method="sd"), sd_error),
    )


@pytest.fixture(scope="module")
def fit():
    return NUTS(num_samples=500, num_warmup=150).run(conjugate, X, seed=1)


def test_a_conjugate_posterior_and_a_narrower_one(fit):
    mean, sd = exact()
    assert max(z_scores(fit.draws["loc"], mean, sd)) < 4
    # the test can tell a posterior that is 20 % too narrow
    narrow = mean + 0.8 * (fit.draws["loc"] - mean)
    assert max(z_scores(narrow, mean, sd)) > 4


def test_what_the_fit_holds(fit):
    stats = fit.sample_stats
    assert {
        "lp",
        "energy",
        "diverging",
        "tree_depth",
        "step_size",
        "acceptance_rate",
        "n_steps",
    } <= set(stats)
    assert not bool(stats["diverging"].any())
    assert abs(float(stats["acceptance_rate"].mean()) - 0.8) < 0.15
    # energy is that of the draw: minus its log density plus a kinetic part
    assert bool((stats["energy"] >= -stats["lp"]).all())
    density = fit.model.density
    lp, _ = density.value_and_grad(fit.draws["loc"].reshape(-1, 1))
    torch.testing.assert_close(lp, stats["lp"].flatten())
    assert fit.attrs["is_traced"]
    assert fit.attrs["converged"]
    data = fit.arviz
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert import_arviz().loo(data).n_data_points == len(X)
    wanted = dist.Normal(fit.draws["loc"].unsqueeze(-1), 1.5).log_prob(X)
    np.testing.assert_allclose(data["log_likelihood"]["x"], wanted)
    assert "conjugate" in str(fit.summary())


def test_no_chain_waits_for_another():
    """Chains whose trees differ in size advance together."""

    def funnel():
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, torch.exp(log_scale)))

    fit = NUTS(num_samples=100, num_warmup=100).run(funnel, seed=0)
    steps = fit.sample_stats["n_steps"].sum(1)
    assert int(steps.max() - steps.min()) > 0
    assert max(z_scores(fit.draws["log_scale"], 0.0, 1.0)) < 4
    assert any("no site is observed" in m for m in fit.attrs["messages"])


# ---------------------------------------------------------------- runs
SMALL = {
    "num_chains": 2,
    "num_samples": 30,
    "num_warmup": 20,
}  # 3 or 4 steps of warm-up, 2 of draws


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_run_is_the_same_bit_by_bit(cut, compile, tmp_path):
    engine = NUTS(**SMALL, compile=compile)
    whole = engine.run(conjugate, X, seed=3)
    early = pytest.raises(ValueError, match="before the first draw")
    with early if cut == 2 else contextlib.nullcontext():
        engine.run(conjugate, X, seed=3, resume=tmp_path, callbacks=[lambda p: p.step >= cut])
    again = engine.run(conjugate, X, seed=3, resume=tmp_path)
    assert torch.equal(whole.draws["loc"], again.draws["loc"])
    assert whole.history == again.history
    with pytest.raises(ValueError, match="belongs to another run"):
        engine.run(conjugate, X + 1, seed=3, resume=tmp_path)


def test_interrupted_draws_are_kept():
    def stop(progress):
        if progress.step == 4:
            raise KeyboardInterrupt
        return None

    fit = NUTS(**SMALL).run(conjugate, X, callbacks=[stop])
    assert fit.num_draws >= 20
    assert any("interrupted" in m for m in fit.attrs["messages"])


def test_pyros_own_python_draws_the_same():
    """The fall-back follows the same trajectories, and is said aloud."""
    slow = NUTS(**SMALL, trace=False).run(conjugate, X, seed=3)
    fast = NUTS(**SMALL, compile=False).run(conjugate, X, seed=3)
    torch.testing.assert_close(slow.draws["loc"][:, :5], fast.draws["loc"][:, :5])
    assert not slow.attrs["is_traced"]


@pytest.mark.slow
def test_the_step_by_inductor_is_the_eager_one():
    """In single precision, which generated C++ does not take; that draws other noise."""
    settings = {**SMALL, "dtype": torch.float32}
    compiled = NUTS(**settings, compile=True).run(conjugate, X, seed=3)
    eager = NUTS(**settings, compile=False).run(conjugate, X, seed=3)
    assert compiled.attrs["is_compiled"], compiled.attrs["speed"]
    assert "C++" not in compiled.attrs["speed"].partition(";")[0]
    # chaotic in the long run: the first draws agree to rounding
    one, other = compiled.draws["loc"][:, :3], eager.draws["loc"][:, :3]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_without_a_compiler_it_works_and_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    fit = NUTS(**SMALL, compile=True).run(conjugate, X)
    assert not fit.attrs["is_compiled"]
    assert "no C++ compiler" in fit.attrs["speed"]


def test_arguments_by_name_by_place_and_none():
    by_name = NUTS(**SMALL).run(conjugate, {"x": X})
    by_place = NUTS(**SMALL).run(conjugate, (X.numpy(),))
    assert torch.equal(by_name.draws["loc"], by_place.draws["loc"])
    with pytest.raises(TypeError, match=r"conjugate\(x\).*Pass a tuple"):
        NUTS(**SMALL).run(conjugate, (X, X))


def test_divergences_are_counted_and_explained():
    def walled():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x.abs() < 0.7, 0.0, -torch.inf))

    fit = NUTS(**SMALL).run(walled, seed=0)
    assert int(fit.sample_stats["diverging"].sum()) > 0
    (told,) = [f for f in fit.verdict().failures if f.code == "divergences"]
    assert "diverged" in told.message
    assert "target_accept" in told.advice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "num_chains=0, but it must be a whole number"),
        ({"num_warmup": -1}, "num_warmup=-1, but"),
        ({"target_accept": 1.0}, "target_accept=1.0, but it must lie between 0 and 1"),
        ({"max_depth": 20}, "at most 15"),
        ({"compile": "yes"}, "compile='yes', but it must be True, False or 'auto'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        NUTS(**settings)


def test_generator_is_the_only_randomness():
    before = torch.get_rng_state()
    NUTS(**SMALL).run(conjugate, X)
    assert torch.equal(before, torch.get_rng_state())
    assert rng.make_generator(0) is not None


# ---------------------------------------------------------------- our own models
def test_a_gaussian_mixture_agrees_with_gibbs():
    """In what relabelling leaves alone, and in every verb of the fit."""
    generator = rng.make_generator(0)
    x = rng.standard_normal((100, 2), generator)
    x[50:] += 5.0
    model = GaussianMixture(2)
    nuts = NUTS(num_samples=150, num_warmup=100).run(model, x, seed=0)
    gibbs = Gibbs(num_samples=1000, num_warmup=100).run(model, x, seed=0)
    assert nuts.attrs["is_traced"], nuts.attrs["messages"]
    table = agreement({"gibbs": gibbs, "nuts": nuts}).xs("nuts", level="fit")
    assert table["z"].abs().max() < 4, table
    assert float((nuts.log_prob(x) - gibbs.log_prob(x)).abs().max()) < 0.3
    labels = nuts.predict(x)
    assert len(labels[:50].unique()) == len(labels[50:].unique()) == 1
    assert nuts.encode(x).shape == (100, 2)
    assert nuts.sample(10).shape == (10, 2)


# ---------------------------------------------------------------- metric, memory
def collinear():
    """Twelve predictors, any two correlated by 0.998."""
    generator, rows, size = rng.make_generator(0), 200, 12
    common = rng.standard_normal((rows, 1), generator)
    x = common + 0.0447 * rng.standard_normal((rows, size), generator)
    y = x @ rng.standard_normal(size, generator) + rng.standard_normal(rows, generator)

    def program():
        slope = pyro.sample("slope", dist.Normal(torch.zeros(size), 5.0).to_event(1))
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    precision = x.mT @ x + torch.eye(size, dtype=torch.float64) / 25.0
    covariance = torch.linalg.inv(precision)
    return program, covariance @ (x.mT @ y), covariance.diagonal().sqrt()


def test_collinear_predictors_get_a_metric_of_low_rank():
    program, mean, sd = collinear()
    settings = {"num_samples": 300, "num_warmup": 300}
    fits = {m: NUTS(**settings, metric=m).run(program, seed=1) for m in ("auto", "diagonal")}
    steps = {m: float(f.sample_stats["n_steps"].double().mean()) for m, f in fits.items()}
    assert steps["auto"] < 12
    assert steps["diagonal"] > 10 * steps["auto"]
    assert fits["auto"].attrs["metric_rank"] > 0
    assert fits["diagonal"].attrs["metric_rank"] == 0
    for k in range(len(mean)):
        draws = fits["auto"].draws["slope"][..., k]
        assert import_arviz().ess(np.asarray(draws)) > 400
        assert max(z_scores(draws, float(mean[k]), float(sd[k]))) < 4.5


def test_a_second_run_traces_nothing_and_draws_the_same():
    first = NUTS(**SMALL).run(conjugate, X, seed=3)
    second = NUTS(**SMALL).run(conjugate, X, seed=3)
    assert second.model.density is first.model.density
    assert torch.equal(first.draws["loc"], second.draws["loc"])
    other = NUTS(**SMALL).run(conjugate, X + 1, seed=3)
    assert other.model.density is not first.model.density


def test_a_program_that_has_changed_is_traced_anew():
    scale = 1.0

    def program():
        pyro.sample("x", dist.Normal(0.0, scale))

    def density():
        return NUTS(**SMALL).run(program, seed=0).model.density

    first, same = density(), density()
    scale = 5.0  # neither the function nor its arguments tell
    assert same is first
    assert density() is not first


def test_memory_is_flat_over_fits():
    """Programs are remembered, but only a few."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads /proc")

    def grown():
        gc.collect()
        return int(statm.read_text().split()[1]) * 4096

    sizes = []
    for seed in range(20):

        def program():
            loc = pyro.sample("loc", dist.Normal(torch.zeros(10_000), 1.0).to_event(1))
            pyro.factor("f", -loc.square().sum())

        NUTS(num_chains=1, num_samples=1, num_warmup=0, max_depth=1).run(program, seed=seed)
        sizes.append(grown())
    assert sizes[-1] - sizes[9] < 20e6, sizes
