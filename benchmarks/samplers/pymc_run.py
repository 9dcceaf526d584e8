"""PyMC's own NUTS, or nutpie on PyMC: ``{"nutpie": true or false, ...}``."""

from __future__ import annotations

import pymc as pm
import pytensor.tensor as pt
from common import CENTRES, contest

__all__: list[str] = []


def schools(data):
    mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
    raw = pm.Normal("raw", 0.0, 1.0, shape=8)
    pm.Normal("y", mu + tau * raw, data["sigma"], observed=data["y"])


def logistic(data):
    slope = pm.Normal("slope", 0.0, 1.0, shape=data["x"].shape[1])
    pm.Bernoulli("y", logit_p=data["x"] @ slope, observed=data["y"])


def radon(data):
    mu, spread = pm.Normal("mu", 0.0, 10.0), pm.HalfNormal("spread", 1.0)
    noise, beta = pm.HalfNormal("noise", 1.0), pm.Normal("beta", 0.0, 10.0, shape=2)
    raw = pm.Normal("raw", 0.0, 1.0, shape=int(data["num_counties"]))
    mean = (mu + spread * raw)[data["county"]] + beta[0] * data["uppm"] + beta[1] * data["floor"]
    pm.Normal("y", mean, noise, observed=data["y"])


def mixture(data):
    weights = pm.Dirichlet("weights", [2.0] * 3)
    shift = pm.Normal("shift", 0.0, 1.0, shape=(3, 2))
    scale = pm.LogNormal("scale", 0.0, 0.5, shape=(3, 2))
    slope = pm.Normal("slope", 0.0, 1.0, shape=3)
    off = data["x"][:, None, :] - (CENTRES + shift)
    first = off[..., 0] / scale[:, 0]
    second = (off[..., 1] - slope * first) / scale[:, 1]
    parts = pt.log(weights) - pt.log(scale).sum(-1) - 0.5 * (first**2 + second**2)
    pm.Potential("x", pt.logsumexp(parts, axis=1).sum())


MODELS = {"schools": schools, "logistic": logistic, "radon": radon, "mixture": mixture}


def prepare(workload, data, options):
    with pm.Model() as model:
        MODELS[workload](data)
    settings = {
        "draws": options.get("samples", 1000),
        "tune": options.get("warmup", 500),
        "chains": options.get("chains", 4),
    }
    names = [v.name for v in model.free_RVs]
    compiled = None
    if options["nutpie"]:
        import nutpie

        compiled = nutpie.compile_pymc_model(model)

    def sample(seed):
        if compiled is not None:
            found = nutpie.sample(compiled, seed=seed, cores=2, progress_bar=False, **settings)
            key = "n_steps"
        else:
            with model:
                found = pm.sample(
                    random_seed=seed,
                    cores=2,
                    progressbar=False,
                    compute_convergence_checks=False,
                    **settings,
                )
            key = "n_steps"
        steps = int(found.sample_stats[key].sum()) if key in found.sample_stats else None
        return {k: found.posterior[k].values for k in names}, steps, "4 chains, 2 cores"

    return sample


if __name__ == "__main__":
    import logging

    logging.getLogger("pymc").setLevel(logging.ERROR)
    contest(prepare)
