"""The commands through click's own runner: files, exit codes, words."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

import bayesgen
from bayesgen import datasets
from bayesgen.app.cli import cli

__all__: list[str] = []

QUICK = ["--engine-set", "num_starts=1", "--engine-set", "moves=no", "--engine-set"]
QUICK += ["num_samples=20", "--set", "num_components=3"]


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)


def works(*arguments: object, stdin: str | None = None) -> Result:
    result = call(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def fails(code: int, *arguments: object) -> str:
    """Check exit code and that one line, no traceback, says why."""
    result = call(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "faithful"
    works("fit", "GaussianMixture", "faithful", *QUICK, "--out", folder)
    return folder


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    """A file with gaps, columns in another order, and one that no fit knows."""
    path = tmp_path / "holes.csv"
    path.write_text("waiting,note,eruptions\n80,x,\n,y,2\n55,z,1.9\n")
    return path


# ------------------------------------------------------------------ words
def test_help_names_every_command_and_needs_no_subcommand():
    told = works("--help").stdout
    for name in ("models", "doctor", "fit", "summary", "score", "outliers", "sample", "impute"):
        assert f"\n  {name} " in told
    assert "demo" in told
    assert bayesgen.__version__ in works("--version").stdout


def test_models_shows_names_arguments_and_defaults():
    told = works("models").stdout
    assert "GaussianMixture: A Bayesian mixture of Gaussians" in told
    assert "covariance: text = full" in told
    assert "bound:" not in told  # an argument that no docstring speaks of is not for users
    one = works("models", "GIBBS").stdout
    assert "num_warmup: int = 500" in one
    assert "Sweeps before the first draw is kept." in one


def test_doctor_finds_itself_well():
    told = works("doctor").stdout
    for name in ("torch", "pyro", "arviz", "threads", "CUDA", "write", "fit"):
        assert f"ok   {name}" in told
    assert told.endswith("all is well\n")


def test_doctor_reports_what_is_broken_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    from bayesgen.app import doctor

    monkeypatch.setattr(doctor, "_PACKAGES", ("no_such_package",))
    result = call("doctor")
    assert result.exit_code == 1
    assert "FAIL no_such_package" in result.stdout
    assert "ok   fit" in result.stdout


# ------------------------------------------------------------------ wrong use is 2, bad data 1
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["GaussianMixtur", "faithful"], "did you mean GaussianMixture?"),
        (["GaussianMixture", "faithful", *QUICK[-2:], "--engine", "nuts2"], "em, gibbs"),
        (["GaussianMixture", "faithful", "--set", "components=3"], "it has num_components: int"),
        (["GaussianMixture", "faithful", "--set", "num_components"], "write name=value"),
        (["GaussianMixture", "faithful", "--set", "num_components=x"], "a whole number"),
        (["GaussianMixture", "faithful", "--set", "num_components=0"], "at least 1"),
        (["GaussianMixture", "faithful"], "--set num_components=..."),
        (
            ["GaussianMixture", "faithful", *QUICK, "--engine-set", "moves=perhaps"],
            "true or false",
        ),
        (["GaussianMixture", "faithful", *QUICK, "--engine-set", "dtype=float16"], "float64"),
        (["GaussianMixture", "faithful", *QUICK, "--set", "priors.weights=1+1"], "no literal"),
        (
            ["GaussianMixture", "faithful", *QUICK, "--set", "priors.weights=Mist(1)"],
            "StickBreaking",
        ),
        (["GaussianMixture", "faithful", *QUICK, "--set", "priors=1"], "name the site"),
        (
            ["GaussianMixture", "faithful", *QUICK, "--set", "priors.size=StickBreaking(1)"],
            "weights",
        ),
        (
            ["Mixture", "faithful", "--set", "num_components=2", "--set", "family=Gauss"],
            "Gaussian",
        ),
        (["GaussianMixture", "faithful", *QUICK, "--kind", "waiting=odd"], "real, count"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(
    tmp_path: Path, arguments: list[str], words: str
):
    told = fails(2, "fit", *arguments, "--out", tmp_path / "run")
    assert words in told
    assert list(tmp_path.iterdir()) == []


def test_missing_options_are_wrong_use():
    assert "--out" in fails(2, "fit", "GaussianMixture", "faithful")
    assert "No such command" in fails(2, "fti")
    assert "No such option" in fails(2, "score", "a", "b", "--outt", "c")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n3,inf\n", "row 1, column 'b' is inf"),
        ("a,b\n", "no rows"),
        ("", "empty"),
        ("a,a\n1,2\n", "more than once"),
    ],
)
def test_bad_data_are_one_line_and_exit_code_1(tmp_path: Path, content: str, words: str):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    told = fails(1, "fit", "GaussianMixture", path, *QUICK, "--out", tmp_path / "run")
    assert words in told
    assert told.startswith("bayesgen: error: ")
    assert told.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


def test_unknown_data_and_runs_are_named(tmp_path: Path, run: Path):
    assert "faithful, galaxies" in fails(1, "score", run, "faithfull")
    assert "there is no file" in fails(1, "score", run, tmp_path / "none.csv")
    assert "is a folder" in fails(1, "score", run, tmp_path)
    assert "there is no run" in fails(1, "summary", tmp_path / "none")
    (tmp_path / "other").mkdir()
    assert fails(1, "summary", tmp_path / "other").startswith("bayesgen: error: ")


def test_traceback_is_for_developers(tmp_path: Path):
    result = call("--traceback", "summary", tmp_path / "none")
    assert isinstance(result.exception, FileNotFoundError)
    assert isinstance(call("summary", tmp_path / "none", "--traceback").exception, OSError)
    assert isinstance(call("summary", tmp_path / "none").exception, SystemExit)


def test_missing_columns_are_named_and_others_left_aside(run: Path, tmp_path: Path, holes: Path):
    path = tmp_path / "half.csv"
    path.write_text("eruptions\n2\n")
    assert "waiting" in fails(1, "score", run, path)
    assert works("score", run, holes).stdout.count("\n") == 4


# ------------------------------------------------------------------ what comes out
def table(result: Result) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(result.stdout))


def test_scores_are_those_of_the_fit_in_every_format(run: Path, tmp_path: Path):
    wanted = bayesgen.load(run).log_prob(datasets.load("faithful")).numpy()
    read = {
        ".csv": lambda p: pd.read_csv(p)["log_prob"].to_numpy(),
        ".tsv": lambda p: pd.read_csv(p, sep="\t")["log_prob"].to_numpy(),
        ".parquet": lambda p: pd.read_parquet(p)["log_prob"].to_numpy(),
        ".npy": lambda p: np.load(p)[:, 0],
    }
    for suffix, reader in read.items():
        out = tmp_path / f"scores{suffix}"
        assert works("score", run, "faithful", "--out", out).stdout == ""
        assert np.array_equal(reader(out), wanted), suffix
    assert np.array_equal(table(works("score", run, "faithful"))["log_prob"], wanted)


def test_existing_and_impossible_outputs_are_refused_before_work(run: Path, tmp_path: Path):
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    assert "exists; add --force" in fails(1, "score", run, "no data", "--out", out)
    assert out.read_text() == "mine"
    works("score", run, "faithful", "--out", out, "--force")
    assert out.read_text().startswith("log_prob\n")
    assert ".parquet" in fails(2, "score", run, "no data", "--out", tmp_path / "scores.xls")
    assert "no folder" in fails(1, "score", run, "x", "--out", tmp_path / "none" / "a.csv")
    assert fails(1, "demo", "--out", tmp_path).startswith("bayesgen: error: ")


def test_samples_follow_the_seed(run: Path, tmp_path: Path):
    first = works("sample", run, "-n", 7, "--seed", 1).stdout
    assert first == works("sample", run, "-n", 7, "--seed", 1).stdout
    assert first != works("sample", run, "-n", 7, "--seed", 2).stdout
    assert first.splitlines()[0] == "eruptions,waiting"
    assert len(first.splitlines()) == 8
    works("sample", run, "-n", 7, "--seed", 1, "--out", tmp_path / "rows.npy")
    assert np.load(tmp_path / "rows.npy").shape == (7, 2)


def test_imputation_fills_gaps_alone(run: Path, holes: Path):
    filled = table(works("impute", run, holes))
    assert list(filled.columns) == ["eruptions", "waiting"]
    assert filled.loc[0, "waiting"] == 80
    assert filled.loc[2].tolist() == [1.9, 55]
    assert 3.5 < filled.loc[0, "eruptions"] < 5
    assert 45 < filled.loc[1, "waiting"] < 65
    copies = table(works("impute", run, holes, "-n", 3))
    assert copies["imputation"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert copies.loc[copies.index % 3 == 0, "eruptions"].nunique() == 3


def test_a_pipe_of_commands(run: Path):
    rows = works("sample", run, "-n", 4).stdout
    scores = works("score", run, "-", stdin=rows).stdout
    assert len(scores.splitlines()) == 5


def test_labels_and_their_probability(run: Path, holes: Path):
    labels = table(works("predict", run, holes))
    assert labels["label"][1] == labels["label"][2]
    assert labels["label"][0] != labels["label"][1]
    assert labels["probability"].between(1 / 3, 1).all()


def test_outliers_and_what_they_rest_on(run: Path, tmp_path: Path):
    new = tmp_path / "new.csv"
    far = "".join(f"{1.0 + k / 5},{95 + k}\n" for k in range(6))
    new.write_text("eruptions,waiting\n4.4,80\n2,54\n" + far)
    result = works("outliers", run, new, "--fdr", 0.1, "--explain")
    told = table(result)
    assert told["is_outlier"].tolist() == [False] * 2 + [True] * 6
    assert {"p_value", "q_value", "score", "surprise_waiting"} <= set(told.columns)
    assert "refitting" in result.stderr
    assert "Guarantee: exact" in result.stderr
    assert works("outliers", run, new, "-q").stderr == ""
    trusting = works("outliers", run, new, "--calibration", "model")
    assert "only as good as the model" in trusting.stderr
    given = works("outliers", run, new, "--calibration", "faithful")
    assert "272 calibration rows" in given.stderr
    assert "0.0<x<1.0" in fails(2, "outliers", run, new, "--fdr", 2)


def test_summary_in_words_and_as_a_table(run: Path, tmp_path: Path):
    told = works("summary", run).stdout
    assert "fitted by VB" in told
    assert "weights[0]" in told
    works("summary", run, "--out", tmp_path / "table.csv")
    assert "weights[0]" in set(pd.read_csv(tmp_path / "table.csv")["entry"])


# ------------------------------------------------------------------ what goes in
def test_columns_kinds_families_and_priors_can_be_chosen(tmp_path: Path):
    out = tmp_path / "run"
    works(
        *["fit", "Mixture", "wine", "--columns", "alcohol,hue", "--out", out, "--engine", "em"],
        *["--set", "num_components=2", "--set", "family=Gaussian(tied=True)"],
        *["--set", "priors.weights=GammaDirichlet(shape=1, rate=20)", "--engine-set"],
        *["num_starts=1", "--seed", 3, "--quiet"],
    )
    fit = bayesgen.load(out)
    assert fit.columns == ("alcohol", "hue")
    assert fit.attrs["seed"] == 3
    assert fit.draws["scale_tril"].shape == (1, 1, 2, 2)  # one for all components
    assert "GammaDirichlet(shape=1, rate=20)" in works("summary", out).stdout
    kinds = tmp_path / "kinds.csv"
    kinds.write_text("a\n" + "".join(f"{k}\n" for k in range(9)))
    works("fit", "GaussianMixture", kinds, *QUICK, "--kind", "real", "--out", tmp_path / "b", "-q")
    assert bayesgen.load(tmp_path / "b").schema.kinds == ("real",)


def test_category_columns_come_back_as_their_levels(tmp_path: Path):
    data = tmp_path / "animals.csv"
    data.write_text("animal,legs\n" + "cat,four\nbird,two\ncat,four\nbird,\n" * 10)
    out = tmp_path / "run"
    works(
        *["fit", "Mixture", data, "--set", "family=Categorical", "--set", "num_components=2"],
        *["--engine", "em", "--engine-set", "num_starts=1", "--out", out, "-q"],
    )
    rows = table(works("sample", out, "-n", 20))
    assert set(rows["animal"]) <= {"cat", "bird"}
    filled = table(works("impute", out, data))
    assert filled["legs"][3] == "two"
    works("sample", out, "-n", 5, "--out", tmp_path / "codes.npy")
    assert set(np.load(tmp_path / "codes.npy").ravel()) <= {0.0, 1.0}


def test_calibration_can_be_kept_in_the_run(tmp_path: Path):
    out = tmp_path / "run"
    works("fit", "GaussianMixture", "faithful", *QUICK, "--calibrate", "--out", out, "-q")
    assert bayesgen.load(out).calibration.num_rows == 136
    result = works("outliers", out, "faithful")
    assert "refitting" not in result.stderr
    assert "136 calibration rows" in result.stderr
    more = works("outliers", out, "faithful", "--folds", 3)
    assert "refitting" in more.stderr
    assert "272 calibration rows" in more.stderr


def test_a_run_says_how_it_went_unless_quiet(tmp_path: Path):
    told = works("fit", "GaussianMixture", "galaxies", *QUICK, "--out", tmp_path / "a").stderr
    assert "VB: step 1, ELBO -" in told
    assert "saved " in told
    quiet = works("fit", "GaussianMixture", "galaxies", *QUICK, "--out", tmp_path / "b", "-q")
    assert quiet.output == ""
    assert torch.equal(
        bayesgen.load(tmp_path / "a").draws["loc"], bayesgen.load(tmp_path / "b").draws["loc"]
    )
