"""Tests of calibration on a conjugate normal model, each beside an error that it must catch.

theta ~ N(0, 1), y_1..y_n ~ N(theta, 1), so that theta | y ~ N(sum y / (n + 1), 1 / (n + 1)).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesgen import calibration, rng
from bayesgen.data import as_dataset
from bayesgen.fit import Fit
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []

NUM_ROWS = 5


def prior(num, generator):
    return {"theta": rng.standard_normal(num, generator)}


def rows_given(parameters, generator):
    theta = parameters["theta"]
    return theta[..., None] + rng.standard_normal((*theta.shape, NUM_ROWS), generator)


def simulate(num, generator):
    parameters = prior(num, generator)
    return parameters, rows_given(parameters, generator)


def posterior(width=1.0, shift=0.0, num_draws=99):
    def draw(data, generator):
        mean = data.sum(-1) / (NUM_ROWS + 1) + shift
        noise = rng.standard_normal((num_draws, *mean.shape), generator)
        return {"theta": mean + width * noise / math.sqrt(NUM_ROWS + 1)}

    return draw


def prior_instead(data, generator):
    """A "posterior" that never looks at the data."""
    return {"theta": rng.standard_normal((99, len(data)), generator)}


def with_likelihood(parameters, data):
    theta = parameters["theta"]
    square = (data - theta[..., None]).square().sum(-1)
    return {"theta": theta, "log_likelihood": -0.5 * square}


# ------------------------------------------------------------------ simulation-based calibration
@pytest.mark.parametrize("seed", range(3))
def test_the_right_posterior_passes(seed):
    found = calibration.simulation_based_calibration(
        simulate, posterior(), num_simulations=1000, quantities=with_likelihood, seed=seed
    )
    assert set(found.p_values) == {"theta", "log_likelihood"}
    assert found.p_value > 0.01
    assert found.num_draws == 99
    assert int(found.ranks["theta"].max()) <= 99
    assert "simulation-based calibration" in str(found)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("20 % too narrow", posterior(width=0.8)),
        ("25 % too wide", posterior(width=1.25)),
        ("shifted by 0.2 sd", posterior(shift=0.2 / math.sqrt(NUM_ROWS + 1))),
    ],
)
def test_a_wrong_posterior_is_caught(name, wrong):
    found = calibration.simulation_based_calibration(simulate, wrong, num_simulations=1000)
    assert found.p_value < 0.005, name


def test_a_posterior_that_ignores_the_data_needs_a_quantity_of_the_data():
    # Modrak et al. (2023): the prior passes for every parameter.
    blind = calibration.simulation_based_calibration(simulate, prior_instead, num_simulations=1000)
    seeing = calibration.simulation_based_calibration(
        simulate, prior_instead, num_simulations=1000, quantities=with_likelihood
    )
    assert blind.p_value > 0.01
    assert seeing.p_values["log_likelihood"] < 0.005


def test_uniformity_p_values_are_uniform_themselves():
    from scipy import stats

    generator = rng.make_generator(0)
    ranks = {str(i): torch.randint(20, (100,), generator=generator) for i in range(300)}
    p = list(calibration.uniformity_p_values(ranks, 19, num_null=1000).values())
    # Discrete, so compare with the uniform law from one side at a few levels.
    for level in (0.05, 0.2, 0.5, 0.8):
        share = sum(v <= level for v in p)
        assert stats.binomtest(share, 300, level).pvalue > 1e-3


def test_tensor_quantities_are_ranked_entry_by_entry():
    def simulate_pairs(num, generator):
        theta = rng.standard_normal((num, 2, 2), generator)
        return {"theta": theta}, theta

    def draws(data, generator):
        return {"theta": rng.standard_normal((19, *data.shape), generator)}

    found = calibration.simulation_based_calibration(simulate_pairs, draws, num_simulations=200)
    assert set(found.ranks) == {f"theta[{i}, {j}]" for i in (0, 1) for j in (0, 1)}


def test_ties_of_discrete_quantities_are_broken_at_random():
    def simulate_coin(num, generator):
        coin = torch.randint(2, (num,), generator=generator).to(torch.float64)
        return {"coin": coin}, coin

    def draws(data, generator):
        shape = (9, len(data))
        return {"coin": torch.randint(2, shape, generator=generator).to(torch.float64)}

    found = calibration.simulation_based_calibration(simulate_coin, draws, num_simulations=2000)
    assert found.p_value > 0.01


def test_bad_shapes_and_values_are_refused():
    def flat(data, generator):
        return {"theta": rng.standard_normal((len(data), 3), generator)}

    with pytest.raises(ValueError, match="num_draws"):
        calibration.simulation_based_calibration(simulate, flat, num_simulations=10)

    def broken(data, generator):
        return {"theta": torch.full((3, len(data)), math.nan)}

    with pytest.raises(ValueError, match="not finite"):
        calibration.simulation_based_calibration(simulate, broken, num_simulations=10)


# ------------------------------------------------------------------ Geweke
def gibbs(width=1.0, shrink=1.0):
    """One exact draw of theta given the data, or one with a planted error."""

    def step(parameters, data, generator):
        mean = shrink * data.sum(-1) / (NUM_ROWS + 1)
        noise = rng.standard_normal(mean.shape, generator)
        return {"theta": mean + width * noise / math.sqrt(NUM_ROWS + 1)}

    return step


def metropolis(accept_all=False):
    def step(parameters, data, generator):
        theta = parameters["theta"]
        proposal = theta + 0.8 * rng.standard_normal(theta.shape, generator)

        def log_joint(value):
            return -0.5 * value.square() - 0.5 * (data - value[:, None]).square().sum(-1)

        uniform = torch.rand(theta.shape, generator=generator, dtype=torch.float64)
        accept = uniform.log() < log_joint(proposal) - log_joint(theta)
        return {"theta": torch.where(accept | accept_all, proposal, theta)}

    return step


@pytest.mark.parametrize("transition", [gibbs(), metropolis()])
@pytest.mark.parametrize("seed", range(2))
def test_right_transitions_pass(transition, seed):
    found = calibration.geweke_joint_test(
        prior, rows_given, transition, quantities=with_likelihood, seed=seed
    )
    assert set(found.z_scores) == {
        "theta",
        "theta^2",
        "log_likelihood",
        "log_likelihood^2",
    }
    assert found.p_value > 0.01, str(found)


@pytest.mark.parametrize(
    ("name", "transition"),
    [
        ("variance 20 % too small", gibbs(width=0.894)),
        ("prior counted twice", gibbs(shrink=(NUM_ROWS + 1) / (NUM_ROWS + 2))),
        ("no rejections", metropolis(accept_all=True)),
    ],
)
def test_planted_errors_are_caught(name, transition):
    found = calibration.geweke_joint_test(
        prior, rows_given, transition, quantities=with_likelihood, num_chains=400
    )
    assert found.p_value < 1e-4, f"{name}: {found}"


def test_z_scores_are_standard_normal():
    z = [
        calibration.geweke_joint_test(
            prior, rows_given, metropolis(), num_chains=40, num_steps=15, moments=1,
            num_marginal=2000, seed=seed,
        ).z_scores["theta"]
        for seed in range(150)
    ]  # fmt: skip
    from scipy import stats

    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_too_few_chains_are_refused():
    with pytest.raises(ValueError, match="num_chains=5"):
        calibration.geweke_joint_test(prior, rows_given, gibbs(), num_chains=5)


# ------------------------------------------------------------------ posterior predictive checks
def normals(*shape: int, seed: int) -> torch.Tensor:
    return rng.standard_normal(shape, rng.make_generator(seed))


def test_a_right_model_passes_and_is_not_uniform_but_central():
    p = []
    for seed in range(10):
        fit = pretend(UnitMixture(1), normals(100, 2, seed=seed) + 3.0)
        p += [calibration.posterior_predictive_check(fit, num_samples=100, seed=seed).p_values]
    assert min(v for values in p for v in values.values()) > 0.005
    assert min(values["mean x0"] for values in p) > 0.5  # the fit has seen the mean


def test_wrong_models_are_caught_by_the_statistics_that_should():
    two = torch.cat([normals(60, 1, seed=0) - 3.0, normals(60, 1, seed=1) + 3.0])
    found = calibration.posterior_predictive_check(pretend(UnitMixture(1), two))
    assert found.p_values["sd x0"] < 0.02
    assert found.p_values["modes x0"] < 0.02
    assert found.p_values["mean x0"] > 0.2
    heavy = normals(200, 1, seed=2)
    heavy[:2] = torch.tensor([[9.0], [-9.0]], dtype=torch.float64)
    found = calibration.posterior_predictive_check(pretend(UnitMixture(1), heavy))
    assert found.p_values["max x0"] < 0.02
    assert found.p_values["min x0"] < 0.02
    assert found.p_values["median x0"] > 0.05
    a = normals(200, 1, seed=3)
    tied = torch.cat([a, 0.6 * a + 0.8 * normals(200, 1, seed=4)], 1)
    found = calibration.posterior_predictive_check(pretend(UnitMixture(1), tied))
    assert found.p_values["correlation"] < 0.02
    assert "correlation" in str(found)


def test_replications_keep_the_parameters_of_one_draw_and_miss_what_the_data_miss():
    x = normals(30, 2, seed=0)
    x[5:, 1] = math.nan
    data = as_dataset(x)
    loc = torch.tensor([-100.0, 100.0], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    draws = {"loc": loc, "weights": torch.ones(1, 2, 1, dtype=torch.float64)}
    fit = Fit(UnitMixture(1, columns=data.columns), draws, data=data)
    found = calibration.posterior_predictive_check(
        fit,
        {
            "spread": lambda rows: rows[..., 0].std(-1),
            "observed": lambda rows: (~rows.isnan()).sum(-2).to(torch.float64),
        },
    )
    assert float(found.replicated["spread"].max()) < 3.0  # one draw a data set, never both
    assert found.observed["observed x1"] == 5
    assert found.replicated["observed x1"].unique().tolist() == [5.0]
    assert found.p_values["observed x1"] == 1.0


def test_categories_are_checked_by_their_shares():
    frame = {"colour": ["red", "blue", "red", "red"], "lit": [True, False, False, False]}
    fit = pretend(UnitMixture(1), {**frame, "size": [0.1, 0.2, 0.3, 0.5]})
    found = calibration.posterior_predictive_check(fit, num_samples=5)
    shares = {name: value for name, value in found.observed.items() if "share" in name}
    assert shares == {
        "share colour = blue": 0.25,
        "share colour = red": 0.75,
        "share lit = yes": 0.25,
    }
    assert found.observed["mean size"] == pytest.approx(0.275)
    assert not any("colour" in name for name in found.observed if "share" not in name)


def test_number_of_modes():
    modes = calibration.default_statistics()["modes"]
    one = normals(1, 300, 1, seed=0)
    three = torch.cat([one, one + 8.0, one + 16.0], 1)
    assert modes(one).item() == 1
    assert modes(three).item() == 3
    assert modes(torch.zeros(1, 10, 1, dtype=torch.float64)).item() == 1


def test_statistics_ignore_gaps():
    x = normals(2, 50, 3, seed=0)
    gaps = torch.cat([x, torch.full((2, 20, 3), math.nan)], 1)
    for name, function in calibration.default_statistics().items():
        assert torch.allclose(function(gaps).double(), function(x).double()), name


def test_quantiles_equal_numpy():
    statistics = calibration.default_statistics()
    x = normals(3, 41, 2, seed=0)
    x[0, :13, 1] = math.nan
    for name, level in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95)):
        expected = np.nanquantile(x.numpy(), level, axis=1)
        assert np.allclose(statistics[name](x).numpy(), expected, rtol=0, atol=1e-12)


def test_checks_without_data_or_with_bad_statistics_are_refused():
    fit = pretend(UnitMixture(1), normals(10, 2, seed=0))
    bare = Fit(fit.model, fit.draws, attrs={"schema": fit.schema.to_config()})
    with pytest.raises(ValueError, match="training data"):
        calibration.posterior_predictive_check(bare)
    with pytest.raises(ValueError, match="statistic 'rows'"):
        calibration.posterior_predictive_check(fit, {"rows": lambda rows: rows})
