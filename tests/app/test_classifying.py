"""Classifiers from the command line: fit, summary, predict, score, sample, and what is refused."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

import bayesgen
from bayesgen.app import classifying, fitting
from bayesgen.app.cli import cli
from bayesgen.app.fitting import Job
from bayesgen.models.classifier import ClassifierFit

__all__: list[str] = []

QUICK = ["--engine", "em", "--engine-set", "num_starts=1", "--set", "model=GaussianMixture(1)"]


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_iris

    bunch = load_iris(as_frame=True)
    frame = bunch.frame.drop(columns="target")
    frame.insert(1, "species", [str(bunch.target_names[i]) for i in bunch.target])
    path = tmp_path_factory.mktemp("data") / "flowers.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(flowers: Path) -> Path:
    folder = flowers.parent / "run"
    fit = ["fit", "MixtureClassifier", flowers, "--target", "species", *QUICK, "--out", folder]
    result = call(*fit)
    assert result.exit_code == 0, result.stderr
    assert "3 classes: setosa, versicolor, virginica" in result.stderr
    return folder


def test_the_folder_holds_a_classifier(run: Path) -> None:
    found = bayesgen.load(run)
    assert isinstance(found, ClassifierFit)
    assert found.target == "species"
    assert "species" not in found.schema.columns


def test_predict_names_the_classes_whether_or_not_the_file_does(run: Path, flowers: Path) -> None:
    """The column of classes in the file is left aside."""
    told = pd.read_csv(io.StringIO(call("predict", run, flowers).stdout))
    truth = pd.read_csv(flowers)
    assert (told["label"] == truth["species"]).mean() > 0.95
    without = truth.drop(columns="species").to_csv(index=False)
    again = pd.read_csv(io.StringIO(call("predict", run, "-", stdin=without).stdout))
    pd.testing.assert_frame_equal(told, again)
    assert told["probability"].between(1 / 3, 1).all()


def test_score_and_sample(run: Path, flowers: Path) -> None:
    score = pd.read_csv(io.StringIO(call("score", run, flowers).stdout))
    assert len(score) == 150
    drawn = pd.read_csv(io.StringIO(call("sample", run, "-n", 60).stdout))
    assert set(drawn["species"]) == {"setosa", "versicolor", "virginica"}
    assert "npy" in call("sample", run, "--out", run.parent / "x.npy").stderr


def test_summary_shows_each_class(run: Path) -> None:
    told = call("summary", run).stdout
    assert told.count("probability 0.333") == 3


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, [], "needs --target"),
        (1, ["--target", "Species"], "there is no such column; there are sepal length"),
        (2, ["--target", "species", "--resume"], "not for classifiers"),
        (1, ["--target", "species", "--columns", "species"], "cannot explain itself"),
    ],
)
def test_refusals(
    flowers: Path, tmp_path: Path, code: int, arguments: list[str], message: str
) -> None:
    result = call(
        "fit", "MixtureClassifier", flowers, *QUICK, *arguments, "--out", tmp_path / "run"
    )
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_what_a_classifier_cannot_do_is_said(run: Path, flowers: Path) -> None:
    for command in ("impute", "outliers"):
        result = call(command, run, flowers)
        assert result.exit_code == 1
        assert "holds a classifier" in result.stderr


def test_bundled_data_call_their_class_target(tmp_path: Path) -> None:
    fit = ["fit", "MixtureClassifier", "iris", "--target", "target", *QUICK]
    assert call(*fit, "--out", tmp_path / "run").exit_code == 0
    assert bayesgen.load(tmp_path / "run").classes == (0, 1, 2)
    model = call("fit", "MixtureClassifier", "iris", "--target", "target", "--set", "model=Mix(1)")
    assert model.exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("engine", ["gibbs", "em"])
def test_an_interrupt_keeps_nothing_and_says_so(
    tmp_path: Path,
    flowers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    number: int,
) -> None:
    """Gibbs has no draw in its warm-up, and EM's fits of the later classes must stop too."""

    @contextmanager
    def progress(*_: object, **__: object) -> Iterator[list[Any]]:
        yield [lambda _: os.kill(os.getpid(), number)]

    monkeypatch.setattr(classifying, "progress", progress)
    job = Job(
        model="MixtureClassifier",
        data=str(flowers),
        target="species",
        engine=engine,
        model_settings=("model=GaussianMixture(1)",),
        out=str(tmp_path / "run"),
    )
    assert fitting.run(job) == 128 + number
    assert "nothing was kept" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
