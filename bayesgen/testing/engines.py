"""Checks of engines: reproducible, resumable, and without side effects."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesgen.capabilities import Encoder, Scored
from bayesgen.testing.cases import EngineCase

if TYPE_CHECKING:
    from bayesgen.fit import Fit

__all__ = [
    "check_callback",
    "check_diagnosed",
    "check_fit",
    "check_globals",
    "check_monotone",
    "check_reproducible",
    "check_resume",
    "check_saved",
]


def _equal(left: Fit, right: Fit, what: str) -> None:
    assert set(left.draws) == set(right.draws), f"{what}: sites differ"
    for site, value in left.draws.items():
        assert torch.equal(value, right.draws[site]), f"{what}: '{site}' differs"
    assert left.history == right.history, f"{what}: the histories differ"


def check_fit(case: EngineCase) -> None:
    """The fit is complete: finite draws, named dims, JSON attributes, usable verbs."""
    fit = case.run()
    for site, value in fit.draws.items():
        assert bool(value.isfinite().all()), f"draws of '{site}' are not finite"
        assert site in fit.model.dims, f"the model's dims lack '{site}'"
        assert value.ndim == 2 + len(fit.model.dims[site]), f"'{site}' is {tuple(value.shape)}"
    json.dumps(fit.attrs)
    wanted = {"engine", "settings", "seed", "versions", "num_rows", "columns", "converged"}
    assert wanted <= set(fit.attrs), f"attrs lack {sorted(wanted - set(fit.attrs))}"
    assert fit.attrs["seed"] == case.seed, "attrs record another seed"
    assert fit.history, "the history is empty"
    assert fit.refit is not None, "the fit cannot refit"
    for name, values in fit.history.items():
        assert np.isfinite(values).all(), f"history of '{name}' is not finite"
    if isinstance(fit.model, Scored):
        scores = fit.log_prob(case.data)
        assert scores.shape == (case.data.num_rows,), f"log_prob is {tuple(scores.shape)}"
        assert bool(scores.isfinite().all()), "log_prob of the training rows is not finite"
    for site, (mean, tolerance) in case.fixed.items():
        error = float((fit.aligned.draws[site].mean((0, 1)) - mean).abs().max())
        assert error <= tolerance, f"mean of '{site}' is off by {error:.3g}"


def check_reproducible(case: EngineCase) -> None:
    """Same seed, same fit, bit by bit; another seed, another."""
    fit = case.run()
    _equal(fit, case.run(), "two runs of one seed")
    if case.is_random:
        other = case.run(seed=case.seed + 1)
        same = all(
            value.shape == other.draws[site].shape and torch.equal(value, other.draws[site])
            for site, value in fit.draws.items()
        )
        assert not same, "another seed gave the same draws"


def check_globals(case: EngineCase) -> None:
    """The global generators, the default dtype and Pyro's store are untouched."""
    import pyro

    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002 - the global one is under test
    dtype = torch.get_default_dtype()
    case.run()
    assert torch.equal(torch.get_rng_state(), torch_state), "drew from torch's global generator"
    after = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    assert np.array_equal(after, numpy_state), "drew from numpy's global generator"
    assert torch.get_default_dtype() == dtype, "changed the default dtype"
    assert not list(pyro.get_param_store().keys()), "Pyro's global parameter store is not empty"


def check_resume(case: EngineCase) -> None:
    """A run that is cut and resumed goes on where it was, and ends in the same fit, bit by bit."""
    whole, seen = case.run(), list[int]()

    def cut(progress: Any) -> bool:
        return progress.step >= case.resume_after

    def watch(progress: Any) -> bool:
        seen.append(progress.step)
        return False

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        # An engine may refuse to call so short a run a fit; its checkpoint must stand.
        with contextlib.suppress(ValueError):
            case.run(resume=path, callbacks=[cut])
        _equal(whole, case.run(resume=path, callbacks=[watch]), "resumed and uninterrupted run")
    assert seen[:1] == [case.resume_after + 1], (
        f"cut after step {case.resume_after}, the resumed run began with step {seen[:1]}"
    )


def check_callback(case: EngineCase) -> None:
    """Callbacks see every step; one that stops leaves a usable fit that says so."""
    steps: list[int] = []

    def watch(progress: Any) -> bool:
        steps.append(progress.step)
        return False

    case.run(callbacks=[watch])
    assert steps == list(range(1, len(steps) + 1)), f"steps seen: {steps[:10]}"
    enough = steps[-1] - 1
    stopped = case.run(callbacks=[lambda progress: progress.step >= enough])
    assert stopped.attrs["messages"], "a stopped run does not say that it was stopped"
    made = max(len(values) for values in stopped.history.values())
    assert made == enough, f"asked to stop after {enough} steps, but {made} were made"


def check_saved(case: EngineCase) -> None:
    """Saved and loaded, the fit scores and encodes the same rows to the same bits."""
    from bayesgen.fit import load

    fit = case.run()
    with tempfile.TemporaryDirectory() as folder:
        fit.save(Path(folder) / "fit")
        again = load(Path(folder) / "fit", type(fit.model))
    _equal(fit, again, "saved and loaded")
    if isinstance(fit.model, Scored):
        left, right = fit.log_prob(case.data), again.log_prob(case.data)
        assert torch.equal(left, right), "log_prob is not equal bit by bit after a reload"
    if isinstance(fit.model, Encoder):
        left, right = fit.encode(case.data), again.encode(case.data)
        assert torch.equal(left, right), "encode is not equal bit by bit after a reload"


def check_diagnosed(case: EngineCase) -> None:
    """The fit summarises itself, and ArviZ gets draws, statistics and named dimensions."""
    fit = case.run()
    assert type(fit.model).__name__.lower() in str(fit.summary()).lower(), (
        "summary lacks the model"
    )
    data = fit.arviz
    for site, value in fit.draws.items():
        found = data["posterior"][site]
        assert found.shape == tuple(value.shape), f"ArviZ has '{site}' as {found.shape}"
        assert found.dims == ("chain", "draw", *fit.model.dims[site]), f"dims {found.dims}"
    if isinstance(fit.model, Scored):
        wanted = (fit.num_chains, fit.num_draws, case.data.num_rows)
        assert data["log_likelihood"]["x"].shape == wanted, "log_likelihood is not pointwise"


def check_monotone(case: EngineCase) -> None:
    """What is promised never to fall does not, beyond rounding."""
    history = case.run().history
    for name in case.monotone:
        values = np.asarray(history[name])
        fall = float(np.max(values[:-1] - values[1:], initial=0.0))
        limit = 1e-8 * max(1.0, float(np.abs(values).max()))
        assert fall <= limit, f"'{name}' fell by {fall:.3g} nats"
