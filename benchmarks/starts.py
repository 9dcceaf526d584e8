"""Does NUTS run faster from Pathfinder's or Laplace's starts than from uniform ones?

    python benchmarks/starts.py [--data radon_mn.json.gz] [--seeds 8] [--warmup 500 150]

Warm runs of the workloads of ``benchmarks/mcmc.py`` in one process, the starts after each other
for every seed. The start at Laplace's approximation is no option of NUTS: this program puts it in
place of the uniform one, at draws of the normal law at the mode by their importance weights, and
its cost is given apart. So its figure is an upper bound of what such an option could bring. Each
figure is the smallest bulk effective size of any latent entry a second by that of uniform starts
with the first of ``--warmup``, of sums over seeds; beside it the lowest and highest of single
seeds, by uniform starts with the same seed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from bayesgen import rng
from bayesgen.inference import NUTS, Laplace, nuts
from bayesgen.psis import smooth

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "samplers"))
from common import smallest_size
from mcmc import WORKLOADS
from pyro_models import program

__all__: list[str] = []

UNIFORM, PATHFINDER, LAPLACE = "uniform", "pathfinder", "laplace, free"
OURS = nuts.starting_points


def laplace_points(model, seed):
    """Unconstrained draws of the normal law at the mode, by their weights, and the seconds."""
    start = time.perf_counter()
    fit = Laplace(num_samples=400).run(model, seed=seed)
    weights = smooth(fit.sample_stats["log_weight"][0])[0].exp()
    chosen = torch.multinomial(weights, 4, generator=rng.make_generator(seed))
    density = fit.model.density
    rows = [{k: v[0, int(i)] for k, v in fit.draws.items()} for i in chosen]
    points = torch.stack([density.unconstrain(row) for row in rows])
    return points, time.perf_counter() - start


def at(points):
    """In place of uniform starts."""

    def starts(density, num_chains, model, data, *, start, gradient_of, generator):
        return points, *gradient_of(points)

    return starts


def timed(model, seed, start, num_warmup, points):
    """Seconds of a run, and the smallest effective size."""
    nuts.starting_points = at(points) if start == LAPLACE else OURS
    engine = NUTS(num_warmup=num_warmup, start=PATHFINDER if start == PATHFINDER else UNIFORM)
    before = time.perf_counter()
    fit = engine.run(model, seed=seed)
    seconds = time.perf_counter() - before
    nuts.starting_points = OURS
    sites = fit.model.density.layout.sites
    return seconds, smallest_size({s.name: fit.draws[s.name].numpy() for s in sites})


def measure(model, seeds, warmups):
    """Rows ``{(start, num_warmup): [(seconds, size) of each seed]}``, and Laplace's seconds."""
    rows, own = {}, []
    timed(model, 0, UNIFORM, 50, None)  # traces and compiles
    for seed in range(1, seeds + 1):
        try:
            points, seconds = laplace_points(model, seed)
            own.append(seconds)
        except ValueError as error:
            points = None
            print(f"    seed {seed}: {str(error)[:90]}")
        for num_warmup in warmups:
            for start in (UNIFORM, PATHFINDER, LAPLACE):
                if start != LAPLACE or points is not None:
                    row = timed(model, seed, start, num_warmup, points)
                    rows.setdefault((start, num_warmup), {})[seed] = row
    return rows, own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--warmup", type=int, nargs="+", default=[500, 150])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    for name in arguments.workloads:
        data = WORKLOADS[name](arguments)
        if data is None:
            print(f"{name}: no data; give --data")
            continue
        rows, own = measure(program(name, data), arguments.seeds, arguments.warmup)
        print(f"{name}: Laplace itself takes {np.median(own) if own else np.nan:.3f} s")
        base = rows[UNIFORM, arguments.warmup[0]]
        for (start, num_warmup), found in rows.items():
            both = [(found[s][1] / found[s][0], base[s][1] / base[s][0]) for s in found]
            single = [one / other for one, other in both]
            ours, theirs = (
                sum(r[s][1] for s in found) / sum(r[s][0] for s in found) for r in (found, base)
            )
            seconds = np.median([row[0] for row in found.values()])
            sizes = [row[1] for row in found.values()]
            print(
                f"  {start:14} warm-up {num_warmup:4}: {ours / theirs:5.2f} of uniform "
                f"({min(single):.2f}-{max(single):.2f}); {seconds:.3f} s, smallest size "
                f"{min(sizes):,.0f}-{max(sizes):,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
