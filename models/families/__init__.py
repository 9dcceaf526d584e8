"""Component families of mixtures; every name loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesgen.models.families.base import Family

__all__ = ["FAMILIES", "family_class"]

FAMILIES = {
    "Bernoulli": "bayesgen.models.families.bernoulli",
    "Categorical": "bayesgen.models.families.categorical",
    "DiagonalGaussian": "bayesgen.models.families.diagonal",
    "Gaussian": "bayesgen.models.families.gaussian",
    "Poisson": "bayesgen.models.families.poisson",
    "Product": "bayesgen.models.families.product",
    "StudentT": "bayesgen.models.families.student_t",
}
"""Where each family lives: saved models name a family by its key here, never by a module of their own."""


def family_class(name: str) -> type[Family]:
    """The family class of this name."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; known are {', '.join(sorted(FAMILIES))}.")
    found: type[Family] = getattr(import_module(FAMILIES[name]), name)
    return found
