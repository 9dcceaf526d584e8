"""Conditioning, reconstructing and explaining: against densities, regressions and eigenvalues."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest
import torch

from bayesgen import rng, verbs
from bayesgen.capabilities import Conditional, Denoising, Explained, Model, Symmetric
from bayesgen.data import as_dataset
from bayesgen.explained import ExplainedVariance
from bayesgen.fit import Fit
from bayesgen.symmetry import Rotation
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


@pytest.fixture(scope="module")
def fit():
    x = rng.standard_normal((120, 3), rng.make_generator(0))
    x[::2] += 4.0
    data = as_dataset(x, columns=["a", "b", "c"])
    return pretend(UnitMixture(2), data, num_draws=40, switch=True)


# ---------------------------------------------------------------- condition
@pytest.mark.parametrize("given", [["a"], ["c", "a"], [1], []])
def test_the_conditional_is_a_ratio_of_predictive_densities(fit, given):
    x = fit.data.tensor()[:7]
    found = fit.condition(x, given)
    names = [fit.columns[c] if isinstance(c, int) else c for c in given]
    rest = [j for j, name in enumerate(fit.columns) if name not in names]
    assert found.columns == tuple(fit.columns[j] for j in rest)
    assert set(found.given) == set(names)
    shown = x.clone()
    shown[:, rest] = torch.nan
    expected = fit.log_prob(x) - fit.log_prob(shown)
    torch.testing.assert_close(found.log_prob(x[:, rest]), expected)


def test_its_moments_are_those_of_its_samples(fit):
    x = torch.tensor([[0.1, 0.2, 0.0], [2.0, 2.1, 0.0], [3.9, 4.0, 0.0]], dtype=torch.float64)
    x[:, 2] = torch.nan
    found = fit.condition(x)  # by its gaps: c given a and b
    assert found.columns == ("c",)
    drawn = found.sample(20_000, seed=1)
    assert drawn.shape == (20_000, 3, 1)
    error = found.stddev / 20_000**0.5
    assert ((drawn.mean(0) - found.mean).abs() < 5 * error).all()
    torch.testing.assert_close(drawn.std(0), found.stddev, atol=0.03, rtol=0)
    low, high = found.interval(0.8, num_samples=4000)
    inside = ((drawn > low) & (drawn < high)).double().mean(0)
    assert ((inside - 0.8).abs() < 0.03).all()
    assert found.mean[0] < 0.5 < 3.5 < found.mean[2]
    assert "c given a, b: 3 rows" in repr(found)


def test_samples_of_the_conditional_share_passes_but_no_numbers(fit, monkeypatch):
    """Each was one row of a sample of all parts; now all rows of a sample are used."""
    x = torch.tensor([[0.1, 0.2, torch.nan], [3.9, 4.0, torch.nan]], dtype=torch.float64)
    found = fit.condition(x, num_draws=20)
    calls: list[int] = []
    draw_from = verbs.draw_from

    def counted(distribution, generator):
        if distribution is found.parts:
            calls.append(1)
        return draw_from(distribution, generator)

    monkeypatch.setattr(verbs, "draw_from", counted)
    drawn = found.sample(500)
    assert len(calls) < 250
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(drawn, found.sample(500))


def test_a_row_chooses_among_the_draws():
    """Draws that explain the given entries badly lose their say."""
    loc = torch.tensor([[[[0.0, 0.0]], [[9.0, 9.0]]]], dtype=torch.float64)
    weights = torch.ones(1, 2, 1, dtype=torch.float64)
    model = UnitMixture(1, columns=("a", "b"))
    data = as_dataset([[0.0, 0.0], [1.0, 1.0]], columns=["a", "b"], kinds="real")
    two = Fit(model, {"loc": loc, "weights": weights}, data=data)
    found = two.condition([[0.0, 5.0], [9.0, 5.0]], ["a"])
    torch.testing.assert_close(found.mean[:, 0], torch.tensor([0.0, 9.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["d"], ValueError, "no column 'd'"),
        ([3], ValueError, "no column 3"),
        (["a", "b", "c"], ValueError, "every column is given"),
        ("a", TypeError, "pass a list"),
        (["b"], ValueError, "column 'b' is given but missing in row 1"),
        (None, ValueError, "gaps in different columns"),
    ],
)
def test_impossible_questions_are_refused(fit, given, error, message):
    x = fit.data.tensor()[:3].clone()
    x[1, 1] = torch.nan
    with pytest.raises(error, match=message):
        fit.condition(x, given)


def test_sizes_are_checked(fit):
    found = fit.condition(fit.data.tensor()[:2], ["a"])
    with pytest.raises(ValueError, match="num_samples=0"):
        found.sample(0)
    with pytest.raises(ValueError, match="mass"):
        found.interval(1.0)
    with pytest.raises(ValueError, match="num_draws=0"):
        fit.condition(fit.data.tensor()[:2], ["a"], num_draws=0)


# ---------------------------------------------------------------- signal and noise
class Shrunk(Model, Denoising, Explained):
    """Signal of one direction: each row is shrunk to the draw's ``loc`` by a half."""

    dims = MappingProxyType({"loc": ("column",)})
    bind = to = coords = to_config = from_config = lambda self, *_: self
    is_bound = True

    def reconstruct(self, x, draws):
        loc = draws["loc"].unsqueeze(-2)
        filled = torch.where(x.isnan(), loc, x)
        return 0.5 * (filled + loc)

    def sample_signal(self, draws, *, generator):
        return draws["loc"].clone()

    def explained_variance(self, draws):
        scale = draws["loc"].square()
        return {"signal": scale.sort(-1, descending=True).values, "noise": scale.sum(-1)}


@pytest.fixture
def shrunk():
    loc = torch.tensor([[[1.0, 2.0], [3.0, 2.0]]], dtype=torch.float64)
    data = as_dataset([[0.0, 0.0], [1.0, 1.0]], kinds="real")
    return Fit(Shrunk(), {"loc": loc}, data=data)


def test_reconstruction_averages_over_draws_and_fills(shrunk):
    rows = torch.tensor([[0.0, 0.0], [4.0, torch.nan]])
    expected = torch.tensor([[1.0, 1.0], [3.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(shrunk.reconstruct(rows), expected)


def test_reconstruction_in_chunks(shrunk, monkeypatch):
    from bayesgen import verbs

    rows = rng.standard_normal((50, 2), rng.make_generator(0))
    whole = shrunk.reconstruct(rows)
    monkeypatch.setattr(verbs, "_BUDGET", 64)
    torch.testing.assert_close(shrunk.reconstruct(rows), whole)


def test_samples_without_noise_are_the_signal(shrunk):
    drawn = shrunk.sample(100, with_noise=False, seed=1)
    assert {tuple(row) for row in drawn.tolist()} == {(1.0, 2.0), (3.0, 2.0)}


def test_explained_variance_by_draw(shrunk):
    found = shrunk.explained_variance()
    assert isinstance(found, ExplainedVariance)
    torch.testing.assert_close(
        found.ratio, torch.tensor([[[0.4, 0.1], [9 / 26, 4 / 26]]], dtype=torch.float64)
    )
    table = found.table(0.5)
    np.testing.assert_allclose(table["variance"], [6.5, 2.5])
    assert (table["ratio_low"] <= table["ratio"]).all()
    assert (table["ratio"] <= table["ratio_high"]).all()
    assert float(table["cumulative"].iloc[-1]) == pytest.approx(0.5)
    assert "2 latent directions explain 50.0% of the variance" in str(found)
    with pytest.raises(ValueError, match="mass=2"):
        found.table(2)


def test_a_missing_capability_is_named(fit):
    for verb, capability in (
        (lambda f: f.reconstruct(f.data), "Denoising"),
        (lambda f: f.sample(3, with_noise=False), "Denoising"),
        (lambda f: f.explained_variance(), "Explained"),
    ):
        with pytest.raises(TypeError, match=f"needs a model with the capability {capability}"):
            verb(fit)
    assert isinstance(fit.model, Conditional)
    bare = dataclasses.replace(fit, model=Shrunk())
    with pytest.raises(TypeError, match="Conditional"):
        bare.condition(fit.data, ["a"])


# ---------------------------------------------------------------- summaries of many entries
def test_a_large_invariant_pushes_out_neither_scalars_nor_loadings():
    class Wide(Model, Symmetric):
        """Draws of a scalar, behind an invariant of too many entries for a table."""

        dims = MappingProxyType({})
        bind = to = to_config = from_config = lambda self, *_: self
        coords = lambda self: {}  # noqa: E731
        is_bound = True
        symmetry = Rotation(1)

        def invariants(self, draws):
            length = draws["loadings"].square().sum((-2, -1))
            return {"covariance": length[..., None, None].expand(*length.shape, 40, 40)}

    generator = rng.make_generator(0)
    draws = {
        "loadings": 3.0 + rng.standard_normal((4, 50, 3, 1), generator),
        "noise_scale": rng.standard_normal((4, 50), generator),
    }
    data = as_dataset([[0.0], [1.0]], kinds="real")
    told = Fit(Wide(), draws, data=data).summary()
    assert set(told.table.index) == {"noise_scale", *(f"loadings[{j}, 0]" for j in range(3))}
    assert told.problems is not None
