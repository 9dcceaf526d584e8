"""Pictures: what they show is what the fit says, without pyplot, a display, or a warning."""

from __future__ import annotations

import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayesgen import calibration, outliers, plots, priors, rng
from bayesgen.data import as_dataset
from bayesgen.distributions import NormalInverseWishart
from bayesgen.fit import Fit
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


def two_clusters(columns: int, num_rows: int = 120) -> torch.Tensor:
    x = rng.standard_normal((num_rows, columns), rng.make_generator(num_rows + 2))
    x[::2] += 6.0
    return x


@pytest.fixture(scope="module")
def plane() -> Fit:
    data = as_dataset(two_clusters(2), columns=["width", "height"])
    return pretend(UnitMixture(2), data, num_draws=150, switch=True)


@pytest.fixture(scope="module")
def line() -> Fit:
    return pretend(UnitMixture(2), as_dataset(two_clusters(1), columns=["width"]))


@pytest.fixture(scope="module")
def space() -> Fit:
    return pretend(UnitMixture(2), two_clusters(4))


@pytest.fixture(scope="module")
def verdict(plane) -> outliers.Outliers:
    new = two_clusters(2, 30)
    new[:5] = torch.tensor([-6.0, 10.0], dtype=torch.float64)
    return outliers.outliers(plane, new, calibration=two_clusters(2, 4000), fdr=0.01)


def draw(picture: Axes | Figure) -> None:
    """Render it: layout and text errors show only then."""
    figure = picture if isinstance(picture, Figure) else picture.figure
    figure.savefig(io.BytesIO(), format="png", dpi=40)


def texts(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


# ------------------------------------------------------------------ densities
def test_density_in_the_plane(plane):
    ax = plots.density(plane)
    draw(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("width", "height")
    points = next(curve for curve in ax.lines if len(curve.get_xdata()) == 120)
    assert np.allclose(points.get_xdata(), plane.data.tensor()[:, 0])


def test_contours_hold_the_mass_they_name():
    # One component known exactly: the 50, 80 and 95 % regions are discs.
    loc = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    draws = {"loc": loc, "weights": torch.ones(1, 1, 1, dtype=torch.float64)}
    x = 4.0 * torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    fit = Fit(UnitMixture(1, columns=("x0", "x1")), draws, data=as_dataset(x, kinds="real"))
    ax = plots.density(fit, show_components=False)
    filled = ax.collections[0]
    expected = [1 - 0.95, 1 - 0.8, 1 - 0.5]  # density relative to the peak: 1 - mass in 2-d
    assert np.allclose(filled.levels[:3], expected, atol=0.03)


def test_density_in_one_column_integrates_to_one(line):
    ax = plots.density(line)
    draw(ax)
    curve = next(c for c in ax.lines if c.get_label() == "posterior predictive")
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1.0, abs=0.01)
    assert ax.get_xlabel() == "width"


def test_other_columns_are_integrated_out(space):
    ax = plots.density(space, columns=["x3"])
    curve = next(c for c in ax.lines if c.get_label() == "posterior predictive")
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1.0, abs=0.01)


def test_ellipses_hold_half_of_a_component(plane):
    ax = plots.components(plane, num_draws=7)
    outlines = [c for c in ax.lines if len(c.get_xdata()) == 61]
    assert len(outlines) == 2 * 7
    first = np.stack([outlines[0].get_xdata(), outlines[0].get_ydata()])
    radius = np.linalg.norm(first - first[:, :-1].mean(1, keepdims=True), axis=0)
    assert np.allclose(radius, np.sqrt(2 * np.log(2)), atol=1e-3)
    centers = {(round(float(c.get_xdata()[0])), c.get_color()) for c in outlines}
    assert len({color for _, color in centers}) == 2  # aligned: one colour a place


@pytest.mark.parametrize("site", ["full", "tied", "diagonal", "spherical"])
def test_ellipses_know_every_covariance(plane, site):
    from bayesgen.plots.densities import _moments

    factor = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    sites = {
        "full": {"scale_tril": factor.expand(2, 150, 2, 2, 2)},
        "tied": {"scale_tril": factor.expand(2, 150, 2, 2)},
        "diagonal": {"variance": torch.tensor([4.0, 2.0]).expand(2, 150, 2, 2)},
        "spherical": {"variance": torch.full((2, 150, 2), 3.0)},
    }
    expected = {
        "full": [[4.0, 2.0], [2.0, 2.0]],
        "tied": [[4.0, 2.0], [2.0, 2.0]],
        "diagonal": [[4.0, 0.0], [0.0, 2.0]],
        "spherical": [[3.0, 0.0], [0.0, 3.0]],
    }
    _, _, covariance = _moments({**plane.draws, **sites[site]}, 5)
    assert covariance.shape == (5, 2, 2, 2)
    wanted = torch.tensor(expected[site], dtype=torch.float64)
    assert torch.allclose(covariance, wanted.expand_as(covariance))


def test_labels_mark_outliers(plane, verdict):
    new = two_clusters(2, 30)
    new[:5] = torch.tensor([-6.0, 10.0], dtype=torch.float64)
    ax = plots.labels(plane, new, outliers=verdict)
    draw(ax)
    assert any("outliers (5" in text for text in texts(ax))
    ringed = ax.collections[-1].get_offsets()
    assert np.allclose(ringed, [[-6.0, 10.0]] * 5)
    with pytest.raises(ValueError, match="verdict is on 30 rows"):
        plots.labels(plane, outliers=verdict)


def test_labels_project_many_columns(space):
    ax = plots.labels(space)
    draw(ax)
    assert "principal component 1" in ax.get_xlabel()
    # The two clusters fall apart along the first component.
    left, right = (c.get_offsets()[:, 0] for c in ax.collections)
    assert max(left) < min(right) or max(right) < min(left)


def test_labels_in_one_column_show_certainty(line):
    ax = plots.labels(line)
    draw(ax)
    assert ax.get_ylabel() == "probability of the label"


def test_responsibilities_sorted(plane):
    ax = plots.responsibilities(plane)
    draw(ax)
    image = np.asarray(ax.images[0].get_array())
    assert image.shape == (120, 2)
    assert (np.diff(image.argmax(1)) >= 0).all()


def test_pairs(space):
    figure = plots.pairs(space, columns=["x0", "x2", 3])
    draw(figure)
    assert len(figure.axes) == 9
    shown = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]
    assert shown == ["x0", "x2", "x3"]


@pytest.mark.parametrize(
    ("columns", "match"), [(["nope"], "no column"), ([7], "out of range"), ([0, 1, 0], "1 to 2")]
)
def test_bad_columns_are_refused(plane, columns, match):
    with pytest.raises(ValueError, match=match):
        plots.density(plane, columns=columns)


# ------------------------------------------------------------------ checks
def test_trace_of_an_objective_and_of_chains(plane):
    history = {"elbo": [-900.0, -120.0, *np.linspace(-110, -100, 40)], "num_occupied": [2.0] * 42}
    fit = Fit(plane.model, plane.draws, data=plane.data, history=history)
    ax = plots.trace(fit)
    draw(ax)
    assert "ELBO" in ax.get_ylabel()
    assert ax.get_ylim()[0] > -200  # the first leap does not flatten the rest
    assert plots.trace(fit, name="num_occupied").get_ylabel() == "num_occupied"
    stats = {"lp": torch.randn(2, 150, generator=rng.make_generator(0))}
    ax = plots.trace(Fit(plane.model, plane.draws, data=plane.data, sample_stats=stats))
    draw(ax)
    assert len(ax.lines) == 2
    with pytest.raises(ValueError, match="no record"):
        plots.trace(fit, name="loss")


def test_occupied_clusters_beside_their_prior(plane):
    prior = priors.explore(priors.SymmetricDirichlet(1.0), num_rows=120, num_components=2)
    ax = plots.occupied(plane, prior=prior)
    draw(ax)
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, -1)
    assert np.allclose(heights.sum(1), 1.0)
    assert np.allclose(heights[0], prior.pmf)
    assert heights[1][2] == 1.0  # two clusters six standard deviations apart
    stats = {"num_occupied": torch.tensor([[1.0, 2.0], [2.0, 2.0]])}
    few = {name: value[:, :2] for name, value in plane.draws.items()}
    ax = plots.occupied(Fit(plane.model, few, data=plane.data, sample_stats=stats))
    assert [bar.get_height() for bar in ax.patches] == [0.0, 0.25, 0.75]


def test_p_values_against_the_line(verdict):
    ax = plots.p_values(verdict)
    draw(ax)
    called = next(c for c in ax.lines if c.get_label().startswith("outlier"))
    assert len(called.get_xdata()) == int(verdict.is_outlier.sum()) == 5
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_reasons(plane):
    x = torch.tensor([[0.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    surprise = outliers.explain(plane, x)
    ax = plots.reasons(surprise, plane.columns, row=1)
    draw(ax)
    widths = {t.get_text(): bar.get_width() for t, bar in zip(ax.get_yticklabels(), ax.patches)}  # noqa: B905
    assert widths["width"] == pytest.approx(float(surprise[1, 0]))


def test_predictive_check(plane):
    figure = calibration.posterior_predictive_check(plane, num_samples=40).plot()
    draw(figure)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == 19
    assert titles[0].startswith("mean width")


def test_ranks_leave_the_band_when_wrong():
    generator = rng.make_generator(0)
    good = torch.randint(100, (500,), generator=generator)
    bad = (0.8 * good).long()
    p = calibration.uniformity_p_values({"good": good, "bad": bad}, 99)
    ax = calibration.Ranks({"good": good, "bad": bad}, 99, p).plot()
    draw(ax)
    band = ax.collections[0].get_paths()[0].vertices
    curves = {c.get_label().split()[0]: np.asarray(c.get_ydata()) for c in ax.lines}
    assert np.abs(curves["bad"]).max() > band[:, 1].max()
    assert np.abs(curves["good"]).max() < band[:, 1].max()


@pytest.mark.parametrize("weights", [priors.StickBreaking(1.0), None])
def test_prior_exploration(weights):
    given = weights or torch.distributions.Dirichlet(torch.ones(5))
    components = NormalInverseWishart(torch.zeros(2), 1.0, 4.0, torch.eye(2)) if weights else None
    found = priors.explore(
        given, num_rows=40, num_components=5, components=components, num_samples=500
    )
    figure = found.plot()
    draw(figure)
    assert len(figure.axes) == (2 if weights else 1)
    assert np.allclose([bar.get_height() for bar in figure.axes[0].patches], found.pmf[1:])


def test_agreement_of_engines():
    index = pd.MultiIndex.from_product([["a", "b", "c"], ["Gibbs", "VB"]])
    table = pd.DataFrame(
        {"mean": [1.0, 2.0, 0.0, 0.0, 5.0, 5.0], "sd": [0.5, 0.25, 1.0, 0.5, 0.0, 0.0]},
        index=index,
    )
    half = 3.29 / 2 * table["sd"]
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    ax = plots.agreement(table)
    draw(ax)
    dots = [c for c in ax.lines if c.get_marker() == "o"]
    assert [float(d.get_xdata()[0]) for d in dots] == [0.0, 0.0, 2.0, 0.0]  # c has no spread
    assert texts(ax) == ["Gibbs", "VB"]


# ------------------------------------------------------------------ manners
def test_pictures_go_on_the_axes_given(plane, line):
    left, right = Figure().subplots(1, 2)
    assert plots.density(plane, ax=left) is left
    assert plots.density(line, ax=right) is right


def test_pyplot_is_never_imported():
    # pyplot keeps every figure alive and picks a display: a library must not.
    import subprocess

    code = (
        "import sys; from bayesgen import plots, priors\n"
        "priors.explore(priors.StickBreaking(1.0), num_rows=9, num_components=3).plot()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_fit_without_data_says_so(plane):
    bare = Fit(plane.model, plane.draws, attrs={"schema": plane.schema.to_config()})
    with pytest.raises(ValueError, match="no training data"):
        plots.density(bare)
    draw(plots.density(bare, x=two_clusters(2)))


def test_rows_with_gaps_and_counts():
    x = two_clusters(2)
    x[::5, 0] = float("nan")
    fit = pretend(UnitMixture(2), x)
    draw(plots.density(fit))
    draw(plots.labels(fit))
    counts = pretend(UnitMixture(1), np.arange(20)[:, None] % 5)
    ax = plots.density(counts)
    draw(ax)
    assert ax.get_ylabel() == "probability"


def test_categories_keep_their_names_and_cells():
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "colour": pd.Categorical(generator.choice(["red", "blue", "green"], 60)),
            "lit": generator.random(60) < 0.5,
            "size": generator.normal(size=60),
        }
    )
    fit = pretend(UnitMixture(2), frame)
    ax = plots.density(fit, columns=["colour", "lit"])
    draw(ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["blue", "green", "red"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["no", "yes"]
    points = next(curve for curve in ax.lines if len(curve.get_xdata()) == 60)
    assert len(np.unique(points.get_xdata())) == 60  # equal values do not hide each other
    for columns in (["colour"], ["size", "colour"]):
        draw(plots.density(fit, columns=columns))
    draw(plots.pairs(fit))
    draw(plots.labels(fit, columns=["colour", "size"]))


def test_simulated_data_beside_the_data():
    generator = torch.Generator().manual_seed(0)
    many = {
        "y": torch.randn(80, 30, generator=generator),
        "count": torch.poisson(torch.full((80, 30), 3.0), generator=generator),
        "x": torch.randn(80, 30, 2, generator=generator),
    }
    data = {name: value[0] for name, value in many.items()}
    figure = plots.predictive(many, data, columns={"x": ("height", "width")}, label="prior")
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == ["y", "count", "height", "width"]
    thick = [line for line in figure.axes[0].lines if line.get_linewidth() == 2]
    assert len(thick) == 1
    ordered = np.sort(data["y"].numpy())
    at, share = thick[0].get_xdata(), thick[0].get_ydata()
    np.testing.assert_allclose(share, np.searchsorted(ordered, at, side="right") / 30)
    assert len(figure.axes[1].lines) == 60 + 2
    assert plots.predictive({"y": many["y"]}).axes


def test_chains_energies_and_pairs_of_draws():
    generator = torch.Generator().manual_seed(0)
    made = pretend(UnitMixture(1), torch.randn(40, 2, generator=generator), num_chains=3)
    stats = {
        "energy": torch.randn(3, 100, generator=generator),
        "diverging": torch.arange(300).reshape(3, 100) % 60 == 0,
    }
    fit = Fit(made.model, made.draws, data=made.data, sample_stats=stats)
    figure = plots.chains(fit, ["loc[0, x0]", "mean[1]"])
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["loc\n[0, x0]", "mean\n[1]"]
    trace = figure.axes[1].lines
    assert len(trace) == 3
    np.testing.assert_array_equal(trace[2].get_ydata(), made.draws["loc"][2, :, 0, 0].numpy())
    assert len(plots.chains(fit, max_rows=2).axes) == 6
    pairs = plots.draw_pairs(fit, ["loc[0, x0]", "loc[0, x1]"])
    assert len(pairs.axes[2].lines[1].get_xdata()) == 5  # the divergent ones
    assert plots.energy(fit).get_xlabel().startswith("energy")
    with pytest.raises(ValueError, match="no energies"):
        plots.energy(made)
    with pytest.raises(ValueError, match="no row 'nothing'"):
        plots.chains(fit, ["nothing"])
