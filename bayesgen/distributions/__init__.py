"""Distributions that Pyro lacks: covariance priors by Cholesky factors, missing entries, mixtures.

Importing this package registers their bijections with PyTorch, so that they work as priors under
NUTS, SVI and every autoguide.
"""

from __future__ import annotations

from bayesgen.distributions.constraints import (
    CholeskyFactorTransform,
    LocCholeskyTransform,
    LocVarianceTransform,
    PositiveDefiniteTransform,
    cholesky_factor,
    loc_cholesky,
    loc_variance,
)
from bayesgen.distributions.horseshoe_precision import HorseshoePrecision
from bayesgen.distributions.inverse_wishart import InverseWishart, InverseWishartCholesky
from bayesgen.distributions.low_rank import (
    PartialLowRankMultivariateNormal,
    PartialLowRankMultivariateStudentT,
    Summed,
)
from bayesgen.distributions.normal_inverse_gamma import NormalInverseGamma
from bayesgen.distributions.normal_inverse_wishart import NaturalExpectations, NormalInverseWishart
from bayesgen.distributions.partial import (
    PartialMultivariateNormal,
    PartialMultivariateStudentT,
    partial_real_vector,
)
from bayesgen.distributions.root_inverse_gamma import RootInverseGamma
from bayesgen.distributions.student_t_mixture import StudentTMixture

__all__ = [
    "CholeskyFactorTransform",
    "HorseshoePrecision",
    "InverseWishart",
    "InverseWishartCholesky",
    "LocCholeskyTransform",
    "LocVarianceTransform",
    "NaturalExpectations",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "PartialLowRankMultivariateNormal",
    "PartialLowRankMultivariateStudentT",
    "PartialMultivariateNormal",
    "PartialMultivariateStudentT",
    "PositiveDefiniteTransform",
    "RootInverseGamma",
    "StudentTMixture",
    "Summed",
    "cholesky_factor",
    "loc_cholesky",
    "loc_variance",
    "partial_real_vector",
]
