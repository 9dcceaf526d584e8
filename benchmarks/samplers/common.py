"""What every contestant shares: data, two timed runs, effective sizes. Numpy and ArviZ only."""

from __future__ import annotations

import json
import sys
import time
import warnings

import numpy as np

__all__ = ["CENTRES", "contest"]

CENTRES = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])


def contest(prepare):
    """Run a contestant twice and print one JSON line.

    Called as ``python CONTESTANT.py WORKLOAD data.npz SEED [OPTIONS AS JSON]``.

    Args:
        prepare: ``(workload, data, options) -> sample``, and ``sample(seed) -> draws, gradients,
            note``: draws by name ``(chain, draw, ...)``, and how many gradients were computed in
            the whole run, or None. What ``prepare`` does counts to the first run.
    """
    workload, path, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    with np.load(path) as found:
        data = {k: found[k] for k in found.files}
    warnings.simplefilter("ignore")
    start, cpu = time.perf_counter(), time.process_time()
    sample = prepare(workload, data, options)
    rows = {}
    for temperature in ("cold", "warm"):
        draws, gradients, note = sample(seed + (temperature == "warm"))
        draws = {k: np.asarray(v, dtype=np.float64) for k, v in draws.items()}
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        rows[temperature] = {"seconds": seconds, "cpu": used, "gradients": gradients}
        rows[temperature] |= _worth(draws)
        start, cpu = time.perf_counter(), time.process_time()
    print(json.dumps({"note": note, **rows}), flush=True)


def _worth(draws):
    """Smallest effective sizes of any entry, and means with their Monte Carlo errors."""
    import arviz

    def number(value):
        return float(np.asarray(value).reshape(-1)[0])  # ArviZ may give an array of one

    entries = {}
    for name, value in draws.items():
        flat = value.reshape(*value.shape[:2], -1)
        for k in range(flat.shape[-1]):
            entries[f"{name}[{k}]"] = flat[..., k]
    bulk = {k: number(arviz.ess(v)) for k, v in entries.items()}
    worst = min(bulk, key=bulk.get)
    tail = min(number(arviz.ess(v, method="tail")) for v in entries.values())
    mean = {
        k: [float(v.mean()), number(arviz.mcse(v)), float(v.std())] for k, v in entries.items()
    }
    return {"ess": bulk[worst], "worst": worst, "tail": tail, "means": mean}
