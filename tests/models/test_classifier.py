"""The generative classifier against quadratic discriminant analysis, brute force and itself."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesgen
from bayesgen import datasets, storage
from bayesgen.data import Dataset
from bayesgen.fit import Fit
from bayesgen.inference import EM, VB
from bayesgen.models import GaussianMixture, MixtureClassifier
from bayesgen.models.classifier import ClassifierFit

_ML = EM(objective="likelihood", num_starts=1)


@pytest.fixture(scope="module")
def iris() -> tuple[Dataset, np.ndarray]:
    x, y = datasets.load("iris", with_target=True)
    return x, np.asarray(y)


@pytest.fixture(scope="module")
def fitted(iris: tuple[Dataset, np.ndarray]) -> ClassifierFit:
    return MixtureClassifier(GaussianMixture(1)).run(_ML, *iris)


def test_one_gaussian_a_class_is_quadratic_discriminant_analysis(
    iris: tuple[Dataset, np.ndarray], fitted: ClassifierFit
) -> None:
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    x, y = iris
    rows = x.tensor().numpy()
    peer = QuadraticDiscriminantAnalysis().fit(rows, y)
    # The peer divides by n - 1; with 50 rows a class that scales every covariance alike.
    probabilities = fitted.predict_proba(x).numpy()
    by_hand = np.stack(
        [_log_normal(rows, rows[y == c]) + math.log((y == c).mean()) for c in range(3)], -1
    )
    by_hand = np.exp(by_hand - np.logaddexp.reduce(by_hand, -1, keepdims=True))
    np.testing.assert_allclose(probabilities, by_hand, atol=1e-8)
    assert (np.asarray(fitted.predict(x)) == peer.predict(rows)).all()
    assert (np.asarray(fitted.predict(x)) == y).mean() >= 0.97


def _log_normal(x: np.ndarray, own: np.ndarray) -> np.ndarray:
    from scipy.stats import multivariate_normal

    return np.asarray(multivariate_normal(own.mean(0), np.cov(own.T, bias=True)).logpdf(x))


def test_bayes_rule_and_the_marginal_hang_together(
    iris: tuple[Dataset, np.ndarray], fitted: ClassifierFit
) -> None:
    x, _ = iris
    joint = fitted.log_prob_given_class(x) + fitted.shares.log()
    torch.testing.assert_close(
        joint - fitted.log_prob(x).unsqueeze(-1), fitted.predict_proba(x).log()
    )


def test_a_hole_is_integrated_out(fitted: ClassifierFit) -> None:
    row = [5.9, 3.0, math.nan, 1.5]
    grid = torch.linspace(-10.0, 25.0, 70_001, dtype=torch.float64)
    filled = torch.tensor(row, dtype=torch.float64).repeat(len(grid), 1)
    filled[:, 2] = grid
    whole = torch.trapezoid(fitted.log_prob(filled).exp(), grid)
    torch.testing.assert_close(fitted.log_prob([row])[0].exp(), whole, rtol=1e-6, atol=0.0)


def test_rows_of_one_class_are_of_that_class(fitted: ClassifierFit) -> None:
    rows, labels = fitted.sample(200, label=2, seed=3)
    assert labels == [2] * 200
    assert np.mean([label == 2 for label in fitted.predict(rows)]) > 0.9
    _, mixed = fitted.sample(600, seed=4)
    assert {0, 1, 2} == set(mixed)


def test_saving_keeps_every_bit(tmp_path: Path, iris: tuple[Dataset, np.ndarray]) -> None:
    x, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    fit = MixtureClassifier(GaussianMixture(2), concentration=1.0).run(VB(num_starts=1), x, names)
    fit.save(tmp_path / "run")
    again = ClassifierFit.load(tmp_path / "run")
    assert again.classes == ("setosa", "versicolor", "virginica")
    assert torch.equal(again.predict_proba(x), fit.predict_proba(x))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "has 2 labels, but x has 4 rows"),
        ([0, 0, 0, 0], "single class 0"),
        ([0, 1, None, 1], "missing at row 2"),
        ([[0], [1], [0], [1]], "one label a row"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list[object], message: str) -> None:
    x = np.arange(8.0).reshape(4, 2)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        MixtureClassifier(GaussianMixture(1)).run(_ML, x, labels)


def test_label_of_no_class_is_refused(fitted: ClassifierFit) -> None:
    with pytest.raises(ValueError, match="is not a class"):
        fitted.sample(1, label=7)
    with pytest.raises(ValueError, match="concentration=-1"):
        MixtureClassifier(GaussianMixture(1), concentration=-1)


def test_load_knows_a_classifier_and_a_fit_apart(tmp_path: Path, fitted: ClassifierFit) -> None:
    fitted.save(tmp_path / "classifier")
    fitted.fits[0].save(tmp_path / "fit")
    found = bayesgen.load(tmp_path / "classifier")
    assert isinstance(found, ClassifierFit)
    row = [[5.0, 3.0, 1.0, 0.2]]
    assert torch.equal(found.log_prob_given_class(row), fitted.log_prob_given_class(row))
    with pytest.raises(ValueError, match=r"holds a ClassifierFit, not a single fit"):
        Fit.load(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a Fit, not a classifier"):
        ClassifierFit.load(tmp_path / "fit")


def test_a_killed_save_of_a_classifier_leaves_the_old_one(
    tmp_path: Path, fitted: ClassifierFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One manifest for all classes: never some classes of one save and some of another."""
    fitted.save(tmp_path)
    other = dataclasses.replace(fitted, shares=torch.tensor([0.5, 0.25, 0.25]))
    written = []

    def dies(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left")
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_through", dies)
        with pytest.raises(OSError, match="no space left"):
            other.save(tmp_path)
    assert torch.equal(ClassifierFit.load(tmp_path).shares, fitted.shares)


def test_summary_names_the_classes(fitted: ClassifierFit) -> None:
    told = fitted.summary()
    assert "3 classes" in told
    assert "class 1, probability 0.333" in told
