"""EM and variational Bayes beside scikit-learn: same algorithm, start and tolerance, in one run.

Both sides start from the same hard assignment, in interleaved pairs on the same threads, so that a
busy machine slows both; read the ratios. Peak memory is that of a fresh process each, less what it
held before it loaded the data.

    python benchmarks/mixture.py               # n = 100,000, d = 16, K = 20: about five minutes
    python benchmarks/mixture.py --quick       # a small one, half a minute
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from bayesgen.data import as_dataset
from bayesgen.distributions import NormalInverseWishart
from bayesgen.inference import EM, VB
from bayesgen.inference.conjugate.coordinate import evaluate
from bayesgen.inference.em import _Mode
from bayesgen.inference.run import Task
from bayesgen.inference.vb import VBState, _Expectation
from bayesgen.models import GaussianMixture
from bayesgen.priors import SymmetricDirichlet

__all__ = ["main"]

Array = np.ndarray[Any, Any]
MEGABYTE = 2.0**20


class Clock(NamedTuple):
    """A moment, in seconds."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Clock:
        """This moment."""
        return cls(time.process_time(), time.perf_counter())

    def since(self, earlier: Clock) -> Clock:
        """Seconds since an earlier moment."""
        return Clock(self.cpu - earlier.cpu, self.wall - earlier.wall)


class Outcome(NamedTuple):
    """One fit."""

    steps: list[Clock]
    """Time of each iteration."""
    total: Clock
    means: Array
    objective: float
    """Log likelihood in nats a row (EM); scikit-learn's lower bound lacks constants (VB)."""
    iterations: int


class Case(NamedTuple):
    """What is fitted, from where, and until when."""

    engine: str
    x: Array
    labels: Array
    num_components: int
    max_steps: int
    tolerance: float


# ------------------------------------------------------------ the two sides
def ours(case: Case) -> Outcome:
    """The engine's own steps from the case's assignment."""
    begun = Clock.now()
    dtype = torch.float32 if case.x.dtype == np.float32 else torch.float64
    engine: Any
    limits = {"tolerance": case.tolerance, "max_steps": case.max_steps}
    if case.engine == "em":
        engine = EM("likelihood", num_starts=1, dtype=dtype, **limits)
    else:
        engine = VB(num_starts=1, moves=False, num_samples=1, dtype=dtype, **limits)
    data = as_dataset(case.x)
    model = GaussianMixture(case.num_components, priors=_priors(case)).bind(data)
    generator = torch.Generator().manual_seed(0)
    task = Task(model, data, generator, torch.device("cpu"), dtype)
    work = engine.prepare(task)
    state = _begin(engine, work, torch.as_tensor(case.labels), case.num_components)
    steps, done, count = [], False, 0
    while not done and count < case.max_steps:
        before = Clock.now()
        state, info = engine.step(task, work, state)
        steps.append(Clock.now().since(before))
        done, count = info.done, count + 1
    parts = engine.finish(task, work, state)
    total = Clock.now().since(begun)
    if case.engine == "em":
        means = parts["draws"]["loc"][0, 0]
    else:
        means = parts["posterior"]["components"]["loc"] + data.summary().mean
    objective = float(state.objective[0]) / len(case.x)
    return Outcome(steps, total, means.double().numpy(), objective, count)


def _begin(engine: Any, work: Any, labels: torch.Tensor, num_components: int) -> Any:
    """The state after one update of the parameters from a hard assignment."""
    total: dict[str, dict[str, torch.Tensor]] = {}
    for observed, part in zip(work, labels.split(work.batch_size), strict=True):
        hot = torch.zeros((1, num_components, len(part)), dtype=work.dtype)
        hot.scatter_(1, part[None, None], 1.0)
        for block, values in work.model.assigned(observed, hot).items():
            own = total.setdefault(block, {})
            for name, value in values.items():
                own[name] = own.get(name, 0.0) + value
    rule = _Mode(True) if isinstance(engine, EM) else _Expectation()
    state = evaluate(rule, work, rule.solve(work.model, total, None), 0)
    if isinstance(engine, EM):
        return state
    return VBState(*state, phase="starts", kind=0, failures=0)


def _priors(case: Case) -> dict[str, Any]:
    d = case.x.shape[1]
    loc, one = torch.zeros(d, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    scale_tril = torch.eye(d, dtype=torch.float64)
    return {
        "weights": SymmetricDirichlet(0.1),
        "components": NormalInverseWishart(loc, 0.01 * one, (d + 2.0) * one, scale_tril),
    }


def peer(case: Case) -> Outcome:
    """scikit-learn's class from the case's assignment; an iteration is from E step to E step."""
    from sklearn import mixture

    base: Any = mixture.GaussianMixture if case.engine == "em" else mixture.BayesianGaussianMixture
    moments: list[Clock] = []

    class Timed(base):
        def _initialize_parameters(self, X: Array, *_: object, **__: object) -> None:
            hot = np.zeros((len(X), self.n_components), dtype=X.dtype)
            hot[np.arange(len(X)), case.labels] = 1.0
            self._initialize(X, hot)

        def _e_step(self, X: Array, **settings: Any) -> Any:
            moments.append(Clock.now())
            return super()._e_step(X, **settings)

    d = case.x.shape[1]
    settings: dict[str, Any] = {"n_components": case.num_components, "max_iter": case.max_steps}
    if case.engine == "em":
        # Our floor is 1e-10 of each column's variance, and the columns here have variance one.
        model = Timed(tol=case.tolerance, reg_covar=1e-10, **settings)
    else:
        # scikit-learn's Bayesian bound is a sum over rows, not a mean.
        model = Timed(
            tol=case.tolerance * len(case.x),
            reg_covar=0.0,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=0.1,
            mean_prior=np.zeros(d, case.x.dtype),
            mean_precision_prior=0.01,
            degrees_of_freedom_prior=d + 2.0,
            covariance_prior=np.eye(d, dtype=case.x.dtype),
            **settings,
        )
    begun = Clock.now()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says when it has not converged
        model.fit(case.x)
    total = Clock.now().since(begun)
    steps = [later.since(earlier) for earlier, later in zip(moments, moments[1:], strict=False)]
    rows = 1 if case.engine == "em" else len(case.x)
    objective = float(model.lower_bound_) / rows
    return Outcome(steps, total, model.means_.astype(np.float64), objective, model.n_iter_)


SIDES: dict[str, Callable[[Case], Outcome]] = {"bayesgen": ours, "scikit-learn": peer}


# ------------------------------------------------------------ data
def make(rows: int, columns: int, components: int, seed: int = 0) -> tuple[Array, Array]:
    """Overlapping blobs with columns of mean zero and variance one, and k-means labels."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    loc = 1.2 * rng.standard_normal((components, columns))
    x = loc[rng.integers(components, size=rows)] + rng.standard_normal((rows, columns))
    x = (x - x.mean(0)) / x.std(0)
    start = KMeans(components, n_init=1, max_iter=5, random_state=seed).fit(x[:10_000])
    return x, start.predict(x).astype(np.int64)


# ------------------------------------------------------------ measurements
def compare(case: Case, pairs: int) -> None:
    """Print the times of one engine and precision, and the difference of the means."""
    few = case._replace(max_steps=8, tolerance=0.0)
    times: dict[str, list[Clock]] = {name: [] for name in SIDES}
    means = {}
    for index in range(pairs + 1):
        for name, side in SIDES.items():
            found = side(few)
            means[name] = found.means
            if index:  # the first pair warms up
                times[name] += found.steps[1:]
    label = f"{case.engine.upper():3s}{str(case.x.dtype):8s}"
    _row(f"{label} an iteration", *(_median(times[name]) for name in SIDES))
    full = {name: side(case) for name, side in SIDES.items()}
    _row(f"{label} to convergence", *(full[name].total for name in SIDES))
    difference = float(np.abs(means["bayesgen"] - means["scikit-learn"]).max())
    print(
        f"{label} means after 8 iterations differ by {difference:.1e}; iterations to convergence "
        f"{full['bayesgen'].iterations} and {full['scikit-learn'].iterations}; objective "
        f"{full['bayesgen'].objective:.9f} and {full['scikit-learn'].objective:.9f} nats a row"
    )


def _median(clocks: list[Clock]) -> Clock:
    return Clock(
        statistics.median(c.cpu for c in clocks), statistics.median(c.wall for c in clocks)
    )


def _row(label: str, mine: Clock, theirs: Clock) -> None:
    print(
        f"{label:28s} cpu {mine.cpu:8.4f} s : {theirs.cpu:8.4f} s = 1/{theirs.cpu / mine.cpu:5.2f}"
        f"   wall {mine.wall:8.4f} s : {theirs.wall:8.4f} s = 1/{theirs.wall / mine.wall:5.2f}",
        flush=True,
    )


def memory(case: Case, threads: int) -> None:
    """Print the peak memory of a fresh process for each side."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "case.npz", x=case.x, labels=case.labels)
        for name in SIDES:
            command = [sys.executable, __file__, "--worker", name, folder, case.engine]
            command += ["--components", str(case.num_components), "--threads", str(threads)]
            out = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(out.stdout)
    mine, theirs = (found[name] / MEGABYTE for name in SIDES)
    size = case.x.nbytes / MEGABYTE
    print(
        f"{case.engine.upper():3s}{str(case.x.dtype):8s} peak memory, data ({size:.0f} MB) "
        f"included: {mine:.0f} MB : {theirs:.0f} MB = 1/{theirs / mine:.2f}",
        flush=True,
    )


def worker(name: str, folder: str, engine: str, components: int) -> None:
    """Fit once in this process and print how far its memory rose, in bytes."""
    rng = np.random.default_rng(0)
    with np.load(Path(folder) / "case.npz") as file:
        dtype, d = file["x"].dtype, file["x"].shape[1]
    small = rng.standard_normal((components * 20, d)).astype(dtype)
    labels = np.arange(len(small)) % components
    SIDES[name](Case(engine, small, labels, components, 3, 0.0))  # what loads lazily is loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    with np.load(Path(folder) / "case.npz") as file:
        case = Case(engine, file["x"], file["labels"], components, 5, 0.0)
    SIDES[name](case)
    print(json.dumps(_peak() - before))


def _peak() -> int:
    """Largest resident size of this process, bytes: unlike ``ru_maxrss`` not its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def offsets(case: Case) -> None:
    """Print what an offset of 1e8 in every column costs."""
    from sklearn.mixture import GaussianMixture as Peer

    few = case._replace(max_steps=8, tolerance=0.0)
    far = few._replace(x=few.x + 1e8)
    # The same rows, as float64 holds them at 1e8, moved back exactly.
    near = few._replace(x=far.x - 1e8)
    for name, side in SIDES.items():
        _offset_row(name, "full", [side(near).objective, side(far).objective])
    diagonal: dict[str, list[float]] = {name: [] for name in SIDES}
    for x in (near.x, far.x):
        ours_too = GaussianMixture(case.num_components, "diagonal")
        fit = EM("likelihood", num_starts=1, tolerance=0.0, max_steps=8).run(ours_too, x, seed=0)
        diagonal["bayesgen"].append(fit.attrs["objective"] / len(x))
        there = Peer(case.num_components, covariance_type="diag", max_iter=8, random_state=0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                diagonal["scikit-learn"].append(float(there.fit(x).lower_bound_))
        except ValueError as error:
            print(f"scikit-learn, diagonal covariance, refuses: {str(error).split('.')[0]}")
    for name, values in diagonal.items():
        _offset_row(name, "diagonal", values)


def _offset_row(name: str, covariance: str, values: list[float]) -> None:
    if len(values) == 2:
        a, b = values
        print(
            f"log likelihood a row at offset 0 and 1e8, {name:12s} {covariance} covariance: "
            f"{a:.9f}, {b:.9f}: relative difference {abs(a / b - 1.0):.1e}"
        )


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--components", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved repetitions")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="nats a row")
    parser.add_argument("--quick", action="store_true", help="10,000 rows, two pairs")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with threadpool_limits(a.threads):
        if a.worker:
            worker(*a.worker, a.components)
            return
        rows, pairs = (10_000, 2) if a.quick else (a.rows, a.pairs)
        x, labels = make(rows, a.columns, a.components)
        print(f"bayesgen : scikit-learn, n={rows}, d={a.columns}, K={a.components}, "
              f"{a.threads} thread(s)")  # fmt: skip
        for engine in ("em", "vb"):
            for dtype in (np.float64, np.float32):
                case = Case(engine, x.astype(dtype), labels, a.components, 500, a.tolerance)
                compare(case, pairs)
                memory(case, a.threads)
        offsets(Case("em", x, labels, a.components, 8, 0.0))


if __name__ == "__main__":
    main()
