"""Symmetries: aligning the draws of a model whose posterior is unchanged by a group.

A mixture's likelihood does not change when its components are renumbered, nor a factor model's
when its latent space is rotated, so draws must be aligned before R-hat, effective sample sizes or
means of single entries say anything. Quantities that the group leaves alone
(:meth:`~bayesgen.capabilities.Symmetric.invariants`) need no alignment and are reported beside.
"""

from __future__ import annotations

from bayesgen.symmetry.base import Alignment, Symmetry, align
from bayesgen.symmetry.labels import LabelPermutation, match
from bayesgen.symmetry.rotation import Rotation
from bayesgen.symmetry.subspace import factor_invariants, principal_angles, rotate_onto

__all__ = [
    "Alignment",
    "LabelPermutation",
    "Rotation",
    "Symmetry",
    "align",
    "factor_invariants",
    "match",
    "principal_angles",
    "rotate_onto",
]
