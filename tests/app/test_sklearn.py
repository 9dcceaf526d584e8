"""The scikit-learn facade: its contract, its meaning, its guarantee."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from bayesgen import datasets
from bayesgen.app.sklearn import BayesianMixture, OutlierDetector
from bayesgen.inference import VB

__all__: list[str] = []

QUICK = VB(num_starts=1, moves=False, num_samples=20, tolerance=1e-3)


@pytest.fixture(scope="module")
def x() -> Any:
    return datasets.load("faithful").tensor().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator",
    [
        BayesianMixture(3, engine=QUICK, random_state=0),
        OutlierDetector(3, engine=QUICK, random_state=0, false_alarm_rate=0.2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_scikit_learn_finds_nothing_wrong(estimator: Any):
    """Every check passes; only the array API's is skipped, which asks for SCIPY_ARRAY_API=1."""
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    bad = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert set(bad) <= {"check_array_api_input"}, bad
    assert len(results) > 40


def test_a_mixture_finds_clusters_and_scores_by_density(x: Any):
    mixture = BayesianMixture(random_state=0).fit(x)
    assert mixture.n_clusters_ == 2
    assert mixture.converged_
    assert np.array_equal(mixture.labels_, mixture.predict(x))
    assert np.array_equal(mixture.labels_, BayesianMixture(random_state=0).fit_predict(x))
    assert np.allclose(mixture.predict_proba(x).sum(-1), 1)
    assert np.allclose(mixture.score_samples(x), mixture.fit_.log_prob(x).numpy())
    assert mixture.score(x) == pytest.approx(mixture.score_samples(x).mean())
    assert mixture.weights_[:2].sum() > 0.99
    rows, labels = mixture.sample(500)
    assert rows.shape == (500, 2)
    assert abs((labels == 0).mean() - mixture.weights_[0]) < 0.1
    assert mixture.score([[4.4, 80.0]]) > mixture.score([[1.0, 99.0]]) + 5


def test_a_mixture_takes_gaps(x: Any):
    holed = x.copy()
    holed[::3, 0] = np.nan
    mixture = BayesianMixture(3, engine=QUICK, random_state=0).fit(holed)
    assert np.isfinite(mixture.score_samples(holed)).all()
    assert set(mixture.predict([[np.nan, 54.0], [np.nan, 80.0]])) == {0, 1}


def test_settings_pass_through(x: Any):
    mixture = BayesianMixture(2, covariance_type="diag", engine="em", random_state=1).fit(x)
    assert mixture.fit_.attrs["engine"] == "EM"
    assert "diagonal" in str(mixture.fit_.model)
    assert clone(mixture).get_params()["covariance_type"] == "diag"
    with pytest.raises(ValueError, match="covariance='round'"):
        BayesianMixture(2, covariance_type="round").fit(x)
    with pytest.raises(ValueError, match="there is no engine 'hmc'; there are .*gibbs.*vb"):
        BayesianMixture(2, engine="hmc").fit(x)


def test_pipelines_and_searches(x: Any):
    pipe = make_pipeline(StandardScaler(), BayesianMixture(engine=QUICK, random_state=0))
    grid = {"bayesianmixture__n_components": [1, 2]}
    search = GridSearchCV(pipe, grid, cv=3).fit(x)
    assert search.best_params_ == {"bayesianmixture__n_components": 2}


# ------------------------------------------------------------------ outliers
def test_outliers_are_below_the_threshold(x: Any):
    detector = OutlierDetector(engine=QUICK, random_state=0).fit(x)
    new = np.array([[4.4, 80.0], [2.0, 54.0], [3.0, 95.0], [1.0, 90.0]])
    assert detector.predict(new).tolist() == [1, 1, -1, -1]
    decision = detector.score_samples(new) - detector.offset_
    assert np.allclose(detector.decision_function(new), decision)
    verdict = detector.outliers(new[2:], fdr=0.1)
    assert verdict.is_outlier.all()


def test_rows_with_gaps_have_thresholds_of_their_own(x: Any):
    detector = OutlierDetector(engine=QUICK, random_state=0).fit(x)
    assert detector.predict([[np.nan, 80.0], [np.nan, 140.0]]).tolist() == [1, -1]
    # one density for both would be wrong: a density over fewer columns is in other units
    usual = detector.score_samples([[np.nan, 80.0]])[0]
    assert detector.decision_function([[np.nan, 80.0]])[0] != usual - detector.offset_


def test_the_false_alarm_rate_is_kept_and_a_wrong_one_would_show():
    """Exchangeable rows of a heavy-tailed law that the mixture gets wrong."""
    generator = np.random.default_rng(0)
    rates = []
    for repeat in range(40):
        rows = generator.standard_t(2, size=(160, 2))
        detector = OutlierDetector(
            1, engine=QUICK, random_state=repeat, false_alarm_rate=0.1, calibration_fraction=0.4
        ).fit(rows[:110])
        rates.append((detector.predict(rows[110:]) == -1).mean())
    # k = floor(0.1 * 45) = 4 of 44 calibration rows: exactly 4 / 45 on average
    error = np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - 4 / 45) < 3.5 * error
    assert 3.5 * error < 4 / 45  # fine enough to tell it from twice that


def test_too_few_rows_are_refused_with_the_number_needed(x: Any):
    with pytest.raises(ValueError, match="about 39 are needed"):
        OutlierDetector(engine=QUICK).fit(x[:30])
    OutlierDetector(2, engine=QUICK, random_state=0).fit(x[:39])
    with pytest.raises(ValueError, match=r"within \(0, 1\)"):
        OutlierDetector(engine=QUICK, false_alarm_rate=0.0).fit(x)
