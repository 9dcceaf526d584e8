"""The models, one file each; every name loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "PPCA",
    "BayesianPCA",
    "FactorAnalysis",
    "GaussianMixture",
    "Mixture",
    "MixtureClassifier",
    "RobustPCA",
]

if TYPE_CHECKING:
    from bayesgen.models.bayesian_pca import BayesianPCA
    from bayesgen.models.classifier import MixtureClassifier
    from bayesgen.models.mixture import GaussianMixture, Mixture
    from bayesgen.models.ppca import PPCA, FactorAnalysis
    from bayesgen.models.robust_pca import RobustPCA

_HOMES = {
    "BayesianPCA": "bayesgen.models.bayesian_pca",
    "PPCA": "bayesgen.models.ppca",
    "FactorAnalysis": "bayesgen.models.ppca",
    "RobustPCA": "bayesgen.models.robust_pca",
    "GaussianMixture": "bayesgen.models.mixture",
    "Mixture": "bayesgen.models.mixture",
    "MixtureClassifier": "bayesgen.models.classifier",
}


def __getattr__(name: str) -> Any:
    """Import a model on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bayesgen.models' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
