"""Likelihood of degrees of freedom from sums at Chebyshev nodes, against the direct sum."""

from __future__ import annotations

import math

import pytest
import torch

from bayesgen import rng
from bayesgen.models.linear import tails
from bayesgen.models.linear.tails import tail_likelihood, tail_sums

__all__: list[str] = []

N, D = 200, 3


def cells(scale, dtype=torch.float64):
    generator = rng.make_generator(0)
    distance = (scale * rng.standard_normal((2, N, D), generator)).square()
    observed = torch.rand((N, D), generator=generator, dtype=torch.float64) < 0.8
    return distance.to(dtype), observed.to(dtype)


def log_df():
    points = torch.linspace(math.log(0.1), math.log(1000.0), 501, dtype=torch.float64)
    return points.expand(2, D, -1)


def direct(distance, observed):
    law = torch.distributions.StudentT(log_df().exp().unsqueeze(-3))
    each = law.log_prob(distance.double().sqrt().unsqueeze(-1))
    return (each * observed.double().unsqueeze(-1)).sum(-3)


def gap(scale, dtype=torch.float64):
    """Largest difference, in nats a cell."""
    distance, observed = cells(scale, dtype)
    found = tail_likelihood(tail_sums(distance, observed), observed.sum(0))(log_df())
    return float((found - direct(distance, observed)).abs().max()) / N


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.01, 0.3, 1.0, 3.0, 10.0, 30.0, 1e3, 1e8])
def test_interpolated_is_direct(scale):
    assert gap(scale) < 1e-8
    assert gap(scale, torch.float32) < 1e-8


def test_half_the_nodes_are_too_few(monkeypatch):
    monkeypatch.setattr(tails, "_NODES", 16)
    assert gap(3.0) > 1e-8


def test_sums_add_up_over_batches():
    distance, observed = cells(2.0)
    whole = tail_sums(distance, observed)
    parts = [
        tail_sums(distance[..., part, :], observed[part]) for part in (slice(0, 71), slice(71, N))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-13, atol=0)
