"""``bayesgen doctor``: is this installation fit to work?"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bayesgen

__all__ = ["examine"]

_PACKAGES = (
    "torch",
    "pyro",
    "arviz",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "sklearn",
    "matplotlib",
    "xarray",
    "safetensors",
)


def examine() -> int:
    """Print one line for each check.

    Returns:
        0 when all is well, 1 when something is not.
    """
    print(f"bayesgen {bayesgen.__version__} in {Path(bayesgen.__file__).parent}")
    print(f"python {platform.python_version()} ({sys.executable}) on {platform.platform()}")
    checks: list[tuple[str, Callable[[], str]]] = [(n, _version(n)) for n in _PACKAGES]
    checks += [
        ("threads", _threads),
        ("CUDA", _cuda),
        ("models", _declared),
        ("write", _write),
        ("fit", _fit),
    ]
    failed = [name for name, check in checks if not _report(name, check)]
    print("all is well" if not failed else f"NOT well: {', '.join(failed)}")
    return 1 if failed else 0


def _report(name: str, check: Callable[[], str]) -> bool:
    try:
        told, well = check(), True
    except Exception as error:  # a doctor reports whatever it finds
        told, well = f"{type(error).__name__}: {error}", False
    print(f"{'ok  ' if well else 'FAIL'} {name:<12} {told}", flush=True)
    return well


def _version(name: str) -> Callable[[], str]:
    return lambda: str(importlib.import_module(name).__version__)


def _threads() -> str:
    import torch

    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"torch uses {torch.get_num_threads()} on {usable} processors"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none; everything runs on the processor"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _declared() -> str:
    from bayesgen.app.registry import ENGINES, MODELS, find, names

    for group in (MODELS, ENGINES):
        if not names(group):
            raise RuntimeError(f"no entry points {group}; install bayesgen: pip install -e .")
        for name in names(group):
            find(group, name)
    return f"{', '.join(names(MODELS))}; engines {', '.join(names(ENGINES))}"


def _write() -> str:
    import torch

    from bayesgen.storage import read_folder, write_folder

    with tempfile.TemporaryDirectory() as place:
        values = torch.linspace(0.0, 1.0, 7)
        write_folder(Path(place) / "x", tensors={"values": values}, config={})
        tensors, _, _ = read_folder(Path(place) / "x")
        if not torch.equal(tensors["values"], values):
            raise RuntimeError(f"what was written to {place} came back changed")
        return f"a save and a load in {place}"


def _fit() -> str:
    from bayesgen import datasets
    from bayesgen.inference import VB
    from bayesgen.models import GaussianMixture

    before = time.perf_counter()
    fit = VB(num_starts=2, num_samples=100).run(GaussianMixture(4), datasets.load("faithful"))
    count, seconds = fit.attrs["num_occupied"], time.perf_counter() - before
    if count != 2:
        raise RuntimeError(f"Old Faithful has 2 clusters, but {count} were found")
    return f"2 clusters in Old Faithful, {seconds:.1f} s"
