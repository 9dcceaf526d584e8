"""What every contestant shares: data, timed runs, effective sizes. Numpy and ArviZ only."""

from __future__ import annotations

import json
import sys
import time
import warnings

import numpy as np

__all__ = ["CENTRES", "contest", "smallest_size"]

_RUNS, _SECONDS = 5, 3.0
CENTRES = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])


def contest(prepare):
    """Run a contestant cold, then warm up to five times in three seconds; print a JSON line.

    Of the warm runs the one of median effective draws a second counts.

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
    cold, note = _timed(sample, seed, start, cpu)
    warm, spent = [], 0.0
    while len(warm) < _RUNS and spent < _SECONDS:
        row, note = _timed(sample, seed + 1 + len(warm), time.perf_counter(), time.process_time())
        warm.append(row)
        spent += row["seconds"]
    warm.sort(key=lambda row: row["ess"] / row["seconds"])
    print(json.dumps({"note": note, "cold": cold, "warm": warm[len(warm) // 2]}), flush=True)


def _timed(sample, seed, start, cpu):
    """One run, of which the clocks have been running since ``start`` and ``cpu``."""
    draws, gradients, note = sample(seed)
    draws = {k: np.asarray(v, dtype=np.float64) for k, v in draws.items()}
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    row = {"seconds": seconds, "cpu": used, "gradients": gradients}
    return row | _worth(draws), note


def _number(value):
    return float(np.asarray(value).reshape(-1)[0])  # ArviZ may give an array of one


def _bulk(draws):
    """Every entry of the draws, and its bulk effective size."""
    import arviz

    entries = {}
    for name, value in draws.items():
        flat = value.reshape(*value.shape[:2], -1)
        for k in range(flat.shape[-1]):
            entries[f"{name}[{k}]"] = flat[..., k]
    return entries, {k: _number(arviz.ess(v)) for k, v in entries.items()}


def smallest_size(draws):
    """Of any entry of draws by name ``(chain, draw, ...)``."""
    return min(_bulk(draws)[1].values())


def _worth(draws):
    """Smallest effective sizes of any entry, and means with their Monte Carlo errors."""
    import arviz

    entries, bulk = _bulk(draws)
    worst = min(bulk, key=bulk.get)
    tail = min(_number(arviz.ess(v, method="tail")) for v in entries.values())
    mean = {
        k: [float(v.mean()), _number(arviz.mcse(v)), float(v.std())] for k, v in entries.items()
    }
    return {"ess": bulk[worst], "worst": worst, "tail": tail, "means": mean}
