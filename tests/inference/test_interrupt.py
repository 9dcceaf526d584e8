"""Ctrl-C keeps the work, a checkpoint belongs to one run; test_resume.py has other processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bayesgen.inference import EM, VB, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.priors import GammaDirichlet

__all__: list[str] = []


def setting() -> tuple[Any, dict[str, Any]]:
    """A mixture and engines."""
    mixture = GaussianMixture(5, priors={"weights": GammaDirichlet(1.0, 5.0)})
    return mixture, {
        "em": EM(num_starts=3),
        "vb": VB(num_starts=2, num_samples=7),
        "memoised": VB(num_starts=2, num_samples=7, schedule="memoised", batch_size=40),
        "gibbs": Gibbs(num_chains=2, num_samples=20, num_warmup=10),
    }


def rows():
    r = np.random.default_rng(0)
    return r.normal(size=(100, 2)) + 4.0 * r.integers(3, size=(100, 1))


@pytest.mark.parametrize("name", ["em", "vb", "gibbs"])
@pytest.mark.parametrize("moment", ["in a callback", "in a step"])
def test_control_c_keeps_the_work(tmp_path, monkeypatch, name, moment):
    mixture, engines = setting()
    engine, x = engines[name], rows()
    whole = engine.run(mixture, x, seed=5)
    steps = 15 if name == "gibbs" else 3

    def stop(progress):
        if progress.step == steps:
            raise KeyboardInterrupt
        return False

    if moment == "in a callback":
        fit = engine.run(mixture, x, seed=5, callbacks=[stop], resume=tmp_path / "run")
    else:
        right, calls = type(engine).step, []

        def cut(self, task, work, state):
            calls.append(0)
            out = right(self, task, work, state)
            if len(calls) == steps + 1:
                raise KeyboardInterrupt  # after the step has drawn its random numbers
            return out

        with monkeypatch.context() as patch:
            patch.setattr(type(engine), "step", cut)
            fit = engine.run(mixture, x, seed=5, resume=tmp_path / "run")
    assert fit.attrs["num_steps"] == steps
    assert not fit.attrs["converged"]
    assert any("interrupted" in message for message in fit.attrs["messages"])
    assert bool(fit.log_prob(x).isfinite().all())
    finished = engine.run(mixture, x, seed=5, resume=tmp_path / "run")
    for site, value in whole.draws.items():
        assert torch.equal(finished.draws[site], value), site
    assert finished.history == whole.history


def test_control_c_before_any_work_stops():
    def stop(self, task, work, state):
        raise KeyboardInterrupt

    mixture, _ = setting()
    engine = VB(num_starts=1)
    patched = type("Stopped", (VB,), {"step": stop})(num_starts=1)
    with pytest.raises(KeyboardInterrupt):
        patched.run(mixture, rows())
    assert engine.run(mixture, rows()).attrs["converged"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    mixture, engines = setting()
    x = rows()
    engines["em"].run(mixture, x, seed=5, resume=tmp_path)
    for other in (
        lambda: engines["em"].run(mixture, x, seed=6, resume=tmp_path),
        lambda: engines["em"].run(mixture, x + 1.0, seed=5, resume=tmp_path),
        lambda: engines["vb"].run(mixture, x, seed=5, resume=tmp_path),
        lambda: engines["em"].run(GaussianMixture(3), x, seed=5, resume=tmp_path),
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            other()


def test_seeds():
    """The same seed gives the same fit; another gives other draws."""
    mixture, engines = setting()
    x = rows()
    for name, engine in engines.items():
        first, second = (engine.run(mixture, x, seed=3) for _ in range(2))
        for site, value in first.draws.items():
            assert torch.equal(value, second.draws[site]), f"{name}: {site}"
        assert first.history == second.history
    other = engines["gibbs"].run(mixture, x, seed=4)
    assert not torch.equal(other.draws["loc"], first.draws["loc"])
