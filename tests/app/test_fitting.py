"""Runs that stop and go on: Ctrl-C, checkpoints, --resume, --force."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesgen
from bayesgen.app import fitting
from bayesgen.app.fitting import Job

__all__: list[str] = []

VB = ("num_starts=1", "moves=no", "num_samples=20", "tolerance=1e-9")


def job(out: Path, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "model": "GaussianMixture",
        "data": "galaxies",
        "out": str(out),
        "model_settings": ("num_components=3",),
        "engine_settings": VB,
        "quiet": True,
    }
    return Job(**{**given, **changes})


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send ourselves a signal at a step of the run."""

    @contextmanager
    def progress(*_: object, **__: object) -> Iterator[list[Any]]:
        def show(progress: Any) -> None:
            if progress.step == step:
                os.kill(os.getpid(), number)

        yield [show]

    monkeypatch.setattr(fitting, "progress", progress)


def same(a: Path, b: Path) -> bool:
    first, second = bayesgen.load(a), bayesgen.load(b)
    return all(torch.equal(first.draws[k], second.draws[k]) for k in first.draws)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_goes_on_bit_by_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
):
    assert fitting.run(job(tmp_path / "whole")) == 0
    assert bayesgen.load(tmp_path / "whole").attrs["num_steps"] > 8
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)
        assert fitting.run(job(tmp_path / "part")) == 128 + number
    assert signal.getsignal(number) is before
    told = capsys.readouterr().err
    assert "the fit so far is saved" in told
    assert "--resume" in told
    assert bayesgen.load(tmp_path / "part").attrs["num_steps"] == 5
    assert not same(tmp_path / "whole", tmp_path / "part")
    assert fitting.run(job(tmp_path / "part", resume=True)) == 0
    assert same(tmp_path / "whole", tmp_path / "part")
    assert not (tmp_path / "part.checkpoint").exists()


def test_gibbs_interrupted_in_warmup_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = ("num_chains=2", "num_samples=5", "num_warmup=10")
    asked = {"engine": "gibbs", "engine_settings": settings}
    assert fitting.run(job(tmp_path / "whole", **asked)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert fitting.run(job(tmp_path / "part", **asked)) == 130
    assert "no draw to keep" in capsys.readouterr().err
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="--resume goes on"):
        fitting.run(job(tmp_path / "part", **asked))
    assert fitting.run(job(tmp_path / "part", **asked, resume=True)) == 0
    assert same(tmp_path / "whole", tmp_path / "part")


def test_force_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        fitting.run(job(tmp_path / "run", seed=1))
    with pytest.raises(ValueError, match="--force replaces"):
        fitting.run(job(tmp_path / "run", seed=2))
    assert fitting.run(job(tmp_path / "run", seed=2, force=True)) == 0
    assert bayesgen.load(tmp_path / "run").attrs["seed"] == 2
    assert not (tmp_path / "run.checkpoint").exists()


def test_a_run_that_did_not_converge_goes_on_with_more_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    short = job(tmp_path / "run", engine_settings=(*VB, "max_steps=3"), quiet=False)
    assert fitting.run(short) == 0
    assert "not converged" in capsys.readouterr().err
    more = job(tmp_path / "run", engine_settings=(*VB, "max_steps=500"), resume=True)
    assert fitting.run(more) == 0
    fit = bayesgen.load(tmp_path / "run")
    assert fit.attrs["converged"]
    assert fit.attrs["num_steps"] > 3


def test_resuming_what_is_complete_does_nothing_and_another_run_is_refused(tmp_path: Path):
    assert fitting.run(job(tmp_path / "run", resume=True)) == 0  # nothing there yet: a new run
    stamp = (tmp_path / "run" / "manifest.json").stat().st_mtime_ns
    assert fitting.run(job(tmp_path / "run", resume=True)) == 0
    assert (tmp_path / "run" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another seed"):
        fitting.run(job(tmp_path / "run", resume=True, seed=9))
    with pytest.raises(ValueError, match="another data_fingerprint"):
        fitting.run(job(tmp_path / "run", resume=True, data="faithful"))
    with pytest.raises(ValueError, match="another model"):
        fitting.run(job(tmp_path / "run", resume=True, model_settings=("num_components=4",)))


def test_foreign_folders_are_never_touched(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for changes in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"exists|no earlier run"):
            fitting.run(job(folder, **changes))
    checkpoint = tmp_path / "new.checkpoint"
    checkpoint.mkdir()
    (checkpoint / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="unfinished run"):
        fitting.run(job(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"new\.checkpoint"):
        fitting.run(job(tmp_path / "new", force=True))
    assert (checkpoint / "thesis.tex").read_text() == "mine"
    assert (folder / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_is_welcome(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert fitting.run(job(tmp_path / "run")) == 0


def test_a_target_is_for_the_classifier(tmp_path: Path):
    with pytest.raises(ValueError, match="GaussianMixture has none"):
        fitting.run(job(tmp_path / "run", target="species"))
