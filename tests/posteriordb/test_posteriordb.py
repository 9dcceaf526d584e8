"""Engines agree with reference draws of 31 well-known posteriors, each a plain Pyro program.

Programs are beside this file. Reference draws lie beside the checkout; without them all skip.
"""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from bayesgen.inference import NUTS
from bayesgen.models import GaussianMixture
from tests.posteriordb.posteriors import (
    ENGINES,
    MIN_ESS,
    POSTERIORS,
    judge,
    read,
    reference,
    run,
    scores,
)
from tests.posteriordb.series import solve

__all__: list[str] = []

LOW_DIM = "low_dim_gauss_mix-low_dim_gauss_mix"
QUICK = (
    "eight_schools-eight_schools_noncentered",
    "radon_mn-radon_hierarchical_intercept",
    "arma-arma11",
    "hmm_example-hmm_example",
    "gp_pois_regr-gp_regr",
    "kilpisjarvi_mod-kilpisjarvi",
    LOW_DIM,
)
"""One of each kind, in seconds."""


def check(verdict, num_draws):
    assert verdict.z < 4, verdict
    assert verdict.ess > MIN_ESS, verdict
    # A draw in a thousand at the edge of what the step size allows is no sign of a bad geometry.
    assert verdict.divergences <= num_draws // 1000, verdict


def agree(name, engine, shared_data):
    fit = run(name, ENGINES[engine], shared_data)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    verdict = judge(fit.draws, fit.sample_stats, reference(shared_data, name))
    check(verdict, fit.num_chains * fit.num_draws)


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name, shared_data):
    agree(name, "NUTS", shared_data)


OTHERS = [(n, e) for e in ENGINES for n in POSTERIORS if e != "NUTS" or n not in QUICK]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), OTHERS)
def test_all_others(name, engine, shared_data):
    agree(name, engine, shared_data)


@pytest.mark.slow
def test_errors_over_seeds_are_those_stated(shared_data):
    """On radon, whose scale of counties is hard to move: no bias, and honest errors."""
    name, seeds = "radon_mn-radon_hierarchical_intercept", range(8)
    wanted = reference(shared_data, name)
    fits = [run(name, NUTS(), shared_data, seed=s) for s in seeds]
    gaps = np.array([list(scores(fit.draws, wanted).values()) for fit in fits])
    assert 0.8 < np.sqrt(np.square(gaps).mean()) < 1.2
    together = {k: torch.cat([fit.draws[k] for fit in fits]) for k in fits[0].draws}
    stats = {"diverging": torch.cat([fit.sample_stats["diverging"] for fit in fits])}
    check(judge(together, stats, wanted), 4000 * len(fits))
    # an eighth of a standard deviation off would show
    together["beta"] = together["beta"] + 0.125 * together["beta"].std()
    assert judge(together, stats, wanted).z > 4


def test_a_posterior_that_is_too_narrow_is_caught(shared_data):
    """The judge can tell a standard deviation that is 15 % too small."""
    wanted = reference(shared_data, "arma-arma11")
    draws = {name: torch.tensor(value[:4]) for name, (value, _) in wanted.items()}
    stats = {"diverging": torch.zeros(4, 1000)}
    check(judge(draws, stats, wanted), 4000)
    draws["phi"] = draws["phi"].mean() + 0.85 * (draws["phi"] - draws["phi"].mean())
    with pytest.raises(AssertionError, match="sd of phi"):
        check(judge(draws, stats, wanted), 4000)


def test_our_own_mixture_under_the_same_priors(shared_data):
    """Labels are exchangeable there and ordered in the reference: sort components by mean."""
    options = {"dtype": torch.float64}
    priors = {
        "weights": dist.Dirichlet(5 * torch.ones(2, **options)),
        "loc": dist.Normal(torch.zeros(1, **options), 2.0).to_event(1),
        "scale_tril": dist.HalfNormal(2 * torch.ones(1, 1, **options)).to_event(2),
    }
    y = read(shared_data, LOW_DIM)["y"].unsqueeze(-1)
    fit = ENGINES["NUTS"].run(GaussianMixture(2, priors=priors), y, seed=1)
    aligned = fit.aligned.draws
    order = aligned["loc"].mean((0, 1, 3)).argsort()
    draws = {
        "mu": aligned["loc"][..., order, 0],
        "sigma": aligned["scale_tril"][..., order, 0, 0],
        "theta": aligned["weights"][..., order[0]],
    }
    verdict = judge(draws, fit.sample_stats, reference(shared_data, LOW_DIM))
    check(verdict, fit.num_chains * fit.num_draws)


def test_none_is_missing(shared_data):
    folder = shared_data / "posteriordb"
    stored = {p.stem for d in ("draws", "draws_computed_here") for p in (folder / d).glob("*.npz")}
    assert stored == set(POSTERIORS)


def test_the_ordinary_differential_equation_is_solved():
    """Against scipy, a thousand times finer than the errors of a fifth that the data have."""
    from scipy.integrate import solve_ivp

    theta, start = torch.tensor([0.55, 0.028, 0.8, 0.024]), torch.tensor([33.9, 5.9])
    ours = solve(theta.double(), start.double(), 20).exp()
    a, b, c, d = theta.double().tolist()
    wanted = solve_ivp(
        lambda _, z: [(a - b * z[1]) * z[0], (-c + d * z[0]) * z[1]],
        (0, 20),
        start.double().tolist(),
        t_eval=np.arange(1, 21),
        rtol=1e-10,
        atol=1e-10,
    )
    np.testing.assert_allclose(ours.numpy(), wanted.y.T, rtol=2e-4)
