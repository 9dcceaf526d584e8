"""A run stopped at any moment, and taken up by another process, ends as if it never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesgen.inference import EM, VB, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.priors import GammaDirichlet

__all__: list[str] = []

_SETTING = """
mixture = GaussianMixture(5, priors={"weights": GammaDirichlet(1.0, 5.0)})
engines = {
    "em": EM(num_starts=3),
    "vb": VB(num_starts=2, num_samples=7),
    "memoised": VB(num_starts=2, num_samples=7, schedule="memoised", batch_size=40),
    "gibbs": Gibbs(num_chains=2, num_samples=20, num_warmup=10),
}
"""
_SCRIPT = f"""
import numpy as np, sys, torch
torch.set_num_threads({torch.get_num_threads()})
from bayesgen.inference import EM, VB, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.priors import GammaDirichlet
{_SETTING}
folder = sys.argv[1]
x = np.load(folder + "/x.npy")
for name, engine in engines.items():
    fit = engine.run(mixture, x, seed=5, resume=folder + "/" + name)
    out = {{k: v.numpy() for k, v in fit.draws.items()}}
    np.savez(folder + "/" + name + ".npz", steps=fit.attrs["num_steps"], **out)
"""


def setting() -> tuple[Any, dict[str, Any]]:
    """The same mixture and engines as the other process has."""
    space: dict[str, Any] = {
        "EM": EM,
        "VB": VB,
        "Gibbs": Gibbs,
        "GaussianMixture": GaussianMixture,
        "GammaDirichlet": GammaDirichlet,
    }
    exec(_SETTING, space)
    return space["mixture"], space["engines"]


def rows():
    r = np.random.default_rng(0)
    return r.normal(size=(100, 2)) + 4.0 * r.integers(3, size=(100, 1))


def test_another_process_finishes_bit_by_bit(tmp_path: Path) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", x)
    mixture, engines = setting()
    whole = {name: engine.run(mixture, x, seed=5) for name, engine in engines.items()}
    r = np.random.default_rng(11)
    for name, engine in engines.items():
        stop = int(r.integers(1, whole[name].attrs["num_steps"]))
        if name == "gibbs":
            stop = max(stop, 12)
        engine.run(
            mixture,
            x,
            seed=5,
            resume=tmp_path / name,
            callbacks=[lambda progress, stop=stop: progress.step == stop],
        )
    subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path)], check=True, timeout=300)
    for name, fit in whole.items():
        with np.load(tmp_path / f"{name}.npz") as found:
            assert int(found["steps"]) == fit.attrs["num_steps"], name
            for site, value in fit.draws.items():
                assert torch.equal(torch.as_tensor(found[site]), value), f"{name}: {site}"


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
