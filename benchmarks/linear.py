"""Linear models beside scikit-learn, and what passes and gaps cost: ratios of interleaved runs.

Four tables. The closed form beside scikit-learn's fastest PCA; an iteration of EM and VB, which
needs no pass; rows streamed from disk at flat memory; a fifth of the entries missing, beside a
solve for each row (both sides the same EM step, to the same numbers).

    OMP_NUM_THREADS=1 python benchmarks/linear.py            # n = 200,000, d = 200, q = 10
    OMP_NUM_THREADS=1 python benchmarks/linear.py --quick    # a tenth of the rows, half a minute
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB, ClosedForm
from bayesgen.inference.conjugate.coordinate import ascend
from bayesgen.inference.em import _Mode
from bayesgen.inference.run import Task
from bayesgen.inference.vb import _Expectation
from bayesgen.models import PPCA

__all__ = ["main"]

MEGABYTE = 2.0**20


def simulate(num_rows: int, num_columns: int, latent_dim: int, seed: int = 0) -> torch.Tensor:
    """Rows of a linear-Gaussian model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(num_rows, latent_dim) @ normal(latent_dim, num_columns) + normal(
        num_rows, num_columns
    )


def seconds(action: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    before = time.process_time()
    action()
    return time.process_time() - before


def compare(left: Callable[[], Any], right: Callable[[], Any], repeats: int) -> tuple[float, ...]:
    """Medians of both sides, and of the ratio of each interleaved pair."""
    pairs = [(seconds(left), seconds(right)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def work_of(engine: Any, data: Any, latent_dim: int, seed: int = 0) -> tuple[Task, Any, Any]:
    """A run taken apart: its task, work area and first state."""
    task = engine.task(PPCA(latent_dim), data, torch.Generator().manual_seed(seed))
    work = engine.prepare(task)
    return task, work, engine.init(task, work)


# ------------------------------------------------------------------ closed form
def closed_form(x: torch.Tensor, latent_dim: int, repeats: int) -> None:
    """A whole run, all checks, summaries and the fingerprint included, beside scikit-learn's."""
    from sklearn.decomposition import PCA

    array, engine = x.numpy(), ClosedForm()
    solvers = ("covariance_eigh", "randomized")
    cost = {s: seconds(lambda s=s: PCA(latent_dim, svd_solver=s).fit(array)) for s in solvers}
    best = min(cost, key=lambda s: cost[s])
    print(f"scikit-learn's best solver here: {best} ({cost})")

    def theirs() -> Any:
        return PCA(latent_dim, svd_solver=best).fit(array)

    ours, other, ratio = compare(lambda: engine.run(PPCA(latent_dim), x), theirs, repeats)
    print(f"whole run with checks:  {ours:.3f} s : {other:.3f} s = {ratio:.2f}")
    product = statistics.median(seconds(lambda: array.T @ array) for _ in range(repeats))
    print(f"X^T X alone: {product:.3f} s")
    difference = np.abs(
        ClosedForm().run(PPCA(latent_dim), x).log_prob(x[:1000]).numpy()
        - theirs().score_samples(array[:1000])
    ).max()
    print(f"largest difference of log densities: {difference:.1e}")


# ------------------------------------------------------------------ iterations
def iterations(x: torch.Tensor, latent_dim: int) -> None:
    """CPU seconds of an iteration after the one pass, and of the pass."""
    data = as_dataset(x)
    for engine, rule in ((EM(num_starts=1), _Mode(False)), (VB(num_starts=1), _Expectation())):
        task, work, _ = work_of(engine, data, latent_dim)
        work = engine.prepare(task)
        first = seconds(lambda w=work: next(iter(w)))
        state = engine.init(task, work)
        ascent = state if isinstance(engine, EM) else state.ascent
        each = statistics.median(
            seconds(lambda a=ascent, w=work, r=rule: ascend(r, w, a)) for _ in range(20)
        )
        name = type(engine).__name__
        print(f"{name}: the pass {first:.3f} s, then {1e3 * each:.2f} ms an iteration")


# ------------------------------------------------------------------ gaps
def per_row(x: np.ndarray[Any, Any], loadings: Any, loc: Any, variance: float) -> Any:
    """The textbook's step: each row's observed block of the covariance, solved apart."""
    q = loadings.shape[1]
    size = q + 1
    second = np.zeros((x.shape[1], size, size))
    cross = np.zeros((x.shape[1], size))
    for row in x:
        seen = ~np.isnan(row)
        own = loadings[seen]
        precision = np.eye(q) + own.T @ own / variance
        mean = np.linalg.solve(precision, own.T @ (row[seen] - loc[seen]) / variance)
        full = np.append(mean, 1.0)
        outer = np.outer(full, full)
        outer[:q, :q] += np.linalg.inv(precision)
        second[seen] += outer
        cross[seen] += row[seen, None] * full
    return second, cross


def gaps(x: torch.Tensor, latent_dim: int, repeats: int, sample: int) -> None:
    """One EM step with a fifth of the entries missing; theirs on some rows, scaled up."""
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    holed = x.masked_fill(hidden, torch.nan)
    engine = EM(num_starts=1)
    task, work, state = work_of(engine, holed, latent_dim)
    values = state.parameters["loadings"]
    loadings, variance = values["loadings"][0].numpy(), float(values["variance"][0, 0])
    offset = task.model.bound.scales.offset
    rows = (holed - offset).numpy()[:sample]
    message = {"loadings": task.model.blocks["loadings"].natural(values)}

    def ours() -> Any:
        return work.sweep(message)

    def theirs() -> Any:
        return per_row(rows, loadings, values["loc"][0].numpy(), variance)

    scale = len(x) / len(rows)
    mine, other, _ = compare(ours, theirs, repeats)
    print(
        f"a step with gaps: {mine:.3f} s : {scale * other:.1f} s a row at a time "
        f"({scale * other / mine:.1f} times)"
    )
    observed = task.model.observe(holed[:sample])
    mine_second = task.model.local(observed, message).statistics["loadings"]["cross"][0]
    error = np.abs(mine_second.numpy() - theirs()[1]).max()
    print(f"largest difference of the statistics: {error:.1e}")


# ------------------------------------------------------------------ from disk
def stream(path: str, latent_dim: int) -> None:
    """Fit from disk, and print time and memory; run in a process of its own."""
    data = as_dataset(path, in_memory=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    taken = seconds(lambda: ClosedForm().run(PPCA(latent_dim), data))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = data.num_rows
    print(
        f"n = {rows:.0e}: closed form {taken:.1f} s ({1e6 * taken / rows:.2f} s a million rows), "
        f"{after - before:.0f} MB above the start",
        flush=True,
    )


def streams(sizes: tuple[int, ...], num_columns: int, latent_dim: int) -> None:
    """Rows of float32 on disk, written in parts."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.npy"
            out = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(size, num_columns)
            )
            for start in range(0, size, 500_000):
                part = simulate(min(500_000, size - start), num_columns, latent_dim, start)
                out[start : start + len(part)] = part.numpy()
            out.flush()
            del out
            command = [sys.executable, __file__, "--stream", str(path), "--q", str(latent_dim)]
            subprocess.run(command, check=True)


def main() -> None:
    """Run all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    parser.add_argument("--q", type=int, default=10)
    parser.add_argument("--only", choices=("closed", "iterations", "gaps", "streams"))
    arguments = parser.parse_args()
    if arguments.stream:
        stream(arguments.stream, arguments.q)
        return
    size, q = (20_000 if arguments.quick else 200_000), arguments.q
    x = simulate(size, 200, q)
    print(f"n = {size:,}, d = 200, q = {q}, float64, {torch.get_num_threads()} thread(s)")
    wanted = (arguments.only,) if arguments.only else ("closed", "iterations", "gaps", "streams")
    if "closed" in wanted:
        closed_form(x, q, 5)
    if "iterations" in wanted:
        iterations(x, q)
    if "gaps" in wanted:
        gaps(x, q, 3, 2_000)
    if "streams" in wanted:
        streams((100_000, 1_000_000) if arguments.quick else (100_000, 10_000_000), 10, 3)


if __name__ == "__main__":
    main()
