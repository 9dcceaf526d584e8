"""``bayesgen fit MixtureClassifier``: the column of classes apart, one fit a class, one folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayesgen import datasets
from bayesgen.app.actions import read_data
from bayesgen.app.guard import Misuse, interrupts
from bayesgen.app.progress import progress, say
from bayesgen.app.wording import for_shell
from bayesgen.data import as_dataset

if TYPE_CHECKING:
    from bayesgen.app.fitting import Job
    from bayesgen.data import Dataset
    from bayesgen.inference.run import Engine
    from bayesgen.models.classifier import MixtureClassifier

__all__ = ["fit_classifier"]

_BUNDLED_TARGET = "target"


def fit_classifier(job: Job, model: MixtureClassifier, engine: Engine[Any]) -> int:
    """Fit the model of each class, save them together, and say how it went.

    Returns:
        The exit code: 0, or 128 + the signal that interrupted the run (nothing is saved then).

    Raises:
        Misuse: No target, or an option that is for single fits.
        ValueError: A target that is no column, or labels that do not serve.
    """
    if job.target is None:
        raise Misuse("MixtureClassifier needs --target COLUMN, the column of the classes.")
    if job.resume or job.calibrate or job.folds is not None:
        raise Misuse("--resume, --calibrate and --folds are for single fits, not for classifiers.")
    data, labels = _split(job, job.target)
    with interrupts() as heard:
        fit = None
        try:
            with progress(engine, quiet=job.quiet) as callbacks:
                # An engine keeps what it has when interrupted; the classes after it stop at once.
                stop = [*callbacks, lambda _: heard.number is not None]
                fit = model.run(
                    engine, data, labels, seed=job.seed, target=job.target, callbacks=stop
                )
        except (KeyboardInterrupt, ValueError):  # before the first step, or before any draw
            if heard.number is None:
                raise
        if fit is None or heard.number is not None:
            say("bayesgen: interrupted; a classifier is saved as a whole, so nothing was kept.")
            return heard.exit_code
        fit.save(job.out)
    say(f"saved {job.out}: {fit!r}", quiet=job.quiet)
    for label, part in zip(fit.classes, fit.fits, strict=True):
        for message in part.attrs["messages"]:
            say(f"bayesgen: warning: class {label!r}: {for_shell(message)}", quiet=job.quiet)
    return 0


def _split(job: Job, target: str) -> tuple[Dataset, list[Any]]:
    """The columns to learn from, and the class of each row."""
    if job.data in datasets.names() and target == _BUNDLED_TARGET:
        data, codes = datasets.load(job.data, with_target=True)
        return as_dataset(data, columns=job.columns, kinds=job.kinds), codes.tolist()
    whole = read_data(job.data)
    if target not in whole.columns:
        raise ValueError(
            f"--target {target}: there is no such column; there are {', '.join(whole.columns)}."
        )
    kinds = job.kinds if isinstance(job.kinds, dict) else {}
    whole = as_dataset(whole, kinds={**kinds, target: "category"})
    place = whole.columns.index(target)
    levels = whole.schema.levels[place] or ()
    chosen = job.columns or [name for name in whole.columns if name != target]
    if target in chosen:
        raise ValueError(f"--columns names the target {target!r}, which cannot explain itself.")
    column = whole.tensor()[:, place].tolist()
    labels = [None if code != code else levels[int(code)] for code in column]
    own = job.kinds if isinstance(job.kinds, str) else None
    return as_dataset(whole, columns=chosen, kinds=own), labels
