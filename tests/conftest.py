"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

__all__: list[str] = []

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors live")
    parser.addoption(
        "--dtype", choices=("float32", "float64"), default="float64", help="dtype of test tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # workers share the cores
    os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test, from ``--device``."""
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda, but torch sees no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The floating dtype under test, from ``--dtype``."""
    name: str = request.config.getoption("--dtype")
    return {"float32": torch.float32, "float64": torch.float64}[name]


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    """A fresh generator on the device under test, always from the same seed."""
    return torch.Generator(device=device).manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data that lies beside the checkout, or a skip that says why."""
    path = Path(os.environ.get("BAYESGEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set BAYESGEN_SHARED_DATA to its folder")
    return path


@pytest.fixture(autouse=True)
def _globals_untouched() -> Iterator[None]:
    """Nothing may leave a mark on torch's global generator, the default dtype, or Pyro's store."""
    import pyro

    before = torch.random.get_rng_state()
    dtype = torch.get_default_dtype()
    yield
    left = sorted(pyro.get_param_store().keys())
    after = torch.random.get_rng_state()
    after_dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    torch.random.set_rng_state(before)
    torch.set_default_dtype(dtype)
    assert not left, f"left in Pyro's global parameter store: {left}"
    assert after_dtype == dtype, f"default dtype changed from {dtype} to {after_dtype}"
    assert torch.equal(before, after), (
        "the test drew from torch's global generator: pass generator=..., or wrap a Pyro program "
        "in bayesgen.rng, the only place that may touch the global generators"
    )
