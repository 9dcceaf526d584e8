"""Flat priors: where a run starts that cannot draw from them, and which sites have one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import ImproperUniform, MaskedDistribution
from torch import Tensor

from bayesgen.gaps import imputed_name
from bayesgen.inference.programs.complaints import bijection
from bayesgen.inference.programs.sites import RADIUS, shape_before
from bayesgen.replay import unwrapped

__all__ = ["flat_sites", "starting_in_the_support"]


@contextmanager
def starting_in_the_support() -> Iterator[None]:
    """Inside, a sample of a flat prior is a point of its support, as if it were a start.

    For the first run of a program and of guides made from it, which take shapes from such samples
    deep inside Pyro. To be entered under the lock of :func:`bayesgen.replay.quietly`.
    """
    before = ImproperUniform.sample
    ImproperUniform.sample = _point
    try:
        yield
    finally:
        ImproperUniform.sample = before


def _point(law: Any, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
    """Uniform within 2 of the origin on the unconstrained scale."""
    transform = bijection(law)
    shape = shape_before(transform, torch.Size((*sample_shape, *law.shape())))
    value: Tensor = transform(RADIUS * (2 * torch.rand(shape) - 1))
    return value


def flat_sites(nodes: Mapping[str, Any]) -> list[str]:
    """Latents of a trace whose prior is flat: improper, or masked as a whole."""
    sites = {name: node for name, node in nodes.items() if node["type"] == "sample"}
    proper = {imputed_name(node) for node in sites.values()}  # by the density of a second site
    return [
        name
        for name, node in sites.items()
        if not node["is_observed"] and name not in proper and _is_flat(node["fn"])
    ]


def _is_flat(law: Any) -> bool:
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    masked = isinstance(law, MaskedDistribution) and law._mask is False
    return masked or isinstance(unwrapped(law), ImproperUniform)
