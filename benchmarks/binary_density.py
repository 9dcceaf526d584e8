"""Bernoulli mixtures on the twelve binary density sets, beside reference EM mixtures.

Each set is fitted from random responsibilities by Gibbs (one chain; its score is the posterior
predictive, the average over the draws) and EM (posterior mode) under a few priors; the setting
with the best validation log likelihood is scored on the test rows. The reference is an EM mixture
of Bernoullis with add-one smoothing, up to 100 components, one start and early stopping on the
validation rows.

    python benchmarks/binary_density.py             # about 20 minutes of one core
    python benchmarks/binary_density.py --quick     # nltcs and dna, a minute
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch

from bayesgen.inference import EM, Gibbs
from bayesgen.models import Mixture
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.priors import SymmetricDirichlet

__all__ = ["main"]

FOLDER = Path(os.environ.get("BAYESGEN_SHARED_DATA", "/work/shared/data")) / "binary_density"
SETS = (
    "nltcs", "dna", "plants", "jester", "tretail", "bnetflix",
    "kosarek", "book", "ad", "cwebkb", "kdd", "c20ng",
)  # fmt: skip


class Setting(NamedTuple):
    """One way to fit a set."""

    engine: str
    num_components: int
    flat: float
    """Ones and zeros that the Beta prior adds to every column."""
    centred: float
    """Observations, at the column's own share of ones, that it adds to these."""

    def __str__(self) -> str:
        return f"{self.engine} K={self.num_components} flat={self.flat} centred={self.centred}"


class Result(NamedTuple):
    """Mean log likelihoods in nats a row."""

    setting: Setting
    valid: float
    test: float


def load(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of zeros and ones, float32, by part."""
    with np.load(FOLDER / f"{name}.npz") as file:
        count = int(file["n_vars"])
        return {
            part: np.unpackbits(file[part], axis=1, count=count).astype(np.float32)
            for part in ("train", "valid", "test")
        }


PRIORS = ((0.3, 10.0), (1.0, 0.0), (0.1, 0.0), (0.3, 0.0))


def settings() -> Iterator[Setting]:
    """The settings tried, the most promising first."""
    for engine, size in (("gibbs", 100), ("gibbs", 200), ("em", 100), ("em", 30)):
        for flat, centred in PRIORS:
            yield Setting(engine, size, flat, centred)


def fit(parts: dict[str, np.ndarray[Any, Any]], setting: Setting) -> Result:
    """Fit on the training rows; score the others."""
    train = torch.as_tensor(parts["train"])
    mean = (train.double().sum(0) + 0.5) / (len(train) + 1.0)
    flat, centred = setting.flat, setting.centred
    priors = {
        "weights": SymmetricDirichlet(0.5),
        "components": dist.Beta(flat + centred * mean, flat + centred * (1.0 - mean)),
    }
    common: dict[str, Any] = {"start": "random", "dtype": torch.float32}
    engine = (
        EM(num_starts=1, tolerance=1e-5, max_steps=300, **common)
        if setting.engine == "em"
        # Few sweeps, for prediction alone: too few to judge convergence by.
        else Gibbs(num_chains=1, num_warmup=100, num_samples=200, num_moves=0, **common)
    )
    model = Mixture(Bernoulli(), setting.num_components, priors=priors)
    found = engine.run(model, parts["train"], seed=0)
    scores = [float(found.log_prob(parts[part]).mean()) for part in ("valid", "test")]
    return Result(setting, *scores)


def best(name: str, budget: float) -> tuple[Result, int]:
    """The setting with the best validation score among those that the budget allows to try."""
    parts, begun = load(name), time.process_time()
    results: list[Result] = []
    for setting in settings():
        results.append(fit(parts, setting))
        if time.process_time() - begun > budget:
            break
    return max(results, key=lambda result: result.valid), len(results)


def main() -> None:
    """Print ours beside the reference, set by set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; default all")
    parser.add_argument("--budget", type=float, default=150.0, help="CPU seconds a set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small sets")
    a = parser.parse_args()
    if not FOLDER.is_dir():
        print(f"skipped: there is no {FOLDER}; set BAYESGEN_SHARED_DATA to the folder above it.")
        return
    torch.set_num_threads(a.threads)
    reference = json.loads((FOLDER / "reference_ll.json").read_text())["results"]
    names = a.sets or (("nltcs", "dna") if a.quick else SETS)
    print("test log likelihood, nats a row       ours  reference  difference   setting")
    level = 0
    for name in names:
        begun = time.process_time()
        result, tried = best(name, a.budget)
        theirs = reference[name]["test_LL_bernoulli_mixture_EM"]
        level += result.test >= theirs
        print(
            f"{name:10s} {reference[name]['train']:7d} x {reference[name]['n_vars']:4d}"
            f"      {result.test:10.4f} {theirs:10.4f} {result.test - theirs:+11.4f}   "
            f"{result.setting}, best of {tried}, "
            f"{time.process_time() - begun:.0f} s CPU",
            flush=True,
        )
    print(f"at least level on {level} of {len(names)}")


if __name__ == "__main__":
    main()
