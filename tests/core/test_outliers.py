"""Conformal outliers: uniform p-values, controlled false calls, an overfit that breaks both."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from scipy import stats

from bayesgen import capabilities, outliers, rng
from bayesgen.conformal import rows_needed, together_needed
from bayesgen.data import as_dataset
from bayesgen.fit import Fit

__all__: list[str] = []


class Kernels(
    capabilities.Model,
    capabilities.Scored,
    capabilities.Generative,
    capabilities.Conditional,
):
    """Equal mixture of normals at given centres: one centre and unit scale, or a wild overfit."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def bind(self, data):
        return self

    @property
    def is_bound(self):
        return True

    @property
    def dims(self):
        return {"loc": ("centre", "column")}

    def coords(self):
        return {}

    def to(self, device):
        return self

    def to_config(self):
        return {"scale": self.scale}

    @classmethod
    def from_config(cls, config):
        return cls(config["scale"])

    def log_prob(self, x, draws):
        loc, missing = draws["loc"], x.isnan()
        error = (x.nan_to_num(0.0)[:, None] - loc.unsqueeze(-3)) / self.scale
        part = error.square() + math.log(2 * math.pi) + 2 * math.log(self.scale)
        part = part.masked_fill(missing[:, None], 0.0)
        return (-0.5 * part.sum(-1)).logsumexp(-1) - math.log(loc.shape[-2])

    def sample(self, draws, *, generator):
        loc = draws["loc"]
        pick = torch.randint(loc.shape[-2], (len(loc),), generator=generator)
        loc = loc[torch.arange(len(loc)), pick]
        return loc + self.scale * rng.standard_normal(loc.shape, generator)

    def condition(self, x, observed, draws):
        raise NotImplementedError


def gaussian_fit(rows: object, seed: int = 0) -> Fit:
    """Draws of the mean of unit normals, exactly: the right model for the data below."""
    data = as_dataset(rows)
    generator = rng.make_generator(seed)
    x = data.tensor()
    count = (~x.isnan()).sum(0).clamp_min(1)
    noise = rng.standard_normal((1, 50, 1, x.shape[1]), generator)
    draws = {"loc": x.nanmean(0) + noise / count.sqrt()}
    return Fit(Kernels(), draws, data=data, refit=lambda d, s: gaussian_fit(d, s))


def kernel_fit(rows: object, seed: int = 0) -> Fit:
    """A kernel density with far too small a bandwidth: it remembers every training row."""
    data = as_dataset(rows)
    draws = {"loc": data.tensor()[None, None]}
    return Fit(Kernels(0.1), draws, data=data, refit=lambda d, s: kernel_fit(d, s))


def normals(*shape: int, seed: int) -> torch.Tensor:
    return rng.standard_normal(shape, rng.make_generator(seed))


# ------------------------------------------------------------------ p-values
def test_p_values_by_hand():
    scores = torch.tensor([-1.0, -2.0, -2.0, -3.0])
    p = outliers.conformal_p_values(scores, torch.tensor([-5.0, -2.0, -1.0, 4.0]))
    assert p.tolist() == [1 / 5, 4 / 5, 1.0, 1.0]


def test_p_values_with_ties_broken_at_random_are_exactly_uniform():
    generator = rng.make_generator(0)
    # Integer scores: mostly ties. Each repetition is one calibration set and one new row.
    p = torch.cat(
        [
            outliers.conformal_p_values(s[:20], s[20:], generator=generator)
            for s in torch.randint(5, (4000, 21), generator=generator).to(torch.float64)
        ]
    )
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    assert float(p.min()) > 0.0


def test_p_values_without_coins_are_valid_and_discrete():
    generator = rng.make_generator(1)
    scores = torch.rand(5000, 20, generator=generator, dtype=torch.float64)
    p = torch.cat([outliers.conformal_p_values(s[:19], s[19:]) for s in scores])
    counts = torch.bincount((p * 20).round().long(), minlength=21)[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("calibration", "scores", "match"),
    [
        (torch.empty(0), torch.zeros(1), "no calibration"),
        (torch.zeros(3), torch.tensor([math.nan]), "NaN"),
        (torch.tensor([0.0, math.nan]), torch.zeros(1), "NaN"),
    ],
)
def test_p_values_refuse_bad_scores(calibration, scores, match):
    with pytest.raises(ValueError, match=match):
        outliers.conformal_p_values(calibration, scores)


# ------------------------------------------------------------------ Benjamini-Hochberg
@pytest.mark.parametrize("method", ["positive", "arbitrary"])
def test_benjamini_hochberg_equals_scipy(method):
    p = torch.rand(60, generator=rng.make_generator(2), dtype=torch.float64) ** 3
    called, q = outliers.benjamini_hochberg(p, 0.1, dependence=method)
    scipy_method: Any = "bh" if method == "positive" else "by"
    expected = torch.from_numpy(stats.false_discovery_control(p.numpy(), method=scipy_method))
    assert torch.allclose(q, expected)
    assert torch.equal(called, expected <= 0.1)
    assert 0 < int(called.sum()) < 60


def test_benjamini_hochberg_on_the_line_is_not_decided_by_rounding():
    called, _ = outliers.benjamini_hochberg(torch.full((7,), 1 / 20, dtype=torch.float64), 0.05)
    assert bool(called.all())


def test_bad_rates_and_p_values_are_refused():
    with pytest.raises(ValueError, match="fdr"):
        outliers.benjamini_hochberg(torch.tensor([0.5]), 5.0)
    with pytest.raises(ValueError, match="within"):
        outliers.benjamini_hochberg(torch.tensor([1.5]), 0.05)
    with pytest.raises(ValueError, match="dependence"):
        outliers.benjamini_hochberg(torch.tensor([0.5]), 0.05, dependence="some")


@pytest.mark.parametrize("num_rows", [1, 20, 77])
def test_rows_needed_are_just_enough(num_rows):
    needed = rows_needed(num_rows, 0.05)
    p = torch.ones(num_rows, dtype=torch.float64)
    p[0] = 1 / (needed + 1)
    assert bool(outliers.benjamini_hochberg(p, 0.05)[0][0])
    p[0] = 1 / needed
    assert not bool(outliers.benjamini_hochberg(p, 0.05)[0][0])


@pytest.mark.parametrize("num_calibration", [19, 60, 2000])
def test_together_needed_is_just_enough(num_calibration):
    together = together_needed(40, 0.05, num_calibration)
    p = torch.ones(40, dtype=torch.float64)
    p[:together] = 1 / (num_calibration + 1)
    assert bool(outliers.benjamini_hochberg(p, 0.05)[0].any())
    if together > 1:
        p[together - 1] = 1.0
        assert not bool(outliers.benjamini_hochberg(p, 0.05)[0].any())


# ------------------------------------------------------------------ the whole chain
def false_discovery(make, num_repetitions, *, planted, num_training=200, **settings):
    """Mean share of false calls, its standard error, and mean power, over fresh data sets."""
    shares, power = [], []
    for seed in range(num_repetitions):
        train = normals(num_training, 2, seed=seed)
        new = normals(40, 2, seed=10_000 + seed)
        new[:planted] += 6.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outliers.outliers(make(train), new, seed=seed, **settings)
        false = int(found.is_outlier[planted:].sum())
        shares.append(false / max(1, int(found.is_outlier.sum())))
        power.append(float(found.is_outlier[:planted].float().mean()))
    share = torch.tensor(shares, dtype=torch.float64)
    error = float(share.std()) / math.sqrt(num_repetitions)
    return float(share.mean()), error, sum(power) / num_repetitions


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (gaussian_fit, {}),
        (gaussian_fit, {"folds": 5}),
        (gaussian_fit, {"calibration": "model"}),  # the model is right
        (kernel_fit, {}),
        (kernel_fit, {"folds": 5}),
    ],
)
def test_false_discoveries_are_controlled_whatever_the_density(make, settings):
    share, error, power = false_discovery(make, 120, planted=8, fdr=0.1, **settings)
    assert share <= 0.1 + 3 * error
    if make is gaussian_fit:
        assert power > 0.95


def test_calibrating_an_overfit_on_its_own_training_rows_is_caught():
    # Negative control: the kernel density gives training rows scores that no new row attains.
    shares = []
    for seed in range(40):
        train = normals(200, 2, seed=seed)
        new = normals(40, 2, seed=10_000 + seed)
        found = outliers.outliers(kernel_fit(train), new, calibration=train, fdr=0.1)
        shares.append(float(found.is_outlier.any()))
    assert sum(shares) / len(shares) > 0.5  # without outliers any call is a false discovery


@pytest.mark.parametrize("settings", [{}, {"folds": 4}])
def test_p_values_of_new_rows_are_uniform(settings):
    p = []
    for seed in range(300):
        fit = gaussian_fit(normals(60, 3, seed=seed))
        used = outliers.calibrate(fit, seed=seed, **settings)
        new = normals(1, 3, seed=50_000 + seed)
        p.append(used.p_values(fit, new, generator=rng.make_generator(seed))[0])
    assert stats.kstest(torch.cat(p).numpy(), "uniform").pvalue > 1e-3


def test_the_same_uniformity_test_catches_training_scores():
    p = []
    for seed in range(300):
        train = normals(60, 3, seed=seed)
        found = outliers.outliers(
            kernel_fit(train), normals(1, 3, seed=50_000 + seed), calibration=train, fdr=0.5
        )
        p.append(found.p_values)
    assert stats.kstest(torch.cat(p).numpy(), "uniform").pvalue < 1e-10


# ------------------------------------------------------------------ missing entries
def test_rows_with_gaps_are_held_against_the_same_columns():
    fit = gaussian_fit(normals(100, 3, seed=0))
    usual = normals(400, 3, seed=1)
    usual[::4, 1] = math.nan
    new = normals(9, 3, seed=2)
    new[:3, 0], new[3:6, 1:] = math.nan, math.nan
    found = outliers.outliers(fit, new, calibration=usual, fdr=0.3)
    for row, columns in ((0, [1, 2]), (4, [0]), (8, [0, 1, 2])):
        cut = usual.clone()
        cut[:, [j for j in range(3) if j not in columns]] = math.nan
        cut = cut[~cut[:, columns].isnan().any(-1)]
        expected = outliers.conformal_p_values(fit.log_prob(cut), fit.log_prob(new[row : row + 1]))
        assert float(found.p_values[row]) == pytest.approx(float(expected))
        assert int(found.num_calibration[row]) == len(cut)


def test_p_values_with_gaps_are_uniform_where_pooled_ones_are_not():
    conditional, pooled = [], []
    for seed in range(250):
        fit = gaussian_fit(normals(50, 4, seed=seed))
        usual = normals(80, 4, seed=20_000 + seed)
        new = normals(1, 4, seed=50_000 + seed)
        new[:, :3] = math.nan
        used = outliers.outliers(fit, new, calibration=usual, fdr=0.5).calibration
        coin = rng.make_generator(seed)
        conditional.append(used.p_values(fit, new, generator=coin)[0])
        pooled.append(outliers.conformal_p_values(fit.log_prob(usual), fit.log_prob(new)))
    assert stats.kstest(torch.cat(conditional).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(torch.cat(pooled).numpy(), "uniform").pvalue < 1e-10


def test_rows_that_no_calibration_row_can_judge():
    usual = normals(100, 2, seed=0)
    usual[:, 1] = math.nan
    fit = gaussian_fit(normals(100, 2, seed=1))
    with pytest.warns(UserWarning, match="no row can be called"):
        found = outliers.outliers(fit, normals(3, 2, seed=2) + 50, calibration=usual, fdr=0.05)
    assert found.p_values.tolist() == [1.0, 1.0, 1.0]
    assert "cannot be judged" in found.message


# ------------------------------------------------------------------ messages and results
def test_too_small_a_calibration_set_says_how_many_rows_are_needed():
    fit = gaussian_fit(normals(20, 2, seed=0))
    with pytest.warns(UserWarning, match="no row can be called at fdr=0.05 with 10 calibration"):
        found = outliers.outliers(fit, normals(5, 2, seed=1) + 30, fdr=0.05)
    assert not bool(found.is_outlier.any())
    assert "19 calibration rows at least, 99 to call one row alone among 5" in found.message
    modelled = outliers.outliers(fit, normals(5, 2, seed=1) + 30, fdr=0.05, calibration="model")
    assert bool(modelled.is_outlier.all())
    assert "only as good as the model" in modelled.message


def test_message_when_a_lone_row_cannot_be_called():
    fit = gaussian_fit(normals(200, 2, seed=0))
    new = normals(50, 2, seed=1)
    new[0] = 30.0
    found = outliers.outliers(fit, new)
    assert not bool(found.is_outlier.any())
    assert "10 must stand out together" in found.message
    assert "999 calibration rows" in found.message
    new[:12] = 30.0
    assert int(outliers.outliers(fit, new).is_outlier.sum()) >= 12


def test_training_rows_are_recognised():
    train = normals(200, 2, seed=0)
    fit = gaussian_fit(train)
    assert "are training rows" in outliers.outliers(fit, train[:30], fdr=0.5).message
    assert "are training rows" not in outliers.outliers(fit, -train[:30], fdr=0.5).message


def test_contaminated_calibration_rows_cost_power_not_validity():
    train = normals(400, 2, seed=0)
    train[:40] += 8.0
    new = normals(40, 2, seed=1)
    new[:8] += 8.0
    fit = gaussian_fit(normals(100, 2, seed=2))
    dirty = outliers.outliers(fit, new, calibration=train)
    clean = outliers.outliers(fit, new, calibration=train[40:])
    assert int(clean.is_outlier[:8].sum()) == 8
    assert int(dirty.is_outlier.sum()) == 0
    assert bool((dirty.p_values >= clean.p_values - 0.01).all())


def test_result_as_a_frame_and_as_text():
    fit = gaussian_fit(normals(300, 2, seed=0))
    new = normals(10, 2, seed=2)
    new[4:7] += 20.0
    found = outliers.outliers(fit, new)
    frame = found.to_frame()
    assert list(frame.columns) == ["is_outlier", "p_value", "q_value", "score", "num_calibration"]
    assert frame.is_outlier.tolist() == found.is_outlier.tolist()
    assert str(found).startswith("3 of 10 rows are outliers at a false discovery rate of 0.05")
    assert bool((found.scores[4:7] < -100).all())


def test_a_calibration_is_reused_and_survives_its_config():
    train, new = normals(120, 2, seed=0), normals(15, 2, seed=1)
    fit = gaussian_fit(train)
    for settings in ({}, {"folds": 3}):
        used = outliers.calibrate(fit, seed=3, **settings)
        assert used.num_rows == (60 if not settings else 120)
        first = outliers.outliers(fit, new, calibration=used, fdr=0.2)
        again = outliers.Calibration.from_config(used.to_config(), Kernels)
        second = outliers.outliers(fit, new, calibration=again, fdr=0.2)
        assert first.calibration is used
        assert torch.equal(first.p_values, second.p_values)
    own = Fit(fit.model, fit.draws, data=fit.data, calibration=used)  # no refit needed
    assert torch.equal(outliers.outliers(own, new, fdr=0.2).p_values, first.p_values)


def test_calibration_rows_are_never_scored_by_a_fit_that_saw_them():
    train = normals(90, 2, seed=0)
    used = outliers.calibrate(kernel_fit(train), folds=5, seed=1)
    assert sorted(map(tuple, used.rows.tolist())) == sorted(map(tuple, train.tolist()))
    for fold, scorer in enumerate(used.scorers):
        seen = set(map(tuple, scorer.data.tensor().tolist()))
        mine = set(map(tuple, used.rows[used.folds == fold].tolist()))
        assert not seen & mine
        assert len(seen) + len(mine) == 90


def test_a_fit_is_refitted_once():
    seen = []

    def refit(data, seed):
        seen.append(seed)
        return gaussian_fit(data, seed)

    fit = gaussian_fit(normals(100, 2, seed=0))
    fit = Fit(fit.model, fit.draws, data=fit.data, refit=refit)
    for _ in range(3):
        outliers.outliers(fit, normals(5, 2, seed=1), fdr=0.3)
    assert len(seen) == 1
    outliers.outliers(fit, normals(5, 2, seed=1), fdr=0.3, folds=4)
    assert len(seen) == 5


def test_same_seed_same_split():
    fit = gaussian_fit(normals(50, 2, seed=0))
    first, second = outliers.calibrate(fit, seed=7), outliers.calibrate(fit, seed=7)
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.rows, outliers.calibrate(fit, seed=8).rows)


@pytest.mark.parametrize("settings", [{"fraction": 1.0}, {"fraction": 0.0}, {"folds": 1}])
def test_impossible_splits_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        outliers.calibrate(gaussian_fit(normals(30, 2, seed=0)), **settings)


def test_a_fit_that_cannot_refit_says_what_to_do():
    fit = gaussian_fit(normals(30, 2, seed=0))
    bare = Fit(fit.model, fit.draws, data=fit.data)
    with pytest.raises(ValueError, match="calibration=rows"):
        outliers.outliers(bare, normals(3, 2, seed=1))
    with pytest.raises(ValueError, match="method"):
        outliers.Calibration.from_config({"method": "guess", "scorers": []}, Kernels)


# ------------------------------------------------------------------ reasons
def test_reasons_are_the_conditional_densities():
    from bayesgen.toys import UnitMixture

    loc = torch.tensor([[[[0.0, 0.0], [5.0, 5.0]]]], dtype=torch.float64)
    weights = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    data = as_dataset(normals(20, 2, seed=0), columns=["a", "b"])
    fit = Fit(UnitMixture(2, columns=("a", "b")), {"weights": weights, "loc": loc}, data=data)
    x = torch.tensor([[0.1, 5.0], [5.0, 5.0], [0.0, math.nan]], dtype=torch.float64)
    raw = outliers.explain(fit, x, centred=False)
    for j in range(2):
        observed = torch.tensor([j != 0, j != 1])
        law = fit.model.condition(x[:2], observed, {"weights": weights[0], "loc": loc[0]})
        assert torch.allclose(raw[:2, j], -law.log_prob(x[:2, [j]]).squeeze())
    assert bool(raw[2, 1].isnan())
    # Alone an entry is as strange as its marginal density says.
    assert torch.allclose(raw[2, :1], -fit.log_prob(x[2:]))


def test_reasons_name_the_column_and_ignore_its_unit():
    train = normals(300, 3, seed=0)
    fit = gaussian_fit(train)
    x = normals(1, 3, seed=1) * 0.1
    x[0, 1] = 6.0
    reasons = outliers.explain(fit, x, num_reference=4000)
    assert int(reasons[0].argmax()) == 1
    assert float(reasons[0, 1]) == pytest.approx(0.5 * 36 - 0.5, abs=1.0)
    ordinary = outliers.explain(fit, normals(2000, 3, seed=2), num_reference=4000)
    assert float(ordinary.mean(0).abs().max()) < 0.1


def test_reasons_need_a_model_that_conditions():
    class Only(capabilities.Scored):
        log_prob = Kernels.log_prob

    fit = gaussian_fit(normals(10, 2, seed=0))
    fake = Fit(Only(), fit.draws, data=fit.data)  # type: ignore[abstract, arg-type]
    with pytest.raises(TypeError, match="Conditional"):
        outliers.explain(fake, normals(2, 2, seed=1))
