"""Pictures of a latent space show what the fit says."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from bayesgen import plots, rng
from bayesgen.data import as_dataset
from bayesgen.fit import Fit
from bayesgen.plots.latents import _ellipse, _latent_moments
from bayesgen.toys import UnitMixture, pretend
from tests.core.factors import Factors, loadings, turned

__all__: list[str] = []


def planted(scales=(5.0, 3.0, 1.5), shape=(2, 150), spread=0.1):
    model = Factors(8, len(scales))
    draws = turned(loadings(scales, shape=shape, spread=spread), model.symmetry)
    x = rng.standard_normal((40, 8), rng.make_generator(2))
    data = as_dataset(x, columns=[f"x{j}" for j in range(8)])
    return Fit(model, draws, data=data, attrs={"engine": "nobody"})


@pytest.fixture(scope="module")
def fit():
    return planted()


def draw(picture):
    figure = picture if not picture.__class__.__name__.endswith("Axes") else picture.figure
    figure.savefig(io.BytesIO(), format="png", dpi=40)


# ------------------------------------------------------------------ loadings
def test_loadings_are_means_with_intervals(fit):
    figure = plots.loadings(fit, mass=0.8)
    draw(figure)
    aligned = fit.aligned.draws["loadings"].flatten(0, 1)
    assert [ax.get_title() for ax in figure.axes] == [f"direction {k}" for k in range(3)]
    for k, ax in enumerate(figure.axes):
        dots = np.concatenate([np.stack(c.get_data(), -1) for c in ax.lines[1:]])
        at = dots[dots[:, 1].argsort()[::-1], 0]
        np.testing.assert_allclose(at, aligned[:, :, k].mean(0), atol=1e-12)
        bars = np.concatenate([c.get_segments() for c in ax.collections if len(c.get_segments())])
        ends = bars[bars[:, 0, 1].argsort()[::-1]][:, :, 0]
        wanted = torch.quantile(
            aligned[:, :, k], torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0
        )
        np.testing.assert_allclose(ends, wanted.T, atol=1e-12)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(fit.columns)


def test_loadings_of_some_columns_and_directions(fit):
    figure = plots.loadings(fit, columns=["x3", 1], directions=[2])
    draw(figure)
    assert [ax.get_title() for ax in figure.axes] == ["direction 2"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["x3", "x1"]


def test_ambiguous_directions_are_told_in_the_title():
    figure = plots.loadings(planted((3.0, 3.0, 1.0), spread=0.2))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["direction 0, ambiguous", "direction 1, ambiguous", "direction 2"]


# ------------------------------------------------------------------ scree
def test_scree_shows_variances_and_noise(fit):
    ax = plots.scree(fit)
    draw(ax)
    variance = fit.explained_variance().variance.mean((0, 1))
    dots = next(c for c in ax.lines if len(c.get_xdata()) == 3)
    np.testing.assert_allclose(dots.get_ydata(), variance)
    line = next(c for c in ax.lines if c.get_label() == "noise of a column")
    np.testing.assert_allclose(line.get_ydata(), 1.0)
    shares = [float(t.get_text().rstrip("%")) for t in ax.texts]
    np.testing.assert_allclose(shares, 100 * variance / (variance.sum() + 8), atol=0.6)
    assert ax.get_yscale() == "linear"
    ax = plots.scree(planted((30.0, 1.0, 0.5)))
    draw(ax)
    assert ax.get_yscale() == "log"


# ------------------------------------------------------------------ rows
def test_latent_moments_are_those_of_the_whole_posterior(fit):
    rows = fit.data.tensor()[:5]
    mean, covariance = _latent_moments(fit, rows, [0, 2])
    law = fit.model.encode(rows, {k: v.flatten(0, 1) for k, v in fit.aligned.draws.items()})
    generator = rng.make_generator(0)
    noise = rng.standard_normal((40, *law.mean.shape), generator)
    drawn = (law.mean + law.stddev * noise).flatten(0, 1)[..., [0, 2]]
    np.testing.assert_allclose(mean, drawn.mean(0), atol=0.02)
    for i in range(5):
        np.testing.assert_allclose(covariance[i], np.cov(drawn[:, i].T), atol=0.02)
    np.testing.assert_allclose(mean, fit.encode(rows)[:, [0, 2]], atol=0.02)


def test_ellipses_hold_half(fit):
    covariance = np.array([[2.0, 0.9], [0.9, 1.0]])
    outline = _ellipse(covariance)
    distance = (outline * np.linalg.solve(covariance, outline)).sum(0)
    np.testing.assert_allclose(distance, 2 * np.log(2), rtol=1e-3)


def test_latent_map_colours_by_label(fit):
    labels = ["b"] * 10 + ["a"] * 30
    ax = plots.latent_map(fit, labels=labels)
    draw(ax)
    assert ax.get_legend_handles_labels()[1] == ["a (30)", "b (10)"]
    points = np.concatenate([c.get_offsets() for c in ax.collections])
    mean, _ = _latent_moments(fit, fit.data.tensor(), [0, 1])
    np.testing.assert_allclose(sorted(points.tolist()), sorted(mean.tolist()))
    assert "direction 0 (" in ax.get_xlabel()
    assert "% of the signal)" in ax.get_xlabel()
    many = plots.latent_map(fit, labels=[str(i) for i in range(40)])
    assert "others (34)" in many.get_legend_handles_labels()[1]


def test_many_rows_share_the_ellipses(fit):
    x = rng.standard_normal((1000, 8), rng.make_generator(3))
    ax = plots.latent_map(fit, x, directions=(2, 1))
    assert len([c for c in ax.lines if len(c.get_xdata()) == 61]) == 250
    assert "direction 2" in ax.get_xlabel()


def test_biplot_arrows_are_correlations(fit):
    ax = plots.biplot(fit, columns=["x1", "x5"], labels=["a"] * 40)
    draw(ax)
    assert {t.get_text() for t in ax.texts if t.get_text()} == {"x1", "x5"}
    arrows = [t for t in ax.texts if t.get_text() == ""]
    tips = np.array([t.xy for t in arrows])
    w = fit.aligned.draws["loadings"].flatten(0, 1)
    share = (w / w.square().sum(-1, keepdim=True).sqrt())[:, [1, 5]][..., :2].mean(0).numpy()
    ratio = tips / share
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)  # one factor stretches them all
    alone = plots.biplot(planted(shape=(1, 1)))
    draw(alone)


# ------------------------------------------------------------------ refusals
def test_other_fits_are_refused(fit):
    mixture = pretend(UnitMixture(2), rng.standard_normal((20, 2), rng.make_generator(0)))
    with pytest.raises(ValueError, match="site 'loadings'"):
        plots.loadings(mixture)
    with pytest.raises(TypeError, match="Explained"):
        plots.scree(mixture)
    with pytest.raises(ValueError, match="no direction 7"):
        plots.latent_map(fit, directions=(0, 7))
    with pytest.raises(ValueError, match="needs two"):
        plots.biplot(planted((2.0,)))
    with pytest.raises(ValueError, match="labels has 3 entries"):
        plots.latent_map(fit, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="mass=0"):
        plots.loadings(fit, mass=0)
