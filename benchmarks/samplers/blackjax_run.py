"""BlackJAX: ``{"method": "nuts", "chees" or "meads", ...}`` on log densities written by hand."""

from __future__ import annotations

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import CENTRES, contest
from jax.scipy import stats
from jax.scipy.special import logsumexp

__all__: list[str] = []

normal = stats.norm.logpdf


def schools(data):
    def density(q):
        tau = jnp.exp(q["tau"])
        prior = normal(q["mu"], 0.0, 5.0) - jnp.log1p((tau / 5.0) ** 2) + q["tau"]
        mean = q["mu"] + tau * q["raw"]
        return prior + normal(q["raw"]).sum() + normal(data["y"], mean, data["sigma"]).sum()

    return density, {"mu": (), "tau": (), "raw": (8,)}, {"tau": jnp.exp}


def logistic(data):
    def density(q):
        logits = data["x"] @ q["slope"]
        return (data["y"] * logits - jax.nn.softplus(logits)).sum() + normal(q["slope"]).sum()

    return density, {"slope": (data["x"].shape[1],)}, {}


def radon(data):
    def density(q):
        spread, noise = jnp.exp(q["spread"]), jnp.exp(q["noise"])
        alpha = q["mu"] + spread * q["raw"]
        mean = alpha[data["county"]] + q["beta"][0] * data["uppm"] + q["beta"][1] * data["floor"]
        prior = normal(q["mu"], 0.0, 10.0) + normal(q["beta"], 0.0, 10.0).sum()
        prior += normal(q["raw"]).sum() - 0.5 * (spread**2 + noise**2) + q["spread"] + q["noise"]
        return prior + normal(data["y"], mean, noise).sum()

    sizes = {"mu": (), "spread": (), "noise": (), "beta": (2,)}
    sizes |= {"raw": (int(data["num_counties"]),)}
    return density, sizes, {"spread": jnp.exp, "noise": jnp.exp}


def mixture(data):
    def weights_of(raw):
        return jax.nn.softmax(jnp.concatenate((raw, jnp.zeros(1))))

    def density(q):
        log_weights = jnp.log(weights_of(q["weights"]))
        log_scale = q["scale"].reshape(3, 2)  # flat: ChEES takes no matrices
        scale = jnp.exp(log_scale)
        off = data["x"][:, None, :] - (CENTRES + q["shift"].reshape(3, 2))
        first = off[..., 0] / scale[:, 0]
        second = (off[..., 1] - q["slope"] * first) / scale[:, 1]
        parts = log_weights - log_scale.sum(-1) - 0.5 * (first**2 + second**2)
        prior = 2.0 * log_weights.sum() + normal(q["shift"]).sum() + normal(q["slope"]).sum()
        return prior + normal(q["scale"], 0.0, 0.5).sum() + logsumexp(parts, axis=1).sum()

    sizes = {"weights": (2,), "shift": (6,), "scale": (6,), "slope": (3,)}
    return density, sizes, {"weights": jax.vmap(jax.vmap(weights_of)), "scale": jnp.exp}


MODELS = {"schools": schools, "logistic": logistic, "radon": radon, "mixture": mixture}


def nuts(density, start, key, warmup, samples):
    """Four chains, each with its own window adaptation, vmapped."""

    def chain(key, position):
        first, second = jax.random.split(key)
        (state, parameters), _ = blackjax.window_adaptation(blackjax.nuts, density).run(
            first, position, warmup
        )
        kernel = blackjax.nuts(density, **parameters)

        def step(state, key):
            state, info = kernel.step(key, state)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(step, state, jax.random.split(second, samples))[1]

    count = len(jax.tree.leaves(start)[0])
    return jax.vmap(chain)(jax.random.split(key, count), start)


def many(density, start, key, warmup, samples, adaptation, algorithm):
    """All chains tuned together, then sampled with fixed parameters."""
    first, second = jax.random.split(key)
    count = len(jax.tree.leaves(start)[0])
    states, parameters = adaptation(first, start)
    step = jax.vmap(algorithm(density, **parameters).step)

    def one(states, key):
        states, info = step(jax.random.split(key, count), states)
        steps = getattr(info, "num_integration_steps", jnp.ones(count))
        return states, (states.position, steps)

    _, found = jax.lax.scan(one, states, jax.random.split(second, samples))
    return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), found)


def prepare(workload, data, options):
    data = {k: v if v.ndim == 0 else jnp.asarray(v) for k, v in data.items()}
    density, sizes, constrain = MODELS[workload](data)
    method, warmup = options["method"], options.get("warmup", 500)
    chains, samples = options.get("chains", 64), options.get("samples", 1000)

    def chees(key, start):
        adaptation = blackjax.chees_adaptation(
            density, chains, mass_matrix_estimation=options.get("metric")
        )
        (states, parameters), _ = adaptation.run(key, start, 0.1, optax.adam(0.02), warmup)
        return states, parameters

    def meads(key, start):
        (states, parameters), _ = blackjax.meads_adaptation(density, chains).run(
            key, start, warmup
        )
        return states, parameters

    @jax.jit
    def run(key, start):
        if method == "nuts":
            return nuts(density, start, key, warmup, samples)
        if method == "chees":
            return many(density, start, key, warmup, samples, chees, blackjax.dynamic_hmc)
        return many(density, start, key, warmup, samples, meads, blackjax.ghmc)

    def sample(seed):
        generator = np.random.default_rng(seed)
        start = {k: jnp.asarray(generator.uniform(-2, 2, (chains, *s))) for k, s in sizes.items()}
        draws, steps = run(jax.random.PRNGKey(seed), start)
        draws = {k: constrain.get(k, lambda v: v)(v) for k, v in draws.items()}
        draws = jax.tree.map(jax.block_until_ready, draws)
        return draws, int(steps.sum()), f"{chains} chains"

    return sample


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    contest(prepare)
