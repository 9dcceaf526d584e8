"""A fit through ArviZ: names, groups, loo; the verdict; agreement of engines."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz, is_datatree
from bayesgen.diagnostics import agreement, to_arviz
from bayesgen.fit import Fit
from bayesgen.predictive import replicated
from bayesgen.summary import Summary
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []

CHECK = Path(__file__).resolve().parent.parent / "arviz1_check.py"


def rows(num_rows=100, seed=0):
    generator = rng.make_generator(seed)
    shift = 6.0 * torch.randint(0, 2, (num_rows, 1), generator=generator)
    return rng.standard_normal((num_rows, 2), generator) + shift


@pytest.fixture(scope="module")
def fit():
    x = rows()
    columns = {"height": x[:, 0].numpy(), "width": x[:, 1].numpy()}
    made = pretend(UnitMixture(2), columns, switch=True, num_chains=4, num_draws=250)
    return dataclasses.replace(
        made,
        sample_stats={"lp": made.log_likelihood(x).sum(-1)},
        attrs={**made.attrs, "converged": True, "settings": {"num_starts": 2}},
    )


# ---------------------------------------------------------------- ArviZ
def test_the_layer_under_this_arviz():
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.peer
def test_the_layer_under_arviz_1():
    """Needs a Python 3.12 with ArviZ 1.x and no torch; ``BAYESGEN_ARVIZ1`` names it."""
    import os

    python = os.environ.get("BAYESGEN_ARVIZ1") or shutil.which("python3.12")
    if python is None:
        pytest.skip("no python3.12; set BAYESGEN_ARVIZ1 to one with arviz>=1")
    probe = [python, "-c", "import arviz; print(arviz.__version__)"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    if found.returncode != 0 or not found.stdout.startswith("1."):
        pytest.skip(f"{python} has no ArviZ 1.x; set BAYESGEN_ARVIZ1 to one that has")
    done = subprocess.run([python, CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ArviZ 1." in done.stdout


def test_groups_dims_and_coords(fit):
    data = to_arviz(fit, posterior_predictive=5)
    assert data.posterior["loc"].dims == ("chain", "draw", "component", "column")
    assert data.posterior["loc"].coords["column"].values.tolist() == ["height", "width"]
    assert data.posterior["weights"].dims == ("chain", "draw", "component")
    assert data.posterior["num_occupied"].dims == ("chain", "draw")
    assert data.log_likelihood["x"].dims == ("chain", "draw", "row")
    assert data.log_likelihood["x"].shape == (4, 250, 100)
    assert data.observed_data["x"].dims == ("row", "column")
    assert data.posterior_predictive["x"].shape == (4, 5, 100, 2)
    assert data.sample_stats["lp"].shape == (4, 250)
    assert data.posterior.attrs["engine"] == "pretend"
    assert data.posterior.attrs["settings"] == '{"num_starts": 2}'
    assert "identified" in data.posterior.attrs["alignment"]


def test_values_are_the_fit_s(fit):
    data = fit.arviz
    np.testing.assert_array_equal(data.posterior["loc"].values, fit.aligned.draws["loc"].numpy())
    expected = fit.log_likelihood(fit.data).numpy()
    np.testing.assert_array_equal(data.log_likelihood["x"].values, expected)
    np.testing.assert_array_equal(data.observed_data["x"].values, fit.data.tensor().numpy())
    assert fit.arviz is data


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3.1
def test_loo_and_compare_work(fit):
    arviz = import_arviz()
    one = pretend(UnitMixture(1), fit.data, num_chains=4, num_draws=250)
    loo = arviz.loo(fit.arviz)
    in_sample = float(fit.log_prob(fit.data).sum())
    elpd = float(loo.elpd if is_datatree() else loo.elpd_loo)
    assert elpd < in_sample
    assert elpd == pytest.approx(in_sample, abs=20.0)
    assert arviz.compare({"two": fit.arviz, "one": one.arviz}).index[0] == "two"


def test_netcdf_round_trip(fit, tmp_path):
    import warnings

    fit.arviz.to_netcdf(str(tmp_path / "draws.nc"), engine="h5netcdf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = import_arviz().from_netcdf(str(tmp_path / "draws.nc"), engine="h5netcdf")
    np.testing.assert_array_equal(again.posterior["loc"].values, fit.arviz.posterior["loc"].values)


def test_prior_groups(fit):
    prior = {"weights": fit.draws["weights"][:1, :7], "loc": fit.draws["loc"][:1, :7]}
    data = to_arviz(fit, prior=prior, prior_predictive=torch.zeros(1, 7, 100, 2))
    assert data.prior["loc"].dims == ("chain", "draw", "component", "column")
    assert data.prior_predictive["x"].shape == (1, 7, 100, 2)


def test_too_large_groups_are_left_out_and_say_why(fit):
    data = to_arviz(fit, posterior_predictive=3, max_elements=1000)
    assert "log_likelihood" not in data
    assert "posterior_predictive" not in data
    assert "above max_elements=1,000" in data.attrs["log_likelihood_skipped"]
    bare = Fit(fit.model, fit.draws, attrs={"schema": fit.schema.to_config()})
    assert "training data" in to_arviz(bare).attrs["log_likelihood_skipped"]


def test_replicates_have_one_draw_each():
    fit = pretend(UnitMixture(1), [[0.0], [100.0]], num_chains=1, num_draws=50)
    draws = {**fit.draws, "loc": torch.arange(50.0).double().reshape(1, 50, 1, 1) * 1000}
    copies = replicated(Fit(fit.model, draws, data=fit.data), 5, num_rows=20)["x"]
    assert copies.shape == (1, 5, 20, 1)
    assert copies.std(2).max() < 3.0  # rows of one data set share their draw
    assert copies.mean((0, 2, 3)).diff().min() > 5000


# ---------------------------------------------------------------- summary
@pytest.mark.filterwarnings("ignore:invalid value")  # ArviZ divides by a constant's variance
def test_the_table_is_arviz_s(fit):
    table = fit.summary().table
    arviz = import_arviz()
    expected = arviz.summary(fit.arviz, round_to="none")
    assert set(table.index) == set(expected.index)
    for name in ("loc[0, height]", "weights[1]", "mean[0]", "num_occupied"):
        np.testing.assert_allclose(
            table.loc[name].astype(float), expected.loc[name].astype(float), equal_nan=True
        )
    assert list(fit.summary().invariants.index) == ["mean[0]", "mean[1]", "num_occupied"]


def test_a_good_fit_is_called_converged(fit):
    summary = fit.summary()
    assert summary.is_converged
    assert summary.problems == ()
    text = str(summary)
    for part in (
        "UnitMixture of 2",
        "Dirichlet",
        "pretend(num_starts=2)",
        "height, width",
        "verdict: PASS",
        "labels are identified",
        "loc[0, height]",
    ):
        assert part in text


def test_bad_fits_are_not(fit):
    far = {**fit.draws, "loc": fit.draws["loc"] + torch.arange(4.0)[:, None, None, None]}
    unmixed = dataclasses.replace(fit, draws=far)
    assert not unmixed.summary().is_converged
    assert "R-hat" in str(unmixed.summary())
    walk = fit.draws["loc"] + 0.05 * rng.standard_normal(
        (4, 250, 1, 1), rng.make_generator(0)
    ).cumsum(1)
    slow = dataclasses.replace(fit, draws={**fit.draws, "loc": walk})
    assert "effective sample size" in str(slow.summary())
    stopped = dataclasses.replace(fit, attrs={**fit.attrs, "converged": False})
    assert "stopped before" in str(stopped.summary())
    assert not stopped.summary().is_converged


def test_raw_r_hat_stands_beside(fit):
    swap = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])[:, None].expand(4, 250, 2)
    draws = fit.model.symmetry.apply(fit.aligned.draws, swap)
    switched = dataclasses.replace(fit, draws=draws)
    assert switched.summary().is_converged
    assert switched.summary().raw.loc["loc[0, height]", "r_hat"] > 1.5
    assert switched.summary().table.loc["loc[0, height]", "r_hat"] < 1.02


def test_empty_components_do_not_count():
    x = rows()
    fit = pretend(UnitMixture(2), x, num_chains=4, num_draws=250)
    generator = rng.make_generator(0)
    drift = 100.0 * torch.arange(4.0).double()[:, None, None, None].expand(4, 250, 1, 2)
    empty = drift + rng.standard_normal((4, 250, 1, 2), generator)
    weights = torch.cat([fit.draws["weights"], torch.full((4, 250, 1), 1e-6).double()], -1)
    draws = {
        "weights": weights / weights.sum(-1, keepdim=True),
        "loc": torch.cat([fit.draws["loc"], empty], 2),
    }
    three = Fit(UnitMixture(3).bind(fit.data), draws, data=fit.data)
    assert three.aligned.empty == (2,)
    assert three.summary().table.loc["loc[2, x0]", "r_hat"] > 1.5
    assert three.summary().is_converged
    assert "loc[2, x0]" not in str(three.summary())


def test_one_draw_has_no_r_hat(fit):
    point = {site: value[:1, :1] for site, value in fit.draws.items()}
    summary = dataclasses.replace(fit, draws=point, sample_stats={}).summary()
    assert summary.table["r_hat"].isna().all()
    assert float(summary.table.loc["weights[0]", "mean"]) == pytest.approx(
        float(point["weights"].max())
    )
    assert "verdict: PASS" in str(summary)


def test_large_sites_are_left_out(fit, monkeypatch):
    monkeypatch.setattr("bayesgen.summary._MAX_ENTRIES", 5)
    summary = Summary(fit)
    assert summary.left_out == ("loc",)
    assert len(summary.table) == 5
    assert "left out for their size: loc" in str(summary)


# ---------------------------------------------------------------- agreement
def test_engines_that_agree_and_one_that_does_not(fit):
    x = rows(seed=9)
    other = pretend(UnitMixture(2), fit.data, num_chains=2, num_draws=500, seed=7)
    shifted = dataclasses.replace(
        other, draws={**other.draws, "loc": other.draws["loc"] + 0.5}, sample_stats={}
    )
    table = agreement({"a": fit, "b": other, "c": shifted}, x)
    good, bad = table.xs("b", level="fit"), table.xs("c", level="fit")
    assert (good["z"].abs().dropna() < 4).all()
    assert bad.loc["mean[0]", "z"] > 10
    assert bad.loc["mean[0]", "difference"] == pytest.approx(0.5, abs=0.1)
    assert bad.loc["log_prob", "difference"] < -0.05
    for quantity in ("log_prob", "log_likelihood", "num_occupied", "sorted_weights[0]"):
        assert quantity in good.index
    assert np.isnan(table.loc[("mean[0]", "a"), "z"])


def test_findings_say_what_differs(fit):
    """Equal posteriors have none; a narrower, a shifted and a bimodal one are each called so."""
    x = rows(40)
    one, two = (pretend(UnitMixture(1), x, num_draws=500, seed=seed) for seed in (0, 1))
    centre = two.draws["loc"].mean((0, 1))
    noise = two.draws["loc"] - centre
    coin = (torch.rand(noise.shape, generator=rng.make_generator(5)) < 0.5).double()

    def spoilt(loc):
        return dataclasses.replace(two, draws={**two.draws, "loc": loc})

    fits = {
        "a": one,
        "same": two,
        "narrow": spoilt(centre + 0.6 * noise),
        "moved": spoilt(two.draws["loc"] + 0.1),
        "heavy": spoilt(two.draws["loc"].index_fill(1, torch.tensor(7), 9.0)),
        "split": spoilt(centre + noise.std() * ((2 * coin - 1) * 1.4 + 0.2 * noise / noise.std())),
    }
    table = agreement(fits).xs("mean[0]")
    assert table.loc["same", "finding"] == ""
    assert table.loc["same", "overlap"] > 0.97
    assert table.loc["same", "kl"] < 0.01
    assert table.loc["narrow", "finding"].startswith("narrower: 0.59 of a's")
    assert table.loc["heavy", "sd"] > 1.5 * table.loc["a", "sd"]
    assert table.loc["heavy", "finding"] == ""  # one draw in the tail is no wider posterior
    assert table.loc["moved", "finding"].startswith("mean above by 0.6")
    assert table.loc["split", "finding"].startswith("another shape: overlap 0.")
    # two normals whose means are d standard deviations apart overlap by 2 Phi(-d / 2)
    d = table.loc["moved", "sds"]
    expected = float(2 * torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-d / 2)))
    assert table.loc["moved", "overlap"] == pytest.approx(expected, abs=0.05)
    assert table.loc["moved", "kl"] == pytest.approx(d**2 / 2, rel=0.25)


def test_fits_in_a_list_or_by_name(fit):
    other = dataclasses.replace(fit, attrs={**fit.attrs, "k_hat": 0.4})
    listed = agreement([fit, other])
    assert list(listed.index.get_level_values(1).unique()) == ["pretend", "pretend 2"]
    assert listed.loc[("k_hat", "pretend 2"), "mean"] == 0.4
    assert list(agreement(fit, other, x=rows(9)).index.get_level_values(1).unique()) == [
        "pretend",
        "pretend 2",
    ]


def test_z_scores_are_calibrated():
    """Over many pairs of equal posteriors z is about standard normal."""
    x = rows(40)
    fits = [pretend(UnitMixture(2), x, num_draws=50, seed=seed) for seed in range(40)]
    pairs = zip(fits[::2], fits[1::2], strict=True)
    z = [agreement({"a": a, "b": b}, x).loc[("mean[0]", "b"), "z"] for a, b in pairs]
    assert 0.5 < float(np.std(z)) < 1.8


def test_the_number_of_clusters_is_an_invariant(fit):
    counted = dataclasses.replace(
        fit,
        sample_stats={"num_occupied": torch.full((4, 250), 7)},
        model=without_invariants(fit.model),
    )
    assert counted.arviz.posterior["num_occupied"].values.mean() == 7.0
    assert "num_occupied" in counted.summary().table.index
    kept = dataclasses.replace(counted, sample_stats={}, history={"num_occupied": [9.0, 6.0]})
    table = agreement({"a": counted, "b": kept})
    assert table.loc[("num_occupied", "b"), "difference"] == -1.0


def without_invariants(model):
    class Quiet(type(model)):
        def invariants(self, draws):
            return {}

    return Quiet(model.num_components, columns=model.columns)


def test_agreement_needs_two_fits_and_rows(fit):
    with pytest.raises(ValueError, match="at least two"):
        agreement({"a": fit})
    bare = Fit(fit.model, fit.draws, attrs={"schema": fit.schema.to_config()})
    with pytest.raises(ValueError, match="pass rows"):
        agreement({"a": bare, "b": fit})
