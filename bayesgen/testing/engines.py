"""Checks of engines: reproducible, resumable, and without side effects."""

from __future__ import annotations

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
    """A run that is cut and resumed ends in the same fit, bit by bit."""
    whole = case.run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        cut = case.run(resume=path, callbacks=[lambda p: p.step >= case.resume_after])
        steps = max(len(values) for values in cut.history.values())
        assert steps <= case.resume_after, f"a callback asked to stop, but {steps} steps were made"
        _equal(whole, case.run(resume=path), "resumed and uninterrupted run")


def check_callback(case: EngineCase) -> None:
    """Callbacks see every step; one that stops leaves a usable fit that says so."""
    steps: list[int] = []

    def watch(progress: Any) -> bool:
        steps.append(progress.step)
        return False

    case.run(callbacks=[watch])
    assert steps == list(range(1, len(steps) + 1)), f"steps seen: {steps[:10]}"
    stopped = case.run(callbacks=[lambda progress: True])
    assert stopped.draws, "a stopped run has no draws"
    assert stopped.attrs["messages"], "a stopped run does not say that it was stopped"


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


def check_monotone(case: EngineCase) -> None:
    """What is promised never to fall does not, beyond rounding."""
    history = case.run().history
    for name in case.monotone:
        values = np.asarray(history[name])
        fall = float(np.max(values[:-1] - values[1:], initial=0.0))
        limit = 1e-8 * max(1.0, float(np.abs(values).max()))
        assert fall <= limit, f"'{name}' fell by {fall:.3g} nats"
