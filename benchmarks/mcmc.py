"""Effective draws a second: our NUTS against Pyro's on the same posterior, same process, one core.

    python benchmarks/mcmc.py [--workloads schools logistic] [--samples 1000] [--compile auto]

Prints the smallest bulk effective sample size of any latent entry for each second, cold (first
run,
tracing and compiling included) and warm (second run), by wall clock and by CPU time, and the
ratio of
each to Pyro's. On a busy machine believe the CPU columns.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.inference import NUTS

__all__: list[str] = []

D64 = {"dtype": torch.float64}


def schools():
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], **D64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], **D64)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)

    return model


def logistic(rows=1000, columns=25):
    generator = rng.make_generator(0)
    x = rng.standard_normal((rows, columns), generator)
    slope = 0.3 * rng.standard_normal(columns, generator)
    y = (torch.rand(rows, generator=generator, **D64) < torch.sigmoid(x @ slope)).double()

    def model():
        slope = pyro.sample("slope", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)

    return model


WORKLOADS = {"schools": schools, "logistic": logistic}


def smallest_ess(draws):
    """Smallest bulk effective sample size over all entries of ``(chain, draw, ...)`` arrays."""
    arviz, found = import_arviz(), []
    for value in draws.values():
        entries = np.asarray(value).reshape(*value.shape[:2], -1)
        found += [float(arviz.ess(entries[..., k])) for k in range(entries.shape[-1])]
    return min(found)


def ours(model, arguments):
    engine = NUTS(
        num_samples=arguments.samples, num_warmup=arguments.warmup, compile=arguments.compile
    )
    fit = engine.run(model, seed=0)
    latent = {s.name: fit.draws[s.name] for s in fit.model.density.layout.sites}
    return latent, fit.attrs["speed"]


def pyros(model, arguments):
    """Two chains, one after the other; a rate needs no more draws than that."""
    chains = []
    for seed in range(2):
        with rng.fork(rng.make_generator(seed)):
            run = MCMC(
                PyroNUTS(model),
                num_samples=arguments.pyro_samples,
                warmup_steps=arguments.warmup,
                disable_progbar=True,
            )
            run.run()
            chains.append(run.get_samples())
    return {k: torch.stack([c[k] for c in chains]) for k in chains[0]}, "2 chains"


def measure(sampler, model, arguments):
    wall, cpu = time.perf_counter(), time.process_time()
    draws, note = sampler(model, arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ess = smallest_ess(draws)
    return {"ess": ess, "wall": ess / wall, "cpu": ess / cpu, "seconds": wall, "note": note}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--pyro-samples", type=int, default=300)
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    arguments = parser.parse_args()
    arguments.compile = {"auto": "auto", "yes": True, "no": False}[arguments.compile]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(
        f"{'workload':10} {'sampler':12} {'ESS':>7} {'ESS/s':>9} {'ESS/CPU s':>10} {'x Pyro':>8}"
    )
    for name in arguments.workloads:
        model, rows = WORKLOADS[name](), {}
        rows["Pyro NUTS"] = measure(pyros, model, arguments)
        rows["ours, cold"] = measure(ours, model, arguments)
        rows["ours, warm"] = measure(ours, model, arguments)
        base = rows["Pyro NUTS"]["cpu"]
        for sampler, row in rows.items():
            ratio = row["cpu"] / base if base else math.nan
            print(
                f"{name:10} {sampler:12} {row['ess']:7.0f} {row['wall']:9.1f} {row['cpu']:10.1f} "
                f"{ratio:8.1f}   {row['note']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
