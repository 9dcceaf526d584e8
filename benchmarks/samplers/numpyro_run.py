"""NumPyro's NUTS: ``{"method": "sequential" or "vectorized", ...}``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from common import CENTRES, contest
from numpyro.infer import MCMC, NUTS

__all__: list[str] = []


def schools(data):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * raw, data["sigma"]), obs=data["y"])


def logistic(data):
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(data["x"].shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=data["x"] @ slope), obs=data["y"])


def radon(data):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    with numpyro.plate("county", int(data["num_counties"])):
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
    mean = (mu + spread * raw)[data["county"]] + beta[0] * data["uppm"] + beta[1] * data["floor"]
    numpyro.sample("y", dist.Normal(mean, noise), obs=data["y"])


def mixture(data):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.full(3, 2.0)))
    with numpyro.plate("component", 3):
        shift = numpyro.sample("shift", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(jnp.zeros(2), 0.5).to_event(1))
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    upper = jnp.stack((scale[:, 0], jnp.zeros(3)), -1)
    tril = jnp.stack((upper, jnp.stack((slope, scale[:, 1]), -1)), -2)
    parts = dist.MultivariateNormal(CENTRES + shift, scale_tril=tril)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=data["x"])


MODELS = {"schools": schools, "logistic": logistic, "radon": radon, "mixture": mixture}


def prepare(workload, data, options):
    data = {k: v if v.ndim == 0 else jnp.asarray(v) for k, v in data.items()}
    chains = options.get("chains", 4)

    @jax.jit  # a second MCMC.run would compile again
    def run(key):
        mcmc = MCMC(
            NUTS(functools.partial(MODELS[workload], data)),
            num_warmup=options.get("warmup", 500),
            num_samples=options.get("samples", 1000),
            num_chains=chains,
            chain_method=options["method"],
            progress_bar=False,
        )
        mcmc.run(key, extra_fields=("num_steps",))
        steps = mcmc.get_extra_fields()["num_steps"].sum()
        return mcmc.get_samples(group_by_chain=True), steps

    def sample(seed):
        draws, steps = jax.tree.map(jax.block_until_ready, run(jax.random.PRNGKey(seed)))
        return draws, int(steps), f"{chains} chains, {options['method']}"

    return sample


if __name__ == "__main__":
    numpyro.enable_x64()
    contest(prepare)
