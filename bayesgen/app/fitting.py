"""``bayesgen fit``: one run into one folder, with checkpoints beside it until it is complete."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesgen.app.actions import read_data
from bayesgen.app.classifying import fit_classifier
from bayesgen.app.guard import Misuse, interrupts
from bayesgen.app.progress import progress, say
from bayesgen.app.registry import ENGINES, MODELS, build
from bayesgen.app.wording import for_shell
from bayesgen.capabilities import Model
from bayesgen.fit import Fit
from bayesgen.models.classifier import MixtureClassifier
from bayesgen.storage import flatten

if TYPE_CHECKING:
    from bayesgen.data import Dataset
    from bayesgen.inference.run import Engine
    from bayesgen.schema import Kind

__all__ = ["Job", "run"]

_SMALL = 200_000  # entries


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    model: str
    data: str
    out: str
    engine: str = "vb"
    model_settings: Sequence[str] = ()
    engine_settings: Sequence[str] = ()
    seed: int = 0
    columns: Sequence[str] | None = None
    kinds: Mapping[str, Kind] | Kind | None = None
    target: str | None = None
    resume: bool = False
    force: bool = False
    calibrate: bool = False
    folds: int | None = None
    quiet: bool = False

    @property
    def folder(self) -> Path:
        """Where the fit goes."""
        return Path(self.out)

    @property
    def checkpoint(self) -> Path:
        """Where the state of an unfinished run lies: beside the fit."""
        return self.folder.with_name(self.folder.name + ".checkpoint")


def run(job: Job) -> int:
    """Fit, save, and say how it went.

    Returns:
        The exit code: 0, or 128 + the signal that interrupted the run (the fit so far is saved).

    Raises:
        ValueError: Settings or data that are not allowed, or an output that exists.
    """
    _check_folder(job)
    model: Model | MixtureClassifier = build(MODELS, job.model, job.model_settings)
    engine = _engine(job)
    if isinstance(model, MixtureClassifier):
        return fit_classifier(job, model, engine)
    if job.target is not None:
        raise Misuse(f"--target names the classes of MixtureClassifier; {job.model} has none.")
    data = read_data(job.data, columns=job.columns, kinds=job.kinds)
    if _is_complete(job, model, engine, data):
        say(f"{job.out} is complete already; nothing to resume.", quiet=job.quiet)
        return 0
    return _fit(job, model, engine, data)


def _engine(job: Job) -> Engine[Any]:
    engine: Engine[Any] = build(ENGINES, job.engine, job.engine_settings)
    return engine


def _check_folder(job: Job) -> None:
    """Nothing is overwritten unasked, and what cannot be written is known before the work."""
    folder, checkpoint = job.folder, job.checkpoint
    if folder.name in ("", ".", ".."):
        raise ValueError(f"--out {job.out}: name a new folder.")
    if folder.is_dir() and not any(folder.iterdir()):
        pass
    elif folder.exists() and not (job.force or job.resume):
        raise ValueError(
            f"--out {job.out} exists; --force replaces it, --resume goes on with one unfinished."
        )
    elif folder.exists() and not (folder / "manifest.json").exists():
        raise ValueError(f"--out {job.out} is no earlier run; name another folder.")
    if checkpoint.exists() and not (job.force or job.resume):
        raise ValueError(
            f"an unfinished run lies in {checkpoint}: --resume goes on, --force starts anew."
        )
    if job.force and not job.resume:
        _remove_checkpoint(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(f"--out {job.out}: the folder {folder.parent} cannot be written to.")


def _remove_checkpoint(folder: Path) -> None:
    if (folder / "manifest.json").exists():  # else it is not ours to delete
        shutil.rmtree(folder)


def _is_complete(job: Job, model: Model, engine: Engine[Any], data: Dataset) -> bool:
    """Whether ``--resume`` finds the very fit that was asked for, finished."""
    if not job.resume or job.checkpoint.exists() or not (job.folder / "manifest.json").exists():
        return False
    fit = Fit.load(job.folder)
    asked = {
        "engine": type(engine).__name__,
        "settings": engine.settings(),
        "seed": job.seed,
        "data_fingerprint": data.fingerprint(),
    }
    found = {name: fit.attrs.get(name) for name in asked}
    asked["model"], found["model"] = True, _same_model(fit.model, model.bind(data))
    if found != asked:
        other = ", ".join(name for name in asked if asked[name] != found[name])
        raise ValueError(
            f"{job.out} holds a complete run with another {other}; name another folder, or say "
            "--force without --resume to replace it."
        )
    return True


def _same_model(first: Model, second: Model) -> bool:
    """Whether a file would hold the same of both."""
    (here, config), (there, other) = flatten(first.to_config()), flatten(second.to_config())
    if type(first) is not type(second) or config != other or here.keys() != there.keys():
        return False
    return all(here[name].equal(there[name]) for name in here)


def _spare_threads(data: Dataset) -> None:
    """Small tables on one thread: handing them around costs more than it saves, up to tenfold."""
    import torch

    if data.num_rows * data.num_columns < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _fit(job: Job, model: Model, engine: Engine[Any], data: Dataset) -> int:
    _spare_threads(data)
    with interrupts() as heard:
        try:
            with progress(engine, quiet=job.quiet) as callbacks:
                fit = engine.run(
                    model, data, seed=job.seed, callbacks=callbacks, resume=job.checkpoint
                )
        except (KeyboardInterrupt, ValueError):
            if heard.number is None:
                _remove_checkpoint_without_progress(job)
                raise
            say(_interrupted(job, None), quiet=False)
            return heard.exit_code
        stopped = heard.number is not None
        if job.calibrate and not stopped:
            fit = _calibrated(job, fit)
            stopped = heard.number is not None
        fit.save(job.out)
    if stopped:
        say(_interrupted(job, fit), quiet=False)
        return heard.exit_code
    if fit.attrs["converged"]:
        _remove_checkpoint(job.checkpoint)
    say(_verdict(job, fit), quiet=job.quiet)
    return 0


def _remove_checkpoint_without_progress(job: Job) -> None:
    """A run that failed by itself would fail again: nothing to resume."""
    if not job.resume:
        _remove_checkpoint(job.checkpoint)


def _calibrated(job: Job, fit: Fit) -> Fit:
    from bayesgen.outliers import calibrate

    how = "half of the rows" if job.folds is None else f"each of {job.folds} folds in turn"
    say(f"calibrating: refitting without {how}", quiet=job.quiet)
    try:
        calibration = calibrate(fit, folds=job.folds, seed=job.seed)
    except KeyboardInterrupt:
        say("interrupted while calibrating; the fit itself is complete.")
        return fit
    return dataclasses.replace(fit, calibration=calibration)


# ------------------------------------------------------------------ words
def _interrupted(job: Job, fit: Fit | None) -> str:
    kept = "nothing could be kept" if not job.checkpoint.exists() else ""
    if fit is not None:
        kept = f"the fit so far is saved in {job.out}"
    lines = ["bayesgen: interrupted; " + (kept or "there is no draw to keep yet")]
    if job.checkpoint.exists():
        lines.append("the same command with --resume goes on from here")
    return "; ".join(lines) + "."


def _verdict(job: Job, fit: Fit) -> str:
    attrs = fit.attrs
    parts = [f"saved {job.out}: {fit!r}"]
    if "num_occupied" in attrs:
        count = attrs["num_occupied"]
        drawn = fit.sample_stats.get("num_occupied")
        average = "" if drawn is None else f" ({float(drawn.mean()):.1f} on average)"
        parts.append(f"{count} cluster{'s' * (count != 1)}{average}")
    parts.append(f"{attrs['num_steps']} steps, {attrs['seconds']:.1f} s")
    lines = [", ".join(parts)]
    failures = [f.message for f in fit.verdict().failures if f.code != "converged"]
    told = (for_shell(message) for message in (*attrs["messages"], *failures))
    lines += [f"bayesgen: warning: {message}" for message in told]
    if not attrs["converged"]:
        lines.append(
            "bayesgen: warning: not converged; --resume with a larger --engine-set max_steps "
            f"goes on from {job.checkpoint}"
        )
    return "\n".join(lines)
