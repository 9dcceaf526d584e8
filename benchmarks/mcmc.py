"""Effective draws a second: our NUTS and ManyChains against every peer, on the same posteriors.

    python benchmarks/mcmc.py [--peers ENVIRONMENT/bin/python] [--workloads schools ...]
        [--samplers ManyChains nutpie ...] [--threads 2] [--data radon_mn.json.gz]
        [--out rows.jsonl] [--rows rows.jsonl]

Every contestant runs in a process of its own on the same data, on the same cores, in double
precision. *Cold* is its first run, with tracing and compiling and without importing (caches of
compiled code are emptied: ours, Inductor's and PyTensor's); *warm* a later run in that process,
the median of up to five within three seconds.
The figure is the smallest bulk effective sample size of any latent entry a second of wall time.
Means are compared with those of the reference, NumPyro's or our NUTS: a fast wrong sampler is no
sampler. NumPyro, PyMC, nutpie and BlackJAX live in an environment without torch
(``pip install numpyro pymc nutpie blackjax arviz``), named by ``--peers`` or ``BAYESGEN_PEERS``;
without it they are skipped, and that is said. Contestants may be run in several calls that append
to one ``--out``; ``--rows`` then prints the tables of what was gathered, running nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

__all__: list[str] = []

HERE = Path(__file__).resolve().parent / "samplers"
CENTRES = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])


# ---------------------------------------------------------------- data
def schools(arguments):
    return {
        "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12]),
        "sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
    }


def logistic(arguments):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, 25))
    chance = 1.0 / (1.0 + np.exp(-x @ (0.3 * generator.standard_normal(25))))
    return {"x": x, "y": (generator.random(1000) < chance).astype(float)}


def radon(arguments):
    if arguments.data is None:
        return None
    with gzip.open(arguments.data) as file:
        found = json.load(file)
    return {
        "county": np.array(found["county_idx"]) - 1,
        "num_counties": np.array(found["J"]),
        "uppm": np.array(found["log_uppm"]),
        "floor": np.array(found["floor_measure"], dtype=float),
        "y": np.array(found["log_radon"]),
    }


def mixture(arguments):
    generator = np.random.default_rng(1)
    which = generator.integers(0, 3, 300)
    noise = generator.standard_normal((300, 2)) @ np.array([[1.0, 0.4], [0.0, 0.8]])
    return {"x": CENTRES[which] + noise}


WORKLOADS = {"schools": schools, "logistic": logistic, "radon": radon, "mixture": mixture}

# ---------------------------------------------------------------- contestants
OURS, PEERS = "ours", "peers"
MANY = {"num_samples": 250}  # 256 chains: as many draws as 64 chains of 1,000
SAMPLERS = {
    "NUTS": (OURS, "bayesgen_run.py", {"engine": "NUTS"}),
    "ManyChains": (OURS, "bayesgen_run.py", {"engine": "ManyChains", "settings": MANY}),
    "Pyro NUTS": (OURS, "pyro_run.py", {"jit": False}),
    "Pyro NUTS jit": (OURS, "pyro_run.py", {"jit": True}),
    "NumPyro sequential": (PEERS, "numpyro_run.py", {"method": "sequential"}),
    "NumPyro vectorised": (PEERS, "numpyro_run.py", {"method": "vectorized"}),
    "PyMC": (PEERS, "pymc_run.py", {"nutpie": False}),
    "nutpie": (PEERS, "pymc_run.py", {"nutpie": True}),
    "BlackJAX NUTS": (PEERS, "blackjax_run.py", {"method": "nuts", "chains": 4}),
    "BlackJAX ChEES": (PEERS, "blackjax_run.py", {"method": "chees"}),
    # Its authors advise the estimated metric where starts are as wide as here.
    "BlackJAX ChEES diagonal": (
        PEERS,
        "blackjax_run.py",
        {"method": "chees", "metric": "diagonal"},
    ),
    "BlackJAX MEADS": (PEERS, "blackjax_run.py", {"method": "meads"}),
}
REFERENCES = ("NumPyro vectorised", "NumPyro sequential", "NUTS")


def run(name, workload, path, arguments, folder):
    """One contestant in a process of its own; a row, or the reason why there is none."""
    where, script, options = SAMPLERS[name]
    python = sys.executable if where == OURS else arguments.peers
    if python is None or shutil.which(python) is None:
        return {"skipped": "no environment of peers: give --peers or set BAYESGEN_PEERS"}
    threads = str(arguments.threads)
    cache = Path(folder) / f"cache-{name.replace(' ', '-')}-{workload}"
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), threads),
        "BAYESGEN_CACHE": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTENSOR_FLAGS": f"base_compiledir={cache}",
    }
    command = [python, str(HERE / script), workload, str(path), "1", json.dumps(options)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"longer than {arguments.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"skipped": f"failed: {last[:150]}"}
    return json.loads(lines[-1])


def worst_gap(row, reference):
    """Largest difference of means in Monte Carlo errors, over entries and both runs."""
    gap = 0.0
    for temperature in ("cold", "warm"):
        for name, (mean, error, _) in row[temperature]["means"].items():
            other, noise, _ = reference["warm"]["means"][name]
            gap = max(gap, abs(mean - other) / math.hypot(error, noise))
    return gap


def report(workload, rows):
    """A table of one workload: rates, ratios to the best peer, and agreement."""
    print(f"\n{workload}")
    head = ("cold ESS/s", "warm ESS/s", "ESS/gradient", "tail", "seconds", "worst z")
    print(f"{'':20}" + "".join(f"{h:>13}" for h in head))
    found = {k: v for k, v in rows.items() if "skipped" not in v}
    reference = next((found[k] for k in REFERENCES if k in found), None)
    for name, row in rows.items():
        if "skipped" in row:
            print(f"{name:20} - {row['skipped']}")
            continue
        warm = row["warm"]
        rates = [row[t]["ess"] / row[t]["seconds"] for t in ("cold", "warm")]
        each = warm["ess"] / warm["gradients"] if warm["gradients"] else math.nan
        gap = worst_gap(row, reference) if reference else math.nan
        print(
            f"{name:20}{rates[0]:13,.0f}{rates[1]:13,.0f}{each:13.4f}{warm['tail']:13,.0f}"
            f"{row['cold']['seconds']:6.1f}/{warm['seconds']:6.2f}{gap:13.1f}",
            flush=True,
        )
    for temperature in ("cold", "warm"):
        rate = {k: v[temperature]["ess"] / v[temperature]["seconds"] for k, v in found.items()}
        peers = {k: v for k, v in rate.items() if k not in ("NUTS", "ManyChains")}
        ours = {k: v for k, v in rate.items() if k not in peers}
        if not peers or not ours:
            continue
        best = max(peers, key=peers.get)
        text = ", ".join(f"{k} {v / peers[best]:.2f}" for k, v in ours.items())
        if "Pyro NUTS" in peers:
            text += "; times Pyro's NUTS: "
            text += ", ".join(f"{k} {v / peers['Pyro NUTS']:,.0f}" for k, v in ours.items())
        print(f"  {temperature}, times the best peer ({best}): {text}", flush=True)


def gathered(arguments):
    """The tables of rows that were written by earlier calls; of a contestant, the last one."""
    rows = [json.loads(line) for line in Path(arguments.rows).read_text().splitlines()]
    for workload in arguments.workloads:
        found = {r["sampler"]: r for r in rows if r["workload"] == workload}
        report(workload, {name: found[name] for name in arguments.samplers if name in found})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--peers", default=os.environ.get("BAYESGEN_PEERS"))
    parser.add_argument("--data", help="posteriordb's radon_mn.json.gz; without it no radon")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--out", help="where to append the rows as JSON lines")
    parser.add_argument("--rows", help="print the tables of such a file, and run nothing")
    arguments = parser.parse_args()
    if arguments.rows:
        return gathered(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for workload in arguments.workloads:
            data = WORKLOADS[workload](arguments)
            if data is None:
                print(f"\n{workload}: skipped, give --data radon_mn.json.gz")
                continue
            path = Path(folder) / f"{workload}.npz"
            np.savez(path, **data)
            rows = {}
            for name in arguments.samplers:
                rows[name] = run(name, workload, path, arguments, folder)
                print(f"{workload}: {name} done", file=sys.stderr, flush=True)
                if arguments.out:
                    line = {"sampler": name, "workload": workload, **rows[name]}
                    with Path(arguments.out).open("a") as file:
                        file.write(json.dumps(line) + "\n")
            report(workload, rows)


if __name__ == "__main__":
    main()
