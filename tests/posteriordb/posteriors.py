"""Every posterior: its program, its data, its reference draws, and how a fit is judged by them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesgen.arviz_groups import import_arviz
from bayesgen.inference import NUTS, ManyChains
from tests.posteriordb import hierarchical, mixtures, regressions, series

__all__ = [
    "ENGINES",
    "MIN_ESS",
    "POSTERIORS",
    "Posterior",
    "Verdict",
    "judge",
    "read",
    "reference",
    "run",
    "scores",
]

MIN_ESS = 400
ENGINES = {"NUTS": NUTS(target_accept=0.9), "ManyChains": ManyChains()}


@dataclass(frozen=True)
class Posterior:
    """A program whose sites are named as Stan's parameters."""

    program: Callable[..., None]
    arguments: Callable[[dict[str, Any]], Any] = lambda data: data
    start: str = "uniform"


def _regressions():
    return {n: Posterior(program, design) for n, (program, design) in regressions.DESIGNS.items()}


POSTERIORS = {
    "eight_schools-eight_schools_noncentered": Posterior(hierarchical.eight_schools),
    "radon_mn-radon_partially_pooled": Posterior(hierarchical.radon_pooled),
    "radon_mn-radon_hierarchical_intercept": Posterior(hierarchical.radon_intercept),
    "low_dim_gauss_mix-low_dim_gauss_mix": Posterior(mixtures.low_dim_gauss_mix),
    "normal_2-normal_mixture": Posterior(mixtures.normal_mixture),
    "arK-arK": Posterior(series.autoregression),
    "arma-arma11": Posterior(series.arma),
    "hmm_example-hmm_example": Posterior(series.hmm),
    "bball_drive_event_0-hmm_drive_0": Posterior(series.hmm_drive),
    "gp_pois_regr-gp_regr": Posterior(series.gp_regression),
    # Without Pathfinder a second mode, without cycles and without mass, keeps a chain of four.
    "hudson_lynx_hare-lotka_volterra": Posterior(series.lotka_volterra, start="pathfinder"),
    "sblrc-blr": Posterior(regressions.sblrc),
    "kilpisjarvi_mod-kilpisjarvi": Posterior(regressions.kilpisjarvi),
    "dogs-dogs": Posterior(regressions.dogs),
    **_regressions(),
}
"""All 31 of the reference data."""


def read(shared_data: Path, name: str) -> dict[str, Any]:
    """A data set, lists as tensors."""
    path = shared_data / "posteriordb" / "data" / f"{name.split('-')[0]}.json.gz"
    raw = json.loads(gzip.decompress(path.read_bytes()))
    return {
        k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v
        for k, v in raw.items()
    }


def reference(shared_data: Path, name: str) -> dict[str, tuple[np.ndarray, float]]:
    """By Stan's names, draws ``(chain, draw)`` and their effective number as far as stated."""
    folder = shared_data / "posteriordb"
    if (path := folder / "draws" / f"{name}.npz").exists():
        stated = {}
    else:
        path = folder / "draws_computed_here" / f"{name}.npz"
        note = json.loads(path.with_suffix(".json").read_text())
        stated = dict(zip(note["params"], note["ess"], strict=True))
    with np.load(path) as file:
        names, draws = [str(n) for n in file["params"]], file["draws"].astype(np.float64)
    draws = draws if draws.ndim == 3 else draws[None]
    return {n: (draws[..., k], stated.get(n, np.inf)) for k, n in enumerate(names)}


@dataclass(frozen=True)
class Verdict:
    """How a fit stands beside reference draws: the worst of all parameters."""

    z: float
    parameter: str
    ess: float
    divergences: int
    r_hat: float


def run(name: str, engine: Any, shared_data: Path, seed: int = 1) -> Any:
    """The fit of a posterior."""
    posterior = POSTERIORS[name]
    if posterior.start != "uniform":
        engine = replace(engine, start=posterior.start)
    return engine.run(posterior.program, posterior.arguments(read(shared_data, name)), seed=seed)


def scores(
    draws: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[np.ndarray, float]]
) -> dict[str, float]:
    """Means and standard deviations, in Monte Carlo errors of both sides together."""
    arviz, found = import_arviz(), {}
    for name, (other, stated) in wanted.items():
        ours = entry(draws, name)
        few = max(1.0, (float(arviz.ess(other)) / stated) ** 0.5)
        for statistic, method in ((np.mean, "mean"), (np.std, "sd")):
            errors = arviz.mcse(ours, method=method), few * arviz.mcse(other, method=method)
            gap = (statistic(ours) - statistic(other)) / np.hypot(*errors)
            found[f"{method} of {name}"] = float(gap)
    return found


def judge(
    draws: Mapping[str, torch.Tensor],
    sample_stats: Mapping[str, torch.Tensor],
    wanted: Mapping[str, tuple[np.ndarray, float]],
) -> Verdict:
    """The worst of :func:`scores`, and what a fit says of itself."""
    arviz = import_arviz()
    gaps = {name: abs(gap) for name, gap in scores(draws, wanted).items()}
    top = max(gaps, key=gaps.__getitem__)
    ours = [entry(draws, name) for name in wanted]
    ess, r_hat = (f(float(g(v)) for v in ours) for f, g in ((min, arviz.ess), (max, arviz.rhat)))
    return Verdict(gaps[top], top, ess, int(sample_stats["diverging"].sum()), r_hat)


def entry(draws: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """Draws ``(chain, draw)`` of Stan's ``theta[2]``."""
    site, _, index = name.rstrip("]").partition("[")
    return np.asarray(draws[site] if not index else draws[site][..., int(index) - 1])
