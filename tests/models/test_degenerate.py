"""Degenerate data end in a clear error or a sane fit, whatever the engine and the covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesgen.inference import EM, VB, Gibbs
from bayesgen.models import GaussianMixture

__all__: list[str] = []

COVARIANCES = ("full", "tied", "diagonal", "spherical")
ENGINES = {
    "em": EM(num_starts=2, max_steps=30),
    "likelihood": EM(objective="likelihood", num_starts=2, max_steps=30),
    "vb": VB(num_starts=2, max_steps=40, num_samples=5),
    "gibbs": Gibbs(num_chains=2, num_samples=10, num_warmup=10),
}


def rows(n=24, d=2, seed=0):
    r = np.random.default_rng(seed)
    return r.normal(size=(n, d)) + 5.0 * r.integers(2, size=(n, 1))


def _duplicates():
    return np.repeat(rows(6), 5, axis=0)


def _constant_column():
    x = rows()
    x[:, 1] = 7.0
    return x


def _zeros():
    x = rows()
    x[:, 0] = 0.0
    return x


def _duplicate_column():
    x = rows()
    return np.column_stack([x[:, 0], x[:, 0], x[:, 1]])


def _wide():
    return rows(4, 9)


def _few():
    return rows(2)


def _one_row():
    return rows(1)


def _all_equal():
    return np.full((12, 2), 3.5)


def _row_of_holes():
    x = rows()
    x[3] = np.nan
    return x


def _mostly_holes():
    x = rows(n=16, d=3)
    x[np.random.default_rng(1).random(x.shape) < 0.6] = np.nan
    return x


def _ties_within_a_cluster():
    x = rows()
    x[x[:, 0] > 3.0, 1] = 1.0
    return x


def _one_far_row():
    x = rows()
    x[0] = 1e6
    return x


def _tiny_units():
    return rows() * 1e-12


def _huge_units():
    return rows() * 1e12


DATA = {
    "duplicates": _duplicates,
    "constant column": _constant_column,
    "zeros": _zeros,
    "duplicate column": _duplicate_column,
    "n < d": _wide,
    "n < K": _few,
    "one row": _one_row,
    "all equal": _all_equal,
    "row of NaN": _row_of_holes,
    "mostly NaN": _mostly_holes,
    "ties": _ties_within_a_cluster,
    "far row": _one_far_row,
    "1e-12": _tiny_units,
    "1e12": _huge_units,
}


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("name", list(DATA))
def test_sane_fit(name, engine, covariance):
    """Finite draws, a finite density of every row, weights that sum to one."""
    x = DATA[name]()
    fit = ENGINES[engine].run(GaussianMixture(3, covariance), x, seed=0)
    for site, value in fit.draws.items():
        assert bool(value.isfinite().all()), site
    torch.testing.assert_close(
        fit.draws["weights"].sum(-1), torch.ones(fit.draws["weights"].shape[:2]).double()
    )
    assert bool(fit.log_prob(x).isfinite().all())
    assert bool(fit.sample(5).isfinite().all())
    assert fit.predict(x).shape == (len(x),)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("engine", ["em", "vb"])
def test_an_offset_changes_nothing(engine, covariance):
    x = np.round(rows(60, 2, seed=1), 4)
    # Exact in binary: offsets of 1e8 round the data themselves otherwise.
    x = np.round(x * 1024) / 1024
    mixture = GaussianMixture(3, covariance)
    plain = ENGINES[engine].run(mixture, x, seed=0)
    moved = ENGINES[engine].run(mixture, x + 1e8, seed=0)
    torch.testing.assert_close(plain.log_prob(x), moved.log_prob(x + 1e8), rtol=0, atol=1e-6)
    key = "objective" if engine == "em" else "elbo"
    assert moved.attrs[key] == pytest.approx(plain.attrs[key], abs=1e-6)
    assert torch.equal(plain.predict(x), moved.predict(x + 1e8))


def test_gibbs_forgets_an_offset():
    x = np.round(rows(40, 2, seed=1) * 1024) / 1024
    fits = [ENGINES["gibbs"].run(GaussianMixture(3), x + shift, seed=0) for shift in (0.0, 1e8)]
    left, right = fits[0].log_prob(x), fits[1].log_prob(x + 1e8)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_units_do_not_matter(covariance):
    """Rescaled columns shift the density by the log of the scale and change no label."""
    x = rows(60, 2, seed=2)
    scale = np.array([1e-6, 1e5]) if covariance != "spherical" else np.array([1e5, 1e5])
    plain = ENGINES["vb"].run(GaussianMixture(3, covariance), x, seed=0)
    scaled = ENGINES["vb"].run(GaussianMixture(3, covariance), x * scale, seed=0)
    shift = float(np.log(scale).sum())
    torch.testing.assert_close(
        plain.log_prob(x), scaled.log_prob(x * scale) + shift, rtol=1e-6, atol=1e-6
    )


def test_a_row_of_holes_says_nothing():
    """Up to the number of rows that the weights' prior sees."""
    x = rows(40, 2, seed=3)
    holes = np.vstack([x, [[np.nan, np.nan]]])
    fit = ENGINES["vb"].run(GaussianMixture(2), holes, seed=0)
    assert float(fit.log_prob(holes)[-1]) == pytest.approx(0.0, abs=1e-12)


def test_maximum_likelihood_says_when_it_collapses():
    x = np.vstack([rows(12, 2, seed=4), np.full((6, 2), 40.0)])
    fit = ENGINES["likelihood"].run(GaussianMixture(2), x, seed=0)
    assert any("collapsed" in message for message in fit.attrs["messages"])
    fit = ENGINES["em"].run(GaussianMixture(2), x, seed=0)
    assert not any("collapsed" in message for message in fit.attrs["messages"])


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize("engine", list(ENGINES))
def test_impossible_data_are_refused(engine):
    run = ENGINES[engine].run
    x = rows()
    infinite = x.copy()
    infinite[5, 1] = np.inf
    with pytest.raises(ValueError, match=r"(?s)row 5.*inf|inf.*row 5"):
        run(GaussianMixture(2), infinite)
    for covariance in ("full", "diagonal"):
        with pytest.raises(ValueError, match=r"column 'x1' .* squares overflow"):
            run(GaussianMixture(2, covariance), np.where(np.arange(x.shape[1]) == 1, 1e200 * x, x))
    with pytest.raises(ValueError, match="row"):
        run(GaussianMixture(2), np.zeros((0, 2)))
    hollow = x.copy()
    hollow[:, 1] = np.nan
    with pytest.raises(ValueError, match="'x1' has no observed value"):
        run(GaussianMixture(2), hollow)
    with pytest.raises((ValueError, TypeError)):
        run(GaussianMixture(2), np.array([["a", "b"], ["c", "d"]]))
    with pytest.raises(ValueError, match=r"2-d|\(n, d\)|dimension|shape"):
        run(GaussianMixture(2), np.zeros((3, 2, 2)))


def test_wrong_width_at_test_time():
    fit = ENGINES["vb"].run(GaussianMixture(2), rows(), seed=0)
    for verb in (fit.log_prob, fit.predict, fit.encode, fit.impute):
        with pytest.raises(ValueError, match=r"column"):
            verb(rows(5, 3))
    bad = rows(5)
    bad[2, 0] = np.inf
    with pytest.raises(ValueError, match="row 2"):
        fit.log_prob(bad)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_components"):
        GaussianMixture(0)
    with pytest.raises(ValueError, match="covariance"):
        GaussianMixture(2, "banded")
    with pytest.raises(ValueError, match="site"):
        GaussianMixture(2, priors={"colour": 1})
    with pytest.raises(ValueError, match="num_starts"):
        VB(num_starts=0)
    with pytest.raises(ValueError, match="schedule"):
        EM(schedule="sometimes")
    with pytest.raises(ValueError, match="batch_size"):
        VB(schedule="memoised")
    with pytest.raises(ValueError, match="num_samples"):
        Gibbs(num_samples=0)


@pytest.mark.parametrize("device", ["graphics", "cuda"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device='{device}'"):
        VB(device=device).run(GaussianMixture(2), rows())
