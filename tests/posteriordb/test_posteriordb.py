"""Engines agree with reference draws of 31 well-known posteriors, each a plain Pyro program.

Programs are beside this file. Reference draws lie beside the checkout; without them all skip.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesgen.inference import NUTS
from tests.posteriordb.posteriors import MIN_ESS, POSTERIORS, judge, read, reference
from tests.posteriordb.series import solve

__all__: list[str] = []

ENGINES = {"NUTS": NUTS()}
QUICK = {
    "eight_schools-eight_schools_noncentered": NUTS(num_samples=500, num_warmup=300),
    "arma-arma11": NUTS(num_samples=400, num_warmup=200),
    "kidiq_with_mom_work-kidscore_interaction_z": NUTS(num_samples=300, num_warmup=200),
    "gp_pois_regr-gp_regr": NUTS(num_samples=400, num_warmup=200),
}
"""One of each kind, in seconds: hierarchical, time series, regression, Gaussian process."""


def agree(name, engine, shared_data):
    posterior = POSTERIORS[name]
    data = posterior.arguments(read(shared_data, name))
    fit = engine.run(posterior.program, data, seed=1)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    verdict = judge(fit, reference(shared_data, name))
    assert verdict.z < 4, verdict
    assert verdict.ess > MIN_ESS, verdict
    # A draw in a thousand at the edge of what the step size allows is no sign of a bad geometry.
    assert verdict.divergences <= fit.num_chains * fit.num_draws // 1000, verdict


@pytest.mark.parametrize("name", QUICK)
def test_a_few_in_seconds(name, shared_data):
    agree(name, QUICK[name], shared_data)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", POSTERIORS)
def test_all(name, engine, shared_data):
    agree(name, ENGINES[engine], shared_data)


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
