"""The engines, one file each; every name loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "EM",
    "NUTS",
    "SVI",
    "VB",
    "ClosedForm",
    "Gibbs",
    "Laplace",
    "ManyChains",
    "TrainedGuide",
    "calibrate_engine",
    "prior_predictive",
]

if TYPE_CHECKING:
    from bayesgen.inference.calibrate import calibrate_engine
    from bayesgen.inference.closed_form import ClosedForm
    from bayesgen.inference.em import EM
    from bayesgen.inference.gibbs import Gibbs
    from bayesgen.inference.laplace import Laplace
    from bayesgen.inference.many_chains import ManyChains
    from bayesgen.inference.nuts import NUTS
    from bayesgen.inference.predictive import prior_predictive
    from bayesgen.inference.svi import SVI
    from bayesgen.inference.variational.trained_guide import TrainedGuide
    from bayesgen.inference.vb import VB

_HOMES = {
    "ClosedForm": "bayesgen.inference.closed_form",
    "EM": "bayesgen.inference.em",
    "Gibbs": "bayesgen.inference.gibbs",
    "Laplace": "bayesgen.inference.laplace",
    "ManyChains": "bayesgen.inference.many_chains",
    "NUTS": "bayesgen.inference.nuts",
    "SVI": "bayesgen.inference.svi",
    "TrainedGuide": "bayesgen.inference.variational.trained_guide",
    "VB": "bayesgen.inference.vb",
    "calibrate_engine": "bayesgen.inference.calibrate",
    "prior_predictive": "bayesgen.inference.predictive",
}


def __getattr__(name: str) -> Any:
    """Import an engine on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bayesgen.inference' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
