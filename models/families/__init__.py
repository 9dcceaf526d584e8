"""Component families of mixtures; every name loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesgen.models.families.base import Family
    from bayesgen.models.families.bernoulli import Bernoulli
    from bayesgen.models.families.categorical import Categorical
    from bayesgen.models.families.diagonal import DiagonalGaussian
    from bayesgen.models.families.gaussian import Gaussian
    from bayesgen.models.families.poisson import Poisson
    from bayesgen.models.families.product import Product
    from bayesgen.models.families.student_t import StudentT

__all__ = [
    "FAMILIES",
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "Gaussian",
    "Poisson",
    "Product",
    "StudentT",
    "family_class",
]

FAMILIES = {
    "Bernoulli": "bayesgen.models.families.bernoulli",
    "Categorical": "bayesgen.models.families.categorical",
    "DiagonalGaussian": "bayesgen.models.families.diagonal",
    "Gaussian": "bayesgen.models.families.gaussian",
    "Poisson": "bayesgen.models.families.poisson",
    "Product": "bayesgen.models.families.product",
    "StudentT": "bayesgen.models.families.student_t",
}
"""Where each family lives: saved models name a family by its key here, never by its module."""


def family_class(name: str) -> type[Family]:
    """The family class of this name."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; known are {', '.join(sorted(FAMILIES))}.")
    found: type[Family] = getattr(import_module(FAMILIES[name]), name)
    return found


def __getattr__(name: str) -> Any:
    """Import a family on first use (PEP 562)."""
    if name not in FAMILIES:
        raise AttributeError(f"module 'bayesgen.models.families' has no attribute {name!r}")
    value = globals()[name] = family_class(name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
