"""What the commands do, free of click: each takes checked options and writes one result."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesgen import datasets
from bayesgen.app.guard import Misuse
from bayesgen.app.output import check_out, rows_frame, write_frame
from bayesgen.app.progress import say
from bayesgen.app.wording import for_shell
from bayesgen.data import Dataset, as_dataset
from bayesgen.fit import Fit, load
from bayesgen.models.classifier import ClassifierFit

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.outliers import Outliers
    from bayesgen.schema import Kind, Schema

__all__ = [
    "impute",
    "load_run",
    "outliers",
    "predict",
    "read_data",
    "report",
    "sample",
    "score",
    "summary",
]

_BLOCK = 65_536


# ------------------------------------------------------------------ in
def read_data(
    text: str,
    *,
    schema: Schema | None = None,
    columns: Sequence[str] | None = None,
    kinds: Mapping[str, Kind] | Kind | None = None,
) -> Dataset:
    """A data file, a bundled data set by its name, or CSV from stdin (``-``).

    Args:
        text: What the user wrote.
        schema: The schema the data must have; columns it does not know are left aside.
        columns: Columns to keep.
        kinds: Kinds of columns, instead of the learnt ones.

    Raises:
        FileNotFoundError: There is neither such a file nor such a data set.
        ValueError: Content that is not allowed.
    """
    if schema is not None:
        columns = schema.columns
    options: dict[str, Any] = {"schema": schema, "columns": columns, "kinds": kinds}
    if text == "-":
        return _from_stdin(options)
    path = Path(text).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{text!r} is a folder; name a file of rows in it.")
    if path.suffix == "" and not path.is_file():
        if text in datasets.names():
            return as_dataset(datasets.load(text), **options)
        raise FileNotFoundError(
            f"there is no file {text!r}, and no bundled data set of that name; those are "
            f"{', '.join(datasets.names())}."
        )
    return as_dataset(path, **options)


def _from_stdin(options: Mapping[str, Any]) -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin.csv"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return as_dataset(path, **options, in_memory=True)


def load_run(run: str) -> Fit | ClassifierFit:
    """A saved fit or classifier.

    Raises:
        FileNotFoundError: There is none in the folder.
    """
    if not Path(run).is_dir():
        raise FileNotFoundError(
            f"there is no run {run!r}: give the folder of `bayesgen fit --out`."
        )
    found: Fit | ClassifierFit = load(run)
    return found


def _single(run: str, verb: str) -> Fit:
    """A saved fit, where a classifier cannot serve."""
    found = load_run(run)
    if isinstance(found, ClassifierFit):
        raise ValueError(
            f"{run} holds a classifier, which `bayesgen {verb}` does not understand: from Python, "
            f"each class has its own fit in bayesgen.load({run!r}).fits. A classifier can "
            "summary, score, predict and sample."
        )
    return found


def _each(
    fit: Fit | ClassifierFit, data: str, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``compute`` over blocks of rows: large files never stand in memory whole."""
    rows = read_data(data, schema=fit.schema)
    return torch.cat([compute(block) for block in rows.batches(_BLOCK)])


# ------------------------------------------------------------------ out
def summary(run: str, *, out: str | None = None, force: bool = False) -> None:
    """Print what was fitted and whether to trust it; the whole table into ``out``."""
    if out is not None:
        check_out(out, force=force)
    fit = load_run(run)
    if isinstance(fit, ClassifierFit):
        if out is not None:
            raise Misuse(f"{run} holds a classifier, which has no single table; leave out --out.")
        print(fit.summary())
        return
    told = fit.summary()
    if out is None:
        print(for_shell(str(told)))
        return
    write_frame(told.table.rename_axis("entry").reset_index(), out)


def report(run: str, *, out: str | None = None, force: bool = False, quiet: bool = False) -> None:
    """Write one page about the fit: verdict, tables, pictures, graph, data and versions."""
    from bayesgen.app.report import write_report

    target = Path(run) / "report.html" if out is None else Path(out)
    fit = _single(run, "report")
    write_report(fit, target, force=force or out is None)
    word = "PASS" if fit.verdict() else "FAIL"
    say(f"wrote {target} ({word})", quiet=quiet)


def score(run: str, data: str, *, out: str = "-", force: bool = False) -> None:
    """Log posterior predictive density of each row, in nats."""
    import pandas as pd

    check_out(out, force=force)
    fit = load_run(run)
    values = _each(fit, data, fit.log_prob)
    write_frame(pd.DataFrame({"log_prob": values.cpu().numpy()}), out)


def predict(run: str, data: str, *, out: str = "-", force: bool = False) -> None:
    """The cluster or class of each row and its probability."""
    import pandas as pd

    check_out(out, force=force)
    fit = load_run(run)
    if isinstance(fit, ClassifierFit):
        belief = _each(fit, data, fit.predict_proba)
        best = belief.cpu().max(-1)
        named = [fit.classes[i] for i in best.indices.tolist()]
        write_frame(pd.DataFrame({"label": named, "probability": best.values.numpy()}), out)
        return
    belief = _each(fit, data, fit.encode)
    if belief.ndim != 2:
        raise ValueError(f"{type(fit.model).__name__} has no clusters to predict.")
    sure, label = (value.cpu().numpy() for value in belief.max(-1))
    write_frame(pd.DataFrame({"label": label, "probability": sure}), out)


def sample(
    run: str, num_samples: int, *, seed: int = 0, out: str = "-", force: bool = False
) -> None:
    """New rows from the posterior predictive, those of a classifier with their classes."""
    check_out(out, force=force)
    fit = load_run(run)
    if isinstance(fit, ClassifierFit):
        if out.endswith(".npy"):
            raise Misuse(f"--out {out}: classes are names, which .npy cannot hold; take .csv.")
        drawn, classes = fit.sample(num_samples, seed=seed)
        frame = rows_frame(drawn, fit.schema)
        frame[fit.target or "class"] = classes
        write_frame(frame, out)
        return
    rows = fit.sample(num_samples, seed=seed)
    write_frame(rows_frame(rows, fit.schema), out, array=rows.cpu().numpy())


def impute(
    run: str,
    data: str,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    out: str = "-",
    force: bool = False,
) -> None:
    """The rows with their gaps filled: once by expectation, or several times at random."""
    import pandas as pd

    check_out(out, force=force)
    fit = _single(run, "impute")
    if num_samples is None:
        filled = _each(fit, data, fit.impute_mean)
        write_frame(rows_frame(filled, fit.schema), out, array=filled.cpu().numpy())
        return
    copies = fit.impute(read_data(data, schema=fit.schema), num_samples=num_samples, seed=seed)
    parts: list[pd.DataFrame] = []
    for index, copy in enumerate(copies):
        frame = rows_frame(copy, fit.schema)
        frame.insert(0, "imputation", index)
        parts.append(frame)
    write_frame(pd.concat(parts, ignore_index=True), out, array=copies.cpu().numpy())


def outliers(
    run: str,
    data: str,
    *,
    fdr: float = 0.05,
    calibration: str | None = None,
    folds: int | None = None,
    explain: bool = False,
    seed: int = 0,
    out: str = "-",
    force: bool = False,
    quiet: bool = False,
) -> None:
    """Which rows do not belong, the false discovery rate controlled."""
    check_out(out, force=force)
    fit = _single(run, "outliers")
    rows = read_data(data, schema=fit.schema)
    verdict = _judge(fit, rows, fdr, calibration, folds, seed, quiet)
    frame = verdict.to_frame()
    if explain:
        from bayesgen.outliers import explain as surprise

        reasons = surprise(fit, rows).cpu().numpy()
        for j, column in enumerate(fit.columns):
            frame[f"surprise_{column}"] = reasons[:, j]
    write_frame(frame, out)
    say(str(verdict), quiet=quiet)


def _judge(
    fit: Fit,
    rows: Dataset,
    fdr: float,
    calibration: str | None,
    folds: int | None,
    seed: int,
    quiet: bool,
) -> Outliers:
    given: object = None
    if calibration == "model":
        given = "model"
    elif calibration is not None:
        given = read_data(calibration, schema=fit.schema)
    elif fit.calibration is None or folds is not None:
        say(
            "calibrating: refitting without the rows that calibrate "
            "(`bayesgen fit --calibrate` keeps this in the run)",
            quiet=quiet,
        )
        fit = replace(fit, calibration=None)  # other folds were asked for than those in the run
    return fit.outliers(rows, fdr=fdr, calibration=given, folds=folds, seed=seed)
