"""EM and variational Bayes streamed from disk: time a pass and memory, from 1e5 to 1e7 rows.

Rows of float32 are written to a ``.npy`` file in a temporary folder, which is deleted afterwards.
Each fit runs in a fresh process, whose peak memory is counted from before it opens the file.

    python benchmarks/streaming.py             # up to 1e7 rows (320 MB of disk): some minutes
    python benchmarks/streaming.py --quick     # up to 1e6 rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB
from bayesgen.inference.run import Progress
from bayesgen.models import GaussianMixture

__all__ = ["main"]

MEGABYTE = 2.0**20
ENGINES = ("em", "vb", "vb memoised")


def write(path: Path, rows: int, columns: int, components: int) -> None:
    """Blobs in float32, a block at a time."""
    rng = np.random.default_rng(0)
    loc = 3.0 * rng.standard_normal((components, columns)).astype(np.float32)
    shape = (rows, columns)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, rows, 100_000):
        size = min(100_000, rows - start)
        noise = rng.standard_normal((size, columns), dtype=np.float32)
        out[start : start + size] = loc[rng.integers(components, size=size)] + noise
    out.flush()


def make_engine(name: str, passes: int) -> Any:
    """The engine without a stop before its last pass."""
    if name == "em":
        return EM(num_starts=1, tolerance=0.0, max_steps=passes)
    settings: dict[str, Any] = {"moves": False, "tolerance": 0.0, "max_steps": passes}
    if name == "vb memoised":
        settings |= {"schedule": "memoised", "batch_size": 50_000}
    return VB(num_starts=1, num_samples=10, **settings)


def worker(path: str, engine: str, components: int, passes: int) -> None:
    """Fit in this process; print CPU seconds of a pass, of the rest, and the rise of memory."""
    small = np.random.default_rng(0).standard_normal((500, 2))
    make_engine(engine, 3).run(GaussianMixture(3), small)  # what loads lazily is loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    marks: list[float] = []

    def mark(progress: Progress) -> None:
        marks.append(time.process_time())

    begun = time.process_time()
    data = as_dataset(path, in_memory=False)
    model = GaussianMixture(components)
    make_engine(engine, passes).run(model, data, seed=0, callbacks=[mark])
    total = time.process_time() - begun
    steps = np.diff(marks)
    print(json.dumps({"pass": float(np.median(steps)), "total": total, "peak": _peak() - before}))


def _peak() -> int:
    """Largest resident size of this process, bytes: unlike ``ru_maxrss`` not its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Print seconds a million rows, and memory, for each engine and number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.worker:
        worker(*a.worker, a.components, a.passes)
        return
    sizes = [100_000, 1_000_000] if a.quick else a.rows
    print(f"d={a.columns}, K={a.components}, {a.threads} thread(s); CPU seconds")
    print("engine            rows   a pass, a million rows   whole fit   memory above start")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.npy"
            write(path, rows, a.columns, a.components)
            for engine in ENGINES:
                command = [sys.executable, __file__, "--worker", str(path), engine]
                for name in ("components", "passes", "threads"):
                    command += [f"--{name}", str(getattr(a, name))]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(out.stdout)
                print(
                    f"{engine:12s} {rows:9d} {found['pass'] * 1e6 / rows:18.3f} s "
                    f"{found['total']:15.1f} s {found['peak'] / MEGABYTE:13.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
