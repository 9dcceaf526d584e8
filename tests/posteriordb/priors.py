"""Flat and ordered priors, as Stan's programs write them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints

__all__ = ["flat", "flat_positive", "ordered"]


def flat(size):
    """A flat prior on ``size`` real numbers."""
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def flat_positive():
    """A flat prior on a positive number."""
    return dist.ImproperUniform(constraints.positive, (), ())


def ordered(name, prior, *, positive=False):
    """Increasing numbers, each under its own prior: a vector site, and a factor for the prior."""
    kind = constraints.positive_ordered_vector if positive else constraints.ordered_vector
    size = prior.batch_shape.numel()
    value = pyro.sample(name, dist.ImproperUniform(kind, (), (size,)))
    pyro.factor(f"{name}_prior", prior.log_prob(value).sum())
    return value
