"""Writes reference_numpyro.json: posteriors of two small mixtures by NumPyro's NUTS.

An independent sampler on the same Dirichlet / normal-inverse-Wishart posterior, labels summed
out, for tests/inference/test_gibbs_reference.py. In an environment of its own::

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -c constraints.txt numpyro
    /tmp/peers/bin/python tests/inference/reference_numpyro.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS, init_to_value

__all__: list[str] = []

numpyro.enable_x64()
NUM_CHAINS, NUM_SAMPLES = 4, 4000


def log_normal(x: Any, loc: Any, tril: Any) -> Any:
    """Log density of each row under each component, ``(K, n)``."""
    scaled = jax.vmap(lambda m, t: jax.scipy.linalg.solve_triangular(t, (x - m).T, lower=True))(
        loc, tril
    )
    log_det = jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)).sum(-1)
    return -0.5 * (scaled**2).sum(1) - (log_det + 0.5 * x.shape[1] * jnp.log(2 * jnp.pi))[:, None]


def program(case: dict[str, Any], x: Any) -> None:
    k, d = case["num_components"], x.shape[1]
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.full(k, case["concentration"])))
    psi = jnp.diag(jnp.asarray(case["scale"]) ** 2)
    with numpyro.plate("components", k):
        covariance = numpyro.sample(
            "covariance", dist.InverseWishart(case["df"], scale_matrix=psi)
        )
        tril = jnp.linalg.cholesky(covariance)
        loc = numpyro.sample(
            "loc",
            dist.MultivariateNormal(
                jnp.asarray(case["loc"]), scale_tril=tril / jnp.sqrt(case["mean_precision"])
            ),
        )
    scores = log_normal(x, loc, tril) + jnp.log(weights)[:, None]
    numpyro.factor("rows", logsumexp(scores, axis=0).sum())
    assert d == len(case["loc"])


def quantities(case: dict[str, Any], x: Any, draw: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on labels; scalars."""
    weights, loc, covariance = draw["weights"], draw["loc"], draw["covariance"]
    tril = jnp.linalg.cholesky(covariance)
    mean = weights @ loc
    delta = loc - mean
    total = jnp.einsum("k,kij->ij", weights, covariance)
    total = total + jnp.einsum("k,ki,kj->ij", weights, delta, delta)
    new = jnp.asarray(case["points"])
    density = logsumexp(log_normal(new, loc, tril) + jnp.log(weights)[:, None], axis=0)
    rows = logsumexp(log_normal(x, loc, tril) + jnp.log(weights)[:, None], axis=0)
    out = {"log_likelihood": rows.sum(), "weights^2": (weights**2).sum()}
    out["max_weight"] = weights.max()
    for i in range(x.shape[1]):
        out[f"mean[{i}]"] = mean[i]
        for j in range(i + 1):
            out[f"log_sd[{i}]" if i == j else f"covariance[{i},{j}]"] = (
                0.5 * jnp.log(total[i, i]) if i == j else total[i, j]
            )
    for i in range(len(new)):
        out[f"density[{i}]"] = jnp.exp(density[i])
    return out


def run(name: str, case: dict[str, Any], labels: Any) -> dict[str, Any]:
    x = np.array(case["x"])
    k, d = case["num_components"], x.shape[1]
    start = {
        "weights": jnp.full(k, 1.0 / k),
        "loc": jnp.stack([x[labels == i].mean(0) for i in range(k)]),
        "covariance": jnp.stack([np.cov(x[labels == i].T).reshape(d, d) for i in range(k)]),
    }
    kernel = NUTS(program, init_strategy=init_to_value(values=start), target_accept_prob=0.95)
    mcmc = MCMC(
        kernel,
        num_warmup=1500,
        num_samples=NUM_SAMPLES,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0), case, x)
    draws = mcmc.get_samples(group_by_chain=True)
    values = jax.vmap(jax.vmap(lambda draw: quantities(case, x, draw)))(draws)
    found = {}
    for key, value in values.items():
        value = np.asarray(value)
        ess = float(effective_sample_size(value))
        found[key] = {
            "mean": float(value.mean()),
            "sd": float(value.std()),
            "mcse": float(value.std() / np.sqrt(ess)),
            "r_hat": float(split_gelman_rubin(value)),
        }
    worst = max(entry["r_hat"] for entry in found.values())
    print(
        name,
        "worst r_hat",
        round(worst, 4),
        "least ESS",
        round(min((e["sd"] / e["mcse"]) ** 2 for e in found.values())),
    )
    return {**case, "quantities": found}


def main() -> None:
    r = np.random.default_rng(7)
    one = np.concatenate(
        [r.normal(-4.0, 1.0, 25), r.normal(0.5, 0.6, 40), r.normal(4.5, 1.4, 30)]
    )[:, None]
    centres = np.array([[0.0, 0.0, 0.0], [4.0, 3.0, -2.0]])
    label = np.repeat([0, 1], [45, 30])
    mixing = np.array([[[1.0, 0, 0], [0.6, 0.8, 0], [0, 0.3, 0.7]], np.eye(3)])
    three = centres[label] + np.einsum("nij,nj->ni", mixing[label], r.normal(size=(75, 3)))
    cases = {
        "one dimension": {
            "x": one.round(3).tolist(),
            "num_components": 3,
            "concentration": 2.0,
            "loc": [0.0],
            "mean_precision": 0.05,
            "df": 4.0,
            "scale": [1.5],
            "points": [[-4.0], [-1.5], [0.5], [2.5], [6.0]],
        },
        "three dimensions": {
            "x": three.round(3).tolist(),
            "num_components": 2,
            "concentration": 1.0,
            "loc": [1.0, 1.0, 0.0],
            "mean_precision": 0.05,
            "df": 6.0,
            "scale": [1.0, 1.2, 0.9],
            "points": [[0.0, 0.0, 0.0], [4.0, 3.0, -2.0], [2.0, 1.5, -1.0]],
        },
    }
    labels = {"one dimension": np.repeat([0, 1, 2], [25, 40, 30]), "three dimensions": label}
    out = {name: run(name, case, labels[name]) for name, case in cases.items()}
    out["made_by"] = {  # type: ignore[assignment]
        "numpyro": numpyro.__version__,
        "jax": jax.__version__,
        "chains x draws": f"{NUM_CHAINS} x {NUM_SAMPLES}",
    }
    path = Path(__file__).with_name("reference_numpyro.json")
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
