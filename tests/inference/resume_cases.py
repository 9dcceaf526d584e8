"""Runs that are stopped and taken up again: the cases, and the process that takes them up.

``python -m tests.inference.resume_cases FOLDER [NAME ...]`` continues what ``FOLDER`` holds.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from bayesgen.inference import EM, NUTS, SVI, VB, ClosedForm, Gibbs, Laplace, ManyChains, run
from bayesgen.models import PPCA, FactorAnalysis, GaussianMixture, RobustPCA

__all__ = ["CASES", "Case", "continue_all", "folders", "outcome", "rows", "same"]

SEED = 5


# ---------------------------------------------------------------- programs
def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(x.new_tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def in_parts(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=16) as index:
        pyro.sample("y", dist.Normal(x[index] @ slope, 1.0), obs=y[index])


def two_groups(y):
    share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), 2.0))
    with pyro.plate("groups", 2):
        loc = pyro.sample("loc", dist.Normal(y.new_tensor(0.0), 5.0))
    with pyro.plate("data", len(y)):
        group = pyro.sample("group", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(loc[group.long()], 1.0), obs=y)


# ---------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """An engine, what it fits, and to which of the data."""

    engine: Any
    model: Any
    data: str = "table"

    def run(self, data: Any, **arguments: Any) -> Any:
        """The fit."""
        return self.engine.run(self.model, data[self.data], seed=SEED, **arguments)


_GIBBS = {"num_chains": 2, "num_samples": 20, "num_warmup": 10}
_NUTS = {"num_chains": 2, "num_samples": 150, "num_warmup": 40}
_MANY = {"num_chains": 8, "num_superchains": 4, "num_samples": 40, "num_warmup": 40}
_SVI = {"num_steps": 240, "num_samples": 20}
CASES = {
    "em-mixture": Case(EM(num_starts=3, tolerance=1e-9), GaussianMixture(4)),
    "em-minibatch": Case(EM(num_starts=1, schedule="memoised", batch_size=40), GaussianMixture(4)),
    "em-factors": Case(EM(num_starts=2), FactorAnalysis(1)),
    "vb-mixture": Case(VB(num_starts=2, num_samples=7), GaussianMixture(5)),
    "vb-minibatch": Case(VB(num_starts=1, schedule="memoised", batch_size=40), GaussianMixture(5)),
    "vb-robust": Case(VB(num_starts=1), RobustPCA(1)),
    "gibbs-mixture": Case(Gibbs(**_GIBBS), GaussianMixture(4)),
    "gibbs-robust": Case(Gibbs(**_GIBBS), RobustPCA(1)),
    "gibbs-cells": Case(Gibbs(**_GIBBS), RobustPCA(1, scales="cells")),
    "closed-form": Case(ClosedForm(), PPCA(1)),
    "svi": Case(SVI(**_SVI), regression, "pair"),
    "svi-compiled": Case(SVI(compile=True, **_SVI), regression, "pair"),
    "svi-particles": Case(SVI(num_particles=3, compile=False, **_SVI), regression, "pair"),
    "svi-subsample": Case(SVI(**_SVI), in_parts, "pair"),
    "svi-discrete": Case(SVI(**_SVI), two_groups, "column"),
    "svi-mixture": Case(SVI(batch_size=32, **_SVI), GaussianMixture(2)),
    "nuts": Case(NUTS(**_NUTS), regression, "pair"),
    "nuts-eager": Case(NUTS(2, 60, 20, compile=False), regression, "pair"),
    "nuts-discrete": Case(NUTS(**_NUTS), two_groups, "column"),
    "nuts-ppca": Case(NUTS(**_NUTS), PPCA(1)),
    "laplace": Case(Laplace(num_samples=20), regression, "pair"),
    "laplace-discrete": Case(Laplace(num_samples=20), two_groups, "column"),
    "many": Case(ManyChains(**_MANY), regression, "pair"),
    "many-compiled": Case(ManyChains(compile=True, **_MANY), regression, "pair"),
    "many-eager": Case(ManyChains(compile=False, **_MANY), regression, "pair"),
    "many-discrete": Case(ManyChains(**_MANY), two_groups, "column"),
}


def rows(folder: Path) -> dict[str, Any]:
    """The data, written to ``folder`` by the first process and read by the next."""
    file = folder / "data.npz"
    if not file.exists():
        r = np.random.default_rng(0)
        x = r.normal(size=(100, 2)) + 4.0 * r.integers(3, size=(100, 1))
        z = r.normal(size=(60, 3))
        np.savez(file, x=x, z=z, y=z @ np.array([1.0, -1.0, 0.5]) + r.normal(size=60))
    with np.load(file) as found:
        return {
            "table": found["x"],
            "pair": (found["z"], found["y"]),
            "column": found["x"][:60, 0],
        }


def outcome(fit: Any) -> dict[str, np.ndarray]:
    """Everything of a fit that must be the same to the last bit."""
    numbers = {f"draws/{site}": value.numpy() for site, value in fit.draws.items()}
    numbers |= {f"stats/{name}": value.numpy() for name, value in fit.sample_stats.items()}
    numbers |= {f"history/{name}": np.array(values) for name, values in fit.history.items()}
    return numbers | {"steps": np.array(fit.attrs["num_steps"])}


def same(one: Any, other: Any, what: str) -> None:
    """Assert that two outcomes are equal, bit by bit."""
    assert set(one) == set(other), f"{what}: {set(one) ^ set(other)}"
    for name, value in one.items():
        found = np.asarray(other[name])
        assert found.shape == value.shape, f"{what}: {name} is {found.shape}, not {value.shape}"
        assert found.tobytes() == value.tobytes(), f"{what}: {name} differs"


# ---------------------------------------------------------------- the other process
def folders(folder: Path, name: str) -> Iterator[Path]:
    """The runs of a case that were stopped."""
    return (path for path in sorted(folder.glob(f"{name}@*")) if path.is_dir())


def continue_all(folder: Path, names: Any) -> None:
    """Finish every stopped run of these cases, and write down how it ended."""
    data = rows(folder)
    for name in names:
        for path in folders(folder, name):
            fit = CASES[name].run(data, resume=path)
            np.savez(folder / f"{path.name}.npz", **outcome(fit))


def run_to_be_killed(folder: Path, name: str, interval: float) -> None:
    """Checkpoints every ``interval`` seconds; each finished step leaves a line in a log."""
    run._CHECKPOINT_SECONDS = interval

    def log(progress: run.Progress) -> bool:
        with (folder / f"{name}.log").open("a") as file:
            file.write(json.dumps([progress.step, progress.seconds]) + "\n")
        return False

    fit = CASES[name].run(rows(folder), resume=folder / f"{name}@kill", callbacks=[log])
    with contextlib.suppress(FileExistsError):
        np.savez(folder / f"{name}.npz", **outcome(fit))
    (folder / f"{name}.done").touch()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "kill":
        run_to_be_killed(Path(sys.argv[1]), sys.argv[3], float(sys.argv[4]))
    else:
        continue_all(Path(sys.argv[1]), sys.argv[2:])
