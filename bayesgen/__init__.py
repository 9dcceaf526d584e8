"""Bayesian generative models with Pyro: fit, diagnose, generate, and find what does not belong.

Everything here loads on first use, so that ``import bayesgen`` stays cheap:

    >>> import bayesgen
    >>> bayesgen.__version__
    '0.1.0'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Fit",
    "__version__",
    "calibration",
    "capabilities",
    "data",
    "datasets",
    "diagnostics",
    "distributions",
    "inference",
    "load",
    "models",
    "outliers",
    "plots",
    "priors",
    "testing",
]

__version__ = "0.1.0"

if TYPE_CHECKING:  # the two wings are named but never imported here: the core does not see them
    from bayesgen import (
        calibration,
        capabilities,
        data,
        datasets,
        diagnostics,
        distributions,
        outliers,
        plots,
        priors,
        testing,
    )
    from bayesgen.fit import Fit, load

_ATTRIBUTES = {"Fit": "bayesgen.fit", "load": "bayesgen.fit"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _ATTRIBUTES:
        value = getattr(import_module(_ATTRIBUTES[name]), name)
    elif name in __all__:
        value = import_module(f"bayesgen.{name}")
    else:
        raise AttributeError(f"module 'bayesgen' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
