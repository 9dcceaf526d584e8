"""Pyro's NUTS: ``{"jit": true or false, "chains": 2, "samples": 200, "warmup": 200}``.

By default one chain of 100 and 100 on radon.
"""

from __future__ import annotations

import pyro
import torch
from common import contest
from pyro.infer import MCMC, NUTS
from pyro_models import program

__all__: list[str] = []


def prepare(workload, data, options):
    torch.set_default_dtype(torch.float64)
    model = program(workload, data)
    # Minutes otherwise: trees of 31 leapfrogs and more, at 1.5 ms.
    few, several = (100, 1) if workload == "radon" else (200, 2)

    def sample(seed):
        chains, steps = [], 0
        for chain in range(options.get("chains", several)):
            pyro.set_rng_seed(1000 * seed + chain)
            kernel = NUTS(model, jit_compile=options["jit"], ignore_jit_warnings=True)
            run = MCMC(
                kernel,
                num_samples=options.get("samples", few),
                warmup_steps=options.get("warmup", few),
                disable_progbar=True,
            )
            run.run()
            chains.append(run.get_samples())
        draws = {k: torch.stack([c[k] for c in chains]).numpy() for k in chains[0]}
        return draws, steps or None, f"{len(chains)} chains, one after the other"

    return sample


if __name__ == "__main__":
    contest(prepare)
